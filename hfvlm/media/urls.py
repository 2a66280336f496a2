"""Fetching of URLs that the user explicitly allowed, and only from public hosts.

Each hop of a redirect is checked again, and the connection goes to the very address that was checked, so that a name
cannot point elsewhere a moment later. However slowly and however much a server answers, all hops
together end within a time and a size.
"""

import http.client
import io
import ipaddress
import socket
import ssl
import time
from collections.abc import Collection
from typing import Any
from urllib.parse import SplitResult, quote, urljoin, urlsplit

from hfvlm.checks.messages import cut, shown
from hfvlm.media.errors import MediaError

MAX_BYTES = 64 * 2**20
MAX_HEAD_BYTES = 2**18
MAX_HOPS = 5
# Of one wait for a connection, and of everything together.
TIMEOUT_SECONDS = 20.0
TOTAL_SECONDS = 60.0
LONGEST_URL = 8192
# The translated addresses of IPv4 (RFC 6052).
NAT64 = ipaddress.ip_network("64:ff9b::/96")


def fetch(url: str, hosts: str | Collection[str] | None = None) -> bytes:
    """Fetch the body of an http(s) URL.

    Args:
        url: the address; redirects are followed five times at most.
        hosts: host names that may be requested, each in full; None allows every public host.

    Raises:
        MediaError: another scheme, a host that is not allowed or not public, a status other than 200, a body of more
            than 64 MiB or one that ends early, or more than a minute; or `hosts` are no names of hosts.
    """
    allowed = None if hosts is None else allowed_hosts(hosts)
    end = time.monotonic() + TOTAL_SECONDS
    for _ in range(MAX_HOPS + 1):
        try:
            status, location, body = _request(url, allowed, end)
            following = urljoin(url, location or "")
        except MediaError:
            raise
        except TimeoutError as error:
            raise MediaError(f"{_named(url)}: no whole answer in time. Download the file first.") from error
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise MediaError(
                f"{_named(url)}: {cut(' '.join(str(error).split()), 200) or type(error).__name__}."
            ) from error
        if status == 200:
            return body
        if status not in (301, 302, 303, 307, 308) or not location:
            raise MediaError(f"{_named(url)}: the server answered {status}.")
        url = following
    raise MediaError(f"{_named(url)}: more than {MAX_HOPS} redirects.")


def allowed_hosts(hosts: Any) -> set[str]:
    """Return names of hosts as they are compared.

    Raises:
        MediaError: one of them is no full name of a host.
    """
    names = [hosts] if isinstance(hosts, str) else hosts
    if not isinstance(names, list | tuple | set | frozenset) or not all(isinstance(name, str) for name in names):
        raise MediaError(f"allow_urls must be True, or full names of hosts in a list or set, not {shown(hosts)}.")
    return {_allowed_host(name) for name in names}


def _allowed_host(name: str) -> str:
    try:
        address = ipaddress.ip_address(name.strip("[]"))
        return str(address)
    except ValueError:
        pass
    labels = name.rstrip(".").split(".")
    if not all(labels) or not all(char.isalnum() or char in "-_." for char in name):
        raise MediaError(
            f"allow_urls: {shown(name)} is no full name of a host, such as 'cdn.example.com': without scheme, port, "
            "path or wildcard."
        )
    return _comparable(name)


def _comparable(host: str) -> str:
    host = host.rstrip(".").lower()
    try:
        return host.encode("idna").decode("ascii")
    except UnicodeError:
        return host


def _named(url: str) -> str:
    """Return a URL for messages: without its password, printable and short."""
    text = url if len(url) <= 200 else url[:200] + "..."
    start, at, rest = text.rpartition("@")
    return cut(start.partition("//")[0] + "//" + rest if at and "//" in start else text, 300)


