import numpy as np
import pytest

from hfvlm.models.merlot_reserve.masking import (
    ReserveMasking,
    Speech,
    Tokens,
    batches,
    fill_empty,
    masked_sequences,
    moved,
    rows_of,
    without_duplicates,
)

MASK, AUDIO_MASK, SOUND, POOL = 3, 4, 5, 6


def speech(counts, first=10):
    """A token after another, spread over clips of a second."""
    counts = np.array(counts)
    clips = np.arange(len(counts)).repeat(counts)
    centres = np.concatenate([clip + (np.arange(n) + 1) / (n + 1) for clip, n in enumerate(counts)])
    limits = np.stack([np.arange(len(counts)), np.arange(len(counts)) + 1], axis=1).astype(np.float32)
    return Speech(np.arange(first, first + counts.sum()), clips, centres, limits)


@pytest.fixture
def masking():
    return ReserveMasking(
        length=24, longest=40, groups=2, audio_tokens=2, text_spans=4, span_length=3, mask_share=0.25
    )


def masked(masking, seed=0):
    said = speech([2, 0, 3, 1, 2, 2, 0, 1, 3, 2, 1, 2])
    return said, masking(said, np.arange(100, 160), np.random.default_rng(seed))


def test_every_mask_stands_for_its_own_text(masking):
    """Each subtitle is in the sequence or in a masked text, and nowhere else."""
    for seed in range(20):
        said, found = masked(masking, seed)
        spans = found["span_ids"]
        assert {name: values.shape for name, values in found.items()} == {
            "text_to_audio": (2, 24, 3),
            "audio_to_text": (2, 24, 3),
            "matching": (40, 3),
            "texts": (1, 40, 3),
            "span_ids": (10, 3),
        }
        rows = found["text_to_audio"].reshape(-1, 3)
        masks = rows[rows[:, 0] == MASK]
        assert masks[:, 2].tolist() == [0, 1, 2]
        assert rows[rows[:, 0] == AUDIO_MASK][:, 1].tolist() == masks[:, 1].tolist()
        seen = rows[rows[:, 0] >= 10][:, 0].tolist()
        hidden = [token for span in spans[:3] for token in span if token]
        assert sorted(seen + hidden) == said.ids.tolist()
        other = found["audio_to_text"].reshape(-1, 3)
        assert other[other[:, 0] == MASK][:, 2].tolist() == [3, 4, 5]
        assert not set(masks[:, 1]) & set(other[other[:, 0] == MASK][:, 1])
        for clip in range(12):
            assert (other[:, 1] == clip)[other[:, 0] == SOUND].sum() in (0, 2)
        text = found["texts"][0]
        assert sorted(text[text[:, 0] == MASK][:, 2]) == [6, 7, 8, 9]


def test_segments_begin_with_a_pooling_token(masking):
    kinds = set()
    for seed in range(10):
        _, found = masked(masking, seed)
        rows = found["matching"]
        assert rows[rows[:, 0] == POOL][:, 1].tolist() == [0, 3, 6, 9]
        kinds.add(SOUND in rows[:, 0])
    assert kinds == {True, False}


def test_too_long_sequences_keep_their_masks():
    rows = rows_of(np.arange(10, 50), np.full(8, 5))
    for seed in range(10):
        draw = np.random.default_rng(seed).random
        _, (sequence,) = masked_sequences(rows, np.array([1, 6]), 12, draw)
        assert len(sequence) == 12
        assert sequence[sequence[:, 0] == MASK][:, 2].tolist() == [0, 1]
        assert (np.diff(sequence[:, 1]) >= 0).all()
    with pytest.raises(ValueError, match="8 clips of audio do not divide into 3 groups"):
        masked_sequences(rows, np.array([1]), 12, draw, groups=3)


def test_empty_rows_take_from_their_neighbours():
    lengths = np.array([2, 0, 1, 0, 3])
    assert fill_empty(lengths, np.array([1, 3]), leftwards_first=True).tolist() == [1, 1, 1, 1, 2]
    assert moved(lengths, np.array([0, 4]), leftwards=True).tolist() == [2, 0, 1, 1, 2]
    assert moved(lengths, np.array([0, 4]), leftwards=False).tolist() == [1, 1, 1, 0, 3]


def test_equal_texts_of_a_batch_are_masked_once(masking):
    spans = np.array([[[7, 8, 0], [9, 0, 0]], [[7, 8, 0], [7, 8, 0]]])
    found = without_duplicates(spans, np.random.default_rng(0))
    assert (found == [7, 8, 0]).all(-1).sum() == 1
    assert (found == 0).all(-1).sum() == 2
    batch = batches([masked(masking, seed)[1] for seed in range(2)], np.random.default_rng(0))
    assert batch["text_to_audio"].shape == (2, 2, 24, 3)


def test_other_ids_and_bad_shares():
    rows = rows_of(np.arange(20, 24), np.array([2, 2]))
    _, sequences = masked_sequences(
        rows, np.array([0]), 4, lambda n: np.zeros(n), hides_audio=True, tokens=Tokens(mask=11, audio_mask=12)
    )
    assert sequences[0, :, 0].tolist() == [11, 12, 22, 23]
    with pytest.raises(ValueError, match="mask_share"):
        ReserveMasking(mask_share=1.5)
