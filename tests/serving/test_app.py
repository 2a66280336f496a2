"""The API: what it answers, and what it refuses."""

import asyncio
import io
import json
import re
import wave
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from fastapi.testclient import TestClient
from PIL import Image

from hfvlm.inference.embed import read_embedder, read_vectors
from hfvlm.inference.search import query_vector
from hfvlm.inference.zero_shot import ZeroShotClassifier
from hfvlm.serving.app import make_app
from hfvlm.serving.loading import load
from hfvlm.serving.served import Served
from tests.serving.conftest import RATE, write_tone

LABELS = ["red circle", "blue square", "green cross"]


@pytest.fixture(scope="module")
def embedder(mixed_index):
    return read_embedder(mixed_index)


@pytest.fixture(scope="module")
def tone(tmp_path_factory):
    path = tmp_path_factory.mktemp("tone") / "tone.wav"
    write_tone(path, 440)
    return path.read_bytes()


def problem(answer, status=422):
    assert answer.status_code == status, answer.text
    assert set(answer.json()) == {"error"}
    return answer.json()["error"]


def test_about(client, mixed_index):
    about = client.get("/about").json()
    assert about["name"] == mixed_index.name
    assert about["model"] == "HfvlmImageBindModel"
    assert {"image", "text", "audio"} <= set(about["modalities"])
    assert about["indexed"] == {"image": 8, "audio": 3}
    assert (about["chat_model"], about["chat_modality"]) == ("HfvlmLLaVAForConditionalGeneration", "image")
    assert about["upload_bytes"] == 2**20


def test_embed_is_the_embedders(client, embedder, red_circle, tone):
    files = [("image", ("a.png", red_circle)), ("image", ("b.png", red_circle)), ("audio", ("c.wav", tone))]
    vectors = client.post("/embed", data={"text": ["a red circle", "a"]}, files=files).json()["vectors"]
    assert {name: len(rows) for name, rows in vectors.items()} == {"text": 2, "image": 2, "audio": 1}
    for name, given in {"text": ["a red circle", "a"], "image": [red_circle] * 2, "audio": [tone]}.items():
        np.testing.assert_array_equal(np.float32(vectors[name]), embedder.encode(**{name: given}))


@pytest.mark.parametrize("among", ["image", "audio"])
def test_search_is_the_indexs(among, client, embedder, mixed_index, red_circle, tone):
    data = {"text": "a red circle::0.5", "among": among, "k": 3}
    answer = client.post("/search", data=data, files={"image": red_circle, "audio": tone}).json()
    index, paths = read_vectors(mixed_index, among)
    queries = {"text": ["a red circle::0.5"], "image": [red_circle], "audio": [tone]}
    expected = index.search(query_vector(embedder, queries), 3)
    assert answer["among"] == among
    assert [(hit["id"], hit["score"]) for hit in answer["hits"]] == expected
    for hit in answer["hits"]:
        assert index.ids[hit["row"]] == hit["id"]
        assert hit["kind"] == among
        found = client.get(hit["media"])
        assert found.content == Path(paths[hit["id"]]).read_bytes()
        assert found.headers["content-type"].startswith(f"{among}/")
        assert (hit["thumbnail"] is None) == (among == "audio")
    assert client.post("/search", data={"text": "a"}).json()["among"] == "image"
    assert len(client.post("/search", data={"text": "a", "k": 100}).json()["hits"]) == 8


def test_captions_are_in_the_hits(captioned_index):
    client = TestClient(make_app(load(captioned_index)), base_url="http://localhost")
    hits = client.post("/search", data={"text": "a large blue square", "k": 2}).json()["hits"]
    assert hits[0]["text"] == "a large blue square"
    texts = client.post("/search", data={"text": "a large blue square", "k": 1, "among": "text"}).json()["hits"]
    assert texts[0]["text"] == "a large blue square"
    assert texts[0]["score"] == pytest.approx(1, abs=1e-5)
    assert texts[0]["thumbnail"] == "/thumbnail/text/" + str(texts[0]["row"])
    assert client.get(texts[0]["thumbnail"]).headers["content-type"] == "image/jpeg"


