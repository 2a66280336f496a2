"""Flamingo (https://arxiv.org/abs/2204.14198), as OpenFlamingo built it (https://arxiv.org/abs/2308.01390;
https://github.com/mlfoundations/open_flamingo at 655f693)."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Unpack

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel
from transformers import initialization as init
from transformers.cache_utils import Cache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutput, BaseModelOutputWithPooling
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from hfvlm.modeling.base import HfvlmPreTrainedModel, other_towers
from hfvlm.modeling.compat import cache_of, with_cache
from hfvlm.modeling.image_text import Features, ImageTextModel, each
from hfvlm.modeling.keywords import Keywords
from hfvlm.modeling.outputs import media_features
from hfvlm.models.clip.modeling_clip import HfvlmCLIPVisionModel
from hfvlm.models.flamingo.configuration_flamingo import HfvlmFlamingoConfig, HfvlmFlamingoResamplerConfig
from hfvlm.modules.projection import Bridge
from hfvlm.modules.transformer import Attention, CrossAttention, Stack

# The column of a picture that stands before every text, and of one that a row does not have.
BEFORE, NOWHERE = -1, 1 << 40
# Where transformers' models say how their modules are split among devices.
PLANS = ("_tp_plan", "_ep_plan", "_pp_plan", "_fsdp_plan")


class FeedForward(nn.Module):
    """Widen, activate, narrow, without biases."""

    def __init__(self, size: int, inner_size: int):
        super().__init__()
        self.fc1 = nn.Linear(size, inner_size, bias=False)
        self.fc2 = nn.Linear(inner_size, size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class ResamplerLayer(GradientCheckpointingLayer):
    """Latents look at the patches and at each other."""

    def __init__(self, config: HfvlmFlamingoResamplerConfig):
        super().__init__()
        size, heads = config.hidden_size, config.num_attention_heads
        self.attention_norm = nn.LayerNorm(size, eps=config.layer_norm_eps)
        self.context_norm = nn.LayerNorm(size, eps=config.layer_norm_eps)
        self.attention = Attention(config, size, size, heads * config.head_dim, heads, size, bias=False)
        self.mlp_norm = nn.LayerNorm(size, eps=config.layer_norm_eps)
        self.mlp = FeedForward(size, config.intermediate_size)

    def forward(self, x: Tensor, patches: Tensor, **kwargs: Any) -> Tensor:
        """(B, L, D), (B, N, D) -> (B, L, D)."""
        latents = self.attention_norm(x)
        context = torch.cat([self.context_norm(patches), latents], dim=1)
        x = x + self.attention(latents, context=context, **kwargs)[0]
        return x + self.mlp(self.mlp_norm(x))


class HfvlmFlamingoResampler(HfvlmPreTrainedModel, Bridge):
    """The paper's Perceiver resampler: learned latents gather what the patches of a picture show.

    Patches have no positions here: CLIP's tell them apart. The frames of a picture that moves are so many more
    patches; no release has the paper's embeddings of their times.
    """

    config: HfvlmFlamingoResamplerConfig
    base_model_prefix = "resampler"
    _keys_to_ignore_on_load_unexpected = other_towers("resampler")
    _no_split_modules = ["ResamplerLayer"]
    main_input_name = "patches"
    _can_record_outputs = {"hidden_states": ResamplerLayer, "attentions": Attention}

    def __init__(self, config: HfvlmFlamingoResamplerConfig):
        super().__init__(config)
        self.patches = nn.Identity()  # reads them as they are
        self.latents = nn.Parameter(torch.zeros(config.num_latents, config.hidden_size))
        self.layers = Stack(ResamplerLayer(config) for _ in range(config.num_hidden_layers))
        self.post_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.post_init()

    def init_own_weights(self, std: float) -> None:
        init.normal_(self.latents, std=1.0)

    def get_input_embeddings(self) -> nn.Module:
        return self.patches

    @merge_with_config_defaults
    @capture_outputs(tie_last_hidden_states=False)
    def forward(self, patches: Tensor, **kwargs: Unpack[Keywords]) -> BaseModelOutput:
        """`(B, N, D)`, of all frames -> `(B, num_latents, D)`."""
        patches = self.patches(patches.to(self.latents.dtype))
        x = self.latents.expand(patches.shape[0], -1, -1)
        return BaseModelOutput(last_hidden_state=self.post_norm(self.layers(x, patches, **kwargs)))


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
    """The paper's GATED XATTN-DENSE: a text looks at its picture before a layer of the language model."""

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
        self, x: Tensor, media: Tensor | None, mask: Tensor | None, sees: Any, kept: dict[int, Any] | None
    ) -> Tensor:
        """(B, N, D), the pictures' tokens (B, M, C), the mask (B, 1, N, M) and sees (B, N, 1), 0 for tokens that come
        before any picture -> (B, N, D)."""
        if media is not None:
            x = x + self.attention_gate(self.attention(self.attention_norm(x), media, mask, kept)[0] * sees)
        return x + self.mlp_gate(self.mlp(self.mlp_norm(x)))


