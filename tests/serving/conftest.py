"""What is served in the tests: an index of images and audio clips, one of images with captions, and a small LLaVA."""

import json
import wave
from importlib.resources import files

import numpy as np
import pytest

SAMPLES = files("hfvlm.samples")
RATE = 16_000


def write_tone(path, hertz, seconds=2.0):
    times = np.arange(int(seconds * RATE)) / RATE
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(RATE)
        file.writeframes((np.sin(2 * np.pi * hertz * times) * 20000).astype("<i2").tobytes())


@pytest.fixture(scope="session")
def mixed_media(tmp_path_factory):
    """Eight images and three audio clips, of names that are markup and addresses."""
    from hfvlm.samples.scenes import all_scenes

    folder = tmp_path_factory.mktemp("media [mixed]")
    for i, scene in enumerate(all_scenes()[::6]):
        scene.render(pixels=48).save(folder / f"<b>{i} {scene.colour} {scene.shape} #%.png")
    for hertz in (220, 440, 880):
        write_tone(folder / f"{hertz}.wav", hertz)
    return folder


@pytest.fixture(scope="session")
def mixed_index(mixed_media, tmp_path_factory):
    """The vectors of these by the small ImageBind that ships. Read only."""
    from hfvlm.inference.embed import embed

    return embed(
        mixed_media, tmp_path_factory.mktemp("indexes") / "mixed", str(SAMPLES / "imagebind-tiny"), dtype="float32"
    )


@pytest.fixture(scope="session")
def captioned_index(clip_folder, tmp_path_factory):
    """The vectors of all scenes with captions, by the small CLIP. Read only."""
    from hfvlm.inference.embed import embed
    from hfvlm.samples.scenes import all_scenes

    media = tmp_path_factory.mktemp("scenes")
    with (media / "metadata.jsonl").open("w") as metadata:
        for i, scene in enumerate(all_scenes()):
            scene.render(np.random.RandomState(i)).save(media / f"{i:02}.png")
            metadata.write(json.dumps({"file_name": f"{i:02}.png", "text": scene.caption()}) + "\n")
    return embed(media, tmp_path_factory.mktemp("indexes") / "scenes", clip_folder)


@pytest.fixture(scope="session")
def llava_folder(tmp_path_factory):
    """A LLaVA that learned nothing, of a seed with which its answers have letters. Read only."""
    import hfvlm

    return hfvlm.untrained("llava", tmp_path_factory.mktemp("llava") / "llava", seed=3)


@pytest.fixture(scope="session")
def served(mixed_index, llava_folder):
    """The index of images and audio clips, and the LLaVA."""
    from hfvlm.serving.loading import load

    return load(mixed_index, chat=llava_folder)


@pytest.fixture(scope="session")
def client(served):
    from fastapi.testclient import TestClient

    from hfvlm.serving.app import make_app

    return TestClient(make_app(served, upload_bytes=2**20), base_url="http://127.0.0.1:7860")


@pytest.fixture(scope="session")
def red_circle():
    from io import BytesIO

    from hfvlm.samples.scenes import Scene

    file = BytesIO()
    Scene("red", "circle", "large").render(pixels=48).save(file, "PNG")
    return file.getvalue()
