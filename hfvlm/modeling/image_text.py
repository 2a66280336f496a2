"""Language models that attend to images and videos: the base of LLaVA and its relatives."""

from collections.abc import Collection, Mapping
from functools import partial
from operator import attrgetter
from typing import Any, Unpack

import torch
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM
from transformers.cache_utils import Cache
from transformers.generation import LogitsProcessorList
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils.generic import can_return_tuple

from hfvlm.checks.keywords import check_keywords
from hfvlm.modeling.base import HfvlmPreTrainedModel
from hfvlm.modeling.compat import CACHE_NAMES, cache_of, rename_cache, with_cache
from hfvlm.modeling.generation import Generation, WithinVocabulary, Without
from hfvlm.modeling.keywords import Keywords, keywords_of
from hfvlm.modeling.language import scored_late
from hfvlm.modeling.outputs import ImageTextOutput, LateImageTextOutput
from hfvlm.modules.projection import Projector

Features = BaseModelOutputWithPooling


class ImageTextModel(HfvlmPreTrainedModel, Generation):
    """A language model in whose input the features of images replace placeholder tokens.

    A subclass builds its towers and `language_model`, one of transformers', and encodes images in
    `get_image_features` (videos in `get_video_features`): an output whose `pooler_output` is a list with one `(tokens,
    hidden_size)` tensor an image, in the order of the batch. The placeholders are `config.image_token_id` (and
    `config.video_token_id`), repeated as often as an image has tokens. They need no row in the embedding table.
    """

    base_model_prefix = "image_text"
    input_modalities = ["image", "text"]
    # The arguments of `get_<modality>_features`; without the first of them there is nothing to encode.
    media_inputs: Mapping[str, tuple[str, ...]] = {"image": ("pixel_values",)}
    # Loading in 4 or 8 bits leaves these as they are: they are small, and every later token depends on them.
    full_precision_modules: tuple[str, ...] = ("vision_model", "projector", "lm_head")
    lora_recipe = "language+projection"

    language_model: Any

    def post_init(self) -> None:
        """Finish as transformers does. Modules that encode images stay on one device: some of their parameters are in
        no layer. The language model comes first: PEFT puts soft prompts before the inputs of the first model."""
        others = {name: child for name, child in self._modules.items() if name != "language_model"}
        self._modules = {"language_model": self.language_model, **others}
        super().post_init()
        parts = (child for child in self.children() if child is not self.language_model)
        self._no_split_modules = [*(self._no_split_modules or ()), *(type(part).__name__ for part in parts)]

    @property
    def unused_modules(self) -> list[str]:
        """Names of the modules that no output depends on; they are frozen, and LoRA leaves them out."""
        return []

    def freeze_unused(self) -> None:
        """Freeze unused modules: data-parallel training waits for the gradient of every parameter that requires it."""
        for name in self.unused_modules:
            self.get_submodule(name).requires_grad_(requires_grad=False)

    @classmethod
    def from_pretrained(cls, *args: Any, quantization_config: Any = None, **kwargs: Any) -> Any:
        """Load as transformers does. In 4 or 8 bits, the vision tower, the projector and the output layer keep their
        precision unless `quantization_config` lists others in `llm_int8_skip_modules`."""
        if getattr(quantization_config, "llm_int8_skip_modules", ()) is None:
            quantization_config.llm_int8_skip_modules = list(cls.full_precision_modules)
        if quantization_config is not None:
            kwargs["quantization_config"] = quantization_config
        return super().from_pretrained(*args, **kwargs)

    def further_keywords(self, method: str) -> Collection[str]:
        """Return the names of the media's inputs and of the language model's, or those of the vision tower's."""
        if method != "forward":
            return keywords_of(self.vision_model)
        media = {name for names in self.media_inputs.values() for name in names}
        return {*media, *keywords_of(self.language_model), "shift_labels"} - {*CACHE_NAMES}

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.language_model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        return self.language_model.get_output_embeddings()

    def set_output_embeddings(self, value: nn.Module) -> None:
        self.language_model.set_output_embeddings(value)

    @can_return_tuple
    def forward(  # noqa: PLR0913 (transformers reads these names: Trainer, generate and the pipelines)
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        image_sizes: Tensor | None = None,
        pixel_values_videos: Tensor | None = None,
        mm_encoder_outputs: Mapping[str, Features] | None = None,
        cache: Cache | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Unpack[Keywords],
    ) -> ImageTextOutput:
        """Score the next token after each of the tokens of texts with media.

        Args:
            input_ids: `(B, N)`, with a placeholder for each token of each image.
            pixel_values: all images of the batch, in the order of their placeholders; see `get_image_features`.
            attention_mask: `(B, N)`, 0 where a row is padded.
            inputs_embeds: `(B, N, D)` in place of `input_ids`, with the placeholders' row of the table where media
                belong, or with media among them already; see `embed`.
            labels: `(B, N)`; the loss leaves out -100. Also as `shift_labels`, shifted already.
            image_sizes: `(images, 2)`, height and width in pixels, for models that need them.
            pixel_values_videos: likewise, all videos.
            mm_encoder_outputs: outputs of `get_image_features`, as {"image": ...}, in place of images.
            cache: keys and values of the tokens before `input_ids`, also as `past_key_values`.
            logits_to_keep: compute the logits of the last n positions alone; 0 means all.
            **kwargs: other inputs that `media_inputs` names, and those of the language model.

        Raises:
            ValueError: the images do not fit their placeholders; the message counts both.
        """
        media = {"pixel_values": pixel_values, "image_sizes": image_sizes, "pixel_values_videos": pixel_values_videos}
        rest: dict[str, Any] = dict(kwargs)
        media |= {name: rest.pop(name) for names in self.media_inputs.values() for name in names if name in rest}
        features = self.encode_media(self.placed(media, input_ids, inputs_embeds, cache), mm_encoder_outputs)
        labels = rest.get("shift_labels") if labels is None else labels  # without any, language models return no loss
        output = self.read_with(
            partial(scored_late, self.language_model),
            input_ids,
            inputs_embeds,
            features,
            attention_mask=attention_mask,
            labels=labels,
            cache=cache,
            logits_to_keep=logits_to_keep,
            **rest,
        )
        kind = ImageTextOutput if output.get("late_logits") is None else LateImageTextOutput
        return kind(**{**output, **as_outputs(features)})

    def read_with(
        self,
        reader: Any,
        input_ids: Tensor | None,
        inputs_embeds: Tensor | None,
        features: Mapping[str, Features],
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> Any:
        """Run `reader`, the language model or its part before the output layer, over texts with media."""
        embeds = self.merged(input_ids, inputs_embeds, features)
        return reader(inputs_embeds=embeds, **with_cache(cache), **kwargs)

    @property
    def base_model(self) -> Any:
        """The model without its output layer, from whose hidden states trainers compute a loss."""
        return Backbone(self)

    def merged(
        self, input_ids: Tensor | None, inputs_embeds: Tensor | None, features: Mapping[str, Features]
    ) -> Tensor:
        """Put features where the placeholders are, among the embeddings of tokens or those that are given."""
        if inputs_embeds is None:
            return self.embed(input_ids, features)
        self.check_one(input_ids, inputs_embeds)
        for name, output in features.items():
            mask = self.placeholder_mask(name, None, inputs_embeds)
            inputs_embeds = self.filled(name, inputs_embeds, mask, output)
        return inputs_embeds

    def check_one(self, input_ids: Tensor | None, inputs_embeds: Tensor | None) -> None:
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError(f"{type(self).__name__} needs either input_ids or inputs_embeds.")

    def placeholder_mask(self, modality: str, input_ids: Tensor | None, inputs_embeds: Tensor | None) -> Tensor:
        """Find the placeholders among ids `(B, N)`, or among embeddings `(B, N, D)`, of which they have their own row
        of the table -> `(B, N)`, True where one is.

        Raises:
            ValueError: there are embeddings alone, and the table has no row for the placeholder.
        """
        token = self.placeholder(modality)
        if input_ids is not None:
            return input_ids == token
        table: Any = self.get_input_embeddings()
        if token >= table.weight.shape[0]:
            raise ValueError(
                f"{modality}_token_id {token} has no row in the table of {table.weight.shape[0]} embeddings, so that "
                f"inputs_embeds hold no placeholder: give input_ids, or resize_token_embeddings first."
            )
        row = table(torch.tensor(token, device=table.weight.device))
        return (inputs_embeds == row.to(inputs_embeds)).all(dim=-1)

    def placed(
        self, media: Mapping[str, Any], input_ids: Tensor | None, inputs_embeds: Tensor | None, cache: Any = None
    ) -> Mapping[str, Any]:
        """Add to the media's inputs where media are in their texts, for a model that encodes them by it; here nothing.

        Args:
            media: inputs by their names.
            input_ids: `(B, N)`.
            inputs_embeds: `(B, N, D)` in their place.
            cache: of the tokens before these.
        """
        return media

    def encode_media(
        self, media: Mapping[str, Any], given: Mapping[str, Features] | None = None
    ) -> dict[str, Features]:
        """Encode inputs, by their names, to features by modality, next to those that are `given`."""
        features = dict(given or {})
        for modality, names in self.media_inputs.items():
            inputs = {name: media[name] for name in names if media.get(name) is not None}
            if names[0] not in inputs:
                continue
            if modality in features:
                raise ValueError(f"{names[0]} and mm_encoder_outputs[{modality!r}] are the same images: give one.")
            features[modality] = getattr(self, f"get_{modality}_features")(**inputs, return_dict=True)
        return features

    def embed(self, input_ids: Tensor | None, features: Mapping[str, Features]) -> Tensor:
        """Embed `(B, N)` token ids, and put the features of their media among them -> `(B, N, D)`."""
        self.check_one(input_ids, None)
        masks = {name: self.placeholder_mask(name, input_ids, None) for name in self.media_inputs}
        text: Any = input_ids
        for mask in masks.values():
            text = text.masked_fill(mask, 0)  # placeholders may lie outside the embedding table
        embeds = self.get_input_embeddings()(text)
        for name, mask in masks.items():
            embeds = self.filled(name, embeds, mask, features.get(name))
        return embeds

    def filled(self, modality: str, embeds: Tensor, mask: Tensor, features: Features | None) -> Tensor:
        """Put features in the rows of embeddings `(B, N, D)` where the mask `(B, N)` has placeholders."""
        # Single tokens are steps of a generation: counting in them would wait for the device.
        if mask.shape[1] > 1 and not torch.compiler.is_compiling():
            self.check_placeholders(modality, mask, features)
        if features is None:
            return embeds
        return embeds.masked_scatter(mask.unsqueeze(-1), torch.cat(each(features)).to(embeds))

    def check_placeholders(self, modality: str, mask: Tensor, features: Features | None) -> None:
        """Check that there are as many placeholders, `mask`, as features.

        Raises:
            ValueError: the counts differ; the message names both.
        """
        counts = [] if features is None else [self.count_placeholders(rows) for rows in each(features)]
        if (found := int(mask.sum())) == sum(counts):
            return
        token = f"{modality}_token_id {self.placeholder(modality)}"
        given = f"the {modality}s make {sum(counts)} ({_some(counts)})" if counts else f"no {modality} was given"
        raise ValueError(
            f"input_ids hold {found} {modality} placeholders ({token}), but {given}. Each {modality} needs one for "
            f"each of its tokens, as {type(self).__name__}'s processor puts them; it must agree with "
            f"{', '.join(f'{name} {attrgetter(name)(self.config)}' for name in self.config.token_count_fields)}."
        )

    def count_placeholders(self, rows: Tensor) -> int:
        """Count the placeholders of an image with these features, `(tokens, hidden_size)`."""
        return rows.shape[0]

    def reusable(self, cache: Any, known: int, length: int) -> int:
        """Count those of the first `known` tokens in a cache that are the same in a prompt of `length` tokens."""
        return known

    # Generation: transformers' own, with images encoded once and placeholders apart from the vocabulary.

    @torch.no_grad()
    def generate(self, inputs: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        """Generate as transformers does. Each image is encoded once, for all steps, beams and sequences."""
        names = [name for names in self.media_inputs.values() for name in names]
        media: Mapping[str, Any] = {name: kwargs.pop(name) for name in names if name in kwargs}
        if media:
            cache = next((kwargs[name] for name in CACHE_NAMES if kwargs.get(name) is not None), None)
            # Ids are those of the whole text, media of what follows on the cache.
            known = 0 if cache is None else int(cache.get_seq_length())
            texts = (kwargs.get("input_ids") if inputs is None else inputs), kwargs.get("inputs_embeds")
            ids, embeds = (None if each is None else each[:, known:] for each in texts)
            media = self.placed(media, ids, embeds, cache)
        if features := self.encode_media(media, kwargs.pop("mm_encoder_outputs", None)):
            kwargs["mm_encoder_outputs"] = features
        return super().generate(inputs, *args, **kwargs)

    def prepare_inputs_for_generation(
        self, *args: Any, mm_encoder_outputs: Mapping[str, Features] | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        """Hand features on with the prompt: in the first step, without a cache in every step, and where an assistant
        begins, which transformers does not call a first step."""
        inputs = super().prepare_inputs_for_generation(*args, **kwargs)
        cache = cache_of(inputs)
        if kwargs.get("is_first_iteration") or cache is None or cache.get_seq_length() == 0:
            inputs["mm_encoder_outputs"] = mm_encoder_outputs
        elif inputs.get("input_ids") is not None and inputs["input_ids"].shape[1] > 1:
            # Candidates that were looked up in the prompt may be placeholders, none of which will be accepted.
            for modality in self.media_inputs:
                found = inputs["input_ids"] == self.placeholder(modality)
                inputs["input_ids"] = inputs["input_ids"].masked_fill(found, 0)
        return inputs

    def ids(self, vocab_size: int) -> int:
        return max(vocab_size, *(self.placeholder(modality) + 1 for modality in self.media_inputs))

    def repeated(
        self, features: Mapping[str, Features], rows: Mapping[str, Tensor], times: int
    ) -> dict[str, Features]:
        """Repeat a row's images with the row."""
        return {
            name: Features(pooler_output=self._repeat_by_row(name, output, rows, times))  # type: ignore[arg-type]
            for name, output in features.items()
        }

    def _repeat_by_row(
        self, modality: str, features: Features, rows: Mapping[str, Tensor], times: int
    ) -> list[Tensor]:
        remaining = iter(each(features))
        repeated: list[Tensor] = []
        embeds = rows.get("inputs_embeds")
        mask = self.placeholder_mask(modality, None if embeds is not None else rows["input_ids"], embeds)
        for count in mask.sum(dim=1).tolist():
            row: list[Tensor] = []
            while sum(map(self.count_placeholders, row)) < count:
                row.append(next(remaining))
            repeated += row * times
        return repeated

    def adapted(self, processors: LogitsProcessorList, prompt_length: int) -> LogitsProcessorList:
        """Never generate a placeholder, for which there would be no image, and score none."""
        return WithinVocabulary([*processors, Without(self.placeholder(modality) for modality in self.media_inputs)])

    def placeholder(self, modality: str) -> int:
        """Return the id of the token that stands for a token of an image, or of another modality."""
        return getattr(self.config, f"{modality}_token_id")


class ProjectedModel(ImageTextModel):
    """A language model that attends to the patches of CLIP's tower through a projector.

    The tower's hidden state `config.vision_feature_layer` is projected; nothing after it is computed.
    """

    vision_model: Any
    projector: Any

    def __init__(self, config: Any):
        super().__init__(config)
        self.vision_model = AutoModel.from_config(config.vision_config)
        self.projector = self.build_projector(config)
        self.language_model = AutoModelForCausalLM.from_config(config.text_config)
        self.post_init()
        self.freeze_unused()

    def build_projector(self, config: Any) -> Projector:
        return Projector(config.vision_config.hidden_size, config.text_config.hidden_size, config.projector_depth)

    @property
    def unused_modules(self) -> list[str]:
        return [f"vision_model.{name}" for name in self.vision_model.unused(self.config.vision_feature_layer)]


class Backbone:
    """The model without its output layer, where transformers needs one; the modules are the model's."""

    def __init__(self, model: ImageTextModel):
        self.model = model

    def __call__(
        self,
        input_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        mm_encoder_outputs: Mapping[str, Features] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Do what the model's forward does, up to the last hidden states."""
        owner, known = f"{type(self.model).__name__}.base_model()", self.model.further_keywords("forward")
        rename_cache(owner, kwargs)
        check_keywords(owner, kwargs, {*known, *Keywords.__optional_keys__, "cache"})
        names = {name for names in self.model.media_inputs.values() for name in names}
        media: Mapping[str, Any] = {name: kwargs.pop(name, None) for name in names}
        media = self.model.placed(media, input_ids, inputs_embeds, kwargs.get("cache"))
        features = self.model.encode_media(media, mm_encoder_outputs)
        return self.model.read_with(self.model.language_model.base_model, input_ids, inputs_embeds, features, **kwargs)

    def __getattr__(self, name: str) -> Any:
        # `get_encoder` and `get_decoder` are the model's own, which would come back here.
        if name.startswith("__") or name in ("get_encoder", "get_decoder", "set_encoder", "set_decoder"):
            raise AttributeError(name)
        return getattr(self.model, name)


def as_outputs(features: Mapping[str, Features]) -> dict[str, Features]:
    """Name features by modality as the fields of an output."""
    return {f"{modality}_outputs": output for modality, output in features.items()}


def each(features: Features) -> list[Tensor]:
    """List the features of each image, `(tokens, hidden_size)`."""
    rows: Any = features.pooler_output
    return list(rows)


def _some(counts: list[int], most: int = 8) -> str:
    return " + ".join(map(str, counts[:most])) + (" + ..." if len(counts) > most else "")
