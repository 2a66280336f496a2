"""BLIP's training with momentum (https://arxiv.org/abs/2201.12086, section 3.2; MoCo's queue, ALBEF's soft targets).

Source: https://github.com/salesforce/BLIP at 056a169, models/blip_pretrain.py and models/blip_retrieval.py.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, Unpack

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.nn import functional as F
from transformers import initialization as init
from transformers.utils.generic import can_return_tuple

from hfvlm.losses import captioning_loss, distilled_targets, soft_contrastive_loss
from hfvlm.losses.processes import GatherRows, gather_rows
from hfvlm.modeling.base import unit
from hfvlm.modeling.keywords import Keywords
from hfvlm.modeling.outputs import DualEncoderOutput
from hfvlm.models.blip.configuration_blip import HfvlmBLIPConfig
from hfvlm.models.blip.modeling_blip import (
    HfvlmBLIPForImageTextRetrieval,
    HfvlmBLIPTextDecoder,
    HfvlmBLIPTextModel,
    HfvlmBLIPVisionModel,
    MatchingOutput,
    begin_with,
    matching_loss,
)
from hfvlm.modules.context import Context


@dataclass
class MomentumOutput(MatchingOutput):
    """A step of training with momentum; `logits_per_image` and `logits_per_text` are `(B, B + Q)`, against the
    teacher's embeddings of the batch and of its queue.

    Args:
        targets_per_image: `(B, B + Q)`, what `logits_per_image` should be as probabilities.
        targets_per_text: `(B, B + Q)`, likewise.
        momentum_image_embeds: `(B, D)`, the teacher's, of unit length.
        momentum_text_embeds: `(B, D)`, likewise.
    """

    targets_per_image: Tensor | None = None
    targets_per_text: Tensor | None = None
    momentum_image_embeds: Tensor | None = None
    momentum_text_embeds: Tensor | None = None


class Teacher(nn.Module):
    """Towers that follow the trained ones slowly, and the queue of what they said about past batches."""

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
        """Own parameters and those that they follow; PEFT's adapters neither follow nor are followed."""
        own, followed = (
            {name.replace(".base_layer", ""): p for name, p in model.named_parameters() if "lora_" not in name}
            for model in (self, student)
        )
        return [(parameter, followed[name]) for name, parameter in own.items()]

    @torch.no_grad()
    def follow(self, student: nn.Module) -> None:
        for own, followed in self.pairs(student):
            own.lerp_(followed.to(own.dtype), 1 - self.momentum)

    @torch.no_grad()
    def embed(self, pixel_values: Tensor, input_ids: Tensor, attention_mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """Pictures and texts -> their embeddings of unit length."""
        image, text = self.vision_model(pixel_values), self.text_model(input_ids, attention_mask)
        return unit(image.embeds), unit(text.embeds)

    @torch.no_grad()
    def remember(self, **rows: Tensor) -> None:
        """Put rows into the queues of these names, in the places of the oldest."""
        count, size = len(next(iter(rows.values()))), len(self.image_queue)
        if count > size:
            raise ValueError(f"A batch of {count} pairs does not fit into a queue of {size} (queue_size).")
        places = (self.pointer + torch.arange(count, device=self.pointer.device)) % size
        for name, new in rows.items():
            queue = getattr(self, name)
            queue[places] = new.to(queue.dtype)
        self.pointer.copy_((self.pointer + count) % size)


class RetrievalTeacher(Teacher):
    """A teacher that also remembers which picture each pair of the queue was about."""

    id_queue: Tensor

    def __init__(self, config: HfvlmBLIPConfig):
        super().__init__(config)
        self.register_buffer("id_queue", torch.full((config.queue_size,), -100))

    def init_own_weights(self, std: float) -> None:
        super().init_own_weights(std)
        init.constant_(self.id_queue, -100)


class MomentumTraining(HfvlmBLIPForImageTextRetrieval, ABC):
    """Contrastive learning against a teacher and its queue, and matching; in training, each step moves the teacher."""

    teacher: Any
    logit_scale: Any

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """A teacher that no file has starts as a copy of the towers, which are initialised before it."""
        super()._init_weights(module)
        if isinstance(module, Teacher):
            for own, followed in module.pairs(self):
                init.copy_(own, followed)

    def resize_token_embeddings(self, new_num_tokens: int | None = None, *args: Any, **kwargs: Any) -> Any:
        """Resize the teacher's table, too, whose new rows are those of the text tower; see transformers'."""
        follower: Any = self.teacher.text_model
        kept = follower.get_input_embeddings().weight.shape[0]
        table = super().resize_token_embeddings(new_num_tokens, *args, **kwargs)
        own = follower.resize_token_embeddings(table.weight.shape[0])
        with torch.no_grad():
            own.weight[kept:] = table.weight[kept:]
        return table

    def _set_gradient_checkpointing(self, *args: Any, **kwargs: Any) -> None:
        """For the towers alone: the teacher keeps nothing for a gradient."""
        super()._set_gradient_checkpointing(*args, **kwargs)
        for module in self.teacher.modules():
            if hasattr(module, "gradient_checkpointing"):
                setattr(module, "gradient_checkpointing", False)  # noqa: B010  (nn.Module's own type)

    @property
    def group(self) -> ProcessGroup | None:
        return dist.group.WORLD if dist.is_available() and dist.is_initialized() else None

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
        """Without `return_loss` as `HfvlmBLIPModel`; with it, a step of training, text i with picture i.

        Args:
            input_ids: `(B, N)`, [CLS] first.
            pixel_values: `(B, C, H, W)`, normalised.
            attention_mask: `(B, N)`, 0 for padding on the right.
            pair_ids: `(B,)`, equal numbers, not negative, for pairs about the same picture.
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
        tokens = image.last_hidden_state
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        wrong = self.wrong_partners(output, tokens, input_ids, attention_mask, pair_ids)
        output.matching_logits = self.match_triples((tokens, input_ids, attention_mask), wrong)
        output.matching_loss = matching_loss(output.matching_logits)
        output.loss = output.contrastive_loss + output.matching_loss
        if self.training:
            self.remember(taught[0], taught[1], pair_ids)
        return output

    def compare_with_queue(
        self,
        output: Any,
        taught: tuple[Tensor, Tensor],
        pair_ids: Tensor | None,
        distillation: float | None,
    ) -> MomentumOutput:
        """The loss against soft targets: what belongs together, mixed with what the teacher finds alike."""
        alpha = self.config.distillation if distillation is None else distillation
        scale, size = output.logit_scale, len(taught[0])
        images = torch.cat([taught[0], self.teacher.image_queue.to(taught[0].dtype)])
        texts = torch.cat([taught[1], self.teacher.text_queue.to(taught[1].dtype)])
        right = self.right_partners(pair_ids, size, images.shape[0])
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
    def wrong_partners(
        self, output: Any, tokens: Tensor, ids: Tensor, mask: Tensor, pair_ids: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens of a wrong picture for each text, and a wrong text and its mask for each picture."""

    def right_partners(self, pair_ids: Tensor | None, size: int, columns: int) -> Tensor:
        """`(B, B + Q)`, which of the batch and of the queue belong to each row."""
        return torch.eye(size, columns, device=self.teacher.pointer.device)

    def remember(self, image: Tensor, text: Tensor, pair_ids: Tensor | None) -> None:
        rows = {"image_queue": gather_rows(image, self.group), "text_queue": gather_rows(text, self.group)}
        self.teacher.remember(**rows)


class HfvlmBLIPForRetrievalTraining(MomentumTraining):
    """Retrieval, as its authors fine-tune it. The trained towers load as `HfvlmBLIPForImageTextRetrieval`."""

    def build_heads(self, config: HfvlmBLIPConfig) -> None:
        super().build_heads(config)
        self.teacher = RetrievalTeacher(config)

    def ids(self, pair_ids: Tensor | None, size: int) -> Tensor:
        """Numbers of the pairs; without any given, all are different, and from those of the queue too."""
        if pair_ids is not None:
            return pair_ids.view(-1)
        return -101 - torch.arange(size, device=self.teacher.pointer.device)

    def right_partners(self, pair_ids: Tensor | None, size: int, columns: int) -> Tensor:
        ids = self.ids(pair_ids, size)
        return ids[:, None] == torch.cat([ids, self.teacher.id_queue])

    def wrong_partners(
        self, output: Any, tokens: Tensor, ids: Tensor, mask: Tensor, pair_ids: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        group = self.group if self.config.negatives_from_all_ranks else None
        with torch.no_grad():
            pairs = self.ids(pair_ids, ids.shape[0])
            same = pairs[:, None] == gather_rows(pairs, group)
            images, texts = (gather_rows(x.detach(), group) for x in (output.image_embeds, output.text_embeds))
            per_image = output.image_embeds @ texts.t() * output.logit_scale
            per_text = output.text_embeds @ images.t() * output.logit_scale
        wrong_images, wrong_texts = self.hard_negatives(per_text, per_image, same)
        all_tokens = GatherRows.apply(tokens, group)
        return all_tokens[wrong_images], gather_rows(ids, group)[wrong_texts], gather_rows(mask, group)[wrong_texts]

    def remember(self, image: Tensor, text: Tensor, pair_ids: Tensor | None) -> None:
        rows = {
            "image_queue": image,
            "text_queue": text,
            "id_queue": self.ids(pair_ids, image.shape[0]).clamp_min(-100),
        }
        self.teacher.remember(**{name: gather_rows(row, self.group) for name, row in rows.items()})


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
        """Resize what captions, too, before its table is tied to the text tower's; see transformers'."""
        self.text_decoder.resize_token_embeddings(new_num_tokens, *args, **kwargs)
        return super().resize_token_embeddings(new_num_tokens, *args, **kwargs)

    def shared_names(self) -> list[str]:
        own = (".attention.", ".attention_norm.", "projection.")
        return [name for name, _ in self.text_model.named_parameters() if not any(part in f".{name}" for part in own)]

    def save_pretrained(self, save_directory: Any, **kwargs: Any) -> None:  # type: ignore[override]
        """As transformers', with shared weights under both of their names, so that the other heads find theirs."""
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

    def wrong_partners(
        self, output: Any, tokens: Tensor, ids: Tensor, mask: Tensor, pair_ids: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        size = ids.shape[0]
        same = torch.eye(size, dtype=torch.bool, device=ids.device)
        images, texts = self.hard_negatives(output.logits_per_text[:, :size], output.logits_per_image[:, :size], same)
        return tokens[images], ids[texts], mask[texts]
