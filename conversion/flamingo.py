"""OpenFlamingo's releases: what was trained, to be put between a CLIP and a language model.

Source: https://github.com/mlfoundations/open_flamingo at 655f693.
"""

from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import AutoConfig, GPTJConfig, GPTNeoXConfig, LlamaConfig, MptConfig, OPTConfig

from hfvlm.checkpoints import CheckpointError
from hfvlm.checkpoints.compositions import with_average_rows
from hfvlm.checkpoints.conversion import Conversion, Source, always, part_of
from hfvlm.checkpoints.key_table import Change, Row, Table, split, tied
from hfvlm.checkpoints.originals import UnsupportedOriginalError, check_options, count_layers
from hfvlm.checkpoints.saving import LazyTensors
from hfvlm.conversion.blocks import (
    LLAMA_FIELDS,
    MPT_FIELDS,
    OPT_FIELDS,
    gpt_neox_rows,
    gptj_rows,
    llama_rows,
    mpt_rows,
    openai_vision_rows,
    opt_rows,
)
from hfvlm.conversion.interop import clip as clip_interop
from hfvlm.conversion.llava import vision_table
from hfvlm.conversion.processors import check_vocabulary, sized
from hfvlm.models.clip.configuration_clip import HfvlmCLIPVisionConfig
from hfvlm.models.flamingo.configuration_flamingo import (
    HfvlmFlamingoConfig,
    HfvlmFlamingoMPTConfig,
    HfvlmFlamingoResamplerConfig,
)
from hfvlm.models.flamingo.processing_flamingo import (
    ENDOFCHUNK,
    IMAGE,
    HfvlmFlamingoImageProcessor,
    HfvlmFlamingoProcessor,
    HfvlmFlamingoTokenizer,
)
from hfvlm.models.llava.configuration_llava import openai_vision_config

VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json")
PARTS = {
    "base": "the language model that the release was trained on, its authors' folder",
    "vision": "OpenAI's CLIP ViT-L/14, transformers' folder or OpenAI's file",
}
FILES = {"trained": {"main": ("checkpoint.pt",)}}
# Of each kind of language model: where its layers are, its table of words, its output layer if that is another, and
# the rows of all its weights.
KINDS: dict[str, tuple[str, str, str | None, Any]] = {
    "mpt": ("transformer.blocks", "transformer.wte.weight", None, mpt_rows),
    "hfvlm_flamingo_mpt": ("transformer.blocks", "transformer.wte.weight", None, partial(mpt_rows, normalised=True)),
    "gpt_neox": ("gpt_neox.layers", "gpt_neox.embed_in.weight", "embed_out.weight", gpt_neox_rows),
    "llama": ("model.layers", "model.embed_tokens.weight", "lm_head.weight", llama_rows),
    "opt": (
        "model.decoder.layers",
        "model.decoder.embed_tokens.weight",
        None,
        partial(opt_rows, "model.decoder", "lm_head"),
    ),
    "gptj": ("transformer.h", "transformer.wte.weight", "lm_head.weight", gptj_rows),
}
# Prefixes of the language model in a whole checkpoint, and of a layer of it with cross-attention to images.
LANGUAGE, LAYER = "lang_encoder.", "decoder_layer."
# An embedding for each image of a text, with an axis for its patches.
of_all_patches = Change(lambda table: table.squeeze(1), lambda table: table.unsqueeze(1))
# Layers that are there a second time, under the names that they had while the model was put together.
REPEATED = [
    Row(f"{LANGUAGE}{name}.{{...}}", None, optional=True) for name in ("gated_cross_attn_layers", "old_decoder_blocks")
]


