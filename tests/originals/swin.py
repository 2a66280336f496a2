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
    trunk = getattr(model, model.base_model_prefix, model)
    image = golden.inputs["image"]
    paths = {name: path for name in golden.in_order() if (path := module_path(name))}
    with torch.no_grad(), Recorder(trunk, sorted({path.removesuffix(":input") for path in paths.values()})) as seen:
        output = model(image)
    values = {name: tokens_of(seen[path]) for name, path in paths.items()}
    if layout == "detection":
        values |= {f"map{i}": feature for i, feature in enumerate(output.feature_maps)}
    else:
        values |= {"logits": output.logits, "pooled": values["norm"].mean(dim=1)}
    for name in golden.in_order():
        golden.compare(name, values[name])


def tokens_of(value) -> torch.Tensor:
    """The tokens in what a module takes or returns."""
    return value[0] if isinstance(value, tuple) else value


def module_path(name: str) -> str | None:
    """Where an intermediate of the original is in the trunk; a stage's last block is its output before merging."""
    if found := re.fullmatch(r"stage(\d+)\.block(\d+)", name):
        return f"encoder.layers.{found[1]}.blocks.{found[2]}"
    if found := re.fullmatch(r"(stage|merged)(\d+)", name):
        return f"encoder.layers.{found[2]}." + ("blocks.1" if found[1] == "stage" else "downsample")
    return {"patch_embeddings": "embeddings", "norm": "layernorm"}.get(name)
