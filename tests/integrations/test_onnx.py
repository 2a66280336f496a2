"""Every tower of every dual encoder as an ONNX graph that computes the same, by `hfvlm export --to onnx`."""

import json

import pytest

import hfvlm
from hfvlm.inference.engines import ONNX_SETTINGS
from hfvlm.samples.scenes import Scene
from tests.support.folders import tiny_folder

pytestmark = pytest.mark.integration

ARCHITECTURES = ("align", "blip", "coca", "filip", "flava", "imagebind", "languagebind", "mammut", "siglip", "wukong")


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_tower(name, tmp_path):
    """Each graph is compared with the model when it is written; then an Embedder takes the folder."""
    for package in ("onnxscript", "onnxruntime"):
        pytest.importorskip(package, reason="comes with hfvlm[onnx]")
    folder = tiny_folder(name, tmp_path / name)
    output = hfvlm.export(folder, tmp_path / "onnx", to="onnx")
    ours = hfvlm.Embedder.from_pretrained(folder, dtype="float32")
    written = json.loads((output / ONNX_SETTINGS).read_text())["modalities"]
    assert set(written) == set(ours.modalities)
    assert all((output / entry["file"]).stat().st_size > 1000 for entry in written.values())
    graphs = hfvlm.Embedder.from_pretrained(output, engine="onnxruntime")
    for given in ({"text": ["a red circle", "a cross"]}, {"image": [Scene("red", "circle", "small").render()] * 3}):
        (found, expected) = (embedder.encode(**given) for embedder in (graphs, ours))
        assert found.shape == expected.shape
        assert abs(found - expected).max() < 1e-4
