"""CLIP's released files: OpenAI's archives, open_clip's files of the same layout, and transformers' folders.

Sources: https://github.com/openai/CLIP at d05afc4, https://github.com/mlfoundations/open_clip at 89fb801.
"""

from collections.abc import Iterable, Mapping
from math import isqrt
from pathlib import Path
from typing import Any

from torch import Tensor

from hfvlm.checkpoints.key_table import Row, scalar, split, transpose
from hfvlm.conversion import (
    UnsupportedOriginalError,
    check_options,
    count_layers,
    open_clip_pixels,
    original_config,
    tokenizer_for,
    transformers_pixels,
)
from hfvlm.models.clip.configuration_clip import (
    HfvlmCLIPConfig,
    HfvlmCLIPResNetConfig,
    HfvlmCLIPTextConfig,
    HfvlmCLIPVisionConfig,
)
from hfvlm.models.clip.processing_clip import HfvlmCLIPImageProcessor, HfvlmCLIPProcessor, HfvlmCLIPTokenizer

VOCABULARIES = ("bpe_simple_vocab_16e6.txt.gz", "bpe_simple_vocab.txt.gz", "tokenizer.json")
# Sizes that the archives repeat as entries of their own.
ARCHIVE_ENTRIES = ("input_resolution", "context_length", "vocab_size")
# Fields that mean the same in transformers' configurations.
NATIVE_SIZES = (
    *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("hidden_act", "layer_norm_eps", "attention_dropout"),
)


def layout_of(original: Mapping[str, Any]) -> str:
    model_type = original.get("model_type", "")
    if model_type.startswith("hfvlm_clip"):
        return "hfvlm"
    return "transformers" if model_type in ("clip", "clip_vision_model") else "openai"


def keys_for(config: HfvlmCLIPConfig, layout: str = "openai", keys: Iterable[str] = ()) -> list[Row]:
    """The rows for a file of `layout`: "openai", which is also open_clip's, or "transformers"."""
    resnet = isinstance(config.vision_config, HfvlmCLIPResNetConfig)
    if layout == "transformers":
        if resnet:
            raise UnsupportedOriginalError(
                "transformers' CLIPModel has no ResNet tower; only ViT models can be exchanged."
            )
        return transformers_rows()
    prefix = (
        "text." if "text.text_projection" in set(keys) else ""
    )  # open_clip's models with a text tower of their own
    return [
        Row("logit_scale", "logit_scale.scale", scalar),
        *(Row(name, None, optional=True) for name in ARCHIVE_ENTRIES),
        *(resnet_rows() if resnet else vision_rows("visual", "vision_model")),
        Row(f"{prefix}token_embedding.weight", "text_model.embeddings.token.weight"),
        Row(f"{prefix}positional_embedding", "text_model.embeddings.position"),
        *resblocks(f"{prefix}transformer.resblocks", "text_model.layers"),
        Row(f"{prefix}ln_final.{{}}", "text_model.post_norm.{}"),
        Row(f"{prefix}text_projection", "text_model.projection.weight", transpose),
    ]


def vision_rows(source: str, target: str) -> list[Row]:
    return [
        Row(f"{source}.conv1.weight", f"{target}.patches.projection.weight"),
        Row(f"{source}.class_embedding", f"{target}.class_token"),
        Row(f"{source}.positional_embedding", f"{target}.position"),
        Row(f"{source}.ln_pre.{{}}", f"{target}.pre_norm.{{}}"),
        *resblocks(f"{source}.transformer.resblocks", f"{target}.layers"),
        Row(f"{source}.ln_post.{{}}", f"{target}.post_norm.{{}}"),
        Row(f"{source}.proj", f"{target}.projection.weight", transpose),
    ]


def resblocks(source: str, target: str) -> list[Row]:
    """OpenAI's transformer layers, which open_clip's other models share."""
    qkv = tuple(f"{target}.{{}}.attention.{part}_proj.{{}}" for part in "qkv")
    return [
        Row(f"{source}.{{}}.attn.in_proj_{{}}", qkv, split(3)),
        Row(f"{source}.{{}}.attn.out_proj.{{}}", f"{target}.{{}}.attention.out_proj.{{}}"),
        Row(f"{source}.{{}}.ln_1.{{}}", f"{target}.{{}}.attention_norm.{{}}"),
        Row(f"{source}.{{}}.mlp.c_fc.{{}}", f"{target}.{{}}.mlp.fc1.{{}}"),
        Row(f"{source}.{{}}.mlp.c_proj.{{}}", f"{target}.{{}}.mlp.fc2.{{}}"),
        Row(f"{source}.{{}}.ln_2.{{}}", f"{target}.{{}}.mlp_norm.{{}}"),
    ]


