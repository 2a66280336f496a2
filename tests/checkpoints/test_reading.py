"""What can be read is read exactly; what could run code, or is damaged, is refused by name."""

import argparse
import io
import json
import os
import pickle
import struct
import sys
import types
import zipfile
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from hfvlm.checkpoints import CheckpointError, read_checkpoint

TENSORS = {
    "layer.weight": torch.randn(3, 4),
    "layer.bias": torch.randn(8).half()[2:5],
    "transposed": torch.randn(4, 6).bfloat16().t(),
    "count": torch.tensor(7),
    "flags": torch.tensor([True, False]),
    "empty": torch.empty(0, 3),
}


def check(path, expected=None):
    found = read_checkpoint(path).tensors
    expected = TENSORS if expected is None else expected
    assert set(found) == set(expected)
    for key, value in expected.items():
        assert found[key].dtype == value.dtype, key
        assert torch.equal(found[key], value), key


def test_torch_zip(tmp_path):
    torch.save(TENSORS, tmp_path / "a.pt")
    check(tmp_path / "a.pt")


def test_names_mean_nothing(tmp_path):
    torch.save(TENSORS, tmp_path / "model.safetensors")
    check(tmp_path / "model.safetensors")


def test_legacy_torch_file(tmp_path):
    torch.save(TENSORS, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    check(tmp_path / "old.pth")


@pytest.mark.parametrize("wrapper", ["state_dict", "model", "module"])
def test_wrappers_prefixes_and_training_leftovers(tmp_path, wrapper):
    tensors = {f"module.{key}": torch.nn.Parameter(v) if v.is_floating_point() else v for key, v in TENSORS.items()}
    arguments = argparse.Namespace(lr=1e-3, model="ViT", nested=argparse.Namespace(depth=2))
    torch.save({wrapper: tensors, "args": arguments, "epoch": 3}, tmp_path / "a.pt")
    checkpoint = read_checkpoint(tmp_path / "a.pt")
    assert set(checkpoint.tensors) == set(TENSORS)
    assert checkpoint.extras == {"args": {"lr": 1e-3, "model": "ViT", "nested": {"depth": 2}}, "epoch": 3}


def test_a_whole_training_state(tmp_path):
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "a.pt")
    check(tmp_path / "a.pt", dict(model.state_dict()))


def test_a_whole_pickled_module_without_its_code(tmp_path, monkeypatch):
    """As OpenAI released DALL-E's codebook."""

    class Encoder(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = torch.nn.Sequential(OrderedDict(input=torch.nn.Conv2d(3, 4, 1), relu=torch.nn.ReLU()))
            self.norm = torch.nn.BatchNorm1d(4)
            self.device, self.gain, self.scratch = torch.device("cpu"), 0.5, torch.ones(2)
            self.register_buffer("places", torch.arange(3), persistent=False)
            self.register_parameter("bias", None)

    package = types.ModuleType("dall_e.encoder")
    package.Encoder, Encoder.__module__, Encoder.__qualname__ = Encoder, "dall_e.encoder", "Encoder"
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "dall_e", types.ModuleType("dall_e"))
        patch.setitem(sys.modules, "dall_e.encoder", package)
        module = Encoder()
        torch.save(module, tmp_path / "encoder.pkl")
    check(tmp_path / "encoder.pkl", module.state_dict())


