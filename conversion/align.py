"""ALIGN's released files: Kakao Brain's TensorFlow checkpoint, by its variables' names, and transformers' folders.

Source: https://github.com/kakaobrain/coyo-align at 8cea82e. Google released no weights.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from hfvlm.checkpoints.conversion import Conversion, always
from hfvlm.checkpoints.key_table import Change, Row, permute, reshape, scalar, transpose
from hfvlm.checkpoints.originals import UnsupportedOriginalError, count_layers
from hfvlm.conversion.interop import align as interop
from hfvlm.conversion.processors import paired
from hfvlm.models.align.configuration_align import (
    HfvlmALIGNConfig,
    HfvlmALIGNTextConfig,
    HfvlmALIGNVisionConfig,
)
from hfvlm.models.align.processing_align import HfvlmALIGNImageProcessor, HfvlmALIGNProcessor, HfvlmALIGNTokenizer

VOCABULARIES = ("vocab.txt", "tokenizer.json")
# Width and depth of EfficientNet-B0 to B7 (https://arxiv.org/abs/1905.11946), as multiples of B0's.
EFFICIENTNETS = {
    "efficientnet-b0": (1.0, 1.0),
    "efficientnet-b1": (1.0, 1.1),
    "efficientnet-b2": (1.1, 1.2),
    "efficientnet-b3": (1.2, 1.4),
    "efficientnet-b4": (1.4, 1.8),
    "efficientnet-b5": (1.6, 2.2),
    "efficientnet-b6": (1.8, 2.6),
    "efficientnet-b7": (2.0, 3.1),
}
# TensorFlow's kernels are (height, width, in, out), or (height, width, channels, 1) where each channel is by itself.
convolution, depthwise = permute(3, 2, 0, 1), permute(2, 3, 0, 1)
# One value a channel: (C,), or (1, 1, 1, 1, C) since the original's batch norms see a batch in parts.
channels = reshape(-1)
# Our squeeze-and-excitation is linear on the mean, the original's is convolutions on a map of one pixel.
kernel_to_linear = Change(lambda kernel: kernel[0, 0].t(), lambda weight: weight.t()[None, None])


def layout_of(original: Mapping[str, Any]) -> str:
    return "transformers" if original.get("model_type") == "align" else "tensorflow"


def keys_for(config: HfvlmALIGNConfig, layout: str = "tensorflow", keys: Iterable[str] = ()) -> list[Row]:
    """Return the rows for a file of `layout`: "tensorflow" or "transformers"."""
    return interop.rows(config) if layout == "transformers" else tensorflow_rows(config, set(keys))


def tensorflow_rows(config: HfvlmALIGNConfig, keys: set[str]) -> list[Row]:
    *image, text = dense_layers(keys)
    return [
        Row("{...}.OPTIMIZER_SLOT{...}", None, optional=True),
        Row("optimizer/{...}", None, optional=True),
        Row("save_counter{...}", None, optional=True),
        # Running means of the loss, for the progress bar.
        Row("{}_tracker/{}/.ATTRIBUTES/VARIABLE_VALUE", None, optional=True),
        # The original's code gives it no name; the release, which is older, has one.
        *(Row(name, "logit_scale.scale", scalar, optional=True) for name in ("Variable", "temperature")),
        *conv_norm("stem_conv/kernel", "stem_bn", "stem", convolution),
        *(row for i, name in enumerate(block_names(config.vision_config)) for row in block(config, i, name)),
        *(row for name in image for row in dense(name, "vision_model.projection")),
        *bert(bert_name(keys)),
        *dense(text, "text_model.projection"),
    ]


def dense_layers(keys: Iterable[str]) -> list[str]:
    """Name the dense layers, which Keras numbers in the order of their making: the image projection, if any, then the
    text's."""
    names = {key.split("/")[0] for key in keys if re.fullmatch(r"dense(_\d+)?/kernel", key)}
    return sorted(names, key=lambda name: (len(name), name)) or ["dense"]


def bert_name(keys: Iterable[str]) -> str:
    """Name the BERT, which Keras numbers too, if it is not the first that a program makes."""
    return next((key.split("/")[0] for key in keys if "/bert/" in key), "tf_bert_model")


