"""The vision towers that open_clip takes from timm, those that hfvlm writes out and all others: rows and sizes.

Source: timm 1.0.31, timm/models/eva.py and vision_transformer.py; open_clip at 89fb801, src/open_clip/timm_model.py.
"""

from collections.abc import Mapping
from math import isqrt
from typing import Any, NamedTuple

from torch import Tensor

from hfvlm.checkpoints.key_table import Row, flat, split, unbatched
from hfvlm.checkpoints.originals import UnsupportedOriginalError, check_options, count_layers
from hfvlm.configuration import HfvlmConfig
from hfvlm.conversion.blocks import timm_layers, timm_pool
from hfvlm.conversion.transformers_towers import HEADS, head_of
from hfvlm.modeling.timm_trunks import HfvlmTimmTrunkConfig
from hfvlm.models.clip.towers.configuration_timm import (
    HfvlmCLIPEVA02Config,
    HfvlmCLIPEVAConfig,
    HfvlmCLIPEVAPostNormConfig,
    HfvlmCLIPPEConfig,
    HfvlmCLIPPEGiganticConfig,
    HfvlmCLIPViTConfig,
    TimmVisionConfig,
)


class TimmName(NamedTuple):
    """What timm's name of a trunk defines and no shape shows.

    Args:
        config: class of our configuration.
        heads: of each layer.
        reference: edge of the grid that rotary coordinates are scaled to.
    """

    config: type[TimmVisionConfig]
    heads: int
    reference: int | None = None

    @property
    def pool(self) -> str:
        """How open_clip's configuration calls the pooling."""
        return "map" if issubclass(self.config, HfvlmCLIPPEConfig) else "token"


# By the beginning of timm's name, the first that fits.
TOWERS = {
    "vit_pe_core_tiny_": TimmName(HfvlmCLIPPEConfig, 3, 24),
    "vit_pe_core_small_": TimmName(HfvlmCLIPPEConfig, 6, 24),
    "vit_pe_core_base_": TimmName(HfvlmCLIPPEConfig, 12, 14),
    "vit_pe_core_large_": TimmName(HfvlmCLIPPEConfig, 16, 24),
    "vit_pe_core_gigantic_": TimmName(HfvlmCLIPPEGiganticConfig, 16, 32),
    "eva_giant_": TimmName(HfvlmCLIPEVAConfig, 16),
    "eva02_enormous_": TimmName(HfvlmCLIPEVAPostNormConfig, 16),
    "eva02_base_patch16_clip_": TimmName(HfvlmCLIPEVA02Config, 12, 16),
    "eva02_large_patch14_clip_": TimmName(HfvlmCLIPEVA02Config, 16, 16),
    "vit_base_patch32_clip_": TimmName(HfvlmCLIPViTConfig, 12),
    "vit_base_patch16_clip_": TimmName(HfvlmCLIPViTConfig, 12),
    "vit_large_patch14_clip_": TimmName(HfvlmCLIPViTConfig, 16),
    "vit_huge_patch14_clip_": TimmName(HfvlmCLIPViTConfig, 16),
    "vit_giant_patch14_clip_": TimmName(HfvlmCLIPViTConfig, 16),
    "vit_gigantic_patch14_clip_": TimmName(HfvlmCLIPViTConfig, 16),
}
# Of open_clip's vision_cfg and its timm_model_kwargs. Most sizes are what the shapes say.
OPTIONS = (
    *("image_size", "timm_model_name", "timm_model_pretrained", "timm_pool", "timm_proj", "timm_model_kwargs"),
    *("timm_drop_path", "patch_dropout"),
)
# Modules of timm's models before their heads.
PARTS = (
    *("stem", "stages", "final_conv", "patch_embed", "blocks", "layers", "norm_pre", "norm", "fc_norm", "attn_pool"),
    "head.norm",
)
ARGUMENTS = ("img_size", "patch_size", "embed_dim", "depth", "num_heads", "mlp_ratio", "ref_feat_shape")


def tower_of(name: str) -> TimmName | None:
    """Return what timm's name of a trunk defines, or None where hfvlm does not write it out."""
    return next((trunk for beginning, trunk in TOWERS.items() if name.startswith(beginning)), None)