def resnet_rows() -> list[Row]:
    return [
        Row("visual.conv{}.weight", "vision_model.stem.conv{}.conv.weight"),
        Row("visual.bn{}.{}", "vision_model.stem.conv{}.norm.{}"),
        Row("visual.layer{}.{}.conv{}.weight", "vision_model.stage{}.{}.conv{}.conv.weight"),
        Row("visual.layer{}.{}.bn{}.{}", "vision_model.stage{}.{}.conv{}.norm.{}"),
        Row("visual.layer{}.{}.downsample.0.weight", "vision_model.stage{}.{}.shortcut.conv.weight"),
        Row("visual.layer{}.{}.downsample.1.{}", "vision_model.stage{}.{}.shortcut.norm.{}"),
        Row("visual.attnpool.positional_embedding", "vision_model.position"),
        *(Row(f"visual.attnpool.{part}_proj.{{}}", f"vision_model.pool.{part}_proj.{{}}") for part in "qkv"),
        Row("visual.attnpool.c_proj.{}", "vision_model.pool.out_proj.{}"),
    ]


def transformers_rows() -> list[Row]:
    text = "text_model"
    return [
        Row("logit_scale", "logit_scale.scale", scalar),
        *transformers_vision_rows("vision_model", "vision_model"),
        Row("visual_projection.weight", "vision_model.projection.weight"),
        # Files from before transformers 4.31 store the counting numbers.
        Row(f"{text}.embeddings.position_ids", None, optional=True),
        Row(f"{text}.embeddings.token_embedding.weight", f"{text}.embeddings.token.weight"),
        Row(f"{text}.embeddings.position_embedding.weight", f"{text}.embeddings.position"),
        *transformers_layers(text),
        Row(f"{text}.final_layer_norm.{{}}", f"{text}.post_norm.{{}}"),
        Row("text_projection.weight", f"{text}.projection.weight"),
    ]


def transformers_vision_rows(source: str, target: str) -> list[Row]:
    """The vision tower without its projection."""
    return [
        Row(f"{source}.embeddings.position_ids", None, optional=True),
        Row(f"{source}.embeddings.patch_embedding.weight", f"{target}.patches.projection.weight"),
        Row(f"{source}.embeddings.class_embedding", f"{target}.class_token"),
        Row(f"{source}.embeddings.position_embedding.weight", f"{target}.position"),
        Row(f"{source}.pre_layrnorm.{{}}", f"{target}.pre_norm.{{}}"),
        *transformers_layers(source, target),
        Row(f"{source}.post_layernorm.{{}}", f"{target}.post_norm.{{}}"),
    ]


def transformers_layers(source: str, target: str = "") -> list[Row]:
    """The layers of transformers' CLIP, which its SigLIP shares."""
    source, target = f"{source}.encoder.layers.{{}}", f"{target or source}.layers.{{}}"
    return [
        Row(f"{source}.self_attn.{{}}.{{}}", f"{target}.attention.{{}}.{{}}"),
        Row(f"{source}.layer_norm1.{{}}", f"{target}.attention_norm.{{}}"),
        Row(f"{source}.mlp.{{}}.{{}}", f"{target}.mlp.{{}}.{{}}"),
        Row(f"{source}.layer_norm2.{{}}", f"{target}.mlp_norm.{{}}"),
    ]


def tower_rows(layout: str, keys: Iterable[str]) -> list[Row]:
    """For models that read a CLIP's vision transformer: its rows without the projection, and what they leave out.

    `layout` is "openai", "transformers" (CLIPModel's or CLIPVisionModel's folder) or "hfvlm".
    """
    if layout == "openai":
        rows = [row for row in vision_rows("visual", "vision_model") if row.source != "visual.proj"]
        left_out = [
            "visual.proj",
            "text_projection",
            "transformer.{...}",
            "text.{...}",
            "ln_final.{}",
            *ARCHIVE_ENTRIES,
        ]
        left_out += ["token_embedding.weight", "positional_embedding", "logit_scale"]
    elif layout == "transformers":
        prefix = "vision_model" if any(key.startswith("vision_model.") for key in keys) else ""
        rows = transformers_vision_rows(prefix, "vision_model")
        rows = [row._replace(source=row.source.removeprefix(".")) for row in rows]
        left_out = ["visual_projection.weight", "text_projection.weight", "text_model.{...}", "logit_scale"]
    else:
        parts = ("patches.{...}", "class_token", "position", "pre_norm.{}", "layers.{...}", "post_norm.{}")
        rows = [Row(f"vision_model.{part}", f"vision_model.{part}") for part in parts]
        left_out = ["vision_model.projection.weight", "text_model.{...}", "logit_scale.{}"]
    # The text tower, the temperature and the projections are for comparing pictures with texts.
    return [*rows, *(Row(name, None, optional=True) for name in left_out)]


