"""FLAVA's released files, DALL-E's codebook, and transformers' folders.

Source: https://github.com/facebookresearch/multimodal at 3c2a85a, https://github.com/openai/DALL-E at 5be4b23.
"""

import re
from collections.abc import Iterable, Mapping
from math import isqrt
from pathlib import Path
from typing import Any

from torch import Tensor

from hfvlm.checkpoints.conversion import Conversion, Names
from hfvlm.checkpoints.key_table import Row, flat, scalar
from hfvlm.checkpoints.originals import UnsupportedOriginalError, check_options, count_layers
from hfvlm.conversion.dvae import codebook_rows
from hfvlm.conversion.interop import flava as interop
from hfvlm.conversion.interop.flava import (
    SAME_SETTINGS,
    AnyConfig,
    head_of,
    joint_rows,
    patch_rows,
    pooled_rows,
    to_multimodal_rows,
)
from hfvlm.conversion.processors import check_vocabulary
from hfvlm.models.flava.configuration_flava import (
    HfvlmFLAVACodebookConfig,
    HfvlmFLAVAConfig,
    HfvlmFLAVAMultimodalConfig,
    HfvlmFLAVATextConfig,
    HfvlmFLAVAVisionConfig,
)
from hfvlm.models.flava.processing_flava import HfvlmFLAVAImageProcessor, HfvlmFLAVAProcessor, HfvlmFLAVATokenizer

VOCABULARIES = ("vocab.txt", "tokenizer.json")


def layout_of(original: Mapping[str, Any]) -> str:
    native = original.get("model_type") == "flava" or interop.is_codebook(original)
    return "transformers" if native else "torchmultimodal"


def keys_for(config: AnyConfig, layout: str = "torchmultimodal", keys: Iterable[str] = ()) -> list[Row]:
    """Return the rows for a file of `layout`, "torchmultimodal" or "transformers", for the class that `config` is for.

    OpenAI's file of the codebook has torchmultimodal's names, which are OpenAI's.
    """
    rows = interop.rows if layout == "transformers" else torchmultimodal_rows
    return rows(config)


def torchmultimodal_rows(config: AnyConfig) -> list[Row]:
    if isinstance(config, HfvlmFLAVACodebookConfig):
        return codebook_rows(config.blocks_per_group)
    head = head_of(config)
    heads: dict[str, list[Row]] = {
        "HfvlmFLAVAModel": joint_rows(""),
        "HfvlmFLAVAForClassification": [*unused_rows("model."), *classifier_rows(config)],
        "HfvlmFLAVAForPreTraining": [
            *joint_rows("model."),
            Row("loss.contrastive_loss.logit_scale", "logit_scale.scale", scalar),
            *codebook_rows(
                config.codebook_config.blocks_per_group, source="image_codebook.encoder.", target="codebook_model."
            ),
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
        Row(f"{both}.cls_token", "multimodal_model.class_token", flat),
        *layer_rows(config.multimodal_config, both, "multimodal_model"),
        *to_multimodal_rows(prefix),
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
        *pooled_rows(source, target),
    ]


def unused_rows(prefix: str) -> list[Row]:
    """Drop the projections: a classifier reads the first tokens before they enter the joint space."""
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
    """Read the constructor's arguments (none are needed for released files), or transformers' config.json.

    The class is the one that the tensors are for.
    """
    if interop.is_codebook(original):
        return interop.codebook_from_transformers(original)
    shapes = {key: tensor.shape for key, tensor in state_dict.items()}
    if original.get("model_type") == "flava":
        return interop.config_from_transformers(original, shapes)
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
    """Return an activation by torch's class or function, or its name with or without its module."""
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


def settings_from_original(original: Mapping[str, Any], preprocessing: Mapping[str, Any]) -> dict[str, Any]:
    """Return the processor's settings, from transformers' preprocessor_config.json; its codebook reads images as they
    come, ours as they were squashed, as the original's."""
    settings = preprocessing.get("image_processor", preprocessing)
    return {"image_processor": {name: settings[name] for name in SAME_SETTINGS if name in settings}}


def image_processor_for(config: AnyConfig, settings: Mapping[str, Any]) -> HfvlmFLAVAImageProcessor:
    sizes: dict[str, Any] = {}
    if isinstance(config, HfvlmFLAVAConfig):
        rows, columns = config.vision_config.grid
        sizes = {"size": config.vision_config.image_size, "input_size_patches": rows}
        sizes["codebook_size"] = {"height": 8 * rows, "width": 8 * columns}
    return HfvlmFLAVAImageProcessor(**sizes | settings.get("image_processor", {}))


def vocabularies_for(config: AnyConfig) -> list[Names]:
    """Name the file; none of the codebook alone, which reads no texts."""
    return [VOCABULARIES] if isinstance(config, HfvlmFLAVAConfig) else []


def processor_for(config: HfvlmFLAVAConfig, settings: Mapping[str, Any], vocabulary: Path) -> HfvlmFLAVAProcessor:
    """Return the processor; `vocabulary` is one of VOCABULARIES."""
    text = config.text_config
    length = {"model_max_length": min(77, text.max_position_embeddings)}
    tokenizer = HfvlmFLAVATokenizer.from_vocabulary(vocabulary, **length | settings.get("tokenizer", {}))
    ours = len(tokenizer), tokenizer.pad_token_id
    wanted, fields = (text.vocab_size, text.pad_token_id), "text_config.vocab_size, pad_token_id"
    check_vocabulary(vocabulary, ours, wanted, "pieces and [PAD] are", fields)
    return HfvlmFLAVAProcessor(image_processor_for(config, settings), tokenizer)


CONVERSION = Conversion(
    config_from_original=config_from_original,
    keys_for=keys_for,
    layout_of=layout_of,
    settings_from_original=settings_from_original,
    image_processor_for=image_processor_for,
    processor_for=processor_for,
    vocabularies_for=vocabularies_for,
    export=interop.EXPORT,
)
