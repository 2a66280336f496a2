"""OpenFlamingo's releases become what they were made from."""

import json

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

import hfvlm
from hfvlm.checkpoints import CheckpointError
from hfvlm.checkpoints.key_table import KeyTableError, convert_keys, restore_keys
from hfvlm.checkpoints.originals import UnsupportedOriginalError
from hfvlm.conversion.flamingo import keys_for, language_rows, text_config_of
from hfvlm.presets import list_presets, load_preset
from hfvlm.presets.licences import LicenceError
from hfvlm.release.plans import empty_model
from tests.models.flamingo.tiny import LANGUAGES, PIECES, release, tiny_model, vocabulary
from tests.models.llava.tiny import write
from tests.support.suite import close

NAME = "flamingo/openflamingo-4b-vitl-rpj3b"


def same_weights(folder, model):
    loaded, info = AutoModelForImageTextToText.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    for name, value in loaded.state_dict().items():
        close(value, model.state_dict()[name], 0.0, name)
    return loaded


def without_vision(paths):
    return {"base": paths["base"], "vision": paths["vision"]}


@pytest.mark.parametrize("kind", LANGUAGES)
def test_what_was_trained_between_a_tower_and_a_language_model(kind, tmp_path):
    timed = {"frames": 3, "media": 2} if kind == "gptj" else {}
    model = tiny_model(kind, **timed)
    paths = release(tmp_path, model, kind)
    folder = hfvlm.convert(paths["main"], "flamingo", tmp_path / "out", parts=without_vision(paths))
    loaded = same_weights(folder, model)
    assert loaded.config.to_dict()["cross_attention_interval"] == 2
    if timed:
        assert torch.load(paths["main"])["perceiver.media_time_embs"].shape == (2, 1, 32)
        assert (loaded.config.resampler_config.max_num_frames, loaded.config.resampler_config.max_num_media) == (3, 2)
    processor = AutoProcessor.from_pretrained(folder)
    end, padding = (PIECES + 3, 1) if kind == "opt" else (PIECES, PIECES + 2)
    assert processor.image_token_id == loaded.config.image_token_id == end + 1
    assert (processor.tokenizer.eos_token_id, processor.tokenizer.pad_token_id) == (end, padding)
    assert (processor.encode("<image>a")[0] == 2) is (kind == "opt")  # whose texts begin with their end token
    record = json.loads((folder / "conversion.json").read_text())
    assert set(record["parts"]) == {"base", "vision"}
    batch = {"input_ids": torch.tensor([[3, end + 1, 5]]), "pixel_values": torch.randn(1, 3, 28, 28)}
    with torch.no_grad():
        close(loaded.eval()(**batch).logits, model(**batch).logits, 0.0, "logits")


def test_a_preset(tmp_path, monkeypatch):
    model = tiny_model("gpt_neox")
    known = load_preset(NAME)
    config = {name: value for name, value in model.config.to_dict().items() if name in known.config or "_id" in name}
    config["resampler_config"] = model.config.resampler_config.to_dict()
    small = known.__class__(**{**vars(known), "config": config})
    for module in ("sources", "plans"):
        monkeypatch.setattr(f"hfvlm.release.{module}.load_preset", lambda name: small)
    paths = release(tmp_path, model, "gpt_neox")
    folder = hfvlm.convert(paths["main"].parent, NAME, tmp_path / "out", parts=without_vision(paths))
    same_weights(folder, model)
    card = (folder / "README.md").read_text()
    assert "non-commercial research" in card
    assert "RedPajama" in card


