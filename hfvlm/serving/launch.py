"""Starting the server."""

from collections.abc import Collection, Mapping
from ipaddress import ip_address
from pathlib import Path
from typing import Any

from hfvlm.checks.ranges import check_integer
from hfvlm.media.sources import import_extra

HOST, PORT = "127.0.0.1", 7860
# Requests that are answered or wait; more are refused with 503.
MOST_REQUESTS = 64
MEBIBYTE = 2**20
OPEN = (
    "http://{address} can be reached from other machines: whoever reaches it may use the model, and sees the files "
    "of the index and their names. There is no password and no encryption; put a proxy with both in front of it."
)


def is_local(host: str) -> bool:
    """Check whether only this machine reaches a host."""
    try:
        return host == "localhost" or ip_address(host).is_loopback
    except ValueError:
        return False


def make_server(
    folder: str | Path,
    *,
    host: str = HOST,
    port: int = PORT,
    names: Collection[str] = (),
    upload_mib: int = 64,
    chat: str | Path | None = None,
    options: Mapping[str, Mapping[str, Any]] | None = None,
    **chosen: Any,
) -> Any:
    """Make a `uvicorn.Server` of the page and the API, which `run()` starts.

    Args:
        folder: of `hfvlm embed`, or a model's.
        host: the address to listen at; by default only this machine reaches it.
        port: likewise.
        names: by which others call this machine, where `host` is not local.
        upload_mib: size of the largest request.
        chat: a model that chats, beside the folder's.
        options: of the processor, by modality.
        **chosen: `device` and `dtype`.

    Raises:
        ImportError: FastAPI, uvicorn or python-multipart is not installed.
        ValueError: the folder holds nothing that can be served, or a number is out of its range.
    """
    check_integer("port", port, 0, 65535)
    limit = check_integer("upload_mib", upload_mib, 1, 2048) * MEBIBYTE
    for module in ("fastapi", "python_multipart"):
        import_extra(module, "serve", "`hfvlm serve`")
    uvicorn = import_extra("uvicorn", "serve", "`hfvlm serve`")
    from hfvlm.serving.app import make_app
    from hfvlm.serving.loading import load

    served = load(folder, chat=chat, options=options, **chosen)
    app = make_app(served, names={host, *names}, upload_bytes=limit)
    config = uvicorn.Config(
        app, host=host, port=port, log_level="warning", limit_concurrency=MOST_REQUESTS, server_header=False
    )
    return uvicorn.Server(config)
