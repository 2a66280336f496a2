"""FLAVA's released files, DALL-E's codebook, and transformers' folders.

Source: https://github.com/facebookresearch/multimodal at 3c2a85a, https://github.com/openai/DALL-E at 5be4b23.
"""

import re
from collections.abc import Iterable, Mapping
from itertools import product
from math import isqrt
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hfvlm.checkpoints.key_table import Change, Row, scalar
from hfvlm.conversion import UnsupportedOriginalError, check_options, count_layers
from hfvlm.models.flava.configuration_flava import (
    HfvlmFLAVACodebookConfig,
    HfvlmFLAVAConfig,
    HfvlmFLAVAMultimodalConfig,
    HfvlmFLAVATextConfig,
    HfvlmFLAVAVisionConfig,
)
from hfvlm.models.flava.processing_flava import HfvlmFLAVAImageProcessor, HfvlmFLAVAProcessor, HfvlmFLAVATokenizer

VOCABULARIES = ("vocab.txt", "tokenizer.json")
AnyConfig = HfvlmFLAVAConfig | HfvlmFLAVACodebookConfig
# transformers' classes; it has none for classification.
NATIVE = {"HfvlmFLAVAModel": "FlavaModel", "HfvlmFLAVAForPreTraining": "FlavaForPreTraining"}
# Our settings that transformers' image processor calls the same.
SAME_SETTINGS = (
    *("size", "resample", "image_mean", "image_std", "codebook_size", "codebook_resample", "input_size_patches"),
    *("total_mask_patches", "mask_group_min_patches", "mask_group_max_patches"),
    *("mask_group_min_aspect_ratio", "mask_group_max_aspect_ratio"),
)

# A leading axis or two for a batch of one.
table = Change(lambda tensor: tensor.squeeze(0), lambda tensor: tensor.unsqueeze(0))
token = Change(lambda tensor: tensor.flatten(), lambda tensor: tensor.reshape(1, 1, -1))


def layout_of(original: Mapping[str, Any]) -> str:
    return (
        "transformers" if original.get("model_type") == "flava" or is_native_codebook(original) else "torchmultimodal"
    )


def is_native_codebook(original: Mapping[str, Any]) -> bool:
    """By its class: early versions of transformers wrote no `model_type` for it."""
    return "FlavaImageCodebook" in (original.get("architectures") or ())


def keys_for(config: AnyConfig, layout: str = "torchmultimodal", keys: Iterable[str] = ()) -> list[Row]:
    """The rows for a file of `layout`, "torchmultimodal" or "transformers", for the class that `config` is for.

    OpenAI's file of the codebook has torchmultimodal's names, which are OpenAI's.
    """
    rows = transformers_rows if layout == "transformers" else torchmultimodal_rows
    return rows(config)


def head_of(config: AnyConfig) -> str:
    if isinstance(config, HfvlmFLAVACodebookConfig):
        return "HfvlmFLAVACodebookModel"
    return (config.architectures or ["HfvlmFLAVAModel"])[0]


def torchmultimodal_rows(config: AnyConfig) -> list[Row]:
    if isinstance(config, HfvlmFLAVACodebookConfig):
        return codebook_rows(config, OPENAI)
    head = head_of(config)
    heads: dict[str, list[Row]] = {
        "HfvlmFLAVAModel": joint_rows(""),
        "HfvlmFLAVAForClassification": [*unread_rows("model."), *classifier_rows(config)],
        "HfvlmFLAVAForPreTraining": [
            *joint_rows("model."),
            Row("loss.contrastive_loss.logit_scale", "logit_scale.scale", scalar),
            *codebook_rows(config.codebook_config, OPENAI, "image_codebook.encoder.", "codebook_model."),
            *prediction_rows("loss.mim_loss.cls", "mim_head"),
            *prediction_rows("loss.mlm_loss.cls", "mlm_head"),
            *prediction_rows("loss.mmm_loss.mim.cls", "mmm_image_head"),
            *prediction_rows("loss.mmm_loss.mlm.cls", "mmm_text_head"),
            Row("loss.itm_loss.pooler.dense.{}", "itm_head.summary.{}"),
            Row("loss.itm_loss.cls.seq_relationship.{}", "itm_head.classifier.{}"),
        ],
    }
    prefix = "" if head == "HfvlmFLAVAModel" else "model."
    return [*encoder_rows(config, prefix), *heads[head]]