def keys_for(config: HfvlmFlamingoConfig, layout: str = "original", keys: Iterable[str] = ()) -> list[Row]:
    """Return the rows for the main file: of a whole model, or of what was trained."""
    if layout == "original":
        vision = openai_vision_rows("vision_encoder", "vision_model")
        return [
            *(row if row.source != "vision_encoder.proj" else Row(row.source, None) for row in vision),
            *trained_rows(config),
            *language_rows(config, LANGUAGE, LAYER),
            *REPEATED,
        ]
    # The output layer is in files of language models that call it an embedding.
    heads = [Row(row.source, row.target, row.change, optional=True) for row in table_rows(config, LANGUAGE)]
    # What is computed is in files that keep the buffers of layers whose weights they leave out.
    computed = [row for row in language_rows(config, LANGUAGE, LAYER) if row.target is None and row not in heads]
    return [*trained_rows(config), *heads, *computed, *REPEATED]


def trained_rows(config: HfvlmFlamingoConfig) -> list[Row]:
    """Return the rows of the resampler and the layers of cross-attention to images."""
    layers, *_ = kind_of(config)
    cross, gate = f"{LANGUAGE}{layers}.{{}}.gated_cross_attn_layer", "gates.{}"
    latents, ours = "perceiver.layers.{}", "resampler.layers.{}"
    return [
        Row("perceiver.latents", "resampler.latents"),
        Row("perceiver.frame_embs", "resampler.frame_positions", optional=True),
        Row("perceiver.media_time_embs", "resampler.media_positions", of_all_patches, optional=True),
        Row(f"{latents}.0.norm_media.{{}}", f"{ours}.context_norm.{{}}"),
        Row(f"{latents}.0.norm_latents.{{}}", f"{ours}.attention_norm.{{}}"),
        *attention_rows(f"{latents}.0", f"{ours}.attention"),
        *feed_forward_rows(f"{latents}.1", ours),
        Row("perceiver.norm.{}", "resampler.post_norm.{}"),
        Row(f"{cross}.attn_gate", f"{gate}.attention_gate.weight"),
        Row(f"{cross}.ff_gate", f"{gate}.mlp_gate.weight"),
        Row(f"{cross}.attn.norm.{{}}", f"{gate}.attention_norm.{{}}"),
        *attention_rows(f"{cross}.attn", f"{gate}.attention"),
        *feed_forward_rows(f"{cross}.ff", gate),
    ]


def attention_rows(source: str, target: str) -> list[Row]:
    return [
        Row(f"{source}.to_q.weight", f"{target}.q_proj.weight"),
        Row(f"{source}.to_kv.weight", (f"{target}.k_proj.weight", f"{target}.v_proj.weight"), split(2)),
        Row(f"{source}.to_out.weight", f"{target}.out_proj.weight"),
    ]


def feed_forward_rows(source: str, target: str) -> list[Row]:
    return [
        Row(f"{source}.0.{{}}", f"{target}.mlp_norm.{{}}"),
        Row(f"{source}.1.weight", f"{target}.mlp.fc1.weight"),
        Row(f"{source}.3.weight", f"{target}.mlp.fc2.weight"),
    ]


def kind_of(config: HfvlmFlamingoConfig) -> tuple[str, str, str | None, Any]:
    name = config.text_config.model_type
    if name not in KINDS:
        raise UnsupportedOriginalError(
            f"text_config: hfvlm has no key table of Flamingo on {name!r}, but on {', '.join(KINDS)}."
        )
    plain = name == "hfvlm_flamingo_mpt" and not config.text_config.attn_config.qk_ln
    return KINDS["mpt" if plain else name]


def language_rows(config: HfvlmFlamingoConfig, prefix: str = "", layer: str = "") -> list[Row]:
    """Return the rows of the language model, whose layers are inside those of cross-attention."""
    layers, words, head, make = kind_of(config)
    place, rows = f"{layers}.{{}}.", make()
    if head and config.text_config.tie_word_embeddings:
        targets = {row.source: row.target for row in rows}
        one = Row(words, (targets[words], targets[head]), tied(2))
        rows = [one, Row(head, None, optional=True), *(row for row in rows if row.source not in (words, head))]

    def inside(name: Any, what: str) -> Any:
        if isinstance(name, tuple):
            return tuple(inside(item, what) for item in name)
        return name and name.replace(place, f"{place}{what}")

    return [Row(f"{prefix}{inside(r.source, layer)}", inside(r.target, "layer."), r.change, r.optional) for r in rows]


