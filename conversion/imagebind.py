"""ImageBind's released file (https://github.com/facebookresearch/ImageBind at 53680b0)."""

from collections.abc import Iterable, Mapping
from math import isqrt
from pathlib import Path
from typing import Any

from torch import Tensor

from hfvlm.checkpoints.conversion import Conversion, always
from hfvlm.checkpoints.key_table import Row, flat, scalar, split, unbatched
from hfvlm.checkpoints.originals import check_options, count_layers
from hfvlm.conversion.clip import VOCABULARIES
from hfvlm.conversion.processors import sized, tokenizer_for
from hfvlm.models.imagebind.configuration_imagebind import (
    HfvlmImageBindAudioConfig,
    HfvlmImageBindConfig,
    HfvlmImageBindDepthConfig,
    HfvlmImageBindIMUConfig,
    HfvlmImageBindTextConfig,
    HfvlmImageBindThermalConfig,
    HfvlmImageBindVisionConfig,
)
from hfvlm.models.imagebind.processing_imagebind import (
    HfvlmImageBindDepthFeatureExtractor,
    HfvlmImageBindFeatureExtractor,
    HfvlmImageBindImageProcessor,
    HfvlmImageBindIMUFeatureExtractor,
    HfvlmImageBindProcessor,
    HfvlmImageBindThermalFeatureExtractor,
    HfvlmImageBindTokenizer,
    HfvlmImageBindVideoFeatureExtractor,
)

# Of the original's constructor, whose other arguments are in the shapes.
DEFAULTS: dict[str, Any] = {
    "video_frames": 2,
    "kernel_size": (2, 14, 14),
    "vision_num_heads": 16,
    "text_num_heads": 12,
    "audio_num_heads": 12,
    "audio_stride": 10,
    "audio_num_mel_bins": 128,
    "audio_target_len": 204,
    "audio_drop_path": 0.1,
    "depth_num_heads": 8,
    "depth_drop_path": 0.0,
    "thermal_num_heads": 12,
    "thermal_drop_path": 0.0,
    "imu_num_heads": 8,
    "imu_drop_path": 0.7,
}
# What the original's `imagebind_huge()` passes otherwise.
HUGE = {"text_num_heads": 16}
SIZES = ("embed_dim", "num_blocks", "kernel_size")
TOWERS = ("vision", "text", "audio", "depth", "thermal", "imu")


def keys_for(config: HfvlmImageBindConfig, layout: str = "imagebind", keys: Iterable[str] = ()) -> list[Row]:
    """Return the rows for the released file."""
    return [
        Row("modality_preprocessors.vision.rgbt_stem.proj.1.weight", "vision_model.patches.projection.weight"),
        Row("modality_preprocessors.vision.cls_token", "vision_model.class_token", flat),
        Row("modality_preprocessors.vision.pos_embedding_helper.pos_embed", "vision_model.position", unbatched),
        Row("modality_trunks.vision.pre_transformer_layer.0.{}", "vision_model.pre_norm.{}"),
        Row("modality_heads.vision.0.{}", "vision_model.post_norm.{}"),
        Row("modality_heads.vision.2.weight", "vision_model.projection.weight"),
        Row("modality_preprocessors.text.token_embedding.weight", "text_model.embeddings.token.weight"),
        Row("modality_preprocessors.text.pos_embed", "text_model.embeddings.position", unbatched),
        # The causal mask, which every implementation of attention makes for itself.
        Row("modality_preprocessors.text.mask", None),
        Row("modality_heads.text.proj.0.{}", "text_model.post_norm.{}"),
        Row("modality_heads.text.proj.1.weight", "text_model.projection.weight"),
        *sensor("audio", "rgbt_stem", "pos_embedding_helper.pos_embed", 2),
        *sensor("depth", "depth_stem", "pos_embedding_helper.pos_embed", 2),
        *sensor("thermal", "rgbt_stem", "pos_embedding_helper.pos_embed", 2),
        # Its dropout comes before the projection.
        *sensor("imu", "imu_stem", "pos_embed", 3),
        *blocks("modality_trunks.{}.blocks.{}", "{}_model.layers.{}"),
        Row("modality_postprocessors.{}.1.log_logit_scale", "logit_scales.{}.scale", scalar),
    ]


