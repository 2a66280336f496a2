"""Language models of hfvlm's own, where transformers has none."""

from collections.abc import Callable
from functools import partial
from typing import Any, Unpack

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.modeling_outputs import CausalLMOutputWithCrossAttentions
from transformers.utils import ModelOutput
from transformers.utils.generic import can_return_tuple

from hfvlm.losses import output_layer_loss
from hfvlm.modeling.compat import cache_of, with_cache
from hfvlm.modeling.generation import Generation
from hfvlm.modeling.keywords import Keywords
from hfvlm.modeling.outputs import LateLanguageOutput
from hfvlm.modules.language_head import last_tokens


def next_token_loss(
    config: PreTrainedConfig, logits: Tensor, labels: Tensor | None, shift_labels: Tensor | None, count: Any = None
) -> Tensor | None:
    """Compute the cross-entropy of each next token, the mean over labels that are not -100.

    Args:
        config: of the model; the vocabulary is its decoder's.
        logits: `(B, N, V)`.
        labels: `(B, N)`, the ids themselves, which are shifted here.
        shift_labels: `(B, N)`, labels that are shifted already.
        count: divisor of the sum, in place of the number of labels.

    Returns:
        The loss, None without labels.
    """
    if labels is None and shift_labels is None:
        return None
    size = config.get_text_config(decoder=True).vocab_size
    return ForCausalLMLoss(logits, labels, size, count, shift_labels=shift_labels)


# Language models of transformers whose scores are the products of their last hidden states with their output layer.
PLAIN_SCORES = frozenset({"gpt_neox", "hfvlm_qwen", "llama", "mistral", "mpt", "opt", "qwen2"})


def next_tokens(
    model: Any,
    score: Callable[[Tensor], Tensor],
    x: Tensor,
    labels: Tensor | None,
    shift_labels: Tensor | None,
    count: Any = None,
    keep: int | Tensor = 0,
) -> dict[str, Any]:
    """Score the next tokens, and compute their loss where there are labels: the fields of a `LateLogits`.

    For gradients, tokens without a label are not scored, and `logits` are computed when they are read.

    Args:
        model: whose output these are; its configuration has the vocabulary.
        score: hidden states `(..., D)` to scores `(..., V)`: an output layer, or what ends with one.
        x: `(B, N, D)`, the last hidden states.
        labels: see `next_token_loss`, as `shift_labels` and `count`.
        keep: score only the last n tokens, or those at these positions; 0 scores all.
    """
    if labels is None and shift_labels is None:
        return {"logits": score(last_tokens(x, keep))}
    if not (keeps_all(keep) and is_late(model)):
        logits = score(last_tokens(x, keep))
        return {"loss": next_token_loss(model.config, logits, labels, shift_labels, count), "logits": logits}
    if shift_labels is None:
        shift_labels = F.pad(labels, (0, 1), value=-100)[:, 1:]  # type: ignore[arg-type]
    shift_labels = shift_labels.to(x.device)
    labelled = shift_labels != -100
    total = labelled_loss(score, x[labelled], shift_labels[labelled])
    divisor = labelled.sum() if count is None else count
    loss = total / (divisor.to(total.device) if isinstance(divisor, Tensor) else divisor)
    return {"loss": loss, "late_logits": partial(score, x)}


def as_output(scores: dict[str, Any], **others: Any) -> CausalLMOutputWithCrossAttentions:
    """Make an output of what `next_tokens` returned, and of other fields."""
    kind = CausalLMOutputWithCrossAttentions if "logits" in scores else LateLanguageOutput
    return kind(**scores, **others)


def keeps_all(keep: int | Tensor) -> bool:
    """Return whether `logits_to_keep` keeps the logits of all tokens."""
    return isinstance(keep, int) and keep == 0


def is_late(model: Any) -> bool:
    """Decide whether logits can wait until they are read: in training, where an output may hold what is no tensor."""
    traced = torch.compiler.is_compiling() or torch.jit.is_tracing() or getattr(model, "_is_replica", False)
    return torch.is_grad_enabled() and not traced


def labelled_loss(score: Callable[[Tensor], Tensor], x: Tensor, labels: Tensor) -> Tensor:
    """Sum the losses of hidden states `(M, D)` with labels `(M,)`, a part at a time where the scores are those of a
    plain layer; others (adapters, sharded or offloaded weights) are called."""
    if is_plain_layer(score):
        layer: Any = score
        return output_layer_loss(x, layer.weight, layer.bias, labels)
    logits = score(x.unsqueeze(0)).squeeze(0)
    return F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), labels, reduction="sum")


def is_plain_layer(score: Any) -> bool:
    """Decide whether scores are the product with a weight, and computing them is nothing more."""
    return type(score) is nn.Linear and type(score.weight) is nn.Parameter and is_unobserved(score)


def is_unobserved(module: nn.Module) -> bool:
    """Decide whether a call of a module is its class's forward, and nothing more."""
    hooks = module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    return not hooks and "forward" not in vars(module)


def scored_late(model: Any, *, labels: Any = None, logits_to_keep: Any = 0, **inputs: Any) -> Any:
    """Call a language model of any class -> its output, or its fields; the loss is computed as in `next_tokens` where
    the model is known to score by its output layer alone."""
    late = isinstance(model, PreTrainedModel) and model.config.model_type in PLAIN_SCORES and is_unobserved(model)
    if labels is None or not (late and is_late(model) and keeps_all(logits_to_keep)):
        return model(labels=labels, logits_to_keep=logits_to_keep, **inputs)
    shift_labels, count = inputs.pop("shift_labels", None), inputs.pop("num_items_in_batch", None)
    output = model.base_model(**inputs)
    x = output.last_hidden_state
    scores = next_tokens(model, model.get_output_embeddings(), x, labels, shift_labels, count)
    return ModelOutput({**scores, **{name: value for name, value in output.items() if name != "last_hidden_state"}})


class CausalLanguageModel(Generation):
    """Base of a language model with an output layer, `lm_head`, on its `base_model`."""

    config: Any
    base_model: Any
    lm_head: Any

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,  # noqa: FBT001 (transformers' signature)
        logits_to_keep: int | Tensor = 0,
        shift_labels: Tensor | None = None,
        **kwargs: Unpack[Keywords],
    ) -> CausalLMOutputWithCrossAttentions:
        """Score the next token after each of `(B, N)` token ids.

        Args:
            input_ids: the texts, or what follows the tokens in `cache`.
            attention_mask: `(B, past + N)`, 0 for padding.
            cache: keys and values of the tokens before `input_ids`.
            inputs_embeds: `(B, N, D)` in place of `input_ids`.
            labels: `(B, N)`, the ids themselves, which are shifted here; the loss leaves out -100.
            use_cache: return keys and values for the next call.
            logits_to_keep: score only the last n tokens, or those at these positions; 0 scores all.
            shift_labels: `(B, N)`, labels that are shifted already.
            **kwargs: of transformers, and of the base model.
        """
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "inputs_embeds": inputs_embeds}
        output = self.base_model(**inputs, use_cache=use_cache, **with_cache(cache), **{**kwargs, "return_dict": True})
        x, count = output.last_hidden_state, kwargs.get("num_items_in_batch")
        return as_output(
            next_tokens(self, self.lm_head, x, labels, shift_labels, count, logits_to_keep),
            **with_cache(cache_of(output)),
            hidden_states=output.hidden_states,
            attentions=output.attentions,
        )
