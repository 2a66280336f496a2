"""Qwen-VL's releases, and adapters that the authors' fine-tuning writes (the code released with Qwen/Qwen-VL-Chat)."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from hfvlm.checkpoints.compositions import merge_lora
from hfvlm.checkpoints.conversion import Conversion, Source, always, part_of
from hfvlm.checkpoints.gptq import dequantized
from hfvlm.checkpoints.key_table import Row, Table, grouped, split, transpose
from hfvlm.checkpoints.originals import UnsupportedOriginalError, check_options
from hfvlm.conversion.processors import check_vocabulary, sized
from hfvlm.models.qwen_vl.configuration_qwen_vl import (
    HfvlmQwenVLConfig,
    HfvlmQwenVLResamplerConfig,
    HfvlmQwenVLTextConfig,
    HfvlmQwenVLVisionConfig,
)
from hfvlm.models.qwen_vl.processing_qwen_vl import (
    CONTROLS,
    REGION_MARKS,
    HfvlmQwenVLImageProcessor,
    HfvlmQwenVLProcessor,
    HfvlmQwenVLTokenizer,
)

VOCABULARIES = ("qwen.tiktoken",)
PARTS = {"base": "the folder of Qwen-VL or Qwen-VL-Chat that an adapter was trained on"}
FILES = {"lora": {"main": ("adapter_model.safetensors", "adapter_model.bin")}}
# Layers with a bias, whatever `no_bias` is.
BIASED = (".attn.c_attn",)
# In the original a head of the resampler is so wide, whatever the width.
RESAMPLER_HEAD = 128


def layout_of(original: Mapping[str, Any]) -> str:
    """Return the layout of a whole model; an adapter is recognised by its file."""
    return "gptq" if original.get("quantization_config") else "original"


def keys_for(config: HfvlmQwenVLConfig, layout: str = "original", keys: Iterable[str] = ()) -> list[Row]:
    """Return the rows of a whole model."""
    return [*vision_rows(config.vision_config.num_attention_heads), *resampler_rows(config), *language_rows(config)]


def vision_rows(heads: int) -> list[Row]:
    layer, ours = "transformer.visual.transformer.resblocks.{}", "vision_model.layers.{}"
    attention = tuple(f"{ours}.attention.{part}_proj.{{}}" for part in "qkv")
    return [
        Row("transformer.visual.conv1.weight", "vision_model.patches.projection.weight"),
        Row("transformer.visual.positional_embedding", "vision_model.position"),
        Row("transformer.visual.ln_pre.{}", "vision_model.pre_norm.{}"),
        Row(f"{layer}.ln_1.{{}}", f"{ours}.attention_norm.{{}}"),
        # Query, key and value of one head stand together.
        Row(f"{layer}.attn.in_proj.{{}}", attention, grouped(heads, 3)),
        Row(f"{layer}.attn.out_proj.{{}}", f"{ours}.attention.out_proj.{{}}"),
        Row(f"{layer}.ln_2.{{}}", f"{ours}.mlp_norm.{{}}"),
        Row(f"{layer}.mlp.c_fc.{{}}", f"{ours}.mlp.fc1.{{}}"),
        Row(f"{layer}.mlp.c_proj.{{}}", f"{ours}.mlp.fc2.{{}}"),
    ]


def resampler_rows(config: HfvlmQwenVLConfig) -> list[Row]:
    pool, projector = "transformer.visual.attn_pool", config.projector_config
    narrow = projector.context_size != projector.hidden_size
    return [
        Row(f"{pool}.query", "projector.query"),
        Row(f"{pool}.pos_embed", "projector.position"),
        *([Row(f"{pool}.kv_proj.weight", "projector.kv_proj.weight")] if narrow else []),
        Row(f"{pool}.ln_q.{{}}", "projector.query_norm.{}"),
        Row(f"{pool}.ln_kv.{{}}", "projector.context_norm.{}"),
        *(
            Row(
                f"{pool}.attn.in_proj_{kind}",
                tuple(f"projector.attention.{part}_proj.{kind}" for part in "qkv"),
                split(3),
            )
            for kind in ("weight", "bias")
        ),
        Row(f"{pool}.attn.out_proj.{{}}", "projector.attention.out_proj.{}"),
        Row("transformer.visual.ln_post.{}", "projector.post_norm.{}"),
        Row("transformer.visual.proj", "projector.projection.weight", transpose),
    ]


def language_rows(config: HfvlmQwenVLConfig) -> list[Row]:
    layer, ours = "transformer.h.{}", "language_model.model.layers.{}"
    attention = tuple(f"{ours}.self_attn.{part}_proj.{{}}" for part in "qkv")
    return [
        Row("transformer.wte.weight", "language_model.model.embed_tokens.weight"),
        Row(f"{layer}.ln_1.weight", f"{ours}.input_layernorm.weight"),
        Row(f"{layer}.attn.c_attn.{{}}", attention, split(3)),
        Row(f"{layer}.attn.c_proj.{{}}", f"{ours}.self_attn.o_proj.{{}}"),
        Row(f"{layer}.ln_2.weight", f"{ours}.post_attention_layernorm.weight"),
        # The second is the gate.
        Row(f"{layer}.mlp.w1.{{}}", f"{ours}.mlp.up_proj.{{}}"),
        Row(f"{layer}.mlp.w2.{{}}", f"{ours}.mlp.gate_proj.{{}}"),
        Row(f"{layer}.mlp.c_proj.{{}}", f"{ours}.mlp.down_proj.{{}}"),
        Row("transformer.ln_f.weight", "language_model.model.norm.weight"),
        Row("lm_head.weight", "language_model.lm_head.weight"),
        # Constants that some versions of the code keep.
        Row(f"{layer}.attn.masked_bias", None, optional=True),
        Row("transformer.rotary_emb.inv_freq", None, optional=True),
    ]


def tables_for(config: HfvlmQwenVLConfig, layout: str, sources: Mapping[str, Source]) -> list[Table]:
    """Return the table of a whole model, which may be quantized, or of an adapter merged into its base.

    Raises:
        FileNotFoundError: an adapter came without its base.
        CheckpointError: a quantized model has no `quantization_config` that hfvlm reads.
    """
    tensors: Mapping[str, Tensor] = sources["main"].tensors
    if layout == "gptq":
        biased = ("",) if config.text_config.linear_bias else BIASED
        tensors = dequantized(tensors, sources["main"].settings.get("quantization_config") or {}, biased)
    if layout == "lora":
        tensors = merge_lora(part_of(sources, "base", PARTS), tensors, sources["main"].settings)
    return [Table(tensors, keys_for(config, layout, tensors))]


def config_from_original(original: Mapping[str, Any], state_dict: Mapping[str, Tensor]) -> HfvlmQwenVLConfig:
    """Read config.json of the release; of an adapter, its base's."""
    own = original.get("base_config") or original.get("config") or original
    check_options("Qwen-VL's config.json", {"tie_word_embeddings": own.get("tie_word_embeddings")}, ())
    if own["kv_channels"] * own["num_attention_heads"] != own["hidden_size"]:
        raise UnsupportedOriginalError(
            f"Qwen-VL's config.json: kv_channels {own['kv_channels']} times num_attention_heads "
            f"{own['num_attention_heads']} must be hidden_size {own['hidden_size']}."
        )
    visual = own["visual"]
    first = visual["image_start_id"] - len(CONTROLS) - len(REGION_MARKS)  # the end of a text; the others follow it
    controls = {"pad_token_id": first, "eos_token_id": [first, first + 2, first + 1]} if first > 0 else {}
    return HfvlmQwenVLConfig(
        vision_config=HfvlmQwenVLVisionConfig(
            hidden_size=visual["width"],
            intermediate_size=int(visual["width"] * visual["mlp_ratio"]),
            num_hidden_layers=visual["layers"],
            num_attention_heads=visual["heads"],
            image_size=visual["image_size"],
            patch_size=visual["patch_size"],
        ),
        projector_config=HfvlmQwenVLResamplerConfig(
            context_size=visual["width"],
            hidden_size=visual["output_dim"],
            num_attention_heads=visual["output_dim"] // RESAMPLER_HEAD,
            num_queries=visual.get("n_queries", 256),
        ),
        text_config=HfvlmQwenVLTextConfig(
            hidden_size=own["hidden_size"],
            # The original counts both halves of the gated layer.
            intermediate_size=own["intermediate_size"] // 2,
            num_hidden_layers=own["num_hidden_layers"],
            num_attention_heads=own["num_attention_heads"],
            layer_norm_eps=own["layer_norm_epsilon"],
            vocab_size=own["vocab_size"],
            max_position_embeddings=own.get("max_position_embeddings", 8192),
            trained_length=own["seq_length"],
            dynamic_ntk=own.get("use_dynamic_ntk", True),
            logn_attention=own.get("use_logn_attn", True),
            linear_bias=not own.get("no_bias", True),
            rope_theta=own.get("rotary_emb_base", 10000),
            rotary_share=own.get("rotary_pct", 1.0),
            embedding_dropout=own.get("emb_dropout_prob", 0.0),
            attention_dropout=own.get("attn_dropout_prob", 0.0),
            initializer_range=own.get("initializer_range", 0.02),
            **controls,
        ),
        image_token_id=visual["image_start_id"] + 2,
    )


image_processor_for = sized(HfvlmQwenVLImageProcessor)


def processor_for(config: HfvlmQwenVLConfig, settings: Mapping[str, Any], vocabulary: Path) -> HfvlmQwenVLProcessor:
    """Return the processor; `vocabulary` is the release's `qwen.tiktoken`."""
    processor = HfvlmQwenVLProcessor(
        image_processor_for(config, settings),
        HfvlmQwenVLTokenizer.from_vocabulary(vocabulary, **settings.get("tokenizer", {})),
        num_queries=config.projector_config.num_queries,
        **{name: settings[name] for name in ("conversation", "picture_colon") if name in settings},
    )
    check_vocabulary(vocabulary, processor.image_token_id, config.image_token_id, "placeholder is", "image_token_id")
    return processor


# Qwen-VL and Qwen-VL-Chat have one config.json; the settings are the latter's.
CONVERSION = Conversion(
    config_from_original=config_from_original,
    keys_for=keys_for,
    layout_of=layout_of,
    settings_from_original=always({"conversation": "chatml"}),
    image_processor_for=image_processor_for,
    processor_for=processor_for,
    vocabularies_for=always([VOCABULARIES]),
    parts=PARTS,
    files=FILES,
    compose=tables_for,
)