def sensor(tower: str, stem: str, position: str, head: int) -> list[Row]:
    """Return the rows of a tower without its layers."""
    source, target = f"modality_preprocessors.{tower}", f"{tower}_model"
    return [
        Row(f"{source}.{stem}.proj.weight", f"{target}.patches.projection.weight"),
        Row(f"{source}.{stem}.norm_layer.{{}}", f"{target}.patch_norm.{{}}"),
        Row(f"{source}.cls_token", f"{target}.class_token", flat),
        Row(f"{source}.{position}", f"{target}.position", unbatched),
        Row(f"modality_heads.{tower}.0.{{}}", f"{target}.post_norm.{{}}"),
        Row(f"modality_heads.{tower}.{head}.weight", f"{target}.projection.weight"),
    ]


def blocks(source: str, target: str) -> list[Row]:
    """Return the rows of the original's transformer layers."""
    qkv = tuple(f"{target}.attention.{part}_proj.{{}}" for part in "qkv")
    return [
        Row(f"{source}.attn.in_proj_{{}}", qkv, split(3)),
        Row(f"{source}.attn.bias_{{}}", f"{target}.attention.bias_{{}}", flat),
        Row(f"{source}.attn.out_proj.{{}}", f"{target}.attention.out_proj.{{}}"),
        Row(f"{source}.norm_1.{{}}", f"{target}.attention_norm.{{}}"),
        Row(f"{source}.mlp.{{}}.{{}}", f"{target}.mlp.{{}}.{{}}"),
        Row(f"{source}.norm_2.{{}}", f"{target}.mlp_norm.{{}}"),
    ]


def config_from_original(original: Mapping[str, Any], state_dict: Mapping[str, Tensor]) -> HfvlmImageBindConfig:
    """Read the arguments of the original's `ImageBindModel`, as they are or under "config"; without any, those of
    `imagebind_huge`. What they leave open is in the shapes of the tensors."""
    options = original.get("config", original)
    sizes = {f"{tower}_{size}" for tower in TOWERS for size in SIZES} | {"out_embed_dim"}
    given = {name: value for name, value in options.items() if name in DEFAULTS or name in sizes}
    if given:
        check_options("ImageBindModel's arguments", options, {*DEFAULTS, *sizes})
    options = DEFAULTS | (given or HUGE)
    shapes = {key: tuple(tensor.shape) for key, tensor in state_dict.items()}
    vision = _vision(options, shapes)
    size = vision.image_size
    return HfvlmImageBindConfig(
        vision_config=vision,
        text_config=_text(options, shapes),
        audio_config=_audio(options, shapes),
        depth_config=HfvlmImageBindDepthConfig(**_map("depth", "depth_stem", options, shapes, size)),
        thermal_config=HfvlmImageBindThermalConfig(**_map("thermal", "rgbt_stem", options, shapes, size)),
        imu_config=_imu(options, shapes),
    )


Shapes = Mapping[str, tuple[int, ...]]


def _trunk(tower: str, options: Mapping[str, Any], shapes: Shapes) -> dict[str, Any]:
    trunk = f"modality_trunks.{tower}.blocks"
    head = {"text": "text.proj.1", "imu": "imu.3"}.get(tower, f"{tower}.2")
    rate = f"{tower}_drop_path"
    return {
        "hidden_size": shapes[f"{trunk}.0.norm_1.weight"][0],
        "intermediate_size": shapes[f"{trunk}.0.mlp.fc1.weight"][0],
        "num_hidden_layers": count_layers(shapes, f"{trunk}."),
        "num_attention_heads": options[f"{tower}_num_heads"],
        "projection_dim": shapes[f"modality_heads.{head}.weight"][0],
    } | ({"drop_path_rate": options[rate]} if rate in options else {})


