"""Fetches a URL that the user explicitly allowed, and only from public hosts.

Each hop of a redirect is checked anew, and the connection goes to the very address that was checked, so that a name
cannot point elsewhere a moment later.
"""

import http.client
import ipaddress
import socket
import ssl
from collections.abc import Collection
from urllib.parse import urljoin, urlsplit

from hfvlm.media.errors import MediaError

MAX_BYTES = 64 * 2**20
MAX_HOPS = 5
TIMEOUT_SECONDS = 20.0


def fetch(url: str, hosts: Collection[str] | None = None) -> bytes:
    """The body of an http(s) URL.

    Args:
        url: the address; redirects are followed five times at most.
        hosts: host names that may be asked; None allows every public host.

    Raises:
        MediaError: another scheme, a host that is not allowed or not public, a status other than 200, or a body of
            more than 64 MiB.
    """
    for _ in range(MAX_HOPS + 1):
        status, location, body = _request(url, hosts)
        if status == 200:
            return body
        if status not in (301, 302, 303, 307, 308) or not location:
            raise MediaError(f"{url}: the server answered {status}.")
        url = urljoin(url, location)
    raise MediaError(f"{url}: more than {MAX_HOPS} redirects.")


def _request(url: str, hosts: Collection[str] | None) -> tuple[int, str | None, bytes]:
    parts = urlsplit(url)
    host = parts.hostname
    if parts.scheme not in ("http", "https") or not host:
        raise MediaError(f"{url}: only http and https can be fetched.")
    if hosts is not None and host not in hosts:
        raise MediaError(f"{url}: host {host!r} is not among the allowed hosts.")
    port = parts.port or (443 if parts.scheme == "https" else 80)
    address = _public_address(url, host, port)
    connection = http.client.HTTPConnection(host, port, timeout=TIMEOUT_SECONDS)
    try:
        connection.sock = socket.create_connection((address, port), timeout=TIMEOUT_SECONDS)
        if parts.scheme == "https":
            connection.sock = ssl.create_default_context().wrap_socket(connection.sock, server_hostname=host)
        path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        connection.request("GET", path, headers={"Accept-Encoding": "identity", "User-Agent": "hfvlm"})
        response = connection.getresponse()
        body = response.read(MAX_BYTES + 1)
    except (OSError, http.client.HTTPException) as error:
        raise MediaError(f"{url}: {error}.") from error
    finally:
        connection.close()
    if len(body) > MAX_BYTES:
        raise MediaError(f"{url}: more than {MAX_BYTES // 2**20} MiB.")
    return response.status, response.headers.get("Location"), body


def _public_address(url: str, host: str, port: int) -> str:
    try:
        addresses = {str(info[4][0]) for info in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)}
    except OSError as error:
        raise MediaError(f"{url}: host {host!r} has no address ({error}).") from error
    for address in addresses:
        if not ipaddress.ip_address(address).is_global:
            raise MediaError(f"{url}: host {host!r} is not public ({address}).")
    return min(addresses)