def timm_config(vision: Mapping[str, Any], state_dict: Mapping[str, Tensor]) -> HfvlmConfig:
    """Read open_clip's `vision_cfg` and the tensors of the trunk that it names.

    Raises:
        UnsupportedOriginalError: it has an option that hfvlm's tower does not have.
    """
    check_options("open_clip's vision_cfg", vision, OPTIONS)
    trunk = tower_of(str(vision["timm_model_name"]))
    if trunk is None or not is_written(trunk, vision):
        return wrapped_config(vision, state_dict)
    return written_config(trunk, vision, state_dict)


def is_written(trunk: TimmName, vision: Mapping[str, Any]) -> bool:
    """Whether hfvlm writes a trunk out as `vision_cfg` has it: pooled as in the releases, with its own head for the
    projection, and nothing changed but sizes."""
    own_head = vision.get("timm_proj") is None and vision.get("timm_pool", trunk.pool) == trunk.pool
    return own_head and set(vision.get("timm_model_kwargs") or {}) <= set(ARGUMENTS)


def wrapped_config(vision: Mapping[str, Any], state_dict: Mapping[str, Tensor]) -> HfvlmTimmTrunkConfig:
    """Read a trunk that timm itself runs.

    Raises:
        UnsupportedOriginalError: it has no projection.
    """
    rates = {"drop_path_rate": vision.get("timm_drop_path"), "patch_drop_rate": vision.get("patch_dropout")}
    arguments = dict(vision.get("timm_model_kwargs") or {})
    arguments |= {name: rate for name, rate in rates.items() if rate}
    if vision.get("timm_pool"):
        arguments["global_pool"] = vision["timm_pool"]
    shapes = {key.removeprefix("visual."): tensor.shape for key, tensor in state_dict.items()}
    first = next((name for name in (*HEADS, "head.mlp.fc1") if f"{name}.weight" in shapes), None)
    if first is None:
        raise UnsupportedOriginalError(
            f"open_clip's vision_cfg: {vision['timm_model_name']} with timm_proj {vision.get('timm_proj')!r} has no "
            "projection into the joint space."
        )
    return HfvlmTimmTrunkConfig(
        architecture=vision["timm_model_name"],
        model_args=arguments or None,
        image_size=vision.get("image_size") or 224,
        hidden_size=shapes[f"{first}.weight"][1],
        **head_of(shapes),
    )


def written_config(trunk: TimmName, vision: Mapping[str, Any], state_dict: Mapping[str, Tensor]) -> TimmVisionConfig:
    """Read a trunk that hfvlm writes out."""
    name, arguments = vision["timm_model_name"], vision.get("timm_model_kwargs") or {}
    shapes = {key.removeprefix("visual.trunk."): tensor.shape for key, tensor in state_dict.items()}
    projection_dim, width = shapes["head.weight"]
    _, channels, patch, _ = shapes["patch_embed.proj.weight"]
    grid = isqrt(shapes["pos_embed"][1])
    sizes = {
        "image_size": vision.get("image_size") or patch * grid,
        "patch_size": patch,
        "num_channels": channels,
        "hidden_size": width,
        "intermediate_size": _inner(shapes, "blocks.0.mlp"),
        "num_hidden_layers": count_layers(shapes, "blocks."),
        "num_attention_heads": arguments.get("num_heads", trunk.heads),
        "hidden_act": "quick_gelu" if "_quickgelu_" in name else "gelu",
        "projection_dim": projection_dim,
        "drop_path_rate": vision.get("timm_drop_path") or 0.0,
        "patch_dropout": vision.get("patch_dropout") or 0.0,
    }
    if trunk.reference:
        sizes["reference_grid_size"] = _edge(arguments.get("ref_feat_shape", trunk.reference))
    if trunk.pool == "map":
        sizes["pool_intermediate_size"] = _inner(shapes, "attn_pool.mlp")
    return trunk.config(**sizes)


def _inner(shapes: Mapping[str, Any], mlp: str) -> int:
    return next(shape[1] for key, shape in shapes.items() if key == f"{mlp}.fc2.weight")


def _edge(grid: Any) -> int:
    edges = {grid} if isinstance(grid, int) else set(grid)
    if len(edges) > 1:
        raise UnsupportedOriginalError(f"open_clip's timm_model_kwargs: ref_feat_shape {grid} is not square.")
    return edges.pop()