def block_names(config: HfvlmALIGNVisionConfig) -> list[str]:
    """Name the blocks: a number for the stage, a letter for the block in it."""
    return [f"block{i + 1}{chr(ord('a') + j)}" for i, depth in enumerate(config.stage_depths) for j in range(depth)]


def block(config: HfvlmALIGNConfig, index: int, name: str) -> list[Row]:
    target, sizes = f"layers.{index}", config.vision_config.blocks[index]
    expand = conv_norm(f"{name}_expand_conv/kernel", f"{name}_expand_bn", f"{target}.expand", convolution)
    excite = f"vision_model.{target}.excite"
    return [
        *(expand if sizes.expand_ratio > 1 else []),
        *conv_norm(f"{name}_dwconv/depthwise_kernel", f"{name}_bn", f"{target}.depthwise", depthwise),
        Row(f"{name}_se_reduce/kernel", f"{excite}.fc1.weight", kernel_to_linear),
        Row(f"{name}_se_reduce/bias", f"{excite}.fc1.bias"),
        Row(f"{name}_se_expand/kernel", f"{excite}.fc2.weight", kernel_to_linear),
        Row(f"{name}_se_expand/bias", f"{excite}.fc2.bias"),
        *conv_norm(f"{name}_project_conv/kernel", f"{name}_project_bn", f"{target}.project", convolution),
    ]


def conv_norm(kernel: str, norm: str, target: str, change: Change) -> list[Row]:
    ours = f"vision_model.{target}.norm"
    return [
        Row(kernel, f"vision_model.{target}.conv.weight", change),
        Row(f"{norm}/gamma", f"{ours}.weight", channels),
        Row(f"{norm}/beta", f"{ours}.bias", channels),
        Row(f"{norm}/moving_mean", f"{ours}.running_mean", channels),
        Row(f"{norm}/moving_variance", f"{ours}.running_var", channels),
    ]


def bert(prefix: str) -> list[Row]:
    source, target = f"{prefix}/bert/encoder/layer_._{{}}", "text_model.layers.{}"
    table, ours = f"{prefix}/bert/embeddings", "text_model.embeddings"
    return [
        Row(f"{table}/word_embeddings/weight", f"{ours}.token.weight"),
        Row(f"{table}/position_embeddings/embeddings", f"{ours}.position"),
        Row(f"{table}/token_type_embeddings/embeddings", f"{ours}.token_type.weight"),
        *norm(f"{table}/LayerNorm", f"{ours}.norm"),
        *(
            row
            for theirs, part in (("query", "q"), ("key", "k"), ("value", "v"))
            for row in dense(f"{source}/attention/self/{theirs}", f"{target}.attention.{part}_proj")
        ),
        *dense(f"{source}/attention/output/dense", f"{target}.attention.out_proj"),
        *norm(f"{source}/attention/output/LayerNorm", f"{target}.attention_norm"),
        *dense(f"{source}/intermediate/dense", f"{target}.mlp.fc1"),
        *dense(f"{source}/output/dense", f"{target}.mlp.fc2"),
        *norm(f"{source}/output/LayerNorm", f"{target}.mlp_norm"),
        # BERT's pooler is made but never read, nor trained.
        Row(f"{prefix}/bert/pooler/dense/{{}}", None, optional=True),
    ]


def dense(source: str, target: str) -> list[Row]:
    return [Row(f"{source}/kernel", f"{target}.weight", transpose), Row(f"{source}/bias", f"{target}.bias")]


def norm(source: str, target: str) -> list[Row]:
    return [Row(f"{source}/gamma", f"{target}.weight"), Row(f"{source}/beta", f"{target}.bias")]