def encoder_rows(config: HfvlmFLAVAConfig, prefix: str) -> list[Row]:
    image, text, both = (f"{prefix}{name}_encoder" for name in ("image", "text", "mm"))
    vision, words = f"{image}.embeddings", f"{text}.embeddings"
    return [
        *patch_rows(config, vision),
        *layer_rows(config.vision_config, image, "vision_model"),
        Row(f"{words}.word_embeddings.weight", "text_model.embeddings.token.weight"),
        Row(f"{words}.position_embeddings.weight", "text_model.embeddings.position"),
        Row(f"{words}.token_type_embeddings.weight", "text_model.embeddings.token_type.weight"),
        Row(f"{words}.layer_norm.{{}}", "text_model.embeddings.norm.{}"),
        *layer_rows(config.text_config, text, "text_model"),
        Row(f"{both}.cls_token", "multimodal_model.class_token", token),
        *layer_rows(config.multimodal_config, both, "multimodal_model"),
        *to_multimodal_rows(prefix),
    ]


def patch_rows(config: HfvlmFLAVAConfig, source: str) -> list[Row]:
    mask = [Row(f"{source}.mask_token", "vision_model.mask_token", token)]
    return [
        Row(f"{source}.cls_token", "vision_model.class_token", token),
        *(mask if config.vision_config.mask_token else []),
        Row(f"{source}.position_embeddings", "vision_model.position", table),
        Row(f"{source}.patch_embeddings.projection.{{}}", "vision_model.patches.projection.{}"),
    ]


def layer_rows(config: Any, source: str, target: str) -> list[Row]:
    layer, ours = f"{source}.encoder.layer.{{}}", f"{target}.layers.{{}}"
    last = 3 if config.hidden_dropout else 2  # dropout comes between, and counts
    return [
        *(
            Row(f"{layer}.attention.{theirs}.{{}}", f"{ours}.attention.{part}_proj.{{}}")
            for theirs, part in (("query", "q"), ("key", "k"), ("value", "v"), ("output", "out"))
        ),
        Row(f"{layer}.feedforward.model.0.{{}}", f"{ours}.mlp.fc1.{{}}"),
        Row(f"{layer}.feedforward.model.{last}.{{}}", f"{ours}.mlp.fc2.{{}}"),
        Row(f"{layer}.attention_layernorm.{{}}", f"{ours}.attention_norm.{{}}"),
        Row(f"{layer}.feedforward_layernorm.{{}}", f"{ours}.mlp_norm.{{}}"),
        *summary_rows(source, target),
    ]


def summary_rows(source: str, target: str) -> list[Row]:
    return [
        Row(f"{source}.layernorm.{{}}", f"{target}.post_norm.{{}}"),
        Row(f"{source}.pooler.dense.{{}}", f"{target}.summary.{{}}"),
    ]


def to_multimodal_rows(prefix: str) -> list[Row]:
    return [
        Row(f"{prefix}{kind}_to_mm_projection.{{}}", f"multimodal_model.{kind}_projection.{{}}")
        for kind in ("image", "text")
    ]


def joint_rows(prefix: str) -> list[Row]:
    return [
        Row(f"{prefix}image_projection.{{}}", "vision_model.projection.{}"),
        Row(f"{prefix}text_projection.{{}}", "text_model.projection.{}"),
    ]


def unread_rows(prefix: str) -> list[Row]:
    """A classifier reads the first tokens before they enter the joint space."""
    return [Row(f"{prefix}{kind}_projection.{{}}", None) for kind in ("image", "text")]


def classifier_rows(config: HfvlmFLAVAConfig) -> list[Row]:
    step = 3 if config.classifier_dropout else 2  # activation and dropout come between, and count
    depth = len(config.classifier_hidden_sizes) + 1
    return [Row(f"classifier.model.{step * i}.{{}}", f"classifier.layers.{i}.{{}}") for i in range(depth)]


def prediction_rows(source: str, target: str) -> list[Row]:
    return [
        Row(f"{source}.dense.{{}}", f"{target}.fc.{{}}"),
        Row(f"{source}.layer_norm.{{}}", f"{target}.norm.{{}}"),
        Row(f"{source}.decoder.{{}}", f"{target}.decoder.{{}}"),
        # The same tensor under another name.
        Row(f"{source}.bias", None),
    ]


