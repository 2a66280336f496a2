"""VLMEvalKit's interface of models: what its `BaseModel` (vlmeval/vlm/base.py) has, and its inference.py calls."""

import inspect

import numpy as np
import pytest
from PIL import Image

import hfvlm
from hfvlm.integrations.vlmevalkit import ChatModel
from tests.models.llava.tiny import converted

# How infer_data of vlmeval/inference.py calls a model.
CALLS = {
    "use_custom_prompt": ("dataset",),
    "set_dump_image": ("dump_image",),
    "generate": ("message", "dataset"),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return ChatModel(converted(tmp_path_factory.mktemp("llava")), max_new_tokens=6)


@pytest.fixture
def paths(tmp_path):
    for i in range(2):
        pixels = np.random.default_rng(i).integers(0, 255, (30, 40, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{i}.png")
    return [str(tmp_path / f"{i}.png") for i in range(2)]


@pytest.mark.parametrize("name", CALLS)
def test_it_has_the_methods(name):
    assert tuple(inspect.signature(getattr(ChatModel, name)).parameters)[1:] == CALLS[name]


def test_answers_are_those_of_a_chat(model, paths):
    message = [{"type": "image", "value": path} for path in paths] + [{"type": "text", "value": "Which"}]
    message.append({"type": "text", "value": "is it?"})
    chat = hfvlm.Chat(model.chat.model, model.chat.processor, max_new_tokens=6)
    expected = chat.ask("Which\nis it?", images=paths)
    assert model.generate(message=message, dataset="MMBench") == expected
    assert model.generate(message=message) == expected, "the conversation before is forgotten"
    assert model.generate("hello") == chat_of(model, "hello")


def chat_of(model, text):
    return hfvlm.Chat(model.chat.model, model.chat.processor, max_new_tokens=6).ask(text)


def test_other_media_are_refused(model):
    assert not model.is_api
    assert not model.use_custom_prompt("MMBench")
    model.set_dump_image(len)
    assert model.dump_image is len
    with pytest.raises(ValueError, match="takes text, image, not audio, video"):
        model.generate([{"type": kind, "value": "x"} for kind in ("video", "audio", "text")])
