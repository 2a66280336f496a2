"""Swin and Swin-V2, whose originals differ at sizes that are not made of whole windows."""

import re

import torch

from hfvlm.conversion.swin import config_from_original, layout_of
from tests.originals.common import converted
from tests.support.golden import Golden, Recorder

OPTIONS = (
    *("img_size", "pretrain_img_size", "patch_size", "num_classes", "embed_dim", "depths", "num_heads"),
    *("window_size", "drop_path_rate", "out_indices", "pretrained_window_sizes", "ape", "mlp_ratio", "qkv_bias"),
)


def compare(golden: Golden) -> None:
    golden.check(constructor=OPTIONS)
    layout = layout_of(golden.case)
    config = config_from_original(golden.case, golden.state_dict)
    model = converted("swin", golden.state_dict, config, layout)
    trunk = model if layout == "timm" else getattr(model, model.base_model_prefix, model)
    place = timm_path if layout == "timm" else module_path
    paths = {name: path for name in golden.in_order() if (path := place(name, config.depths))}
    with torch.no_grad(), Recorder(trunk, sorted(set(paths.values()))) as seen:
        output = model(golden.inputs["image"])
    values = {name: tokens_of(seen[path]) for name, path in paths.items()}
    if layout == "detection":
        values |= {f"map{i}": feature for i, feature in enumerate(output.feature_maps)}
    else:
        values["pooled"] = values["norm"].mean(dim=1)
        values["logits"] = output.embeds if layout == "timm" else output.logits
    for name in golden.in_order():
        golden.compare(name, values[name])


def tokens_of(value) -> torch.Tensor:
    """The tokens in what a module returns, (B, N, D)."""
    x = value[0] if isinstance(value, tuple) else value
    return x.flatten(1, 2) if x.ndim == 4 else x


def numbers(name: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", name)]


def module_path(name: str, depths: list[int]) -> str | None:
    """Where an intermediate of the original is in the trunk; a stage's last block is its output before merging."""
    if name.startswith("stage"):
        stage, block = [*numbers(name), depths[numbers(name)[0]] - 1][:2]
        return f"encoder.layers.{stage}.blocks.{block}"
    if name.startswith("merged"):
        return f"encoder.layers.{numbers(name)[0]}.downsample"
    return {"patch_embeddings": "embeddings", "norm": "layernorm"}.get(name)


def timm_path(name: str, depths: list[int]) -> str | None:
    """Where it is in hfvlm's tower, which merges at the beginning of a stage."""
    if name.startswith("stage"):
        stage, block = [*numbers(name), depths[numbers(name)[0]] - 1][:2]
        return f"stages.{stage}.layers.{block}"
    if name.startswith("merged"):
        return f"stages.{numbers(name)[0] + 1}.merging"
    return {"patch_embeddings": "patch_norm", "norm": "post_norm"}.get(name)
