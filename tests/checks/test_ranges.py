"""Numbers from users are checked wherever they are given: the error names the argument and its range."""

import math

import numpy as np
import pytest
import torch
from PIL import Image

import hfvlm
from hfvlm.checks.ranges import check_generation, check_integer, check_number
from hfvlm.evaluation.bootstrap import interval
from hfvlm.evaluation.classification import accuracy
from hfvlm.evaluation.probing import draw_shots, fit
from hfvlm.evaluation.retrieval import recall_at
from hfvlm.evaluation.tasks import Data
from hfvlm.inference.capfilt import capfilt
from hfvlm.inference.search import weighed
from hfvlm.inference.video_grounding import VideoGrounder
from hfvlm.losses import (
    best_query_loss,
    captioning_loss,
    contrastive_loss,
    distilled_targets,
    focal_contrastive_loss,
    late_interaction_loss,
)
from hfvlm.modeling.matching import two_stage_scores
from hfvlm.training import (
    ChatCollator,
    ContrastiveCollator,
    MaskingCollator,
    RandomCropAndFlip,
    RandomResizedCrop,
    cached_backward,
    near_duplicates,
)

NO_COUNT = (0, -1, 1.5, 2.0, True, "3", math.nan, math.inf, None, [1])
NO_SHARE = (-0.1, 1.1, math.nan, math.inf, -math.inf, True, "0.5", None)
EYE = torch.eye(4)


@pytest.fixture(scope="module")
def embedder(clip_folder):
    return hfvlm.Embedder.from_pretrained(clip_folder, device="cpu")


def counts(embedder):
    """By argument, functions of a count."""
    rows = np.eye(4, dtype=np.float32)
    yield "batch_size", lambda n: embedder.encode(text=["a", "b"], batch_size=n)
    yield "batch_size", lambda n: embedder.encode_known("text", ["a", "b"], batch_size=n)
    yield "batch_size", lambda n: hfvlm.Captioner(embedder.model, embedder.processor)([], batch_size=n)
    yield "k", lambda n: hfvlm.Index(rows).search(rows[0], n)
    yield "top_k", lambda n: hfvlm.rerank("nowhere", [], [], top_k=n)
    yield "top_k", lambda n: two_stage_scores(torch.zeros(2, 2), lambda *_: torch.zeros(2, 2), n)
    yield "shard_rows", lambda n: capfilt("x", "y", "z", "w", batch_size=1, shard_rows=n)
    yield "batch_size", lambda n: capfilt("x", "y", "z", "w", batch_size=n)
    yield "k", lambda n: recall_at(EYE, EYE, [n])
    yield "k", lambda n: accuracy(np.eye(3), np.arange(3), n)
    yield "draws", lambda n: interval(lambda _: 0.0, 3, draws=n)
    yield "shots", lambda n: draw_shots(np.arange(3), n, seed=0)
    yield "mini_batch_size", lambda n: cached_backward(lambda **_: None, lambda _: None, {"a": EYE}, n)
    yield "size", lambda n: RandomResizedCrop(n)
    yield "resized", lambda n: RandomCropAndFlip(1, n)
    yield "every", lambda n: VideoGrounder(None, every=n)
    yield "r", lambda n: hfvlm.lora(embedder.model, r=n)


def test_counts(embedder):
    for name, function in counts(embedder):
        for value in NO_COUNT:
            with pytest.raises(ValueError, match=f"{name} must be an integer of at least 1, not"):
                function(value)


@pytest.mark.parametrize(
    ("name", "function"),
    [
        ("label_smoothing", lambda x: contrastive_loss(EYE, EYE, 1.0, label_smoothing=x)),
        ("label_smoothing", lambda x: best_query_loss(EYE[:, None], EYE, 1.0, label_smoothing=x)),
        ("label_smoothing", lambda x: captioning_loss(EYE[None], torch.arange(4)[None], label_smoothing=x)),
        ("distillation", lambda x: distilled_targets(EYE, EYE, torch.ones(1), EYE, x)),
        ("threshold", lambda x: capfilt("x", "y", "z", "w", threshold=x)),
        ("most_overlap", lambda x: VideoGrounder(None, most_overlap=x)),
        ("flip", lambda x: RandomCropAndFlip(1, 2, flip=x)),
        ("itm_probability", lambda x: MaskingCollator(None, itm_probability=x)),
    ],
)
@pytest.mark.parametrize("value", NO_SHARE)
def test_shares(name, function, value):
    with pytest.raises(ValueError, match=f"{name} must be a finite number from 0 to 1, not"):
        function(value)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda: Data("x", limit=0), "limit must be an integer of at least 1, not 0"),
        (lambda: Data("x", seed=-1), "seed must be an integer of at least 0, not -1"),
        (lambda: ChatCollator(None, max_length=0), "max_length must be"),
        (lambda: ChatCollator(None, pad_to_multiple_of=1.5), "pad_to_multiple_of must be"),
        (lambda: ChatCollator(None, truncation="some"), "truncation must be True or 'pictures', not 'some'"),
        (lambda: ContrastiveCollator(None, max_length=-1), "max_length must be"),
        (lambda: late_interaction_loss(EYE[:, None], EYE[:, None], 1.0, top_k=0), "top_k must be"),
        (lambda: focal_contrastive_loss(EYE, EYE, 1.0, gamma=-1), "gamma must be a finite number of at least 0"),
        (lambda: near_duplicates(EYE, 2.0), "threshold must be a finite number from -1 to 1"),
        (lambda: near_duplicates(torch.full((2, 2), math.nan)), "embeds: row 0 is not finite"),
        (lambda: near_duplicates(EYE, of=torch.eye(3)), r"of must be \(N, D\) with the D of embeds"),
        (lambda: fit(np.eye(2), np.arange(2), 0), "C must be a finite number above 0"),
        (lambda: weighed("a::nan"), "'nan' is no weight"),
        (lambda: weighed("a::inf"), "'inf' is no weight"),
        (lambda: hfvlm.combine([1.0, 0.0], weights=[math.inf]), "weight 0 must be a finite number"),
        (lambda: RandomResizedCrop(8, (0.9, 0.5)), "scale, lowest, must be a finite number above 0 to 0.5, not 0.9"),
        (lambda: check_generation({"temperature": 0}), "temperature must be a finite number above 0, not 0"),
        (lambda: check_generation({"top_p": 0.0}), "top_p must be a finite number above 0 to 1, not 0.0"),
    ],
)
def test_other_numbers(function, message):
    with pytest.raises(ValueError, match=message):
        function()


