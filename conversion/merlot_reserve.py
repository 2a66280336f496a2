"""MERLOT Reserve's released files, Flax checkpoints of the pretrained model and of those fine-tuned for VCR and TVQA.

Source: https://github.com/rowanz/merlot_reserve at d22c50f.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from hfvlm.checkpoints.conversion import Conversion, always, head_of
from hfvlm.checkpoints.key_table import Change, Row, split, transpose
from hfvlm.checkpoints.originals import UnsupportedOriginalError, check_options
from hfvlm.conversion.processors import check_vocabulary
from hfvlm.conversion.siglip import flax_dense, flax_norm
from hfvlm.models.merlot_reserve.configuration_merlot_reserve import (
    HfvlmMERLOTReserveAudioConfig,
    HfvlmMERLOTReserveConfig,
    HfvlmMERLOTReserveVisionConfig,
)
from hfvlm.models.merlot_reserve.processing_merlot_reserve import (
    HfvlmMERLOTReserveFeatureExtractor,
    HfvlmMERLOTReserveImageProcessor,
    HfvlmMERLOTReserveProcessor,
    HfvlmMERLOTReserveTokenizer,
)

SECTIONS = ("model", "data", "device", "optimizer")
# Options of the original's configuration that are read, or that its training alone depends on.
MODEL_OPTIONS = (
    *("hidden_size", "size_per_head", "joint_num_layers", "use_bfloat16", "audio_num_layers", "audio_patch_size"),
    *("audio_seq_length", "audio_token_length", "output_grid", "vit_patch_size", "vit_pooling_ratio", "do_rotary"),
    *("vit_num_layers", "span_num_layers", "text_span_length", "_augment_video_src_idx_prob"),
)
PRETRAINED = "HfvlmMERLOTReserveModel"
# Of the fine-tuned files: without audio, and with it.
VCR, TVQA = "HfvlmMERLOTReserveForMultipleChoice", "HfvlmMERLOTReserveForVideoMultipleChoice"
PRETRAINED_GRID, ADAPTED_GRID = (12, 20), (18, 32)
# Rows and columns of the spectrograms that the audio tower takes, and the tokens that it makes of one.
FRAMES, TOKENS = 60, 6


def keys_for(config: HfvlmMERLOTReserveConfig, layout: str = "flax", keys: Iterable[str] = ()) -> list[Row]:
    """Return the rows for a file of `layout`, which is "flax"."""
    head, vision, audio = head_of(config, PRETRAINED), config.vision_config, config.audio_config
    chooses = head in (VCR, TVQA)
    rows = [
        # How long it was trained.
        Row("step", None, optional=True),
        Row("vision_encoder/embedding/kernel", "vision_model.patches.projection.weight", pixels_of(vision)),
        Row("vision_encoder/embedding/bias", "vision_model.patches.projection.bias"),
        *tower_rows("vision_encoder", "vision_model", vision, joins=not chooses),
        Row("token_encoder/Embed_0/embedding", "embeddings.weight"),
        *encoder_rows("joint_transformer", "joint", config, config.num_hidden_layers),
    ]
    if head != VCR:
        rows += [
            Row("audio_encoder/embedding/kernel", "audio_model.patches.weight", convolution),
            Row("audio_encoder/embedding/bias", "audio_model.patches.bias"),
            *tower_rows("audio_encoder", "audio_model", audio, joins=not chooses),
        ]
    if chooses:
        # The temperatures of pretraining, which nothing reads.
        rows += [Row("contrastive_scales", None, optional=True), Row("proj/kernel", "classifier.weight", transpose)]
    else:
        scales = tuple(f"{name}_logit_scale.scale" for name in ("image", "audio", "span"))
        rows += [
            Row("contrastive_scales", scales, split(3)),
            *class_token_rows("span_encoder/transformer", "span", joins=True),
            *encoder_rows("span_encoder/transformer", "span", config, config.num_span_layers),
            *flax_dense("head", "head"),
        ]
    wrapped = any(key.startswith("params/") for key in keys)
    if not wrapped:
        return rows
    return [rows[0], *(row._replace(source=f"params/{row.source}") for row in rows[1:])]


convolution = Change(lambda kernel: kernel.permute(2, 1, 0), lambda weight: weight.permute(2, 1, 0))


def pixels_of(vision: HfvlmMERLOTReserveVisionConfig) -> Change:
    """Make the change of a linear layer of patches, whose inputs are rows of columns of colours, to a convolution."""
    edge, colours = vision.patch_size, vision.num_channels
    return Change(
        lambda kernel: kernel.reshape(edge, edge, colours, -1).permute(3, 2, 0, 1),
        lambda weight: weight.permute(2, 3, 1, 0).reshape(edge * edge * colours, -1),
    )


def tower_rows(source: str, target: str, config: Any, *, joins: bool) -> list[Row]:
    """Return the rows of a tower's layers and of its pooling."""
    return [
        *class_token_rows(f"{source}/transformer", f"{target}.encoder", joins=joins),
        *encoder_rows(f"{source}/transformer", f"{target}.encoder", config, config.num_hidden_layers),
        *pool_rows(f"{source}/seq_attnpool", f"{target}.pool.attention", config),
    ]


