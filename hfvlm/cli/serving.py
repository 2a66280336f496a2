"""`hfvlm serve`: a page and an API on this machine."""

from typing import Annotated, Any

import typer

from hfvlm.cli.console import note, status
from hfvlm.cli.options import Device, Dtype, Options, Quiet, checked_device, checked_dtype, processor_options


def serve(  # noqa: PLR0913 (options)
    folder: Annotated[
        str, typer.Argument(help="A folder that `hfvlm embed` wrote; or a model that embeds or chats, or its Hub id.")
    ],
    chat: Annotated[str | None, typer.Option(help="A model that chats, beside the folder's.")] = None,
    host: Annotated[
        str, typer.Option(help="The address to listen at; by default, only this machine reaches it.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535)] = 7860,
    name: Annotated[
        list[str] | None, typer.Option(help="A name by which others call this machine; may be repeated.")
    ] = None,
    upload_mib: Annotated[int, typer.Option(min=1, max=2048, help="Size of the largest request, in MiB.")] = 64,
    openai: Annotated[
        bool, typer.Option("--openai", help="Serve a model that chats by `transformers serve` instead.")
    ] = False,
    option: Options = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    quiet: Quiet = False,
) -> None:
    """Serve a page, and an API, to search, classify and chat with."""
    from hfvlm.serving.launch import OPEN, is_local, make_server
    from hfvlm.serving.openai import serve_openai

    address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    chosen: dict[str, Any] = {"device": checked_device(device), "dtype": checked_dtype(dtype)}
    if not is_local(host):
        note(f"warning: {OPEN.format(address=address)}")
    if openai:
        if chat or option or upload_mib != 64:
            raise typer.BadParameter("takes none of --chat, --option, --upload-mib.", param_hint="--openai")
        note(f"http://{address}/v1/chat/completions answers until Ctrl-C.")
        serve_openai(folder, host=host, port=port, names=name or (), **chosen)
        return
    with status(f"loading {folder}"):
        server = make_server(
            folder, host=host, port=port, names=name or (), upload_mib=upload_mib, chat=chat,
            options=processor_options(option), **chosen,
        )  # fmt: skip
    note(f"http://{address} serves {folder} until Ctrl-C; http://{address}/openapi.json describes the API.")
    server.run()
