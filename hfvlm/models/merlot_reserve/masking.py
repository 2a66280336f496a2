"""What MERLOT Reserve hides of a video in pretraining.

A video's text is a list of rows, the ids spoken during each clip of audio. A sequence has three columns: id, clip, and
the masked text that a mask stands for, or -1.

Source: https://github.com/rowanz/merlot_reserve at d22c50f, pretrain/dataloader.py.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from hfvlm.checks.ranges import check_number

# Draws numbers of 0..1, as many as it is asked for.
Draw = Callable[[int], np.ndarray]
PADDING = (0, -1, -1)
# What a mask gains against other tokens, and how far scores of clips reach, where a sequence is too long.
KEEP_MASKS, CLIP_SCORES = np.float32(1e7), 1e5
# Seconds that a token may be beyond the limits of a masked clip and still be masked with it.
REACH = 0.125
# How often a masked text of other texts has 1, 2, ... tokens, as the masked texts of videos do.
LENGTHS = np.array(
    [
        *(0.0323, 0.0524, 0.0876, 0.1176, 0.1374, 0.1372, 0.1254, 0.1026, 0.0771, 0.0536, 0.0343, 0.0204, 0.0118),
        *(0.0066, 0.0037),
    ]
)


@dataclass(frozen=True)
class Tokens:
    """Ids with a meaning of their own."""

    mask: int = 3
    audio_mask: int = 4
    audio: int = 5
    pool: int = 6


def moved(lengths: np.ndarray, rows: np.ndarray, *, leftwards: bool) -> np.ndarray:
    """Let each of some rows that are not empty give one token to the row before it, or after it -> new lengths."""
    lengths = lengths.copy()
    givers = [row for row in rows if lengths[row] > 0 and (row > 0 if leftwards else row < len(lengths) - 1)]
    for row in givers:
        lengths[row] -= 1
        lengths[row - 1 if leftwards else row + 1] += 1
    return lengths


def both_ways(step: Callable[..., np.ndarray], lengths: np.ndarray, *, leftwards_first: bool) -> np.ndarray:
    """Take a step in one direction, then in the other."""
    return step(step(lengths, leftwards=leftwards_first), leftwards=not leftwards_first)


def fill_empty(lengths: np.ndarray, masked: np.ndarray, *, leftwards_first: bool) -> np.ndarray:
    """Let masked rows without a token take one of a neighbour that has two or more and is not masked."""
    hidden = np.isin(np.arange(len(lengths)), masked)

    def step(lengths: np.ndarray, *, leftwards: bool) -> np.ndarray:
        needs, can = hidden & (lengths == 0), ~hidden & (lengths >= 2)
        shift = -1 if leftwards else 1
        taker = np.arange(len(lengths)) + shift
        inside = (taker >= 0) & (taker < len(lengths))
        rows = np.flatnonzero(can & inside & needs[taker.clip(0, len(lengths) - 1)])
        return moved(lengths, rows, leftwards=leftwards)

    return both_ways(step, lengths, leftwards_first=leftwards_first)


def widen(
    lengths: np.ndarray,
    masked: np.ndarray,
    centres: np.ndarray,
    limits: np.ndarray,
    *,
    leftwards_first: bool,
    reach: float = REACH,
) -> np.ndarray:
    """Let masked rows take the neighbours' next token where its centre is within reach of the clip.

    Args:
        lengths: `(A,)`, tokens of each clip.
        masked: the masked clips.
        centres: `(N,)`, when each token is spoken, in seconds.
        limits: `(A, 2)`, when each clip begins and ends.
        leftwards_first: take from the row after first.
        reach: in seconds.
    """
    hidden = set(masked.tolist())

    def step(lengths: np.ndarray, *, leftwards: bool) -> np.ndarray:
        rows = np.split(centres, np.cumsum(lengths)[:-1])
        givers = []
        for row in masked.tolist():
            giver = row + 1 if leftwards else row - 1
            if not 0 <= giver < len(rows) or giver in hidden or len(rows[giver]) < 2:
                continue
            far = rows[giver].min() - limits[row, 1] if leftwards else limits[row, 0] - rows[giver].max()
            if far < np.float32(reach):
                givers.append(giver)
        return moved(lengths, np.array(givers, dtype=int), leftwards=leftwards)

    return both_ways(step, lengths, leftwards_first=leftwards_first)


def shortened(sequence: np.ndarray, length: int, clips: int, draw: Draw, tokens: Tokens) -> np.ndarray:
    """Cut a sequence `(N, 3)` to `length`: text before the first mask or audio, what follows the last mask, then
    tokens by chance, whole clips first; masks of text stay."""
    ids, excess = sequence[:, 0], len(sequence) - length
    masks = np.cumsum((ids == tokens.mask) | (ids == tokens.audio_mask))
    before = int(((masks == 0) & (np.cumsum(ids == tokens.audio) == 0)).sum())
    after = int((masks == masks[-1]).sum()) - 1
    start = min(excess // 2, before)
    end = min(excess - start, after)
    start = min(excess - end, before)
    sequence = sequence[start : len(sequence) - end]
    scores = np.float32(2 * CLIP_SCORES) * draw(clips).astype(np.float32) - np.float32(CLIP_SCORES)
    kept = KEEP_MASKS * (sequence[:, 0] == tokens.mask).astype(np.float32) + scores[sequence[:, 1]]
    kept = kept - np.log(-np.log(draw(len(sequence)).astype(np.float32)))
    return sequence[np.sort(np.argsort(-kept, kind="stable")[:length])]


def masked_sequences(  # noqa: PLR0913 (the original's own)
    rows: Sequence[np.ndarray],
    masked: np.ndarray,
    length: int,
    draw: Draw,
    *,
    heard: np.ndarray | None = None,
    audio_tokens: int = 6,
    hides_audio: bool = False,
    first_span: int = 0,
    groups: int = 1,
    tokens: Tokens | None = None,
) -> tuple[list[np.ndarray], np.ndarray]:
    """Mask some rows -> their texts, in the rows' order, and the sequences `(groups, length, 3)`.

    Args:
        rows: `(A,)`, the ids of each clip.
        masked: clips to mask.
        length: of a sequence.
        draw: where one is longer.
        heard: `(A,)`, clips that become audio, unless they are masked; None for none.
        audio_tokens: of a clip.
        hides_audio: a mask of text is followed by one of audio.
        first_span: the number of the first masked text.
        groups: of as many consecutive clips, each with a sequence of its own.
        tokens: ids with a meaning of their own.

    Raises:
        ValueError: the clips do not divide into the groups.
    """
    tokens, masked = tokens or Tokens(), np.sort(masked)
    if len(rows) % groups:
        raise ValueError(f"{len(rows)} clips of audio do not divide into {groups} groups.")
    spans = {row: first_span + i for i, row in enumerate(masked.tolist())}
    hidden = [tokens.mask, tokens.audio_mask] if hides_audio else [tokens.mask]

    def columns(row: int) -> list[tuple[int, int, int]]:
        if row in spans:
            return [(token, row, spans[row]) for token in hidden]
        audio = heard is not None and heard[row]
        ids = [tokens.audio] * audio_tokens if audio else rows[row].tolist()
        return [(token, row, -1) for token in ids]

    size = len(rows) // groups
    sequences = []
    for group in range(groups):
        every = [column for row in range(group * size, (group + 1) * size) for column in columns(row)]
        sequence = np.array(every, dtype=np.int64).reshape(-1, 3)
        if len(sequence) > length:
            sequence = shortened(sequence, length, len(rows), draw, tokens)
        sequences.append(padded(sequence, length))
    return [rows[row] for row in masked], np.stack(sequences)


def padded(sequence: np.ndarray, length: int) -> np.ndarray:
    """Pad or cut a sequence `(N, 3)` to `length`."""
    more = max(length - len(sequence), 0)
    return np.concatenate([sequence, np.tile(np.array(PADDING), (more, 1))])[:length].astype(np.int64)


@dataclass
class Speech:
    """What is spoken in a video.

    Args:
        ids: `(N,)`, of its tokens.
        clips: `(N,)`, the clip of audio in which each is spoken, ascending.
        centres: `(N,)`, when, in seconds.
        limits: `(A, 2)`, when each clip of audio begins and ends, in seconds.
    """

    ids: np.ndarray
    clips: np.ndarray
    centres: np.ndarray
    limits: np.ndarray

    def lengths(self) -> np.ndarray:
        """Count the tokens of each clip."""
        return np.bincount(self.clips, minlength=len(self.limits))


@dataclass
class ReserveMasking:
    """Makes the sequences of `HfvlmMERLOTReserveForPreTraining` of videos' speech and audio, and of other texts.

    Args:
        length: of sequences with frames.
        longest: of those without.
        groups: of segments, `num_segment_groups`.
        clips: of audio in a segment.
        audio_tokens: of a clip.
        mask_share: of the clips that each sequence masks.
        text_spans: masked texts in each of the other texts.
        span_length: tokens of the longest masked text.
        beside_share: of clips next to a mask that are text, where others are audio.
        heard_share: of the videos whose frames are found by audio; the others by text.
        tokens: ids with a meaning of their own.
    """

    length: int = 160
    longest: int = 640
    groups: int = 2
    clips: int = 3
    audio_tokens: int = 6
    mask_share: float = 0.25
    text_spans: int = 38
    span_length: int = 15
    beside_share: float = 0.8
    heard_share: float = 0.5
    tokens: Tokens = field(default_factory=Tokens)

    def __post_init__(self) -> None:
        for name in ("mask_share", "beside_share", "heard_share"):
            check_number(name, getattr(self, name), 0, 1)

    def __call__(self, speech: Speech, text: np.ndarray, generator: np.random.Generator) -> dict[str, np.ndarray]:
        """Mask one video twice, once for its text and its audio and once for its text alone, and one other text.

        Args:
            speech: of the video.
            text: `(M,)`, ids of any other text.
            generator: of what is drawn.

        Returns:
            `text_to_audio` and `audio_to_text`, `(groups, length, 3)`; `matching`, `(longest, 3)`; `texts`,
            `(1, longest, 3)`; `span_ids`, `(T, span_length)`.
        """
        count, draw = len(speech.limits), generator.random
        number = int(count * self.mask_share)
        hidden = generator.permutation(count)[: 2 * number]
        for_audio, for_text = np.sort(hidden[:number]), np.sort(hidden[number:])
        shared: dict[str, Any] = {"groups": self.groups, "audio_tokens": self.audio_tokens, "tokens": self.tokens}
        lengths = fill_empty(speech.lengths(), for_audio, leftwards_first=bool(draw() < 0.5))
        limits = (speech.centres, speech.limits)
        lengths = widen(lengths, for_audio, *limits, leftwards_first=bool(draw() < 0.5))
        spans, text_to_audio = masked_sequences(
            rows_of(speech.ids, lengths), for_audio, self.length, draw, hides_audio=True, **shared
        )
        rows = rows_of(speech.ids, speech.lengths())
        more, audio_to_text = masked_sequences(
            rows,
            for_text,
            self.length,
            draw,
            heard=self.heard(for_text, count, generator),
            first_span=number,
            **shared,
        )
        others, texts = self.mask_text(text, 2 * number, generator)
        return {
            "text_to_audio": text_to_audio,
            "audio_to_text": audio_to_text,
            "matching": self.matching(rows, heard=bool(draw() < self.heard_share)),
            "texts": texts[None],
            "span_ids": np.stack([padded_ids(span, self.span_length) for span in (*spans, *more, *others)]),
        }

    def heard(self, masked: np.ndarray, count: int, generator: np.random.Generator) -> np.ndarray:
        """Choose the clips that are audio: all but most of those next to a mask, whose audio would tell too much."""
        beside = np.isin(np.arange(count), np.concatenate([masked - 1, masked + 1]))
        return ~(beside & ~np.isin(np.arange(count), masked) & (generator.random(count) < self.beside_share))

    def matching(self, rows: Sequence[np.ndarray], *, heard: bool) -> np.ndarray:
        """Lay out a whole video, audio or text, with a pooling token before each segment."""
        columns: list[tuple[int, int, int]] = []
        for first in range(0, len(rows), self.clips):
            columns.append((self.tokens.pool, first, -1))
            for clip in range(first, first + self.clips):
                ids = [self.tokens.audio] * self.audio_tokens if heard else rows[clip].tolist()
                columns += [(token, clip if heard else first, -1) for token in ids]
        return padded(np.array(columns, dtype=np.int64), self.longest)

    def mask_text(
        self, ids: np.ndarray, first_span: int, generator: np.random.Generator
    ) -> tuple[list[np.ndarray], np.ndarray]:
        """Cut a text into pieces and mask `text_spans` of them -> the masked texts and the sequence."""
        mean = float((LENGTHS / LENGTHS.sum()) @ np.arange(1, len(LENGTHS) + 1))
        total = min(self.longest + int((mean * 0.85 - 1) * self.text_spans), len(ids))
        sizes = generator.choice(len(LENGTHS), size=total, p=LENGTHS / LENGTHS.sum()) + 1
        sizes = sizes[np.cumsum(sizes) <= total]
        start = int(generator.integers(max(len(ids) - sizes.sum(), 1)))
        rows = rows_of(ids[start : start + sizes.sum()], sizes)
        number = min(self.text_spans, len(rows))
        masked = np.sort(generator.permutation(len(rows))[:number])
        spans, sequences = masked_sequences(
            rows, masked, self.longest, generator.random, first_span=first_span, tokens=self.tokens
        )
        spans += [np.zeros(0, dtype=np.int64)] * (self.text_spans - number)
        return spans, sequences[0]


def rows_of(ids: np.ndarray, lengths: np.ndarray) -> list[np.ndarray]:
    """Split ids `(N,)` into rows."""
    return np.split(ids, np.cumsum(lengths)[:-1]) if len(lengths) else []


def padded_ids(ids: np.ndarray, length: int) -> np.ndarray:
    """Pad or cut ids `(N,)` to a length."""
    return np.concatenate([ids, np.zeros(max(length - len(ids), 0), dtype=np.int64)])[:length].astype(np.int64)


def without_duplicates(span_ids: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Empty all but one, drawn by chance, of equal masked texts of a batch `(B, T, L)`: each is the only right one."""
    flat = span_ids.reshape(-1, span_ids.shape[-1]).copy()
    order = generator.permutation(len(flat))
    seen: set[Any] = set()
    for i in order:
        key = flat[i].tobytes()
        if key in seen:
            flat[i] = 0
        seen.add(key)
    return flat.reshape(span_ids.shape)


def batches(rows: Sequence[dict[str, np.ndarray]], generator: np.random.Generator) -> dict[str, np.ndarray]:
    """Put what `ReserveMasking` makes of several videos into one batch."""
    batch = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
    return batch | {"span_ids": without_duplicates(batch["span_ids"], generator)}
