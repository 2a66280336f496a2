"""The client of OpenAI-compatible endpoints, against a server on this machine."""

import json
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import pytest

from hfvlm.data.endpoint import Endpoint, EndpointError

KEY = "sk-secret-7351"
MESSAGES = [{"role": "user", "content": "hello"}]


class Server(ThreadingHTTPServer):
    """Answers requests with what is in `answers`, the last of them for ever: (status, headers, body)."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.requests, self.answers = [], [answer("hello, too")]

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}/v1"


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.requests.append((self.path, dict(self.headers), body))
        made = self.server.answers[0] if len(self.server.answers) == 1 else self.server.answers.pop(0)
        status, headers, content = made(body) if callable(made) else made
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_):
        """Log nothing."""


def answer(text, reason="stop"):
    body = {"choices": [{"message": {"role": "assistant", "content": text}, "finish_reason": reason}]}
    return 200, {"Content-Type": "application/json"}, json.dumps(body).encode()


@pytest.fixture
def server():
    server = Server()
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def test_a_request_and_its_answer(server, monkeypatch):
    monkeypatch.setenv("MY_KEY", KEY)
    endpoint = Endpoint(server.url + "/", "some-model", key_variable="MY_KEY", options={"temperature": 0.5})
    assert endpoint(MESSAGES, seed=3) == ("hello, too", True)
    path, headers, body = server.requests[0]
    assert (path, headers["Authorization"]) == ("/v1/chat/completions", f"Bearer {KEY}")
    assert body == {"model": "some-model", "messages": MESSAGES, "seed": 3, "temperature": 0.5}
    assert KEY not in repr(endpoint.settings)
    server.answers = [answer("hel", "length")]
    assert endpoint(MESSAGES, seed=3) == ("hel", False)


def test_it_tries_again_where_an_answer_may_come(server, monkeypatch):
    pauses = []
    monkeypatch.setattr("hfvlm.data.endpoint.time.sleep", pauses.append)
    server.answers = [(429, {"Retry-After": "7"}, b"{}"), (503, {}, b""), (500, {}, b""), answer("at last")]
    assert Endpoint(server.url, "m")(MESSAGES, 0) == ("at last", True)
    assert pauses == [7.0, 2.0, 4.0]
    server.answers = [(503, {}, b"busy")]
    with pytest.raises(
        EndpointError, match=r"no answer in 3 tries: HTTP 503, busy. The run continues when started again"
    ):
        Endpoint(server.url, "m", tries=3)(MESSAGES, 0)
    assert len(server.requests) == 7


def test_what_is_final_is_raised_at_once_and_without_the_key(server, monkeypatch):
    monkeypatch.setenv("MY_KEY", KEY)
    server.answers = [(401, {}, f"wrong key {KEY}".encode())]
    with pytest.raises(EndpointError, match=r"HTTP 401, wrong key \*\*\*") as raised:
        Endpoint(server.url, "m", key_variable="MY_KEY")(MESSAGES, 0)
    assert KEY not in str(raised.value)
    assert raised.value.__cause__ is None
    server.answers = [(200, {}, b'{"choices": []}')]
    with pytest.raises(EndpointError, match="no answer of a chat completion"):
        Endpoint(server.url, "m")(MESSAGES, 0)
    server.answers = [(302, {"Location": server.url}, b"")]
    with pytest.raises(EndpointError, match="HTTP 302"):
        Endpoint(server.url, "m")(MESSAGES, 0)
    assert len(server.requests) == 3


def test_a_server_that_is_not_there(monkeypatch):
    monkeypatch.setattr("hfvlm.data.endpoint.time.sleep", lambda _: None)
    with pytest.raises(EndpointError, match="no answer in 2 tries"):
        Endpoint("http://127.0.0.1:9/v1", "m", tries=2)(MESSAGES, 0)


def test_addresses_that_would_leak_are_refused(monkeypatch):
    monkeypatch.setenv("MY_KEY", KEY)
    for url in ("file:///etc/passwd", "https://me:pass@host/v1", "host/v1", "https://host/v1?key=a"):
        with pytest.raises(ValueError, match="without a password or a query"):
            Endpoint(url, "m")
    with pytest.raises(ValueError, match="the key would travel unencrypted; use https"):
        Endpoint("http://example.org/v1", "m", key_variable="MY_KEY")
    monkeypatch.delenv("MY_KEY")
    with pytest.raises(ValueError, match="no variable MY_KEY with the endpoint's key"):
        Endpoint("https://example.org/v1", "m", key_variable="MY_KEY")
