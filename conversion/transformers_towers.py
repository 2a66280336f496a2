"""The towers of open_clip that are models of transformers: rows and sizes of timm's ConvNeXt and of encoders of texts;
and timm's Swin, which is not quite one.

Source: https://github.com/mlfoundations/open_clip at 89fb801, src/open_clip/timm_model.py and hf_model.py; timm
1.0.31, timm/models/convnext.py and swin_transformer.py.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from hfvlm.checkpoints.key_table import Row
from hfvlm.checkpoints.originals import UnsupportedOriginalError, check_options, count_layers
from hfvlm.conversion import swin
from hfvlm.modeling.trunks import HfvlmTextTrunkConfig, HfvlmVisionTrunkConfig
from hfvlm.models.clip.towers.configuration_swin import HfvlmCLIPSwinConfig

# Of open_clip's vision_cfg, of its timm_model_kwargs and of its text_cfg. Sizes are what the shapes say.
OPTIONS = (
    *("image_size", "timm_model_name", "timm_model_pretrained", "timm_pool", "timm_proj", "timm_model_kwargs"),
    "timm_drop_path",
)
ARGUMENTS = ("depths", "dims", "img_size", "patch_size", "embed_dim", "num_heads", "window_size")
TEXT_OPTIONS = (
    *("hf_model_name", "hf_tokenizer_name", "hf_model_pretrained", "hf_model_config", "hf_proj_type"),
    *("hf_pooler_type", "context_length", "tokenizer_kwargs"),
)


def convnext_config(arguments: Mapping[str, Any], shapes: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of a ConvNeXt whose tensors have these shapes, in timm's names."""
    stages = range(count_layers(shapes, "stages."))
    return {
        "model_type": "convnext",
        "patch_size": shapes["stem.0.weight"][-1],
        "num_channels": shapes["stem.0.weight"][1],
        "depths": [count_layers(shapes, f"stages.{stage}.blocks.") for stage in stages],
        "hidden_sizes": [shapes[f"stages.{stage}.blocks.0.norm.weight"][0] for stage in stages],
        "layer_norm_eps": 1e-6,
    }


def convnext_rows(source: str, target: str) -> list[Row]:
    """Return the rows of timm's ConvNeXt."""
    block, layer = f"{source}.stages.{{}}.blocks.{{}}", f"{target}.encoder.stages.{{}}.layers.{{}}"
    return [
        Row(f"{source}.stem.0.{{}}", f"{target}.embeddings.patch_embeddings.{{}}"),
        Row(f"{source}.stem.1.{{}}", f"{target}.embeddings.layernorm.{{}}"),
        Row(
            f"{source}.stages.{{}}.downsample.{{}}.{{}}", f"{target}.encoder.stages.{{}}.downsampling_layer.{{}}.{{}}"
        ),
        Row(f"{block}.gamma", f"{layer}.layer_scale_parameter"),
        Row(f"{block}.conv_dw.{{}}", f"{layer}.dwconv.{{}}"),
        Row(f"{block}.norm.{{}}", f"{layer}.layernorm.{{}}"),
        Row(f"{block}.mlp.fc1.{{}}", f"{layer}.pwconv1.{{}}"),
        Row(f"{block}.mlp.fc2.{{}}", f"{layer}.pwconv2.{{}}"),
        Row(f"{source}.head.norm.{{}}", f"{target}.layernorm.{{}}"),
    ]


# By the beginning of timm's name: transformers' model_type, its sizes, and the epsilon of all norms where the model of
# transformers has another.
TRUNKS = {
    "convnext_xxlarge": ("convnext", convnext_config, 1e-5),
    "convnext_": ("convnext", convnext_config, None),
}
TRUNK_ROWS = {"convnext": convnext_rows}


def is_trunk(name: str) -> bool:
    """Whether timm's model of that name is one of transformers'."""
    return name.startswith(tuple(TRUNKS))


def trunk_config(vision: Mapping[str, Any], state_dict: Mapping[str, Tensor]) -> HfvlmVisionTrunkConfig:
    """Read open_clip's `vision_cfg` and the tensors of the trunk that it names.

    Raises:
        UnsupportedOriginalError: it has an option that hfvlm's tower does not have.
    """
    name, arguments = vision["timm_model_name"], checked(vision)
    _, sizes_of, eps = next(kind for start, kind in TRUNKS.items() if name.startswith(start))
    shapes = {key.removeprefix("visual."): tensor.shape for key, tensor in state_dict.items()}
    sizes = sizes_of(arguments, {key.removeprefix("trunk."): shape for key, shape in shapes.items()})
    size = {"image_size": vision.get("image_size") or 224, "drop_path_rate": vision.get("timm_drop_path") or 0.0}
    return HfvlmVisionTrunkConfig(trunk_config=sizes | size, layer_norm_eps=eps, **head_of(shapes))


