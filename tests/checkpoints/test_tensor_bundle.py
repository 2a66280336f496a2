"""TensorFlow's checkpoints: read exactly, or refused by name. The files are written here; a reader of TensorFlow's own
is among the goldens of ALIGN."""

import struct

import numpy as np
import pytest
import torch

from hfvlm.checkpoints import TABLE_END, CheckpointError, read_checkpoint
from hfvlm.checkpoints.tensor_bundle import DTYPES, LONGEST_KEY, OBJECT_GRAPH, STRING, crc32c, masked

NUMBERS = {dtype: number for number, dtype in DTYPES.items()}
TENSORS = {
    "block1/bias": torch.randn(5),
    "block1/kernel": torch.randn(3, 4).double(),
    "block2/kernel": torch.randn(2, 1, 3).bfloat16(),
    "count": torch.tensor(7),
    "empty": torch.empty(0, 3),
    "flags": torch.tensor([True, False]),
    "half": torch.randn(300).half(),
    "total": torch.tensor(2.5),
}


# A writer of the format


def varint(value):
    parts = []
    while value > 127:
        parts.append(value & 127 | 128)
        value >>= 7
    return bytes([*parts, value])


def field(number, value):
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    return varint(number << 3 | 2) + varint(len(value)) + value


def block(rows, *, compression=0):
    """Keys in full every second time, and otherwise what they do not share with the one before."""
    data, restarts, before = b"", [], b""
    for i, (key, value) in enumerate(rows):
        shared = 0
        if i % 2:
            shared = next(
                (n for n, (a, b) in enumerate(zip(before, key, strict=False)) if a != b), min(len(before), len(key))
            )
        else:
            restarts.append(len(data))
        data += varint(shared) + varint(len(key) - shared) + varint(len(value)) + key[shared:] + value
        before = key
    restarts = restarts or [0]
    data += struct.pack(f"<{len(restarts) + 1}I", *restarts, len(restarts)) + bytes([compression])
    return data + struct.pack("<I", masked(crc32c(data)))


def table(rows, *, rows_a_block=3, compression=0):
    rows, data, index = sorted(rows.items()), b"", []
    for start in range(0, len(rows), rows_a_block):
        part = block(rows[start : start + rows_a_block], compression=compression)
        index.append((rows[min(start + rows_a_block, len(rows)) - 1][0], varint(len(data)) + varint(len(part) - 5)))
        data += part
    handles = b""
    for part in (block([]), block(index)):
        handles += varint(len(data)) + varint(len(part) - 5)
        data += part
    return data + handles.ljust(40, b"\0") + TABLE_END


def entry(tensor, shard, place, **changes):
    """The description of a tensor; `changes` tell lies."""
    raw = tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""
    facts = {"dtype": NUMBERS[tensor.dtype], "size": len(raw), "offset": place, "shape": tensor.shape} | changes
    shape = b"".join(field(2, field(1, size)) for size in facts["shape"])
    value = field(1, facts["dtype"]) + field(2, shape) + field(3, shard)
    value += field(4, facts["offset"]) + field(5, facts["size"])
    value += varint(6 << 3 | 5) + struct.pack("<I", facts.get("crc", masked(crc32c(raw)))) + facts.get("more", b"")
    return value, raw


def string(value, offset):
    length = struct.pack("<I", len(value))
    check = struct.pack("<I", masked(crc32c(length)))
    raw = varint(len(value)) + check + value
    crc = masked(crc32c(length + check + value))
    fields = field(1, STRING) + field(2, b"") + field(4, offset) + field(5, len(raw))
    return fields + varint(6 << 3 | 5) + struct.pack("<I", crc), raw