class CodebookNames(NamedTuple):
    """Where a block is, its convolutions in it, and their weights and biases."""

    block: str
    path: str
    weight: str
    bias: str


OPENAI = CodebookNames("group_{}.block_{}", "res_path", "w", "b")
TRANSFORMERS = CodebookNames("group_{}.group.block_{}", "res_path.path", "weight", "bias")


def codebook_rows(
    config: HfvlmFLAVACodebookConfig, names: CodebookNames, source: str = "", target: str = ""
) -> list[Row]:
    rows = []
    for theirs, ours in ((names.weight, "weight"), (names.bias, "bias")):
        rows.append(Row(f"{source}blocks.input.{theirs}", f"{target}stem.{ours}"))
        rows.append(Row(f"{source}blocks.output.conv.{theirs}", f"{target}head.{ours}"))
        for group, block in product(range(4), range(config.blocks_per_group)):
            there = f"{source}blocks.{names.block.format(group + 1, block + 1)}"
            here = f"{target}groups.{group}.{block}"
            rows.append(Row(f"{there}.{names.path}.conv_{{}}.{theirs}", f"{here}.conv{{}}.{ours}"))
            if group and not block:  # where the channels change
                rows.append(Row(f"{there}.id_path.{theirs}", f"{here}.shortcut.{ours}"))
    return rows


def transformers_rows(config: AnyConfig) -> list[Row]:
    if isinstance(config, HfvlmFLAVACodebookConfig):
        return codebook_rows(config, TRANSFORMERS)
    head = head_of(config)
    if head not in NATIVE:
        raise UnsupportedOriginalError(f"transformers has no FLAVA like {head}; it has {', '.join(NATIVE.values())}.")
    prefix = "" if head == "HfvlmFLAVAModel" else "flava."
    words, ours = f"{prefix}text_model.embeddings", "text_model.embeddings"
    rows = [
        native_scale(config, prefix),
        *patch_rows(config, f"{prefix}image_model.embeddings"),
        *native_layer_rows(f"{prefix}image_model", "vision_model"),
        # Files of 2022 store the counting numbers.
        Row(f"{words}.position_ids", None, optional=True),
        Row(f"{words}.word_embeddings.weight", f"{ours}.token.weight"),
        Row(f"{words}.position_embeddings.weight", f"{ours}.position"),
        Row(f"{words}.token_type_embeddings.weight", f"{ours}.token_type.weight"),
        Row(f"{words}.LayerNorm.{{}}", f"{ours}.norm.{{}}"),
        *native_layer_rows(f"{prefix}text_model", "text_model"),
        Row(f"{prefix}multimodal_model.cls_token", "multimodal_model.class_token", token),
        *native_layer_rows(f"{prefix}multimodal_model", "multimodal_model"),
        *to_multimodal_rows(prefix),
        *joint_rows(prefix),
    ]
    if head == "HfvlmFLAVAModel":
        return rows
    return [
        *rows,
        *codebook_rows(config.codebook_config, TRANSFORMERS, "image_codebook.", "codebook_model."),
        *(row for name in ("mim", "mlm", "mmm_image", "mmm_text") for row in native_prediction_rows(f"{name}_head")),
        Row("itm_head.pooler.dense.{}", "itm_head.summary.{}"),
        Row("itm_head.seq_relationship.{}", "itm_head.classifier.{}"),
    ]


def native_scale(config: HfvlmFLAVAConfig, prefix: str) -> Row:
    """A file of torchmultimodal's FLAVAModel has none; transformers' class then multiplies by one."""
    if config.logit_scale_init_value is None:
        return Row(f"{prefix}logit_scale", (), Change(lambda _: (), lambda: torch.zeros(())))
    return Row(f"{prefix}logit_scale", "logit_scale.scale", scalar)


def native_layer_rows(source: str, target: str) -> list[Row]:
    layer, ours = f"{source}.encoder.layer.{{}}", f"{target}.layers.{{}}"
    return [
        *(
            Row(f"{layer}.attention.attention.{theirs}.{{}}", f"{ours}.attention.{part}_proj.{{}}")
            for theirs, part in (("query", "q"), ("key", "k"), ("value", "v"))
        ),
        Row(f"{layer}.attention.output.dense.{{}}", f"{ours}.attention.out_proj.{{}}"),
        Row(f"{layer}.intermediate.dense.{{}}", f"{ours}.mlp.fc1.{{}}"),
        Row(f"{layer}.output.dense.{{}}", f"{ours}.mlp.fc2.{{}}"),
        Row(f"{layer}.layernorm_before.{{}}", f"{ours}.attention_norm.{{}}"),
        Row(f"{layer}.layernorm_after.{{}}", f"{ours}.mlp_norm.{{}}"),
        *summary_rows(source, target),
    ]


