"""LanguageBind's releases, one for each modality, alone or put together; adapters are merged.

Source: https://github.com/PKU-YuanGroup/LanguageBind at 7070c53.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import CLIPTextConfig, CLIPVisionConfig
from transformers.utils import logging

from hfvlm.checkpoints import CheckpointError
from hfvlm.checkpoints.compositions import merge_lora
from hfvlm.checkpoints.conversion import Conversion, Source, always
from hfvlm.checkpoints.key_table import Change, Row, Table, scalar, unbatched
from hfvlm.checkpoints.originals import UnsupportedOriginalError
from hfvlm.checkpoints.saving import LazyTensors
from hfvlm.configuration import config_of
from hfvlm.conversion.blocks import transformers_text_rows, transformers_vision_rows
from hfvlm.conversion.clip import VOCABULARIES
from hfvlm.conversion.interop.clip import NATIVE_SIZES
from hfvlm.conversion.processors import special_tokens, tokenizer_for
from hfvlm.models.clip.configuration_clip import HfvlmCLIPVisionConfig
from hfvlm.models.languagebind.configuration_languagebind import (
    HfvlmLanguageBindAudioConfig,
    HfvlmLanguageBindConfig,
    HfvlmLanguageBindDepthConfig,
    HfvlmLanguageBindTextConfig,
    HfvlmLanguageBindThermalConfig,
    HfvlmLanguageBindVideoConfig,
    HfvlmLanguageBindVisionConfig,
)
from hfvlm.models.languagebind.processing_languagebind import (
    HfvlmLanguageBindDepthFeatureExtractor,
    HfvlmLanguageBindFeatureExtractor,
    HfvlmLanguageBindImageProcessor,
    HfvlmLanguageBindProcessor,
    HfvlmLanguageBindThermalFeatureExtractor,
    HfvlmLanguageBindTokenizer,
    HfvlmLanguageBindVideoFeatureExtractor,
)

logger = logging.get_logger(__name__)

PARTS = {
    modality: f"the released folder of a LanguageBind of {things}, with its config.json"
    for modality, things in {
        "image": "images",
        "video": "videos",
        "audio": "audio",
        "depth": "depth maps",
        "thermal": "thermal images",
    }.items()
}
TOWERS: dict[str, type[HfvlmCLIPVisionConfig]] = {
    "image": HfvlmLanguageBindVisionConfig,
    "video": HfvlmLanguageBindVideoConfig,
    "audio": HfvlmLanguageBindAudioConfig,
    "depth": HfvlmLanguageBindDepthConfig,
    "thermal": HfvlmLanguageBindThermalConfig,
}
# Of preprocessing, among those of the tower: the original's names and ours.
SETTINGS = {
    "audio": ("feature_extractor", {"audio_sample_rate": "sampling_rate", "audio_mean": "mean", "audio_std": "std"}),
    "depth": ("depth_feature_extractor", {"max_depth": "farthest"}),
}
ENCODER = "vision_model.encoder."
# PEFT's name for what it wraps.
WRAPPED = "base_model.model."

# V1.5 has one class token a frame, and patches that reach through one frame.
class_tokens = Change(lambda tensor: tensor.reshape(-1, tensor.shape[-1]))
flat_patches = Change(lambda tensor: tensor.squeeze(2) if tensor.ndim == 5 else tensor)


def layout_of(original: Mapping[str, Any]) -> str:
    """Return what a release embeds next to texts: "image", "video", "audio", "depth" or "thermal"."""
    modality = original.get("modality") or original["model_type"].removeprefix("LanguageBind").lower()
    if modality not in TOWERS:
        raise UnsupportedOriginalError(f"config.json: model_type {modality!r} is no LanguageBind.")
    return modality


def keys_for(config: HfvlmLanguageBindConfig, layout: str = "image", keys: Iterable[str] = ()) -> list[Row]:
    """Return the rows for a release of the modality `layout`, its adapter merged."""
    return [*transformers_text_rows(), *tower_rows(config, layout)]


def tower_rows(config: HfvlmLanguageBindConfig, modality: str) -> list[Row]:
    """Return the rows of a release without its text tower."""
    target = config.towers[modality]
    rows = transformers_vision_rows("vision_model", target)
    if modality == "video":
        layer, ours = f"{ENCODER}layers.{{}}", f"{target}.layers.{{}}"
        changes = {f"{target}.class_token": class_tokens, f"{target}.patches.projection.weight": flat_patches}
        rows = [row._replace(change=changes.get(str(row.target))) for row in rows]
        rows += [
            Row(f"{layer}.temporal_embedding", f"{ours}.temporal_position", unbatched),
            Row(f"{layer}.temporal_attn.{{}}.{{}}", f"{ours}.temporal_attention.{{}}.{{}}"),
            Row(f"{layer}.temporal_layer_norm1.{{}}", f"{ours}.temporal_norm.{{}}"),
        ]
    return [
        *rows,
        Row("visual_projection.weight", f"{target}.projection.weight"),
        Row("logit_scale", f"logit_scales.{modality}.scale", scalar),
    ]


def tables_for(config: HfvlmLanguageBindConfig, layout: str, sources: Mapping[str, Source]) -> list[Table]:
    """Return each release's tensors with their rows; texts are embedded by the main source's tower.

    Raises:
        FileNotFoundError: a release that the model is made of was not given.
        CheckpointError: one was given that it is not made of.
    """
    given = [layout, *(role for role in sources if role != "main")]
    wanted = [modality for modality in config.modalities if modality != "text"]
    if missing := [modality for modality in wanted if modality not in given]:
        parts = "; ".join(f"{modality}, {PARTS[modality]}" for modality in missing)
        raise FileNotFoundError(f"The model is made of further releases (parts={{...}}, or --part): {parts}.")
    if surplus := [modality for modality in given if given.count(modality) > 1 or modality not in wanted]:
        raise CheckpointError(f"{', '.join(sorted(set(surplus)))}: more releases than the model is made of.")
    main = merged(sources["main"])
    tables = [Table(main, keys_for(config, layout))]
    for role, source in sources.items():
        if role != "main":
            tensors = merged(source)
            compare_texts(main, tensors, role)
            tables.append(Table(tensors, [*TEXTS_LEFT_OUT, *tower_rows(config, role)], role))
    return tables


# Every release repeats the text tower, which was not trained.
TEXTS_LEFT_OUT = [Row("text_model.{...}", None), Row("text_projection.weight", None)]


def compare_texts(main: Mapping[str, Tensor], other: Mapping[str, Tensor], role: str) -> None:
    """Warn of a release that was trained to meet other texts."""
    texts = [key for key in main if key.startswith("text_") and main[key].is_floating_point()]
    differing = [key for key in texts if not same(main[key], other.get(key))]
    if differing:
        logger.warning(
            f"{role}: its text tower is not the main source's; {len(differing)} tensors differ, the first is "
            f"{differing[0]!r}. Its embeddings may not meet those of texts."
        )


def same(a: Tensor, b: Tensor | None) -> bool:
    return b is not None and a.shape == b.shape and (a.is_meta or b.is_meta or torch.equal(a.float(), b.float()))


def merged(source: Any) -> Mapping[str, Tensor]:
    """Merge a release that is an adapter on CLIP; return the tensors of any other.

    Raises:
        CheckpointError: config.json, which has the scale of the adapter, is not beside the file.
    """
    tensors, wrapped = source.tensors, ENCODER + WRAPPED
    adapter = {key.removeprefix(ENCODER): tensor for key, tensor in tensors.items() if ".lora_" in key}
    if not adapter:
        return tensors
    vision = source.settings.get("vision_config", {})
    if "lora_alpha" not in vision:
        raise CheckpointError(
            f"{source.path}: is an adapter, whose config.json (vision_config.lora_alpha) is not beside it."
        )
    rank = next(len(tensor) for key, tensor in adapter.items() if ".lora_A" in key)
    base = {key: tensor for key, tensor in tensors.items() if ".lora_" not in key}
    inside = {key.removeprefix(wrapped): tensor for key, tensor in base.items() if key.startswith(wrapped)}
    whole = merge_lora(inside, adapter, {"r": rank, "lora_alpha": vision["lora_alpha"]})
    beside = {key: tensor for key, tensor in base.items() if not key.startswith(wrapped)}
    return LazyTensors.of(beside) | LazyTensors({ENCODER + key: make for key, make in whole.makers.items()})


def releases_of(original: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """Return the configurations of a model's releases by their modalities, the main one first."""
    parts = {role: original[f"{role}_config"] for role in PARTS if f"{role}_config" in original}
    return {layout_of(original): original.get("config", original), **parts}