def _vision(options: Mapping[str, Any], shapes: Shapes) -> HfvlmImageBindVisionConfig:
    _, channels, moments, patch, _ = shapes["modality_preprocessors.vision.rgbt_stem.proj.1.weight"]
    positions = shapes["modality_preprocessors.vision.pos_embedding_helper.pos_embed"][1] - 1
    return HfvlmImageBindVisionConfig(
        image_size=patch * isqrt(positions // (options["video_frames"] // moments)),
        patch_size=patch,
        num_channels=channels,
        num_frames=options["video_frames"],
        temporal_patch_size=moments,
        **_trunk("vision", options, shapes),
    )


def _text(options: Mapping[str, Any], shapes: Shapes) -> HfvlmImageBindTextConfig:
    vocabulary = shapes["modality_preprocessors.text.token_embedding.weight"][0]
    return HfvlmImageBindTextConfig(
        vocab_size=vocabulary,
        max_position_embeddings=shapes["modality_preprocessors.text.pos_embed"][1],
        bos_token_id=vocabulary - 2,
        eos_token_id=vocabulary - 1,
        **_trunk("text", options, shapes),
    )


def _audio(options: Mapping[str, Any], shapes: Shapes) -> HfvlmImageBindAudioConfig:
    return HfvlmImageBindAudioConfig(
        num_mel_bins=options["audio_num_mel_bins"],
        num_frames=options["audio_target_len"],
        patch_size=shapes["modality_preprocessors.audio.rgbt_stem.proj.weight"][2],
        stride=options["audio_stride"],
        **_trunk("audio", options, shapes),
    )


def _map(tower: str, stem: str, options: Mapping[str, Any], shapes: Shapes, images: Any) -> dict[str, Any]:
    """Return the sizes of a tower of maps, which have the size of `images` in the original and whose last pixels may
    not fill a patch."""
    patch = shapes[f"modality_preprocessors.{tower}.{stem}.proj.weight"][2]
    edge = isqrt(shapes[f"modality_preprocessors.{tower}.pos_embedding_helper.pos_embed"][1] - 1)
    size = images if images // patch == edge else edge * patch
    return _trunk(tower, options, shapes) | {"patch_size": patch, "image_size": size}


def _imu(options: Mapping[str, Any], shapes: Shapes) -> HfvlmImageBindIMUConfig:
    patch = shapes["modality_preprocessors.imu.imu_stem.proj.weight"][1] // 6
    pieces = shapes["modality_preprocessors.imu.pos_embed"][1] - 1
    return HfvlmImageBindIMUConfig(num_samples=pieces * patch, patch_size=patch, **_trunk("imu", options, shapes))


EXTRACTORS: dict[str, Any] = {
    "feature_extractor": HfvlmImageBindFeatureExtractor,
    "video_feature_extractor": HfvlmImageBindVideoFeatureExtractor,
    "depth_feature_extractor": HfvlmImageBindDepthFeatureExtractor,
    "thermal_feature_extractor": HfvlmImageBindThermalFeatureExtractor,
    "imu_feature_extractor": HfvlmImageBindIMUFeatureExtractor,
}
image_processor_for = sized(HfvlmImageBindImageProcessor)


def processor_for(config: HfvlmImageBindConfig, settings: Mapping[str, Any], vocabulary: Path) -> Any:
    """Return the processor; `vocabulary` is one of VOCABULARIES."""
    tokenizer = tokenizer_for(HfvlmImageBindTokenizer, config.text_config, settings, vocabulary)
    vision, audio, imu = config.vision_config, config.audio_config, config.imu_config
    sizes: dict[str, dict[str, Any]] = {
        "feature_extractor": {"num_mel_bins": audio.num_mel_bins, "num_frames": audio.num_frames},
        "video_feature_extractor": {"size": vision.image_size, "num_frames": vision.num_frames},
        "depth_feature_extractor": {"size": config.depth_config.image_size},
        "thermal_feature_extractor": {"size": config.thermal_config.image_size},
        "imu_feature_extractor": {"num_samples": imu.num_samples},
    }
    return HfvlmImageBindProcessor(
        image_processor_for(config, settings),
        tokenizer,
        **{name: EXTRACTORS[name](**size | settings.get(name, {})) for name, size in sizes.items()},
    )


layout_of = always("imagebind")
CONVERSION = Conversion(
    config_from_original=config_from_original,
    keys_for=keys_for,
    layout_of=layout_of,
    image_processor_for=image_processor_for,
    processor_for=processor_for,
    vocabularies_for=always([VOCABULARIES]),
)