def write(folder, tensors=TENSORS, *, shards=1, graph=None, header=None, lies=None, **options):
    """A checkpoint called `weights`; `graph` are the variables' full names by their keys."""
    rows = {b"": field(1, shards) + field(3, b"\x08\x01") if header is None else header}
    files = [b""] * shards
    for i, (key, tensor) in enumerate(tensors.items()):
        shard = i % shards
        value, raw = entry(tensor, shard, len(files[shard]), **(lies or {}).get(key, {}))
        rows[key.encode()], files[shard] = value, files[shard] + raw
    if graph is not None:
        attributes = [
            field(2, field(1, b"VARIABLE_VALUE") + field(2, v.encode()) + field(3, k.encode()))
            for k, v in graph.items()
        ]
        rows[OBJECT_GRAPH.encode()], raw = string(b"".join(field(1, node) for node in attributes), len(files[0]))
        files[0] += raw
    folder.mkdir(exist_ok=True)
    (folder / "weights.index").write_bytes(table(rows, **options))
    for i, data in enumerate(files):
        (folder / f"weights.data-{i:05d}-of-{shards:05d}").write_bytes(data)
    (folder / "checkpoint").write_text('model_checkpoint_path: "weights"\n')
    return folder


def test_checksums_of_the_standard():
    """RFC 3720, B.4, and a plain loop."""
    assert crc32c(b"123456789") == 0xE3069283
    assert crc32c(bytes(32)) == 0x8A9136AA
    assert crc32c(b"\xff" * 32) == 0x62A8AB43
    assert crc32c(bytes(range(32))) == 0x46DD794E
    for size in (0, 1, 3, 4, 63, 64, 1000, 4097):
        data, register = np.random.RandomState(size).bytes(size), 0xFFFFFFFF
        for byte in data:
            register ^= byte
            for _ in range(8):
                register = register >> 1 ^ (0x82F63B78 if register & 1 else 0)
        assert crc32c(data) == register ^ 0xFFFFFFFF, size


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("rows_a_block", [1, 3, 100])
def test_every_tensor_is_read(tmp_path, shards, rows_a_block):
    write(tmp_path, shards=shards, rows_a_block=rows_a_block)
    for source in (tmp_path, tmp_path / "weights.index"):
        found = read_checkpoint(source).tensors
        assert set(found) == set(TENSORS)
        for key, tensor in TENSORS.items():
            assert found[key].dtype == tensor.dtype
            assert torch.equal(found[key], tensor), key


def test_variables_are_named(tmp_path):
    """By their full names, unless these are not unique; an optimizer's go by their keys."""
    slot = "a/.OPTIMIZER_SLOT/optimizer/m/.ATTRIBUTES/VARIABLE_VALUE"
    keys = ["a/.ATTRIBUTES/VARIABLE_VALUE", "b/count", "c/count", "d", slot, "optimizer/iter"]
    names = ["stem/kernel", "count", "count", "", "stem/kernel/m", "iter"]
    tensors = {key: torch.tensor(float(i)) for i, key in enumerate(keys)}
    found = read_checkpoint(write(tmp_path, tensors, graph=dict(zip(keys, names, strict=True)))).tensors
    expected = ["stem/kernel", "b/count", "c/count", "d", slot, "optimizer/iter"]
    assert {name: float(tensor) for name, tensor in found.items()} == {
        name: float(i) for i, name in enumerate(expected)
    }


def test_tensors_are_checked_when_they_are_read(tmp_path):
    write(tmp_path)
    shard = tmp_path / "weights.data-00000-of-00001"
    data = bytearray(shard.read_bytes())
    data[3] ^= 1
    shard.write_bytes(data)
    found = read_checkpoint(tmp_path).tensors
    assert torch.equal(found["total"], TENSORS["total"])
    with pytest.raises(CheckpointError, match=r"weights.index: damaged.*'block1/bias' does not have the checksum"):
        found["block1/bias"]


def test_a_cut_off_index_is_named(tmp_path):
    index = write(tmp_path, graph={"total": "sum"}) / "weights.index"
    whole = index.read_bytes()
    for size in range(0, len(whole), 7):
        index.write_bytes(whole[:size])
        with pytest.raises(CheckpointError, match="weights.index"):
            read_checkpoint(index)
    index.write_bytes(whole[100:])
    with pytest.raises(CheckpointError, match="checksum|beyond the index"):
        read_checkpoint(index)