def native_prediction_rows(name: str) -> list[Row]:
    return [
        Row(f"{name}.transform.dense.{{}}", f"{name}.fc.{{}}"),
        Row(f"{name}.transform.LayerNorm.{{}}", f"{name}.norm.{{}}"),
        Row(f"{name}.decoder.weight", f"{name}.decoder.weight"),
        # One tensor under two names, of which a folder may hold either.
        Row(f"{name}.decoder.bias", f"{name}.decoder.bias", optional=True),
        Row(f"{name}.bias", f"{name}.decoder.bias", optional=True),
    ]


# What the constructors of torchmultimodal call the sizes of an encoder.
ENCODER = ("hidden_size", "num_attention_heads", "num_hidden_layers", "dropout", "intermediate_size")
ARGUMENTS = (
    *(
        f"{encoder}_{name}"
        for encoder in ("image", "text", "multimodal")
        for name in (*ENCODER, "intermediate_activation", "layer_norm_eps")
    ),
    *("use_image_masking", "image_size", "patch_size", "num_channels", "vocab_size", "pad_token_id"),
    *("type_vocab_size", "max_position_embeddings", "text_and_image_proj_size", "codebook", "codebook_image_size"),
    *("loss", "skip_unmasked_mm_encoder", "num_classes", "classifier_in_dim", "classifier_hidden_sizes"),
    *("classifier_dropout", "classifier_activation", "pretrained"),
)
# Of the pretraining's loss; all labels below 0 are ignored, and the sizes are those of the tensors.
LOSS = {
    "mim_weight": "mim_weight",
    "mlm_weight": "mlm_weight",
    "contrastive_loss_weight": "contrastive_weight",
    "mmm_image_loss_weight": "mmm_image_weight",
    "mmm_text_loss_weight": "mmm_text_weight",
    "itm_loss_weight": "itm_weight",
    "layer_norm_eps": "head_layer_norm_eps",
}
LOSS_SIZES = ("text_vocab_size", "image_vocab_size", "hidden_size", "ignore_index", "logit_scale")
ACTIVATIONS = {"gelu": "gelu", "relu": "relu", "silu": "silu", "tanh": "tanh", "quickgelu": "quick_gelu"}


def config_from_original(original: Mapping[str, Any], state_dict: Mapping[str, Tensor]) -> AnyConfig:
    """The constructor's arguments (none are needed for released files), or transformers' config.json.

    The class is the one that the tensors are for.
    """
    if is_native_codebook(original):
        return _native_codebook(original)
    shapes = {key: tensor.shape for key, tensor in state_dict.items()}
    if original.get("model_type") == "flava":
        return _from_transformers(original, shapes)
    arguments = original.get("arguments", {})
    check_options("FLAVA's constructor", arguments, ARGUMENTS)
    if "blocks.input.w" in shapes:
        return _codebook(shapes, "", arguments)
    return _composite(shapes, arguments)