def pool_rows(source: str, target: str, config: Any) -> list[Row]:
    """Return the rows of an attention, whose heads flax keeps as an axis of their own."""
    width, heads = config.hidden_size, config.num_attention_heads
    into = Change(lambda kernel: kernel.reshape(width, width).t(), lambda weight: weight.t().reshape(width, heads, -1))
    bias = Change(lambda bias: bias.flatten(), lambda bias: bias.reshape(heads, -1))
    rows = [
        Row(f"{source}/out/kernel", f"{target}.out_proj.weight", out_of_heads(width, heads)),
        Row(f"{source}/out/bias", f"{target}.out_proj.bias"),
    ]
    for name in ("query", "key", "value"):
        rows.append(Row(f"{source}/{name}/kernel", f"{target}.{name[0]}_proj.weight", into))
        rows.append(Row(f"{source}/{name}/bias", f"{target}.{name[0]}_proj.bias", bias))
    return rows


def out_of_heads(width: int, heads: int) -> Change:
    """Make the change of a kernel (heads, head size, width)."""
    return Change(lambda kernel: kernel.reshape(width, width).t(), lambda weight: weight.t().reshape(heads, -1, width))


def class_token_rows(source: str, target: str, *, joins: bool) -> list[Row]:
    """Return the rows of a class token and its projection, which fine-tuned models have, and do not use."""
    token = Row(f"{source}/cls", f"{target}.class_token")
    if joins:
        return [token, *flax_dense(f"{source}/cls_proj", f"{target}.projection")]
    return [token, Row(f"{source}/cls_proj/{{}}", None, optional=True)]


def encoder_rows(source: str, target: str, config: Any, depth: int) -> list[Row]:
    """Return the rows of layers between two norms."""
    rows = [
        *flax_norm(f"{source}/pre_ln", f"{target}.pre_norm"),
        *flax_norm(f"{source}/final_ln", f"{target}.post_norm"),
    ]
    width, heads = config.hidden_size, config.num_attention_heads
    fused = Change(
        lambda kernel: kernel.reshape(width, 3 * width).t().chunk(3),
        lambda *parts: joined(parts).t().reshape(width, 3 * heads, -1),
    )
    biases = Change(lambda bias: bias.flatten().chunk(3), lambda *parts: joined(parts).reshape(3 * heads, -1))
    for i in range(depth):
        theirs, ours = f"{source}/layer_{i:02d}", f"{target}.layers.{i}"
        parts = [f"{ours}.attention.{name}_proj" for name in "qkv"]
        rows += [
            *flax_norm(f"{theirs}/pre_attn_ln", f"{ours}.attention_norm"),
            Row(f"{theirs}/attention_layer/qkv/kernel", tuple(f"{part}.weight" for part in parts), fused),
            Row(f"{theirs}/attention_layer/qkv/bias", tuple(f"{part}.bias" for part in parts), biases),
            Row(
                f"{theirs}/attention_layer/attn_proj/kernel",
                f"{ours}.attention.out_proj.weight",
                out_of_heads(width, heads),
            ),
            *flax_norm(f"{theirs}/pre_mlp_ln", f"{ours}.mlp_norm"),
            *flax_dense(f"{theirs}/mlp_layer/intermediate", f"{ours}.mlp.fc1"),
            Row(f"{theirs}/mlp_layer/out/kernel", f"{ours}.mlp.fc2.weight", transpose),
        ]
    return rows


def joined(parts: Iterable[Tensor]) -> Tensor:
    return split(3).undo(*parts)  # type: ignore[misc]


