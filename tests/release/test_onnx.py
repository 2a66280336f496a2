"""Towers in ONNX compute what the model does, and an Embedder takes them."""

import json

import numpy as np
import pytest
import torch
from transformers import AutoModel
from typer.testing import CliRunner

import hfvlm
from hfvlm.cli.commands import app
from hfvlm.inference.engines import ONNX_SETTINGS
from hfvlm.samples import scenes

TEXTS = ["a red circle", "a large blue square above a small green cross", "a cross"]


@pytest.fixture(scope="module")
def exported(clip_folder, tmp_path_factory):
    for package in ("onnxscript", "onnxruntime"):
        pytest.importorskip(package, reason="comes with hfvlm[onnx]")
    output = tmp_path_factory.mktemp("onnx") / "clip"
    result = CliRunner().invoke(app, ["export", str(clip_folder), "-o", str(output), "--to", "onnx"])
    assert result.exit_code == 0, result.output
    assert "for ONNX" in result.output
    return output


def test_names_are_those_of_transformers_and_sizes_are_free(exported, clip_folder):
    import onnxruntime

    names = {
        "vision_model.onnx": ({"pixel_values"}, "image_embeds"),
        "text_model.onnx": ({"input_ids"}, "text_embeds"),
    }
    for file, (inputs, output) in names.items():
        session = onnxruntime.InferenceSession(str(exported / file))
        assert {given.name for given in session.get_inputs()} - {"attention_mask"} == inputs
        assert [each.name for each in session.get_outputs()] == [output]
        free = {given.name: [isinstance(size, str) for size in given.shape] for given in session.get_inputs()}
        assert free[next(iter(inputs))][0]
        assert "input_ids" not in inputs or free["input_ids"] == [True, True]
    card = (exported / "README.md").read_text()
    assert "as ONNX graphs" in card
    model = AutoModel.from_pretrained(clip_folder)
    scale = json.loads((exported / ONNX_SETTINGS).read_text())["logit_scale"]
    assert np.exp(scale) == pytest.approx(float(model.logit_scale.exp().detach()))


@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
def test_an_embedder_takes_them(exported, clip_folder, engine, tmp_path):
    pytest.importorskip(engine, reason=f"comes with hfvlm[{'onnx' if engine == 'onnxruntime' else engine}]")
    own = hfvlm.Embedder.from_pretrained(clip_folder, device="cpu")
    embedder = hfvlm.Embedder.from_pretrained(exported, engine=engine)
    images = [scene.render(np.random.RandomState(0)) for scene in scenes.all_scenes()[:3]]
    assert embedder.size == own.size
    for given in ({"text": TEXTS}, {"image": images}, {"image": images[:1]}, {"text": TEXTS[2:]}):
        np.testing.assert_allclose(embedder.encode(**given), own.encode(**given), atol=1e-5)
    classifiers = [hfvlm.ZeroShotClassifier(e, ["circle", "square"], cache=tmp_path) for e in (embedder, own)]
    found, expected = (classifier.predict(images[0]) for classifier in classifiers)
    assert found[0][0] == expected[0][0]
    assert found[0][1] == pytest.approx(expected[0][1], abs=1e-4)
    assert len(list(tmp_path.glob("*.npy"))) == 2
    only = hfvlm.Embedder.from_pretrained(exported, ["text"], engine=engine)
    assert only.modalities == ("text",)
    with pytest.raises(ValueError, match="embeds text, not image"):
        only.encode(image=images)
    with pytest.raises(TypeError, match="needs attention_mask, input_ids"):
        embedder.model.embeddings("text")


def test_a_graph_that_differs_is_not_written(exported, clip_folder, tmp_path, monkeypatch):
    from hfvlm.release import onnx

    real = onnx.OnnxRuntime.embeddings
    monkeypatch.setattr(onnx.OnnxRuntime, "embeddings", lambda *args, **kwargs: real(*args, **kwargs) * 1.001)
    monkeypatch.setattr(
        onnx, "write_tower", lambda folder, model, processor, modality: copied(exported, folder, modality)
    )
    with pytest.raises(ValueError, match=r"image inputs differs from the model by 1\.\de-03"):
        hfvlm.export(clip_folder, tmp_path / "out", to="onnx")
    assert not (tmp_path / "out").exists()


def copied(exported, folder, modality):
    """A tower that was written before, instead of a new one."""
    entry = json.loads((exported / ONNX_SETTINGS).read_text())["modalities"][modality]
    (folder / entry["file"]).write_bytes((exported / entry["file"]).read_bytes())
    return entry


def test_what_has_no_towers(small_blip, tmp_path, monkeypatch):
    monkeypatch.setattr("hfvlm.release.onnx.import_extra", lambda *names: None)
    folder = small_blip("HfvlmBLIPForConditionalGeneration")
    with pytest.raises(ValueError, match="HfvlmBLIPForConditionalGeneration has none of texts"):
        hfvlm.export(folder, tmp_path / "out", to="onnx")


@pytest.mark.parametrize(("options", "message"), [
    ({"engine": "tensorrt"}, "none of torch, onnxruntime, openvino"),
    ({"engine": "onnxruntime", "device": "cuda"}, "device='cuda' is for engine=\"torch\""),
    ({"engine": "openvino", "dtype": torch.bfloat16}, "dtype=torch.bfloat16 is for"),
    ({"engine": "openvino", "optimize": True}, "optimize=True is for"),
    ({"engine": "openvino", "revision": "main"}, "revision='main' is for"),
])  # fmt: skip
def test_options_of_engines(clip_folder, options, message):
    with pytest.raises(ValueError, match=message):
        hfvlm.Embedder.from_pretrained(clip_folder, **options)


@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
def test_a_folder_without_graphs(clip_folder, engine):
    with pytest.raises(FileNotFoundError, match="hfvlm export FOLDER --to onnx"):
        hfvlm.Embedder.from_pretrained(clip_folder, engine=engine)
