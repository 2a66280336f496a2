"""Converting and exporting take little more memory than the file has: measured in a process of its own."""

import os

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModel

import hfvlm
from hfvlm.checkpoints.key_table import restore_keys
from hfvlm.conversion import clip
from hfvlm.models.clip import HfvlmCLIPConfig
from tests.conftest import SHIPPED
from tests.support.processes import run_alone

MIB = 2**20
VISION = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 5, "num_attention_heads": 12}
TEXT = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 2, "num_attention_heads": 8}

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="measures memory as Linux does"),
]


def memory(name):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(name))


def measure(scratch, command, *arguments):
    torch.set_num_threads(1)
    hfvlm.convert(SHIPPED / "clip-tiny.pt", "clip/tiny", scratch / "small")  # imports what there is
    if command == "export":
        hfvlm.export(scratch / "small", scratch / "small-exported")
    with open("/proc/self/clear_refs", "w") as peaks:
        peaks.write("5")
    before = memory("VmRSS")
    options = {} if command == "export" else {"vocabulary": "none"}
    getattr(hfvlm, command)(*arguments, **options)
    return memory("VmHWM") - before


def peak(tmp_path, *arguments):
    """Of a command, in bytes above what the process took before."""
    (scratch := tmp_path / "scratch").mkdir()
    return run_alone(measure, scratch, *arguments)


def large_clip():
    text = TEXT | {"vocab_size": 632, "eos_token_id": 631, "pad_token_id": 631, "bos_token_id": 630}
    config = HfvlmCLIPConfig(vision_config=VISION, text_config=text)
    return AutoModel.from_config(config)


def released(tmp_path, kind):
    """A CLIP of 150 MB in OpenAI's layout, in each kind of file."""
    model = large_clip()
    state = restore_keys(model.state_dict(), clip.keys_for(model.config, "openai"))
    path = tmp_path / f"large.{kind}"
    if kind == "pt":
        torch.save({"state_dict": state}, path)
    elif kind == "legacy":
        torch.save(state, path, _use_new_zipfile_serialization=False)
    elif kind == "npz":
        np.savez(path, **{key: value.numpy() for key, value in state.items()})
    else:
        save_file({key: value.clone().contiguous() for key, value in state.items()}, path)
    assert os.path.getsize(path) > 140 * MIB
    return path


@pytest.mark.parametrize("kind", ["pt", "legacy", "npz", "safetensors"])
def test_converting(tmp_path, kind):
    source = released(tmp_path, kind)
    assert peak(tmp_path, "convert", source, "clip", tmp_path / "out") < 1.2 * os.path.getsize(source)


def test_exporting(tmp_path):
    source = released(tmp_path, "pt")
    vocabulary = SHIPPED / "bpe_simple_vocab.txt.gz"
    folder = hfvlm.convert(source, "clip", tmp_path / "out", vocabulary=vocabulary)
    size = os.path.getsize(folder / "model.safetensors")
    assert peak(tmp_path, "export", folder, tmp_path / "exported") < 1.2 * size