class LookingLayer(nn.Module):
    """A layer of the language model, whose input may look at pictures first.

    A language model has no way to hand pictures to its layers. While Flamingo runs it, `look` is what they do with
    their input; alone, it is what it was.
    """

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer = layer
        self.look: Callable[[Tensor], Tensor] | None = None

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        return self.layer(x if self.look is None else self.look(x), *args, **kwargs)


@dataclass(eq=False)
class Sight:
    """The pictures of a batch of texts, and where they stand. It stays with the cache of what was read.

    Args:
        media: `(B, P, L, D)`, the tokens of each row's pictures, zeros after the last.
        columns: `(B, P)`, the column of each picture's place in the whole text; `NOWHERE` after the last.
        kept: keys and values of each layer that looks, once they are computed; None, as in training, keeps none.
    """

    media: Tensor
    columns: Tensor
    kept: dict[int, tuple[Tensor, Tensor]] | None = None

    def cropped(self, past: Any) -> "Sight":
        """Without the pictures whose places are no longer among the `past` tokens of a cache."""
        return Sight(self.media, self.columns.masked_fill(self.columns >= past, NOWHERE), self.kept)

    def last_picture(self, places: Tensor, past: Any) -> Tensor:
        """`(B, N)`, True where a picture stands, after `past` tokens -> how many pictures each token comes after, or
        is the place of; all of them, if places were written that no picture was given for."""
        before = (self.columns < past).sum(dim=1, keepdim=True)
        whole = (self.columns < NOWHERE).sum(dim=1, keepdim=True)
        return torch.minimum(before + places.cumsum(dim=1), whole)

    def mask_for(self, last: Tensor, dtype: torch.dtype) -> Tensor:
        """`(B, N)` of `last_picture` -> (B, 1, N, P * L): a token looks at the last picture before it, alone. One that
        has none looks at the first, since it must look somewhere, and drops what it saw."""
        pictures, tokens = self.media.shape[1:3]
        numbers = torch.arange(1, pictures + 1, device=last.device).repeat_interleave(tokens)
        hidden = last.clamp(min=1).unsqueeze(-1) != numbers
        return torch.zeros_like(hidden, dtype=dtype).masked_fill(hidden, torch.finfo(dtype).min).unsqueeze(1)


