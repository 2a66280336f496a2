"""sentence-transformers and what is built on it read converted folders, in every modality that they know."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoConfig

import hfvlm
from hfvlm.release.plans import empty_model
from hfvlm.release.sentence_files import write_sentence_files
from tests.conftest import SHIPPED


def files_of(folder):
    names = ("modules.json", "sentence_bert_config.json", "config_sentence_transformers.json")
    return {name: json.loads((folder / name).read_text()) for name in names if (folder / name).exists()}


def test_a_converted_folder_says_what_it_embeds(clip_folder):
    files = files_of(clip_folder)
    assert [row["type"].rsplit(".")[-1] for row in files["modules.json"]] == ["Transformer", "Normalize"]
    methods = files["sentence_bert_config.json"]["modality_config"]
    assert {name: row["method"] for name, row in methods.items()} == {
        "text": "get_text_features",
        "image": "get_image_features",
    }
    assert files["config_sentence_transformers.json"]["similarity_fn_name"] == "cosine"


@pytest.mark.parametrize("name", ["filip/tiny", "llava/tiny"])
def test_a_model_without_one_vector_for_a_source_has_none(name, tmp_path):
    (tmp_path / "processor_config.json").write_text("{}")
    write_sentence_files(tmp_path, empty_model(hfvlm.load_preset(name).make_config()))
    assert not files_of(tmp_path)


def test_a_folder_without_a_tokenizer_has_none(tmp_path):
    folder = hfvlm.convert(SHIPPED / "clip-tiny.pt", "clip/tiny", tmp_path / "clip", vocabulary="none")
    assert not files_of(folder)


def test_what_training_wrote_gets_them_when_it_is_pushed(imagebind_folder):
    assert not files_of(imagebind_folder)
    upload = hfvlm.push(imagebind_folder, "user/imagebind", accept_licence=True, dry_run=True)
    assert {"modules.json", "sentence_bert_config.json", "config_sentence_transformers.json"} <= set(upload.files)


@pytest.mark.integration
def test_sentence_transformers_embeds_as_the_embedder(clip_folder, imagebind_folder, tmp_path):
    package = pytest.importorskip("sentence_transformers", reason="comes with hfvlm[dev]")
    folder = tmp_path / "imagebind"
    folder.mkdir()
    for path in imagebind_folder.iterdir():
        (folder / path.name).symlink_to(path)
    write_sentence_files(folder, empty_model(AutoConfig.from_pretrained(folder)))
    image = Image.new("RGB", (64, 48), "red")
    samples = np.sin(np.arange(32000) / 10).astype(np.float32)
    frames = np.random.default_rng(0).integers(0, 255, (10, 48, 64, 3), dtype=np.uint8)
    audio = ((samples, 16000), {"array": samples, "sampling_rate": 16000})
    sources = {"text": ("a red circle",) * 2, "image": (image,) * 2, "audio": audio, "video": (frames,) * 2}
    for path, names in ((clip_folder, ("text", "image")), (folder, sources)):
        theirs = package.SentenceTransformer(str(path), model_kwargs={"dtype": torch.float32})
        ours = hfvlm.Embedder.from_pretrained(path, dtype="float32")
        for name in names:
            own, other = sources[name]
            np.testing.assert_allclose(theirs.encode([other]), ours.encode(**{name: [own]}), atol=1e-6)