@pytest.mark.filterwarnings("ignore:`torch.jit")
@pytest.mark.parametrize("how", ["script", "trace"])
def test_torchscript_archive_without_running_it(tmp_path, how):
    class Part(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.body = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
            self.sizes = [1, 2]
            self.register_buffer("input_resolution", torch.tensor(224))

        def forward(self, x):
            return self.body(x)

    part = Part().eval()
    archive = torch.jit.script(part) if how == "script" else torch.jit.trace(part, torch.randn(2, 3))
    archive.save(str(tmp_path / "a.pt"))
    check(tmp_path / "a.pt", dict(part.state_dict()))


def test_safetensors_shards_and_folders(tmp_path):
    whole = {key: value.clone().contiguous() for key, value in TENSORS.items()}
    save_file(whole, tmp_path / "model.safetensors")
    check(tmp_path, whole)
    shards = tmp_path / "shards"
    shards.mkdir()
    for i, key in enumerate(whole):
        save_file({key: whole[key]}, shards / f"part-{i}.safetensors")
    index = {"weight_map": {key: f"part-{i}.safetensors" for i, key in enumerate(whole)}}
    (shards / "model.safetensors.index.json").write_text(json.dumps(index))
    check(shards, whole)


def test_pytorch_shards(tmp_path):
    keys = list(TENSORS)
    torch.save({key: TENSORS[key] for key in keys[:3]}, tmp_path / "a.bin")
    torch.save({key: TENSORS[key] for key in keys[3:]}, tmp_path / "b.bin")
    weight_map = {key: "a.bin" if key in keys[:3] else "b.bin" for key in keys}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    check(tmp_path)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_npz(tmp_path, save):
    arrays = {"params/a/kernel": np.arange(6, dtype=np.float32).reshape(2, 3), "params/t": np.ones(1, np.float32)}
    save(tmp_path / "a.npz", **arrays)
    check(tmp_path / "a.npz", {key: torch.from_numpy(value) for key, value in arrays.items()})


def test_npz_with_bfloat16_as_jax_stores_it(tmp_path):
    value = torch.tensor([1.5, -2.0], dtype=torch.bfloat16)
    np.savez(tmp_path / "a.npz", a=value.view(torch.int16).numpy().view("V2"))
    check(tmp_path / "a.npz", {"a": value})


def test_tensors_stay_in_the_file(tmp_path):
    """A checkpoint larger than memory could be opened: nothing is copied before it is used."""
    torch.save({"a": torch.zeros(2**22)}, tmp_path / "a.pt")
    before = resident_bytes()
    tensors = read_checkpoint(tmp_path / "a.pt").tensors
    assert resident_bytes() - before < 2**23
    assert tensors["a"].shape == (2**22,)


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


class Evil:
    def __init__(self, function, *args):
        self.call = (function, args)

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize(
    ("function", "args", "name"),
    [
        (os.system, ("true",), "posix.system"),
        (eval, ("1",), "__builtin__.eval"),
        (getattr, ("", "upper"), "__builtin__.getattr"),
        (torch.load, ("x",), "torch.serialization.load"),
        (np.load, ("x",), "numpy.load"),
    ],
)
def test_foreign_functions_are_refused_by_name(tmp_path, function, args, name):
    torch.save({"state_dict": {"a": torch.ones(1)}, "x": Evil(function, *args)}, tmp_path / "evil.pt")
    with pytest.raises(CheckpointError, match=rf"evil.pt: its pickle asks for {name}.*Refused"):
        read_checkpoint(tmp_path / "evil.pt")


def test_whole_modules_are_refused(tmp_path):
    torch.save(torch.nn.Linear(2, 2), tmp_path / "module.pt")
    with pytest.raises(CheckpointError, match=r"torch.nn.modules.linear.Linear"):
        read_checkpoint(tmp_path / "module.pt")


def archive(path, stream: bytes, storages: dict[str, bytes] | None = None) -> None:
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("archive/data.pkl", stream)
        for key, data in (storages or {}).items():
            file.writestr(f"archive/data/{key}", data)


@pytest.mark.parametrize(
    ("stream", "words"),
    [
        (b"\x80\x02(S'echo'\nios\nsystem\n.", "opcode INST"),
        (b"\x80\x02cos\nsystem\n(S'echo'\no.", "posix.system|os.system"),
        (b"\x80\x02\x82\x01.", "opcode EXT1"),
        (b"\x80\x02P1\n.", "opcode PERSID"),
        (b"\x80\x02}", "damaged pickle"),
        (b"", "damaged pickle"),
        (b"\x80\x02]q\x00h\x05.", "damaged pickle"),
    ],
)
def test_foreign_opcodes_are_refused_by_name(tmp_path, stream, words):
    archive(tmp_path / "a.pt", stream)
    with pytest.raises(CheckpointError, match=words):
        read_checkpoint(tmp_path / "a.pt")


def tensor_stream(length: int, offset: int, size: tuple, stride: tuple) -> bytes:
    """A pickle of one float32 tensor with any claims about its storage."""

    storage = object()

    class Pickler(pickle.Pickler):
        def persistent_id(self, value):
            return ("storage", torch.FloatStorage, "0", "cpu", length) if value is storage else None

    buffer = io.BytesIO()
    rebuild = Evil(torch._utils._rebuild_tensor_v2, storage, offset, size, stride, False, {})
    Pickler(buffer, protocol=2).dump({"a": rebuild})
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("claims", "words"),
    [
        ((4, 0, (5,), (1,)), "reaches beyond its storage"),
        ((4, 3, (2,), (1,)), "reaches beyond its storage"),
        ((4, 0, (2, 2), (3, 3)), "reaches beyond its storage"),
        ((4, -1, (2,), (1,)), "no sensible shape"),
        ((4, 0, (2,), (-1,)), "no sensible shape"),
        ((4, 0, (2,), (1, 1)), "no sensible shape"),
        ((400, 0, (2,), (1,)), "shorter than its tensors"),
        ((-4, 0, (2,), (1,)), "unknown persistent object"),
    ],
)
def test_tensors_must_lie_in_their_storage(tmp_path, claims, words):
    archive(tmp_path / "a.pt", tensor_stream(*claims), {"0": struct.pack("4f", 1, 2, 3, 4)})
    with pytest.raises(CheckpointError, match=words):
        read_checkpoint(tmp_path / "a.pt")


