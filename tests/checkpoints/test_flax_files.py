"""Flax's files, as flax.serialization writes them: MessagePack with arrays as its extension 1."""

import struct

import numpy as np
import pytest
import torch

from hfvlm.checkpoints import CheckpointError, read_checkpoint


def head(small, wide, count):
    """The first bytes of something of a length."""
    return bytes([small + count]) if count < 16 else bytes([wide]) + count.to_bytes(2, "big")


def text(value):
    return bytes([0xD9, len(value)]) + value.encode()


def mapping(entries):
    return head(0x80, 0xDE, len(entries)) + b"".join(text(name) + value for name, value in entries.items())


def array(values, dtype=None, kind=1):
    shape = bytes([0x90 + values.ndim]) + b"".join(b"\xcd" + n.to_bytes(2, "big") for n in values.shape)
    data = values.tobytes()
    inner = b"\x93" + shape + text(dtype or values.dtype.name) + b"\xc6" + len(data).to_bytes(4, "big") + data
    return b"\xc9" + len(inner).to_bytes(4, "big") + bytes([kind]) + inner


def numbered(values):
    return mapping({str(i): value for i, value in enumerate(values)})


MATRIX = np.arange(12, dtype=np.float32).reshape(3, 4)


def written(path, tree):
    path.write_bytes(tree)
    return path


def test_nested_arrays_have_joined_names(tmp_path):
    half = torch.arange(4).bfloat16()
    tree = mapping({"model": mapping({"kernel": array(MATRIX), "none": b"\xc0"}), "step": array(np.array(7))})
    tree = tree[:1].replace(b"\x82", b"\x83") + tree[1:] + text("half")
    tree += array(half.view(torch.int16).numpy(), "bfloat16")
    found = read_checkpoint(written(tmp_path / "flax_model.msgpack", tree)).tensors
    assert list(found) == ["model/kernel", "step", "half"]
    assert torch.equal(found["model/kernel"], torch.from_numpy(MATRIX))
    assert found["step"] == 7
    assert torch.equal(found["half"], half)
    assert list(read_checkpoint(tmp_path).tensors) == list(found)


def test_arrays_in_parts_are_put_together(tmp_path):
    parts = [array(part) for part in np.split(MATRIX.flatten(), [5])]
    shape = numbered([b"\x03", b"\x04"])
    large = mapping({"__msgpack_chunked_array__": b"\xc3", "shape": shape, "chunks": numbered(parts)})
    found = read_checkpoint(written(tmp_path / "x.msgpack", mapping({"large": large}))).tensors
    assert torch.equal(found["large"], torch.from_numpy(MATRIX))


@pytest.mark.parametrize(
    ("tree", "reason"),
    [
        (mapping({"a": array(MATRIX)})[:-1], "cut off"),
        (mapping({"a": array(MATRIX)}) + b"x", "1 bytes after its end"),
        (mapping({"a": array(MATRIX, "float64")}), r"shape \[3, 4\] in 48 bytes"),
        (mapping({"a": array(MATRIX, "object")}), "an array of 'object'"),
        (mapping({"a": array(MATRIX, kind=2)}), "extension 2 is no array"),
        (mapping({"a": b"\xc1"}), "begins nothing"),
        (mapping({"a": b"\x91" * 100 + b"\xc0"}), "more than 64 levels"),
        (b"\xdf" + struct.pack(">I", 2**31) + text("a") + b"\xc0", "cut off"),
        (b"\x82" + (text("a") + b"\xc0") * 2, "or repeat"),
        (mapping({"a": b"\x07"}), "'a/' is a int, no array"),
    ],
)
def test_damaged_files_are_refused(tmp_path, tree, reason):
    with pytest.raises(CheckpointError, match=reason):
        read_checkpoint(written(tmp_path / "x.msgpack", tree))


def test_flax_itself_agrees(tmp_path):
    """What the package msgpack packs, which flax uses."""
    msgpack = pytest.importorskip("msgpack", reason="`pip install msgpack`, which hfvlm is compared with")

    def packed(value):
        inner = msgpack.packb((value.shape, value.dtype.name, value.tobytes()), use_bin_type=True)
        return msgpack.ExtType(1, inner)

    state = {"a": {"b": packed(MATRIX)}, **{f"k{i}": packed(MATRIX[i % 3]) for i in range(20)}}
    found = read_checkpoint(written(tmp_path / "x.msgpack", msgpack.packb(state))).tensors
    assert len(found) == 21
    assert torch.equal(found["a/b"], torch.from_numpy(MATRIX))
    assert torch.equal(found["k19"], torch.from_numpy(MATRIX[1]))
