"""Every tower of every dual encoder, and of models of many modalities, as an ONNX graph that computes the same."""

import json

import numpy as np
import pytest

import hfvlm
from hfvlm.inference.engines import ONNX_SETTINGS, OnnxRuntime
from hfvlm.release.onnx import check_graph, write_tower
from hfvlm.release.verification import samples
from tests.support.folders import parts_of, tiny_folder
from tests.support.towers import TOWERS, own_modalities

pytestmark = pytest.mark.integration

ARCHITECTURES = (
    "align", "blip", "blip2", "clip", "coca", "filip", "flava", "imagebind", "languagebind", "mammut", "siglip",
    "wukong",
)  # fmt: skip
TEXTS = ["a red circle", "a", "a large blue square above a small green cross", "two"]


@pytest.fixture(autouse=True)
def _packages():
    for package in ("onnxscript", "onnxruntime"):
        pytest.importorskip(package, reason="comes with hfvlm[onnx]")


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_tower(name, tmp_path):
    """Each graph is compared with the model when it is written; then an Embedder takes the folder."""
    folder = tiny_folder(name, tmp_path / name)
    output = hfvlm.export(folder, tmp_path / "onnx", to="onnx")
    ours = hfvlm.Embedder.from_pretrained(folder, dtype="float32")
    graphs = hfvlm.Embedder.from_pretrained(output, engine="onnxruntime")
    written = json.loads((output / ONNX_SETTINGS).read_text())["modalities"]
    assert set(written) == set(graphs.modalities) == set(ours.modalities)
    for modality in ours.modalities:
        check_free(output / written[modality]["file"], modality == "text")
        sources = TEXTS if modality == "text" else [*samples(modality), samples(modality)[0]]
        for batch_size in (1, 4):
            found, expected = (each.encode(**{modality: sources}, batch_size=batch_size) for each in (graphs, ours))
            assert found.shape == expected.shape
            np.testing.assert_allclose(found, expected, atol=1e-4)
        assert np.abs(expected[0] - expected[1]).max() > 1e-3, f"{name} tells one {modality} from another"


def check_free(path, length):
    """Batches are of any size, and with `length` sequences, too."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    free = {given.name: [isinstance(size, str) for size in given.shape] for given in session.get_inputs()}
    assert free
    assert all(sizes[0] for sizes in free.values()), free
    assert not length or all(sizes[1] for name, sizes in free.items() if name != "spatial_shapes"), free


@pytest.mark.parametrize("name", TOWERS)
def test_every_kind_of_tower(name, tmp_path):
    model, processor = parts_of(name)
    written = {each: write_tower(tmp_path, model, processor, each) for each in own_modalities(name)}
    (tmp_path / ONNX_SETTINGS).write_text(json.dumps({"logit_scale": None, "modalities": written}))
    model.config.save_pretrained(tmp_path)
    for modality, entry in written.items():
        check_graph(OnnxRuntime(tmp_path, [modality]), model, processor, modality)
        check_free(tmp_path / entry["file"], modality == "text" or name == "siglip-naflex")


def test_towers_that_are_compared_with_a_joint_encoder(tmp_path):
    """MERLOT Reserve's frames, texts and clips of audio: their graphs are there, for what runs the joint encoder."""
    folder = tiny_folder("merlot_reserve", tmp_path / "folder")
    output = hfvlm.export(folder, tmp_path / "onnx", to="onnx")
    assert {path.name for path in output.glob("*.onnx")} == {
        "vision_model.onnx", "text_model.onnx", "audio_model.onnx",
    }  # fmt: skip
    with pytest.raises(ValueError, match="HfvlmMERLOTReserveModel compares its embeddings with those of a joint"):
        hfvlm.Embedder.from_pretrained(output, engine="onnxruntime")


@pytest.mark.parametrize("name", ["llava", "vilbert", "painter"])
def test_what_has_no_towers_alone(name, tmp_path):
    folder = tiny_folder(name, tmp_path / "folder")
    with pytest.raises(ValueError, match=r"towers that embed texts.*Hfvlm\w+ has none of texts"):
        hfvlm.export(folder, tmp_path / "onnx", to="onnx")
    assert not (tmp_path / "onnx").exists()
