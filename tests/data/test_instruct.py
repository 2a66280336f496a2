"""Instructions, written by a small chat model that learned one answer, and by an endpoint on this machine."""

import json
import re

import pytest
import torch
from typer.testing import CliRunner

from hfvlm.cli.commands import app
from hfvlm.data.instruct import instruct
from hfvlm.data.writers import ChatModel
from hfvlm.samples.scenes import all_scenes
from hfvlm.training.chat import read_example, read_examples
from tests.data.test_endpoint import KEY, answer, server

__all__ = ["server"]  # a fixture

ANSWER = "Q: What is there ?\nA: A small red circle ."
TEMPLATE = (
    "{% for each in messages %}<{{ each['role'] }}>{{ each['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<say>{% endif %}"
)


@pytest.fixture(scope="module")
def chat_folder(tmp_path_factory):
    """A chat model of one layer that learned, by 60 steps, to give one answer to everything."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    words = ["<pad>", "</s>", "<unk>", "<say>", "\n", *dict.fromkeys(ANSWER.replace("\n", " ").split(" "))]
    engine = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    engine.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split("\n", "isolated"), pre_tokenizers.Split(" ", "removed")]
    )
    special = {"eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>", "additional_special_tokens": ["<say>"]}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=engine, chat_template=TEMPLATE, **special)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=len(words), eos_token_id=1, pad_token_id=0, bos_token_id=None, **sizes)
    )
    wanted = [3, *engine.encode(ANSWER).ids, 1]
    prompt = torch.tensor([[2] * n + wanted for n in [20] * 8])
    labels = prompt.clone()
    labels[:, :21] = -100
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
    for _ in range(60):
        positions = torch.randint(0, 300, (1, 1)) + torch.arange(prompt.shape[1])
        model(input_ids=prompt, labels=labels, position_ids=positions.expand(len(prompt), -1)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    folder = tmp_path_factory.mktemp("chat") / "chat"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """Images of 64 x 32 pixels with captions and boxes, as JSON lines."""
    folder = tmp_path_factory.mktemp("described")
    with (folder / "rows.jsonl").open("w") as lines:
        for i, scene in enumerate(all_scenes()[:5]):
            scene.render().resize((64, 32)).save(folder / f"{i}.png")
            boxes = [{"label": scene.shape, "box": [16, 0, 48, 32]}]
            lines.write(json.dumps({"image": f"{i}.png", "text": [scene.caption()], "boxes": boxes}) + "\n")
    return folder / "rows.jsonl"


def test_a_local_chat_model_writes(chat_folder, rows, tmp_path, written):
    writer = ChatModel(chat_folder, device="cpu", generate={"do_sample": False, "max_new_tokens": 24})
    report = instruct(rows, tmp_path / "out", writer, kinds=["conversation", "reasoning"], boxes="boxes", shard_rows=2)
    found = written(tmp_path / "out")
    assert (report.rows, report.written, report.dropped) == (10, 10, {})
    pair = [("user", "What is there ?"), ("assistant", "A small red circle .")]
    for row in found:
        assert [(each["role"], each["content"]) for each in row["messages"]] == pair
        assert row["origin"]["given"].endswith(": [0.250, 0.000, 0.750, 1.000]")
        assert row["origin"]["writer"] == str(chat_folder)
    examples = read_examples(tmp_path / "out" / "instruct.jsonl")
    messages, images = read_example(examples[0], "<image>")
    assert images == [str(rows.parent / "0.png")]
    assert messages[-1]["content"] == "A small red circle ."
    short = ChatModel(chat_folder, device="cpu", generate={"do_sample": False, "max_new_tokens": 3})
    report = instruct(rows, tmp_path / "short", short, kinds=["conversation"])
    assert set(report.dropped) == {"cut"}


def scripted(body):
    """What the server answers: by the kind that is asked for."""
    asked = body["messages"][-1]["content"]
    if "Combine them" in asked:
        return answer("A dog runs after a ball.")
    if "one paragraph" in asked:
        return answer("The caption says there is a circle." if "red" in asked else "There is a coloured shape.")
    scene = asked.splitlines()[0].removeprefix("The notes: ")
    if "several steps" in asked:
        return answer("Well, let me think.")
    return answer(f"Q: What is there?\nA: There is {scene}.\nQ: Is it dark?\nA: Yes, behind it.")


def test_an_endpoint_writes_every_kind_and_what_is_wrong_is_dropped(server, rows, tmp_path, monkeypatch, written):
    server.answers = [scripted]
    monkeypatch.setenv("MY_KEY", KEY)
    command = ["data", "instruct", str(rows), "-o", str(tmp_path / "out"), "--model", "m", "--endpoint", server.url]
    result = CliRunner().invoke(app, [*command, "--key-variable", "MY_KEY", "--boxes", "boxes", "--json"])
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert (report["rows"], report["dropped"]) == (15, {"format": 5, "mentions-source": 5})
    found = written(tmp_path / "out")
    assert [row["kind"] for row in found] == ["conversation"] * 5
    assert found[2]["messages"][1]["content"] == f"There is {all_scenes()[2].caption()}."
    assert found[0]["id"] != found[1]["id"]
    assert len(server.requests) == 15
    for path in (tmp_path / "out").rglob("*"):
        assert KEY.encode() not in path.read_bytes()
    CliRunner().invoke(app, [*command, "--key-variable", "MY_KEY", "--boxes", "boxes"])
    assert len(server.requests) == 15  # nothing is asked again


def test_a_run_that_stops_asks_only_for_the_rest(server, rows, tmp_path, written):
    calls = []

    def broken(body):
        calls.append(1)
        return (400, {}, b"out of credit") if len(calls) == 7 else scripted(body)

    server.answers = [broken]
    command = ["data", "instruct", str(rows), "-o", str(tmp_path / "out"), "--model", "m", "--endpoint", server.url]
    command += ["--kind", "conversation", "--kind", "description", "--shard-rows", "2"]
    result = CliRunner().invoke(app, command)
    assert isinstance(result.exception, OSError)
    assert "out of credit" in str(result.exception)
    assert CliRunner().invoke(app, command).exit_code == 0
    assert len(calls) == 7 + 6  # the first two rows are not asked for again
    assert len(written(tmp_path / "out")) == 5


def test_videos_are_written_about_from_their_key_frames(server, jsonl, tmp_path, written):
    server.answers = [scripted]
    frames = [{"caption": "a dog on grass", "regions": ["a red ball"], "tags": ["dog", "ball"]}]
    rows = jsonl([{"video": "/clips/1.mp4", "frames": frames}, {"video": "/clips/2.mp4", "frames": []}])
    command = ["data", "instruct", str(rows), "-o", str(tmp_path / "out"), "--model", "m", "--endpoint", server.url]
    result = CliRunner().invoke(app, [*command, "--frames", "frames", "--kind", "video-summary", "--json"])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["dropped"] == {"unreadable": 1}
    (row,) = written(tmp_path / "out")
    assert row["video"] == "/clips/1.mp4"
    assert row["origin"]["given"] == "The notes: A dog runs after a ball."
    assert "1. a dog on grass; a red ball" in server.requests[0][2]["messages"][-1]["content"]


def test_images_within_the_data_are_written_to_files(server, tmp_path):
    import io

    from pyarrow import Table, parquet

    server.answers = [scripted]
    file = io.BytesIO()
    all_scenes()[0].render().save(file, "PNG")
    row = {"image": {"bytes": file.getvalue(), "path": "a.png"}, "text": "a red thing"}
    parquet.write_table(Table.from_pylist([row]), tmp_path / "rows.parquet")
    command = ["data", "instruct", str(tmp_path / "rows.parquet"), "-o", str(tmp_path / "out"), "--model", "m"]
    result = CliRunner().invoke(app, [*command, "--endpoint", server.url, "--kind", "conversation"])
    assert result.exit_code == 0, result.output
    (example,) = read_examples(tmp_path / "out" / "instruct.jsonl")
    assert re.fullmatch(r".*/media/train-00000-0\.png", example["image"][0])
    with open(example["image"][0], "rb") as written_file:
        assert written_file.read() == file.getvalue()


def test_wrong_arguments_are_refused(rows, tmp_path, clip_folder):
    def writer(messages, seed):
        raise AssertionError

    for kinds, message in (
        (["poem"], "kind 'poem' is none of conversation"),
        (["reasoning", "video-summary"], "or of videos"),
    ):
        with pytest.raises(ValueError, match=message):
            instruct(rows, tmp_path / "out", writer, kinds=kinds)
    with pytest.raises(ValueError, match="frames: .* has no column notes"):
        instruct(rows, tmp_path / "out", writer, frames="notes")
    result = CliRunner().invoke(
        app, ["data", "instruct", str(rows), "-o", str(tmp_path / "o"), "--model", "m", "--key-variable", "KEY"]
    )
    assert result.exit_code == 2