def _composite(shapes: Mapping[str, Any], arguments: Mapping[str, Any]) -> HfvlmFLAVAConfig:
    prefix = "" if "image_projection.weight" in shapes else "model."
    loss = arguments.get("loss", {})
    check_options("FLAVA's loss", loss, (*LOSS, *LOSS_SIZES, "transform_act_fn"))
    fields: dict[str, Any] = {ours: loss[theirs] for theirs, ours in LOSS.items() if theirs in loss}
    fields["head_act"] = _activation(loss.get("transform_act_fn", "gelu"))
    architecture = "HfvlmFLAVAModel"
    if "classifier.model.0.weight" in shapes:
        architecture, dropout = "HfvlmFLAVAForClassification", arguments.get("classifier_dropout", 0.5)
        layers = {
            int(key.split(".")[2]): key for key in shapes if re.fullmatch(r"classifier\.model\.\d+\.weight", key)
        }
        widths = [shapes[layers[number]][0] for number in sorted(layers)]
        fields |= {"classifier_hidden_sizes": widths[:-1], "num_labels": widths[-1], "classifier_dropout": dropout}
        fields["classifier_act"] = _activation(arguments.get("classifier_activation", "relu"))
    codebook = HfvlmFLAVACodebookConfig()
    if "image_codebook.encoder.blocks.input.w" in shapes:
        architecture = "HfvlmFLAVAForPreTraining"
        codebook = _codebook(shapes, "image_codebook.encoder.", arguments.get("codebook", {}))
    elif architecture == "HfvlmFLAVAModel":
        fields["logit_scale_init_value"] = None
    joint = shapes[f"{prefix}image_projection.weight"][0]
    image, text = (shapes[f"{prefix}{kind}_to_mm_projection.weight"][1] for kind in ("image", "text"))
    return HfvlmFLAVAConfig(
        architectures=[architecture],
        vision_config=_vision_config(shapes, arguments, prefix, joint),
        text_config=_text_config(shapes, arguments, prefix, joint),
        multimodal_config=HfvlmFLAVAMultimodalConfig(
            image_hidden_size=image,
            text_hidden_size=text,
            **_encoder_sizes(shapes, arguments, f"{prefix}mm_encoder", "multimodal"),
        ),
        codebook_config=codebook,
        **fields,
    )


def _encoder_sizes(shapes: Mapping[str, Any], arguments: Mapping[str, Any], source: str, name: str) -> dict[str, Any]:
    layer = f"{source}.encoder.layer."
    inner, width = shapes[f"{layer}0.feedforward.model.0.weight"]
    dropout = arguments.get(f"{name}_dropout", 0.0)
    return {
        "hidden_size": width,
        "intermediate_size": inner,
        "num_hidden_layers": count_layers(shapes, layer),
        "num_attention_heads": arguments.get(f"{name}_num_attention_heads", width // 64),
        "hidden_act": _activation(arguments.get(f"{name}_intermediate_activation", "gelu")),
        "layer_norm_eps": arguments.get(f"{name}_layer_norm_eps", 1e-12),
        "hidden_dropout": dropout,
        "attention_dropout": dropout,
    }


def _activation(name: Any) -> str:
    """By torch's class or function, or its name with or without its module."""
    short = str(getattr(name, "__name__", name)).rpartition(".")[2].lower()
    if short not in ACTIVATIONS:
        raise UnsupportedOriginalError(f"hfvlm knows no activation {name}; it knows {', '.join(ACTIVATIONS)}.")
    return ACTIVATIONS[short]


def _vision_config(
    shapes: Mapping[str, Any], arguments: Mapping[str, Any], prefix: str, joint: int
) -> HfvlmFLAVAVisionConfig:
    embeddings = f"{prefix}image_encoder.embeddings"
    _, channels, patch, _ = shapes[f"{embeddings}.patch_embeddings.projection.weight"]
    return HfvlmFLAVAVisionConfig(
        image_size=patch * isqrt(shapes[f"{embeddings}.position_embeddings"][1] - 1),
        patch_size=patch,
        num_channels=channels,
        mask_token=f"{embeddings}.mask_token" in shapes,
        projection_dim=joint,
        **_encoder_sizes(shapes, arguments, f"{prefix}image_encoder", "image"),
    )


def _text_config(
    shapes: Mapping[str, Any], arguments: Mapping[str, Any], prefix: str, joint: int
) -> HfvlmFLAVATextConfig:
    embeddings = f"{prefix}text_encoder.embeddings"
    return HfvlmFLAVATextConfig(
        vocab_size=shapes[f"{embeddings}.word_embeddings.weight"][0],
        max_position_embeddings=shapes[f"{embeddings}.position_embeddings.weight"][0],
        type_vocab_size=shapes[f"{embeddings}.token_type_embeddings.weight"][0],
        pad_token_id=arguments.get("pad_token_id", 0),
        projection_dim=joint,
        **_encoder_sizes(shapes, arguments, f"{prefix}text_encoder", "text"),
    )


def _codebook(shapes: Mapping[str, Any], prefix: str, arguments: Mapping[str, Any]) -> HfvlmFLAVACodebookConfig:
    width, channels, _, _ = shapes[f"{prefix}blocks.input.w"]
    return HfvlmFLAVACodebookConfig(
        num_channels=channels,
        hidden_size=width,
        vocab_size=shapes[f"{prefix}blocks.output.conv.w"][0],
        blocks_per_group=count_layers(shapes, f"{prefix}blocks.group_1.block_"),
        num_groups=arguments.get("group_count", 4),
    )


# Fields of an encoder that transformers calls the same, and those that it calls otherwise.
SAME = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "hidden_act", "layer_norm_eps")
DROPOUTS = {"hidden_dropout": "hidden_dropout_prob", "attention_dropout": "attention_probs_dropout_prob"}
IMAGE_FIELDS, TEXT_FIELDS = (
    ("patch_size", "num_channels", "mask_token"),
    ("vocab_size", "type_vocab_size", "max_position_embeddings", "pad_token_id"),
)
WEIGHTS = {
    **{name: name for name in ("mim_weight", "mlm_weight", "mmm_image_weight", "mmm_text_weight", "itm_weight")},
    "contrastive_weight": "global_contrastive_weight",
}
CODEBOOK = {
    **{name: name for name in ("hidden_size", "vocab_size", "num_groups")},
    "num_channels": "input_channels",
    "blocks_per_group": "num_blocks_per_group",
}


