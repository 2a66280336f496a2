"""FLAVA's pretraining (https://arxiv.org/abs/2112.04482, section 3.2): six losses, of which a batch of images has
one, a batch of texts another, and a batch of both the other four.

Source: https://github.com/facebookresearch/multimodal at 3c2a85a, torchmultimodal/modules/losses/flava.py.
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import Any, Unpack, cast

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.nn import functional as F
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils.generic import can_return_tuple

from hfvlm.configuration import BertTextConfig
from hfvlm.losses.blocks import check_negatives
from hfvlm.losses.processes import GatherRows, all_processes, check_equal_rows, rank_and_size
from hfvlm.modeling.base import as_features, loss_in_evaluations, loss_without_labels
from hfvlm.modeling.keywords import Keywords
from hfvlm.modeling.outputs import DualEncoderOutput
from hfvlm.models.flava.configuration_flava import HfvlmFLAVAConfig
from hfvlm.models.flava.modeling_flava import HfvlmFLAVAModel, Pooler
from hfvlm.models.flava.modeling_flava_codebook import HfvlmFLAVACodebookModel
from hfvlm.modules.language_head import BertLanguageHead

# The logarithm of 100, as the original rounds it.
HIGHEST_LOGIT_SCALE = 4.6052


@dataclass
class FLAVAPreTrainingOutput(DualEncoderOutput):
    """A step of pretraining. Inputs that are missing leave their fields empty; each loss is already weighted.

    Logits are those of the M tokens of the whole batch that have a label, or `(B, N, V)` without labels.

    Args:
        mim_loss: of masked patches, of images without texts.
        mlm_loss: of masked words, of texts without images.
        mmm_image_loss: of masked patches, of images with texts; only of pairs, as the next.
        mmm_text_loss: of masked words, of texts with images.
        itm_loss: of telling pairs from others.
        contrastive_loss: of all images and all texts.
        mim_logits: `(M, codes)`.
        mlm_logits: `(M, words)`.
        mmm_image_logits: `(M, codes)`.
        mmm_text_logits: `(M, words)`.
        itm_logits: `(B, 2)`, the second column for a pair.
        matched_mask: `(B,)`, which rows count as pairs; None for all.
        multimodal_model_output: the multimodal encoder's whole output on the masked inputs.
    """

    mim_loss: Tensor | None = None
    mlm_loss: Tensor | None = None
    mmm_image_loss: Tensor | None = None
    mmm_text_loss: Tensor | None = None
    itm_loss: Tensor | None = None
    contrastive_loss: Tensor | None = None
    mim_logits: Tensor | None = None
    mlm_logits: Tensor | None = None
    mmm_image_logits: Tensor | None = None
    mmm_text_logits: Tensor | None = None
    itm_logits: Tensor | None = None
    matched_mask: Tensor | None = None
    multimodal_model_output: BaseModelOutputWithPooling | None = None

    def total(self) -> Tensor | None:
        """Sum the losses that there are."""
        losses = [value for name, value in self.items() if name.endswith("_loss")]
        return sum(losses[1:], start=losses[0]) if losses else None


class MatchingHead(nn.Module):
    """A pooler of its own and a classifier -> `(B, 2)`, the second column for a pair."""

    def __init__(self, width: int):
        super().__init__()
        self.summary = Pooler(width, width)
        self.classifier = nn.Linear(width, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.summary(x))


class HfvlmFLAVAForPreTraining(HfvlmFLAVAModel):
    """Learns from images, from texts and from both; what a batch holds decides which losses it has."""

    _keep_in_fp32_modules_strict = ["logit_scale", "codebook_model"]
    lora_recipe = "vision+text+multimodal"
    frozen_modules = ("codebook_model",)

    def build_heads(self, config: HfvlmFLAVAConfig) -> None:
        width = config.multimodal_config.hidden_size
        if {config.vision_config.hidden_size, config.text_config.hidden_size} != {width}:
            raise ValueError("The heads take tokens of all three encoders: their hidden_size must be the same.")
        words, codes = config.text_config.vocab_size, config.codebook_config.vocab_size
        self.codebook_model = HfvlmFLAVACodebookModel._from_config(config.codebook_config)
        self.codebook_model.requires_grad_(requires_grad=False)
        self.mim_head = prediction_head(config, codes)
        self.mlm_head = prediction_head(config, words)
        self.mmm_image_head = prediction_head(config, codes)
        self.mmm_text_head = prediction_head(config, words)
        self.itm_head = MatchingHead(width)

    def resize_token_embeddings(
        self,
        new_num_tokens: int | None = None,
        pad_to_multiple_of: int | None = None,
        mean_resizing: bool = True,  # noqa: FBT001, FBT002 (transformers' signature)
    ) -> Any:
        """Resize the heads that predict words, too; see transformers'."""
        table = super().resize_token_embeddings(new_num_tokens, pad_to_multiple_of, mean_resizing)
        std = None if mean_resizing else self.config.initializer_range
        for head in (self.mlm_head, self.mmm_text_head):
            head.resize(table.weight.shape[0], std)
        return table

    @loss_in_evaluations
    @loss_without_labels
    @can_return_tuple
    def forward(  # noqa: PLR0913  (what is masked, and its labels, of either modality)
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *,
        input_ids_masked: Tensor | None = None,
        mlm_labels: Tensor | None = None,
        bool_masked_pos: Tensor | None = None,
        codebook_pixel_values: Tensor | None = None,
        mim_labels: Tensor | None = None,
        itm_labels: Tensor | None = None,
        return_loss: bool | None = None,
        **kwargs: Unpack[Keywords],
    ) -> DualEncoderOutput:
        """Compare as `HfvlmFLAVAModel` where nothing is masked, without `return_loss`; else compute a step of
        pretraining: text i with image i, or only images, or only texts.

        Args:
            input_ids: `(B, N)`, [CLS] first, padded on the right.
            pixel_values: `(B, C, H, W)`, normalised.
            attention_mask: `(B, N)`, 0 for padding; by default for every `pad_token_id`.
            input_ids_masked: `(B, N)`, `input_ids` with some words masked.
            mlm_labels: `(B, N)`, the masked words in their positions, negative numbers elsewhere.
            bool_masked_pos: `(B, H/p, W/p)` or `(B, H/p * W/p)`, other than 0 for masked patches.
            codebook_pixel_values: `(B, C, h, w)`, the same images for the codebook, one code a patch.
            mim_labels: `(B, patches)`, in place of the codebook's: codes of masked patches, negative elsewhere.
            itm_labels: `(B,)` or `(B, 1)`, 1 for pairs and 0 for texts that do not belong to their images, which
                count in no other loss than that of matching but as negatives for others.
            return_loss: compute the losses even where nothing is masked.
        """
        alone = input_ids is None or pixel_values is None
        if not (alone or return_loss) and input_ids_masked is None and bool_masked_pos is None:
            return super().forward(input_ids, pixel_values, attention_mask, **kwargs)
        if mim_labels is None and codebook_pixel_values is not None:
            mim_labels = self.codes(codebook_pixel_values, bool_masked_pos)
        output: Any
        if pixel_values is None:
            output = self.learn_texts(input_ids_masked, attention_mask, mlm_labels, **kwargs)
        elif input_ids is None:
            output = self.learn_images(pixel_values, bool_masked_pos, mim_labels, **kwargs)
        else:
            with torch.no_grad():
                self.logit_scale.scale.clamp_(0, HIGHEST_LOGIT_SCALE)
            image = self.vision_model(pixel_values, **kwargs)
            text = self.text_model(input_ids, attention_mask, **kwargs)
            output = FLAVAPreTrainingOutput(**self.compare(as_features(image), as_features(text), return_loss=False))
            if input_ids_masked is not None:
                hidden = image if bool_masked_pos is None else self.vision_model(pixel_values, bool_masked_pos)
                masked = self.text_model(input_ids_masked, attention_mask)
                tokens = hidden.before_norm, masked.before_norm
                output.multimodal_model_output = self.multimodal_model(*tokens, **kwargs)
                self.learn_pairs(output, itm_labels, mim_labels, mlm_labels)
            if self.config.contrastive_weight > 0:
                output.contrastive_loss = self.config.contrastive_weight * self.contrast(output, group=all_processes())
        output.loss = output.total()
        return output

    @torch.no_grad()
    def codes(self, codebook_pixel_values: Tensor, bool_masked_pos: Tensor | None) -> Tensor:
        """Encode the masked patches -> their codes, `(B, patches)`, -100 elsewhere."""
        if bool_masked_pos is None:
            raise ValueError("codebook_pixel_values need bool_masked_pos, the patches that are masked.")
        with torch.autocast(codebook_pixel_values.device.type, enabled=False):
            codes = self.codebook_model(codebook_pixel_values).codes.flatten(1)
        hidden = bool_masked_pos.flatten(1).bool()
        if codes.shape != hidden.shape:
            raise ValueError(
                f"The codebook gives {codes.shape[1]} codes an image, for {hidden.shape[1]} patches: "
                "codebook_pixel_values must have 8 rows and columns of pixels for each of the patches'."
            )
        return codes.masked_fill(~hidden, -100)

    def learn_images(
        self, pixels: Tensor, hidden: Tensor | None, labels: Tensor | None, **kwargs: Any
    ) -> FLAVAPreTrainingOutput:
        """Predict masked patches from the image."""
        tower, weight = self.vision_model(pixels, hidden, **kwargs), self.config.mim_weight
        output = FLAVAPreTrainingOutput(vision_model_output=as_features(tower))
        if weight > 0:
            tokens = tower.last_hidden_state[:, 1:]
            output.mim_logits, output.mim_loss = predict(self.mim_head, tokens, labels, weight)
        return output

    def learn_texts(
        self, ids: Tensor | None, mask: Tensor | None, labels: Tensor | None, **kwargs: Any
    ) -> FLAVAPreTrainingOutput:
        """Predict masked words from the text."""
        if ids is None:
            raise ValueError(f"{type(self).__name__} needs pixel_values, or texts in input_ids_masked.")
        tower, weight = self.text_model(ids, mask, **kwargs), self.config.mlm_weight
        output = FLAVAPreTrainingOutput(text_model_output=as_features(tower))
        if weight > 0:
            output.mlm_logits, output.mlm_loss = predict(self.mlm_head, tower.last_hidden_state, labels, weight)
        return output

    def learn_pairs(
        self,
        output: Any,
        itm_labels: Tensor | None,
        mim_labels: Tensor | None,
        mlm_labels: Tensor | None,
    ) -> None:
        """Predict from both whether a text belongs to its image, and what is masked in either."""
        config, tokens = self.config, output.multimodal_model_output.last_hidden_state
        if config.itm_weight > 0:
            output.itm_logits = self.itm_head(tokens)
            output.itm_loss = output.itm_logits.sum() * 0
            if itm_labels is not None:
                itm_labels = itm_labels.flatten()
                output.itm_loss = config.itm_weight * F.cross_entropy(
                    output.itm_logits.float(), itm_labels.masked_fill(itm_labels < 0, -100)
                )
                matched = itm_labels != 0
                output.matched_mask = matched | ~matched.any()  # without any pair, all rows count
        rows = slice(None) if output.matched_mask is None else output.matched_mask
        tokens = tokens[rows]
        mim_labels, mlm_labels = (None if labels is None else labels[rows] for labels in (mim_labels, mlm_labels))
        # Class tokens of the multimodal encoder and of the image come first, the text comes last.
        first, last = 2, 2 + prod(self.vision_model.config.grid)
        if config.mmm_image_weight > 0:
            output.mmm_image_logits, output.mmm_image_loss = predict(
                self.mmm_image_head, tokens[:, first:last], mim_labels, config.mmm_image_weight
            )
        if config.mmm_text_weight > 0:
            output.mmm_text_logits, output.mmm_text_loss = predict(
                self.mmm_text_head, tokens[:, last:], mlm_labels, config.mmm_text_weight
            )

    def contrast(
        self,
        output: DualEncoderOutput,
        pair_loss: Callable[..., Tensor] | None = None,
        group: ProcessGroup | None = None,
    ) -> Tensor:
        """Compute every dual encoder's loss; rows that are no pairs are only negatives for the others."""
        matched = getattr(output, "matched_mask", None)
        if matched is None or pair_loss is not None:
            return super().contrast(output, pair_loss, group)
        if self.training and torch.is_grad_enabled():
            check_negatives(matched.shape[0], rank_and_size(group)[1])
        image, text, scale = (cast(Tensor, output[name]) for name in ("image_embeds", "text_embeds", "logit_scale"))
        return matched_contrastive_loss(image, text, scale, matched, group)


