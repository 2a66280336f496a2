"""Speech in a video, by audio models of transformers: one transcribes it, one distinguishes it from music.

Source: the speech modules of https://github.com/mbzuai-oryx/Video-LLaVA at 0c8810f, which use WhisperX and Whisper-AT.
"""

from collections.abc import Iterable, Mapping, Sequence
from math import log
from typing import Any

import numpy as np
import torch

from hfvlm.media import read_audio
from hfvlm.media.recordings import resample

RATE = 16_000
# Samples of the window of taggers and aligners, 25 milliseconds. Whisper predicts segments of no length, too.
SHORTEST = 400
# How much likelier music may be than speech, in logarithms, and among how many of a segment's tags speech must be.
LOUDER, AMONG = 1.1, 3
Tags = Sequence[tuple[str, float]]


def is_speech(label: str) -> bool:
    """Check whether one of AudioSet's names is speech."""
    label = label.lower()
    return "speech" in label or label.startswith(("conversation", "narration"))


def is_spoken(tags: Tags) -> bool:
    """Check whether somebody talks: speech is among a segment's three likeliest tags, and music not much likelier.

    Args:
        tags: AudioSet's names with the logarithms of their probabilities, the likeliest first.
    """
    likeliest = list(tags)[:AMONG]
    speech = next((value for label, value in likeliest if is_speech(label)), None)
    music = max((value for label, value in likeliest if label == "Music"), default=float("-inf"))
    return speech is not None and music - speech <= LOUDER


def spoken_text(segments: Iterable[Mapping[str, Any]], tags: Iterable[Tags]) -> str:
    """Join the segments in which somebody talks."""
    pairs = zip(segments, tags, strict=True)
    return " ".join(segment["text"].strip() for segment, own in pairs if is_spoken(own))


def waveform(audio: Any) -> np.ndarray:
    """Read a video's or a recording's audio -> `(N,)`, float32, at 16,000 hertz."""
    recording = read_audio(audio)
    samples = resample(torch.from_numpy(recording.samples), recording.sampling_rate, RATE)
    return samples.mean(dim=0).numpy()


def recognized(
    wave: np.ndarray, recognizer: Any, parts: Sequence[tuple[float, float]] | None = None
) -> list[dict[str, Any]]:
    """Recognise speech -> segments, {"text", "start", "end"} in seconds.

    Args:
        wave: see `waveform`.
        recognizer: transformers' pipeline that recognises speech, with the time of each segment.
        parts: beginnings and ends in seconds of what is recognised, see
            `hfvlm.models.pg_video_llava.speech.find_speech`; None recognises all of it.
    """
    whole = len(wave) / RATE
    segments = []
    for first, last in [(0.0, whole)] if parts is None else parts:
        part = wave[int(RATE * first) : int(RATE * last)]
        if len(part) < SHORTEST:
            continue
        for chunk in recognizer({"raw": part, "sampling_rate": RATE}, return_timestamps=True)["chunks"]:
            start, end = chunk["timestamp"]  # the last may have no end
            start, end = first + (start or 0.0), last if end is None else min(first + end, last)
            if start >= last:  # Whisper's window is 30 seconds long, and it hears words in the silence after the end
                continue
            segments.append({"text": chunk["text"].strip(), "start": start, "end": max(start, end)})
    return segments


def tags_of(wave: np.ndarray, segment: Mapping[str, Any], tagger: Any) -> list[tuple[str, float]]:
    """Classify the audio of a segment -> AudioSet's names with the logarithms of their probabilities."""
    part = wave[int(RATE * segment["start"]) : int(RATE * segment["end"])]
    found = tagger({"raw": part, "sampling_rate": RATE}, top_k=AMONG) if len(part) >= SHORTEST else []
    return [(each["label"], log(max(each["score"], 1e-12))) for each in found]


def transcribe(audio: Any, recognizer: Any, tagger: Any) -> str:
    """Make a transcript for `{"type": "transcript", "text": ...}`; empty where nobody talks.

    Example:
        >>> recognizer = pipeline("automatic-speech-recognition", "openai/whisper-small")
        >>> tagger = pipeline("audio-classification", "MIT/ast-finetuned-audioset-10-10-0.4593")
        >>> transcribe("clip.mp4", recognizer, tagger)

    Args:
        audio: a video or a recording, as `hfvlm.media.read_audio` takes them, arrays with their rate.
        recognizer: transformers' pipeline that recognises speech, with the time of each segment.
        tagger: transformers' pipeline that classifies audio, with AudioSet's names.
    """
    wave = waveform(audio)
    segments = recognized(wave, recognizer)
    return spoken_text(segments, [tags_of(wave, segment, tagger) for segment in segments])
