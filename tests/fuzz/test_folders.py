"""Damaged folders of our own through transformers' Auto classes: refused by name, or loaded."""

import json
import random
import shutil
import traceback
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoProcessor, AutoTokenizer

import hfvlm.conversion
from hfvlm.checkpoints import CheckpointError
from hfvlm.checkpoints.key_table import KeyTableError
from hfvlm.checks.files import FolderError
from hfvlm.configuration import ConfigurationError
from hfvlm.processing.vocabularies import VocabularyError
from tests.fuzz.mutations import Tally, mutated, mutated_json

OURS = (ConfigurationError, CheckpointError, FolderError, KeyTableError, VocabularyError)
PACKAGES = [str(Path(hfvlm.__file__).parent)]
PACKAGES += list(hfvlm.conversion.__path__)


class ForeignError(Exception):
    """What transformers refused before it came to hfvlm."""


def judged(call):
    """`call`'s result; an error that no line of hfvlm has to do with, or that a file is missing, as `ForeignError`."""
    try:
        return call()
    except OURS:
        raise
    except OSError:
        raise ForeignError from None
    except Exception as error:
        files = [frame.filename for frame in traceback.extract_tb(error.__traceback__)]
        if any(file.startswith(package) for file in files for package in PACKAGES):
            raise
        raise ForeignError from None


@pytest.fixture(scope="module")
def folders(clip_folder, imagebind_folder, small_blip):
    return {"clip": clip_folder, "imagebind": imagebind_folder, "blip": small_blip("HfvlmBLIPModel")}


LOADERS = {
    "config.json": lambda folder: AutoModel.from_config(AutoConfig.from_pretrained(folder)),
    "processor_config.json": AutoProcessor.from_pretrained,
    "tokenizer_config.json": AutoTokenizer.from_pretrained,
    "tokenizer.json": AutoTokenizer.from_pretrained,
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("file", LOADERS)
@pytest.mark.parametrize("kind", ["clip", "imagebind", "blip"])
def test_damaged_settings(tmp_path, fuzz_rounds, folders, kind, file):
    folder = tmp_path / "folder"
    shutil.copytree(folders[kind], folder, ignore=shutil.ignore_patterns("*.safetensors"))
    data = (folder / file).read_bytes()
    content, tally = json.loads(data), Tally(f"{kind} {file}", (*OURS, ForeignError))
    for seed in range(fuzz_rounds // 10):
        chance = random.Random(seed)
        damaged = (
            json.dumps(mutated_json(content, chance)).encode() if chance.random() < 0.8 else mutated(data, chance)
        )
        (folder / file).write_bytes(damaged)
        with torch.device("meta"):
            tally.attempt(f"{kind} {file} {seed}", lambda: judged(lambda: LOADERS[file](folder)))
    tally.report()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("file", ["config.json", "model.safetensors"])
def test_damaged_models(tmp_path, fuzz_rounds, clip_folder, file):
    folder = tmp_path / "folder"
    shutil.copytree(clip_folder, folder)
    data, tally = (folder / file).read_bytes(), Tally(f"weights and {file}", (*OURS, ForeignError))
    for seed in range(fuzz_rounds // 10):
        chance = random.Random(seed)
        structured = file == "config.json" and chance.random() < 0.8
        damaged = json.dumps(mutated_json(json.loads(data), chance)).encode() if structured else mutated(data, chance)
        (folder / file).write_bytes(damaged)
        tally.attempt(f"{file} {seed}", lambda: judged(lambda: AutoModel.from_pretrained(folder)))
    tally.report()


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("patch_size", 0, "patch_size must be from 1"),
        ("hidden_size", -64, "hidden_size must be from 1"),
        ("num_attention_heads", 7, "not a multiple of"),
        ("num_hidden_layers", 10**9, "num_hidden_layers must be from 0 to"),
        ("image_size", [32, 0], "image_size must be from 1"),
        ("image_size", 4, "smaller than patch_size"),
        ("hidden_act", "quickgelu", "Did you mean 'quick_gelu'?"),
        ("hidden_act", 3, "hidden_act"),
        ("layer_norm_eps", float("nan"), "layer_norm_eps must be from 0"),
        ("attention_dropout", 1.5, "attention_dropout must be from 0 to 1"),
        ("patch_size", "8", "patch_size.*expected int, got str"),
        ("projection_dim", None, "projection_dim"),
    ],
)
def test_wrong_fields_are_named(tmp_path, clip_folder, field, value, words):
    content = json.loads((clip_folder / "config.json").read_text())
    content["vision_config"][field] = value
    (tmp_path / "config.json").write_text(json.dumps(content))
    with pytest.raises(ConfigurationError, match=words) as caught:
        AutoConfig.from_pretrained(tmp_path)
    assert len(str(caught.value)) < 700
