"""Models that chat behind `transformers serve`, under OpenAI's protocol."""

import importlib
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hfvlm.checks.messages import shown
from hfvlm.checks.ranges import check_integer
from hfvlm.media.sources import import_extra
from hfvlm.serving.launch import HOST, PORT
from hfvlm.serving.loading import check_chats

SERVER = "transformers.cli.serving.server"
# Of its routes, others load models by name, and read recordings.
ROUTES = ("/v1/chat/completions", "/v1/responses", "/v1/models", "/health")
ADDRESSES = ("url", "image_url", "video_url", "audio_url", "file_url", "path")


def serve_openai(
    folder: str | Path, *, host: str = HOST, port: int = PORT, names: Collection[str] = (), **options: Any
) -> Any:
    """Serve a model that chats by `transformers serve`; it returns when the server ends.

    As the page's, the server answers to its own names and to no pages of other origins, and opens no path or URL of a
    request: images come as `data:` URLs.

    Args:
        folder: of the model.
        host: the address to listen at; by default only this machine reaches it.
        port: likewise.
        names: by which others call this machine.
        **options: others of `transformers serve`, as `device` and `dtype`.

    Raises:
        ImportError: what `transformers serve` needs is not installed.
        ValueError: the model does not chat.
    """
    check_integer("port", port, 1, 65535)
    check_chats(folder)
    for module in ("fastapi", "uvicorn", "openai"):
        import_extra(module, "openai", "`hfvlm serve --openai`")
    with guarded_servers({host, *names}):
        return importlib.import_module("transformers.cli.serve").Serve(str(folder), host=host, port=port, **options)


@contextmanager
def guarded_servers(names: Collection[str]) -> Iterator[None]:
    """Guard the application that `transformers serve` builds."""
    from hfvlm.serving.app import MOST_UPLOADED, problem
    from hfvlm.serving.guard import Guard

    try:
        server = importlib.import_module(SERVER)
    except ImportError as error:
        raise ImportError(f"`hfvlm serve --openai` needs {SERVER}: `pip install -U transformers`.") from error
    build: Callable[..., Any] = server.build_server

    def build_guarded(*args: Any, **kwargs: Any) -> Any:
        app = build(*args, **kwargs)
        app.middleware("http")(only_own_data)
        app.add_middleware(Guard, names=names, most=MOST_UPLOADED, refuse=problem)
        return app

    server.build_server = build_guarded  # type: ignore[attr-defined]
    try:
        yield
    finally:
        server.build_server = build  # type: ignore[attr-defined]


async def only_own_data(request: Any, answer: Callable[[Any], Any]) -> Any:
    """Refuse requests that name paths, URLs, other routes or other templates."""
    from hfvlm.serving.app import problem

    if request.url.path not in ROUTES:
        return problem(f"There is nothing at {shown(request.url.path)}; there are {', '.join(ROUTES)}.", 404)
    if request.method == "POST":
        try:
            body = await request.json()
        except (ValueError, RecursionError):
            return problem("The body is no JSON.", 400)
        if (address := next(foreign_addresses(body), None)) is not None:
            return problem(f"{shown(address)} is not opened: send the file in a data: URL, in base64.", 422)
        if isinstance(body, dict) and "chat_template_kwargs" in body:
            return problem("chat_template_kwargs: the server's own are used; leave it out.", 422)
    return await answer(request)


def foreign_addresses(content: Any) -> Iterator[str]:
    """Find the addresses in a request that are no `data:` URLs."""
    waiting = [content]
    while waiting:
        part = waiting.pop()
        if isinstance(part, list):
            waiting += part
        elif isinstance(part, dict):
            waiting += part.values()
            named = (part[name] for name in ADDRESSES if isinstance(part.get(name), str))
            yield from (address for address in named if not address.startswith("data:"))