def config_from_original(original: Mapping[str, Any], state_dict: Mapping[str, Tensor]) -> HfvlmCLIPConfig:
    """OpenAI's constructor arguments (none are needed), open_clip's model config, or transformers' config.json."""
    original = original_config(original)
    if original.get("model_type") == "clip":
        return _from_transformers(original)
    if "vision_cfg" in original:
        return _from_open_clip(original, state_dict)
    return HfvlmCLIPConfig(
        vision_config=_vision_config(state_dict, "quick_gelu"),
        text_config=_text_config(state_dict, "quick_gelu", original.get("transformer_heads")),
    )


def _from_open_clip(original: Mapping[str, Any], state_dict: Mapping[str, Tensor]) -> HfvlmCLIPConfig:
    vision, text = original["vision_cfg"], original["text_cfg"]
    known = ("embed_dim", "vision_cfg", "text_cfg", "quick_gelu", "custom_text")
    check_options("open_clip's model config", original, known)
    sizes = ("image_size", "layers", "width", "head_width", "patch_size", "mlp_ratio")
    check_options("open_clip's vision_cfg", vision, sizes)
    check_options(
        "open_clip's text_cfg", text, ("context_length", "vocab_size", "width", "heads", "layers", "mlp_ratio")
    )
    act = "quick_gelu" if original.get("quick_gelu") else "gelu"
    config = _vision_config(state_dict, act, vision.get("head_width"), vision.get("image_size"))
    return HfvlmCLIPConfig(vision_config=config, text_config=_text_config(state_dict, act, text.get("heads")))


def _vision_config(
    state_dict: Mapping[str, Tensor], act: str, head_width: int | None = None, image_size: Any = None
) -> HfvlmCLIPVisionConfig | HfvlmCLIPResNetConfig:
    shapes = {key: tensor.shape for key, tensor in state_dict.items()}
    if "visual.attnpool.c_proj.weight" in shapes:
        stem = shapes["visual.conv3.weight"][0]
        return HfvlmCLIPResNetConfig(
            image_size=32 * isqrt(shapes["visual.attnpool.positional_embedding"][0] - 1),
            stem_size=stem,
            depths=[count_layers(shapes, f"visual.layer{stage}.") for stage in (1, 2, 3, 4)],
            projection_dim=shapes["visual.attnpool.c_proj.weight"][0],
            num_attention_heads=stem * 32 // 64,
        )
    sizes = vision_sizes(shapes, head_width, image_size)
    return HfvlmCLIPVisionConfig(**sizes, hidden_act=act, projection_dim=shapes["visual.proj"][1])


def vision_sizes(shapes: Mapping[str, Any], head_width: int | None = None, image_size: Any = None) -> dict[str, Any]:
    """Of OpenAI's vision transformer, which open_clip's other models share."""
    width, channels, patch, _ = shapes["visual.conv1.weight"]
    return {
        "image_size": image_size or patch * isqrt(shapes["visual.positional_embedding"][0] - 1),
        "patch_size": patch,
        "num_channels": channels,
        "hidden_size": width,
        "intermediate_size": shapes["visual.transformer.resblocks.0.mlp.c_fc.weight"][0],
        "num_hidden_layers": count_layers(shapes, "visual.transformer.resblocks."),
        "num_attention_heads": width // (head_width or 64),
    }


def _text_config(state_dict: Mapping[str, Tensor], act: str, heads: int | None) -> HfvlmCLIPTextConfig:
    prefix = "text." if "text.text_projection" in state_dict else ""
    shapes = {key.removeprefix(prefix): tensor.shape for key, tensor in state_dict.items() if key.startswith(prefix)}
    vocabulary, width = shapes["token_embedding.weight"]
    return HfvlmCLIPTextConfig(
        vocab_size=vocabulary,
        max_position_embeddings=shapes["positional_embedding"][0],
        hidden_size=width,
        intermediate_size=shapes["transformer.resblocks.0.mlp.c_fc.weight"][0],
        num_hidden_layers=count_layers(shapes, "transformer.resblocks."),
        num_attention_heads=heads or width // 64,
        hidden_act=act,
        projection_dim=shapes["text_projection"][1],
        **special_tokens(vocabulary),
    )


def special_tokens(vocabulary: int) -> dict[str, Any]:
    """The tokenizer's last two ids. Padding is any id: nothing that is read comes after the end-of-text token."""
    return {"bos_token_id": vocabulary - 2, "eos_token_id": vocabulary - 1, "pad_token_id": vocabulary - 1}