def config_from_original(original: Mapping[str, Any], state_dict: Mapping[str, Tensor]) -> HfvlmMERLOTReserveConfig:
    """Read the original's configuration, or its section `model`, and the shapes of the file. Without any, frames have
    the size of pretraining, or of a fine-tuned file that of its authors' commands."""
    original = original.get("config", original)
    if "model" in original:
        check_options("MERLOT Reserve's configuration", original, SECTIONS)
    model, data = original.get("model", original), original.get("data", {})
    if "model" in original or "output_grid" in original:
        check_options("MERLOT Reserve's model", model, MODEL_OPTIONS)
    if model.get("do_rotary") is False:
        raise UnsupportedOriginalError("MERLOT Reserve's model: hfvlm does not implement do_rotary: false.")
    shapes = {key.removeprefix("params/"): tensor.shape for key, tensor in state_dict.items()}
    layer = "joint_transformer/layer_00"
    width, heads, _ = shapes[f"{layer}/attention_layer/qkv/kernel"]
    tuned = "proj/kernel" in shapes
    head = (VCR, TVQA)["audio_encoder/embedding/bias" in shapes] if tuned else PRETRAINED
    wide = shapes[f"{layer}/mlp_layer/intermediate/bias"][0]
    sizes: dict[str, Any] = {"hidden_size": width, "intermediate_size": wide, "num_attention_heads": heads // 3}
    pixels = shapes["vision_encoder/embedding/kernel"][0] // 3
    patch = model.get("vit_patch_size", round(pixels**0.5))
    grid = model.get("output_grid", ADAPTED_GRID if tuned else PRETRAINED_GRID)
    columns, channels = shapes.get("audio_encoder/embedding/kernel", (2, 65, width))[:2]
    return HfvlmMERLOTReserveConfig(
        architectures=[head],
        vision_config=HfvlmMERLOTReserveVisionConfig(
            **sizes,
            num_hidden_layers=depth_of(shapes, "vision_encoder/transformer"),
            image_size=tuple(rows * patch for rows in grid),
            patch_size=patch,
            pool_size=model.get("vit_pooling_ratio", 2),
            projection_dim=width,
        ),
        audio_config=HfvlmMERLOTReserveAudioConfig(
            **sizes,
            num_hidden_layers=depth_of(shapes, "audio_encoder/transformer") or 12,
            num_frames=model.get("audio_seq_length", FRAMES),
            num_channels=channels,
            patch_size=columns,
            num_tokens=model.get("audio_token_length", TOKENS),
            projection_dim=width,
        ),
        **sizes,
        num_hidden_layers=depth_of(shapes, "joint_transformer"),
        vocab_size=shapes["token_encoder/Embed_0/embedding"][0],
        num_span_layers=depth_of(shapes, "span_encoder/transformer") or 4,
        max_span_length=model.get("text_span_length", 15),
        num_segment_groups=data.get("num_segment_groups", 2),
        mask_share=data.get("mask_rate", 0.25),
        num_target_spans=data.get("num_text_spans_to_include", 48),
        video_split_rate=model.get("_augment_video_src_idx_prob", 0.1),
    )


def depth_of(shapes: Mapping[str, Any], encoder: str) -> int:
    """Count an encoder's layers."""
    start = f"{encoder}/layer_"
    return len({key.removeprefix(start).partition("/")[0] for key in shapes if key.startswith(start)})


def image_processor_for(
    config: HfvlmMERLOTReserveConfig, settings: Mapping[str, Any]
) -> HfvlmMERLOTReserveImageProcessor:
    vision = config.vision_config
    size = dict(zip(("height", "width"), (edge * vision.patch_size for edge in vision.grid), strict=True))
    return HfvlmMERLOTReserveImageProcessor(**{"size": size} | settings.get("image_processor", {}))


def processor_for(config: HfvlmMERLOTReserveConfig, settings: Mapping[str, Any], vocabulary: Path) -> Any:
    """Return the processor; `vocabulary` is lowercase_encoder.json."""
    audio = config.audio_config
    tokenizer = HfvlmMERLOTReserveTokenizer.from_vocabulary(
        vocabulary, **{"model_max_length": config.max_span_length} | settings.get("tokenizer", {})
    )
    check_vocabulary(vocabulary, len(tokenizer), config.vocab_size, "pieces are", "vocab_size")
    shape = {"num_frames": audio.num_frames, "num_mel_bins": audio.num_channels - 1}
    extractor = HfvlmMERLOTReserveFeatureExtractor(**shape | settings.get("feature_extractor", {}))
    images = image_processor_for(config, settings)
    return HfvlmMERLOTReserveProcessor(images, tokenizer, extractor, num_audio_tokens=audio.num_tokens)


layout_of = always("flax")
CONVERSION = Conversion(
    config_from_original=config_from_original,
    keys_for=keys_for,
    layout_of=layout_of,
    image_processor_for=image_processor_for,
    processor_for=processor_for,
    vocabularies_for=always([("lowercase_encoder.json", "tokenizer.json")]),
)