def prediction_head(config: HfvlmFLAVAConfig, vocabulary: int) -> BertLanguageHead:
    """Make BERT's at the encoders' width; its decoder is not tied to any embedding."""
    sizes = BertTextConfig(
        hidden_size=config.multimodal_config.hidden_size,
        num_attention_heads=config.multimodal_config.num_attention_heads,
        vocab_size=vocabulary,
        hidden_act=config.head_act,
        layer_norm_eps=config.head_layer_norm_eps,
    )
    return BertLanguageHead(sizes)


def predict(head: nn.Module, tokens: Tensor, labels: Tensor | None, weight: float) -> tuple[Tensor, Tensor | None]:
    """Score tokens `(B, N, D)` that have a label in `(B, N)`, and compute their weighted mean loss, which is 0 where
    none has; without labels, score all."""
    if labels is None:
        return head(tokens), None
    wanted = labels >= 0
    logits = head(tokens[wanted])
    loss = F.cross_entropy(logits.float(), labels[wanted], reduction="sum") / wanted.sum().clamp_min(1)
    return logits, weight * loss


def matched_contrastive_loss(
    a: Tensor, b: Tensor, logit_scale: Tensor, matched: Tensor, group: ProcessGroup | None = None
) -> Tensor:
    """Compute InfoNCE in both directions, averaged, of the rows that are `matched` against all rows.

    Args:
        a: `(B, D)` embeddings of unit length.
        b: `(B, D)`, likewise.
        logit_scale: `(1,)`, what cosine similarities are multiplied by.
        matched: `(B,)`, which rows of `a` and `b` belong together.
        group: processes whose rows are negatives, too; each has the loss of its own rows, and gradients of all losses.
    """
    check_equal_rows(a, group)
    rank, _ = rank_and_size(group)
    a, b, scale = a.float(), b.float(), logit_scale.float()
    target = torch.arange(a.shape[0], device=a.device)[matched] + rank * a.shape[0]
    all_a, all_b = GatherRows.apply(a, group), GatherRows.apply(b, group)
    losses = (F.cross_entropy(x[matched] @ y.t() * scale, target) for x, y in ((a, all_b), (b, all_a)))
    return sum(losses, start=a.new_zeros(())) / 2
