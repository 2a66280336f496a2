"""Flamingo (https://arxiv.org/abs/2204.14198), as OpenFlamingo built it (https://arxiv.org/abs/2308.01390;
https://github.com/mlfoundations/open_flamingo at 655f693)."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Unpack

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM
from transformers import initialization as init
from transformers.cache_utils import Cache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutput, BaseModelOutputWithPooling
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from hfvlm.modeling.base import HfvlmPreTrainedModel, other_towers
from hfvlm.modeling.compat import cache_of, new_cache, with_cache
from hfvlm.modeling.image_text import Features, ImageTextModel, each
from hfvlm.modeling.keywords import Keywords
from hfvlm.modeling.outputs import media_features
from hfvlm.modeling.wrapped_layers import before_layers, wrap_layers
from hfvlm.models.clip.modeling_clip import HfvlmCLIPVisionModel
from hfvlm.models.flamingo.configuration_flamingo import HfvlmFlamingoConfig, HfvlmFlamingoResamplerConfig
from hfvlm.modules.projection import Bridge
from hfvlm.modules.transformer import Attention, CrossAttention, Stack

# The column of an image that a row does not have.
NOWHERE = 1 << 40


class FeedForward(nn.Module):
    """Widen, activate, narrow, without biases."""

    def __init__(self, size: int, inner_size: int):
        super().__init__()
        self.fc1 = nn.Linear(size, inner_size, bias=False)
        self.fc2 = nn.Linear(inner_size, size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class ResamplerLayer(GradientCheckpointingLayer):
    """Latents attend to the patches and to each other."""

    def __init__(self, config: HfvlmFlamingoResamplerConfig):
        super().__init__()
        size, heads = config.hidden_size, config.num_attention_heads
        self.attention_norm = nn.LayerNorm(size, eps=config.layer_norm_eps)
        self.context_norm = nn.LayerNorm(size, eps=config.layer_norm_eps)
        self.attention = Attention(config, size, size, heads * config.head_dim, heads, size, bias=False)
        self.mlp_norm = nn.LayerNorm(size, eps=config.layer_norm_eps)
        self.mlp = FeedForward(size, config.intermediate_size)

    def forward(self, x: Tensor, patches: Tensor, patch_mask: Tensor | None = None, **kwargs: Any) -> Tensor:
        """Update the latents (B, L, D) by patches (B, N, D), with a mask (B, 1, L, N + L)."""
        latents = self.attention_norm(x)
        context = torch.cat([self.context_norm(patches), latents], dim=1)
        x = x + self.attention(latents, patch_mask, context, **kwargs)[0]
        return x + self.mlp(self.mlp_norm(x))


class HfvlmFlamingoResampler(HfvlmPreTrainedModel, Bridge):
    """The paper's Perceiver resampler: learned latents gather what the patches of an image show.

    Patches have no positions here: CLIP's distinguish them. The frames of a video are that many more patches, to which
    embeddings of their times are added where there are some (`max_num_frames`), and to all patches of an image one of
    its place among those of its text (`max_num_media`); no release has them.
    """

    config: HfvlmFlamingoResamplerConfig
    base_model_prefix = "resampler"
    _keys_to_ignore_on_load_unexpected = other_towers("resampler")
    _no_split_modules = ["ResamplerLayer"]
    main_input_name = "patches"
    _can_record_outputs = {"hidden_states": ResamplerLayer, "attentions": Attention}

    def __init__(self, config: HfvlmFlamingoResamplerConfig):
        super().__init__(config)
        self.patches = nn.Identity()  # the patches are inputs as they are
        self.latents = nn.Parameter(torch.zeros(config.num_latents, config.hidden_size))
        frames, media = config.max_num_frames, config.max_num_media
        self.frame_positions = None if frames is None else nn.Parameter(torch.zeros(frames, config.hidden_size))
        self.media_positions = None if media is None else nn.Parameter(torch.zeros(media, config.hidden_size))
        self.layers = Stack(ResamplerLayer(config) for _ in range(config.num_hidden_layers))
        self.post_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.post_init()

    def init_own_weights(self, std: float) -> None:
        init.normal_(self.latents, std=1.0)
        for positions in (self.frame_positions, self.media_positions):
            if positions is not None:
                init.normal_(positions, std=1.0)

    def get_input_embeddings(self) -> nn.Module:
        return self.patches

    @merge_with_config_defaults
    @capture_outputs(tie_last_hidden_states=False)
    def forward(
        self,
        patches: Tensor,
        num_frames: Tensor | None = None,
        media_order: Tensor | None = None,
        **kwargs: Unpack[Keywords],
    ) -> BaseModelOutput:
        """Resample patches to `(B, num_latents, D)`.

        Args:
            patches: `(B, N, D)` of images, or `(B, T, N, D)` of the frames of videos.
            num_frames: `(B,)`, how many of the T frames each video has; by default all.
            media_order: `(B,)`, how many images or videos each has before it in its text, for `max_num_media`.
            **kwargs: of transformers.

        Raises:
            ValueError: there are embeddings of this order, and none is given, or there are fewer embeddings.
        """
        patches = self.patches(patches.to(self.latents.dtype))
        frames = patches.unsqueeze(1) if patches.ndim == 3 else patches
        if self.frame_positions is not None:
            frames = frames + self.times(frames, num_frames).unsqueeze(-2)
        if self.media_positions is not None:
            frames = frames + self.places(media_order, len(frames))[:, None, None]
        x = self.latents.expand(patches.shape[0], -1, -1)
        mask = None if num_frames is None else self.mask_for(frames, num_frames)
        x = self.layers(x, frames.flatten(1, 2), patch_mask=mask, **kwargs)
        return BaseModelOutput(last_hidden_state=self.post_norm(x))

    def times(self, frames: Tensor, num_frames: Tensor | None) -> Tensor:
        """Embed the times of frames `(B, T, N, D)` -> `(B, T, D)`: one embedding a frame; over videos of more frames
        than there are embeddings these are spread, and interpolated between (the paper's section on evaluation)."""
        table: Any = self.frame_positions
        last = table.shape[0] - 1
        if num_frames is None:
            num_frames = frames.new_full(frames.shape[:1], frames.shape[1], dtype=torch.long)
        stretch = last / (num_frames.clamp(min=last + 1) - 1).clamp(min=1)
        steps = torch.arange(frames.shape[1], device=frames.device)
        places = (steps * stretch.unsqueeze(1)).clamp(max=last)
        below = places.floor().long()
        share = (places - below).unsqueeze(-1).to(table)
        return torch.lerp(table[below], table[(below + 1).clamp(max=last)], share)

    def places(self, media_order: Tensor | None, images: int) -> Tensor:
        """Embed the places of images among those of their texts, `(B,)` -> `(B, D)`."""
        table: Any = self.media_positions
        if media_order is None or len(media_order) != images:
            raise ValueError(
                f"The resampler has embeddings of the order of images (max_num_media {len(table)}): media_order, how "
                f"many images each has before it in its text, is needed for each of {images}, not "
                f"{'none' if media_order is None else len(media_order)}; the model's forward counts it from the ids."
            )
        if not torch.compiler.is_compiling() and media_order.numel() and int(media_order.max()) >= len(table):
            raise ValueError(
                f"A text has {int(media_order.max()) + 1} images; the resampler has embeddings for {len(table)} "
                "(resampler_config.max_num_media)."
            )
        return table[media_order.to(table.device)]

    def mask_for(self, frames: Tensor, num_frames: Tensor) -> Tensor:
        """Hide the patches of frames `(B, T, N, D)` that a video does not have -> `(B, 1, L, T * N + L)`."""
        steps = torch.arange(frames.shape[1], device=frames.device)
        hidden = (steps >= num_frames.unsqueeze(1)).repeat_interleave(frames.shape[2], dim=1)
        hidden = F.pad(hidden, (0, len(self.latents)))[:, None, None].expand(-1, -1, len(self.latents), -1)
        return torch.zeros_like(hidden, dtype=frames.dtype).masked_fill(hidden, torch.finfo(frames.dtype).min)


class Gate(nn.Module):
    """A factor that begins at zero, so that the language model begins as it was."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))

    def init_own_weights(self, std: float) -> None:
        init.zeros_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight.tanh()


class GatedLayer(GradientCheckpointingLayer, Bridge):
    """The paper's GATED XATTN-DENSE: a text attends to its image before a layer of the language model."""

    def __init__(self, config: HfvlmFlamingoConfig, layer_idx: int):
        super().__init__()
        text, heads = config.text_config, config.cross_attention_heads
        size = text.hidden_size
        self.attention_norm = nn.LayerNorm(size)
        self.attention = CrossAttention(
            config,
            layer_idx,
            config.resampler_config.hidden_size,
            out_size=size,
            width=heads * config.cross_attention_head_dim,
            heads=heads,
            in_size=size,
            bias=False,
        )
        self.attention_gate = Gate()
        self.mlp_norm = nn.LayerNorm(size)
        self.mlp = FeedForward(size, 4 * size)
        self.mlp_gate = Gate()

    def forward(
        self, x: Tensor, media: Tensor | None, mask: Tensor | None, has_image: Any, cached: dict[int, Any] | None
    ) -> Tensor:
        """Update hidden states (B, N, D) by images.

        Args:
            x: the hidden states.
            media: (B, M, C), the images' tokens.
            mask: (B, 1, N, M).
            has_image: (B, N, 1), 0 for tokens that come before any image.
            cached: keys and values of the images, see `CrossAttention`.
        """
        if media is not None:
            x = x + self.attention_gate(self.attention(self.attention_norm(x), media, mask, cached)[0] * has_image)
        return x + self.mlp_gate(self.mlp(self.mlp_norm(x)))


@dataclass(eq=False)
class MediaContext:
    """The images of a batch of texts, and their columns in these. It stays with the texts' cache.

    Args:
        media: `(B, P, L, D)`, the tokens of each row's images.
        columns: `(B, P)`, the column of each image's placeholder in the whole text; `NOWHERE` for none.
        cached: keys and values of each cross-attention, once they are computed; None, as in training, for none.
    """

    media: Tensor
    columns: Tensor
    cached: dict[int, tuple[Tensor, Tensor]] | None = None

    def cropped(self, past: Any) -> "MediaContext":
        """Leave out images whose placeholders are no longer among the `past` tokens of a cache."""
        return MediaContext(self.media, self.columns.masked_fill(self.columns >= past, NOWHERE), self.cached)

    def joined(self, new: "MediaContext") -> "MediaContext":
        """Append images that follow, and drop those that no row has."""
        media, columns = (torch.cat(pair, dim=1) for pair in ((self.media, new.media), (self.columns, new.columns)))
        present = (columns < NOWHERE).any(dim=0)
        return MediaContext(media[:, present], columns[:, present])

    def mask_for(self, columns: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Let each token attend to the last image before it, alone.

        Args:
            columns: `(N,)`, of the tokens.
            dtype: of the mask.

        Returns:
            The mask (B, 1, N, P * L), and (B, N, 1), 0 for tokens that come before any image. Those attend to the
            first, since they must attend to something.
        """
        images, tokens = self.columns.unsqueeze(1), columns.unsqueeze(1)
        before = images <= tokens
        last = before & (images == images.masked_fill(~before, -NOWHERE).amax(dim=2, keepdim=True))
        has_image = last.any(dim=2, keepdim=True)
        first = torch.arange(images.shape[2], device=images.device) == 0
        hidden = ~(last | (first & ~has_image)).repeat_interleave(self.media.shape[2], dim=2)
        mask = torch.zeros_like(hidden, dtype=dtype).masked_fill(hidden, torch.finfo(dtype).min)
        return mask.unsqueeze(1), has_image.to(dtype)


class HfvlmFlamingoForConditionalGeneration(ImageTextModel):
    """A language model that attends to images between its layers, each token to the last image before it.

    While it runs, its layers hold what they attend to: a model answers one call at a time.
    """

    config: HfvlmFlamingoConfig
    media_inputs = {"image": ("pixel_values", "num_frames", "media_order")}
    # The mask of who attends to what has no form that these take; the towers and the language model may have them.
    _supports_flash_attn = _supports_flex_attn = False
    full_precision_modules = ("vision_model", "resampler", "gates", "lm_head")
    _no_split_modules = ["PreNormLayer", "WrappedLayer", "GatedLayer", "ResamplerLayer"]

    def __init__(self, config: HfvlmFlamingoConfig):
        super().__init__(config)
        self.vision_model = HfvlmCLIPVisionModel._from_config(config.vision_config)
        self.resampler = HfvlmFlamingoResampler._from_config(config.resampler_config)
        self.gates = nn.ModuleDict({str(i): GatedLayer(config, i) for i in config.gated_layers})
        self.language_model = AutoModelForCausalLM.from_config(config.text_config)
        wrap_layers(self.language_model)
        self.post_init()
        self.freeze_unused()

    @property
    def unused_modules(self) -> list[str]:
        return [f"vision_model.{name}" for name in self.vision_model.unused(-1)]

    @classmethod
    def from_towers(
        cls, vision_model: HfvlmCLIPVisionModel, language_model: Any, tokenizer: Any, **fields: Any
    ) -> "HfvlmFlamingoForConditionalGeneration":
        """Put a model together whose resampler and gated layers know nothing yet, and whose gates are closed.

        Args:
            vision_model: a tower of CLIP.
            language_model: any causal language model of transformers; its tables get a row for each of the tokenizer's
                new tokens, with the average token's numbers. It becomes part of the model.
            tokenizer: an `HfvlmFlamingoTokenizer` of the language model's vocabulary.
            **fields: of `HfvlmFlamingoConfig`.
        """
        known = language_model.get_input_embeddings().weight.shape[0]
        if len(tokenizer) > known:
            language_model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
            with torch.no_grad():
                for table in tables_of(language_model):
                    table[known:] = table[:known].float().mean(dim=0).to(table)
        tokens = {
            "image_token_id": "<image>",
            "eos_token_id": tokenizer.eos_token,
            "pad_token_id": tokenizer.pad_token,
        }
        ids = {name: tokenizer.convert_tokens_to_ids(token) for name, token in tokens.items()}
        width = vision_model.config.hidden_size
        resampler = {"hidden_size": width, "intermediate_size": 4 * width} | fields.pop("resampler_config", {})
        config = HfvlmFlamingoConfig(
            vision_config=vision_model.config,
            resampler_config=resampler,
            text_config=language_model.config,
            **ids | fields,
        )
        model = cls(config)
        model.vision_model.load_state_dict(vision_model.state_dict())
        wrap_layers(language_model)
        model.language_model = language_model
        return model

    @property
    def undecayed_parameters(self) -> list[str]:
        """Names of the parameters, or of modules, that the paper trains without weight decay; of the table of words
        the authors train two rows, and the others must stay."""
        words = self.get_input_embeddings()
        return ["resampler", *(name for name, module in self.named_modules() if module is words)]

    def freeze_pretrained(self) -> None:
        """Train what the authors train: the resampler and the gated layers; of the language model the embeddings of
        the image and the end-of-chunk token; nothing else."""
        for part in (self.vision_model, self.language_model):
            part.requires_grad_(requires_grad=False)
        words: Any = self.get_input_embeddings().weight
        words.requires_grad_(requires_grad=True)
        learned = torch.zeros(len(words), 1)
        learned[[self.config.image_token_id, self.config.eos_token_id]] = 1
        words.register_hook(lambda gradient: gradient * learned.to(gradient))

    @can_return_tuple
    def get_image_features(
        self,
        pixel_values: Tensor,
        num_frames: Tensor | None = None,
        media_order: Tensor | None = None,
        **kwargs: Unpack[Keywords],
    ) -> BaseModelOutputWithPooling:
        """Resample images to an output whose `pooler_output` has one `(num_latents, D)` tensor an image.

        Args:
            pixel_values: `(images, 3, H, W)`, or `(videos, frames, 3, H, W)`. The releases were trained with one
                frame.
            num_frames: `(videos,)`, how many of the frames each video has; by default all.
            media_order: `(images,)`, how many images each has before it in its text, for a resampler with
                `max_num_media`; the forward counts them.
            **kwargs: of transformers, and of the vision tower.
        """
        frames = pixel_values.flatten(0, -4)
        vision = self.vision_model(frames, until=-1, **kwargs)
        patches = vision.last_hidden_state[:, 1:].unflatten(0, (pixel_values.shape[0], -1))
        latents = self.resampler(patches, num_frames, media_order, **kwargs).last_hidden_state
        return media_features(vision, latents)

    def placed(
        self, media: Mapping[str, Any], input_ids: Tensor | None, inputs_embeds: Tensor | None, cache: Any = None
    ) -> Mapping[str, Any]:
        """Count the images before each in its text, those of the cache's texts among them, for a resampler that has
        embeddings of their order."""
        wanted = self.resampler.media_positions is not None and media.get("pixel_values") is not None
        if not wanted or media.get("media_order") is not None or (input_ids is None and inputs_embeds is None):
            return media
        placeholders = self.placeholder_mask("image", input_ids, inputs_embeds)
        order = placeholders.long().cumsum(dim=1) - 1
        if (known := getattr(cache, "media", None)) is not None:
            order = order + (known.columns < cached_tokens(cache)).sum(dim=1, keepdim=True)
        return {**media, "media_order": order[placeholders]}

    def count_placeholders(self, rows: Tensor) -> int:
        return self.config.count_tokens()

    def cache_media(self, input_ids: Tensor, pixel_values: Tensor, num_frames: Tensor | None = None) -> Cache:
        """Make a cache without a token, for texts that come after images.

        A text that is continued with it, `model(input_ids=..., cache=cache)`, attends to the last image of its row.

        Args:
            input_ids: `(B, N)`, of which the placeholders matter.
            pixel_values: the images, as in `get_image_features`.
            num_frames: likewise.
        """
        placeholders = self.placeholder_mask("image", input_ids, None)
        media = self.placed({"pixel_values": pixel_values, "num_frames": num_frames}, input_ids, None)
        context = self.context_of(placeholders, self.encode_media(media), None)
        cache: Any = new_cache(self)
        if context is not None:
            before = torch.arange(-context.columns.shape[1], 0, device=context.columns.device)
            cache.media = MediaContext(context.media, before.where(context.columns < NOWHERE, NOWHERE), {})
        return cache

    def read_with(
        self,
        reader: Any,
        input_ids: Tensor | None,
        inputs_embeds: Tensor | None,
        features: Mapping[str, Features],
        cache: Any = None,
        **kwargs: Any,
    ) -> Any:
        self.check_one(input_ids, inputs_embeds)
        placeholders = self.placeholder_mask("image", input_ids, inputs_embeds)
        context = self.context_of(placeholders, features, cache)
        if context is not None and context.cached is None and cache is not None:
            context.cached = {}
        columns = cached_tokens(cache) + torch.arange(placeholders.shape[1], device=placeholders.device)
        with before_layers(self.language_model, self.gates_for(context, columns)):
            output = reader(input_ids=input_ids, inputs_embeds=inputs_embeds, **with_cache(cache), **kwargs)
        if (cache := cache_of(output)) is not None:
            cache.media = context
        return output

    def context_of(self, placeholders: Tensor, features: Mapping[str, Features], cache: Any) -> MediaContext | None:
        """Find the images of texts with `placeholders`, `(B, N)`, after those of the cache's texts."""
        known, past = getattr(cache, "media", None), cached_tokens(cache)
        if placeholders.shape[1] > 1 and not torch.compiler.is_compiling():
            self.check_placeholders("image", placeholders, features.get("image"))
        if "image" not in features:
            return known and known.cropped(past)
        latents = torch.stack(each(features["image"]))
        counts = placeholders.sum(dim=1)
        # Of how many images a row has the graph of a compiled model knows only that they are no more than all.
        most = latents.shape[0] if torch.compiler.is_compiling() else max(int(counts.max()), 1)
        numbers = torch.arange(most, device=latents.device).expand(placeholders.shape[0], -1)
        own = numbers < counts.unsqueeze(1)
        which = (counts.cumsum(dim=0) - counts).unsqueeze(1) + numbers
        media = latents[which.clamp(max=latents.shape[0] - 1)] * own[..., None, None]
        # The columns of placeholders, in order, come first when all are sorted by whether they are one.
        order = (~placeholders).long().argsort(dim=1, stable=True)[:, :most]
        columns = F.pad(order + past, (0, most - order.shape[1])).masked_fill(~own, NOWHERE)
        new = MediaContext(media, columns)
        return new if known is None else known.cropped(past).joined(new)

    def gates_for(self, context: MediaContext | None, columns: Tensor) -> dict[int, Callable[[Tensor], Tensor]]:
        """Return what is applied to hidden states in these columns before layers of the language model."""
        inputs: tuple[Any, ...] = (None, None, None, None)
        if context is not None:
            mask, has_image = context.mask_for(columns, self.dtype)
            inputs = (context.media.flatten(1, 2).to(self.dtype), mask, has_image, context.cached)
        return {int(i): with_inputs(gate, inputs) for i, gate in self.gates.items()}


def tables_of(language_model: Any) -> list[Tensor]:
    """Return the tables of a language model that have a row for each token, each once."""
    head = language_model.get_output_embeddings()
    tables = [language_model.get_input_embeddings().weight, head.weight, getattr(head, "bias", None)]
    return list({id(table): table for table in tables if table is not None}.values())


def cached_tokens(cache: Any) -> Any:
    """Count the tokens in a cache."""
    return 0 if cache is None else cache.get_seq_length()


def with_inputs(gate: nn.Module, inputs: tuple[Any, ...]) -> Callable[[Tensor], Tensor]:
    return lambda x: gate(x, *inputs)