def _native_sizes(native: Any) -> dict[str, Any]:
    if not native.qkv_bias:
        raise UnsupportedOriginalError("hfvlm's queries, keys and values have biases; this model has qkv_bias off.")
    return {name: getattr(native, name) for name in SAME} | {
        ours: getattr(native, theirs) for ours, theirs in DROPOUTS.items()
    }


def _native_codebook(original: Mapping[str, Any]) -> HfvlmFLAVACodebookConfig:
    from transformers import FlavaImageCodebookConfig

    native: Any = FlavaImageCodebookConfig(**original)
    return HfvlmFLAVACodebookConfig(**{ours: getattr(native, theirs) for ours, theirs in CODEBOOK.items()})


def _from_transformers(original: Mapping[str, Any], shapes: Mapping[str, Any]) -> HfvlmFLAVAConfig:
    from transformers import FlavaConfig

    native: Any = FlavaConfig(**original)
    image, text, both = native.image_config, native.text_config, native.multimodal_config
    if not both.use_cls_token:
        raise UnsupportedOriginalError("hfvlm's multimodal encoder has a class token; this model has none.")
    heads = "flava.logit_scale" in shapes
    if heads and image.hidden_act != text.hidden_act:
        raise UnsupportedOriginalError("hfvlm's heads have one activation; this model's differ.")
    return HfvlmFLAVAConfig(
        architectures=["HfvlmFLAVAForPreTraining" if heads else "HfvlmFLAVAModel"],
        vision_config=HfvlmFLAVAVisionConfig(
            image_size=image.image_size,
            projection_dim=native.projection_dim,
            **_native_sizes(image),
            **{name: getattr(image, name) for name in IMAGE_FIELDS},
        ),
        text_config=HfvlmFLAVATextConfig(
            projection_dim=native.projection_dim,
            **_native_sizes(text),
            **{name: getattr(text, name) for name in TEXT_FIELDS},
        ),
        multimodal_config=HfvlmFLAVAMultimodalConfig(
            image_hidden_size=image.hidden_size, text_hidden_size=text.hidden_size, **_native_sizes(both)
        ),
        codebook_config=_native_codebook(native.image_codebook_config.to_dict()),
        logit_scale_init_value=native.logit_scale_init_value,
        head_act=image.hidden_act,
        # transformers' heads take the towers'; those of torchmultimodal have 1e-5.
        head_layer_norm_eps=image.layer_norm_eps,
        **{ours: getattr(native, theirs) for ours, theirs in WEIGHTS.items()},
    )


def settings_from_original(original: Mapping[str, Any], preprocessing: Mapping[str, Any]) -> dict[str, Any]:
    """Of the processor, from transformers' preprocessor_config.json; its codebook reads pictures as they come, ours
    as they were squashed, as the original's."""
    settings = preprocessing.get("image_processor", preprocessing)
    return {"image_processor": {name: settings[name] for name in SAME_SETTINGS if name in settings}}


