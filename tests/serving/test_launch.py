"""`hfvlm serve`, as it is started."""

import http.client
import socket
import sys
import threading
import time
from contextlib import contextmanager

import pytest
from typer.testing import CliRunner

from hfvlm.cli.commands import app
from hfvlm.serving import launch
from hfvlm.serving.openai import serve_openai


@contextmanager
def running(server):
    """Run a server on a thread; its port."""
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    end = time.monotonic() + 60
    while not server.started:
        assert thread.is_alive()
        assert time.monotonic() < end
        time.sleep(0.01)
    try:
        yield server.servers[0].sockets[0].getsockname()[1]
    finally:
        server.should_exit = True
        thread.join(timeout=60)


def test_a_server_answers_on_this_machine_alone(mixed_index, llava_folder):
    server = launch.make_server(mixed_index, chat=llava_folder, port=0, upload_mib=1)
    with running(server) as port:
        assert server.servers[0].sockets[0].getsockname()[0] == "127.0.0.1"
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        connection.request("GET", "/about")
        answer = connection.getresponse()
        assert (answer.status, answer.getheader("server")) == (200, None)
        assert b'"upload_bytes":1048576' in answer.read()
        connection.close()
        hangs_up(server, port)


def hangs_up(server, port):
    """A client that leaves in the middle of an answer ends it."""
    chats = server.config.app.state.served.chats
    chats.model.generation_config.min_new_tokens = 2000  # no end of its own comes first,
    chats.model.register_forward_pre_hook(lambda *_: time.sleep(0.02))  # and none by the text's greatest length
    with socket.create_connection(("127.0.0.1", port), timeout=60) as client:
        body = b"question=What%3F&max_new_tokens=2000"
        head = f"POST /chat HTTP/1.1\r\nhost: localhost:{port}\r\ncontent-type: application/x-www-form-urlencoded\r\n"
        client.sendall(head.encode() + b"content-length: %d\r\n\r\n" % len(body) + body)
        assert b"200 OK" in client.recv(4096)
        while b"piece" not in (received := client.recv(4096)):
            assert received
    end = time.monotonic() + 120
    while chats.busy and time.monotonic() < end:
        time.sleep(0.01)
    assert chats.busy == set()
    assert [chat.messages for chat in chats.chats.values()] == [[]]


def test_the_command(captioned_index, monkeypatch):
    ran = []
    monkeypatch.setattr("uvicorn.Server.run", lambda server: ran.append(server.config))

    def output(*arguments, code=0):
        result = CliRunner().invoke(app, ["serve", *map(str, arguments)], env={"COLUMNS": "200"})
        assert result.exit_code == code, result.output
        return result.output

    printed = output(captioned_index, "--port", 7999)
    assert "http://127.0.0.1:7999 serves" in printed
    assert "warning" not in printed
    printed = output(captioned_index, "--host", "0.0.0.0", "--name", "box", "--upload-mib", 2)
    assert "http://0.0.0.0:7860 can be reached from other machines" in printed
    assert "no password" in printed
    assert [config.host for config in ran] == ["127.0.0.1", "0.0.0.0"]
    assert ran[1].app.state.upload_bytes == 2 * 2**20
    assert "takes none of --chat" in output("llava", "--openai", "--chat", "llava", code=2)
    assert "65535" in output(captioned_index, "--port", 65536, code=2)


def test_what_is_missing_is_named(mixed_index, llava_folder, monkeypatch):
    for module, function, folder in (
        ("python_multipart", launch.make_server, mixed_index),
        ("uvicorn", launch.make_server, mixed_index),
        ("openai", serve_openai, llava_folder),
    ):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, module, None)
            with pytest.raises(ImportError, match=rf"needs {module}: `pip install 'hfvlm\[(serve|openai)\]'`"):
                function(folder)
    with pytest.raises(ValueError, match="upload_mib must be an integer from 1 to 2048"):
        launch.make_server(mixed_index, upload_mib=0)


@pytest.mark.parametrize(
    ("host", "local"),
    [("127.0.0.1", True), ("localhost", True), ("::1", True), ("0.0.0.0", False), ("::", False), ("box", False)],
)
def test_local_hosts(host, local):
    assert launch.is_local(host) == local