def config_from_original(original: Mapping[str, Any], state_dict: Mapping[str, Tensor]) -> HfvlmALIGNConfig:
    """Read the constructor's arguments, or none: the shapes define the EfficientNet; or transformers'
    config.json."""
    if original.get("model_type") == "align":
        return interop.config_from_transformers(original)
    arguments = original.get("arguments", original)
    shapes = {key: tensor.shape for key, tensor in state_dict.items()}
    *image, text = dense_layers(shapes)
    prefix = bert_name(shapes)
    table = f"{prefix}/bert/embeddings"
    vocabulary, width = shapes[f"{table}/word_embeddings/weight"]
    layers = count_layers((key.replace("/", ".") for key in shapes), f"{prefix}.bert.encoder.layer_._")
    return HfvlmALIGNConfig(
        vision_config=_efficientnet(arguments, shapes, shapes[f"{image[0]}/kernel"][1] if image else None),
        text_config=HfvlmALIGNTextConfig(
            vocab_size=vocabulary,
            hidden_size=width,
            num_hidden_layers=layers,
            num_attention_heads=arguments.get("bert_config", {}).get("num_attention_heads", width // 64),
            intermediate_size=shapes[f"{prefix}/bert/encoder/layer_._0/intermediate/dense/bias"][0],
            max_position_embeddings=shapes[f"{table}/position_embeddings/embeddings"][0],
            projection_dim=shapes[f"{text}/kernel"][1],
        ),
    )


def _efficientnet(
    arguments: Mapping[str, Any], shapes: Mapping[str, Any], projection_dim: int | None
) -> HfvlmALIGNVisionConfig:
    """Return the EfficientNet that was named or, if none was, the one of those sizes."""
    own = arguments.get("efficientnet")
    if own is not None:
        return _own_efficientnet(own, projection_dim)
    named = str(arguments.get("img_encoder_name", "")).lower()
    for name, (width, depth) in EFFICIENTNETS.items():
        config = HfvlmALIGNVisionConfig(
            width_coefficient=width, depth_coefficient=depth, projection_dim=projection_dim
        )
        if name == named or (not named and _has_sizes(shapes, config)):
            return config
    raise UnsupportedOriginalError(
        f"The image encoder {named or 'in the file'} is none of {', '.join(EFFICIENTNETS)}."
    )


def _has_sizes(shapes: Mapping[str, Any], config: HfvlmALIGNVisionConfig) -> bool:
    kernels = [shapes.get(f"{name}_project_conv/kernel") for name in block_names(config)]
    count = sum(key.endswith("_project_conv/kernel") for key in shapes)
    return count == len(kernels) and all(
        kernel is not None and kernel[-1] == sizes.out_channels
        for kernel, sizes in zip(kernels, config.blocks, strict=True)
    )


def _own_efficientnet(own: Mapping[str, Any], projection_dim: int | None) -> HfvlmALIGNVisionConfig:
    stages = own["blocks_args"]
    interop.check_chain([stage["filters_in"] for stage in stages], [stage["filters_out"] for stage in stages])
    ratios = {stage["se_ratio"] for stage in stages}
    if len(ratios) > 1 or not all(stage["id_skip"] for stage in stages):
        raise UnsupportedOriginalError("hfvlm's blocks all have shortcuts and the same se_ratio.")
    return HfvlmALIGNVisionConfig(
        width_coefficient=own["width_coefficient"],
        depth_coefficient=own["depth_coefficient"],
        depth_divisor=own["depth_divisor"],
        kernel_sizes=[stage["kernel_size"] for stage in stages],
        out_channels=[stage["filters_out"] for stage in stages],
        strides=[stage["strides"] for stage in stages],
        num_block_repeats=[stage["repeats"] for stage in stages],
        expand_ratios=[stage["expand_ratio"] for stage in stages],
        squeeze_ratio=ratios.pop(),
        projection_dim=projection_dim,
    )


def settings_from_original(original: Mapping[str, Any], preprocessing: Mapping[str, Any]) -> dict[str, Any]:
    """Return the processor's settings, from transformers' preprocessor_config.json; its antialiasing is not taken
    over."""
    settings = preprocessing.get("image_processor", preprocessing)
    pixels: dict[str, Any] = {}
    if "crop_size" in settings:
        pixels["size"] = settings["crop_size"]
    if "size" in settings:
        pixels["resized"] = settings["size"]["height"]
    return {"image_processor": pixels}


def image_processor_for(config: HfvlmALIGNConfig, settings: Mapping[str, Any]) -> HfvlmALIGNImageProcessor:
    return HfvlmALIGNImageProcessor(**settings.get("image_processor", {}))


processor_for = paired(HfvlmALIGNProcessor, image_processor_for, HfvlmALIGNTokenizer, longest=64)
CONVERSION = Conversion(
    config_from_original=config_from_original,
    keys_for=keys_for,
    layout_of=layout_of,
    settings_from_original=settings_from_original,
    image_processor_for=image_processor_for,
    processor_for=processor_for,
    vocabularies_for=always([VOCABULARIES]),
    export=interop.EXPORT,
)
