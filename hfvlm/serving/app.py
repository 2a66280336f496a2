"""The application: routes of the page and of the API."""

import json
import logging
from collections import Counter
from collections.abc import Callable, Collection
from difflib import get_close_matches
from importlib.resources import files
from io import BytesIO
from typing import Annotated, Any

from fastapi import APIRouter, Depends, FastAPI, Form, Path, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.types import Receive, Scope, Send

from hfvlm.checks.messages import cut, listed, shown
from hfvlm.inference.pages import drawn
from hfvlm.inference.templates import SETS
from hfvlm.media import urls
from hfvlm.serving import forms
from hfvlm.serving.conversations import Pieces
from hfvlm.serving.errors import RequestError
from hfvlm.serving.guard import Guard
from hfvlm.serving.served import Served, is_drawn
from hfvlm.versions import __version__

logger = logging.getLogger(__name__)
MOST_UPLOADED = urls.MAX_BYTES
FORMS: dict[str, type[forms.Form]] = {
    "/embed": forms.Sources,
    "/search": forms.Search,
    "/classify": forms.Classify,
    "/chat": forms.Question,
}
REPEATED = ("text", "image", "video", "audio", "depth", "thermal", "imu", "label")
FORM_TYPES = ("multipart/form-data", "application/x-www-form-urlencoded")
PAGE = {
    "/": ("index.html", "text/html; charset=utf-8"),
    "/style.css": ("style.css", "text/css; charset=utf-8"),
    "/script.js": ("script.js", "text/javascript; charset=utf-8"),
}
LINES = {"content": {"application/x-ndjson": {"schema": {"type": "string"}}}}
REFUSALS = {
    400: "The form is damaged.",
    403: "A page of another origin sent the request.",
    413: "The request is too large.",
    415: "The body is no form.",
    421: "The server has another name.",
    422: "A field, a file or a value cannot be used; the message names it.",
    501: "A decoder is not installed.",
}
FOUND = {
    "image/*": {"schema": {"type": "string", "format": "binary"}},
    "audio/*": {"schema": {"type": "string", "format": "binary"}},
    "video/*": {"schema": {"type": "string", "format": "binary"}},
}


def served_by(request: Request) -> Served:
    """Return what the application serves."""
    return request.app.state.served


async def whole(request: Request) -> None:
    """Refuse what would be left out: query parameters, fields given twice, bodies that are no form.

    Raises:
        RequestError: there is one.
    """
    path = request.url.path
    if request.query_params:
        name = shown(next(iter(request.query_params)))
        where = "send it as a field of the form" if path in FORMS else "leave it out"
        raise RequestError(f"{name}: {path} takes no query parameter; {where}.")
    if path not in FORMS:
        return
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind not in FORM_TYPES:
        raise RequestError(
            f"A form is needed, {FORM_TYPES[0]}, not {shown(kind)}: curl -F text='a cat' ...{path}", 415
        )
    counts = Counter(name for name, _ in (await request.form()).multi_items())
    if twice := [name for name, count in counts.items() if count > 1 and name not in REPEATED]:
        raise RequestError(f"{shown(twice[0])} is given {counts[twice[0]]} times; give it once.")


