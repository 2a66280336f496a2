"""Every way to the Hub, against a small Hub on this machine."""

import base64
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from huggingface_hub import ModelCard

from tests.support.processes import run_fresh

ROADS = """
import sys
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModel, AutoProcessor, Trainer, TrainingArguments
import hfvlm

folder, out = sys.argv[1:]
model, processor = AutoModel.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
print(hfvlm.push(folder, "me/pushed"))
model.push_to_hub("me/model", commit_message="mine", tags=["digits"])
model.save_pretrained(out + "/saved", push_to_hub=True, repo_id="me/saved")
processor.push_to_hub("me/processor")
model.vision_model.push_to_hub("me/tower")
tuned = get_peft_model(model, LoraConfig(target_modules=["q_proj"]))
tuned.push_to_hub("me/adapter")
arguments = TrainingArguments(out + "/trained", use_cpu=True, report_to="none", hub_model_id="me/trained")
Trainer(tuned, arguments).push_to_hub()
whole = TrainingArguments(out + "/whole", use_cpu=True, report_to="none", push_to_hub=True, hub_model_id="me/whole")
Trainer(tuned.merge_and_unload(), whole, processing_class=processor).push_to_hub()
model.config.licence = "cc-by-nc-4.0"
for attempt in (
    lambda: model.push_to_hub("me/refused"),
    lambda: model.save_pretrained(out + "/refused", push_to_hub=True, repo_id="me/refused"),
    lambda: get_peft_model(model, LoraConfig(target_modules=["q_proj"])).push_to_hub("me/refused"),
):
    try:
        attempt()
    except hfvlm.presets.licences.LicenceError:
        print("refused")
model.push_to_hub("me/accepted", accept_licence=True)
"""


class Hub(BaseHTTPRequestHandler):
    """What huggingface_hub asks for to make a repository and to upload small files."""

    made: list[str] = []
    commits: dict[str, dict[str, bytes]] = {}

    def answer(self, content, status=200, **headers):
        body = json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", "Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        here = f"http://{self.headers['Host']}"
        if self.path == "/api/repos/create":
            given = json.loads(body)
            repo = f"{given.get('organization', 'me')}/{given['name']}"
            self.made.append(repo)
            self.answer({"url": f"{here}/{repo}", "id": repo})
        elif "/preupload/" in self.path:
            files = json.loads(body)["files"]
            modes = [{"path": file["path"], "uploadMode": "regular", "shouldIgnore": False} for file in files]
            self.answer({"files": modes})
        elif "/commit/" in self.path:
            repo = "/".join(self.path.split("/")[3:5])
            lines = [json.loads(line) for line in body.splitlines() if line.strip()]
            files = {line["value"]["path"]: line["value"] for line in lines if line["key"] == "file"}
            self.commits.setdefault(repo, {}).update(
                {path: base64.b64decode(value["content"]) for path, value in files.items()}
            )
            self.answer({"commitOid": "1" * 40, "commitUrl": f"{here}/{repo}/commit/{'1' * 40}", "success": True})
        else:
            self.answer({"errors": [], "warnings": []})

    def do_GET(self):
        if "/resolve/" in self.path:
            self.answer({"error": "Entry not found"}, 404, X_Error_Code="EntryNotFound")
        elif self.path.startswith("/api/whoami"):
            self.answer({"name": "me", "type": "user", "orgs": []})
        else:
            repo = "/".join(self.path.split("/")[3:5])
            self.answer({"id": repo, "modelId": repo, "sha": "0" * 40, "siblings": [], "tags": []})

    def do_HEAD(self):
        self.do_GET()

    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def hub(clip_folder, tmp_path_factory):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    out = tmp_path_factory.mktemp("roads")
    settings = {
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_TOKEN": "hf_test", "HF_HUB_OFFLINE": "0",
        "HF_HOME": str(out / "home"), "HF_HUB_DISABLE_XET": "1", "no_proxy": "127.0.0.1",
    }  # fmt: skip
    result = run_fresh(ROADS, clip_folder, out, check=False, **settings)
    server.shutdown()
    server.server_close()
    thread.join()
    assert result.returncode == 0, result.stderr[-3000:]
    return Hub, result.stdout


@pytest.mark.parametrize(
    ("repo", "library"),
    [
        ("me/pushed", "hfvlm"),
        ("me/model", "hfvlm"),
        ("me/saved", "hfvlm"),
        ("me/tower", "hfvlm"),
        ("me/adapter", "peft"),
        ("me/trained", "peft"),
        ("me/whole", "hfvlm"),
    ],
)
def test_the_cards(hub, repo, library, clip_folder):
    card = ModelCard(hub[0].commits[repo]["README.md"].decode())
    assert card.data.library_name == library
    assert card.data.license == "apache-2.0"
    assert {"hfvlm", "hfvlm_clip"} <= set(card.data.tags)
    assert "Trained by hfvlm on scikit-learn's digits" in card.text, "the licence's note"
    assert "More Information Needed" not in card.text
    assert str(clip_folder) not in card.content
    assert "clip-tiny\n" not in card.text
    if repo not in ("me/whole", "me/trained"):  # which transformers' Trainer heads with the name alone
        assert f"# {repo}\n" in card.text


@pytest.mark.parametrize(
    ("repo", "weights"),
    [
        ("me/pushed", "model.safetensors"),
        ("me/model", "model.safetensors"),
        ("me/saved", "model.safetensors"),
        ("me/tower", "model.safetensors"),
        ("me/adapter", "adapter_model.safetensors"),
        ("me/trained", "adapter_model.safetensors"),
        ("me/whole", "model.safetensors"),
    ],
)
def test_the_weights_arrive(hub, repo, weights):
    assert len(hub[0].commits[repo][weights]) > 1000


def test_tags_of_the_call_are_kept(hub):
    assert "digits" in ModelCard(hub[0].commits["me/model"]["README.md"].decode()).data.tags


def test_the_pushed_folder_is_the_converted_one(hub, clip_folder):
    sent = hub[0].commits["me/pushed"]
    assert set(sent) == {path.name for path in clip_folder.iterdir()}
    for name in ("model.safetensors", "config.json", "conversion.json", "tokenizer.json"):
        assert sent[name] == (clip_folder / name).read_bytes()
    assert f"/me/pushed/commit/{'1' * 40}" in hub[1]


def test_a_processor_is_no_model(hub):
    assert "processor_config.json" in hub[0].commits["me/processor"]


def test_a_refused_licence_makes_no_repository(hub):
    assert hub[1].count("refused") == 3
    assert "me/refused" not in hub[0].made
    assert "me/accepted" in hub[0].commits
