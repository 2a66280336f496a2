"""What is fetched once a user allowed it, and what is not even then."""

import io
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from PIL import Image

from hfvlm.media import MediaError, read_image, urls


class Server(BaseHTTPRequestHandler):
    def do_GET(self):
        if self.path == "/picture":
            buffer = io.BytesIO()
            Image.new("RGB", (5, 4), "red").save(buffer, "PNG")
            self.answer(200, buffer.getvalue())
        elif self.path.startswith("/to/"):
            self.send_response(302)
            self.send_header("Location", self.path.removeprefix("/to/").replace("!", "/"))
            self.end_headers()
        elif self.path == "/loop":
            self.send_response(302)
            self.send_header("Location", "/loop")
            self.end_headers()
        elif self.path == "/huge":
            self.answer(200, b"x" * 2000)
        else:
            self.answer(404, b"")

    def answer(self, status, body):
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture
def server():
    with ThreadingHTTPServer(("127.0.0.1", 0), Server) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()


@pytest.fixture
def loopback_is_public(monkeypatch):
    """The only server a test can reach is this machine, which the real check refuses."""
    real = urls._public_address

    def check(url, host, port):
        return host if host == "127.0.0.1" else real(url, host, port)

    monkeypatch.setattr(urls, "_public_address", check)


@pytest.mark.usefixtures("loopback_is_public")
def test_an_allowed_url_is_read(server):
    assert read_image(f"{server}/picture", allow_urls=True).size == (5, 4)
    assert read_image(f"{server}/picture", allow_urls={"127.0.0.1"}).size == (5, 4)
    assert read_image(f"{server}/to/!picture", allow_urls=True).size == (5, 4)


@pytest.mark.usefixtures("loopback_is_public")
def test_limits(server, monkeypatch):
    for path, words in (("/absent", "answered 404"), ("/loop", "more than 5 redirects")):
        with pytest.raises(MediaError, match=words):
            read_image(server + path, allow_urls=True)
    with pytest.raises(MediaError, match="not among the allowed hosts"):
        read_image(f"{server}/picture", allow_urls={"example.com"})
    monkeypatch.setattr(urls, "MAX_BYTES", 1000)
    with pytest.raises(MediaError, match="more than"):
        read_image(f"{server}/huge", allow_urls=True)


@pytest.mark.parametrize(
    "url",
    [
        "http://127.0.0.1/a.png",
        "http://localhost/a.png",
        "http://169.254.169.254/latest/meta-data",
        "http://10.0.0.1/a.png",
        "http://[::1]/a.png",
        "http://0.0.0.0/a.png",
    ],
)
def test_private_hosts_are_never_asked(url):
    with pytest.raises(MediaError, match="is not public"):
        read_image(url, allow_urls=True)


@pytest.mark.usefixtures("loopback_is_public")
@pytest.mark.parametrize("target", ["http:!!169.254.169.254!x", "file:!!!etc!passwd", "ftp:!!127.0.0.1!x"])
def test_redirects_are_checked_like_the_first_address(server, target):
    with pytest.raises(MediaError, match="is not public|only http and https"):
        read_image(f"{server}/to/{target}", allow_urls=True)


@pytest.mark.parametrize("url", ["file:///etc/passwd", "ftp://example.com/a.png", "http:///a.png"])
def test_other_schemes_are_refused(url):
    with pytest.raises(MediaError, match="only http and https"):
        read_image(url, allow_urls=True)
