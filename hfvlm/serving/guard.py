"""Refusal of requests that are too large, or that pages of other sites make a browser send."""

from collections.abc import Awaitable, Callable, Collection, Mapping, MutableMapping
from ipaddress import ip_address
from typing import Any
from urllib.parse import urlsplit

from starlette.exceptions import HTTPException

from hfvlm.checks.messages import shown

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]

LOCAL = ("localhost",)
HEADERS = {
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; media-src 'self'; "
        "connect-src 'self'; base-uri 'none'; form-action 'self'; frame-ancestors 'none'"
    ),
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
    # Rows have the same addresses in every index.
    "cache-control": "no-store",
}


class Guard:
    """An ASGI application in front of another one, which answers only to its own names and its own page.

    A name of somebody else may lead to this machine (DNS rebinding), so names other than the known ones are refused;
    addresses in numbers are nobody's. What a page of another origin sends, a browser marks by `Origin` and
    `Sec-Fetch-Site`; programs send neither.

    Args:
        app: that is guarded.
        names: of this machine, next to localhost.
        most: bytes of the largest request.
        refuse: makes the answer of a refusal from its message and status.
    """

    def __init__(self, app: App, names: Collection[str], most: int, refuse: Callable[[str, int], App]):
        self.app, self.most, self.refuse = app, most, refuse
        self.names = {*LOCAL, *(name.lower() for name in names)}

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        problem = self.problem(headers, scope["method"])
        app = self.app if problem is None else self.refuse(*problem)
        await app(scope, self.bounded(receive), with_headers(send))

    def problem(self, headers: Mapping[str, str], method: str) -> tuple[str, int] | None:
        """Describe what is wrong with a request, with the status of its refusal; None for nothing."""
        host = headers.get("host", "").lower()
        if (name := name_of(host)) is None or not (name in self.names or is_address(name)):
            known = ", ".join(sorted(self.names))
            return f"This server is {known}, not {shown(host)}: start it with --name to give it another name.", 421
        origin = headers.get("origin")
        if origin is not None and origin_host(origin) != host:
            return f"A page of {shown(origin)} sent this; only the server's own page may.", 403
        site = headers.get("sec-fetch-site", "none")
        followed = method == "GET" and headers.get("sec-fetch-dest") == "document"
        if site not in ("same-origin", "none") and not followed:
            return "A page of another origin sent this; only the server's own page may.", 403
        length = headers.get("content-length", "")
        return (self.too_large, 413) if length.isdecimal() and int(length) > self.most else None

    @property
    def too_large(self) -> str:
        """What is wrong with a request of too many bytes."""
        return f"A request has at most {self.most} bytes: scale down, cut, or send fewer files."

    def bounded(self, receive: Receive) -> Receive:
        """Count the bytes of a request while they come.

        Raises:
            HTTPException: they are too many.
        """
        count = 0

        async def receive_bounded() -> Message:
            nonlocal count
            message = await receive()
            count += len(message.get("body", b""))
            if count > self.most:
                raise HTTPException(413, self.too_large)
            return message

        return receive_bounded


def name_of(host: str) -> str | None:
    """Return the name in a `Host` header, without its port; None for what is none."""
    try:
        parts = urlsplit(f"//{host}")
        _ = parts.port
    except ValueError:
        return None
    return parts.hostname if parts.netloc == host and "@" not in host else None


def origin_host(origin: str) -> str | None:
    """Return the name and port in an `Origin` header; None for what has none."""
    try:
        return urlsplit(origin).netloc.lower() or None
    except ValueError:
        return None


def is_address(name: str) -> bool:
    """Check whether a name is an address in numbers."""
    try:
        return bool(ip_address(name))
    except ValueError:
        return False


def with_headers(send: Send) -> Send:
    """Add HEADERS to every answer."""
    added = [(name.encode(), value.encode()) for name, value in HEADERS.items()]

    async def send_with_headers(message: Message) -> None:
        if message["type"] == "http.response.start":
            own = [(name, value) for name, value in message.get("headers", []) if name.decode().lower() not in HEADERS]
            message = {**message, "headers": [*own, *added]}
        await send(message)

    return send_with_headers
