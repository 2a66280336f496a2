"""Small Flamingos as their authors would have released them."""

import json
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import CLIPVisionConfig

import hfvlm
from hfvlm.checkpoints.key_table import restore_keys
from hfvlm.conversion.blocks import transformers_vision_rows
from hfvlm.conversion.flamingo import language_rows, table_rows, text_config_of, trained_rows
from hfvlm.models.flamingo import HfvlmFlamingoConfig, HfvlmFlamingoForConditionalGeneration
from tests.models.llava.tiny import write

# A letter for each byte, after the end of a text.
PIECES = 257
VISION = {"hidden_size": 32, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
VISION |= {"image_size": 28, "patch_size": 14}
RESAMPLER = {"hidden_size": 32, "intermediate_size": 128, "num_hidden_layers": 2, "num_latents": 6}
NEOX = {"model_type": "gpt_neox", "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4}
NEOX |= {"intermediate_size": 48, "rotary_pct": 1.0, "max_position_embeddings": 512, "layer_norm_eps": 1e-5}
NEOX |= {"use_parallel_residual": False, "bos_token_id": 0, "eos_token_id": 0}
MPT = {"model_type": "mpt", "d_model": 32, "n_heads": 4, "n_layers": 4, "max_seq_len": 512, "expansion_ratio": 4}
MPT |= {"learned_pos_emb": False, "no_bias": True}
MPT["attn_config"] = {"attn_type": "multihead_attention", "qk_ln": False, "alibi": True, "alibi_bias_max": 8}
MOSAIC = {"model_type": "mosaic_gpt", "d_model": 32, "n_heads": 4, "n_layers": 4, "max_seq_len": 512}
MOSAIC |= {"mlp_ratio": 4, "attn_qk_ln": True, "alibi": True, "alibi_bias_max": 8, "no_bias": True}
MOSAIC |= {"attn_impl": "torch", "attn_clip_qkv": None, "low_precision_layernorm": True}
LLAMA = {"model_type": "llama", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4}
LLAMA |= {"num_attention_heads": 4, "num_key_value_heads": 4, "max_position_embeddings": 512, "rms_norm_eps": 1e-6}
OPT = {"model_type": "opt", "hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 4, "num_attention_heads": 4}
OPT |= {
    "max_position_embeddings": 512,
    "word_embed_proj_dim": 32,
    "pad_token_id": 1,
    "bos_token_id": 2,
    "eos_token_id": 2,
}
GPTJ = {"model_type": "gptj", "n_embd": 32, "n_layer": 4, "n_head": 4, "n_positions": 512, "rotary_dim": 4}
GPTJ |= {"bos_token_id": 0, "eos_token_id": 0}
# As the language models' own config.json have it.
LANGUAGES = {"gpt_neox": NEOX, "mpt": MPT, "mosaic_gpt": MOSAIC, "llama": LLAMA, "opt": OPT, "gptj": GPTJ}
LANGUAGES |= {"wide_mpt": MPT | {"expansion_ratio": 2}, "wide_mosaic_gpt": MOSAIC | {"mlp_ratio": 3}}


def tiny_model(
    kind: str, frames: int | None = None, media: int | None = None
) -> HfvlmFlamingoForConditionalGeneration:
    torch.manual_seed(3)
    ids = {"eos_token_id": PIECES, "image_token_id": PIECES + 1, "pad_token_id": PIECES + 2}
    if kind == "opt":  # whose vocabulary has padding
        ids = {"eos_token_id": PIECES + 3, "image_token_id": PIECES + 4, "pad_token_id": 1}
    config = HfvlmFlamingoConfig(
        vision_config=VISION | {"projection_dim": None},
        resampler_config=RESAMPLER | {"max_num_frames": frames, "max_num_media": media},
        text_config=text_config_of(LANGUAGES[kind], PIECES + (5 if kind == "opt" else 3)),
        cross_attention_interval=2,
        **ids,
    )
    model = HfvlmFlamingoForConditionalGeneration(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # norms and gates too, so that a forgotten one shows
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def vocabulary(folder: Path) -> Path:
    """A tokenizer.json as GPT-NeoX's, without a merge."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    engine = Tokenizer(models.BPE({name: i for i, name in enumerate(["<|endoftext|>", *letters])}, []))
    engine.add_special_tokens(["<|endoftext|>"])
    engine.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    engine.decoder = decoders.ByteLevel()
    folder.mkdir(exist_ok=True)
    engine.save(str(folder / "tokenizer.json"))
    return folder / "tokenizer.json"


def opt_vocabulary(folder: Path) -> Path:
    """OPT's two files, without a merge but the one that its reader needs."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces = {name: i for i, name in enumerate(["<s>", "<pad>", "</s>", "<unk>", *letters])}
    folder.mkdir(exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(pieces))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return folder / "vocab.json"


def release(folder: Path, model: HfvlmFlamingoForConditionalGeneration, kind: str) -> dict[str, Path]:
    """What was trained, the language model, and the tower."""
    folder.mkdir(exist_ok=True)
    ours, config = model.state_dict(), model.config

    def part(start: str) -> dict[str, Tensor]:
        return {key: tensor for key, tensor in ours.items() if key.startswith(start)}

    language = restore_keys(part("language_model."), language_rows(config))
    tables = {row.source for row in table_rows(config)}
    trained = restore_keys(part("resampler.") | part("gates."), trained_rows(config))
    trained |= {f"lang_encoder.{key}": tensor for key, tensor in language.items() if key in tables}
    # The language model as it was before, with other words, and rows to spare.
    base = {key: torch.randn(280, tensor.shape[1]) if key in tables else tensor for key, tensor in language.items()}
    native = CLIPVisionConfig(**VISION).to_dict()
    tower = restore_keys(part("vision_model."), transformers_vision_rows("vision_model", "vision_model"))
    paths = {
        "base": write(folder / "base", "pytorch_model.bin", base, LANGUAGES[kind] | {"vocab_size": 280}),
        "vision": write(folder / "vision", "pytorch_model.bin", tower, native),
        "main": write(folder / "release", "checkpoint.pt.bin", trained).joinpath("checkpoint.pt"),
    }
    (folder / "release" / "checkpoint.pt.bin").rename(paths["main"])
    (opt_vocabulary if kind == "opt" else vocabulary)(folder / "base")
    return paths


def converted(folder: Path, kind: str = "gpt_neox") -> Path:
    paths = release(folder, tiny_model(kind), kind)
    parts = {"base": paths["base"], "vision": paths["vision"]}
    return hfvlm.convert(paths["main"], "flamingo", folder / "flamingo", parts=parts)
