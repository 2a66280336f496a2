"""Models behind `transformers serve`, under OpenAI's protocol."""

import base64
import json
import os
import socket
import subprocess
import sys
import time
from io import BytesIO
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

import hfvlm
from hfvlm.serving.openai import ROUTES, foreign_addresses, only_own_data, serve_openai
from tests.support.paths import ROOT

IMAGE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}


def chat_of(*parts, **options):
    content = [{"type": "text", "text": "What is it?"}, *parts]
    return {"messages": [{"role": "user", "content": content}], **options}


@pytest.mark.parametrize(
    ("part", "found"),
    [
        (IMAGE, []),
        ({"type": "text", "text": "http://127.0.0.1/ and /etc/passwd"}, []),
        ({"type": "image_url", "image_url": {"url": "/etc/passwd"}}, ["/etc/passwd"]),
        ({"type": "image_url", "image_url": "http://127.0.0.1/"}, ["http://127.0.0.1/"]),
        ({"type": "video_url", "video_url": {"url": " data:"}}, [" data:"]),
        ({"type": "image", "path": "/etc/passwd", "url": "file:///x"}, ["file:///x", "/etc/passwd"]),
    ],
)
def test_addresses_are_found(part, found):
    assert list(foreign_addresses(chat_of(part))) == found


def test_what_is_refused():
    app = FastAPI()
    app.middleware("http")(only_own_data)

    def answer(body: dict) -> dict:
        return body

    for route in (*ROUTES, "/load_model"):
        app.post(route)(answer)
    client = TestClient(app, base_url="http://localhost")
    body = chat_of(IMAGE)
    assert client.post(ROUTES[0], json=body).json() == body, "it is read twice"
    url = chat_of({"type": "image_url", "image_url": {"url": "http://127.0.0.1/"}})
    for path, content, status, words in (
        (ROUTES[0], url, 422, "is not opened: send the file in a data: URL"),
        (ROUTES[0], chat_of(chat_template_kwargs={"allow_urls": True}), 422, "chat_template_kwargs"),
        ("/load_model", {"model": "other/model"}, 404, "There is nothing at '/load_model'"),
        ("/v1/audio/transcriptions", {}, 404, "there are /v1/chat/completions"),
    ):
        found = client.post(path, json=content)
        assert found.status_code == status
        assert words in found.json()["error"]
    assert client.post(ROUTES[0], content=b"{").status_code == 400


def test_models_that_do_not_chat_are_refused(clip_folder):
    with pytest.raises(ValueError, match="does not chat"):
        serve_openai(clip_folder)


@pytest.mark.integration
def test_llava_answers_as_its_chat(llava_folder, red_circle):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "hfvlm", "serve", "--openai", str(llava_folder), "--port", str(port)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    url = f"http://127.0.0.1:{port}"
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as process:
        try:
            wait_for(url, process)
            data = f"data:image/png;base64,{base64.b64encode(red_circle).decode()}"
            image = {"type": "image_url", "image_url": {"url": data}}
            body = chat_of(image, model=str(llava_folder), max_tokens=8, temperature=0)
            expected = hfvlm.Chat.from_pretrained(llava_folder, dtype="auto").ask(
                "What is it?", images=[BytesIO(red_circle)], max_new_tokens=8
            )
            answer = json.loads(post(url, body))
            assert answer["choices"][0]["message"]["content"].strip() == expected
            lines = [
                line[6:] for line in post(url, body | {"stream": True}).splitlines() if line.startswith("data: {")
            ]
            pieces = [json.loads(line)["choices"][0]["delta"].get("content") or "" for line in lines]
            assert "".join(pieces).strip() == expected
            assert len(pieces) > 2
            for headers in ({"Host": "evil.example"}, {"Origin": "http://evil.example"}):
                with pytest.raises(HTTPError, match=r"421|403"):
                    post(url, body, headers)
            with pytest.raises(HTTPError, match="422"):
                post(url, chat_of({"type": "image_url", "image_url": {"url": "/etc/hostname"}}))
        finally:
            process.terminate()


def wait_for(url, process):
    end = time.monotonic() + 120
    while True:
        try:
            return urlopen(f"{url}/health", timeout=10).read()
        except OSError:
            assert process.poll() is None, process.stderr.read()
            assert time.monotonic() < end
            time.sleep(0.2)


def post(url, body, headers=None):
    about = {"content-type": "application/json"} | (headers or {})
    request = Request(f"{url}/v1/chat/completions", json.dumps(body).encode(), about)
    with urlopen(request, timeout=120) as answer:
        return answer.read().decode()