def test_state_of_a_tensor_is_not_set_by_a_pickle(tmp_path):
    stream = tensor_stream(4, 0, (2,), (1,))
    archive(tmp_path / "a.pt", stream[:-2] + b"}bs.", {"0": struct.pack("4f", 1, 2, 3, 4)})
    with pytest.raises(CheckpointError, match="sets the state of a Tensor|damaged pickle"):
        read_checkpoint(tmp_path / "a.pt")


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 0.999])
def test_cut_off_files(tmp_path, share):
    whole = tmp_path / "whole.pt"
    torch.save({"a": torch.randn(1000)}, whole)
    data = whole.read_bytes()
    (tmp_path / "cut.pt").write_bytes(data[: int(len(data) * share)])
    with pytest.raises(CheckpointError, match="cut.pt.*(damaged|cut off)"):
        read_checkpoint(tmp_path / "cut.pt")


def test_cut_off_safetensors(tmp_path):
    save_file({"a": torch.randn(100)}, tmp_path / "a.safetensors")
    data = (tmp_path / "a.safetensors").read_bytes()
    (tmp_path / "a.safetensors").write_bytes(data[:-50])
    with pytest.raises(CheckpointError, match="damaged safetensors"):
        read_checkpoint(tmp_path / "a.safetensors")


