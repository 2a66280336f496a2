"""Small files that would fill the memory, or never end: refused by name, in little memory and soon."""

import json
import os
import struct
import zipfile

import numpy as np
import pytest
import torch

from hfvlm.checkpoints import CheckpointError, read_checkpoint
from tests.checkpoints.test_reading import archive, tensor_stream
from tests.checkpoints.test_tensor_bundle import TABLE_END, block, entry, field, table, varint
from tests.support.processes import run_fresh

MIB = 2**20
READ = """
import json, sys, time
from hfvlm.checkpoints import CheckpointError, read_checkpoint
import hfvlm.checkpoints.tensor_bundle
def memory(name):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(name))
for path in sys.argv[1:]:
    open("/proc/self/clear_refs", "w").write("5")  # forgets the peak so far
    before, start = memory("VmRSS"), time.perf_counter()
    try:
        tensors = read_checkpoint(path).tensors
        [tensors[name] for name in tensors]
        result = "accepted"
    except CheckpointError as error:
        result = str(error)
    print(json.dumps([path, result, memory("VmHWM") - before, time.perf_counter() - start]))
"""
TENSOR = tensor_stream(4, 0, (2**40,), (0,))[:-1]
MEMO = b"\x80\x02"


def pickled(stream):
    return lambda path: archive(path, stream, {"0": struct.pack("4f", 1, 2, 3, 4)})


def tensor(*claims):
    return pickled(tensor_stream(4, *claims))


def doubling(levels, first=b"}"):
    """Each level holds the one before twice: two to the power of `levels` paths."""
    return first + b"".join(b"q%ch%c\x86" % (i, i) for i in range(levels))


def safetensors(header, data=b""):
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    return lambda path: path.write_bytes(struct.pack("<Q", len(header)) + header + data)


def f32(start, end, shape=(1,), dtype="F32"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}


def bundle(rows, data=bytes(64)):
    def write(path):
        path.write_bytes(table({b"": field(1, 1)} | rows) if isinstance(rows, dict) else rows)
        path.with_name(f"{path.stem}.data-00000-of-00001").write_bytes(data)

    return write


def shared_prefixes(count):
    """Long keys, written as what they do not share with the one before: three bytes each."""
    long = b"k" * 4000
    data = varint(0) + varint(4000) + varint(0) + long
    data += b"".join(varint(3990) + varint(10) + varint(0) + b"%010d" % i for i in range(count))
    data += struct.pack("<2I", 0, 1) + b"\0"
    from hfvlm.checkpoints.tensor_bundle import crc32c, masked

    first = data + struct.pack("<I", masked(crc32c(data)))
    index = block([(b"z", varint(0) + varint(len(first) - 5))])
    handles = varint(0) * 2 + varint(len(first)) + varint(len(index) - 5)
    return first + index + handles.ljust(40, b"\0") + TABLE_END


def same_block(count):
    part = block([(b"k%06d" % i, b"v" * 40) for i in range(1000)])
    index = block([(b"z%06d" % i, varint(0) + varint(len(part) - 5)) for i in range(count)])
    handles = varint(0) * 2 + varint(len(part)) + varint(len(index) - 5)
    return part + index + handles.ljust(40, b"\0") + TABLE_END


def npy(shape, data=b"", dtype="<f4"):
    header = repr({"descr": dtype, "fortran_order": False, "shape": shape}).encode()
    header += b" " * (-(len(header) + 11) % 64) + b"\n"
    content = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + data

    def write(path):
        with zipfile.ZipFile(path, "w") as file:
            file.writestr("a.npy", content)

    return write


def many_entries(path):
    with zipfile.ZipFile(path, "w") as file:
        for i in range(120_000):
            file.writestr(f"a/data/{i:020}", b"")


def shape_of(axes):
    return bundle({b"a": entry(torch.ones(1), 0, 0, shape=(1,) * axes)[0]})


pytestmark = pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="measures memory as Linux does")

