"""Language models of hfvlm's own, where transformers has none."""

from typing import Any, Unpack

from torch import Tensor
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils.generic import can_return_tuple

from hfvlm.modeling.compat import cache_of, with_cache
from hfvlm.modeling.generation import Generation
from hfvlm.modeling.keywords import Keywords
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
    ) -> CausalLMOutputWithPast:
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
        logits = self.lm_head(last_tokens(output.last_hidden_state, logits_to_keep))
        return CausalLMOutputWithPast(
            loss=next_token_loss(self.config, logits, labels, shift_labels, kwargs.get("num_items_in_batch")),
            logits=logits,
            **with_cache(cache_of(output)),
            hidden_states=output.hidden_states,
            attentions=output.attentions,
        )
