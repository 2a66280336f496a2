"""lmms-eval's registry and stock model, from its Python sources, on folders of hfvlm."""

import itertools
from types import SimpleNamespace

import pytest
from PIL import Image

import hfvlm
from tests.models.llava.tiny import converted
from tests.support.neighbours import sources

pytestmark = pytest.mark.integration
sources("lmms_eval")

LOOKS = [Image.new("RGB", (40, 30), colour) for colour in ("red", "blue")]
OPTIONS = {"max_new_tokens": 6, "temperature": 0, "do_sample": False, "until": ["\n\n"]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(converted(tmp_path_factory.mktemp("llava")))


def messages(row):
    image = [{"type": "image", "url": row["image"]}] if row["image"] is not None else []
    return [{"role": "user", "content": [*image, {"type": "text", "text": row["question"]}]}]


ROWS = [{"question": "What is it?", "image": image} for image in (*LOOKS, None)]


def requests():
    return [
        SimpleNamespace(args=("", messages, dict(OPTIONS), i, "looks", "test"), task_name="looks", doc_id=i)
        for i in range(len(ROWS))
    ]


def answers_of(model):
    model.task_dict["looks"] = {"test": ROWS}
    return [getattr(answer, "text", answer) for answer in model.generate_until(requests())]


@pytest.fixture(scope="module")
def expected(folder):
    chat = hfvlm.Chat.from_pretrained(folder)
    answers = []
    for row in ROWS:
        chat.reset()
        images = [row["image"]] if row["image"] is not None else []
        answers.append(chat.ask(row["question"], images=images, max_new_tokens=6))
    return answers


def test_the_entry_point_is_a_model(folder, expected):
    from lmms_eval.models.registry_v2 import ModelRegistryV2

    from hfvlm.integrations.lmms_eval import manifest

    registry = ModelRegistryV2()
    (found,) = registry._coerce_payload_to_manifests(manifest)
    registry.register_manifest(found)
    kind = registry.get_model_class("hfvlm")
    assert registry.resolve("hfvlm").model_type == "chat"
    model = kind.create_from_arg_string(f"pretrained={folder}", {"batch_size": 1, "device": "cpu"})
    assert answers_of(model) == expected


def test_its_stock_model_takes_a_folder(folder, expected):
    """It hands over empty lists of what there is not."""
    from lmms_eval.models.chat.huggingface import Huggingface

    model = Huggingface(pretrained=folder, device="cpu", device_map="cpu", batch_size=1)
    model._model.float()
    found = answers_of(model)
    assert len(found) == len(ROWS)
    assert all(isinstance(answer, str) for answer in found)
    assert [answer.strip() for answer in found] == expected


def test_what_is_not_answered_is_refused(folder):
    from hfvlm.integrations.lmms_eval import ChatModel

    with pytest.raises(ValueError, match="batch_size must be 1, not 4"):
        ChatModel(folder, batch_size=4)
    model = ChatModel(folder)
    turns = [{"role": role, "content": [{"type": "text", "text": "a"}]} for role in ("user", "assistant", "user")]
    with pytest.raises(ValueError, match="answers one of a user's"):
        model.answer(turns, OPTIONS)
    with pytest.raises(ValueError, match="take no audio"):
        model.answer([{"role": "user", "content": [{"type": "audio", "url": "x"}]}], OPTIONS)
    for method, made in itertools.product(("loglikelihood", "generate_until_multi_round"), [[]]):
        with pytest.raises(NotImplementedError, match="hfvlm"):
            getattr(model, method)(made)