HOSTILE = {
    "a dictionary that holds itself": pickled(MEMO + b"}q\x00X\x05\x00\x00\x00modelh\x00s."),
    "a list that holds itself": pickled(MEMO + b"}X\x01\x00\x00\x00a]q\x00h\x00as."),
    "an object that holds itself": pickled(MEMO + b"cargparse\nNamespace\n)Rq\x00}X\x01\x00\x00\x00ah\x00sb."),
    "a module that holds itself": pickled(MEMO + b"c__torch__\nM\n)\x81q\x00}X\x01\x00\x00\x00ah\x00sb."),
    "a tree of paths": pickled(MEMO + b"}X\x01\x00\x00\x00a" + doubling(60) + b"s."),
    "a tree of paths as a key": pickled(MEMO + b"}" + doubling(60, b"K\x01") + b"K\x01s."),
    "a tree of paths in a set": pickled(MEMO + b"\x8f(" + doubling(60, b"K\x01") + b"\x90."),
    "a tree of paths as an index": pickled(MEMO + doubling(60, b"K\x01") + b"Q."),
    "a tree of objects": pickled(
        MEMO
        + b"cargparse\nNamespace\n)Rq\x00"
        + b"".join(
            b"cargparse\nNamespace\n)Rq%c}(X\x01\x00\x00\x00ah%cX\x01\x00\x00\x00bh%cub" % (i + 1, i, i)
            for i in range(60)
        )
        + b"."
    ),
    "items added to a tensor": pickled(TENSOR[:2] + tensor_stream(4, 0, (2**28,), (0,))[2:-1] + b"(K\x01\x90."),
    "items appended to a tensor": pickled(tensor_stream(4, 0, (2**28,), (0,))[:-1] + b"(K\x01e."),
    "a size that is a tensor": pickled(
        b"\x80\x02ctorch\nSize\n" + tensor_stream(4, 0, (4,), (1,))[3:-3].replace(b"q\x00", b"") + b"\x85R."
    ),
    "a tensor without steps": tensor(0, (10**13,), (0,)),
    "many tensors without steps": tensor(0, (2**20, 2**9), (0, 0)),
    "axes": tensor(0, (1,) * 60_000, (1,) * 60_000),
    "sets": pickled(MEMO + b"\x8f" * (5 * MIB) + b"."),
    "dictionaries": pickled(MEMO + b"(" + b"}" * (5 * MIB) + b"l."),
    "lists": pickled(MEMO + b"(" + b"]" * (5 * MIB) + b"l."),
    "marks": pickled(MEMO + b"(" * (5 * MIB) + b"."),
    "numbers": pickled(MEMO + b"(" + b"K\x01" * (3 * MIB) + b"l."),
    "kept objects": pickled(MEMO + b"(" + b"Nr\x00\x00\x00\x00" * (MIB // 2) + b"l."),
    "kept far away": pickled(MEMO + b"Np99999999999999999999\n."),
    "objects": pickled(MEMO + b"cargparse\nNamespace\nq\x00(" + b"h\x00)R" * MIB + b"l."),
    "3,000 levels": pickled(MEMO + b"}X\x01\x00\x00\x00a" + b"]" * 3000 + b"a" * 2999 + b"s."),
    "3,000 wrappers": pickled(MEMO + b"}X\x05\x00\x00\x00model" * 3000 + b"}" + b"s" * 3000 + b"."),
    "a long integer": pickled(MEMO + b"\x8b" + struct.pack("<I", 2 * MIB) + b"\x7f" * (2 * MIB) + b"."),
    "an integer in letters": pickled(MEMO + b"L" + b"9" * MIB + b"\n."),
    "a long name": pickled(MEMO + b"c" + b"a" * (5 * MIB) + b"\nb\n."),
    "a long key": pickled(MEMO + b"}X" + struct.pack("<I", 5 * MIB) + b"\x1b" * (5 * MIB) + b"K\x01s."),
    "a long shape": tensor(0, (2**60,) * 8, (2**60,) * 8),
    "a header of a gigabyte": lambda path: path.write_bytes(struct.pack("<Q", 2**30) + b"{" + b" " * 1000),
    "a header of spaces": safetensors(b"{" + b" " * (20 * MIB) + b"}"),
    "numbers on each other": safetensors({"a": f32(0, 4), "b": f32(2, 6)}, bytes(6)),
    "numbers beyond the end": safetensors({"a": f32(0, 4 * 10**9, (10**9,))}, bytes(4)),
    "numbers before the beginning": safetensors({"a": f32(8, 4)}, bytes(8)),
    "an odd type": safetensors({"a": f32(0, 4, dtype="Q7")}, bytes(4)),
    "a negative size": safetensors({"a": f32(0, 4, (-1,))}, bytes(4)),
    "a wide size": safetensors({"a": f32(0, 4, (2**40, 2**40))}, bytes(4)),
    "a hole": safetensors({"a": f32(8, 12)}, bytes(12)),
    "levels of lists": safetensors(b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}"),
    "a shape that is not the data's": npy((10**13,)),
    "a shape of many axes": npy((1,) * 400, bytes(4)),
    "a negative shape": npy((-1,), bytes(4)),
    "an odd dtype": npy((1,), bytes(8), "M8[ns]"),
    "120,000 entries": many_entries,
    "long keys of an index": bundle(shared_prefixes(80_000)),
    "one block many times": bundle(same_block(3_000)),
    "60,000 axes of a variable": shape_of(60_000),
    "a variable of odd size": bundle({b"a": entry(torch.ones(1), 0, 0, size=2**62, shape=(2**60,))[0]}),
    "variables on each other": bundle({b"k%03d" % i: entry(torch.ones(16), 0, 0)[0] for i in range(100)}),
    "a variable without a checksum": bundle({b"a": field(1, 1) + field(4, 0) + field(5, 4)}),
}


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hostile")
    paths = {}
    for i, (name, write) in enumerate(HOSTILE.items()):
        paths[name] = folder / f"{i}.index"
        write(paths[name])
    run = run_fresh(READ, *paths.values(), check=False)
    lines = [json.loads(line) for line in run.stdout.splitlines()]
    assert len(lines) == len(HOSTILE), (run.stderr[-2000:], list(HOSTILE)[len(lines)])
    return dict(zip(HOSTILE, lines, strict=True))


@pytest.mark.parametrize("name", HOSTILE)
def test_refused_soon_and_in_little_memory(results, name):
    path, message, memory, seconds = results[name]
    assert message != "accepted"
    assert path in message
    assert len(message) < 2500
    assert "\x1b" not in message
    assert memory < 48 * MIB + 2 * os.path.getsize(path)
    assert seconds < 10


def test_a_flipped_bit_is_noticed_when_its_tensor_is_read(tmp_path):
    tensors = {"a": torch.zeros(1000), "b": torch.ones(1000)}
    torch.save(tensors, tmp_path / "a.pt")
    data = bytearray((tmp_path / "a.pt").read_bytes())
    data[data.index(struct.pack("<f", 1) * 10) + 2] ^= 1
    (tmp_path / "a.pt").write_bytes(data)
    found = read_checkpoint(tmp_path / "a.pt").tensors
    assert torch.equal(found["a"], tensors["a"])
    for _ in range(2):
        with pytest.raises(CheckpointError, match="a.pt: entry 'a/data/1' does not have the checksum"):
            found["b"]


@pytest.mark.parametrize("part", ["data.pkl", "byteorder"])
def test_flipped_bits_of_the_structure(tmp_path, part):
    torch.save({"a": torch.zeros(10)}, tmp_path / "a.pt")
    data = bytearray((tmp_path / "a.pt").read_bytes())
    place = data.index(b"little" if part == "byteorder" else b"_rebuild_tensor_v2")
    data[place] ^= 1
    (tmp_path / "a.pt").write_bytes(data)
    with pytest.raises(CheckpointError, match=f"{part}.*checksum|big-endian"):
        read_checkpoint(tmp_path / "a.pt")


def test_checksums_that_were_left_out(tmp_path):
    torch.serialization.set_crc32_options(False)
    try:
        torch.save({"a": torch.arange(5)}, tmp_path / "a.pt")
    finally:
        torch.serialization.set_crc32_options(True)
    assert torch.equal(read_checkpoint(tmp_path / "a.pt").tensors["a"], torch.arange(5))


def test_what_may_lie_twice(tmp_path):
    """Tied weights, and a table that is expanded over a batch of one."""
    weight = torch.randn(100, 50)
    tensors = {"in": weight, "out": weight, "third": weight, "t": weight.t(), "ids": torch.arange(9).expand(2, -1)}
    torch.save(tensors, tmp_path / "a.pt")
    found = read_checkpoint(tmp_path / "a.pt").tensors
    assert all(torch.equal(found[name], value) for name, value in tensors.items())


def test_tensors_beside_the_weights_are_checked_too(tmp_path):
    state = {"step": 3, "moments": [torch.ones(2), (torch.zeros(1),)]}
    torch.save({"model": {"a": torch.ones(1)}, "optimizer": state, 7: "seven"}, tmp_path / "a.pt")
    extras = read_checkpoint(tmp_path / "a.pt").extras
    assert extras[7] == "seven"
    assert torch.equal(extras["optimizer"]["moments"][0], torch.ones(2))
    assert torch.equal(extras["optimizer"]["moments"][1][0], torch.zeros(1))


def test_legacy_files_are_cut_off_by_name(tmp_path):
    tensors = {"a": torch.randn(50), "b": torch.arange(6).view(2, 3).t(), "half": torch.randn(3).half()}
    torch.save(tensors, tmp_path / "a.pth", _use_new_zipfile_serialization=False)
    whole = (tmp_path / "a.pth").read_bytes()
    found = read_checkpoint(tmp_path / "a.pth").tensors
    assert all(torch.equal(found[name], value) for name, value in tensors.items())
    for size in range(20, len(whole), 37):
        (tmp_path / "a.pth").write_bytes(whole[:size])
        with pytest.raises(CheckpointError, match="a.pth"):
            read_checkpoint(tmp_path / "a.pth")


def test_numbers_of_types_that_numpy_has_not(tmp_path):
    np.savez(tmp_path / "a.npz", a=np.array(["x"]), b=np.array([1 + 2j]))
    tensors = read_checkpoint(tmp_path / "a.npz").tensors
    with pytest.raises(CheckpointError, match="a.npz: 'a' cannot be read"):
        tensors["a"]
