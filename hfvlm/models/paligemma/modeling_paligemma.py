"""PaliGemma and PaliGemma 2 (https://arxiv.org/abs/2407.07726, 2412.03555).

Source: https://github.com/google-research/big_vision at 0127fb6, models/proj/paligemma.
"""

from collections.abc import Callable, Collection, Mapping
from functools import partial
from typing import Any, Unpack

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModel, AutoModelForCausalLM
from transformers.modeling_outputs import BaseModelOutput, BaseModelOutputWithPooling
from transformers.utils import ModelOutput
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from hfvlm.modeling.compat import cache_of, causal_mask, prefix_mask, with_cache
from hfvlm.modeling.image_text import Features, ImageTextModel
from hfvlm.modeling.keywords import Keywords
from hfvlm.modeling.language import is_late, keeps_all, labelled_loss
from hfvlm.modeling.outputs import media_features
from hfvlm.modeling.vision import PatchClassifier, PatchTower
from hfvlm.models.paligemma.configuration_paligemma import HfvlmPaliGemmaConfig, HfvlmPaliGemmaVisionConfig
from hfvlm.models.siglip.modeling_siglip import HfvlmSigLIPPreTrainedModel
from hfvlm.modules.language_head import last_tokens
from hfvlm.modules.positions import ALIGNED_CORNERS
from hfvlm.modules.projection import Projector
from hfvlm.modules.transformer import PreNormLayer, Stack
from hfvlm.processing.assembly import IGNORE


class HfvlmPaliGemmaVisionModel(PatchTower, HfvlmSigLIPPreTrainedModel):
    """SigLIP's vision transformer without its pooling."""

    config: HfvlmPaliGemmaVisionConfig
    resize_rule = ALIGNED_CORNERS

    def __init__(self, config: HfvlmPaliGemmaVisionConfig):
        super().__init__(config)
        self.layers = Stack(PreNormLayer(config) for _ in range(config.num_hidden_layers))
        self.post_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs(tie_last_hidden_states=False)
    def forward(
        self, pixel_values: Tensor, *, interpolate_pos_encoding: bool = False, **kwargs: Unpack[Keywords]
    ) -> BaseModelOutput:
        """`(B, C, H, W)` normalised pixels -> all patches after the last norm, `(B, N, D)`.

        With `interpolate_pos_encoding`, images may have any size; the position table is resized to it.
        """
        x = self.embed(pixel_values, interpolate_pos_encoding=interpolate_pos_encoding)
        return BaseModelOutput(last_hidden_state=self.post_norm(self.layers(x, **kwargs)))


