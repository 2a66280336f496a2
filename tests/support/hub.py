"""A small Hub on this machine: what huggingface_hub asks for to make repositories, upload files and load them."""

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

COMMIT = "1" * 40
# Types of fields of a card, as the Hub checks them.
LISTS_OR_TEXTS = ("tags", "datasets", "language", "base_model", "license")
TEXTS = ("library_name", "pipeline_tag", "license_name", "license_link", "model_name")


@dataclass
class Hub:
    """Repositories by their names.

    Args:
        address: of the server.
        made: names of the repositories that were made.
        files: bytes by path, of each repository.
    """

    address: str = ""
    made: list[str] = field(default_factory=list)
    files: dict[str, dict[str, bytes]] = field(default_factory=dict)

    def settings(self, home: Path) -> dict[str, str]:
        """The environment of a process that is to talk to this Hub alone."""
        settings = {"HF_ENDPOINT": self.address, "HF_TOKEN": "hf_test", "HF_HUB_OFFLINE": "0", "HF_HOME": str(home)}
        return settings | {"HF_HUB_DISABLE_XET": "1", "no_proxy": "127.0.0.1"}


def problems_of(card: str) -> list[str]:
    """What is wrong with a card's metadata: its YAML, the types of fields, and names of repositories."""
    try:
        found = yaml.safe_load(card.split("---\n")[1]) if card.startswith("---\n") else {}
    except (yaml.YAMLError, IndexError) as error:
        return [f"no YAML: {error}"]
    problems = [f"{name} must be a text" for name in TEXTS if not isinstance(found.get(name, ""), str)]
    for name in LISTS_OR_TEXTS:
        values = found.get(name, [])
        values = values if isinstance(values, list) else [values]
        problems += [f"{name} must be texts" for value in values if not isinstance(value, str)]
        problems += [f"{name}: {value}" for value in values if name == "base_model" and not is_repository(value)]
    for model in found.get("model-index", []):
        problems += [f"model-index: {key} is missing" for key in ("name", "results") if key not in model]
        for result in model.get("results", []):
            ends = ({"task", "dataset", "metrics"} - set(result), {"type", "name"} - set(result.get("dataset", {})))
            problems += [f"a result has no {name}" for missing in ends for name in missing]
    return problems


def is_repository(name: Any) -> bool:
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


class Handler(BaseHTTPRequestHandler):
    """Answers one request."""

    hub: Hub

    def answer(self, content: Any, status: int = 200, **headers: str) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        kind = "application/octet-stream" if isinstance(content, bytes) else "application/json"
        self.send_response(status)
        for name, value in {"Content-Type": kind, "Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    @property
    def repository(self) -> str:
        """ "user/name" in /api/models/user/name/..."""
        return "/".join(self.path.partition("?")[0].split("/")[3:5])

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.path == "/api/repos/create":
            given = json.loads(body)
            name = f"{given.get('organization', 'me')}/{given['name']}"
            self.hub.made.append(name)
            self.answer({"url": f"{self.hub.address}/{name}", "id": name})
        elif self.path == "/api/validate-yaml":
            problems = [{"message": text} for text in problems_of(json.loads(body)["content"])]
            self.answer({"errors": problems, "warnings": []}, 400 if problems else 200)
        elif "/preupload/" in self.path:
            files = json.loads(body)["files"]
            modes = [{"path": file["path"], "uploadMode": "regular", "shouldIgnore": False} for file in files]
            self.answer({"files": modes})
        elif "/commit/" in self.path:
            lines = [json.loads(line) for line in body.splitlines() if line.strip()]
            sent = [line["value"] for line in lines if line["key"] == "file"]
            known = self.hub.files.setdefault(self.repository, {})
            known |= {value["path"]: base64.b64decode(value["content"]) for value in sent}
            address = f"{self.hub.address}/{self.repository}/commit/{COMMIT}"
            self.answer({"commitOid": COMMIT, "commitUrl": address, "success": True})
        else:
            self.answer({"error": f"not of this Hub: {self.path}"}, 404)

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if "/resolve/" in path:
            repository, _, rest = path[1:].partition("/resolve/")
            self.send(self.hub.files.get(repository, {}).get(rest.partition("/")[2]))
        elif path == "/api/whoami-v2":
            self.answer({"name": "me", "type": "user", "orgs": []})
        elif "/tree/" in path:
            found = self.hub.files.get(self.repository, {})
            folder = path.partition("/tree/")[2].partition("/")[2]
            rows = [entry(name, data) for name, data in found.items() if name.startswith(folder)]
            self.answer(rows) if rows else self.answer({"error": "none"}, 404, X_Error_Code="EntryNotFound")
        else:
            names = [{"rfilename": name} for name in self.hub.files.get(self.repository, {})]
            about = {"id": self.repository, "modelId": self.repository, "sha": COMMIT, "siblings": names, "tags": []}
            self.answer(about)

    def send(self, data: bytes | None) -> None:
        """Send a file, or that there is none."""
        if data is None:
            self.answer({"error": "Entry not found"}, 404, X_Error_Code="EntryNotFound")
        else:
            self.answer(data, ETag=f'"{hashlib.sha1(data).hexdigest()}"', X_Repo_Commit=COMMIT)

    def do_HEAD(self) -> None:
        self.do_GET()

    def log_message(self, *_: Any) -> None:
        pass


def entry(path: str, data: bytes) -> dict[str, Any]:
    return {"type": "file", "path": path, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}


@contextmanager
def loopback_hub() -> Iterator[Hub]:
    """A Hub for as long as the context lasts."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (Handler,), {"hub": hub}))
    hub.address = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
