"""URLs and answers of servers that make no sense: refused by name, soon."""

import random

import pytest

from hfvlm.media import MediaError, urls
from tests.fuzz.mutations import Tally, mutated
from tests.media.test_urls import speaking

URLS = (
    "http://127.0.0.1:80/a.png",
    "https://user:word@cdn.example.com/a/b.png?x=1&y=2#z",
    "http://[::1]:8080/%41.png",
    "HTTP://EXAMPLE.com.:443/../a b.png",
    "http://0x7f.1/a",
    "http://2130706433/",
    "http://bücher.example/ä.png",
)
ANSWERS = (
    b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\nContent-Type: image/png\r\n\r\nabcd",
    b"HTTP/1.1 302 Found\r\nLocation: http://10.0.0.1/b\r\nContent-Length: 0\r\n\r\n",
    b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nabcd\r\n0\r\nA: b\r\n\r\n",
    b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\nConnection: close\r\n\r\nabcd",
)


def test_damaged_urls(monkeypatch, fuzz_rounds):
    """None of them connects to anything but a public address, which a test has not."""

    def connected(address, timeout):
        raise AssertionError(f"connects to {address}")

    def looked_up(host, *_, **__):
        if isinstance(host, str) and ("\0" in host or len(host) > 253):
            host.encode("idna")
            raise OSError("no such host")
        return [(0, 0, 0, "", ("127.0.0.1", 80))]

    monkeypatch.setattr(urls.socket, "create_connection", connected)
    monkeypatch.setattr(urls.socket, "getaddrinfo", looked_up)
    tally = Tally("urls", (MediaError,), seconds=1)
    for seed in range(fuzz_rounds):
        chance = random.Random(seed)
        url = mutated(chance.choice(URLS).encode(), chance).decode("utf-8", "surrogateescape")
        hosts = None if chance.random() < 0.5 else [mutated(b"cdn.example.com", chance).decode("latin-1")]
        assert tally.attempt(f"urls {seed}", lambda url=url, hosts=hosts: urls.fetch(url, hosts)) == "refused"
    tally.report()


def test_damaged_answers(monkeypatch, fuzz_rounds):
    real = urls._public_address
    monkeypatch.setattr(urls, "_public_address", lambda *a: a[1] if a[1] == "127.0.0.1" else real(*a))
    monkeypatch.setattr(urls, "TOTAL_SECONDS", 0.5)
    tally = Tally("answers", (MediaError,), seconds=2)
    for seed in range(fuzz_rounds // 4):
        chance = random.Random(seed)
        with speaking(mutated(chance.choice(ANSWERS), chance), b"", 0, 0) as url:
            tally.attempt(f"answers {seed}", lambda url=url: urls.fetch(url), lambda _: "accepted")
    tally.report()


@pytest.mark.parametrize("hosts", [[], (), set()])
def test_no_hosts_allow_none(hosts):
    with pytest.raises(MediaError, match="not among the allowed hosts"):
        urls.fetch("http://example.com/a.png", hosts)