def _from_transformers(original: Mapping[str, Any]) -> HfvlmCLIPConfig:
    from transformers import CLIPConfig

    native: Any = CLIPConfig(**original)
    text = native.text_config
    return HfvlmCLIPConfig(
        vision_config=vision_config_of(native.vision_config, native.projection_dim),
        text_config=HfvlmCLIPTextConfig(
            projection_dim=native.projection_dim,
            **{name: getattr(text, name) for name in (*NATIVE_SIZES, "vocab_size", "max_position_embeddings")},
            **special_tokens(text.vocab_size) | _native_tokens(text),
        ),
        logit_scale_init_value=native.logit_scale_init_value,
    )


def vision_config_of(native: Any, projection_dim: int | None = None) -> HfvlmCLIPVisionConfig:
    """Of transformers' CLIPVisionConfig; without a projection the tower is one that other models read."""
    sizes = {name: getattr(native, name) for name in (*NATIVE_SIZES, "image_size", "patch_size", "num_channels")}
    return HfvlmCLIPVisionConfig(projection_dim=projection_dim, **sizes)


def _native_tokens(text: Any) -> dict[str, Any]:
    """Released folders say that end-of-text is 2, which transformers itself reads as "the largest id"."""
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    return {} if text.eos_token_id == 2 else {name: getattr(text, name) for name in names}


def settings_from_original(original: Mapping[str, Any], preprocessing: Mapping[str, Any]) -> dict[str, Any]:
    """Of the processor, from open_clip's `preprocess_cfg` or transformers' preprocessor_config.json."""
    if "preprocess_cfg" in original:
        return {"image_processor": open_clip_pixels(original["preprocess_cfg"])}
    return {"image_processor": transformers_pixels(preprocessing)}


def image_processor_for(config: HfvlmCLIPConfig, settings: Mapping[str, Any]) -> HfvlmCLIPImageProcessor:
    return HfvlmCLIPImageProcessor(**{"size": config.vision_config.image_size} | settings.get("image_processor", {}))


def processor_for(config: HfvlmCLIPConfig, settings: Mapping[str, Any], vocabulary: Path) -> HfvlmCLIPProcessor:
    """The processor; `vocabulary` is one of VOCABULARIES."""
    tokenizer = tokenizer_for(HfvlmCLIPTokenizer, config.text_config, settings, vocabulary)
    return HfvlmCLIPProcessor(image_processor_for(config, settings), tokenizer)


def config_to_transformers(config: HfvlmCLIPConfig) -> Any:
    """transformers' CLIPConfig of the same model."""
    from transformers import CLIPConfig

    if isinstance(config.vision_config, HfvlmCLIPResNetConfig):
        raise UnsupportedOriginalError(
            "transformers' CLIPModel has no ResNet tower; only ViT models can be exchanged."
        )
    vision, text = config.vision_config.to_diff_dict(), config.text_config.to_diff_dict()
    return CLIPConfig(
        architectures=["CLIPModel"],
        projection_dim=config.vision_config.projection_dim,
        vision_config=vision | {"model_type": "clip_vision_model"},
        text_config=text | {"model_type": "clip_text_model"},
        logit_scale_init_value=config.logit_scale_init_value,
    )


def processor_to_transformers(processor: HfvlmCLIPProcessor) -> Any:
    """transformers' CLIPProcessor of the same vocabulary and pixels.

    Its tokenizer does not repair broken text (ftfy), and its image processor converts to RGB before it resizes and
    crops odd margins one pixel off; both differ from the originals on such inputs.
    """
    import json

    from transformers import CLIPProcessor, CLIPTokenizer
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    pixels = processor.image_processor
    if pixels.resize_mode != "shortest" or pixels.size["height"] != pixels.size["width"]:
        raise UnsupportedOriginalError(
            "transformers' CLIPImageProcessor covers squares only (resize_mode 'shortest')."
        )
    model = json.loads(processor.tokenizer.backend_tokenizer.to_str())["model"]
    tokenizer = CLIPTokenizer(
        vocab=model["vocab"],
        merges=[tuple(merge) for merge in model["merges"]],  # type: ignore[misc]
        model_max_length=processor.tokenizer.model_max_length,
    )
    image_processor = CLIPImageProcessorPil(
        size={"shortest_edge": pixels.size["height"]},
        crop_size=pixels.size,
        resample=pixels.resample,
        image_mean=pixels.image_mean,
        image_std=pixels.image_std,
    )
    return CLIPProcessor(image_processor, tokenizer)
