"""What a text attends to next to its own tokens."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.masking_utils import create_bidirectional_mask


@dataclass(eq=False)
class Context:
    """The tokens that a text attends to next to its own: those of an image, or of a question about one.

    A row serves as many consecutive texts as there are texts a row. transformers' `generate` repeats tensors for every
    beam; it passes a context on as it is, so an image's keys and values are computed once for all beams and tokens.

    Args:
        tokens: `(B, M, C)`.
        mask: `(B, M)`, 1 for tokens and 0 for padding; None for no padding.
        kept: keys and values of each cross-attention, by layer; None, as in training, caches none.
    """

    tokens: Tensor
    mask: Tensor | None = None
    kept: dict[int, tuple[Tensor, Tensor]] | None = None

    def for_reuse(self) -> "Context":
        """Return the same context, whose keys and values are cached once they are computed."""
        return Context(self.tokens, self.mask, {})

    def mask_for(self, x: Tensor, config: PreTrainedConfig) -> Any:
        """Make the attention mask of texts `(B * T, N, D)` in the form that `config`'s attention takes."""
        if self.mask is None:
            return None
        return create_bidirectional_mask(
            config=config,
            inputs_embeds=x.reshape(self.tokens.shape[0], -1, x.shape[-1]),
            attention_mask=self.mask,
            encoder_hidden_states=self.tokens,
        )


torch.export.register_dataclass(Context)