class HfvlmFlamingoForConditionalGeneration(ImageTextModel):
    """A language model that looks at pictures between its layers, each token at the last picture before it.

    While it runs, its layers hold what they look at: a model answers one call at a time.
    """

    config: HfvlmFlamingoConfig
    # The mask of who looks at what has no form that these take; the towers and the language model may have them.
    _supports_flash_attn = _supports_flex_attn = False
    full_precision_modules = ("vision_model", "resampler", "gates", "lm_head")
    _no_split_modules = ["PreNormLayer", "LookingLayer", "GatedLayer", "ResamplerLayer"]

    def __init__(self, config: HfvlmFlamingoConfig):
        super().__init__(config)
        self.vision_model = HfvlmCLIPVisionModel._from_config(config.vision_config)
        self.resampler = HfvlmFlamingoResampler._from_config(config.resampler_config)
        self.gates = nn.ModuleDict({str(i): GatedLayer(config, i) for i in config.looking_layers})
        self.language_model = AutoModelForCausalLM.from_config(config.text_config)
        wrap_layers(self.language_model)
        self.post_init()
        self.freeze_unread()

    @property
    def unread_modules(self) -> list[str]:
        return [f"vision_model.{name}" for name in self.vision_model.unread(-1)]

    def freeze_pretrained(self) -> None:
        """As the authors train: the resampler and the gated layers; of the language model the embeddings of pictures'
        places and of their texts' ends; nothing else."""
        for part in (self.vision_model, self.language_model):
            part.requires_grad_(requires_grad=False)
        words: Any = self.get_input_embeddings().weight
        words.requires_grad_(requires_grad=True)
        learned = torch.zeros(len(words), 1)
        learned[[self.config.image_token_id, self.config.eos_token_id]] = 1
        words.register_hook(lambda gradient: gradient * learned.to(gradient))

    @can_return_tuple
    def get_image_features(self, pixel_values: Tensor, **kwargs: Unpack[Keywords]) -> BaseModelOutputWithPooling:
        """Pictures -> an output whose `pooler_output` has one `(num_latents, D)` tensor a picture.

        Args:
            pixel_values: `(pictures, 3, H, W)`, or `(pictures, frames, 3, H, W)` of pictures that move. The releases
                were trained with one frame.
        """
        frames = pixel_values.flatten(0, -4)
        vision = self.vision_model(frames, until=-1, **kwargs)
        patches = vision.last_hidden_state[:, 1:]
        patches = patches.reshape(pixel_values.shape[0], -1, patches.shape[-1])
        return media_features(vision, self.resampler(patches, **kwargs).last_hidden_state)

    def count_placeholders(self, rows: Tensor) -> int:
        return self.config.count_tokens()

    def cache_media(self, input_ids: Tensor, pixel_values: Tensor) -> Cache:
        """`(B, N)` token ids and their pictures -> a cache without a token, for texts that come after the pictures.

        What is read with it, `model(input_ids=..., cache=cache)`, looks at the last picture of its row.
        """
        places = self.placeholder_mask("image", input_ids, None)
        sight = self.sight_of(places, self.encode_media({"pixel_values": pixel_values}), None)
        cache: Any = DynamicCache(config=self.config.get_text_config(decoder=True))
        if sight is not None:
            columns = sight.columns.masked_fill(sight.columns < NOWHERE, BEFORE)
            cache.sight = Sight(sight.media, columns, {})
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
        places = self.placeholder_mask("image", input_ids, inputs_embeds)
        sight = self.sight_of(places, features, cache)
        if sight is not None and sight.kept is None and cache is not None:
            sight.kept = {}
        with self.looking(sight, places, cache):
            output = reader(input_ids=input_ids, inputs_embeds=inputs_embeds, **with_cache(cache), **kwargs)
        if (cache := cache_of(output)) is not None:
            cache.sight = sight
        return output

    def sight_of(self, places: Tensor, features: Mapping[str, Features], cache: Any) -> Sight | None:
        """Find the images of texts with placeholders at `places`, `(B, N)`, after those of the cache's texts."""
        known = getattr(cache, "sight", None)
        if places.shape[1] > 1 and not torch.compiler.is_compiling():
            self.check_places("image", places, features.get("image"))
        past = 0 if cache is None else cache.get_seq_length()
        if "image" not in features:
            return known and known.cropped(past)
        latents = torch.stack(each(features["image"]))
        counts = places.sum(dim=1)
        # Of how many pictures a row has the graph of a compiled model knows only that they are no more than all.
        most = len(latents) if torch.compiler.is_compiling() else max(int(counts.max()), 1)
        numbers = torch.arange(most, device=latents.device).expand(len(places), -1)
        own = numbers < counts.unsqueeze(1)
        which = (counts.cumsum(dim=0) - counts).unsqueeze(1) + numbers
        media = latents[which.clamp(max=len(latents) - 1)] * own[..., None, None]
        # The columns of places, in order, come first when all columns are sorted by whether they are a place.
        order = (~places).long().argsort(dim=1, stable=True)[:, :most]
        columns = F.pad(order + past, (0, most - order.shape[1]))
        columns = columns.masked_fill(~own, NOWHERE)
        if known is None:
            return Sight(media, columns)
        return joined(known.cropped(past), Sight(media, columns))

    @contextmanager
    def looking(self, sight: Sight | None, places: Tensor, cache: Any) -> Iterator[None]:
        """Within it, the layers of the language model look at the pictures first."""
        seen: tuple[Any, ...] = (None, None, None, None)
        if sight is not None:
            past = 0 if cache is None else cache.get_seq_length()
            last = sight.last_picture(places, past)
            dtype = self.dtype
            sees = (last > 0).unsqueeze(-1).to(dtype)
            seen = (sight.media.flatten(1, 2).to(dtype), sight.mask_for(last, dtype), sees, sight.kept)
        layers: Any = decoder_layers(self.language_model)
        try:
            for i, gate in self.gates.items():
                layers[int(i)].look = look_through(gate, seen)
            yield
        finally:
            for layer in layers:
                layer.look = None


def decoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    """The layers of a language model of transformers: its first list that is as long as the model is deep."""
    depth = model.config.num_hidden_layers
    lists = (module for module in model.modules() if isinstance(module, nn.ModuleList) and len(module) == depth)
    return next(lists)


def wrap_layers(model: PreTrainedModel) -> None:
    """Wrap each layer of a language model, and name what is in them so in its plans for several devices."""
    layers = decoder_layers(model)
    for i, layer in enumerate(layers):
        layers[i] = LookingLayer(layer)
    path = next(name for name, module in model.named_modules() if module is layers)
    for owner, module in model.named_modules():
        if isinstance(module, PreTrainedModel) and f".{path}".startswith(f".{owner}." if owner else "."):
            inside = path.removeprefix(f"{owner}.") if owner else path
            for plan in PLANS:
                entries: dict[str, Any] = getattr(module, plan, None) or {}
                setattr(module, plan, {_within_wrapped(key, inside): value for key, value in entries.items()})


def _within_wrapped(key: str, layers: str) -> str:
    """Name a module inside a layer, such as `layers.*.mlp`, as it is called in the wrapped layer."""
    within = f"{layers}.*."
    return f"{within}layer.{key.removeprefix(within)}" if key.startswith(within) else key


def look_through(gate: nn.Module, seen: tuple[Any, ...]) -> Callable[[Tensor], Tensor]:
    return lambda x: gate(x, *seen)


def joined(known: Sight, new: Sight) -> Sight:
    """The pictures of what was read, and those of what follows."""
    rows = []
    for media, columns, more, places in zip(known.media, known.columns, new.media, new.columns, strict=True):
        first, then = columns < NOWHERE, places < NOWHERE
        rows.append((torch.cat([media[first], more[then]]), torch.cat([columns[first], places[then]])))
    most = max(len(columns) for _, columns in rows)
    media = torch.stack([F.pad(media, (0, 0, 0, 0, 0, most - len(media))) for media, _ in rows])
    columns = torch.stack([F.pad(columns, (0, most - len(columns)), value=NOWHERE) for _, columns in rows])
    return Sight(media, columns)