def config_from_original(original: Mapping[str, Any], state_dict: Mapping[str, Tensor]) -> HfvlmLanguageBindConfig:
    """Read a release's config.json, with those of further ones as "video_config" and so on."""
    releases = releases_of(original)
    main = next(iter(releases.values()))
    fields: dict[str, Any] = dict.fromkeys(HfvlmLanguageBindConfig.sub_configs)
    for modality, release in releases.items():
        fields[config_of(HfvlmLanguageBindConfig.towers[modality])] = tower_config(modality, release)
    return HfvlmLanguageBindConfig(
        **fields | {"text_config": text_config(main)},
        logit_scale_init_value=main.get("logit_scale_init_value", 2.6592),
    )


def text_config(release: Mapping[str, Any]) -> HfvlmLanguageBindTextConfig:
    names = (*NATIVE_SIZES, "vocab_size", "max_position_embeddings")
    given = release["text_config"]
    native = CLIPTextConfig(**{name: given[name] for name in names if name in given})
    return HfvlmLanguageBindTextConfig(
        **{name: getattr(native, name) for name in names},
        projection_dim=release.get("projection_dim", 512),
        **special_tokens(native.vocab_size),
    )


def tower_config(modality: str, release: Mapping[str, Any]) -> HfvlmCLIPVisionConfig:
    """Return the tower of one release.

    Raises:
        UnsupportedOriginalError: it has an option that no release uses.
    """
    names, given = (*NATIVE_SIZES, "patch_size", "num_channels"), release["vision_config"]
    found = {"add_time_attn": given.get("add_time_attn", False), "tube_size": given.get("tube_size", 1)}
    if found != {"add_time_attn": modality == "video", "tube_size": 1}:
        raise UnsupportedOriginalError(
            f"vision_config: {found} is what no released tower of this kind ({modality}) has."
        )
    native = CLIPVisionConfig(**{name: given[name] for name in names if name in given})
    options: dict[str, Any] = {name: getattr(native, name) for name in names}
    options |= {"image_size": image_size_of(given), "patch_dropout": given.get("force_patch_dropout", 0.0)}
    if modality == "video":
        frames = given.get("num_frames", 1)
        tokens = frames if given.get("clip_type", "vl") == "vl_new" else 1
        options |= {"num_frames": frames, "num_class_tokens": tokens, "image_size": given.get("image_size", 224)}
    return TOWERS[modality](projection_dim=release.get("projection_dim", 512), **options)