def test_every_wrong_byte_of_the_index_is_noticed(tmp_path):
    index = write(tmp_path, graph={"total": "sum"}) / "weights.index"
    whole, expected = index.read_bytes(), read_checkpoint(index).tensors
    for place in range(0, len(whole), 3):
        data = bytearray(whole)
        data[place] ^= 0x55
        index.write_bytes(data)
        try:
            found = read_checkpoint(index).tensors
        except CheckpointError:
            continue  # otherwise it is a byte that nobody reads: of the empty block of extra data, or of the padding
        assert set(found) == set(expected)
        assert all(torch.equal(found[key], expected[key]) for key in expected)


def test_shards_that_are_cut_off_or_missing(tmp_path):
    shard = write(tmp_path) / "weights.data-00000-of-00001"
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="shard 0 is cut off before the end of 'total'"):
        read_checkpoint(tmp_path)
    shard.unlink()
    with pytest.raises(CheckpointError, match="shard weights.data-00000-of-00001 is not beside it"):
        read_checkpoint(tmp_path)
    shard.write_bytes(b"")
    with pytest.raises(CheckpointError, match="cut off"):
        read_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("lie", "words"),
    [
        ({"dtype": 8}, "data type 8"),
        ({"size": 19}, r"shape \(5,\) claims 19 bytes"),
        ({"shape": (2**40, 2**40)}, "claims 20 bytes"),
        ({"shape": (2**63,)}, "makes no sense"),
        ({"offset": 2**62}, "cut off"),
        ({"more": field(7, b"")}, "stored in slices"),
        ({"more": varint(9 << 3 | 3)}, "field of an unknown kind"),
        ({"more": varint(9 << 3 | 2) + varint(2**40)}, "message is cut off"),
        ({"more": b"\xff" * 11}, "too many bytes"),
        ({"more": b"\xff"}, "cut off within a number"),
        ({"crc": 0}, "checksum"),
    ],
)
def test_lies_are_named(tmp_path, lie, words):
    write(tmp_path, lies={"block1/bias": lie})
    with pytest.raises(CheckpointError, match=rf"weights.index: damaged TensorFlow checkpoint.*{words}"):
        read_checkpoint(tmp_path).tensors["block1/bias"]


def test_what_is_not_read_is_refused(tmp_path):
    for options, words in (
        ({"compression": 1}, "compressed"),
        ({"header": field(1, 1) + field(2, 1)}, "big-endian"),
        ({"tensors": {"a" * (LONGEST_KEY + 1): torch.ones(1)}}, "beyond its block"),
    ):
        write(tmp_path, **options)
        with pytest.raises(CheckpointError, match=words):
            read_checkpoint(tmp_path)


def test_foreign_bytes_with_good_checksums(tmp_path):
    """Values that are no messages: named, and nothing else happens."""
    random = np.random.RandomState(0)
    (tmp_path / "weights.data-00000-of-00001").write_bytes(bytes(64))
    for _ in range(300):
        rows = {b"": field(1, 1), OBJECT_GRAPH.encode(): random.bytes(random.randint(40)), b"\xff": random.bytes(9)}
        rows = {key: value for key, value in rows.items() if random.rand() < 0.8}
        (tmp_path / "weights.index").write_bytes(table(rows))
        try:
            found = read_checkpoint(tmp_path / "weights.index").tensors
        except CheckpointError:
            continue
        assert not list(found)


def test_a_folder_with_several_checkpoints(tmp_path):
    write(tmp_path)
    (tmp_path / "older.index").write_bytes((tmp_path / "weights.index").read_bytes())
    with pytest.raises(FileNotFoundError, match="Name the weights file itself"):
        read_checkpoint(tmp_path)