def table_rows(config: HfvlmFlamingoConfig, prefix: str = "") -> list[Row]:
    """Return the rows of the tables with a row for each token: of the embeddings, and of an output layer."""
    _, words, head, _ = kind_of(config)
    tables = (words, head, head and head.replace(".weight", ".bias"))
    return [row for row in language_rows(config, prefix) if row.source in [f"{prefix}{name}" for name in tables]]


def tables_for(config: HfvlmFlamingoConfig, layout: str, sources: Mapping[str, Source]) -> list[Table]:
    """Return each source's tensors with their rows.

    Raises:
        FileNotFoundError: a part is needed, and was not given.
        CheckpointError: a part was given that the checkpoint holds itself.
    """
    main = sources["main"].tensors
    if layout == "original":
        if surplus := sorted(set(PARTS) & set(sources)):
            raise CheckpointError(f"This checkpoint is a whole model: leave {', '.join(surplus)} out.")
        return [Table(main, keys_for(config, layout))]
    base = named_whole(part_of(sources, "base", PARTS))
    tables = {row.source for row in table_rows(config)}
    trained = {key.removeprefix(LANGUAGE) for key in main}
    size = config.text_config.vocab_size
    # Tables that were trained replace the base's; the others get rows for the tokens that were added.
    longer = LazyTensors({key: partial(resized, base, key, size) for key in tables & set(base)})
    rows = [Row(row.source, None) if row.source in tables & trained else row for row in language_rows(config)]
    return [
        Table(main, keys_for(config, layout), "trained"),
        Table(LazyTensors.of(base) | longer, rows, "base"),
        vision_table(sources, PARTS),
    ]


def named_whole(tensors: Mapping[str, Tensor]) -> LazyTensors:
    """Give OPT's first files, which leave it out, the name of the whole."""
    names = {f"model.{key}" if key.startswith("decoder.") else key: key for key in tensors}
    return LazyTensors({ours: partial(tensors.__getitem__, key) for ours, key in names.items()})


def resized(base: Mapping[str, Tensor], key: str, size: int) -> Tensor:
    """Give a table a row for each token. Language models have rows to spare; tokens that were added after the last,
    for which the original has noise, get the average token's, whose logits are never the largest."""
    table = base[key]
    return table[:size] if len(table) >= size else with_average_rows(table, size - len(table))


def config_from_original(original: Mapping[str, Any], state_dict: Mapping[str, Tensor]) -> HfvlmFlamingoConfig:
    """Read the arguments of the original's `create_model_and_transforms`: "cross_attn_every_n_layers" and the token
    ids, with the configurations of the language model, "base_config", and of the tower, "vision_config", where they
    are at hand; the rest from the shapes."""
    vision, text = vision_config_of(original), language_settings(original)
    vocabulary = vocabulary_of(text, state_dict)
    # The factory adds an end, a placeholder of images and, to vocabularies that have none (all but OPT's), padding.
    own = text.get("pad_token_id") if text["model_type"] == "opt" else None
    end = original.get("eoc_token_id", vocabulary - (3 if own is None else 2))
    return HfvlmFlamingoConfig(
        vision_config=vision,
        resampler_config=resampler_config_of(vision.hidden_size, state_dict),
        text_config=text_config_of(text, vocabulary),
        image_token_id=original.get("media_token_id", end + 1),
        eos_token_id=end,
        pad_token_id=original.get("pad_token_id", end + 2 if own is None else own),
        cross_attention_interval=original.get("cross_attn_every_n_layers") or interval_of(state_dict),
    )


