"""Converting and exporting take little more memory than the file has: measured in a process of its own."""

import os

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import hfvlm
from hfvlm.checkpoints.key_table import restore_keys
from hfvlm.conversion import clip
from hfvlm.conversion.blocks import llama_rows, transformers_vision_rows
from hfvlm.conversion.llava import EMBEDDING, HEAD, linear_rows, projector_rows
from hfvlm.models.clip import HfvlmCLIPConfig
from hfvlm.models.llava import HfvlmLLaVAConfig
from hfvlm.models.video_chatgpt import HfvlmVideoChatGPTConfig
from hfvlm.release.plans import empty_model
from tests.conftest import SHIPPED
from tests.models.llava.tiny import VISION as TOWER
from tests.models.llava.tiny import original_config, vision_settings, write
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


def measure(scratch, command, arguments, options):
    torch.set_num_threads(1)
    hfvlm.convert(SHIPPED / "clip-tiny.pt", "clip/tiny", scratch / "small")  # imports what there is
    if command == "export":
        hfvlm.export(scratch / "small", scratch / "small-exported")
    with open("/proc/self/clear_refs", "w") as peaks:
        peaks.write("5")
    before = memory("VmRSS")
    getattr(hfvlm, command)(*arguments, **options)
    return memory("VmHWM") - before


def peak(tmp_path, command, *arguments, **options):
    """Of a command, in bytes above what the process took before."""
    (scratch := tmp_path / "scratch").mkdir()
    return run_alone(measure, scratch, command, arguments, options)


def zeros(config):
    """A model whose numbers take as much room as any, and no time to be drawn."""
    model = empty_model(config).to_empty(device="cpu")
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.zero_()
    return model


@pytest.fixture(scope="module")
def large_clip():
    """A CLIP of 150 MB in OpenAI's layout."""
    text = TEXT | {"vocab_size": 632, "eos_token_id": 631, "pad_token_id": 631, "bos_token_id": 630}
    config = HfvlmCLIPConfig(vision_config=VISION, text_config=text)
    return restore_keys(zeros(config).state_dict(), clip.keys_for(config, "openai"))


def released(tmp_path, kind, state):
    """It in each kind of file."""
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
def test_converting(tmp_path, kind, large_clip):
    source = released(tmp_path, kind, large_clip)
    used = peak(tmp_path, "convert", source, "clip", tmp_path / "out", vocabulary="none")
    assert used < 1.2 * os.path.getsize(source)


def test_exporting(tmp_path, large_clip):
    source = released(tmp_path, "pt", large_clip)
    vocabulary = SHIPPED / "bpe_simple_vocab.txt.gz"
    folder = hfvlm.convert(source, "clip", tmp_path / "out", vocabulary=vocabulary)
    size = os.path.getsize(folder / "model.safetensors")
    assert peak(tmp_path, "export", folder, tmp_path / "exported") < 1.2 * size


LANGUAGE = {"model_type": "llama", "vocab_size": 8000, "hidden_size": 768, "intermediate_size": 2304}
LANGUAGE |= {"num_hidden_layers": 8, "num_attention_heads": 12, "max_position_embeddings": 512, "pad_token_id": 0}


def composed(kind, **fields):
    """The parts, in their authors' names, of a model around a language model of 270 MB."""
    model = kind(vision_config=TOWER, text_config=LANGUAGE, **fields)
    return zeros(model)


def named(model, start, rows):
    return restore_keys({key: value for key, value in model.state_dict().items() if key.startswith(start)}, rows)


def size_of(*folders):
    return sum(path.stat().st_size for folder in folders for path in folder.iterdir())


def test_merging_an_adapter(tmp_path):
    model = composed(HfvlmLLaVAConfig, image_token_id=8000)
    base = named(model, "language_model.", llama_rows())
    adapter = {}
    for key, value in base.items():
        if ".layers." in key and value.ndim == 2:
            name = f"base_model.model.{key.removesuffix('.weight')}"
            adapter[f"{name}.lora_A.weight"] = torch.randn(4, value.shape[1])
            adapter[f"{name}.lora_B.weight"] = torch.randn(value.shape[0], 4)
    projector = named(model, "projector.", projector_rows(model.config))
    projector = {f"base_model.model.{key}": value for key, value in projector.items()}
    vision = named(model, "vision_model.", transformers_vision_rows("vision_model", "vision_model"))
    source = write(tmp_path / "lora", "non_lora_trainables.bin", projector, original_config(model))
    write(source, "adapter_model.safetensors", adapter, {"peft_type": "LORA", "r": 4, "lora_alpha": 8})
    parts = {
        "base": write(tmp_path / "base", "model.safetensors", base, LANGUAGE),
        "vision": write(tmp_path / "vision", "model.safetensors", vision, vision_settings(model)),
    }
    used = peak(tmp_path, "convert", source, "llava", tmp_path / "out", parts=parts, vocabulary="none")
    assert used < 1.2 * size_of(source, *parts.values())


def test_adding_a_delta(tmp_path):
    model = composed(HfvlmVideoChatGPTConfig, video_token_id=7997)
    language = named(model, "language_model.", llama_rows())
    trained = named(model, "projector.", linear_rows(1)) | {EMBEDDING: language[EMBEDDING]}
    base = language | {name: language[name][:7997] for name in (EMBEDDING, HEAD)}
    vision = named(model, "vision_model.", transformers_vision_rows("vision_model", "vision_model"))
    settings = LANGUAGE | {"vocab_size": 7997, "rms_norm_eps": 1e-6, "model_type": "llava"}
    parts = {
        "base": write(tmp_path / "llama", "model.safetensors", base, settings),
        "delta": write(tmp_path / "delta", "pytorch_model.bin", base, settings),
        "vision": write(tmp_path / "vision", "model.safetensors", vision, vision_settings(model)),
    }
    source = write(tmp_path / "release", "video_chatgpt-7B.bin", trained)
    given = source / "video_chatgpt-7B.bin"
    used = peak(tmp_path, "convert", given, "video_chatgpt", tmp_path / "out", parts=parts, vocabulary="none")
    assert used < 1.2 * size_of(source, *parts.values())