class HfvlmPaliGemmaForConditionalGeneration(ImageTextModel):
    """Gemma, whose prompts begin with the patches of images and are attended to in both directions.

    A prefix-LM: tokens of the prefix (images, then the prompt) attend to each other, those of the suffix to the prefix
    and to what is before them. The suffix begins, in this order of precedence, where `token_type_ids` are 1, after
    `prefix_length` tokens, or at the first label; without any of these, all tokens are the prefix, as in a prompt, and
    what follows a cache is the suffix.

    The loss is the mean over the tokens of a suffix, and then over the rows.
    """

    config: HfvlmPaliGemmaConfig
    # The loss is a mean over rows; the Trainer must not divide it by tokens.
    accepts_loss_kwargs = False
    _supports_flash_attn = False  # which has no mask of this form

    def __init__(self, config: HfvlmPaliGemmaConfig):
        super().__init__(config)
        self.vision_model = AutoModel.from_config(config.vision_config)
        self.projector = Projector(config.vision_config.hidden_size, config.text_config.hidden_size, 1)
        if self.is_capped and config.text_config._attn_implementation in (None, "sdpa"):
            config.text_config._attn_implementation = "eager"
        self.language_model = AutoModelForCausalLM.from_config(config.text_config)
        self.post_init()

    @property
    def is_capped(self) -> bool:
        """Whether attention scores are capped, as in Gemma 2, which PyTorch's own attention cannot do."""
        return getattr(self.config.text_config, "attn_logit_softcapping", None) is not None

    @can_return_tuple
    def get_image_features(self, pixel_values: Tensor, **kwargs: Unpack[Keywords]) -> BaseModelOutputWithPooling:
        """Project images to an output whose `pooler_output` has one `(patches, hidden_size)` tensor an image.

        Args:
            pixel_values: `(images, 3, H, W)`.
        """
        vision = self.vision_model(pixel_values, **kwargs)
        return media_features(vision, self.projector(vision.last_hidden_state))

    def further_keywords(self, method: str) -> Collection[str]:
        own = ("token_type_ids", "prefix_length") if method == "forward" else ()
        return {*super().further_keywords(method), *own}

    def read_with(
        self,
        reader: Any,
        input_ids: Tensor | None,
        inputs_embeds: Tensor | None,
        features: Mapping[str, Features],
        cache: Any = None,
        **kwargs: Any,
    ) -> Any:
        embeds = self.merged(input_ids, inputs_embeds, features)
        labels, shifted, count = (kwargs.pop(name, None) for name in ("labels", "shift_labels", "num_items_in_batch"))
        if shifted is None and labels is not None:
            shifted = F.pad(labels, (0, 1), value=IGNORE)[:, 1:]
        given = {name: kwargs.pop(name, None) for name in ("token_type_ids", "prefix_length")}
        prefix = prefix_of(embeds, shift_labels=shifted, **given)
        inputs = {"inputs_embeds": embeds, **with_cache(cache)}
        inputs["attention_mask"] = self.attended(embeds, kwargs.pop("attention_mask", None), cache, prefix)
        if shifted is None:
            return reader(**inputs, **kwargs)
        keep = kwargs.pop("logits_to_keep", 0)
        output = self.language_model.base_model(**inputs, **kwargs)
        x = output.last_hidden_state
        scores: dict[str, Any] = {"loss": self.suffix_loss(x, shifted.to(x.device), count)}
        if keeps_all(keep) and is_late(self):
            scores["late_logits"] = partial(self.score, x)
        else:
            scores["logits"] = self.score(last_tokens(x, keep))
        return ModelOutput({**scores, **{k: value for k, value in output.items() if k != "last_hidden_state"}})

    def attended(self, embeds: Tensor, attention_mask: Any, cache: Any, prefix: Tensor) -> Any:
        """Make the mask of a prefix-LM, where it is not one already and there is no prefix in a cache."""
        if self.is_capped and self.language_model.config._attn_implementation == "sdpa":
            raise ValueError(
                "attn_implementation 'sdpa' leaves out the cap of Gemma 2's attention scores: set that of text_config "
                "to 'eager' or 'flex_attention'."
            )
        made = attention_mask is not None and getattr(attention_mask, "ndim", 4) != 2
        if made or (cache is not None and cache.get_seq_length() > 0):
            return attention_mask
        return prefix_mask(self.language_model.config, embeds, attention_mask, cache, prefix)

    def score(self, x: Tensor) -> Tensor:
        """Score the next tokens after hidden states `(..., D)` -> `(..., V)`."""
        logits = self.language_model.get_output_embeddings()(x)
        cap = getattr(self.config.text_config, "final_logit_softcapping", None)
        return logits if cap is None else cap * torch.tanh(logits / cap)

    def suffix_loss(self, x: Tensor, labels: Tensor, count: Any) -> Tensor:
        """Compute the loss of hidden states `(B, N, D)` with shifted labels `(B, N)`; `count` divides the sum over all
        tokens, in place of the mean of means."""
        capped = getattr(self.config.text_config, "final_logit_softcapping", None) is not None
        score = self.score if capped else self.language_model.get_output_embeddings()
        total = (
            partial(smoothed_loss, share=self.config.label_smoothing) if self.config.label_smoothing else labelled_loss
        )
        known = labels != IGNORE
        sums = torch.stack([total(score, row[own], ids[own]) for row, ids, own in zip(x, labels, known, strict=True)])
        if count is not None:
            return sums.sum() / count
        return (sums / known.sum(dim=1).clamp_min(1).to(sums.device)).mean()

    # Generation

    @torch.no_grad()
    def generate(self, inputs: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        """Generate as transformers does; the prompt is the prefix. With `custom_generate=every_beam_may_end`, of
        `hfvlm.models.paligemma.beams`, beams are searched as the authors do."""
        prompt = next(
            (x for x in (inputs, kwargs.get("input_ids"), kwargs.get("inputs_embeds")) if x is not None), None
        )
        if prompt is not None and kwargs.get("prefix_length") is None:
            kwargs["prefix_length"] = prompt.shape[1]
        return super().generate(inputs, *args, **kwargs)

    def prepare_inputs_for_generation(
        self, *args: Any, token_type_ids: Tensor | None = None, prefix_length: int | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        """Hand on where the suffix begins; transformers repeats the type of a prompt's last token."""
        if token_type_ids is not None and prefix_length is not None:
            token_type_ids = token_type_ids.clone()
            token_type_ids[:, prefix_length:] = 1
        return super().prepare_inputs_for_generation(
            *args, token_type_ids=token_type_ids, prefix_length=prefix_length, **kwargs
        )

    @staticmethod
    def create_masks_for_generate(
        config: Any,
        inputs_embeds: Tensor,
        attention_mask: Tensor | None,
        *,
        token_type_ids: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """Make the mask of a step whose cache has a fixed length, as transformers asks for before its forward."""
        text, cache = config.get_text_config(), cache_of(kwargs)
        if cache is not None and cache.get_seq_length() > 0:
            return causal_mask(text, inputs_embeds, attention_mask, cache)
        return prefix_mask(text, inputs_embeds, attention_mask, cache, prefix_of(inputs_embeds, token_type_ids))

    def reusable(self, cache: Any, known: int, length: int) -> int:
        """Reuse no cache for another prompt: all tokens of a prefix attend to all others."""
        return 0


def prefix_of(
    x: Tensor,
    token_type_ids: Tensor | None = None,
    prefix_length: int | None = None,
    shift_labels: Tensor | None = None,
) -> Tensor:
    """Decide which of the tokens `(B, N, ...)` are the prefix -> `(B, N)`; see the model."""
    if token_type_ids is not None:
        return (token_type_ids == 0).to(x.device)
    if prefix_length is not None:
        return (torch.arange(x.shape[1], device=x.device) < prefix_length).expand(x.shape[0], -1)
    if shift_labels is not None:
        begun = (shift_labels != IGNORE).cumsum(dim=1) > 0
        return ~F.pad(begun, (1, 0))[:, :-1].to(x.device)
    return torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)


def smoothed_loss(score: Callable[[Tensor], Tensor], x: Tensor, labels: Tensor, share: float) -> Tensor:
    """Sum the losses of hidden states `(M, D)` with labels `(M,)`, of which all other tokens have a share."""
    logits = score(x)
    logs = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(dim=-1)
    own, all_ = logs.gather(1, labels[:, None]).sum(), logs.sum()
    return -((1 - share) * own + share / (logs.shape[1] - 1) * (all_ - own))


class HfvlmPaliGemmaForImageClassification(PatchClassifier):
    """A linear layer on the mean of the vision tower's patches, which is PaLI's tower, too."""

    config: HfvlmPaliGemmaConfig
    base_model_prefix = "paligemma"
