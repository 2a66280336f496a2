"""Models whose embeddings meet in one space: what is trained on pairs, and the base of those with two towers."""

import functools
import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection
from typing import Any, ClassVar, Unpack

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from transformers import AutoModel
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils.generic import can_return_tuple

from hfvlm.losses.blocks import check_negatives
from hfvlm.losses.processes import rank_and_size
from hfvlm.modeling.base import HfvlmPreTrainedModel, for_pooled, unit
from hfvlm.modeling.keywords import Keywords, tower_keywords
from hfvlm.modeling.outputs import DualEncoderOutput, contrastive_fields
from hfvlm.modeling.text import without_their_padding
from hfvlm.modules.similarity import LogitScale, cosines


class ContrastiveModel(HfvlmPreTrainedModel, ABC):
    """Base of models that are trained on pairs of embeddings.

    A subclass names its loss, one of `hfvlm.losses`, in `pair_loss`, and in `min_logit_scale` and `max_logit_scale`
    the bounds of its learned temperatures in training, if there are any.
    """

    # The loss compares whole batches of pairs; the Trainer must not rescale it by counted tokens.
    accepts_loss_kwargs = False

    pair_loss: Callable[..., Tensor]
    min_logit_scale: float | None = None
    max_logit_scale: float | None = None
    # Whether more than embeddings is made of the tokens of towers, so that all are computed in training too.
    needs_tokens: ClassVar[bool] = False
    # Whether embeddings of texts do not depend on padding, if a mask says what is such.
    ignores_padding: ClassVar[bool] = False
    # Further inputs of forward in training, so that its output has all that `contrast` needs.
    training_inputs: ClassVar[dict[str, Any]] = {}

    def contrast(
        self,
        output: Any,
        pair_loss: Callable[..., Tensor] | None = None,
        group: ProcessGroup | None = None,
    ) -> Tensor:
        """Compute the loss of rows that belong together, over one or several processes.

        Args:
            output: of forward; row i of one modality belongs to row i of the others.
            pair_loss: one of `hfvlm.losses`, by default the model's own.
            group: processes whose batches are one.

        Raises:
            ValueError: a batch is one pair in training, which is compared with nothing.
        """
        if self.training and torch.is_grad_enabled():
            rows, _ = contrastive_fields(output)
            check_negatives(next(iter(rows.values())).shape[0], rank_and_size(group)[1])
        return self.loss_of_pairs(output, pair_loss or self.pair_loss, group)

    def embeddings(self, modality: str, **inputs: Any) -> Tensor:
        """Embed a batch as `get_<modality>_features`, but without what its `pooler_output` does not depend on."""
        model: Any = self
        tower = getattr(self, model.towers[modality])
        inputs, embed = for_pooled(tower, inputs), getattr(self, f"get_{modality}_features")
        if modality == "text" and self.ignores_padding:
            embed = functools.partial(without_their_padding, embed, tower.config)
            inputs = {"attention_mask": None, **inputs}
        return embed(**inputs, return_dict=True).pooler_output

    def bound_temperatures(self, highest: float | None = None) -> None:
        """Bound every temperature that is trained; its factor is at most `highest`, by default `max_logit_scale`."""
        bounds = self.min_logit_scale, highest or self.max_logit_scale
        for module in self.modules() if any(bounds) else ():
            if isinstance(module, LogitScale) and module.scale.requires_grad:
                module.clamp_(*bounds)

    @abstractmethod
    def embed_texts(self, input_ids: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Any:
        """Embed texts `(T, N)` as forward does -> features that `logits_with` compares with other inputs."""

    @abstractmethod
    def logits_with(self, text: Any, **media: Any) -> Tensor:
        """Compare the inputs of one other modality with features of texts, as forward does -> `(rows, T)`."""

    @abstractmethod
    def loss_of_pairs(self, output: Any, pair_loss: Callable[..., Tensor], group: ProcessGroup | None) -> Tensor:
        """Apply a loss to the embeddings in an output."""


def naming(forward: Callable[..., Any], names: Collection[str]) -> Callable[..., Any]:
    """Name further inputs in a forward's signature, where transformers' Trainer looks up the columns of a data set."""

    @functools.wraps(forward)
    def named(*args: Any, **kwargs: Any) -> Any:
        return forward(*args, **kwargs)

    signature = inspect.signature(forward)
    known = signature.parameters.values()
    added = [
        inspect.Parameter(n, inspect.Parameter.KEYWORD_ONLY, default=None)
        for n in names
        if n not in {p.name for p in known}
    ]
    ordered = sorted([*known, *added], key=lambda parameter: parameter.kind)
    named.__signature__ = signature.replace(parameters=ordered)  # type: ignore[attr-defined]
    return named


class DualEncoder(ContrastiveModel):
    """A vision tower and a text tower whose embeddings meet in a cosine similarity.

    A subclass builds `vision_model`, `text_model` and `logit_scale`, names its `pair_loss`, and in `image_inputs` and
    `text_inputs` what forward takes for one of the towers alone.
    """

    input_modalities = ["image", "text"]
    # Which tower embeds a modality. The processor's `prepare` makes the inputs of `get_<modality>_features`.
    towers: ClassVar[dict[str, str]] = {"image": "vision_model", "text": "text_model"}
    image_inputs: ClassVar[tuple[str, ...]] = ("interpolate_pos_encoding",)
    text_inputs: ClassVar[tuple[str, ...]] = ()
    output_class: ClassVar[type[DualEncoderOutput]] = DualEncoderOutput
    _keep_in_fp32_modules_strict = ["logit_scale"]

    vision_model: Any
    text_model: Any
    logit_scale: LogitScale

    def build_towers(self, config: Any) -> None:
        """Build both towers; the classes of their configurations decide on theirs."""
        self.vision_model = AutoModel.from_config(config.vision_config)
        self.text_model = AutoModel.from_config(config.text_config)

    def __init_subclass__(cls, **kwargs: Any):
        super().__init_subclass__(**kwargs)
        if "forward" not in vars(cls):
            setattr(cls, "forward", naming(cls.forward, (*cls.image_inputs, *cls.text_inputs)))  # noqa: B010

    @property
    def modalities(self) -> tuple[str, ...]:
        """What the model embeds: it has a `get_<modality>_features` for each."""
        return tuple(self.towers)

    def further_keywords(self, method: str) -> Collection[str]:
        return (*self.image_inputs, *self.text_inputs) if method == "forward" else tower_keywords(self, method)

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
        """Embed images; see `get_image_features`."""
        return self.vision_model.features(pixel_values, **kwargs)

    def encode_text(
        self, input_ids: Tensor, attention_mask: Tensor | None, **kwargs: Any
    ) -> BaseModelOutputWithPooling:
        """Embed texts; see `get_text_features`."""
        return self.text_model.features(input_ids, attention_mask, **kwargs)

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor,
        pixel_values: Tensor,
        attention_mask: Tensor | None = None,
        *,
        return_loss: bool | None = None,
        **kwargs: Unpack[Keywords],
    ) -> DualEncoderOutput:
        """Compare every text with every image; with `return_loss`, text i must belong to image i.

        Args:
            input_ids: `(T, N)`, as the text tower takes them.
            pixel_values: `(I, C, H, W)`, normalised.
            attention_mask: `(T, N)`, 0 for padding; may be left out.
            return_loss: also compute the loss of the batch, `pair_loss`.
            **kwargs: transformers' own for both towers, and inputs of one of them, such as
                `interpolate_pos_encoding=True` for images of any size or `token_type_ids` for a BERT; the towers'
                forwards describe them.
        """
        image, text = self.encode(input_ids, pixel_values, attention_mask, **kwargs)
        return self.compare(image, text, return_loss=return_loss)

    def encode(
        self, input_ids: Tensor, pixel_values: Tensor, attention_mask: Tensor | None, **kwargs: Any
    ) -> tuple[BaseModelOutputWithPooling, BaseModelOutputWithPooling]:
        """Embed images and texts, each tower with the keywords that are for it.

        In training, towers return no tokens unless these or hidden states are wanted.
        """
        for_image, for_text = (
            {name: kwargs[name] for name in kwargs if name not in others}
            for others in (self.text_inputs, self.image_inputs)
        )
        if self.training and not self.needs_tokens:
            for_image, for_text = for_pooled(self.vision_model, for_image), for_pooled(self.text_model, for_text)
        return self.encode_image(pixel_values, **for_image), self.encode_text(input_ids, attention_mask, **for_text)

    def compare(
        self, image: BaseModelOutputWithPooling, text: BaseModelOutputWithPooling, *, return_loss: bool | None
    ) -> Any:
        """Turn the features of images and of texts into similarities and, for pairs, the loss."""
        image_embeds, text_embeds = unit(image.pooler_output), unit(text.pooler_output)
        per_image, per_text = self.both_ways(image_embeds, text_embeds)
        scale, bias = self.logit_scale.factor_and_bias()
        output = self.output_class(
            logits_per_image=self.logit_scale(per_image),
            logits_per_text=self.logit_scale(per_text),
            text_embeds=text_embeds,
            image_embeds=image_embeds,
            text_model_output=text,
            vision_model_output=image,
            logit_scale=scale,
            logit_bias=bias,
            **self.further_fields(image, text),
        )
        if return_loss:
            output.loss = self.contrast(output)
        return output

    def embed_texts(self, input_ids: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Any:
        return self.encode_text(input_ids, attention_mask, **kwargs)

    def logits_with(self, text: Any, **media: Any) -> Tensor:
        return self.compare(self.encode_image(**media), text, return_loss=None).logits_per_image

    def similarities(self, image_embeds: Tensor, text_embeds: Tensor) -> Tensor:
        """Compare embeddings of unit length: `(I, T)`, not scaled."""
        return cosines(image_embeds, text_embeds)

    def both_ways(self, image_embeds: Tensor, text_embeds: Tensor) -> tuple[Tensor, Tensor]:
        """Compare images with texts, `(I, T)`, and texts with images, `(T, I)`, which may differ."""
        similarities = self.similarities(image_embeds, text_embeds)
        return similarities, similarities.t()

    def further_fields(self, image: Any, text: Any) -> dict[str, Any]:
        """Return the fields that an `output_class` adds to a `DualEncoderOutput`."""
        return {}

    def loss_of_pairs(self, output: Any, pair_loss: Callable[..., Tensor], group: ProcessGroup | None) -> Tensor:
        return pair_loss(output.image_embeds, output.text_embeds, output.logit_scale, output.logit_bias, group=group)
