"""From a released file to a folder that from_pretrained loads, or to an error that leaves nothing behind."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoProcessor

import hfvlm
from hfvlm.checkpoints import CheckpointError, read_checkpoint
from hfvlm.checkpoints.key_table import KeyTableError
from hfvlm.checkpoints.originals import UnsupportedOriginalError
from hfvlm.configuration import ConfigurationError
from hfvlm.release.verification import sample_inputs
from tests.conftest import SHIPPED

SOURCE, VOCABULARY = SHIPPED / "clip-tiny.pt", SHIPPED / "bpe_simple_vocab.txt.gz"


@pytest.fixture
def released(tmp_path):
    """A copy of the shipped checkpoint and its vocabulary that a test may damage."""
    folder = tmp_path / "released"
    shutil.copytree(SHIPPED, folder)
    return folder / SOURCE.name


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_the_folder_is_complete(clip_folder):
    assert names(clip_folder) == [
        "NOTICE",
        "README.md",
        "config.json",
        "config_sentence_transformers.json",
        "conversion.json",
        "model.safetensors",
        "modules.json",
        "processor_config.json",
        "sentence_bert_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    record = json.loads((clip_folder / "conversion.json").read_text())
    assert record["source"]["sha256"] == record["source"]["published_sha256"]
    assert record["preset"] == "clip/tiny"
    assert record["keys"] == {"read": 101, "written": 126}
    assert record["hfvlm"] == hfvlm.__version__
    config = json.loads((clip_folder / "config.json").read_text())
    assert (config["licence"], config["dtype"]) == ("apache-2.0", "float32")


def test_weights_are_kept_as_they_were_released(clip_folder):
    """float16 stays float16 in the file, and loads as the float32 that the original computes in."""
    stored = load_file(clip_folder / "model.safetensors")
    original = read_checkpoint(SOURCE).tensors
    assert torch.equal(stored["vision_model.patches.projection.weight"], original["visual.conv1.weight"])
    assert stored["vision_model.patches.projection.weight"].dtype == torch.float16
    assert stored["vision_model.post_norm.weight"].dtype == torch.float32
    assert {p.dtype for p in AutoModel.from_pretrained(clip_folder).parameters()} == {torch.float32}


def test_dtype(released, tmp_path):
    folder = hfvlm.convert(released, "clip/tiny", tmp_path / "out", dtype="bfloat16")
    stored = load_file(folder / "model.safetensors")
    assert {key for key, t in stored.items() if t.dtype != torch.bfloat16} == {"logit_scale.scale"}
    model = AutoModel.from_pretrained(folder)
    assert model.dtype == torch.bfloat16
    assert model.logit_scale.scale.dtype == torch.float32


def test_an_architecture_converts_without_a_preset(released, tmp_path, clip_folder):
    folder = hfvlm.convert(released, "clip", tmp_path / "out")
    left, right = AutoModel.from_pretrained(folder), AutoModel.from_pretrained(clip_folder)
    assert all(torch.equal(a, b) for a, b in zip(left.parameters(), right.parameters(), strict=True))
    config = json.loads((folder / "config.json").read_text())
    assert config["licence"] == "unknown"
    assert "Not stated with the checkpoint" in (folder / "README.md").read_text()


def test_wrapped_and_prefixed_files_convert(released, tmp_path, clip_folder):
    tensors = {f"module.{key}": value.clone() for key, value in read_checkpoint(released).tensors.items()}
    torch.save({"state_dict": tensors, "epoch": 32}, released)
    folder = hfvlm.convert(released, "clip/tiny", tmp_path / "out")
    left, right = load_file(folder / "model.safetensors"), load_file(clip_folder / "model.safetensors")
    assert all(torch.equal(left[key], right[key]) for key in right)
    record = json.loads((folder / "conversion.json").read_text())
    assert record["source"]["sha256"] != record["source"]["published_sha256"]


def test_sharded_output(released, tmp_path, clip_folder, monkeypatch):
    from hfvlm.release import converter

    split = converter.split_torch_state_dict_into_shards
    monkeypatch.setattr(
        converter, "split_torch_state_dict_into_shards", lambda *a, **k: split(*a, **k, max_shard_size="500KB")
    )
    folder = hfvlm.convert(released, "clip/tiny", tmp_path / "out")
    assert (folder / "model.safetensors.index.json").exists()
    assert len(list(folder.glob("model-*.safetensors"))) > 2
    left, right = AutoModel.from_pretrained(folder), AutoModel.from_pretrained(clip_folder)
    assert all(torch.equal(a, b) for a, b in zip(left.parameters(), right.parameters(), strict=True))


def test_open_clip_configuration_beside_the_weights(tmp_path):
    """open_clip stores its model and preprocessing configuration as open_clip_config.json."""
    shutil.copy(VOCABULARY, tmp_path)
    tensors = {
        k: t.clone().float() for k, t in read_checkpoint(SOURCE).tensors.items() if t.ndim or k == "logit_scale"
    }
    save_file(tensors, tmp_path / "open_clip_model.safetensors")
    vision = {"image_size": 32, "layers": 4, "width": 128, "head_width": 32, "patch_size": 8}
    text = {"context_length": 24, "vocab_size": 632, "width": 64, "heads": 2, "layers": 3}
    preprocess = {"mean": [0.5] * 3, "std": [0.25] * 3, "interpolation": "bilinear", "resize_mode": "longest"}
    content = {"model_cfg": {"embed_dim": 64, "vision_cfg": vision, "text_cfg": text}, "preprocess_cfg": preprocess}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(content))
    folder = hfvlm.convert(tmp_path, "clip", tmp_path / "out")
    config = AutoModel.from_pretrained(folder).config
    assert (config.vision_config.num_attention_heads, config.text_config.num_attention_heads) == (4, 2)
    assert config.vision_config.hidden_act == "gelu"
    pixels = AutoProcessor.from_pretrained(folder).image_processor
    assert (pixels.resize_mode, pixels.resample, pixels.image_std) == ("longest", 2, [0.25] * 3)
    assert pixels.size == {"height": 32, "width": 32}, "the tower's, where the configuration has none"


def test_an_option_that_would_be_ignored_is_refused(tmp_path):
    shutil.copytree(SHIPPED, tmp_path / "in")
    for part, option in (
        ("vision_cfg", "ls_init_value"),
        ("text_cfg", "embed_cls"),
        ("vision_cfg", "attentional_pool"),
    ):
        model = {"embed_dim": 64, "vision_cfg": {"patch_size": 8}, "text_cfg": {"heads": 1}}
        model[part][option] = 1
        (tmp_path / "in" / "open_clip_config.json").write_text(json.dumps({"model_cfg": model}))
        with pytest.raises(UnsupportedOriginalError, match=f"{part}: hfvlm does not implement {option}"):
            hfvlm.convert(tmp_path / "in" / SOURCE.name, "clip", tmp_path / "out")


def failing(released, tmp_path, error, words, preset="clip/tiny", **options):
    with pytest.raises(error, match=words):
        hfvlm.convert(released, preset, tmp_path / "out", **options)
    assert names(tmp_path) == ["released"], "an output was left behind"


def test_wrong_architecture(released, tmp_path):
    failing(
        released,
        tmp_path,
        KeyTableError,
        r"is not what siglip/vit-b-16-siglip \(open_clip\) expects. Of its 101 keys, clip \(openai\) knows 100%",
        preset="siglip/vit-b-16-siglip",
    )


def test_wrong_size(released, tmp_path):
    failing(released, tmp_path, KeyTableError, r"class_token is \(128,\), expected \(768,\)", preset="vit-b-32")


def test_missing_configuration(released, tmp_path):
    failing(released, tmp_path, CheckpointError, "open_clip_config.json or config.json.*not beside", preset="siglip")


def test_a_missing_key(released, tmp_path):
    tensors = {k: t.clone() for k, t in read_checkpoint(released).tensors.items() if k != "visual.ln_pre.bias"}
    torch.save(tensors, released)
    failing(released, tmp_path, KeyTableError, "vision_model.pre_norm.bias")


def test_a_foreign_key(released, tmp_path):
    torch.save(
        {k: t.clone() for k, t in read_checkpoint(released).tensors.items()} | {"ema.w": torch.ones(1)}, released
    )
    failing(released, tmp_path, KeyTableError, "without a row: ema.w")


def test_a_damaged_file(released, tmp_path):
    released.write_bytes(released.read_bytes()[:100_000])
    failing(released, tmp_path, CheckpointError, "damaged archive")


def test_a_malicious_file(released, tmp_path):
    from tests.checkpoints.test_reading import Evil

    torch.save({"state_dict": {}, "x": Evil(eval, "1")}, released)
    failing(released, tmp_path, CheckpointError, "eval")


def test_a_missing_vocabulary(released, tmp_path):
    (released.parent / VOCABULARY.name).unlink()
    failing(released, tmp_path, FileNotFoundError, "bpe_simple_vocab_16e6.txt.gz.*pass 'none'")


def test_the_vocabulary_of_another_model(released, tmp_path):
    import gzip

    lines = gzip.decompress(VOCABULARY.read_bytes()).decode().splitlines()
    (released.parent / VOCABULARY.name).write_bytes(gzip.compress("\n".join(lines[:-5]).encode()))
    failing(released, tmp_path, ValueError, "pieces are not the model's 632")


def test_a_broken_vocabulary(released, tmp_path):
    (released.parent / VOCABULARY.name).write_bytes(b"no gzip")
    failing(released, tmp_path, ValueError, "not a gzipped list of merges")


def test_an_unknown_preset(released, tmp_path):
    failing(released, tmp_path, ValueError, "Did you mean vit-b-32", preset="vit-b-33")


def test_a_preset_without_a_checkpoint(released, tmp_path):
    failing(released, tmp_path, ValueError, "has sizes only", preset="siglip/tiny")


def test_an_impossible_configuration(released, tmp_path):
    original = {"model_type": "clip", "vision_config": {"hidden_size": 10, "num_attention_heads": 3}}
    failing(
        released,
        tmp_path,
        ConfigurationError,
        "not a multiple of the number of attention heads",
        preset="clip",
        original=original,
    )


def test_without_tokenizer(released, tmp_path):
    (released.parent / VOCABULARY.name).unlink()
    folder = hfvlm.convert(released, "clip/tiny", tmp_path / "out", vocabulary="none")
    assert "tokenizer.json" not in names(folder)
    assert "preprocessor_config.json" in names(folder)


def test_outputs_are_not_overwritten_by_accident(released, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("precious")
    with pytest.raises(FileExistsError, match="exists already"):
        hfvlm.convert(released, "clip/tiny", tmp_path / "out")
    with pytest.raises(CheckpointError):
        hfvlm.convert(VOCABULARY, "clip/tiny", tmp_path / "out", overwrite=True)
    assert names(tmp_path / "out") == ["mine.txt"], "a failed conversion must not cost the old output"
    hfvlm.convert(released, "clip/tiny", tmp_path / "out", overwrite=True)
    assert "mine.txt" not in names(tmp_path / "out")
    assert names(tmp_path) == ["out", "released"]


def test_verify_accepts_a_good_folder(clip_folder):
    checks = hfvlm.verify(clip_folder)
    assert [check.name for check in checks if not check.passed] == []
    assert len(checks) == 13


def test_verify_notices_what_is_wrong(clip_folder, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(clip_folder, broken)
    tensors = load_file(broken / "model.safetensors")
    del tensors["vision_model.layers.1.mlp.fc1.weight"]
    tensors["vision_model.post_norm.weight"].zero_()
    tensors["vision_model.post_norm.bias"].fill_(1.0)
    save_file(tensors, broken / "model.safetensors", {"format": "pt"})
    failed = {check.name for check in hfvlm.verify(broken) if not check.passed}
    assert "every weight of the model is in the file" in failed
    assert "another image gives another answer" in failed


def test_converted_inputs_work_end_to_end(clip_folder):
    model, processor = AutoModel.from_pretrained(clip_folder), AutoProcessor.from_pretrained(clip_folder)
    assert model(**sample_inputs(processor)).logits_per_image.shape == (2, 2)


def test_what_transformers_has_not_is_not_exported(imagebind_folder, tmp_path):
    with pytest.raises(UnsupportedOriginalError, match="transformers has no classes of its own for hfvlm_imagebind"):
        hfvlm.export(imagebind_folder, tmp_path / "exported")
    assert not (tmp_path / "exported").exists()


@pytest.mark.parametrize("dtype", ["int8", "foo", "bool", "float8_e4m3fn", "Tensor", "", 3])
def test_weights_are_stored_as_floating_point_types_alone(released, tmp_path, dtype):
    failing(
        released, tmp_path, ValueError, "dtype must be one of float32, float16, bfloat16, float64, not", dtype=dtype
    )


def damaged(released, change):
    tensors = {key: value.clone() for key, value in read_checkpoint(released).tensors.items()}
    change(tensors)
    torch.save(tensors, released)


def test_weights_that_are_no_numbers_are_refused_by_name(released, tmp_path):
    def change(tensors):
        tensors["visual.ln_pre.weight"][3:5] = float("nan")
        tensors["visual.conv1.weight"][0, 0, 0, 0] = float("-inf")

    damaged(released, change)
    words = (
        r"3 numbers in 2 tensors are NaN or infinite: .*vision_model.pre_norm.weight \(2\).*allow_nonfinite=True "
        r"\(--allow-nonfinite\)"
    )
    failing(released, tmp_path, CheckpointError, words)
    folder = hfvlm.convert(released, "clip/tiny", tmp_path / "out", allow_nonfinite=True)
    record = json.loads((folder / "conversion.json").read_text())
    assert record["nonfinite"] == {"vision_model.patches.projection.weight": 1, "vision_model.pre_norm.weight": 2}


def test_weights_that_a_type_cannot_hold_are_refused(released, tmp_path):
    def change(tensors):
        tensors["visual.ln_pre.weight"] = tensors["visual.ln_pre.weight"].float() + 1e30

    damaged(released, change)
    failing(released, tmp_path, CheckpointError, "NaN or infinite, as float16: vision_model.pre_norm", dtype="float16")
    hfvlm.convert(released, "clip/tiny", tmp_path / "out", dtype="bfloat16")


@pytest.mark.parametrize(
    ("prefix", "wrapper"),
    [
        ("_orig_mod.", None),
        ("module._orig_mod.", "state_dict"),
        ("_orig_mod.module.", "model_state"),
        ("model.", "state_dict"),
        ("model._orig_mod.", "state_dict"),
        ("module.model.", "ema"),
        ("net.model.", None),
        ("_fsdp_wrapped_module.", "model_state_dict"),
    ],
)
def test_what_training_wraps_names_in_comes_off(released, tmp_path, clip_folder, prefix, wrapper):
    tree = {prefix + key: value.clone() for key, value in read_checkpoint(released).tensors.items()}
    torch.save({wrapper: tree, "epoch": 3} if wrapper else tree, released)
    folder = hfvlm.convert(released, "clip/tiny", tmp_path / "out")
    left, right = load_file(folder / "model.safetensors"), load_file(clip_folder / "model.safetensors")
    assert all(torch.equal(left[key], right[key]) for key in right)


def test_parts_that_are_compiled_alone(released, tmp_path, clip_folder):
    tree = {key.replace("visual.", "visual._orig_mod."): t for key, t in read_checkpoint(released).tensors.items()}
    torch.save({key: value.clone() for key, value in tree.items()}, released)
    folder = hfvlm.convert(released, "clip", tmp_path / "out")
    left, right = load_file(folder / "model.safetensors"), load_file(clip_folder / "model.safetensors")
    assert all(torch.equal(left[key], right[key]) for key in right)


def test_a_prefix_that_some_names_lack_stays(released, tmp_path):
    tensors = read_checkpoint(released).tensors
    tree = {key if key == "logit_scale" else f"model.{key}": value.clone() for key, value in tensors.items()}
    torch.save(tree, released)
    failing(released, tmp_path, KeyTableError, "keys of the file without a row: model.")


def test_an_averaged_model(released, tmp_path):
    """As torch.optim.swa_utils.AveragedModel saves itself, and where a file holds the average beside the weights."""
    tensors = {key: value.clone() for key, value in read_checkpoint(released).tensors.items()}
    average = {f"module.{key}": value for key, value in tensors.items()} | {"n_averaged": torch.tensor(7)}
    torch.save(average, released)
    assert set(read_checkpoint(released).tensors) == set(tensors)
    torch.save({"model_ema": {key: value * 0 for key, value in tensors.items()}, "state_dict": tensors}, released)
    assert torch.equal(read_checkpoint(released).tensors["visual.proj"], tensors["visual.proj"])


def test_a_folder_of_hfvlm_is_recognised(clip_folder, tmp_path):
    for source in (clip_folder, clip_folder / "model.safetensors"):
        for preset in ("clip", "clip/tiny", "siglip"):
            with pytest.raises(
                CheckpointError, match="is hfvlm's own already .hfvlm_clip.*hfvlm verify.*hfvlm export"
            ):
                hfvlm.convert(source, preset, tmp_path / "out")


def test_a_folder_of_transformers_is_recognised(clip_folder, tmp_path):
    native = hfvlm.export(clip_folder, tmp_path / "native")
    with pytest.raises(
        KeyTableError, match=r"in transformers' own format \(clip in config.json\).*--preset clip"
    ) as caught:
        hfvlm.convert(native, "clip/tiny", tmp_path / "out")
    assert "languagebind" not in str(caught.value)
    hfvlm.convert(native, "clip", tmp_path / "out", vocabulary="none")


def test_a_missing_source_is_named(released, tmp_path):
    for preset in ("clip/tiny", "clip", "llava/llava-v1.5-7b-lora"):
        with pytest.raises(FileNotFoundError, match="clip-tny.pt: no such file or folder. Did you mean clip-tiny.pt?"):
            hfvlm.convert(released.with_name("clip-tny.pt"), preset, tmp_path / "out")


@pytest.mark.parametrize("content", ["[]", "{", '"x"', "[" * 10**5, '{"vision_config": 3, "model_type": "clip"}'])
def test_configurations_that_make_no_sense(released, tmp_path, content):
    (released.parent / "config.json").write_text(content)
    failing(released, tmp_path, (CheckpointError, ConfigurationError), "config.json|configuration", preset="clip")