def vocabulary_of(text: Mapping[str, Any], state_dict: Mapping[str, Tensor]) -> int:
    """Count the rows of the table of words, in whatever the language model calls it; or as its configuration has
    it."""
    names = tuple(f"{LANGUAGE}{words}" for _, words, _, _ in KINDS.values())
    return next((len(state_dict[name]) for name in names if name in state_dict), 0) or text["vocab_size"]


def resampler_config_of(width: int, state_dict: Mapping[str, Tensor]) -> HfvlmFlamingoResamplerConfig:
    fields: dict[str, Any] = {"hidden_size": width, "intermediate_size": 4 * width}
    if "perceiver.latents" in state_dict:
        fields["num_latents"] = len(state_dict["perceiver.latents"])
        if "perceiver.frame_embs" in state_dict:
            fields["max_num_frames"] = len(state_dict["perceiver.frame_embs"])
        if "perceiver.media_time_embs" in state_dict:
            fields["max_num_media"] = len(state_dict["perceiver.media_time_embs"])
        fields["num_hidden_layers"] = count_layers(state_dict, "perceiver.layers.")
    return HfvlmFlamingoResamplerConfig(**fields)


def interval_of(state_dict: Mapping[str, Tensor]) -> int:
    """Return the first of the layers with cross-attention, counted from one."""
    gate = ".gated_cross_attn_layer.attn_gate"
    gates = [key.removesuffix(gate).rpartition(".")[2] for key in state_dict if key.endswith(gate)]
    if not gates:
        raise KeyError(gate)
    return min(map(int, gates)) + 1