def checked(vision: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the arguments of timm's model in open_clip's `vision_cfg`, without options that would be ignored."""
    arguments = vision.get("timm_model_kwargs") or {}
    check_options("open_clip's vision_cfg", vision, OPTIONS)
    check_options("open_clip's timm_model_kwargs", arguments, ARGUMENTS)
    if vision.get("timm_pool", "avg") not in ("", "avg"):
        raise UnsupportedOriginalError(
            f"open_clip's vision_cfg: {vision['timm_model_name']} with timm_pool {vision['timm_pool']!r}."
        )
    return arguments


def swin_config(vision: Mapping[str, Any], state_dict: Mapping[str, Tensor]) -> HfvlmCLIPSwinConfig:
    """Do as `trunk_config`, of timm's Swin."""
    arguments = checked(vision)
    shapes = {key.removeprefix("visual."): tensor.shape for key, tensor in state_dict.items()}
    inner = {key.removeprefix("trunk."): shape for key, shape in shapes.items()}
    size = {"img_size": arguments.get("img_size") or vision.get("image_size")}
    head = {name: value for name, value in head_of(shapes).items() if name != "projection_hidden_size"}
    return swin.timm_config({**arguments, **size}, inner, **head, drop_path_rate=vision.get("timm_drop_path") or 0.0)


def swin_rows(config: HfvlmCLIPSwinConfig) -> list[Row]:
    """Return the rows of timm's Swin in open_clip's files."""
    head = "visual.trunk.head.fc" if config.projection_bias else "visual.head.proj"
    rows = swin.timm_rows(config.model_type, "visual.trunk.", "vision_model.")
    return [*rows, Row(f"{head}.{{}}", "vision_model.projection.{}", optional=True)]


# Where a tower's projection is, by its keys: of one layer, or of two, in the trunk or behind it.
HEADS = ("head.proj", "trunk.head", "trunk.head.fc")


def head_of(shapes: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of the projection behind a trunk, or at its end."""
    if "head.mlp.fc1.weight" in shapes:
        return _head(shapes, "head.mlp.fc1", "head.mlp.fc2")
    return _head(shapes, *(name for name in HEADS if f"{name}.weight" in shapes))


def _head(shapes: Mapping[str, Any], *layers: str) -> dict[str, Any]:
    """Return the fields of the projection that these layers are."""
    if not layers:
        return {"projection_dim": None}
    return {
        "projection_dim": shapes[f"{layers[-1]}.weight"][0],
        "projection_hidden_size": shapes[f"{layers[0]}.weight"][0] if len(layers) > 1 else None,
        "projection_bias": f"{layers[0]}.bias" in shapes,
    }


def head_rows(config: HfvlmVisionTrunkConfig | HfvlmTextTrunkConfig, one: str, first: str, second: str) -> list[Row]:
    """Return the rows of a projection: `one` layer, or `first` and `second`."""
    target = f"{config.base_config_key.removesuffix('_config')}_model.projection"
    if config.projection_dim is None:
        return []
    if config.projection_hidden_size is None:
        return [Row(f"{one}.{{}}", f"{target}.{{}}")]
    return [Row(f"{first}.{{}}", f"{target}.fc1.{{}}"), Row(f"{second}.{{}}", f"{target}.fc2.{{}}")]


def trunk_rows(config: HfvlmVisionTrunkConfig) -> list[Row]:
    """Return the rows of a vision tower that is a model of transformers, in open_clip's files."""
    one = "visual.trunk.head" if config.projection_bias else "visual.head.proj"
    return [
        *TRUNK_ROWS[config.trunk_config.model_type]("visual.trunk", "vision_model.trunk"),
        *head_rows(config, one, "visual.head.mlp.fc1", "visual.head.mlp.fc2"),
    ]


BERT_PARTS = ("embeddings.{}.{}", "encoder.{...}")
# The parameters of each encoder of texts, by its model_type.
ENCODERS = {
    "bert": BERT_PARTS,
    "roberta": BERT_PARTS,
    "xlm-roberta": BERT_PARTS,
    "m2m_100": ("embed_tokens.{}", "layers.{...}", "layer_norm.{}"),
    "mt5": ("embed_tokens.{}", "block.{...}", "final_layer_norm.{}"),
}
# What open_clip calls the poolings of encoders that have no pooled output of their own.
POOLINGS = {
    "mean_pooler": "mean",
    "max_pooler": "max",
    "cls_pooler": "first",
    "cls_last_hidden_state_pooler": "first",
}
# By the beginning of the name of a model on the Hub.
NAMES = {
    "roberta-": "roberta",
    "xlm-roberta-": "xlm-roberta",
    "facebook/nllb-": "m2m_100",
    "google/mt5-": "mt5",
    "bert-": "bert",
}


def encoder_rows(config: HfvlmTextTrunkConfig) -> list[Row]:
    """Return the rows of a text tower that is a model of transformers, in open_clip's files."""
    source, target = "text.transformer", "text_model.trunk"
    return [
        *(Row(f"{source}.{part}", f"{target}.{part}") for part in ENCODERS[config.trunk_config.model_type]),
        # Files from before transformers 4.31 store the counting numbers.
        Row(f"{source}.embeddings.position_ids", None, optional=True),
        *([Row(f"{source}.pooler.{{...}}", f"{target}.pooler.{{...}}")] if config.pooling == "pooler" else ()),
        *head_rows(config, "text.proj", "text.proj.0", "text.proj.2"),
    ]


def encoder_config(
    text: Mapping[str, Any], known: Mapping[str, Any], state_dict: Mapping[str, Tensor]
) -> HfvlmTextTrunkConfig:
    """Read open_clip's `text_cfg`.

    Args:
        text: the configuration.
        known: what is known of the encoder's own.
        state_dict: the file, for what these leave open.

    Raises:
        UnsupportedOriginalError: it names an encoder, or an option, that hfvlm does not know.
    """
    check_options("open_clip's text_cfg", text, TEXT_OPTIONS)
    name, pooler = str(text["hf_model_name"]), text.get("hf_pooler_type", "mean_pooler")
    model_type = next((kind for start, kind in NAMES.items() if name.startswith(start)), known.get("model_type"))
    if model_type not in ENCODERS or pooler not in POOLINGS:
        raise UnsupportedOriginalError(
            f"open_clip's text_cfg: hf_model_name {name!r} with hf_pooler_type {pooler!r}; hfvlm reads "
            f"{', '.join(NAMES)} with {', '.join(POOLINGS)}."
        )
    shapes = {key.removeprefix("text."): tensor.shape for key, tensor in state_dict.items()}
    inner = {key.removeprefix("transformer."): shape for key, shape in shapes.items()}
    sizes = {"bert": bert_sizes, "m2m_100": m2m_sizes, "mt5": t5_sizes}.get(model_type, roberta_sizes)(inner)
    own = pooler == "cls_pooler" and "pooler.dense.weight" in inner
    two = ("proj.0", "proj.2") if "proj.0.weight" in shapes else ()
    return HfvlmTextTrunkConfig(
        trunk_config=sizes | dict(text.get("hf_model_config") or {}) | dict(known) | {"model_type": model_type},
        pooling="pooler" if own else POOLINGS[pooler],
        max_position_embeddings=text.get("context_length", 77),
        **_head(shapes, *(two or ("proj",))),
    )


def bert_sizes(shapes: Mapping[str, Any]) -> dict[str, Any]:
    words, width = shapes["embeddings.word_embeddings.weight"]
    return {
        "vocab_size": words,
        "hidden_size": width,
        "num_hidden_layers": count_layers(shapes, "encoder.layer."),
        "num_attention_heads": width // 64,
        "intermediate_size": shapes["encoder.layer.0.intermediate.dense.weight"][0],
        "max_position_embeddings": shapes["embeddings.position_embeddings.weight"][0],
        "type_vocab_size": shapes["embeddings.token_type_embeddings.weight"][0],
    }


def roberta_sizes(shapes: Mapping[str, Any]) -> dict[str, Any]:
    tokens = {"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2}
    return bert_sizes(shapes) | {"hidden_act": "gelu", "layer_norm_eps": 1e-5} | tokens


def m2m_sizes(shapes: Mapping[str, Any]) -> dict[str, Any]:
    """Return the sizes of NLLB's encoder; its decoder has none."""
    words, width = shapes["embed_tokens.weight"]
    return {
        "vocab_size": words,
        "d_model": width,
        "encoder_layers": count_layers(shapes, "layers."),
        "decoder_layers": 0,
        "encoder_attention_heads": width // 64,
        "encoder_ffn_dim": shapes["layers.0.fc1.weight"][0],
        "activation_function": "relu",
        "scale_embedding": True,
        "max_position_embeddings": 1024,
        "pad_token_id": 1,
        "bos_token_id": 0,
        "eos_token_id": 2,
    }


def t5_sizes(shapes: Mapping[str, Any]) -> dict[str, Any]:
    """Return the sizes of mT5's encoder; its decoder has none."""
    words, width = shapes["embed_tokens.weight"]
    return {
        "vocab_size": words,
        "d_model": width,
        "num_layers": count_layers(shapes, "block."),
        "num_decoder_layers": 0,
        "d_kv": 64,
        "num_heads": shapes["block.0.layer.0.SelfAttention.q.weight"][0] // 64,
        "d_ff": shapes["block.0.layer.1.DenseReluDense.wo.weight"][1],
    }
