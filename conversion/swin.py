"""Swin and Swin-V2 as their authors and timm release them, to transformers' own classes.

Sources: https://github.com/microsoft/Swin-Transformer at f82860b, for classification;
https://github.com/SwinTransformer/Swin-Transformer-Object-Detection at c7b2011, for detection; timm 1.0.31,
timm/models/swin_transformer.py and swin_transformer_v2.py.
"""

from collections.abc import Iterable, Mapping
from math import isqrt
from typing import Any

from torch import Tensor
from transformers import CONFIG_MAPPING, PreTrainedConfig
from transformers.models.swin import modeling_swin

from hfvlm.checkpoints.conversion import Conversion, always
from hfvlm.checkpoints.key_table import Row, split
from hfvlm.checkpoints.originals import check_options, count_layers, original_config
from hfvlm.models.clip.towers.configuration_swin import HfvlmCLIPSwinConfig, HfvlmCLIPSwinV2Config

# The authors' constructors. What is none of the shapes' is read; dropout is for training alone.
OPTIONS = (
    *("img_size", "pretrain_img_size", "patch_size", "in_chans", "num_classes", "embed_dim", "depths", "num_heads"),
    *("window_size", "mlp_ratio", "qkv_bias", "ape", "patch_norm", "pretrained_window_sizes", "out_indices"),
    *("drop_rate", "attn_drop_rate", "drop_path_rate", "use_checkpoint", "fused_window_process", "model_type"),
)
# What the authors call the parts of a block, and transformers, whose version 5.12 renamed Swin's.
OLD_NAMES = {"o_proj": "attention.output.dense", "fc1": "intermediate.dense", "fc2": "output.dense"}
NEW_NAMES = {"o_proj": "attention.o_proj", "fc1": "mlp.fc1", "fc2": "mlp.fc2"}
OLD_QKV = tuple(f"attention.self.{part}" for part in ("query", "key", "value"))
NEW_QKV = tuple(f"attention.{part}_proj" for part in "qkv")
RENAMED = not hasattr(modeling_swin, "SwinSelfAttention")
# Buffers, which follow from the configuration.
COMPUTED = ("attn.relative_position_index", "attn.relative_coords_table", "attn_mask")


def swin_rows(model_type: str, layout: str = "microsoft", source: str = "", target: str = "") -> list[Row]:
    """Return the rows of the authors' trunk; `source` and `target` end in a dot or are empty."""
    block, layer = f"{source}layers.{{}}.blocks.{{}}", f"{target}encoder.layers.{{}}.blocks.{{}}"
    new = RENAMED and model_type == "swin"
    names, qkv = (NEW_NAMES, NEW_QKV) if new else (OLD_NAMES, OLD_QKV)
    parts = {"norm1": "layernorm_before", "norm2": "layernorm_after", "attn.proj": names["o_proj"]}
    parts |= {"mlp.fc1": names["fc1"], "mlp.fc2": names["fc2"]}
    return [
        Row(f"{source}patch_embed.proj.{{}}", f"{target}embeddings.patch_embeddings.projection.{{}}"),
        Row(f"{source}patch_embed.norm.{{}}", f"{target}embeddings.norm.{{}}"),
        Row(f"{source}absolute_pos_embed", f"{target}embeddings.position_embeddings", optional=True),
        *(Row(f"{block}.{theirs}.{{}}", f"{layer}.{ours}.{{}}") for theirs, ours in parts.items()),
        *(Row(f"{block}.{name}", None, optional=True) for name in COMPUTED),
        *(v2_attention(block, layer) if model_type == "swinv2" else v1_attention(block, layer, qkv, new=new)),
        Row(
            f"{source}layers.{{}}.downsample.{{...}}", f"{target}encoder.layers.{{}}.downsample.{{...}}", optional=True
        ),
        *([] if layout == "detection" else [Row(f"{source}norm.{{}}", f"{target}layernorm.{{}}")]),
    ]


def v1_attention(block: str, layer: str, qkv: tuple[str, ...], *, new: bool) -> list[Row]:
    place = "attention.relative_position_bias" if new else "attention.self"
    table = "relative_position_bias_table"
    return [
        Row(f"{block}.attn.qkv.{{}}", tuple(f"{layer}.{part}.{{}}" for part in qkv), split(3)),
        Row(f"{block}.attn.{table}", f"{layer}.{place}.{table}"),
    ]


