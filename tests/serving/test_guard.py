"""Requests that pages of other origins make a browser send."""

import pytest
from fastapi.testclient import TestClient

from hfvlm.serving.app import make_app
from hfvlm.serving.guard import HEADERS
from hfvlm.serving.served import Served


@pytest.fixture(scope="module")
def client():
    return TestClient(make_app(Served("nothing"), names=["box.example"]), base_url="http://127.0.0.1:7860")


@pytest.mark.parametrize(
    "host", ["127.0.0.1:7860", "localhost", "LOCALHOST:80", "[::1]:7860", "192.168.0.7", "box.example:7860"]
)
def test_own_names_are_answered(host, client):
    assert client.get("/about", headers={"host": host}).status_code == 200


@pytest.mark.parametrize(
    "host",
    ["evil.example", "localhost.evil.example", "evil.example:7860", "127.0.0.1.evil.example", "",
     "localhost@evil.example",
     "evil.example@localhost", "localhost/x", "localhost:99999", "localhost:x", "[::1", "2130706433"],
)  # fmt: skip
def test_other_names_are_refused(host, client):
    """DNS rebinding: a name of somebody else's that leads here."""
    answer = client.get("/about", headers={"host": host})
    assert answer.status_code == 421
    assert "--name" in answer.json()["error"]


@pytest.mark.parametrize(
    "origin", ["http://evil.example", "null", "http://127.0.0.1:3000", "http://localhost:7860", "x"]
)
@pytest.mark.parametrize("path", ["/embed", "/search", "/classify", "/chat"])
def test_other_origins_are_refused(origin, path, client):
    """Forged requests: a form that a page of another site sends."""
    assert client.post(path, data={"text": "a"}, headers={"origin": origin}).status_code == 403


@pytest.mark.parametrize("site", ["cross-site", "same-site", "anything"])
def test_requests_of_other_sites_are_refused(site, client):
    headers = {"sec-fetch-site": site, "sec-fetch-mode": "no-cors"}
    for kind in ("image", "audio", "iframe", "script", "empty"):
        assert client.get("/media/image/0", headers=headers | {"sec-fetch-dest": kind}).status_code == 403
    followed = headers | {"sec-fetch-mode": "navigate", "sec-fetch-dest": "document"}
    assert client.get("/", headers=followed).status_code == 200, "a link"
    assert client.post("/embed", data={"text": "a"}, headers=followed).status_code == 403


def test_the_own_page_may(client):
    headers = {"origin": "http://127.0.0.1:7860", "sec-fetch-site": "same-origin"}
    assert client.post("/embed", data={"text": "a"}, headers=headers).status_code == 404


def test_every_answer_has_the_headers(client):
    for answer in (
        client.get("/"), client.get("/absent"), client.post("/embed"), client.get("/about", headers={"host": "evil"}),
    ):  # fmt: skip
        assert {name: answer.headers[name] for name in HEADERS} == HEADERS
        assert len(answer.headers.get_list("cache-control")) == 1