def language_settings(original: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of the language model, as its own configuration has them."""
    given = original.get("lang_encoder")
    if given:
        return {"model_type": given["type"], **given["config"]}
    if "base_config" not in original:
        raise KeyError("base_config")
    return dict(original["base_config"])


def vision_config_of(original: Mapping[str, Any]) -> HfvlmCLIPVisionConfig:
    """Return the configuration of the tower as open_clip describes it, as transformers does, or OpenAI's ViT-L/14."""
    own = original.get("vision_encoder")
    if own:
        known = ("image_size", "patch_size", "width", "layers", "heads", "output_dim", "quick_gelu")
        check_options("vision_encoder", own, known)
        return HfvlmCLIPVisionConfig(
            hidden_size=own["width"],
            intermediate_size=4 * own["width"],
            num_hidden_layers=own["layers"],
            num_attention_heads=own["heads"],
            image_size=own["image_size"],
            patch_size=own["patch_size"],
            hidden_act="quick_gelu" if own.get("quick_gelu", True) else "gelu",
            projection_dim=None,
        )
    given = original.get("vision_config")
    if not given:
        return openai_vision_config(224)
    native: Any = AutoConfig.for_model(**given)
    return clip_interop.vision_config_of(getattr(native, "vision_config", native))


# What decides the shape and the numbers of a GPT-NeoX, and of a GPT-J.
NEOX_FIELDS = (
    *("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "hidden_act", "rotary_pct"),
    *("rotary_emb_base", "rope_parameters", "rope_theta", "max_position_embeddings", "layer_norm_eps"),
    *("use_parallel_residual", "attention_bias", "tie_word_embeddings", "initializer_range"),
    *("attention_dropout", "hidden_dropout", "bos_token_id", "eos_token_id"),
)
GPTJ_FIELDS = (
    *("n_embd", "n_layer", "n_head", "n_positions", "n_inner", "rotary_dim", "activation_function"),
    *("layer_norm_epsilon", "resid_pdrop", "embd_pdrop", "attn_pdrop", "initializer_range"),
    *("tie_word_embeddings", "bos_token_id", "eos_token_id"),
)


def text_config_of(settings: Mapping[str, Any], vocabulary: int) -> Any:
    """Return the language model's configuration, with a row for each token that was added."""
    kind, shared = settings["model_type"], {"vocab_size": vocabulary, "use_cache": True}
    if kind in ("mpt", "mosaic_gpt", "hfvlm_flamingo_mpt"):
        return mpt_config_of(settings, shared)
    if kind == "gpt_neox":
        return GPTNeoXConfig(**chosen(settings, NEOX_FIELDS) | shared)
    if kind == "llama":
        fields = chosen(settings, LLAMA_FIELDS)
        if (fields.get("pad_token_id") or 0) < 0:  # LLaMA's first conversions have -1 for "none"
            del fields["pad_token_id"]
        return LlamaConfig(**fields | shared)
    if kind == "opt":
        return OPTConfig(**chosen(settings, OPT_FIELDS) | shared)
    if kind == "gptj":
        return GPTJConfig(**chosen(settings, GPTJ_FIELDS) | shared)
    raise UnsupportedOriginalError(
        f"Flamingo on {kind!r}: hfvlm converts MPT, MosaicGPT, GPT-NeoX, GPT-J, LLaMA and OPT."
    )


def chosen(settings: Mapping[str, Any], names: Iterable[str]) -> dict[str, Any]:
    return {name: settings[name] for name in names if settings.get(name) is not None}


def mpt_config_of(settings: Mapping[str, Any], shared: dict[str, Any]) -> MptConfig:
    """Return MPT's own configuration, or read that of MosaicGPT, which has `attn_` before each name of the
    attention's."""
    flat = {name.removeprefix("attn_"): value for name, value in settings.items() if name.startswith("attn_")}
    attention = dict(settings.get("attn_config") or {}) | {n: v for n, v in flat.items() if n != "config"}
    attention |= {name: settings[name] for name in ("alibi", "alibi_bias_max", "softmax_scale") if name in settings}
    refused = {
        "attn_type": attention.get("attn_type", "multihead_attention") != "multihead_attention",
        "alibi": not attention.get("alibi", True),
        "alibi_bias_max": attention.get("alibi_bias_max", 8) != 8,
        "prefix_lm": attention.get("prefix_lm", False),
        "clip_qkv with qk_ln": attention.get("qk_ln", False) and attention.get("clip_qkv"),
        "learned_pos_emb": settings.get("learned_pos_emb", False),
        "no_bias": not settings.get("no_bias", True),
        "logit_scale": settings.get("logit_scale"),
    }
    check_options("The language model's config.json", refused, ())
    known = chosen(attention, ("qk_ln", "clip_qkv", "softmax_scale"))
    ratio = settings.get("mlp_ratio", settings.get("expansion_ratio", 4))
    kind = HfvlmFlamingoMPTConfig if attention.get("qk_ln") or ratio != 4 else MptConfig
    fields = chosen(settings, MPT_FIELDS) | {"learned_pos_emb": False, "attn_config": known, "expansion_ratio": ratio}
    return kind(**fields | shared)


image_processor_for = sized(HfvlmFlamingoImageProcessor)


def processor_for(
    config: HfvlmFlamingoConfig, settings: Mapping[str, Any], vocabulary: Path
) -> HfvlmFlamingoProcessor:
    """Return the processor; `vocabulary` is the language model's."""
    tokenizer = HfvlmFlamingoTokenizer.from_vocabulary(vocabulary, **settings.get("tokenizer", {}))
    tokens = {"eos_token_id": ENDOFCHUNK, "image_token_id": IMAGE, "pad_token_id": tokenizer.pad_token}
    known = {name: tokenizer.convert_tokens_to_ids(token) for name, token in tokens.items()}
    wanted = {name: getattr(config, name) for name in tokens}
    check_vocabulary(vocabulary, known, wanted, f"ids of {', '.join(tokens.values())} are", ", ".join(tokens))
    return HfvlmFlamingoProcessor(image_processor_for(config, settings), tokenizer)


# What was trained alone is recognised by its file, or by a preset.
CONVERSION = Conversion(
    config_from_original=config_from_original,
    keys_for=keys_for,
    layout_of=always("original"),
    image_processor_for=image_processor_for,
    processor_for=processor_for,
    vocabularies_for=always([VOCABULARIES]),
    parts=PARTS,
    files=FILES,
    compose=tables_for,
)