def test_compressed_entries_and_bombs(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.pt", "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("archive/data.pkl", b"\x80\x02}.")
    with pytest.raises(CheckpointError, match="is compressed"):
        read_checkpoint(tmp_path / "a.pt")
    np.savez_compressed(tmp_path / "a.npz", a=np.zeros(2**24, np.float32))
    with pytest.raises(CheckpointError, match="decompression bomb"):
        read_checkpoint(tmp_path / "a.npz")


def test_what_is_no_checkpoint(tmp_path):
    (tmp_path / "a.pkl").write_bytes(pickle.dumps({"a": 1}))
    (tmp_path / "a.txt").write_text("hello" * 10)
    (tmp_path / "empty").write_bytes(b"")
    with zipfile.ZipFile(tmp_path / "other.zip", "w") as file:
        file.writestr("a.txt", "x")
    torch.save([1, 2], tmp_path / "list.pt")
    torch.save({"epoch": 1}, tmp_path / "nothing.pt")
    for name, words in (
        ("a.pkl", "a bare pickle"),
        ("a.txt", "not a safetensors file"),
        ("empty", "not a safetensors file"),
        ("other.zip", "neither a PyTorch file"),
        ("list.pt", "holds a list"),
        ("nothing.pt", "holds no tensors; its entries are epoch"),
    ):
        with pytest.raises(CheckpointError, match=f"{name}: .*{words}"):
            read_checkpoint(tmp_path / name)
    with pytest.raises(FileNotFoundError, match="no such file"):
        read_checkpoint(tmp_path / "absent")
    with pytest.raises(FileNotFoundError, match="holds none of model.safetensors"):
        read_checkpoint(tmp_path)


@pytest.mark.parametrize("shard", ["../outside.safetensors", "/etc/passwd", "a/b.safetensors"])
def test_shards_stay_in_their_folder(tmp_path, shard):
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": shard}}))
    with pytest.raises(CheckpointError, match="is not a file beside the index"):
        read_checkpoint(tmp_path)


def test_a_broken_index_is_named(tmp_path):
    for content in ("{", "[]", json.dumps({"weight_map": {"a": 3}})):
        (tmp_path / "model.safetensors.index.json").write_text(content)
        with pytest.raises(CheckpointError, match="index.json"):
            read_checkpoint(tmp_path)


def test_object_arrays_are_refused(tmp_path):
    np.savez(tmp_path / "a.npz", a=np.array([Evil(os.system, "true")], dtype=object))
    with pytest.raises(CheckpointError, match="'a' cannot be read.*allow_pickle"):
        read_checkpoint(tmp_path / "a.npz").tensors["a"]


def shards(folder, weight_map, **files):
    folder.mkdir(parents=True, exist_ok=True)
    for name, tensors in files.items():
        save_file(tensors, folder / f"{name}.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


def test_a_tensor_in_two_shards_is_the_index_s(tmp_path):
    one, two = {"a": torch.ones(1), "b": torch.ones(1)}, {"a": torch.zeros(1), "c": torch.ones(1)}
    for name, value in (("one", 1.0), ("two", 0.0)):
        where = {"a": f"{name}.safetensors", "b": "one.safetensors", "c": "two.safetensors"}
        assert read_checkpoint(shards(tmp_path, where, one=one, two=two)).tensors["a"].item() == value


def test_what_index_and_shards_do_not_share_is_named(tmp_path):
    tensors = {"a": torch.ones(1), "b": torch.ones(1)}
    shards(tmp_path, {"a": "one.safetensors"}, one=tensors)
    with pytest.raises(CheckpointError, match="hold 1 tensors that it does not list: b"):
        read_checkpoint(tmp_path)
    shards(tmp_path, dict.fromkeys("abc", "one.safetensors"), one=tensors)
    with pytest.raises(CheckpointError, match="1 listed tensors are in no shard .*'c' of 'one.safetensors'"):
        read_checkpoint(tmp_path)
    shards(tmp_path, dict.fromkeys("ab", "two.safetensors"), one=tensors)
    with pytest.raises(FileNotFoundError, match="two.safetensors: no such file"):
        read_checkpoint(tmp_path)


@pytest.mark.parametrize("shard", ["..", ".", "", "model.safetensors.index.json", "a\\b", "~", "sub"])
def test_what_is_no_shard(tmp_path, shard):
    save_file({"a": torch.ones(1)}, tmp_path / "model.safetensors")
    (tmp_path / "in" / "sub").mkdir(parents=True)
    shards(tmp_path / "in", {"a": shard})
    with pytest.raises((CheckpointError, FileNotFoundError), match="not a file beside the index|no regular|no such"):
        read_checkpoint(tmp_path / "in")


def test_shards_in_the_cache_of_the_hub(tmp_path):
    """Index and shards are links from a snapshot into one folder of blobs."""
    blobs = shards(tmp_path / "blobs", {"a": "one.safetensors"}, one={"a": torch.ones(1)})
    snapshot = tmp_path / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    for path in blobs.iterdir():
        (snapshot / path.name).symlink_to(path)
    assert read_checkpoint(snapshot).tensors["a"].item() == 1


@pytest.mark.parametrize("make", [lambda path: path.symlink_to("/dev/zero"), os.mkfifo], ids=["device", "pipe"])
def test_devices_and_pipes_are_not_read(tmp_path, make):
    make(tmp_path / "model.safetensors")
    for source in (tmp_path, tmp_path / "model.safetensors"):
        with pytest.raises(CheckpointError, match="model.safetensors: no regular file"):
            read_checkpoint(source)
