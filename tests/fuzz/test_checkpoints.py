"""Damaged checkpoints of every format: refused by name, or read as they were."""

import io
import json
import random
import shutil
import struct
import zipfile
from collections import OrderedDict

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from hfvlm.checkpoints import CheckpointError, read_checkpoint
from hfvlm.checkpoints.tensor_bundle import table as rows_of
from tests.checkpoints.test_tensor_bundle import table, write
from tests.fuzz.mutations import Tally, mutated, mutated_json

TENSORS = {
    "visual.conv1.weight": torch.arange(24.0).view(2, 3, 4),
    "visual.proj": torch.arange(12).half().view(3, 4).t(),
    "logit_scale": torch.tensor(2.5),
    "ids": torch.arange(5),
    "mask": torch.tensor([True, False]),
}
STATE = {"state_dict": OrderedDict(TENSORS), "epoch": 3, "args": {"lr": [0.1, 1e-4], "name": "ViT"}}


def torch_zip(path):
    torch.save(STATE, path)


def torch_legacy(path):
    torch.save(STATE, path, _use_new_zipfile_serialization=False)


def safetensors(path):
    save_file({name: value.contiguous() for name, value in TENSORS.items()}, path)


def npz(path):
    np.savez(path.with_suffix(".npz"), **{name: value.numpy() for name, value in TENSORS.items()})
    path.with_suffix(".npz").rename(path)


def compressed_npz(path):
    np.savez_compressed(path.with_suffix(".npz"), **{name: value.numpy() for name, value in TENSORS.items()})
    path.with_suffix(".npz").rename(path)


# The format, and whether it has checksums of all that is read, so that what is accepted is as it was.
FORMATS = {torch_zip: True, torch_legacy: False, safetensors: False, npz: True, compressed_npz: True}


def read(path):
    tensors = read_checkpoint(path).tensors
    return {name: tensors[name].clone() for name in tensors}


def same(found):
    names = set(found) == set(TENSORS)
    return names and all(
        value.dtype == TENSORS[name].dtype and torch.equal(value, TENSORS[name]) for name, value in found.items()
    )


@pytest.mark.parametrize("make", FORMATS, ids=lambda make: make.__name__)
@pytest.mark.filterwarnings("ignore")
def test_damaged_files(tmp_path, fuzz_rounds, make):
    whole, path = tmp_path / "whole", tmp_path / "damaged"
    make(whole)
    data, tally = whole.read_bytes(), Tally(make.__name__, (CheckpointError,))
    assert same(read(whole))

    def accept(found):
        if same(found):
            return "accepted unchanged"
        assert not FORMATS[make], f"{make.__name__}: other tensors than the file's"
        return "accepted with other numbers or names, which the format does not check"

    for seed in range(fuzz_rounds):
        path.write_bytes(mutated(data, random.Random(seed)))
        tally.attempt(f"{make.__name__} {seed}", lambda: read(path), accept)
    tally.report()


def repacked(data, stream):
    """The archive with another pickle, and checksums as they should be."""
    packed = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(packed, "w") as new:
        for info in old.infolist():
            content = stream if info.filename.endswith("data.pkl") else old.read(info)
            new.writestr(zipfile.ZipInfo(info.filename), content)
    return packed.getvalue()


def test_damaged_pickles_with_good_checksums(tmp_path, fuzz_rounds):
    path = tmp_path / "damaged.pt"
    torch_zip(tmp_path / "whole.pt")
    data, tally = (tmp_path / "whole.pt").read_bytes(), Tally("pickles", (CheckpointError,))
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        stream = archive.read("whole/data.pkl")
    for seed in range(fuzz_rounds):
        path.write_bytes(repacked(data, mutated(stream, random.Random(seed))))
        tally.attempt(f"pickles {seed}", lambda: read(path))
    tally.report()