def test_the_page_is_three_files_without_addresses_elsewhere(client):
    """What it does in a browser is in test_page.py."""
    page = client.get("/")
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    assert re.findall(r'(?:src|href)="([^"]*)"', page.text) == [
        "data:,", "/style.css", "/script.js", "#main", "/openapi.json"
    ]  # fmt: skip
    for path, kind in (("/style.css", "text/css"), ("/script.js", "text/javascript")):
        found = client.get(path)
        assert found.headers["content-type"].startswith(kind)
        assert "http" not in found.text
        assert "innerHTML" not in found.text
    controls = re.findall(r"<(?:input|select|textarea) name[^>]*>", page.text)
    labelled = re.findall(r"<label>[^<]+<(?:input|select|textarea) name", page.text)
    assert len(controls) == len(labelled) == 7


def test_thumbnails_and_parts_of_files(client):
    thumbnail = client.get("/thumbnail/image/0")
    image = Image.open(io.BytesIO(thumbnail.content))
    assert (image.format, image.size) == ("JPEG", (48, 48))
    part = client.get("/media/audio/1", headers={"Range": "bytes=4-11"})
    assert part.status_code == 206
    assert part.content == client.get("/media/audio/1").content[4:12]


@pytest.mark.parametrize(
    "path",
    ["/media/image/8", "/media/text/0", "/media/..%2f..%2fetc/0", "/media/image/0/..", "/media/image/9" + "9" * 30,
     "/thumbnail/audio/0", "/thumbnail/image/99", "/absent"],
)  # fmt: skip
def test_only_files_of_rows_are_served(path, client):
    problem(client.get(path), 404)


def test_files_that_are_gone_or_no_media_are_not_served(served, tmp_path):
    table = served.tables["image"]
    names = [str(name) for name in table.index.ids]
    secret = tmp_path / "secret.txt"
    secret.write_text("secret")
    others = [secret, tmp_path, tmp_path / "gone.png", "/dev/zero", "a\0b", "x" * 5000, "", "data:,x"]
    paths = dict(zip(names, map(str, others), strict=True))
    changed = Served("changed", served.embedder, {"image": replace(table, paths=paths)})
    client = TestClient(make_app(changed), base_url="http://127.0.0.1")
    for row in range(8):
        problem(client.get(f"/media/image/{row}"), 404)
        problem(client.get(f"/thumbnail/image/{row}"), 404)
    assert all(hit["media"] is None for hit in client.post("/search", data={"text": "a"}).json()["hits"])


def test_classify_is_the_classifiers(client, embedder, red_circle):
    data = {"label": LABELS, "templates": "imagenet-7", "top_k": 2}
    for _ in range(2):  # the second time with the weights that are there
        classes = client.post("/classify", data=data, files={"image": red_circle}).json()["classes"]
        expected = ZeroShotClassifier(embedder, LABELS, "imagenet-7").predict(red_circle, top_k=2)
        assert [(each["label"], each["probability"]) for each in classes] == expected
    assert problem(client.post("/classify", data={"label": ["a", "a"]}, files={"image": red_circle}))
    two = [("image", red_circle), ("image", red_circle)]
    assert "One source" in problem(client.post("/classify", data={"label": "a"}, files=two))


@pytest.mark.parametrize(
    ("route", "data", "words"),
    [
        ("/search", {"k": "1"}, "Nothing was sent: give one of the fields text, image"),
        ("/embed", {"txet": "a"}, "'txet' is no field; the nearest is 'text'. There are text, image"),
        ("/search", {"text": "a", "amonk": "image"}, "'amonk' is no field; the nearest is 'among'"),
        ("/search", {"text": "a", "among": "depth"}, "among: there are vectors of image, audio, not of 'depth'"),
        ("/search", {"text": "a", "k": "101"}, "k: Input should be less than or equal to 100, not '101'"),
        ("/search", {"text": "a", "k": "many"}, "k: Input should be a valid integer"),
        ("/search", {"text": "a", "k": ["1", "2"]}, "'k' is given 2 times"),
        ("/search", {"text": "a::b"}, "'b' is no weight"),
        ("/search", {"text": ["a", "a::-1"]}, "has no direction"),
        ("/search", {"text": ["a"] * 17}, "17 sources; at most 16"),
        ("/embed", {"text": "a" * 10_001}, "text: texts have at most 10000 characters"),
        ("/embed", {"image": "/etc/hostname"}, "image: a file is needed, sent as one .curl -F image=@FILE., not '/e"),
        ("/embed", {"image": "http://127.0.0.1/a.png"}, "image: a file is needed"),
        ("/embed", {"image": "data:image/png;base64,AAAA"}, "image: a file is needed"),
        ("/classify", {"text": "a"}, "label is needed"),
        ("/classify", {"text": "a", "label": " "}, "label: names of classes have 1 to"),
        ("/classify", {"text": "a", "label": "b", "templates": "mine"}, "templates: Input should be 'name', 'single'"),
        ("/chat", {"question": "a", "temperature": "nan"}, "temperature: "),
        ("/chat", {"question": "a", "max_new_tokens": "0"}, "max_new_tokens: .*greater than or equal to 1"),
        ("/chat", {"image": ""}, "question is needed"),
    ],
)  # fmt: skip
def test_fields_are_refused_by_name(route, data, words, client):
    assert re.search(words, message := problem(client.post(route, data=data))), message