def v2_attention(block: str, layer: str) -> list[Row]:
    mlp = "continuous_position_bias_mlp"
    return [
        Row(f"{block}.attn.qkv.weight", tuple(f"{layer}.{part}.weight" for part in OLD_QKV), split(3)),
        Row(f"{block}.attn.q_bias", f"{layer}.attention.self.query.bias"),
        Row(f"{block}.attn.v_bias", f"{layer}.attention.self.value.bias"),
        # Zeros, which timm stores in some files.
        Row(f"{block}.attn.k_bias", None, optional=True),
        Row(f"{block}.attn.logit_scale", f"{layer}.attention.self.logit_scale"),
        Row(f"{block}.attn.cpb_mlp.{{}}.{{}}", f"{layer}.attention.self.{mlp}.{{}}.{{}}"),
    ]


def timm_rows(model_type: str, source: str = "", target: str = "") -> list[Row]:
    """Return the rows of timm's tower, which merges patches at the beginning of a stage."""
    block, layer = f"{source}layers.{{}}.blocks.{{}}", f"{target}stages.{{}}.layers.{{}}"
    names = {"norm1": "attention_norm", "attn.proj": "attention.out_proj", "norm2": "mlp_norm"}
    names |= {part: part for part in ("mlp.fc1", "mlp.fc2")}
    version2 = model_type == "hfvlm_clip_swin_v2"
    qkv = tuple(f"{layer}.attention.{part}_proj.{'weight' if version2 else '{}'}" for part in "qkv")
    attention = {f"{part}_bias": f"{part}_proj.bias" for part in "qv"} | {"logit_scale": "scale"}
    return [
        Row(f"{source}patch_embed.proj.{{}}", f"{target}patches.{{}}"),
        Row(f"{source}patch_embed.norm.{{}}", f"{target}patch_norm.{{}}"),
        *(Row(f"{block}.{theirs}.{{}}", f"{layer}.{ours}.{{}}") for theirs, ours in names.items()),
        *(Row(f"{block}.{name}", None, optional=True) for name in COMPUTED),
        Row(f"{block}.attn.qkv.{'weight' if version2 else '{}'}", qkv, split(3)),
        *(
            [
                *(Row(f"{block}.attn.{theirs}", f"{layer}.attention.{ours}") for theirs, ours in attention.items()),
                # Zeros.
                Row(f"{block}.attn.k_bias", None, optional=True),
                Row(f"{block}.attn.cpb_mlp.{{}}.{{}}", f"{layer}.attention.position_mlp.{{}}.{{}}"),
            ]
            if version2
            else [Row(f"{block}.attn.relative_position_bias_table", f"{layer}.attention.table")]
        ),
        Row(f"{source}layers.{{}}.downsample.{{}}.{{}}", f"{target}stages.{{}}.merging.{{}}.{{}}", optional=True),
        Row(f"{source}norm.{{}}", f"{target}post_norm.{{}}"),
    ]


def keys_for(config: PreTrainedConfig, layout: str = "microsoft", keys: Iterable[str] = ()) -> list[Row]:
    """Return the rows for a file of `layout`: "microsoft", "detection" or "timm"."""
    kind = config.model_type
    if layout == "timm":
        return [*timm_rows(kind), Row("head.fc.{}", "projection.{}", optional=True)]
    if layout == "detection":
        norm = "hidden_states_norms.stage"
        norms = [Row(f"norm{i}.{{}}", f"{norm}{i + 1}.{{}}", optional=True) for i in range(MOST_STAGES)]
        return [*swin_rows(kind, layout, "", "swin." if RENAMED else ""), *norms]
    prefix = f"{kind}." if is_classifier(config) else ""
    classifier = Row("head.{}", "classifier.{}" if prefix else None, optional=not prefix)
    return [*swin_rows(kind, layout, "", prefix), classifier]


MOST_STAGES = 8


def is_classifier(config: PreTrainedConfig) -> bool:
    return any(name.endswith("ForImageClassification") for name in config.architectures or ())


def layout_of(original: Mapping[str, Any]) -> str:
    """Tell by the names of the authors' code: detection's constructor has `pretrain_img_size`, and timm's config.json
    a `pretrained_cfg`."""
    if "pretrain_img_size" in original_config(original):
        return "detection"
    repository = str((original.get("source") or {}).get("repository"))
    timm = repository.endswith("pytorch-image-models") or "pretrained_cfg" in original
    return "timm" if timm else "microsoft"


def config_from_original(original: Mapping[str, Any], state_dict: Mapping[str, Tensor]) -> PreTrainedConfig:
    """Read the authors' constructor arguments; of files for images of one size none are needed but
    `pretrained_window_sizes`."""
    options = original_config(original)
    check_options("Swin's constructor", options, OPTIONS)
    shapes = {key: tensor.shape for key, tensor in state_dict.items()}
    layout = layout_of(original)
    if layout == "timm":
        head = shapes.get("head.fc.weight", (None,))
        return timm_config(options, shapes, projection_dim=head[0], projection_bias=True)
    fields = swin_config(options, shapes)
    name = "Swinv2" if fields["model_type"] == "swinv2" else "Swin"
    kind = "Backbone" if layout == "detection" else "ForImageClassification" if "head.weight" in shapes else "Model"
    if "head.weight" in shapes:
        fields["num_labels"] = shapes["head.weight"][0]
    if layout == "detection":
        indices = options.get("out_indices", range(len(fields["depths"])))
        fields["out_features"] = [f"stage{i + 1}" for i in indices]
    return CONFIG_MAPPING[fields.pop("model_type")](**fields, architectures=[f"{name}{kind}"])


