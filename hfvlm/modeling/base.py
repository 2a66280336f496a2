"""Base classes of the models."""

import inspect
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, ClassVar, Unpack

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils.generic import can_return_tuple
from transformers.utils.output_capturing import OutputRecorder

from hfvlm.losses.blocks import check_negatives
from hfvlm.losses.processes import rank_and_size
from hfvlm.modeling.compat import CACHE_NAMES
from hfvlm.modeling.keywords import Keywords, StrictKeywords, tower_keywords
from hfvlm.modeling.outputs import DualEncoderOutput, TowerOutput
from hfvlm.modules.similarity import LogitScale, cosines
from hfvlm.modules.transformer import Attention, PreNormLayer
from hfvlm.presets.licences import check_model


class _Unlisted(str):
    """A parameter's name in which transformers' Trainer finds no "label"."""

    __slots__ = ()

    def __contains__(self, part: str) -> bool:  # type: ignore[override]
        return part != "label" and super().__contains__(part)


def loss_without_labels(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Decorate a forward whose loss `return_loss` asks for, and whose labels only add to it.

    transformers' Trainer takes every parameter with "label" in its name for one that batches must have before it
    computes a loss in evaluations. Where labels alone ask for the loss, `label_names=["labels"]` says so.
    """
    signature = inspect.signature(forward)
    parameters = [
        parameter.replace(name=_Unlisted(name)) if "label" in name else parameter
        for name, parameter in signature.parameters.items()
    ]
    forward.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    return forward


def other_towers(own: str) -> list[str]:
    """Patterns of the keys that a tower may leave unread in its composite's file."""
    return [rf"^(?!{own}\.)\w+_model\.", r"^(logit_scales?|classifier|projector|resampler|gates)\."]


# Attention weights of the layers of a tower, not those of its pooling head.
LAYER_ATTENTIONS = OutputRecorder(Attention, index=1, layer_name="layers")


HALF = (torch.float16, torch.bfloat16)


class EveryModule:
    """Has transformers initialise every module. In what it calls custom code, it passes over those without parameters
    of their own, such as the layers of CLIP, or of a language model, which initialise their parts."""

    @classmethod
    def is_custom_code(cls) -> bool:
        return False


class HfvlmPreTrainedModel(StrictKeywords, EveryModule, PreTrainedModel):
    """Base of every model and tower."""

    supports_gradient_checkpointing = True
    _skip_keys_device_placement = list(CACHE_NAMES)
    _no_split_modules = ["PreNormLayer"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs = {"hidden_states": PreNormLayer, "attentions": LAYER_ATTENTIONS}

    def post_init(self) -> None:
        """Initialise, with temperatures and what else is to stay exact in float32 from the start, as
        `from_pretrained` leaves it."""
        exact = tuple(self._keep_in_fp32_modules_strict or ())
        for name, module in self.named_modules():
            if name.rpartition(".")[2] in exact and any(x.dtype in HALF for x in module.parameters()):
                module.float()
        super().post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Parts that hold bare parameters initialise those themselves, in `init_own_weights`."""
        super()._init_weights(module)
        if hasattr(module, "init_own_weights"):
            getattr(module, "init_own_weights")(self.config.initializer_range)  # noqa: B009  (nn.Module's own type)

    # Say on a model that you have read its licence, where the Trainer or PEFT push it.
    licence_accepted: bool = False

    def push_to_hub(self, repo_id: str, *, accept_licence: bool = False, **kwargs: Any) -> Any:  # type: ignore[override]
        """Do what transformers' does, with hfvlm's card, if the licence of the weights allows it.

        Raises:
            LicenceError: it is non-commercial, special or unknown, and `accept_licence` is off.
        """
        check_model(self, accepted=accept_licence)
        return super().push_to_hub(repo_id, **kwargs)  # type: ignore[arg-type]

    def save_pretrained(
        self,
        save_directory: Any,
        is_main_process: bool = True,  # noqa: FBT001, FBT002 (the host's)
        state_dict: dict[str, Any] | None = None,
        push_to_hub: bool = False,  # noqa: FBT001, FBT002 (the host's)
        *args: Any,
        accept_licence: bool = False,
        **kwargs: Any,
    ) -> None:
        """Do what transformers' does; with `push_to_hub`, as `HfvlmPreTrainedModel.push_to_hub`.

        Raises:
            LicenceError: see `push_to_hub`.
        """
        if push_to_hub:
            check_model(self, accepted=accept_licence)
        super().save_pretrained(save_directory, is_main_process, state_dict, push_to_hub, *args, **kwargs)

    def _upload_modified_files(self, working_dir: Any, repo_id: str, *args: Any, **kwargs: Any) -> Any:
        """Complete the card: the one step that all of transformers' uploads of a model share."""
        from hfvlm.presets.cards import complete_card

        complete_card(Path(working_dir) / "README.md", self.config, repo_id)
        return super()._upload_modified_files(working_dir, repo_id, *args, **kwargs)

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = "AutoModel") -> None:
        """Do nothing: hfvlm is installed code, and copying a module of it beside the weights could not import."""


class DualEncoder(HfvlmPreTrainedModel):
    """A vision tower and a text tower whose embeddings meet in a cosine similarity.

    A subclass builds `vision_model`, `text_model` and `logit_scale`, and names its loss, one of `hfvlm.losses`, in
    `pair_loss`, and in `max_logit_scale` the temperature's bound in training, if there is one.
    """

    input_modalities = ["image", "text"]
    # Which tower embeds a modality. What `get_<modality>_features` is fed, the processor's `prepare` makes.
    towers: ClassVar[dict[str, str]] = {"image": "vision_model", "text": "text_model"}
    _keep_in_fp32_modules_strict = ["logit_scale"]
    # The loss looks at whole batches of pairs; the Trainer must not rescale it by counted tokens.
    accepts_loss_kwargs = False

    vision_model: Any
    text_model: Any
    logit_scale: LogitScale
    pair_loss: Callable[..., Tensor]
    max_logit_scale: float | None = None
    # What forward is told in training, beside a batch's inputs, so that its output has all that `contrast` needs.
    training_inputs: ClassVar[dict[str, Any]] = {}

    @property
    def modalities(self) -> tuple[str, ...]:
        """What the model embeds: it has a `get_<modality>_features` for each."""
        return tuple(self.towers)

    def further_keywords(self, method: str) -> Collection[str]:
        return tower_keywords(self, method)

    def get_input_embeddings(self) -> nn.Module:
        return self.text_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.text_model.set_input_embeddings(value)

    @can_return_tuple
    def get_image_features(self, pixel_values: Tensor, **kwargs: Unpack[Keywords]) -> BaseModelOutputWithPooling:
        """`(B, C, H, W)` -> an output whose `pooler_output`, `(B, D)`, is the joint embedding, not normalised."""
        return self.encode_image(pixel_values, **kwargs)

    @can_return_tuple
    def get_text_features(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, **kwargs: Unpack[Keywords]
    ) -> BaseModelOutputWithPooling:
        """`(B, N)` -> an output whose `pooler_output`, `(B, D)`, is the joint embedding, not normalised."""
        return self.encode_text(input_ids, attention_mask, **kwargs)

    def encode_image(self, pixel_values: Tensor, **kwargs: Any) -> BaseModelOutputWithPooling:
        return as_features(self.vision_model(pixel_values, **kwargs))

    def encode_text(
        self, input_ids: Tensor, attention_mask: Tensor | None, **kwargs: Any
    ) -> BaseModelOutputWithPooling:
        return as_features(self.text_model(input_ids, attention_mask, **kwargs))

    def compare(
        self, image: BaseModelOutputWithPooling, text: BaseModelOutputWithPooling, *, return_loss: bool | None
    ) -> DualEncoderOutput:
        """The features of images and of texts -> their similarities and, for pairs, the loss."""
        image_embeds, text_embeds = unit(image.pooler_output), unit(text.pooler_output)
        logits = self.logit_scale(cosines(image_embeds, text_embeds))
        scale, bias = self.logit_scale.factor_and_bias()
        output = DualEncoderOutput(
            logits_per_image=logits,
            logits_per_text=logits.t(),
            text_embeds=text_embeds,
            image_embeds=image_embeds,
            text_model_output=text,
            vision_model_output=image,
            logit_scale=scale,
            logit_bias=bias,
        )
        if return_loss:
            output.loss = self.contrast(output)
        return output

    def contrast(
        self,
        output: DualEncoderOutput,
        pair_loss: Callable[..., Tensor] | None = None,
        group: ProcessGroup | None = None,
    ) -> Tensor:
        """The loss of pairs of embeddings, by the model's own objective or another of `hfvlm.losses`, over one or
        several processes."""
        loss = pair_loss or self.pair_loss
        images: Any = output.image_embeds
        if self.training and torch.is_grad_enabled():
            check_negatives(images.shape[0], rank_and_size(group)[1])
        return loss(images, output.text_embeds, output.logit_scale, output.logit_bias, group=group)


def unit(features: Tensor | None) -> Tensor:
    """`(B, D)` -> the same directions, of length one."""
    if features is None:
        raise ValueError("The tower returned no embedding.")
    return F.normalize(features, dim=-1)


def as_features(output: TowerOutput) -> BaseModelOutputWithPooling:
    """The tower's output with the joint embedding where every `get_*_features` has it."""
    return BaseModelOutputWithPooling(
        last_hidden_state=output.last_hidden_state,
        pooler_output=output.embeds,
        hidden_states=output.hidden_states,
        attentions=output.attentions,
    )
