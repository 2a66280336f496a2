"""Conversations over HTTP."""

import json
import threading
import time

import pytest
from fastapi.testclient import TestClient

import hfvlm
from hfvlm.serving.app import make_app
from hfvlm.serving.conversations import Conversations
from hfvlm.serving.errors import RequestError
from hfvlm.serving.served import Served


@pytest.fixture(scope="module")
def chats(served):
    return served.chats


def ask(client, files=None, **fields):
    answer = client.post("/chat", data={"max_new_tokens": 8} | fields, files=files)
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"] == "application/x-ndjson"
    return [json.loads(line) for line in answer.text.splitlines()]


def test_answers_are_those_of_chat(client, llava_folder, red_circle):
    from io import BytesIO

    chat = hfvlm.Chat.from_pretrained(llava_folder, dtype="auto")
    first, *pieces, last = ask(client, question="What is it?", files={"image": red_circle})
    assert last["answer"] == chat.ask("What is it?", images=[BytesIO(red_circle)], max_new_tokens=8)
    assert last["answer"] not in ("", ask(client, question="What is it?")[-1]["answer"]), "it depends on the image"
    assert len(pieces) > 2
    assert "".join(piece["piece"] for piece in pieces).strip() == last["answer"]
    second = ask(client, question="Why?", conversation=first["conversation"])
    assert second[0] == first
    assert second[-1]["answer"] == chat.ask("Why?", max_new_tokens=8)
    assert ask(client, question="Why?")[0] != first, "a new one"
    drawn = ask(client, question="Why?", temperature=1.5)
    assert "answer" in drawn[-1]


def test_what_cannot_be_answered(client, red_circle):
    for fields, files, status, words in (
        ({"conversation": "absent"}, None, 404, "leave the field out"),
        ({}, {"image": b"nonsense"}, 422, "not an image"),
        ({}, {"video": red_circle}, 422, "answers about images alone"),
    ):
        answer = client.post("/chat", data={"question": "a"} | fields, files=files)
        assert answer.status_code == status
        assert words in answer.json()["error"]


def test_few_conversations_are_remembered(chats):
    few = Conversations(chats.model, chats.processor, most=2)
    options = {"max_new_tokens": 4}
    names = []
    for _ in range(3):
        found = list(few.answer(None, "What?", {}, options))
        names.append(found[0]["conversation"])
    assert list(few.chats) == names[1:]
    with pytest.raises(RequestError, match="none of this name"):
        few.answer(names[0], "What?", {}, options)
    list(few.answer(names[1], "What?", {}, options))
    list(few.answer(None, "What?", {}, options))
    assert names[1] in few.chats, "the one that was idle longest is dropped"


def test_a_busy_conversation_is_refused_and_kept(chats):
    one = Conversations(chats.model, chats.processor, most=1)
    with one.computing:  # the model is at work elsewhere
        answer = one.answer(None, "What?", {}, {"max_new_tokens": 4})
        name = next(answer)["conversation"]
        with pytest.raises(RequestError, match="in the middle of an answer") as busy:
            one.answer(name, "Why?", {}, {})
        with pytest.raises(RequestError, match="wait for an answer") as all_busy:
            one.answer(None, "Why?", {}, {})
    assert (busy.value.status, all_busy.value.status) == (409, 503)
    assert "answer" in list(answer)[-1]
    assert one.busy == set()


def test_an_answer_that_nobody_reads_stops(chats):
    one = Conversations(chats.model, chats.processor)
    answer = one.answer(None, "What?", {}, {"max_new_tokens": 2000})
    name = next(answer)["conversation"]
    next(answer)
    answer.close()
    end = time.monotonic() + 20
    while one.busy and time.monotonic() < end:
        time.sleep(0.01)
    assert one.busy == set()
    assert one.chats[name].messages == [], "the turn is dropped"
    assert "answer" in list(one.answer(name, "What?", {}, {"max_new_tokens": 4}))[-1]


def test_slow_readers_keep_the_model_from_nobody(chats):
    both = Conversations(chats.model, chats.processor)
    slow = both.answer(None, "What?", {}, {"max_new_tokens": 20})
    next(slow)
    done = []
    thread = threading.Thread(target=lambda: done.extend(both.answer(None, "Why?", {}, {"max_new_tokens": 4})))
    thread.start()
    thread.join(timeout=20)
    assert "answer" in done[-1]
    assert "answer" in list(slow)[-1]


def test_failures_are_lines(chats, monkeypatch, caplog):
    served = Served("broken", chats=Conversations(chats.model, chats.processor))
    client = TestClient(make_app(served), base_url="http://localhost")

    def broken(*arguments, **options):
        raise RuntimeError("secret")

    monkeypatch.setattr(served.chats.model, "generate", broken)
    lines = ask(client, question="What?")
    assert lines[-1] == {"error": "The answer failed: the server's log says why."}
    assert "secret" in caplog.text
    assert served.chats.busy == set()
