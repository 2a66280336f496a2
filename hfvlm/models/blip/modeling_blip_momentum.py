"""BLIP's training with momentum (https://arxiv.org/abs/2201.12086, section 3.2; MoCo's queue, ALBEF's soft targets).

Source: https://github.com/salesforce/BLIP at 056a169, models/blip_pretrain.py and models/blip_retrieval.py.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, Unpack

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import initialization as init
from transformers.utils.generic import can_return_tuple

from hfvlm.losses import captioning_loss, distilled_targets, soft_contrastive_loss
from hfvlm.losses.processes import all_processes, gather_rows, positives
from hfvlm.modeling.base import unit
from hfvlm.modeling.captioning import begin_with
from hfvlm.modeling.keywords import Keywords
from hfvlm.modeling.matching import MatchingOutput, Pairs
from hfvlm.modeling.outputs import DualEncoderOutput
from hfvlm.models.blip.configuration_blip import HfvlmBLIPConfig
from hfvlm.models.blip.modeling_blip import HfvlmBLIPTextDecoder, HfvlmBLIPTextModel, HfvlmBLIPVisionModel
from hfvlm.models.blip.modeling_blip_retrieval import HfvlmBLIPForImageTextRetrieval
from hfvlm.modules.context import Context


@dataclass
class MomentumOutput(MatchingOutput):
    """A step of training with momentum; `logits_per_image` and `logits_per_text` are `(B, B + Q)`, against the
    teacher's embeddings of the batch and of its queue.

    Args:
        targets_per_image: `(B, B + Q)`, probabilities that `logits_per_image` are trained to give.
        targets_per_text: `(B, B + Q)`, likewise.
        momentum_image_embeds: `(B, D)`, the teacher's, of unit length.
        momentum_text_embeds: `(B, D)`, likewise.
    """

    targets_per_image: Tensor | None = None
    targets_per_text: Tensor | None = None
    momentum_image_embeds: Tensor | None = None
    momentum_text_embeds: Tensor | None = None


class Teacher(nn.Module):
    """Momentum encoders, which follow the trained ones slowly, and the queue of their embeddings of past batches."""

    image_queue: Tensor
    text_queue: Tensor
    pointer: Tensor

    def __init__(self, config: HfvlmBLIPConfig):
        super().__init__()
        self.momentum = config.momentum
        size = config.queue_size, config.vision_config.projection_dim or 0
        self.vision_model = HfvlmBLIPVisionModel._from_config(config.vision_config)
        self.text_model = HfvlmBLIPTextModel._from_config(config.text_config)
        self.register_buffer("image_queue", torch.zeros(size))
        self.register_buffer("text_queue", torch.zeros(size))
        self.register_buffer("pointer", torch.zeros(1, dtype=torch.long))
        self.requires_grad_(requires_grad=False)

    def init_own_weights(self, std: float) -> None:
        for queue in (self.image_queue, self.text_queue):
            init.copy_(queue, F.normalize(torch.randn_like(queue), dim=1))
        init.zeros_(self.pointer)

    def pairs(self, student: nn.Module) -> list[tuple[Tensor, Tensor]]:
        """Pair own parameters with those that they follow; PEFT's adapters neither follow nor are followed."""
        own, followed = (
            {name.replace(".base_layer", ""): p for name, p in model.named_parameters() if "lora_" not in name}
            for model in (self, student)
        )
        return [(parameter, followed[name]) for name, parameter in own.items()]

    @torch.no_grad()
    def follow(self, student: nn.Module) -> None:
        """Move towards the student by a step of momentum."""
        for own, followed in self.pairs(student):
            own.lerp_(followed.to(own.dtype), 1 - self.momentum)

    @torch.no_grad()
    def embed(self, pixel_values: Tensor, input_ids: Tensor, attention_mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """Embed images and texts -> `(B, D)` each, of unit length."""
        image, text = self.vision_model(pixel_values), self.text_model(input_ids, attention_mask)
        return unit(image.embeds), unit(text.embeds)

    @torch.no_grad()
    def remember(self, **rows: Tensor) -> None:
        """Put rows into the queues of these names, in place of the oldest.

        Raises:
            ValueError: there are more rows than a queue has.
        """
        count, size = next(iter(rows.values())).shape[0], self.image_queue.shape[0]
        if count > size:
            raise ValueError(f"A batch of {count} pairs does not fit into a queue of {size} (queue_size).")
        oldest = (self.pointer + torch.arange(count, device=self.pointer.device)) % size
        for name, new in rows.items():
            queue = getattr(self, name)
            queue[oldest] = new.to(queue.dtype)
        self.pointer.copy_((self.pointer + count) % size)


class RetrievalTeacher(Teacher):
    """A teacher whose queue also holds which image each pair was about."""

    id_queue: Tensor

    def __init__(self, config: HfvlmBLIPConfig):
        super().__init__(config)
        self.register_buffer("id_queue", torch.full((config.queue_size,), -100))

    def init_own_weights(self, std: float) -> None:
        super().init_own_weights(std)
        init.constant_(self.id_queue, -100)


class MomentumTraining(HfvlmBLIPForImageTextRetrieval, ABC):
    """Contrastive learning against a teacher and its queue, and matching; in training, each step moves the teacher."""

    frozen_modules = ("teacher",)

    teacher: Any
    logit_scale: Any

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Start a teacher that is in no file as a copy of the towers, which are initialised before it."""
        super()._init_weights(module)
        if isinstance(module, Teacher):
            for own, followed in module.pairs(self):
                init.copy_(own, followed)

    def resize_token_embeddings(self, new_num_tokens: int | None = None, *args: Any, **kwargs: Any) -> Any:
        """Resize the teacher's table, too, whose new rows are those of the text tower; see transformers'."""
        follower: Any = self.teacher.text_model
        rows = follower.get_input_embeddings().weight.shape[0]
        table = super().resize_token_embeddings(new_num_tokens, *args, **kwargs)
        own = follower.resize_token_embeddings(table.weight.shape[0])
        with torch.no_grad():
            own.weight[rows:] = table.weight[rows:]
        return table

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor,
        pixel_values: Tensor,
        attention_mask: Tensor | None = None,
        pair_ids: Tensor | None = None,
        *,
        distillation: float | None = None,
        return_loss: bool | None = None,
        **kwargs: Unpack[Keywords],
    ) -> DualEncoderOutput:
        """Compute what `HfvlmBLIPModel` does or, with `return_loss`, a step of training, text i with image i.

        Args:
            input_ids: `(B, N)`, [CLS] first.
            pixel_values: `(B, C, H, W)`, normalised.
            attention_mask: `(B, N)`, 0 for padding on the right.
            pair_ids: `(B,)`, equal numbers, not negative, for pairs about the same image.
            distillation: weight of the teacher's soft targets, which training may raise slowly from 0; by default the
                configuration's.
            return_loss: compute the losses and, in training, move the teacher and its queue.
        """
        if not return_loss:
            return super().forward(input_ids, pixel_values, attention_mask, **kwargs)
        with torch.no_grad():
            self.logit_scale.scale.clamp_(0.001, 0.5)
        image: Any = self.encode_image(pixel_values)
        text = self.encode_text(input_ids, attention_mask)
        if self.training:
            self.teacher.follow(self)
        taught = self.teacher.embed(pixel_values, input_ids, attention_mask)
        output: Any = self.compare_with_queue(
            self.compare(image, text, return_loss=False), taught, pair_ids, distillation
        )
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        output.add_matching(self.matching_logits(output, (image.last_hidden_state, input_ids, mask), pair_ids))
        if self.training:
            rows = self.queue_rows(taught, pair_ids)
            self.teacher.remember(**{name: gather_rows(row, all_processes()) for name, row in rows.items()})
        return output

    def compare_with_queue(
        self,
        output: Any,
        taught: tuple[Tensor, Tensor],
        pair_ids: Tensor | None,
        distillation: float | None,
    ) -> MomentumOutput:
        """Add the loss against soft targets: what belongs together, mixed with the teacher's similarities."""
        alpha = self.config.distillation if distillation is None else distillation
        scale, size = output.logit_scale, taught[0].shape[0]
        images = torch.cat([taught[0], self.teacher.image_queue.to(taught[0].dtype)])
        texts = torch.cat([taught[1], self.teacher.text_queue.to(taught[1].dtype)])
        right = self.right_columns(pair_ids, size, images.shape[0])
        image_targets = distilled_targets(taught[0], texts, scale, right, alpha)
        text_targets = distilled_targets(taught[1], images, scale, right, alpha)
        per_image = soft_contrastive_loss(output.image_embeds, texts, image_targets, scale)
        per_text = soft_contrastive_loss(output.text_embeds, images, text_targets, scale)
        with torch.no_grad():
            output.logits_per_image = output.image_embeds @ texts.t() * scale
            output.logits_per_text = output.text_embeds @ images.t() * scale
        return MomentumOutput(
            **output,
            contrastive_loss=(per_image + per_text) / 2,
            targets_per_image=image_targets,
            targets_per_text=text_targets,
            momentum_image_embeds=taught[0],
            momentum_text_embeds=taught[1],
        )

    @abstractmethod
    def matching_logits(self, output: MomentumOutput, pairs: Pairs, pair_ids: Tensor | None) -> Tensor:
        """Match pairs and hard negatives -> `(3 * B, 2)`, as in `MatchingOutput`."""

    def right_columns(self, pair_ids: Tensor | None, size: int, columns: int) -> Tensor:
        """Mark which of the batch and of the queue belong to each row -> `(B, B + Q)`."""
        return torch.eye(size, columns, device=self.teacher.pointer.device)

    def queue_rows(self, taught: tuple[Tensor, Tensor], pair_ids: Tensor | None) -> dict[str, Tensor]:
        """Name what a step adds to each of the teacher's queues."""
        return {"image_queue": taught[0], "text_queue": taught[1]}


class HfvlmBLIPForRetrievalTraining(MomentumTraining):
    """Retrieval, as its authors fine-tune it. The trained towers load as `HfvlmBLIPForImageTextRetrieval`."""

    def build_heads(self, config: HfvlmBLIPConfig) -> None:
        super().build_heads(config)
        self.teacher = RetrievalTeacher(config)

    def matching_logits(self, output: MomentumOutput, pairs: Pairs, pair_ids: Tensor | None) -> Tensor:
        group = all_processes() if self.config.negatives_from_all_ranks else None
        same = positives(pairs[1].shape[0], pair_ids, pairs[1].device, group)
        return self.match_negatives(output, pairs, same, group)

    def right_columns(self, pair_ids: Tensor | None, size: int, columns: int) -> Tensor:
        if pair_ids is None:
            return super().right_columns(None, size, columns)
        return pair_ids.view(-1, 1) == torch.cat([pair_ids.view(-1), self.teacher.id_queue])

    def queue_rows(self, taught: tuple[Tensor, Tensor], pair_ids: Tensor | None) -> dict[str, Tensor]:
        ids = self.teacher.id_queue.new_full((taught[0].shape[0],), -100) if pair_ids is None else pair_ids.view(-1)
        return {**super().queue_rows(taught, pair_ids), "id_queue": ids.clamp_min(-100)}


class HfvlmBLIPForPreTraining(MomentumTraining):
    """The paper's figure 2: three losses, and one set of weights for the text encoder, the image-grounded text encoder
    and the image-grounded text decoder, which has only its self-attention and its head for itself."""

    least_weight = 1e-4

    def build_heads(self, config: HfvlmBLIPConfig) -> None:
        super().build_heads(config)
        self.teacher = Teacher(config)
        self.text_decoder = HfvlmBLIPTextDecoder._from_config(config.text_config)
        self._tied_weights_keys = {f"text_decoder.{name}": f"text_model.{name}" for name in self.shared_names()}

    def resize_token_embeddings(self, new_num_tokens: int | None = None, *args: Any, **kwargs: Any) -> Any:
        """Resize the decoder, too, before its table is tied to the text tower's; see transformers'."""
        self.text_decoder.resize_token_embeddings(new_num_tokens, *args, **kwargs)
        return super().resize_token_embeddings(new_num_tokens, *args, **kwargs)

    def shared_names(self) -> list[str]:
        own = (".attention.", ".attention_norm.", "projection.")
        return [name for name, _ in self.text_model.named_parameters() if not any(part in f".{name}" for part in own)]

    def save_pretrained(self, save_directory: Any, **kwargs: Any) -> None:  # type: ignore[override]
        """Save as transformers does, with shared weights under both of their names, where other heads find theirs."""
        state = kwargs.pop("state_dict", None) or self.state_dict()
        copies = {name: tensor.clone() for name, tensor in state.items()}
        super().save_pretrained(save_directory, state_dict=copies, **kwargs)

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor,
        pixel_values: Tensor,
        attention_mask: Tensor | None = None,
        pair_ids: Tensor | None = None,
        *,
        distillation: float | None = None,
        return_loss: bool | None = None,
        **kwargs: Unpack[Keywords],
    ) -> DualEncoderOutput:
        """Compute what training of retrieval does and, with `return_loss`, also the loss of captioning each image."""
        options: dict[str, Any] = {"distillation": distillation, "return_loss": return_loss, **kwargs}
        output: Any = super().forward(input_ids, pixel_values, attention_mask, pair_ids, **options)
        if return_loss:
            ids = begin_with(self.config.text_config.bos_token_id, input_ids, attention_mask)
            context = Context(output.vision_model_output.last_hidden_state)
            logits = self.text_decoder(ids, attention_mask, context).logits
            labels = ids if attention_mask is None else ids.masked_fill(attention_mask == 0, -100)
            smoothing = self.config.label_smoothing
            output.captioning_loss = captioning_loss(logits[:, :-1], labels[:, 1:], label_smoothing=smoothing)
            output.loss = output.loss + output.captioning_loss
        return output

    def matching_logits(self, output: MomentumOutput, pairs: Pairs, pair_ids: Tensor | None) -> Tensor:
        """Match with negatives that the teacher's embeddings of the batch are drawn by; all pairs are different."""
        tokens, ids, mask = pairs
        same = positives(size := ids.shape[0], None, ids.device, None)
        per_text, per_image = (getattr(output, f"logits_per_{name}")[:, :size] for name in ("text", "image"))
        images, texts = self.hard_negatives(per_text, per_image, same)
        return self.match_triples(pairs, (tokens[images], ids[texts], mask[texts]))