def image_processor_for(config: AnyConfig, settings: Mapping[str, Any]) -> HfvlmFLAVAImageProcessor:
    sizes: dict[str, Any] = {}
    if isinstance(config, HfvlmFLAVAConfig):
        rows, columns = config.vision_config.grid
        sizes = {"size": config.vision_config.image_size, "input_size_patches": rows}
        sizes["codebook_size"] = {"height": 8 * rows, "width": 8 * columns}
    return HfvlmFLAVAImageProcessor(**sizes | settings.get("image_processor", {}))


def vocabularies_for(config: AnyConfig) -> list[tuple[str, ...]]:
    """None of the codebook alone, which reads no texts."""
    return [VOCABULARIES] if isinstance(config, HfvlmFLAVAConfig) else []


def processor_for(config: HfvlmFLAVAConfig, settings: Mapping[str, Any], vocabulary: Path) -> HfvlmFLAVAProcessor:
    """The processor; `vocabulary` is one of VOCABULARIES."""
    text = config.text_config
    length = {"model_max_length": min(77, text.max_position_embeddings)}
    tokenizer = HfvlmFLAVATokenizer.from_vocabulary(vocabulary, **length | settings.get("tokenizer", {}))
    ours = len(tokenizer), tokenizer.pad_token_id
    if ours != (text.vocab_size, text.pad_token_id):
        raise ValueError(
            f"{vocabulary}: its pieces and [PAD] are {ours}, the model's {(text.vocab_size, text.pad_token_id)} "
            "(text_config.vocab_size, pad_token_id): this is the vocabulary of another model."
        )
    return HfvlmFLAVAProcessor(image_processor_for(config, settings), tokenizer)


def config_to_transformers(config: AnyConfig) -> Any:
    """transformers' configuration of the same model."""
    from transformers import FlavaConfig, FlavaImageCodebookConfig

    if isinstance(config, HfvlmFLAVACodebookConfig):
        native = {theirs: getattr(config, ours) for ours, theirs in CODEBOOK.items()}
        return FlavaImageCodebookConfig(architectures=["FlavaImageCodebook"], **native)
    head = head_of(config)
    if head not in NATIVE:
        raise UnsupportedOriginalError(f"transformers has no FLAVA like {head}; it has {', '.join(NATIVE.values())}.")
    vision, text, both = config.vision_config, config.text_config, config.multimodal_config
    if head == "HfvlmFLAVAForPreTraining" and config.head_act != vision.hidden_act:
        raise UnsupportedOriginalError("transformers' heads have the towers' activation; this model's have another.")
    scale = config.logit_scale_init_value
    weights: dict[str, Any] = {theirs: float(getattr(config, ours)) for ours, theirs in WEIGHTS.items()}
    return FlavaConfig(
        architectures=[NATIVE[head]],
        image_config=_to_native(vision, ("image_size", *IMAGE_FIELDS))
        | {"vocab_size": config.codebook_config.vocab_size},
        text_config=_to_native(text, TEXT_FIELDS),
        multimodal_config=_to_native(both, ()),
        image_codebook_config=config_to_transformers(config.codebook_config).to_dict(),
        hidden_size=both.hidden_size,
        layer_norm_eps=both.layer_norm_eps,
        projection_dim=vision.projection_dim,
        logit_scale_init_value=0.0 if scale is None else float(scale),
        **weights,
    )


def _to_native(config: Any, names: Iterable[str]) -> dict[str, Any]:
    native = {name: getattr(config, name) for name in (*SAME, *names)}
    return native | {theirs: getattr(config, ours) for ours, theirs in DROPOUTS.items()}


def processor_to_transformers(processor: Any) -> Any:
    """transformers' FlavaProcessor of the same vocabulary and pixels, or its image processor alone.

    Its codebook reads pictures as they come, ours as they were squashed.
    """
    from transformers import BertTokenizer, FlavaProcessor
    from transformers.models.flava.image_processing_pil_flava import FlavaImageProcessorPil

    pixels = getattr(processor, "image_processor", processor)
    same = {name: getattr(pixels, name) for name in SAME_SETTINGS}
    image_processor = FlavaImageProcessorPil(crop_size=pixels.size, codebook_crop_size=pixels.codebook_size, **same)
    if pixels is processor:
        return image_processor
    tokenizer = processor.tokenizer
    vocabulary, length = tokenizer.get_vocab(), tokenizer.model_max_length
    return FlavaProcessor(image_processor, BertTokenizer(vocab=vocabulary, model_max_length=length))