def timm_config(options: Mapping[str, Any], shapes: Mapping[str, Any], **fields: Any) -> HfvlmCLIPSwinConfig:
    """Return the configuration of timm's tower whose tensors have these shapes."""
    fields |= {name: value for name, value in swin_config(options, shapes).items() if name in TIMM_FIELDS}
    if f"{FIRST}.attn.logit_scale" not in shapes:
        return HfvlmCLIPSwinConfig(**fields)
    windows = list(options.get("pretrained_window_sizes") or [0] * len(fields["depths"]))
    return HfvlmCLIPSwinV2Config(**fields, pretrained_windows=windows)


FIRST = "layers.0.blocks.0"
TIMM_FIELDS = (
    *("image_size", "patch_size", "num_channels", "embed_dim", "depths", "num_heads", "window_size", "mlp_ratio"),
    "layer_norm_eps",
)


def swin_config(options: Mapping[str, Any], shapes: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of a Swin or Swin-V2 whose tensors have these shapes."""
    first, stages = FIRST, range(count_layers(shapes, "layers."))
    version2 = f"{first}.attn.logit_scale" in shapes
    width, channels, patch, _ = shapes["patch_embed.proj.weight"]
    heads = "cpb_mlp.2.weight" if version2 else "relative_position_bias_table"
    window = options.get("window_size") or window_of(shapes, first)
    fields = {
        "model_type": "swinv2" if version2 else "swin",
        "image_size": options.get("img_size", options.get("pretrain_img_size"))
        or image_size_of(shapes, window, patch),
        "patch_size": patch,
        "num_channels": channels,
        "embed_dim": width,
        "depths": [count_layers(shapes, f"layers.{stage}.blocks.") for stage in stages],
        "num_heads": [shapes[f"layers.{stage}.blocks.0.attn.{heads}"][0 if version2 else 1] for stage in stages],
        "window_size": window,
        "mlp_ratio": shapes[f"{first}.mlp.fc1.weight"][0] / width,
        "use_absolute_embeddings": "absolute_pos_embed" in shapes,
        "drop_path_rate": options.get("drop_path_rate", 0.1),
        "layer_norm_eps": 1e-5,
    }
    if version2:
        fields["pretrained_window_sizes"] = list(options.get("pretrained_window_sizes") or [0] * len(stages))
    return fields


def window_of(shapes: Mapping[str, Any], first: str) -> int:
    """Return the window's edge, by the table of relative positions in its first block."""
    if f"{first}.attn.relative_coords_table" in shapes:
        return (shapes[f"{first}.attn.relative_coords_table"][1] + 1) // 2
    return (isqrt(shapes[f"{first}.attn.relative_position_bias_table"][0]) + 1) // 2


def image_size_of(shapes: Mapping[str, Any], window: int, patch: int) -> int:
    """Return the edge of square images, by the masks of the first stage's windows; 224 without any."""
    mask = shapes.get("layers.0.blocks.1.attn_mask")
    return 224 if mask is None else isqrt(mask[0]) * window * patch


def fresh_parameters(config: Any, layout: str, keys: Iterable[str], expected: Iterable[str]) -> list[str]:
    """Return the buffers of old versions of transformers that a file need not have, and a backbone's unused norm."""
    unused = (
        ".relative_position_index",
        *(("swin.layernorm.weight", "swin.layernorm.bias") * (layout == "detection")),
    )
    return [key for key in expected if key.endswith(unused)]


def image_processor_for(config: Any, settings: Mapping[str, Any]) -> Any:
    """Return the processor of the authors' evaluation: the short edge an eighth longer than the crop, bicubic."""
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    size = config.image_size if isinstance(config.image_size, int) else max(config.image_size)
    fields = {
        "size": {"shortest_edge": size * 256 // 224},
        "crop_size": {"height": size, "width": size},
        "resample": 3,
        "image_mean": [0.485, 0.456, 0.406],
        "image_std": [0.229, 0.224, 0.225],
    }
    return CLIPImageProcessorPil(**fields | settings.get("image_processor", {}))


CONVERSION = Conversion(
    config_from_original=config_from_original,
    keys_for=keys_for,
    layout_of=layout_of,
    image_processor_for=image_processor_for,
    processor_for=always(None),
    vocabularies_for=always([]),
    fresh_parameters=fresh_parameters,
)
