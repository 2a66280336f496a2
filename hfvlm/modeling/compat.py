"""Differences between the versions of transformers that hfvlm runs on.

transformers 5.24 renamed the cache of keys and values that models take and return from `past_key_values` to `cache`.
In hfvlm it is `cache` everywhere, and this module has transformers' name of it.
"""

import inspect
import warnings
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.generation import GenerationMixin
from transformers.masking_utils import create_causal_mask

CACHE_NAMES = ("cache", "past_key_values")
# transformers' own name: the argument of a forward, the field of an output, the argument of a mask.
CACHE = next(
    name for name in CACHE_NAMES if name in inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters
)


def with_cache(cache: Cache | None) -> dict[str, Any]:
    """Return the argument or field by which transformers' classes take a cache."""
    return {CACHE: cache}


def rename_cache(owner: str, kwargs: dict[str, Any], name: str = "cache") -> None:
    """Give the cache among keyword arguments one name, whichever of the two it came by.

    Where transformers calls it `cache`, the old name warns, as it does there.

    Raises:
        TypeError: `owner`, whose arguments they are, got both.
    """
    old = CACHE_NAMES[1]
    if old in kwargs and old != CACHE and not torch.compiler.is_compiling():
        warnings.warn(f"`{old}` is deprecated for `{owner}`. Use `cache` instead.", FutureWarning, stacklevel=3)
    given = [kwargs.pop(other) for other in CACHE_NAMES if other in kwargs]
    if len(given) > 1:
        raise TypeError(f"{owner} got both `cache` and `past_key_values`, which are the same: give one.")
    if given:
        kwargs[name] = given[0]


class StepInputs(dict[str, Any]):
    """Inputs of a step of a generation, whose cache has either name when one of them is read or set.

    PEFT's soft prompts (0.21) begin again with each token for which they find no `past_key_values`.
    """

    def get(self, name: str, default: Any = None) -> Any:
        return super().get(CACHE if name in CACHE_NAMES else name, default)

    def __getitem__(self, name: str) -> Any:
        return super().__getitem__(CACHE if name in CACHE_NAMES else name)

    def __setitem__(self, name: str, value: Any) -> None:
        super().__setitem__(CACHE if name in CACHE_NAMES else name, value)


def cache_of(output: Any) -> Any:
    """Return the cache in an output or in keyword arguments, None where there is none."""
    return output.get(CACHE)


def new_cache(model: PreTrainedModel) -> DynamicCache:
    """Return an empty cache for the layers of a model's decoder."""
    return DynamicCache(config=model.config.get_text_config(decoder=True))


def begin_cache(model: PreTrainedModel, cache: Cache | None, *, use_cache: bool | None) -> Cache | None:
    """Return the cache that a decoder's step updates, made where one is wanted and none is given.

    Raises:
        ValueError: one is given in training under gradient checkpointing.
    """
    if model.training and torch.is_grad_enabled() and is_checkpointing(model):
        if cache is not None:
            raise ValueError("Under gradient checkpointing layers run twice, and would update a cache twice.")
        return None
    if use_cache and cache is None:
        return new_cache(model)
    return cache


def is_checkpointing(model: PreTrainedModel) -> bool:
    """Return whether layers run again for their gradients, by the name that transformers has for it."""
    name = "is_activation_checkpointing"
    return getattr(model, name if hasattr(type(model), name) else "is_gradient_checkpointing")


def causal_mask(config: PreTrainedConfig, x: Tensor, attention_mask: Tensor | None, cache: Cache | None = None) -> Any:
    """Make the mask by which each token attends to itself and to those before it.

    Args:
        config: whose attention implementation decides the form of the mask.
        x: `(B, N, D)`, the tokens' embeddings.
        attention_mask: `(B, past + N)`, 0 for padding; None for no padding.
        cache: of the tokens before.
    """
    return create_causal_mask(config=config, inputs_embeds=x, attention_mask=attention_mask, **with_cache(cache))


def prefix_mask(
    config: PreTrainedConfig, x: Tensor, attention_mask: Tensor | None, cache: Cache | None, prefix: Tensor
) -> Any:
    """Make the mask by which tokens of a prefix attend to all of it, and others to themselves and those before them.

    Args:
        config: whose attention implementation decides the form of the mask.
        x: `(B, N, D)`, the tokens' embeddings.
        attention_mask: `(B, N)`, 0 for padding; None for no padding.
        cache: without tokens so far.
        prefix: `(B, N)`, True for a token of the prefix.
    """
    blocks = torch.where(prefix, 0, -1)
    given = {"config": config, "inputs_embeds": x, "attention_mask": attention_mask, **with_cache(cache)}
    if "block_sequence_ids" in inspect.signature(create_causal_mask).parameters:
        return create_causal_mask(**given, block_sequence_ids=blocks)
    return create_causal_mask(**given, or_mask_function=_same_block(blocks))


def _same_block(blocks: Tensor) -> Any:
    """What `block_sequence_ids` mean, for transformers before 5.24, whose static caches are longer than the ids."""
    last = blocks.shape[1] - 1

    def inner(batch: Any, head: Any, query: Any, key: Any) -> Any:
        known = (query <= last) & (key <= last)
        own, other = (blocks[batch, torch.clamp(torch.as_tensor(i), max=last)] for i in (query, key))
        return known & (own == other) & (own >= 0)

    return inner