def wrapped_rows(config: HfvlmTimmTrunkConfig) -> list[Row]:
    """Return the rows of a trunk that timm itself runs: whatever it has, with its head or what follows it for the
    projection."""
    source, target = "visual.trunk", "vision_model.trunk.timm_model"
    layers = dict.fromkeys(HEADS, "") | {"head.mlp.fc1": ".fc1", "head.mlp.fc2": ".fc2"}
    return [
        *(Row(f"{source}.{part}.{{...}}", f"{target}.{part}.{{...}}", optional=True) for part in PARTS),
        Row(f"{source}.{{}}", f"{target}.{{}}", optional=True),
        *(
            Row(f"visual.{name}.{{}}", f"vision_model.projection{ours}.{{}}", optional=True)
            for name, ours in layers.items()
        ),
    ]


def timm_rows(config: TimmVisionConfig, source: str = "visual.trunk", target: str = "vision_model") -> list[Row]:
    """Return the rows of a tower of timm's."""
    layers = (f"{source}.blocks", f"{target}.layers")
    patches = [
        Row(f"{source}.patch_embed.proj.{{}}", f"{target}.patches.projection.{{}}"),
        Row(f"{source}.pos_embed", f"{target}.position", unbatched),
    ]
    class_token = Row(f"{source}.cls_token", f"{target}.class_token", flat)
    pre_norm = Row(f"{source}.norm_pre.{{}}", f"{target}.pre_norm.{{}}")
    head = [
        Row(f"{source}.norm.{{}}", f"{target}.post_norm.{{}}"),
        Row(f"{source}.head.{{}}", f"{target}.projection.{{}}"),
    ]
    pool = timm_pool(f"{source}.attn_pool", f"{target}.pool")
    inner = {
        "hfvlm_clip_vit": [class_token, pre_norm, *timm_layers(*layers)],
        "hfvlm_clip_eva": [class_token, *eva_layers(*layers)],
        "hfvlm_clip_eva_post_norm": [class_token, *eva_layers(*layers)],
        "hfvlm_clip_eva02": [class_token, *eva02_layers(*layers)],
        "hfvlm_clip_pe": [class_token, pre_norm, *timm_layers(*layers), *pool],
        "hfvlm_clip_pe_gigantic": [pre_norm, *timm_layers(*layers), *pool],
    }
    return [*patches, *inner[config.model_type], *head]


def eva_layers(source: str, target: str) -> list[Row]:
    """Return the rows of EVA-01's blocks, which EVA-02-E's share: one matrix, and biases of queries and values."""
    qkv = tuple(f"{target}.{{}}.attention.{part}_proj.weight" for part in "qkv")
    return [
        *(row for row in timm_layers(source, target) if ".qkv." not in row.source),
        Row(f"{source}.{{}}.attn.qkv.weight", qkv, split(3)),
        *(Row(f"{source}.{{}}.attn.{part}_bias", f"{target}.{{}}.attention.{part}_proj.bias") for part in "qv"),
    ]


def eva02_layers(source: str, target: str) -> list[Row]:
    """Return the rows of EVA-02's blocks: separate queries, keys and values, SwiGLU, and norms in both branches."""
    block, layer = f"{source}.{{}}", f"{target}.{{}}"
    mlp = {"fc1_g": "gate", "fc1_x": "fc1", "norm": "norm", "fc2": "fc2"}
    return [
        Row(f"{block}.norm1.{{}}", f"{layer}.attention_norm.{{}}"),
        *(Row(f"{block}.attn.{part}_proj.{{}}", f"{layer}.attention.{part}_proj.{{}}") for part in "qkv"),
        Row(f"{block}.attn.norm.{{}}", f"{layer}.attention.norm.{{}}"),
        Row(f"{block}.attn.proj.{{}}", f"{layer}.attention.out_proj.{{}}"),
        Row(f"{block}.norm2.{{}}", f"{layer}.mlp_norm.{{}}"),
        *(Row(f"{block}.mlp.{theirs}.{{}}", f"{layer}.mlp.{ours}.{{}}") for theirs, ours in mlp.items()),
    ]
