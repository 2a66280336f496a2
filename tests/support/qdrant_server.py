"""A Qdrant server for tests: the requests of the client over HTTP, answered by the client's own local mode."""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit


class Server(ThreadingHTTPServer):
    """A server with collections in memory; `asked` lists the requests, with their keys."""

    def __init__(self) -> None:
        from qdrant_client import QdrantClient

        super().__init__(("127.0.0.1", 0), Handler)
        self.client, self.lock, self.asked = QdrantClient(":memory:"), threading.Lock(), []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        path = urlsplit(self.path).path
        with self.server.lock:
            self.server.asked.append((self.command, path, self.headers.get("api-key")))
            content = result(self.server.client, self.command, path, body)
        data = json.dumps(content).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    do_GET = do_PUT = do_POST = answer  # noqa: N815 (the base's names)

    def log_message(self, *_: Any) -> None:
        pass


def result(client: Any, command: str, path: str, body: bytes) -> Any:
    if path == "/":
        return {"title": "qdrant - vector search engine", "version": "1.20.0"}
    _, _, name, *rest = path.split("/")
    found = ANSWERS[command, *rest](client, name, body)
    content = json.loads(found.model_dump_json()) if hasattr(found, "model_dump_json") else found
    return {"result": content, "status": "ok", "time": 0.0}


def create(client: Any, name: str, body: bytes) -> Any:
    from qdrant_client import models

    return client.create_collection(name, models.CreateCollection.model_validate_json(body).vectors)


def upsert(client: Any, name: str, body: bytes) -> Any:
    from qdrant_client import models

    return client.upsert(name, models.PointsList.model_validate_json(body).points)


def scroll(client: Any, name: str, body: bytes) -> Any:
    from qdrant_client import models

    asked = models.ScrollRequest.model_validate_json(body)
    points, offset = client.scroll(name, limit=asked.limit, offset=asked.offset, with_vectors=asked.with_vector)
    return models.ScrollResult(points=points, next_page_offset=offset)


def query(client: Any, name: str, body: bytes) -> Any:
    from qdrant_client import models

    asked = models.QueryRequest.model_validate_json(body)
    assert asked.params is not None
    assert asked.params.exact
    return client.query_points(name, asked.query, asked.using, limit=asked.limit, with_vectors=asked.with_vector)


ANSWERS: dict[tuple[str, ...], Any] = {
    ("GET", "exists"): lambda client, name, _: {"exists": client.collection_exists(name)},
    ("GET",): lambda client, name, _: client.get_collection(name),
    ("PUT",): create,
    ("PUT", "points"): upsert,
    ("POST", "points", "count"): lambda client, name, _: client.count(name, exact=True),
    ("POST", "points", "scroll"): scroll,
    ("POST", "points", "query"): query,
}


@contextmanager
def qdrant_server() -> Iterator[Server]:
    """Run a server in a thread, for the block."""
    server = Server()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