def test_presets_are_what_the_language_models_say():
    """As their authors' config.json have it."""
    mpt_1b = {"model_type": "mosaic_gpt", "d_model": 2048, "n_heads": 16, "n_layers": 24, "mlp_ratio": 4}
    mpt_1b |= {"max_seq_len": 2048, "attn_qk_ln": True, "alibi": True, "alibi_bias_max": 8, "no_bias": True}
    neox = {"model_type": "gpt_neox", "hidden_size": 2560, "num_hidden_layers": 32, "num_attention_heads": 32}
    neox |= {"intermediate_size": 10240, "rotary_pct": 1.0, "rotary_emb_base": 10000, "hidden_act": "gelu"}
    neox |= {"max_position_embeddings": 2048, "layer_norm_eps": 1e-5, "use_parallel_residual": False}
    neox |= {"tie_word_embeddings": False, "bos_token_id": 0, "eos_token_id": 0}
    mpt_7b = {"model_type": "mpt", "d_model": 4096, "n_heads": 32, "n_layers": 32, "max_seq_len": 2048}
    mpt_7b |= {"expansion_ratio": 4, "learned_pos_emb": False, "no_bias": True}
    mpt_7b |= {"attn_config": {"alibi": True, "alibi_bias_max": 8, "qk_ln": False, "attn_type": "multihead_attention"}}
    llama = {"model_type": "llama", "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32}
    llama |= {"num_attention_heads": 32, "num_key_value_heads": 32, "max_position_embeddings": 2048}
    llama |= {"rms_norm_eps": 1e-6}
    known = {"mpt1b": (mpt_1b, 50280), "rpj3b": (neox, 50280), "mpt7b": (mpt_7b, 50280), "deprecated": (llama, 32003)}
    names = [name for name in list_presets("flamingo") if "tiny" not in name]
    assert len(names) == 6
    for name in names:
        settings, vocabulary = next(value for part, value in known.items() if part in name)
        config = load_preset(name).make_config()
        assert text_config_of(settings, vocabulary).to_dict() == config.text_config.to_dict(), name
        assert (config.eos_token_id, config.image_token_id, config.pad_token_id) == tuple(
            range(vocabulary - 3, vocabulary)
        )


def test_words_that_are_the_output_layer_too():
    """RedPajama has a table of its own for each; other GPT-NeoX have one, which their files hold once."""
    config = tiny_model("gpt_neox").config
    config.text_config.tie_word_embeddings = True
    expected = empty_model(config).language_model.state_dict(prefix="language_model.")
    original = restore_keys(expected, language_rows(config))
    assert "embed_out.weight" not in original
    for tensors in (original, original | {"embed_out.weight": original["gpt_neox.embed_in.weight"]}):
        assert convert_keys(tensors, language_rows(config), expected).keys() == expected.keys()


def test_tables_that_were_not_trained_get_rows_for_the_new_tokens(tmp_path):
    """LLaMA's output layer is in no release; nor are words that were frozen, by the names that some models have."""
    model = tiny_model("llama")
    paths = release(tmp_path, model, "llama")
    tensors = torch.load(paths["main"])
    head = tensors.pop("lang_encoder.lm_head.weight")
    torch.save(tensors, paths["main"])
    base = torch.load(paths["base"] / "pytorch_model.bin")
    base["lm_head.weight"] = head[:PIECES]
    torch.save(base, paths["base"] / "pytorch_model.bin")
    folder = hfvlm.convert(paths["main"], "flamingo", tmp_path / "out", parts=without_vision(paths))
    found = AutoModelForImageTextToText.from_pretrained(folder).get_output_embeddings().weight
    assert torch.equal(found[:PIECES], head[:PIECES])
    close(found[PIECES:], head[:PIECES].mean(dim=0).expand(3, -1), 1e-6, "new rows")


def test_what_releases_repeat_is_read_once(tmp_path):
    """The first release has each gated layer under two names; files of GPT-NeoX keep masks and frequencies."""
    model = tiny_model("gpt_neox")
    paths = release(tmp_path, model, "gpt_neox")
    tensors = torch.load(paths["main"])
    gate = "lang_encoder.gpt_neox.layers.1.gated_cross_attn_layer."
    tensors |= {
        key.replace(gate, "lang_encoder.gated_cross_attn_layers.1."): t
        for key, t in tensors.items()
        if key.startswith(gate)
    }
    layer = "lang_encoder.gpt_neox.layers.0.decoder_layer.attention"
    tensors |= {f"{layer}.{name}": torch.ones(1) for name in ("bias", "masked_bias", "rotary_emb.inv_freq")}
    wrapped = {"epoch": 1, "model_state_dict": {f"module.{key}": tensor for key, tensor in tensors.items()}}
    torch.save(wrapped, paths["main"])  # as a run of training writes it
    base = torch.load(paths["base"] / "pytorch_model.bin")
    base |= {f"gpt_neox.layers.0.attention.{name}": torch.ones(1) for name in ("bias", "masked_bias")}
    torch.save(base, paths["base"] / "pytorch_model.bin")
    folder = hfvlm.convert(paths["main"], "flamingo", tmp_path / "out", parts=without_vision(paths))
    same_weights(folder, model)


def test_a_whole_model(tmp_path):
    """As the original's `model.state_dict()` has it, with layers under two names, and buffers."""
    model = tiny_model("gpt_neox")
    rows = [row for row in keys_for(model.config) if row.target]
    whole = restore_keys(model.state_dict(), rows) | {"vision_encoder.proj": torch.ones(32, 16)}
    layer, gate = (
        "lang_encoder.gpt_neox.layers.1.decoder_layer.",
        "lang_encoder.gpt_neox.layers.1.gated_cross_attn_layer.",
    )
    whole |= {key.replace(layer, "lang_encoder.old_decoder_blocks.1."): t for key, t in whole.items() if layer in key}
    whole |= {
        key.replace(gate, "lang_encoder.gated_cross_attn_layers.1."): t for key, t in whole.items() if gate in key
    }
    whole |= {f"{layer}attention.{name}": torch.ones(1) for name in ("bias", "masked_bias", "rotary_emb.inv_freq")}
    vision = {"image_size": 28, "patch_size": 14, "width": 32, "layers": 2, "heads": 2, "output_dim": 16}
    language = {name: value for name, value in LANGUAGES["gpt_neox"].items() if name != "model_type"}
    original = {"vision_encoder": vision, "lang_encoder": {"type": "gpt_neox", "config": language}}
    source = write(tmp_path / "whole", "model.bin", whole) / "model.bin"
    vocabulary(source.parent)
    folder = hfvlm.convert(source, "flamingo", tmp_path / "out", original=original)
    same_weights(folder, model)
    with pytest.raises(UnsupportedOriginalError, match="no classes of its own"):
        hfvlm.export(folder, tmp_path / "native")
    surplus = {"vision": write(tmp_path / "vision", "pytorch_model.bin", {"x": torch.ones(1)}, {})}
    with pytest.raises(CheckpointError, match="whole model: leave vision out"):
        hfvlm.convert(source, "flamingo", tmp_path / "again", original=original, parts=surplus)


def test_parts_that_are_missing(tmp_path):
    paths = release(tmp_path, tiny_model("mpt"), "mpt")
    with pytest.raises(FileNotFoundError, match="needs its vision.*CLIP ViT-L/14"):
        hfvlm.convert(paths["main"], "flamingo", tmp_path / "out", parts={"base": paths["base"]})
    with pytest.raises(FileNotFoundError, match="needs its base"):
        hfvlm.convert(paths["main"], NAME, tmp_path / "out", parts={"vision": paths["vision"]})


def test_what_is_strange_is_named(tmp_path):
    paths = release(tmp_path, tiny_model("mpt"), "mpt")
    tensors = torch.load(paths["main"])
    tensors["perceiver.stranger"] = tensors.pop("perceiver.latents")
    torch.save(tensors, paths["main"])
    with pytest.raises(KeyTableError, match=r"perceiver.stranger.*perceiver.latents.*resampler.latents"):
        hfvlm.convert(paths["main"], "flamingo", tmp_path / "out", parts=without_vision(paths))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "bloom"}, "Flamingo on 'bloom'"),
        ({"learned_pos_emb": True}, "learned_pos_emb"),
        ({"attn_config": {"alibi": False}}, "alibi"),
        ({"attn_config": {"alibi_bias_max": 16}}, "alibi_bias_max"),
        ({"attn_config": {"qk_ln": True, "clip_qkv": 6.0}}, "clip_qkv with qk_ln"),
        ({"no_bias": False}, "no_bias"),
    ],
)
def test_language_models_that_are_another(changes, message):
    with pytest.raises(UnsupportedOriginalError, match=message):
        text_config_of(LANGUAGES["mpt"] | changes, 60)


def test_another_models_vocabulary(tmp_path):
    paths = release(tmp_path, tiny_model("mpt"), "mpt")
    original = {"cross_attn_every_n_layers": 2, "eoc_token_id": 3}
    with pytest.raises(ValueError, match="this is the vocabulary of another model"):
        hfvlm.convert(paths["main"], "flamingo", tmp_path / "out", parts=without_vision(paths), original=original)


def test_the_first_release_is_not_for_everyone(tmp_path, monkeypatch):
    preset = load_preset("openflamingo-9b-deprecated")
    assert preset.licence["non_commercial"]
    model = tiny_model("llama")
    model.config.licence = preset.licence["id"]
    with pytest.raises(LicenceError, match="licence is 'other'"):
        model.push_to_hub("me/flamingo")