def image_of(size):
    file = io.BytesIO()
    Image.new("1", size).save(file, "PNG")
    return file.getvalue()


@pytest.mark.parametrize(
    ("name", "data", "words"),
    [
        ("image", b"", "image 0: 0 bytes|image 0"),
        ("image", b"GIF89a", "image 0: 6 bytes"),
        ("image", b"<svg xmlns='http://www.w3.org/2000/svg'/>", "not an image in one of the formats"),
        ("image", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not an image in one of the formats"),
        ("image", image_of((14_000, 14_000)), "pixels.* exceeds limit"),
        ("audio", b"#EXTM3U\n#EXTINF:1,\nfile:///etc/hostname\n", "audio 0"),
        ("audio", b"ffconcat version 1.0\nfile /etc/hostname\n", "audio 0"),
        ("audio", b"RIFF\0\0\0\0WAVE", "audio 0"),
    ],
)  # fmt: skip
def test_files_are_refused_by_name(name, data, words, client):
    message = problem(client.post("/embed", files={name: (f"a.{name}", data)}))
    assert re.search(words, message), message


def test_long_audio_is_bounded_as_media_are(client):
    """A header that claims more samples than the file has; and more than are read."""
    file = io.BytesIO()
    with wave.open(file, "wb") as sound:
        sound.setnchannels(1)
        sound.setsampwidth(2)
        sound.setframerate(RATE)
        sound.writeframes(bytes(RATE))
    data = bytearray(file.getvalue())
    data[40:44] = b"\xff\xff\xff\x7f"
    assert client.post("/embed", files={"audio": bytes(data)}).status_code in (200, 422)


def test_what_the_model_lacks_is_named(captioned_index, served):
    clip = TestClient(make_app(load(captioned_index)), base_url="http://localhost")
    assert "embeds image, text, not audio" in problem(clip.post("/embed", files={"audio": b"a"}))
    assert "--chat MODEL" in problem(clip.post("/chat", data={"question": "a"}), 404)
    chat = TestClient(make_app(Served("chat", chats=served.chats)), base_url="http://localhost")
    assert "embeds nothing" in problem(chat.post("/embed", data={"text": "a"}), 404)
    assert "embeds nothing" in problem(chat.post("/classify", data={"text": "a", "label": "b"}), 404)


def test_other_bodies_are_refused(client):
    assert "multipart/form-data, not 'application/json'" in problem(client.post("/embed", json={"text": "a"}), 415)
    assert problem(client.post("/embed"), 415)
    damaged = {"content-type": "multipart/form-data; boundary=x"}
    assert problem(client.post("/embed", content=b"--x\r\nno header\r\n\r\n", headers=damaged), 400)
    assert problem(client.post("/embed", content=b"x", headers={"content-type": "multipart/form-data"}), 400)
    assert "'text': /embed takes no query parameter; send it as a field" in problem(client.post("/embed?text=a"))
    assert "'x': /about takes no query parameter; leave it out" in problem(client.get("/about?x=1"))
    assert problem(client.get("/embed"), 405)


def test_large_uploads_are_refused_before_they_are_read(client):
    assert "at most 1048576 bytes" in problem(client.post("/embed", files={"image": bytes(2**20)}), 413)
    many = [("image", ("a.png", b"a"))] * 1001
    assert "1000" in problem(client.post("/embed", files=many), 400)
    received, sent = [], []

    async def receive():
        head = b'--x\r\ncontent-disposition: form-data; name="image"; filename="a"\r\n\r\n'
        received.append(bytes(2**16) if received else head)
        return {"type": "http.request", "body": received[-1], "more_body": True}

    async def send(message):
        sent.append(message)

    headers = [(b"host", b"localhost"), (b"content-type", b"multipart/form-data; boundary=x")]
    scope = {"type": "http", "method": "POST", "path": "/embed", "query_string": b"", "headers": headers}
    asyncio.run(client.app(scope, receive, send))
    assert sent[0]["status"] == 413
    assert b"at most 1048576 bytes" in sent[1]["body"]
    assert len(received) == 1 + 2**20 // 2**16


def requests_of(client, red_circle, tone):
    """Requests of every kind."""
    short = {"max_new_tokens": 8}
    return [
        lambda: client.post("/embed", data={"text": "a red circle"}).json(),
        lambda: client.post("/embed", data={"text": ["a", "a long text about a green cross and a square"]}).json(),
        lambda: client.post("/embed", files={"image": red_circle, "audio": tone}).json(),
        lambda: client.post("/search", data={"text": "a blue square", "k": 8}).json(),
        lambda: client.post("/search", data={"text": "a::-0.5", "among": "audio"}, files={"audio": tone}).json(),
        lambda: client.post("/classify", data={"label": LABELS}, files={"image": red_circle}).json(),
        lambda: client.post("/classify", data={"label": LABELS, "templates": "name"}, files={"audio": tone}).json(),
        lambda: answer_of(client.post("/chat", data={"question": "What?"} | short)),
        lambda: answer_of(client.post("/chat", data={"question": "Why?"} | short, files={"image": red_circle})),
        lambda: client.get("/thumbnail/image/3").content,
        lambda: client.get("/media/audio/2").content,
        lambda: client.post("/embed", files={"image": b"no image"}).json(),
    ]  # fmt: skip


def answer_of(response):
    lines = [json.loads(line) for line in response.text.splitlines()]
    return lines[-1]["answer"], "".join(line.get("piece", "") for line in lines).strip()


def test_requests_in_parallel_give_what_one_gives(client, red_circle, tone):
    requests = requests_of(client, red_circle, tone)
    alone = [request() for request in requests]
    order = np.random.RandomState(0).permutation(np.arange(3 * len(requests)) % len(requests))
    with ThreadPoolExecutor(12) as pool:
        together = list(pool.map(lambda i: requests[i](), order))
    for i, found in zip(order, together, strict=True):
        assert found == alone[i]


def test_a_fault_of_the_server_is_logged_and_not_shown(served, monkeypatch, caplog):
    broken = Served("broken", served.embedder)
    monkeypatch.setattr(broken, "embed", lambda sources: {}["secret"])
    client = TestClient(make_app(broken), base_url="http://127.0.0.1", raise_server_exceptions=False)
    message = problem(client.post("/embed", data={"text": "a"}), 500)
    assert "secret" not in message
    assert "KeyError" in caplog.text


def test_models_alone_and_what_cannot_be_served(clip_folder, small_blip, llava_folder):
    client = TestClient(make_app(load(clip_folder)), base_url="http://localhost")
    assert client.get("/about").json()["indexed"] == {}
    assert len(client.post("/embed", data={"text": "a"}).json()["vectors"]["text"]) == 1
    assert "a folder of `hfvlm embed`" in problem(client.post("/search", data={"text": "a"}), 404)
    with pytest.raises(ValueError, match="neither embeds nor chats"):
        load(small_blip("HfvlmBLIPForConditionalGeneration"))
    with pytest.raises(ValueError, match="chats itself"):
        load(llava_folder, chat=llava_folder)
    with pytest.raises(ValueError, match="does not chat"):
        load(clip_folder, chat=clip_folder)
    with pytest.raises(ValueError, match="embeds image, text, not audio"):
        load(clip_folder, options={"audio": {"sampling_rate": 8000}})
