"""CoCa's released files: open_clip's.

Source: https://github.com/mlfoundations/open_clip at 89fb801.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from hfvlm.checkpoints.conversion import Conversion, always
from hfvlm.checkpoints.key_table import Row, scalar, split, transpose
from hfvlm.checkpoints.originals import UnsupportedOriginalError, check_options, count_layers, original_config
from hfvlm.conversion.blocks import openai_layers, openai_vision_rows
from hfvlm.conversion.clip import VOCABULARIES, vision_sizes
from hfvlm.conversion.processors import open_clip_pixels, paired, sized, special_tokens
from hfvlm.models.coca.configuration_coca import HfvlmCoCaConfig, HfvlmCoCaTextConfig, HfvlmCoCaVisionConfig
from hfvlm.models.coca.processing_coca import HfvlmCoCaImageProcessor, HfvlmCoCaProcessor, HfvlmCoCaTokenizer


def keys_for(config: HfvlmCoCaConfig, layout: str = "open_clip", keys: Iterable[str] = ()) -> list[Row]:
    """Return the rows for a file of `layout`, which is "open_clip"."""
    if layout != "open_clip":
        raise UnsupportedOriginalError("transformers has no CoCa; its files are open_clip's.")
    return [
        Row("logit_scale", "logit_scale.scale", scalar),
        *openai_vision_rows("visual", "vision_model"),
        *pooler_rows(config.vision_config),
        Row("text.cls_emb", "text_model.class_token"),
        Row("text.positional_embedding", "text_model.position"),
        Row("text.token_embedding.weight", "text_model.token.weight"),
        *openai_layers("text.transformer.resblocks", "text_model.layers"),
        Row("text.ln_final.{}", "text_model.post_norm.{}"),
        Row("text.text_projection", "text_model.projection.weight", transpose),
        *openai_layers("text_decoder.resblocks", "text_model.multimodal_layers"),
        *openai_layers("text_decoder.cross_attn", "text_model.grounding_layers"),
        Row("text_decoder.cross_attn.{}.ln_1_kv.{}", "text_model.grounding_layers.{}.context_norm.{}"),
        Row("text_decoder.ln_final.{}", "text_model.multimodal_norm.{}"),
        Row("text_decoder.text_projection", "text_model.lm_head.weight", transpose),
    ]


def pooler_rows(config: HfvlmCoCaVisionConfig) -> list[Row]:
    """Return the rows of the pooler: one tensor holds the weights of query, key and value, where they are equally
    wide."""
    theirs, ours = "visual.attn_pool", "vision_model.pool"
    parts = [f"{ours}.attention.{part}_proj" for part in "qkv"]
    weights = [Row(f"{theirs}.attn.{part}_proj_weight", f"{ours}.attention.{part}_proj.weight") for part in "qkv"]
    if config.projection_dim == config.hidden_size:
        weights = [Row(f"{theirs}.attn.in_proj_weight", tuple(f"{part}.weight" for part in parts), split(3))]
    return [
        Row(f"{theirs}.query", f"{ours}.queries"),
        Row(f"{theirs}.ln_q.{{}}", f"{ours}.query_norm.{{}}"),
        Row(f"{theirs}.ln_k.{{}}", f"{ours}.context_norm.{{}}"),
        *weights,
        Row(f"{theirs}.attn.in_proj_bias", tuple(f"{part}.bias" for part in parts), split(3)),
        Row(f"{theirs}.attn.out_proj.{{}}", f"{ours}.attention.out_proj.{{}}"),
    ]


# How a fresh model starts; trained values are in a file's tensors.
START = ("init_logit_scale", "nonscalar_logit_scale")
TOWER = ("image_size", "layers", "width", "head_width", "patch_size", "mlp_ratio")
DECODER = ("context_length", "vocab_size", "width", "heads", "layers", "mlp_ratio")
# Nothing in the original reads these.
UNUSED = ("attn_pooler_heads", "n_queries", "dim_head")
MODEL = (*START, "embed_dim", "vision_cfg", "text_cfg", "multimodal_cfg", "custom_text", "quick_gelu", "pad_id")
POOLER = ("attentional_pool", "attn_pooler_queries", "attn_pooler_heads")
VISION = (*TOWER, *POOLER, "patch_dropout", "output_tokens")
TEXT = (*DECODER, "embed_cls", "correct_cls_mask", "output_tokens", "pad_id")
MULTIMODAL = (*DECODER, *UNUSED, "output_tokens")


def config_from_original(original: Mapping[str, Any], state_dict: Mapping[str, Tensor]) -> HfvlmCoCaConfig:
    """Read open_clip's model config; what it leaves out has the defaults of open_clip's classes."""
    original = original_config(original)
    vision, text, multimodal = (original[f"{name}_cfg"] for name in ("vision", "text", "multimodal"))
    check_options("open_clip's model config", original, MODEL)
    check_options("open_clip's vision_cfg", vision, VISION)
    check_options("open_clip's text_cfg", text, TEXT)
    check_options("open_clip's multimodal_cfg", multimodal, MULTIMODAL)
    if vision.get("attentional_pool") is not True or not text.get("embed_cls"):
        raise UnsupportedOriginalError(
            "hfvlm implements CoCa with attentional_pool true (of vision_cfg) and embed_cls (of text_cfg) alone, as "
            "all released checkpoints have them."
        )
    act = "quick_gelu" if original.get("quick_gelu") else "gelu"
    shapes = {key: tensor.shape for key, tensor in state_dict.items()}
    return HfvlmCoCaConfig(
        vision_config=_vision_config(shapes, vision, act),
        text_config=_text_config(shapes, text, multimodal, act, original.get("pad_id", 0)),
    )


def _vision_config(shapes: Mapping[str, Any], vision: Mapping[str, Any], act: str) -> HfvlmCoCaVisionConfig:
    return HfvlmCoCaVisionConfig(
        **vision_sizes(shapes, vision.get("head_width"), vision.get("image_size")),
        patch_dropout=vision.get("patch_dropout", 0.0),
        hidden_act=act,
        projection_dim=shapes["visual.proj"][1],
        num_queries=shapes["visual.attn_pool.query"][0],
        pooler_heads=vision.get("attn_pooler_heads", 8),
    )


def _text_config(
    shapes: Mapping[str, Any], text: Mapping[str, Any], multimodal: Mapping[str, Any], act: str, pad: int
) -> HfvlmCoCaTextConfig:
    vocabulary, width = shapes["text.token_embedding.weight"]
    lower, upper = (count_layers(shapes, f"{name}.resblocks.") for name in ("text.transformer", "text_decoder"))
    sizes = {shapes[f"{name}.resblocks.0.mlp.c_fc.weight"][0] for name in ("text.transformer", "text_decoder")}
    if len(sizes) > 1:
        raise UnsupportedOriginalError("hfvlm implements CoCa with one mlp_ratio in both halves of the text decoder.")
    return HfvlmCoCaTextConfig(
        vocab_size=vocabulary,
        max_position_embeddings=shapes["text.positional_embedding"][0] - 1,
        hidden_size=width,
        intermediate_size=sizes.pop(),
        num_hidden_layers=lower + upper,
        num_attention_heads=text.get("heads", 8),
        multimodal_layers=upper,
        multimodal_heads=multimodal.get("heads", 8),
        hidden_act=act,
        projection_dim=shapes["text.text_projection"][1],
        correct_class_mask=text.get("correct_cls_mask", False),
        **special_tokens(vocabulary, text.get("pad_id", pad)),
    )


def settings_from_original(original: Mapping[str, Any], preprocessing: Mapping[str, Any]) -> dict[str, Any]:
    """Return the processor's settings, from open_clip's `preprocess_cfg`."""
    return {"image_processor": open_clip_pixels(original["preprocess_cfg"])} if "preprocess_cfg" in original else {}


image_processor_for = sized(HfvlmCoCaImageProcessor)
processor_for = paired(HfvlmCoCaProcessor, image_processor_for, HfvlmCoCaTokenizer)
CONVERSION = Conversion(
    config_from_original=config_from_original,
    keys_for=keys_for,
    layout_of=always("open_clip"),
    settings_from_original=settings_from_original,
    image_processor_for=image_processor_for,
    processor_for=processor_for,
    vocabularies_for=always([VOCABULARIES]),
)
