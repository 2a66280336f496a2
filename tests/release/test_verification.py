"""`hfvlm verify` against folders that were damaged on purpose."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoProcessor
from typer.testing import CliRunner

import hfvlm
from hfvlm.checkpoints import CheckpointError
from hfvlm.cli.commands import app
from hfvlm.presets import Preset
from hfvlm.release import converter, published
from hfvlm.release.converter import write_model
from hfvlm.release.fingerprints import sealed, stored_digests, tensor_digest
from hfvlm.release.plans import Translation
from hfvlm.release.records import FILES_NAME, SETTINGS_NAME, WEIGHTS_NAME, record_checks
from tests.models.llava.tiny import converted

LAYER = "vision_model.layers.{}.attention.{}.weight"


@pytest.fixture
def folder(clip_folder, tmp_path):
    return shutil.copytree(clip_folder, tmp_path / "clip")


@pytest.fixture(scope="module")
def llava_folder(tmp_path_factory):
    return converted(tmp_path_factory.mktemp("llava"))


def tensors(change):
    """A damage to the weights: `change` is given the tensors, and may return others."""

    def damage(folder):
        path = folder / "model.safetensors"
        stored = load_file(path)
        changed = change(stored) or stored
        save_file({key: tensor.contiguous() for key, tensor in changed.items()}, path, {"format": "pt"})

    return damage


def one(key, change):
    return tensors(lambda stored: stored.update({key: change(stored[key].clone())}))


def swap(first, second):
    return tensors(lambda stored: stored.update({first: stored[second].clone(), second: stored[first].clone()}))


def setting(file, name, value):
    """Another value of a setting, by the names of its levels joined by dots."""

    def damage(folder):
        content = json.loads((folder / file).read_text())
        *levels, last = name.split(".")
        place = content
        for level in levels:
            place = place[int(level)] if isinstance(place, list) else place[level]
        assert place[last] != value
        place[last] = value
        (folder / file).write_text(json.dumps(content))

    return damage


def inside(file, change):
    """A damage to a JSON file: `change` is given its content."""

    def damage(folder):
        content = json.loads((folder / file).read_text())
        change(content)
        (folder / file).write_text(json.dumps(content))

    return damage


def flip_one_bit(folder):
    path = folder / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def layers_swapped(stored):
    def other(key):
        for one_layer, another in (("layers.0.", "layers.1."), ("layers.1.", "layers.0.")):
            if key.startswith("text_model.") and one_layer in key:
                return key.replace(one_layer, another)
        return key

    return {key: stored[other(key)].clone() for key in stored}


def two_words_swapped(content):
    words = list(content["model"]["vocab"])
    content["model"]["vocab"] |= {
        words[300]: content["model"]["vocab"][words[301]],
        words[301]: content["model"]["vocab"][words[300]],
    }


Q, K = LAYER.format(0, "q_proj"), LAYER.format(0, "k_proj")
DAMAGES = {
    "rows permuted": one(Q, lambda w: w.roll(1, 0)),
    "columns permuted": one(Q, lambda w: w.roll(1, 1)),
    "two rows swapped": one("text_model.embeddings.token.weight", lambda w: w[[1, 0, *range(2, len(w))]]),
    "q and k swapped": swap(Q, K),
    "layers swapped": tensors(layers_swapped),
    "norms swapped": swap("vision_model.layers.0.attention_norm.weight", "vision_model.layers.0.mlp_norm.weight"),
    "towers' projections swapped": swap(Q, LAYER.format(1, "q_proj")),
    "a half added": one(Q, lambda w: w + 0.5),
    "one element changed": one(
        Q, lambda w: w.index_put((torch.tensor(3), torch.tensor(5)), torch.tensor(0.25, dtype=w.dtype))
    ),
    "the smallest step": one(Q, lambda w: (w.view(torch.int16) + 1).view(w.dtype)),
    "scaled": one(Q, lambda w: w * 1.001),
    "sign": one(Q, lambda w: -w),
    "transposed square": one(Q, lambda w: w.T),
    "rounded": one(Q, lambda w: w.bfloat16().to(w.dtype)),
    "stored wider": one(Q, lambda w: w.float()),
    "all in bfloat16": tensors(lambda stored: {k: w.bfloat16() for k, w in stored.items()}),
    "zeroed": one(Q, torch.zeros_like),
    "not a number": one("vision_model.layers.0.mlp.fc1.bias", lambda w: w.fill_(torch.nan)),
    "flipped": one("vision_model.position", lambda w: w.flip(0)),
    "positions moved": one("text_model.embeddings.position", lambda w: w.roll(1, 0)),
    "logit_scale": one("logit_scale.scale", lambda w: w + 1),
    "one bit": flip_one_bit,
    "a tensor more": tensors(lambda stored: stored.update({"vision_model.extra": torch.ones(3)})),
    "a tensor less": tensors(lambda stored: {k: w for k, w in stored.items() if k != "text_model.post_norm.bias"}),
    "eps": setting("config.json", "vision_config.layer_norm_eps", 1e-6),
    "the other tower's eps": setting("config.json", "text_config.layer_norm_eps", 1e-12),
    "activation": setting("config.json", "vision_config.hidden_act", "gelu"),
    "heads": setting("config.json", "vision_config.num_attention_heads", 4),
    "patch size": setting("config.json", "vision_config.patch_size", 16),
    "image size of the model": setting("config.json", "vision_config.image_size", 64),
    "fewer layers": setting("config.json", "vision_config.num_hidden_layers", 3),
    "end of text": setting("config.json", "text_config.eos_token_id", 12),
    "padding": setting("config.json", "text_config.pad_token_id", 0),
    "class": setting("config.json", "architectures", ["HfvlmCLIPForImageClassification"]),
    "stored dtype": setting("config.json", "dtype", "float16"),
    "no dropout field": inside("config.json", lambda c: c["vision_config"].pop("attention_dropout")),
    "licence": setting("config.json", "licence", "mit"),
    "bilinear": setting("processor_config.json", "image_processor.resample", 2),
    "mean 0": setting("processor_config.json", "image_processor.image_mean", [0.0, 0.0, 0.0]),
    "mean in another order": inside(
        "processor_config.json",
        lambda c: c["image_processor"].update(image_mean=[*reversed([0.1, *c["image_processor"]["image_mean"][1:]])]),
    ),
    "std 1": setting("processor_config.json", "image_processor.image_std", [1.0, 1.0, 1.0]),
    "squash": setting("processor_config.json", "image_processor.resize_mode", "squash"),
    "padding in place of cropping": setting("processor_config.json", "image_processor.resize_mode", "longest"),
    "no rescaling": setting("processor_config.json", "image_processor.do_rescale", False),
    "no normalisation": setting("processor_config.json", "image_processor.do_normalize", False),
    "size": setting("processor_config.json", "image_processor.size", {"height": 24, "width": 24}),
    "words swapped": inside("tokenizer.json", two_words_swapped),
    "merges dropped": inside("tokenizer.json", lambda c: c["model"]["merges"].clear()),
    "merges in another order": inside("tokenizer.json", lambda c: c["model"]["merges"].reverse()),
    "an added token moved": inside("tokenizer.json", lambda c: c["added_tokens"][0].update(id=5)),
    "no lower-casing": inside("tokenizer.json", lambda c: c.update(normalizer=None)),
    "no begin and end": inside("tokenizer.json", lambda c: c.update(post_processor=None)),
    "no pre-tokenizer": inside("tokenizer.json", lambda c: c.update(pre_tokenizer=None)),
    "longest text": setting("tokenizer_config.json", "model_max_length", 12),
    "a generation configuration": lambda folder: (folder / "generation_config.json").write_text('{"do_sample": true}'),
    "an adapter": lambda folder: (folder / "adapter_config.json").write_text("{}"),
    "a chat template": lambda folder: (folder / "chat_template.jinja").write_text("{{ messages }}"),
    "no tokenizer configuration": lambda folder: (folder / "tokenizer_config.json").unlink(),
    "another record": setting("conversion.json", "source.sha256", "0" * 64),
    "another preset in the record": setting("conversion.json", "preset", "clip/vit-b-32"),
    "a digest in the record": inside("conversion.json", lambda c: c["tensors"].update({Q: c["tensors"][K]})),
    "a record without tensors": inside("conversion.json", lambda c: c.pop("tensors")),
    "a record that is none": lambda folder: (folder / "conversion.json").write_text("[1]"),
    "a digest changed with its tensor": lambda folder: (
        one(Q, lambda w: w * 2)(folder),
        inside("conversion.json", lambda c: c["tensors"].update({Q: stored_digests(folder)[Q]}))(folder),
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damages_are_caught(folder, damage):
    DAMAGES[damage](folder)
    assert [check.verdict for check in record_checks(folder) if not check.passed]


@pytest.mark.parametrize("damage", ["heads", "patch size", "fewer layers", "size", "class", "an added token moved"])
def test_what_cannot_be_run_any_more_is_reported_without_a_traceback(folder, damage):
    DAMAGES[damage](folder)
    failed = [check.name for check in hfvlm.verify(folder) if not check.passed]
    assert {SETTINGS_NAME, FILES_NAME} & set(failed)


CHAT_DAMAGES = {
    "the layer that is read": setting("config.json", "vision_feature_layer", -1),
    "the placeholder": setting("config.json", "image_token_id", 7),
    "the language model's eps": setting("config.json", "text_config.rms_norm_eps", 1e-3),
    "the chat template": lambda folder: (folder / "chat_template.jinja").write_text("{{ messages }}"),
    "tokens swapped in the language model": one("language_model.model.embed_tokens.weight", lambda w: w.roll(1, 0)),
    "key and value heads": setting("config.json", "text_config.num_key_value_heads", 1),
}


@pytest.mark.parametrize("damage", CHAT_DAMAGES)
def test_damages_of_a_chat_model_are_caught(llava_folder, tmp_path, damage):
    folder = shutil.copytree(llava_folder, tmp_path / "llava")
    assert all(check.verdict == "yes" for check in record_checks(folder))
    CHAT_DAMAGES[damage](folder)
    assert not all(check.passed for check in record_checks(folder))


def cut(name, share=0.5):
    def damage(folder):
        data = (folder / name).read_bytes()
        (folder / name).write_bytes(data[: int(len(data) * share)])

    return damage


@pytest.mark.parametrize(
    ("name", "share"),
    [
        ("model.safetensors", 0.5),
        ("model.safetensors", 0.99999),
        ("model.safetensors", 0.0),
        ("config.json", 0.5),
        ("processor_config.json", 0.5),
        ("tokenizer.json", 0.9),
        ("tokenizer_config.json", 0.1),
        ("conversion.json", 0.7),
    ],
)
@pytest.mark.parametrize("recorded", [True, False])
def test_a_file_that_is_cut_off_is_refused_by_name(folder, name, share, recorded):
    if not recorded and name != "conversion.json":
        (folder / "conversion.json").unlink()
    cut(name, share)(folder)
    with pytest.raises(CheckpointError, match=rf"{name}: cut off or damaged.*(Convert|download)"):
        hfvlm.verify(folder)


@pytest.fixture
def shards(folder, monkeypatch):
    """The folder with its weights in several files."""
    split = converter.split_torch_state_dict_into_shards
    monkeypatch.setattr(
        converter,
        "split_torch_state_dict_into_shards",
        lambda tensors, filename_pattern: split(tensors, filename_pattern=filename_pattern, max_shard_size="500KB"),
    )
    model = AutoModel.from_pretrained(folder)
    written = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    settings = (folder / "config.json").read_text()
    digests = write_model(folder, Translation(None, model, written, written))
    (folder / "config.json").write_text(settings)
    assert digests == ({key: tensor_digest(tensor) for key, tensor in written.items()}, {})
    return sorted(folder.glob("model-*.safetensors"))


def test_shards_are_verified(folder, shards):
    assert len(shards) > 2
    assert all(check.passed for check in hfvlm.verify(folder))


def test_a_missing_shard_is_refused_by_name(folder, shards):
    shards[1].unlink()
    with pytest.raises(CheckpointError, match=f"{shards[1].name}' is not there"):
        hfvlm.verify(folder)


def test_a_shard_outside_the_folder_is_refused(folder, shards):
    index = folder / "model.safetensors.index.json"
    index.write_text(index.read_text().replace(shards[0].name, f"../{shards[0].name}"))
    with pytest.raises(CheckpointError, match="is not there"):
        hfvlm.verify(folder)


def test_a_tensor_in_two_shards_is_refused(folder, shards):
    save_file(load_file(shards[0]) | load_file(shards[1]), shards[1], {"format": "pt"})
    with pytest.raises(CheckpointError, match="is in another shard, too"):
        hfvlm.verify(folder)


def test_details_name_what_differs(folder):
    swap(Q, K)(folder)
    setting("config.json", "vision_config.layer_norm_eps", 0.1)(folder)
    inside("tokenizer.json", two_words_swapped)(folder)
    details = {check.name: check.detail for check in record_checks(folder)}
    assert details[WEIGHTS_NAME] == (
        f"differs from the converted weights in 2 tensors: {Q} (holds {K}), {K} (holds {Q})"
    ) or details[WEIGHTS_NAME] == (
        f"differs from the converted weights in 2 tensors: {K} (holds {Q}), {Q} (holds {K})"
    )
    assert "config.json: vision_config.layer_norm_eps is 0.1, was 1e-05" in details[SETTINGS_NAME]
    assert details[FILES_NAME] == "tokenizer.json differs in model"


def test_a_fine_tuned_folder_differs_and_is_not_called_corrupt(folder):
    tensors(lambda stored: {k: w * 1.5 if ".mlp.fc1.weight" in k else w for k, w in stored.items()})(folder)
    failed = {check.name: check.detail for check in hfvlm.verify(folder) if not check.passed}
    assert list(failed) == [WEIGHTS_NAME]
    assert failed[WEIGHTS_NAME].startswith("differs from the converted weights in 7 tensors: ")
    assert failed[WEIGHTS_NAME].endswith(" and 2 more")


def test_what_is_saved_again_is_still_the_same(llava_folder, tmp_path):
    folder = shutil.copytree(llava_folder, tmp_path / "llava")
    AutoModel.from_pretrained(folder).save_pretrained(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)  # which a conversion leaves to the configuration
    AutoProcessor.from_pretrained(folder).save_pretrained(folder)
    (folder / "notes.md").write_text("mine")
    (folder / "plot.png").write_bytes(b"")
    hfvlm.release.hub.write_stub(folder)
    assert [check for check in record_checks(folder) if check.verdict != "yes"] == []


def test_what_was_not_converted_is_reported_as_unchecked(folder, tmp_path):
    AutoModel.from_pretrained(folder).save_pretrained(tmp_path / "saved")
    AutoProcessor.from_pretrained(folder).save_pretrained(tmp_path / "saved")
    checks = {check.name: check for check in hfvlm.verify(tmp_path / "saved")}
    for name in (WEIGHTS_NAME, SETTINGS_NAME, FILES_NAME):
        assert checks[name].verdict == "not checked"
        assert "has no conversion.json" in checks[name].detail
    result = CliRunner().invoke(app, ["verify", str(tmp_path / "saved")], env={"COLUMNS": "200"})
    assert result.exit_code == 0
    assert result.output.count("not checked") >= 3


def test_a_record_of_before_there_were_hashes(folder):
    record = json.loads((folder / "conversion.json").read_text())
    old = {key: record[key] for key in ("source", "preset", "layout", "hfvlm", "keys")}
    (folder / "conversion.json").write_text(json.dumps(old))
    verdicts = {check.name: check.verdict for check in record_checks(folder)}
    assert verdicts == {WEIGHTS_NAME: "not checked", SETTINGS_NAME: "yes", FILES_NAME: "not checked"}
    setting("config.json", "text_config.layer_norm_eps", 1e-6)(folder)
    details = {check.name: check.detail for check in record_checks(folder) if not check.passed}
    assert details == {SETTINGS_NAME: "config.json: text_config.layer_norm_eps is 1e-06, was 1e-05"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.uint8, torch.bool])
@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 3), (2, 0, 4)])
def test_digests_of_tensors_and_of_files_agree(tmp_path, dtype, shape):
    tensor = (torch.randn(shape) * 10).to(dtype)
    save_file({"a": tensor}, tmp_path / "model.safetensors")
    assert stored_digests(tmp_path) == {"a": tensor_digest(tensor)}


def test_digests_tell_shapes_and_dtypes():
    x = torch.zeros(2, 2)
    others = [x, x.reshape(4), x.reshape(1, 4), x.to(torch.int32), x.t().contiguous() + 1]
    assert len({tensor_digest(tensor) for tensor in others}) == 5
    assert tensor_digest(torch.arange(6.0).reshape(2, 3).t()) == tensor_digest(
        torch.arange(6.0).reshape(2, 3).t().contiguous()
    )


def test_the_seal_tells_an_edit():
    record = sealed({"preset": "clip/tiny", "tensors": {"a": "1"}})
    assert sealed(record) == record
    assert sealed(record | {"preset": "clip/vit-b-32"})["seal"] != record["seal"]


def test_published_numbers(folder, tmp_path, monkeypatch):
    image, texts = Image.new("RGB", (40, 30), "red"), ["a red circle", "a blue square"]
    image.save(tmp_path / "red.png")
    model, processor = AutoModel.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
    with torch.no_grad():
        logits = model(**processor(images=[image], text=texts)).logits_per_image
    readme = {"readme": "https://example.com/README.md", "inputs": {"image": ["red.png"], "text": texts}}

    def verdict(values, examples=tmp_path):
        pairs = [{"of": ["image", "text"], "values": values}]
        known = Preset("clip/tiny", "clip", source={"published": readme | {"probabilities": pairs}})
        monkeypatch.setattr(published, "load_preset", lambda name: known)
        (check,) = published.published_checks(folder, examples)
        return check

    right = logits.softmax(dim=-1)
    assert verdict(right.tolist()).verdict == "yes"
    assert verdict(right.flip(1).tolist()).verdict == "NO"
    assert verdict(right.tolist(), None).verdict == "not checked"
    assert "red.png, not in" in verdict(right.tolist(), None).detail


@pytest.mark.parametrize(
    "name", [name for name in hfvlm.list_presets() if "published" in hfvlm.load_preset(name).source]
)
def test_published_numbers_are_rows_of_probabilities(name):
    known = hfvlm.load_preset(name).source["published"]
    assert known["readme"].startswith("https://")
    for pair in known["probabilities"]:
        rows, columns = (len(known["inputs"][modality]) for modality in pair["of"])
        values = torch.tensor(pair["values"])
        assert values.shape == (rows, columns)
        assert values.sum(dim=-1).allclose(torch.ones(rows), atol=2e-3)


def test_models_of_several_modalities_are_compared_by_any_pair():
    output = SimpleNamespace(modalities=("image", "audio"), logits=lambda a, b: torch.tensor([[1.0, 2.0]]))
    assert published.logits(output, "image", "audio").tolist() == [[1.0, 2.0]]