def _request(url: str, hosts: set[str] | None, end: float) -> tuple[int, str | None, bytes]:
    parts = urlsplit(url if len(url) <= LONGEST_URL else "")
    host = parts.hostname
    if parts.scheme not in ("http", "https") or not host:
        raise MediaError(f"{_named(url)}: only http and https can be fetched, in {LONGEST_URL} letters at most.")
    if hosts is not None and _comparable(host) not in hosts:
        raise MediaError(f"{_named(url)}: host {shown(host)} is not among the allowed hosts.")
    port = parts.port or (443 if parts.scheme == "https" else 80)
    address = _public_address(_named(url), host, port)
    connection = http.client.HTTPConnection(host, port)
    reader = _connected(connection, parts, address, port, end)
    try:
        path = quote(parts.path or "/", safe="/%:@!$&'()*+,;=~-._")
        query = quote(parts.query, safe="/%:@!$&'()*+,;=~-._?")
        headers = {"Accept-Encoding": "identity", "User-Agent": "hfvlm"}
        connection.request("GET", path + (f"?{query}" if query else ""), headers=headers)
        response = connection.getresponse()
        location = response.headers.get("Location")
        if response.status != 200:
            return response.status, location, b""
        reader.left = 2 * MAX_BYTES  # the framing of a body may be as long as the body
        body = response.read(MAX_BYTES + 1)
    finally:
        connection.close()
        reader.socket.close()
    if len(body) > MAX_BYTES:
        raise MediaError(f"{_named(url)}: more than {MAX_BYTES // 2**20} MiB.")
    if response.length:
        raise MediaError(f"{_named(url)}: the connection ended {response.length} bytes before the file did.")
    return response.status, location, body


def _connected(
    connection: http.client.HTTPConnection, parts: SplitResult, address: str, port: int, end: float
) -> "_Bounded":
    connected = socket.create_connection((address, port), timeout=min(TIMEOUT_SECONDS, _left(end)))
    if parts.scheme == "https":
        try:
            connected = ssl.create_default_context().wrap_socket(connected, server_hostname=parts.hostname)
        except BaseException:
            connected.close()
            raise
    reader = _Bounded(connected, end)
    connection.sock = _Socket(reader)
    return reader


def _left(end: float) -> float:
    left = end - time.monotonic()
    if left <= 0:
        raise TimeoutError
    return left


class _Bounded(io.RawIOBase):
    """The bytes that a socket receives, until a moment and up to a size: http.client limits only one wait, and would
    wait, or read the head of a body, for ever."""

    def __init__(self, connected: socket.socket, end: float):
        self.socket, self.end, self.left = connected, end, MAX_HEAD_BYTES

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        self.socket.settimeout(min(TIMEOUT_SECONDS, _left(self.end)))
        count = self.socket.recv_into(buffer)
        self.left -= count
        if self.left < 0:
            raise OSError("the server goes on and on before or around the body")
        return count


class _Socket:
    """The part of a socket that http.client uses."""

    def __init__(self, reader: _Bounded):
        self.reader = reader

    def makefile(self, *_: Any) -> io.BufferedReader:
        return io.BufferedReader(self.reader)

    def sendall(self, data: Any) -> None:
        self.reader.socket.settimeout(min(TIMEOUT_SECONDS, _left(self.reader.end)))
        self.reader.socket.sendall(data)

    def close(self) -> None:
        """Do nothing: the response still reads from the socket."""


def _public_address(url: str, host: str, port: int) -> str:
    try:
        addresses = {str(info[4][0]) for info in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)}
    except (OSError, UnicodeError) as error:
        raise MediaError(f"{url}: host {shown(host)} has no address ({error}).") from error
    for address in addresses:
        if not all(map(_is_public, _meanings(ipaddress.ip_address(address)))):
            raise MediaError(f"{url}: host {shown(host)} is not public ({address}).")
    return min(addresses)


def _is_public(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> bool:
    return address.is_global and not (address.is_multicast or address.is_reserved or address.is_unspecified)


def _meanings(address: Any) -> list[Any]:
    """Return an address, and those of IPv4 inside it, to which gateways may forward."""
    if isinstance(address, ipaddress.IPv4Address):
        return [address]
    if address in NAT64:
        return [ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)]
    inner = [address.ipv4_mapped, address.sixtofour, *(address.teredo or ())]
    return [address, *(each for each in inner if each is not None)]
