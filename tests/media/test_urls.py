"""URLs that are fetched once a user allowed them, and those that are not even then."""

import contextlib
import io
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from PIL import Image

from hfvlm.media import MediaError, read_image, urls


class Server(BaseHTTPRequestHandler):
    def do_GET(self):
        if self.path == "/image":
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
    assert read_image(f"{server}/image", allow_urls=True).size == (5, 4)
    assert read_image(f"{server}/image", allow_urls={"127.0.0.1"}).size == (5, 4)
    assert read_image(f"{server}/to/!image", allow_urls=True).size == (5, 4)


@pytest.mark.usefixtures("loopback_is_public")
def test_limits(server, monkeypatch):
    for path, words in (("/absent", "answered 404"), ("/loop", "more than 5 redirects")):
        with pytest.raises(MediaError, match=words):
            read_image(server + path, allow_urls=True)
    with pytest.raises(MediaError, match="not among the allowed hosts"):
        read_image(f"{server}/image", allow_urls={"example.com"})
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
def test_private_hosts_are_never_requested(url):
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


PIECES = {
    "a byte a time": (b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n", b"x", 0.05),
    "a byte of the head a time": (b"HTTP/1.1 200 OK\r\nA: ", b"x", 0.05),
    "nothing": (b"", b"", 0.05),
    "continue": (b"", b"HTTP/1.1 100 Continue\r\n\r\n" * 100, 0.0),
    "continue with headers": (b"", b"HTTP/1.1 100 Continue\r\nA: b\r\n\r\n" * 100, 0.0),
    "headers": (b"HTTP/1.1 200 OK\r\n", b"A: b\r\n" * 100, 0.0),
    "one header": (b"HTTP/1.1 200 OK\r\nA: ", b"b" * 1000, 0.0),
    "a status": (b"HTTP/1.1 200 ", b"OK" * 1000, 0.0),
    "chunks": (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", b"1\r\nx\r\n" * 1000, 0.0),
    "extensions of chunks": (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1;", b"a" * 10000, 0.0),
    "trailers": (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n", b"A: b\r\n" * 1000, 0.0),
    "a body": (b"HTTP/1.1 200 OK\r\n\r\n", b"x" * 65536, 0.0),
    "no HTTP": (b"220 smtp.example.com ESMTP\r\n", b"x\r\n", 0.01),
}


@contextlib.contextmanager
def speaking(first, pieces, wait, most=10**9):
    """A server that sends `first`, and then `pieces` again and again, to whoever connects."""
    listener = socket.create_server(("127.0.0.1", 0))
    stopped = threading.Event()

    def serve():
        while not stopped.is_set():
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            with connection, contextlib.suppress(OSError):
                connection.recv(65536)
                connection.sendall(first)
                for _ in range(most):
                    if stopped.wait(wait) if wait else stopped.is_set():
                        break
                    connection.sendall(pieces)

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}/a.png"
    finally:
        stopped.set()
        listener.close()


@pytest.mark.usefixtures("loopback_is_public")
@pytest.mark.parametrize("name", PIECES)
def test_servers_that_never_end(monkeypatch, name):
    monkeypatch.setattr(urls, "TOTAL_SECONDS", 1.0)
    monkeypatch.setattr(urls, "MAX_BYTES", 2**20)
    with speaking(*PIECES[name]) as url:
        start = time.monotonic()
        with pytest.raises(MediaError, match="127.0.0.1") as caught:
            read_image(url, allow_urls=True)
    assert time.monotonic() - start < 3
    assert len(str(caught.value)) < 500


@pytest.mark.usefixtures("loopback_is_public")
def test_all_hops_have_one_time(monkeypatch):
    monkeypatch.setattr(urls, "TOTAL_SECONDS", 1.0)
    monkeypatch.setattr(urls, "MAX_HOPS", 10**6)
    with speaking(b"HTTP/1.1 302 Found\r\nLocation: /again\r\nContent-Length: 0\r\n\r\n", b"", 0.05, 1) as url:
        start = time.monotonic()
        with pytest.raises(MediaError, match="in time"):
            read_image(url, allow_urls=True)
    assert time.monotonic() - start < 3


@pytest.mark.usefixtures("loopback_is_public")
def test_a_file_that_ends_early_is_refused():
    with (
        speaking(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n", b"xy", 0.0, 1) as url,
        pytest.raises(MediaError, match="ended 98 bytes before the file did"),
    ):
        read_image(url, allow_urls=True)


@pytest.mark.parametrize(
    ("hosts", "host", "allowed"),
    [
        ("cdn.example.com", "cdn.example.com", True),
        ("cdn.example.com", "le.com", False),
        ("cdn.example.com", "example.com", False),
        ("example.com", "cdn.example.com", False),
        ("example.com", "evilexample.com", False),
        (["CDN.Example.com."], "cdn.example.COM", True),
        (("a.com", "b.com"), "b.com.", True),
        ({"bücher.example"}, "xn--bcher-kva.example", True),
        (frozenset({"10.0.0.1"}), "10.0.0.1", True),
        (["[::1]"], "[::1]", True),
    ],
)
def test_hosts_are_allowed_by_their_full_names(monkeypatch, hosts, host, allowed):
    def asked(url, host, port):
        raise MediaError("asked")

    monkeypatch.setattr(urls, "_public_address", asked)
    with pytest.raises(MediaError, match="^asked$" if allowed else "is not among the allowed hosts"):
        read_image(f"http://{host}/a.png", allow_urls=hosts)


@pytest.mark.parametrize(
    "hosts",
    [
        "https://cdn.example.com",
        ["cdn.example.com/images"],
        ["cdn.example.com:443"],
        [".example.com"],
        ["*.example.com"],
        ["*"],
        [""],
        ["a b.com"],
        [3],
        [None],
        {"cdn.example.com": True},
        3,
        b"cdn.example.com",
    ],
)
def test_what_names_no_host_is_refused(hosts):
    with pytest.raises(MediaError, match="allow_urls"):
        read_image("http://cdn.example.com/a.png", allow_urls=hosts)


@pytest.mark.parametrize(
    "address",
    [
        "224.0.0.1",
        "240.0.0.1",
        "100.64.0.1",
        "::ffff:127.0.0.1",
        "64:ff9b::7f00:1",
        "2002:7f00:1::",
        "ff02::1",
        "fe80::1",
        "fc00::1",
    ],
)
def test_addresses_that_are_not_public(monkeypatch, address):
    monkeypatch.setattr(urls.socket, "getaddrinfo", lambda *_, **__: [(0, 0, 0, "", (address, 80))])
    with pytest.raises(MediaError, match="is not public"):
        read_image("http://example.com/a.png", allow_urls=True)


@pytest.mark.parametrize(
    "url",
    [
        "http://example.com:99999/a.png",
        "http://example.com:x/a.png",
        "http://[::1/a.png",
        "http://" + "a" * 300 + ".com/a.png",
        "http://a..com/a.png",
        "http://\x1b[31m.com/a.png",
        "http://127.0.0.1/" + "a" * 10**6,
    ],
)
def test_urls_that_make_no_sense(url):
    with pytest.raises(MediaError) as caught:
        read_image(url, allow_urls=True)
    assert len(str(caught.value)) < 1000
    assert "\x1b" not in str(caught.value)


def test_passwords_are_not_repeated():
    with pytest.raises(MediaError) as caught:
        read_image("http://me:secret@127.0.0.1/a.png", allow_urls=True)
    assert "secret" not in str(caught.value)
