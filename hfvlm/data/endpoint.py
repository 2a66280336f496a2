"""A small client of OpenAI-compatible endpoints (`POST <base>/chat/completions`)."""

import http.client
import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import urlsplit

from hfvlm.checks.messages import cut, shown
from hfvlm.checks.ranges import check_integer, check_number

# Answers of a server that may be otherwise a moment later.
TRANSIENT = (408, 409, 425, 429, 500, 502, 503, 504, 529)
LONGEST_WAIT = 60.0
LARGEST_ANSWER = 2**24
LOOPBACK = ("localhost", "127.0.0.1", "::1")


class EndpointError(OSError):
    """An endpoint that does not answer, or not as such endpoints do; the message never holds the key."""


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """Refuses redirects, which would carry the key elsewhere."""

    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> None:
        return None


class Endpoint:
    """Chat completions of a server that the user names.

    Args:
        url: up to the version, as "https://api.example.com/v1".
        model: the server's name of it.
        key_variable: the environment's variable that holds the key; None for servers that need none.
        options: further fields of each request, as {"temperature": 0.7}.
        timeout: seconds for one answer.
        tries: of each request; between two, a pause that doubles, or as long as the server asks for.
        pause: the first, in seconds.

    Raises:
        ValueError: the address is none of http or https, holds a password, or the key would travel unencrypted; there
            is no such variable; or a number is out of its range.
    """

    def __init__(
        self,
        url: str,
        model: str,
        *,
        key_variable: str | None = None,
        options: Mapping[str, Any] | None = None,
        timeout: float = 120.0,
        tries: int = 6,
        pause: float = 1.0,
    ):
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.username or parts.query:
            raise ValueError(f"endpoint {shown(url)}: write https://HOST/v1, without a password or a query.")
        self.url, self.model, self.options = url.rstrip("/"), model, dict(options or {})
        self.timeout = check_number("timeout", timeout, 0, open_low=True)
        self.tries, self.pause = check_integer("tries", tries), check_number("pause", pause, 0)
        self._key = None
        if key_variable is not None:
            self._key = os.environ.get(key_variable)
            if not self._key:
                raise ValueError(f"The environment has no variable {key_variable} with the endpoint's key: export it.")
            if parts.scheme == "http" and parts.hostname not in LOOPBACK:
                raise ValueError(f"endpoint {shown(url)}: the key would travel unencrypted; use https.")
        self._opener = urllib.request.build_opener(_NoRedirects)

    @property
    def settings(self) -> dict[str, Any]:
        """What answers depend on; the key is not among it."""
        return {"endpoint": self.url, "model": self.model, "options": self.options}

    def __call__(self, messages: Sequence[Mapping[str, str]], seed: int) -> tuple[str, bool]:
        """Return the model's answer, and whether it is complete.

        Raises:
            EndpointError: the server cannot be reached, refuses, or answers otherwise than such servers do.
        """
        body = {"model": self.model, "messages": list(messages), "seed": seed} | self.options
        content = self.sent(json.dumps(body).encode())
        try:
            choice = json.loads(content)["choices"][0]
            text, reason = choice["message"]["content"], choice.get("finish_reason")
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise EndpointError(f"{self.url}: no answer of a chat completion ({self.safe(content)}).") from error
        return text or "", reason != "length"

    def sent(self, body: bytes) -> bytes:
        """Send a request, again where the server may answer later, and return the answer."""
        for left in reversed(range(self.tries)):
            try:
                return self.once(body)
            except urllib.error.HTTPError as error:
                reason = f"HTTP {error.code}, {self.safe(error.read(1000))}"
                wait = error.headers.get("Retry-After", "")
                if error.code not in TRANSIENT:
                    raise EndpointError(f"{self.url}: {reason}") from None
            except (OSError, http.client.HTTPException) as error:
                reason, wait = self.safe(str(error)), ""
            if left:
                pause = self.pause * 2 ** (self.tries - 1 - left)
                time.sleep(min(float(wait) if wait.isdigit() else pause, LONGEST_WAIT))
        raise EndpointError(
            f"{self.url}: no answer in {self.tries} tries: {reason}. The run continues when started again."
        )

    def once(self, body: bytes) -> bytes:
        """Send a request once."""
        headers = {"Content-Type": "application/json", "User-Agent": "hfvlm"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        request = urllib.request.Request(f"{self.url}/chat/completions", body, headers)
        with self._opener.open(request, timeout=self.timeout) as answer:
            content = answer.read(LARGEST_ANSWER + 1)
        if len(content) > LARGEST_ANSWER:
            raise OSError(f"an answer of more than {LARGEST_ANSWER // 2**20} MiB")
        return content

    def safe(self, text: str | bytes) -> str:
        """Return the beginning of foreign text for a message, without the key, which a server may repeat."""
        plain = text.decode("utf-8", "replace") if isinstance(text, bytes) else text
        return cut(plain.replace(self._key, "***") if self._key else plain, 300)
