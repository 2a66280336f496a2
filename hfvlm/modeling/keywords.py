"""Unknown keyword arguments are errors: a model never swallows one.

A method declares by `**kwargs: Unpack[Keywords]` those that it takes next to its own, and passes on.
"""

import functools
import inspect
import typing
from collections.abc import Callable, Collection
from typing import Any, TypedDict

import torch
from torch import Tensor
from transformers.generation import GenerationConfig, GenerationMixin

from hfvlm.checks.keywords import check_keywords, parameters
from hfvlm.modeling.compat import CACHE, CACHE_NAMES, rename_cache


class Keywords(TypedDict, total=False):
    """transformers' own keywords, which every model takes and hands on to its attention functions.

    They are those of its `TransformersKwargs` but `position_ids`, which a tower that counts its own would ignore.
    """

    return_dict: bool | None
    output_hidden_states: bool | int | list[int] | None
    output_attentions: bool | None
    output_cross_attentions: bool | None
    output_router_logits: bool | None
    is_causal: bool | None
    num_items_in_batch: Tensor | int | None
    cu_seq_lens_q: Tensor | None
    cu_seq_lens_k: Tensor | None
    max_length_q: int | None
    max_length_k: int | None
    seq_idx: Tensor | None


# The attention implementations of vLLM and SGLang, and what these find among the keywords of a language model.
SERVERS = frozenset({"vllm", "sglang"})
SERVER_KEYWORDS = frozenset({"attention_instances", "forward_batch"})


class Unlisted(str):
    """A parameter's name in which transformers' Trainer finds no "label"."""

    __slots__ = ()

    def __contains__(self, part: str) -> bool:  # type: ignore[override]
        return part != "label" and super().__contains__(part)


# Names in a signature for others that look there: `generate` for the cache, by its own name, and the Trainer for what
# every batch must have before it computes a loss in evaluations, which `shift_labels`, in place of `labels`, are not.
_SEEN_AS = {"cache": CACHE, "shift_labels": Unlisted("shift_labels")}


class StrictKeywords:
    """Base of classes whose `forward`, `generate` and `get_*_features` refuse keyword arguments that they don't know.

    A forward that takes a `cache` takes it also as `past_key_values`.
    """

    def __init_subclass__(cls, **kwargs: Any):
        super().__init_subclass__(**kwargs)
        for name, method in list(vars(cls).items()):
            if name == "forward" or (name.startswith("get_") and name.endswith("_features")):
                setattr(cls, name, strict(method))
            elif name == "generate":
                setattr(cls, name, strict_generate(method))

    def further_keywords(self, method: str) -> Collection[str]:
        """Return the names that a method takes next to those in its signature, and hands on to another module."""
        return ()


def keywords_of(module: Any) -> frozenset[str]:
    """Return the names of the arguments that a module's forward has in its signature, or takes next to them."""
    if isinstance(module, StrictKeywords):
        return type(module).forward.own_keywords.union(module.further_keywords("forward"))  # type: ignore[attr-defined]
    if "forward" in vars(module) or torch.compiler.is_compiling():
        return parameters(module.forward)
    return method_keywords(type(module).forward)


@functools.cache
def method_keywords(method: Callable[..., Any]) -> frozenset[str]:
    """Return the names in the signature of a class's method, read once: a step of a generation asks for them."""
    return parameters(method)


def tower_keywords(model: Any, method: str) -> frozenset[str]:
    """Return those of the tower that a `get_<modality>_features` hands its keywords on to."""
    tower = model.towers.get(method.removeprefix("get_").removesuffix("_features"))
    return frozenset() if tower is None else keywords_of(getattr(model, tower))


def strict(method: Callable[..., Any]) -> Callable[..., Any]:
    """Make a method refuse keyword arguments that are neither its own nor those which its `**kwargs` declare.

    Raises:
        TypeError: the method has `**kwargs` that declare nothing.
    """
    signature = inspect.signature(method)
    own = parameters(method)
    known = own | _declared_keywords(method, signature)

    @functools.wraps(method)
    def checked(self: Any, *args: Any, **kwargs: Any) -> Any:
        if "cache" in own and "past_key_values" in kwargs:
            rename_cache(f"{type(self).__name__}.{method.__name__}()", kwargs, "cache")
        if not known.issuperset(kwargs):
            further = self.further_keywords(method.__name__)
            check_keywords(f"{type(self).__name__}.{method.__name__}()", kwargs, {*known, *further})
        return method(self, *args, **kwargs)

    checked.own_keywords = own  # type: ignore[attr-defined]
    checked.__signature__ = signature.replace(  # type: ignore[attr-defined]
        parameters=[p.replace(name=_SEEN_AS.get(p.name, p.name)) for p in signature.parameters.values()]
    )
    return checked


def strict_generate(method: Callable[..., Any]) -> Callable[..., Any]:
    """Make a `generate` refuse keywords that neither transformers' `generate` nor the model's forward takes."""
    own = parameters(method) | _GENERATE

    @functools.wraps(method)
    def checked(self: Any, *args: Any, **kwargs: Any) -> Any:
        owner = f"{type(self).__name__}.generate()"
        rename_cache(owner, kwargs, CACHE)
        if not own.issuperset(kwargs):
            check_keywords(owner, kwargs, {*own, *keywords_of(self), *self.further_keywords("forward")})
        return method(self, *args, **kwargs)

    return checked


def _declared_keywords(method: Callable[..., Any], signature: inspect.Signature) -> frozenset[str]:
    rest = next((p for p in signature.parameters.values() if p.kind is inspect.Parameter.VAR_KEYWORD), None)
    if rest is None:
        return frozenset()
    declared = next(iter(typing.get_args(rest.annotation)), None)
    if not typing.is_typeddict(declared):
        raise TypeError(f"{method.__qualname__} must declare **{rest.name}, as by `Unpack[Keywords]`.")
    return frozenset(typing.get_type_hints(declared))


_GENERATE = (
    parameters(GenerationMixin.generate)
    | frozenset(vars(GenerationConfig()))
    | frozenset(Keywords.__optional_keys__)
    | frozenset({*CACHE_NAMES, "tokenizer", "assistant_tokenizer", "trust_remote_code", "input_ids", "inputs_embeds"})
)