def test_damaged_headers_of_safetensors(tmp_path, fuzz_rounds):
    path, tally = tmp_path / "damaged.safetensors", Tally("headers", (CheckpointError,))
    safetensors(tmp_path / "whole")
    data = (tmp_path / "whole").read_bytes()
    size = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + size])
    for seed in range(fuzz_rounds):
        text = json.dumps(mutated_json(header, random.Random(seed))).encode()
        path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + size :])
        tally.attempt(f"headers {seed}", lambda: read(path))
    tally.report()


def test_damaged_indices_of_shards(tmp_path, fuzz_rounds):
    tally, index = Tally("shards", (CheckpointError, FileNotFoundError)), tmp_path / "model.safetensors.index.json"
    names = list(TENSORS)
    for i, part in enumerate((names[:2], names[2:])):
        save_file({name: TENSORS[name].contiguous() for name in part}, tmp_path / f"{i}.safetensors")
    content = {
        "metadata": {"total_size": 1},
        "weight_map": {name: f"{int(i > 1)}.safetensors" for i, name in enumerate(names)},
    }
    for seed in range(fuzz_rounds):
        chance = random.Random(seed)
        text = json.dumps(mutated_json(content, chance)).encode()
        index.write_bytes(text if chance.random() < 0.7 else mutated(json.dumps(content).encode(), chance))
        tally.attempt(
            f"shards {seed}", lambda: read(tmp_path), lambda found: "accepted unchanged" if same(found) else "other"
        )
    tally.report()
    assert not tally.counts["other"], "tensors of another shard than the index names, or not all"


@pytest.mark.parametrize("part", ["weights.index", "weights.data-00000-of-00001"])
def test_damaged_bundles(tmp_path, fuzz_rounds, part):
    tally, path = Tally(part, (CheckpointError,)), tmp_path / part
    tensors = {name.replace(".", "/"): value.contiguous() for name, value in TENSORS.items()}
    write(tmp_path, tensors, graph={"ids": "numbers"})
    data, expected = path.read_bytes(), read(tmp_path)

    def accept(found):
        assert set(found) == set(expected)
        assert all(torch.equal(value, expected[name]) for name, value in found.items())
        return "accepted unchanged"

    for seed in range(fuzz_rounds):
        path.write_bytes(mutated(data, random.Random(seed)))
        tally.attempt(f"{part} {seed}", lambda: read(tmp_path), accept)
    tally.report()


def test_damaged_entries_of_bundles_with_good_checksums(tmp_path, fuzz_rounds):
    tally, path = Tally("entries", (CheckpointError,)), tmp_path / "weights.index"
    tensors = {name.replace(".", "/"): value.contiguous() for name, value in TENSORS.items()}
    write(tmp_path, tensors, graph={"ids": "numbers"})
    rows = dict(rows_of(path.read_bytes()))
    for seed in range(fuzz_rounds):
        chance, damaged = random.Random(seed), dict(rows)
        key = chance.choice(list(rows))
        value = damaged.pop(key)
        damaged |= {key: mutated(value, chance)} if chance.random() < 0.8 else {mutated(key, chance): value}
        path.write_bytes(table(damaged))
        tally.attempt(f"entries {seed}", lambda: read(tmp_path))
    tally.report()


def test_folders_in_the_place_of_files(tmp_path):
    """And links, pipes and devices."""
    import os

    safetensors(tmp_path / "whole.safetensors")
    index = tmp_path / "in" / "model.safetensors.index.json"
    index.parent.mkdir()
    index.write_text(json.dumps({"weight_map": dict.fromkeys(TENSORS, "part.safetensors")}))
    part = index.parent / "part.safetensors"
    shutil.copy(tmp_path / "whole.safetensors", part)
    assert same(read(index.parent))
    part.unlink()
    for make in (
        part.mkdir,
        lambda: part.symlink_to("/dev/zero"),
        lambda: part.symlink_to(tmp_path / "whole.safetensors"),
        lambda: part.symlink_to(part),
        lambda: os.mkfifo(part),
    ):
        make()
        with pytest.raises((CheckpointError, FileNotFoundError), match="part.safetensors"):
            read(index.parent)
        part.rmdir() if part.is_dir() else part.unlink()