def image_size_of(vision: Mapping[str, Any]) -> int | tuple[int, int]:
    """Return one edge, or height and width, of what the positions are for; spectrograms have theirs in other
    fields."""
    size = vision.get("image_size", 224)
    if vision.get("num_mel_bins") and vision.get("target_length"):
        size = (int(vision["num_mel_bins"]), int(vision["target_length"]))
    if isinstance(size, int):
        return size
    return size[0] if size[0] == size[1] else (size[0], size[1])


def settings_from_original(original: Mapping[str, Any], preprocessing: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of the extractors of audio and depth maps; a release sets no options of the others."""
    settings: dict[str, Any] = {}
    for modality, release in releases_of(original).items():
        part, names = SETTINGS.get(modality, ("", {}))
        given = {ours: release["vision_config"].get(name) for name, ours in names.items()}
        if given := {name: value for name, value in given.items() if value is not None}:
            settings[part] = given
    return settings


EXTRACTORS: dict[str, Any] = {
    "feature_extractor": HfvlmLanguageBindFeatureExtractor,
    "video_feature_extractor": HfvlmLanguageBindVideoFeatureExtractor,
    "depth_feature_extractor": HfvlmLanguageBindDepthFeatureExtractor,
    "thermal_feature_extractor": HfvlmLanguageBindThermalFeatureExtractor,
}


def image_processor_for(
    config: HfvlmLanguageBindConfig, settings: Mapping[str, Any]
) -> HfvlmLanguageBindImageProcessor:
    size = {} if config.vision_config is None else {"size": config.vision_config.image_size}
    return HfvlmLanguageBindImageProcessor(**size | settings.get("image_processor", {}))


def processor_for(config: HfvlmLanguageBindConfig, settings: Mapping[str, Any], vocabulary: Path) -> Any:
    """Return the processor; `vocabulary` is one of VOCABULARIES."""
    tokenizer = tokenizer_for(HfvlmLanguageBindTokenizer, config.text_config, settings, vocabulary)
    extractors = {
        part: extractor(**sizes_of(config, part) | settings.get(part, {})) for part, extractor in EXTRACTORS.items()
    }
    return HfvlmLanguageBindProcessor(image_processor_for(config, settings), tokenizer, **extractors)


def sizes_of(config: HfvlmLanguageBindConfig, part: str) -> dict[str, Any]:
    """Return what a part of the processor takes over from the tower it feeds; nothing where the model lacks it."""
    modality = next(name for name, other in HfvlmLanguageBindProcessor.parts.items() if other == part)
    tower = getattr(config, config_of(config.towers[modality]))
    if tower is None:
        return {}
    if modality == "audio":
        size = tower.image_size
        bins, frames = (size, size) if isinstance(size, int) else size
        return {"num_mel_bins": bins, "num_frames": frames}
    return {"size": tower.image_size} | ({"num_frames": tower.num_frames} if modality == "video" else {})


CONVERSION = Conversion(
    config_from_original=config_from_original,
    keys_for=keys_for,
    layout_of=layout_of,
    settings_from_original=settings_from_original,
    image_processor_for=image_processor_for,
    processor_for=processor_for,
    vocabularies_for=always([VOCABULARIES]),
    parts=PARTS,
    compose=tables_for,
)