def test_numbers_of_libraries_are_numbers():
    assert check_integer("n", np.int64(3)) == 3
    assert check_number("x", np.float32(0.5), 0, 1) == 0.5
    assert check_number("x", 1, 0, 1) == 1.0
    check_generation({"max_new_tokens": 5, "temperature": None, "other": "x"})
    with pytest.raises(ValueError, match=r"n must be an integer of at least 1, not '(x+)\.\.\.\.$"):
        check_integer("n", "x" * 1000)


def test_devices_and_precisions_are_named(clip_folder):
    with pytest.raises(ValueError, match="device 'gpu' is none"):
        hfvlm.Embedder.from_pretrained(clip_folder, device="gpu")
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="device cuda: this machine has none"):
            hfvlm.Embedder.from_pretrained(clip_folder, device="cuda")
    for dtype in ("int8", "foo", torch.int8):
        with pytest.raises(ValueError, match="is no precision of weights"):
            hfvlm.Embedder.from_pretrained(clip_folder, dtype=dtype)


# Vectors


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.float16, torch.bfloat16, torch.float32, torch.int64])
def test_similarity_is_computed_in_single_precision(dtype):
    a, b = torch.tensor([[100, 20, 3], [1, 0, 0]]).to(dtype), torch.tensor([[100, 20, 3], [0, 100, 7]]).to(dtype)
    expected = torch.cosine_similarity(a.double()[:, None], b.double()[None], dim=-1)
    found = hfvlm.similarity(a, b)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, atol=1e-6, rtol=0)
    if dtype != torch.bfloat16:
        arrays = hfvlm.similarity(a.numpy(), b.numpy())
        assert arrays.dtype == np.float32
        np.testing.assert_allclose(arrays, expected.numpy(), atol=1e-6)


def test_similarity_of_small_and_large_values():
    assert hfvlm.similarity(np.full(25, 1e-3, np.float16), np.full(25, 1e-3, np.float16)) == pytest.approx(1)
    assert hfvlm.similarity(np.full(25, 1e30, np.float32), np.full(25, 1e-30, np.float32)) == pytest.approx(1)


@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        (np.ones((2, 3)), np.ones((2, 4)), r"with one D, but got \(2, 3\) and \(2, 4\)"),
        (np.ones((2, 3, 4)), np.ones((2, 4)), r"must be \(D,\) or \(N, D\)"),
        ([["a"]], [[1.0]], "Vectors hold numbers, not"),
        ([[1.0, 2.0], [1.0]], [[1.0]], "different lengths make no table"),
        (np.array([[1.0, 0], [math.nan, 1]]), np.ones((1, 2)), "Row 1: a vector that is zero or not a number"),
        (np.ones((1, 2)), np.array([[1.0, 0], [0, 0], [math.inf, 1]]), "Row 1, 2: a vector that is zero"),
    ],
)
def test_vectors_that_cannot_be_compared(a, b, message):
    with pytest.raises(ValueError, match=message):
        hfvlm.similarity(a, b)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_an_index_takes_and_asks_for_finite_vectors_alone(value):
    wrong = np.eye(4, dtype=np.float32)
    wrong[2, 1] = value
    with pytest.raises(ValueError, match="Row 2: a vector that is zero or not a number"):
        hfvlm.Index(wrong)
    index = hfvlm.Index(np.eye(4))
    with pytest.raises(ValueError, match="Row 2"):
        index.add(wrong)
    with pytest.raises(ValueError, match="Row 2"):
        index.search(wrong)
    assert len(index) == 4


def test_texts_are_texts(embedder):
    for texts in (["a", None], ["a", 5], ["a", math.nan]):
        with pytest.raises(hfvlm.media.MediaError, match="text 1: a text is needed, not"):
            embedder.encode(text=texts)
    image = Image.new("RGB", (32, 32))
    with pytest.raises(ValueError, match="options are given for audio, of which there are no sources"):
        embedder.encode(image=[image], options={"audio": {}})
