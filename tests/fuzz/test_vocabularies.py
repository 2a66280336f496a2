"""Damaged vocabularies of every kind: refused by name, or read."""

import base64
import gzip
import json
import random
import struct

import pytest

from hfvlm.models.blip2.processing_blip2 import HfvlmBLIP2Tokenizer
from hfvlm.models.flamingo.processing_flamingo import HfvlmFlamingoTokenizer
from hfvlm.processing.tokenization import PieceTokenizer
from hfvlm.processing.vocabularies import (
    VocabularyError,
    byte_pairs,
    openai_bpe,
    sentencepiece,
    tiktoken_bpe,
    wordpiece,
)
from tests.checkpoints.test_tensor_bundle import field, varint
from tests.conftest import SHIPPED
from tests.fuzz.mutations import Tally, mutated, mutated_json

LETTERS = "abcdefghij"


def pieces_of(kind):
    """A sentencepiece model of a few letters and pairs, with the fields that are read."""
    names = ["<unk>", "<s>", "</s>", *LETTERS, *(a + b for a in "abc" for b in "abc"), "\u2581", "\u2581a"]
    rows = [(name, -float(i), 2 if i == 0 else 3 if i < 3 else 1) for i, name in enumerate(names)]
    pieces = b"".join(
        field(1, field(1, name.encode()) + varint(2 << 3 | 5) + struct.pack("<f", score) + field(3, code))
        for name, score, code in rows
    )
    return pieces + field(2, field(3, kind) + field(40, 0) + field(41, 1) + field(42, 2)) + field(3, field(3, 1))


def tokenizer_json():
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2} | {letter: i + 3 for i, letter in enumerate(LETTERS)} | {"ab": 13}
    model = {"type": "BPE", "vocab": vocabulary, "merges": [["a", "b"]], "unk_token": "<unk>"}
    return {"version": "1.0", "added_tokens": [], "normalizer": None, "model": model}


WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *LETTERS, "##a"]
STARTED = tokenizer_json()
STARTED["model"]["vocab"] |= {"<|startoftext|>": 14, "<|endoftext|>": 15}
OPENAI = gzip.decompress((SHIPPED / "bpe_simple_vocab.txt.gz").read_bytes())[:600]
# File, content, reader
KINDS = {
    "openai": ("bpe.txt.gz", gzip.compress(OPENAI, mtime=0), openai_bpe),
    "openai.json": ("t.json", json.dumps(STARTED).encode(), openai_bpe),
    "wordpiece": ("vocab.txt", "\n".join(WORDS).encode(), wordpiece),
    "wordpiece.json": (
        "t.json",
        json.dumps({"model": {"vocab": dict(zip(WORDS, range(20), strict=False))}}).encode(),
        wordpiece,
    ),
    "unigram": ("spiece.model", pieces_of(1), sentencepiece),
    "pairs": ("tokenizer.model", pieces_of(2), sentencepiece),
    "pieces": ("tokenizer.model", pieces_of(2), PieceTokenizer.from_vocabulary),
    "pieces.json": ("tokenizer.json", json.dumps(tokenizer_json()).encode(), PieceTokenizer.from_vocabulary),
    "flamingo.json": ("tokenizer.json", json.dumps(tokenizer_json()).encode(), HfvlmFlamingoTokenizer.from_vocabulary),
    "byte pairs": ("vocab.json", json.dumps(tokenizer_json()["model"]["vocab"]).encode(), byte_pairs),
    "merges": ("merges.txt", b"#version: 0.2\na b\n", lambda path: byte_pairs(path.with_name("vocab.json"))),
    "opt": (
        "vocab.json",
        json.dumps(tokenizer_json()["model"]["vocab"]).encode(),
        HfvlmBLIP2Tokenizer.from_vocabulary,
    ),
    "tiktoken": (
        "qwen.tiktoken",
        b"\n".join(base64.b64encode(p.encode()) + b" %d" % i for i, p in enumerate([*LETTERS, "ab", "abc", "bc"])),
        tiktoken_bpe,
    ),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", KINDS)
def test_damaged_vocabularies(tmp_path, fuzz_rounds, kind):
    name, data, read = KINDS[kind]
    tally = Tally(kind, (VocabularyError, FileNotFoundError))
    (tmp_path / "merges.txt").write_text("#version: 0.2\na b\n")
    (tmp_path / "vocab.json").write_text(json.dumps(tokenizer_json()["model"]["vocab"]))
    path = tmp_path / name
    path.write_bytes(data)
    read(path)
    for seed in range(fuzz_rounds // 2):
        chance = random.Random(seed)
        damaged = mutated(data, chance)
        if kind == "openai" and chance.random() < 0.7:  # damage under a good checksum
            damaged = gzip.compress(mutated(OPENAI, chance), mtime=0)
        if name.endswith(".json") and chance.random() < 0.7:
            damaged = json.dumps(mutated_json(json.loads(data), chance)).encode()
        path.write_bytes(damaged)
        tally.attempt(f"{kind} {seed}", lambda: read(path))
    tally.report()


# Half a gigabyte of zeros: members of a gzip file may follow each other.
ZEROS = gzip.compress(bytes(2**21), mtime=0) * 2**8
HOSTILE = {
    "a bomb": ("bpe.txt.gz", ZEROS, openai_bpe),
    "many lines": ("bpe.txt.gz", gzip.compress(b"\n" * 2**23), openai_bpe),
    "empty pieces": ("tokenizer.model", b"\x0a\x00" * 2**21, sentencepiece),
    "a long piece": ("tokenizer.model", field(1, field(1, b"a" * 10**6)), sentencepiece),
    "pieces of pieces": (
        "qwen.tiktoken",
        b"\n".join(
            base64.b64encode(format(i, f"0{size}b").encode()) + b" %d" % (2**size + i)
            for size in range(1, 16)
            for i in range(2**size)
        ),
        tiktoken_bpe,
    ),
    "a long number": ("qwen.tiktoken", b"YQ== " + b"9" * 10**6, tiktoken_bpe),
    "empty lists": ("t.json", b'{"model": {"vocab": {}, "merges": [' + b"[]," * 2**21 + b"[]]}}", openai_bpe),
    "levels": ("t.json", b"[" * 10**6 + b"]" * 10**6, openai_bpe),
    "levels of an engine": ("t.json", b'{"a":' * 10**5 + b"1" + b"}" * 10**5, sentencepiece),
    "twice": ("vocab.json", b'{"a": 0, "a": 1}', byte_pairs),
    "one number": ("vocab.json", b'{"a": 0, "b": 99999999999999999999}', byte_pairs),
    "not JSON": ("vocab.json", b"NaN", byte_pairs),
    "long names": ("vocab.json", json.dumps({"\x1b" * 10**6: 0}).encode(), wordpiece),
    "another encoding": ("vocab.txt", b"\xff\xfe" + "[PAD]".encode("utf-16"), wordpiece),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_vocabularies(tmp_path, name):
    file, data, read = HOSTILE[name]
    path, tally = tmp_path / file, Tally(name, (VocabularyError,), seconds=20)
    path.write_bytes(data)
    (tmp_path / "merges.txt").write_text("#version: 0.2\na b\n")
    assert tally.attempt(name, lambda: read(path)) == "refused"


@pytest.mark.parametrize("read", [openai_bpe, wordpiece, sentencepiece, byte_pairs, tiktoken_bpe])
@pytest.mark.parametrize("name", ["vocab.txt", "vocab.json"])
def test_devices_and_folders(tmp_path, read, name):
    path = tmp_path / name
    with pytest.raises(FileNotFoundError, match="no such file"):
        read(path)
    path.symlink_to("/dev/zero")
    with pytest.raises(VocabularyError, match="no regular file"):
        read(path)
    path.unlink()
    path.mkdir()
    with pytest.raises(VocabularyError, match="a folder"):
        read(path)