def refusals(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Describe the refusals of a route, for the description of the API."""
    more = {404: "It is not served.", 409: "The conversation is busy.", 503: "All conversations are busy."}
    known = REFUSALS | {status: more[status] for status in statuses}
    return {status: {"model": forms.Problem, "description": text} for status, text in sorted(known.items())}


Serves = Annotated[Served, Depends(served_by)]
Modality = Annotated[str, Path(description="Of the rows.")]
Row = Annotated[int, Path(ge=0, description="The row's number.")]
router = APIRouter(dependencies=[Depends(whole)])


@router.get("/about", responses=refusals())
def about(request: Request, served: Serves) -> forms.About:
    """Describe what is served."""
    limits = {"upload_bytes": request.app.state.upload_bytes, "templates": list(SETS), "version": __version__}
    return forms.About(**served.about(), **limits)


@router.post("/embed", responses=refusals(404))
def embed(served: Serves, form: Annotated[forms.Sources, Form()]) -> forms.Vectors:
    """Embed texts and files."""
    return forms.Vectors(vectors=served.embed(form.read()))


@router.post("/search", responses=refusals(404))
def search(served: Serves, form: Annotated[forms.Search, Form()]) -> forms.Hits:
    """Search the index by texts and files, whose vectors are added."""
    return forms.Hits(**served.search(form.read(), form.among, form.k))


@router.post("/classify", responses=refusals(404))
def classify(served: Serves, form: Annotated[forms.Classify, Form()]) -> forms.Classes:
    """Classify one text or file by the names of classes."""
    return forms.Classes(**served.classify(form.read(), form.label, form.templates, form.top_k))


@router.post("/chat", responses=refusals(404, 409, 503) | {200: LINES}, response_class=StreamingResponse)
def chat(served: Serves, form: Annotated[forms.Question, Form()]) -> StreamingResponse:
    """Answer a question, as lines of JSON: {"conversation": name}, {"piece": text} again and again, {"answer": text};
    or {"error": message}."""
    chats = served.needed_chats()
    pieces = chats.answer(form.conversation, form.question, form.media(), form.options())
    return Answer(pieces)


@router.get(
    "/thumbnail/{modality}/{row}",
    responses=refusals(404) | {200: {"content": {"image/jpeg": FOUND["image/*"]}}},
    response_class=Response,
)
def thumbnail(served: Serves, modality: Modality, row: Row) -> Response:
    """Draw a small image of a row of the index."""
    path = served.row_file(modality, row)
    with served.decoding:
        image = drawn(modality, str(path)) if is_drawn(modality, path) else None
    if image is None:
        raise RequestError(f"Row {row} of {modality} cannot be drawn.", 404)
    file = BytesIO()
    image.save(file, "JPEG", quality=85)
    return Response(file.getvalue(), media_type="image/jpeg")


@router.get(
    "/media/{modality}/{row}", responses=refusals(404) | {200: {"content": FOUND}}, response_class=FileResponse
)
def media(served: Serves, modality: Modality, row: Row) -> FileResponse:
    """Return the image, audio or video file of a row of the index."""
    path, kind = served.media(modality, row)
    return FileResponse(path, media_type=kind)


class Answer(StreamingResponse):
    """A streamed answer, a line a piece, which ends when its client has left: Starlette leaves that to Python's
    collector."""

    def __init__(self, pieces: Pieces):
        super().__init__((json.dumps(piece) + "\n" for piece in pieces), media_type="application/x-ndjson")
        self.pieces = pieces

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.pieces.close()


def make_app(served: Served, *, names: Collection[str] = (), upload_bytes: int = MOST_UPLOADED) -> FastAPI:
    """Make the application.

    Args:
        served: what it answers from, of `hfvlm.serving.loading.load`.
        names: of this machine by which the server may be called, next to localhost and addresses in numbers.
        upload_bytes: size of the largest request.
    """
    app = FastAPI(
        title="hfvlm",
        version=__version__,
        description="Search, classification and chat by a vision-language model. Requests are forms, answers JSON.",
        docs_url=None,
        redoc_url=None,
    )
    app.state.served, app.state.upload_bytes = served, upload_bytes
    app.include_router(router)
    for path, (name, kind) in PAGE.items():
        content = (files("hfvlm.serving") / "page" / name).read_bytes()
        app.get(path, include_in_schema=False)(static(content, kind))
    app.add_exception_handler(RequestError, refused)
    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(StarletteHTTPException, failed)
    app.add_exception_handler(Exception, broken)
    app.add_middleware(Guard, names=names, most=upload_bytes, refuse=problem)
    return app


def static(content: bytes, kind: str) -> Callable[[], Response]:
    """Return the route of a file of the page."""

    def page() -> Response:
        return Response(content, media_type=kind)

    return page


def problem(message: str, status: int) -> JSONResponse:
    """Return the answer to a request that is refused."""
    return JSONResponse({"error": message}, status)


async def refused(_: Request, error: Any) -> JSONResponse:
    """Answer a request that is refused."""
    return problem(str(error), error.status)


async def failed(request: Request, error: Any) -> JSONResponse:
    """Answer a request that FastAPI refuses."""
    message = str(error.detail)
    if error.status_code == 404:
        message = f"There is nothing at {shown(request.url.path)}; /openapi.json describes what there is."
    return problem(message, error.status_code)


async def broken(_: Request, error: Any) -> JSONResponse:
    """Answer a request that met a fault of the server."""
    logger.error("A request failed.", exc_info=error)
    return problem("The request failed: the server's log says why.", 500)


async def invalid(request: Request, error: Any) -> JSONResponse:
    """Answer a request with fields that cannot be used."""
    form = FORMS.get(request.url.path)
    known = list(form.model_fields) if form else []
    return problem(cut(" ".join(described(each, known) for each in error.errors()[:5])), 422)


def described(error: dict[str, Any], known: list[str]) -> str:
    """Describe what is wrong with a field."""
    name = str(error["loc"][1]) if len(error["loc"]) > 1 else ""
    given = "a file" if hasattr(error.get("input"), "filename") else shown(error.get("input"))
    if error["type"] == "extra_forbidden":
        nearest = get_close_matches(name, known, 1, cutoff=0.0)
        return f"{shown(name)} is no field; the nearest is {nearest[0]!r}. There are {listed(known, 20)}."
    if error["type"] == "missing":
        return f"{name} is needed." if name else f"Nothing was sent: give {listed(known, 20)}."
    if "UploadFile" in error["msg"]:
        return f"{name}: a file is needed, sent as one (curl -F {name}=@FILE), not {given}."
    return f"{name}: {error['msg'].removeprefix('Value error, ')}, not {given}."
