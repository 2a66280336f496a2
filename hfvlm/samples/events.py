"""Generated events that seven sensors perceive: what the small ImageBind that ships was trained on.

Each is a coloured shape: an image of it, a video in which it moves, a caption, a tone (its pitch tells the colour, its
rhythm the shape), a depth map, a thermal image, and the trace of a motion sensor.
"""

import json
import wave
from collections.abc import Iterable
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from hfvlm.samples.scenes import COLOURS, SHAPES, SIZES, Scene

Event = tuple[str, str]
EVENTS: list[Event] = list(product(COLOURS, SHAPES))
SECONDS = 2.0
AUDIO_RATE, IMU_RATE = 16_000, 200


def perceive(event: Event, seed: int) -> dict[str, Any]:
    """Return one event in every modality, in the form and units that the processor documents.

    Args:
        event: a colour and a shape.
        seed: of the place, the size and the noise.
    """
    random = np.random.RandomState(seed)
    size = list(SIZES)[random.randint(len(SIZES))]
    colour, shape = (names.index(name) for names, name in zip((list(COLOURS), SHAPES), event, strict=True))
    image = np.asarray(Scene(*event, size).render(np.random.RandomState(seed)))
    # The same chance places the same shape, in white.
    place = np.asarray(Scene("white", event[1], size).render(np.random.RandomState(seed)).convert("L")) > 128
    return {
        "image": image,
        "video": (np.stack([image, np.roll(image, 3, axis=random.randint(2))]), 1.0),
        "text": f"a {event[0]} {event[1]}",
        "audio": (tone(colour, shape, random), AUDIO_RATE),
        "depth": np.where(place, 1.0 + 0.5 * colour, 5.0) + random.normal(0, 0.02, place.shape),
        "thermal": np.where(place, 0.3 + 0.12 * colour, 0.1) + random.uniform(0, 0.03, place.shape),
        "imu": (shake(colour, shape, random), IMU_RATE),
    }


def tone(colour: int, shape: int, random: np.random.RandomState) -> np.ndarray:
    """Return a pitch that beats, `(N,)`."""
    time = np.arange(int(SECONDS * AUDIO_RATE)) / AUDIO_RATE
    pitch = np.sin(2 * np.pi * 300 * 1.4**colour * time + random.uniform(0, 6))
    beat = np.sin(2 * np.pi * 2 * (1 + shape) * time + random.uniform(0, 6)) > 0
    return 0.4 * pitch * beat + random.normal(0, 0.01, time.shape)


def shake(colour: int, shape: int, random: np.random.RandomState) -> np.ndarray:
    """Return gravity and a shaking whose amplitude is the colour's and whose axis is the shape's, `(6, N)`."""
    time = np.arange(int(5 * IMU_RATE)) / IMU_RATE
    trace = random.normal(0, 0.05, (6, len(time)))
    trace[2] += 9.81
    trace[(0, 1, 3, 4)[shape]] += (0.4 + 0.5 * colour) * np.sin(2 * np.pi * 4 * time + random.uniform(0, 6))
    return trace


def write_events(folder: str | Path, seeds: Iterable[int]) -> Path:
    """Write every event once for each seed into a folder of files with a `metadata.jsonl`, whose rows have all seven
    modalities and a label; motion is at 200 Hz.

    Args:
        folder: new, or empty.
        seeds: below 1000 the shipped ImageBind may have been trained on them.

    Raises:
        FileExistsError: there is something in the folder.
    """
    folder = Path(folder)
    if folder.exists() and any(folder.iterdir()):
        raise FileExistsError(f"{folder}: is not empty: choose another folder.")
    folder.mkdir(parents=True, exist_ok=True)
    rows = [
        write_event(folder, f"{seed}-{i}", event, 1000 * seed + i) for seed in seeds for i, event in enumerate(EVENTS)
    ]
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return folder


def write_event(folder: Path, name: str, event: Event, seed: int) -> dict[str, str]:
    """Write an event's files, and return its row of the metadata."""
    found = perceive(event, seed)
    Image.fromarray(found["image"]).save(folder / f"{name}.png")
    frames = [Image.fromarray(frame) for frame in found["video"][0]]
    frames[0].save(folder / f"{name}.gif", save_all=True, append_images=frames[1:], duration=1000)
    samples = np.round(np.clip(found["audio"][0], -1, 1) * 32767).astype("<i2")
    with wave.open(str(folder / f"{name}.wav"), "wb") as file:
        file.setparams((1, 2, AUDIO_RATE, len(samples), "NONE", ""))
        file.writeframes(samples.tobytes())
    arrays = {"depth": found["depth"], "thermal": found["thermal"], "imu": found["imu"][0]}
    for modality, values in arrays.items():
        np.save(folder / f"{name}-{modality}.npy", values.astype(np.float32))
    files = {"image": f"{name}.png", "video": f"{name}.gif", "audio": f"{name}.wav"}
    files |= {modality: f"{name}-{modality}.npy" for modality in arrays}
    row = {f"{modality}_file_name": file for modality, file in files.items()}
    return row | {"text": found["text"], "label": " ".join(event)}
