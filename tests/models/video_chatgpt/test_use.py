"""Video-ChatGPT from its authors' files to answers about films."""

import io
import shutil
from contextlib import redirect_stdout

import av
import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, Trainer, TrainingArguments, pipeline
from typer.testing import CliRunner

import hfvlm
from hfvlm.checkpoints.key_table import KeyTableError, restore_keys
from hfvlm.cli.commands import app
from hfvlm.conversion.clip import transformers_vision_rows
from hfvlm.conversion.language_models import llama_rows
from hfvlm.conversion.llava import EMBEDDING, HEAD, linear_rows
from hfvlm.models.video_chatgpt import HfvlmVideoChatGPTConfig, HfvlmVideoChatGPTForConditionalGeneration
from hfvlm.training.chat import ChatCollator
from tests.models.llava.tiny import TEXT, VISION, vision_settings, write
from tests.support.paths import OURS
from tests.support.suite import close

VOCABULARY = OURS / "video_chatgpt" / "e2e" / "tokenizer.model"
FIRST = 423  # id of the first token that is added
FRAMES = 4


def tiny_model():
    torch.manual_seed(3)
    text = TEXT | {"vocab_size": FIRST + 3}
    config = HfvlmVideoChatGPTConfig(vision_config=VISION, text_config=text, video_token_id=FIRST)
    model = HfvlmVideoChatGPTForConditionalGeneration(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # norms too, so that a forgotten one shows
            parameter.add_(torch.randn_like(parameter) * 0.05)
        head = model.language_model.lm_head.weight
        head[FIRST:] = head[:FIRST].mean(dim=0)
    return model


def released(model, folder):
    """The release, and the folders that it is put on."""
    ours = model.state_dict()

    def part(start, rows):
        return restore_keys({k: t for k, t in ours.items() if k.startswith(start)}, rows)

    language = part("language_model.", llama_rows())
    trained = part("projector.", linear_rows(1)) | {EMBEDDING: language[EMBEDDING]}
    base = language | {name: language[name][:FIRST] for name in (EMBEDDING, HEAD)}
    base |= {f"model.mm_projector.{name}": torch.randn(2) for name in ("weight", "bias")}
    vision = part("vision_model.", transformers_vision_rows("vision_model", "vision_model"))
    sizes = {name: getattr(model.config.text_config, name) for name in TEXT if name != "model_type"}
    settings = sizes | {"vocab_size": FIRST, "rms_norm_eps": 1e-6, "model_type": "llava"}
    paths = {
        "vision": write(folder / "clip", "model.safetensors", vision, vision_settings(model)),
        "base": write(folder / "lightning", "pytorch_model.bin", base, settings),
    }
    shutil.copy(VOCABULARY, paths["base"])
    source = write(folder / "release", "video_chatgpt-7B.bin", trained) / "video_chatgpt-7B.bin"
    return source, paths, base, settings


@pytest.fixture(scope="module")
def release(tmp_path_factory):
    return released(tiny_model(), tmp_path_factory.mktemp("release"))


@pytest.fixture(scope="module")
def folder(release, tmp_path_factory):
    source, paths, _, _ = release
    return hfvlm.convert(source, "video_chatgpt", tmp_path_factory.mktemp("converted") / "model", parts=paths)


@pytest.fixture
def model(folder):
    return AutoModelForImageTextToText.from_pretrained(folder).eval()


@pytest.fixture
def processor(folder):
    return AutoProcessor.from_pretrained(folder)


@pytest.fixture
def chat(model, processor):
    return hfvlm.Chat(model, processor, max_new_tokens=6)


def film(seed=0, frames=FRAMES, size=(24, 40)):
    return np.random.RandomState(seed).randint(0, 256, (frames, *size, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    path = tmp_path_factory.mktemp("films") / "clip.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264rgb", rate=8, options={"crf": "0"})
        stream.height, stream.width, stream.pix_fmt = 24, 40, "rgb24"
        for frame in film(7, frames=6):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    return path


# Conversion


def same_weights(folder):
    loaded, info = AutoModelForImageTextToText.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    expected = tiny_model().state_dict()
    assert loaded.state_dict().keys() == expected.keys()
    for name, value in loaded.state_dict().items():
        close(value, expected[name], 1e-6, name)


def test_a_projector_on_its_base(folder):
    same_weights(folder)


def test_a_projector_on_a_difference(release, tmp_path):
    """LLaVA-Lightning as it was released: its difference to LLaMA, which has fewer tokens and no projector."""
    source, paths, base, settings = release
    llama = {k: torch.randn_like(t) for k, t in base.items() if "mm_projector" not in k}
    llama |= {name: llama[name][:420] for name in (EMBEDDING, HEAD)}
    delta = {}
    for key, tensor in base.items():
        delta[key] = tensor.clone()
        if key in llama:
            delta[key][: len(llama[key])] -= llama[key]
    parts = {
        "vision": paths["vision"],
        "base": write(tmp_path / "llama", "pytorch_model.bin", llama, settings | {"vocab_size": 420}),
        "delta": write(tmp_path / "delta", "pytorch_model.bin", delta, settings),
    }
    same_weights(hfvlm.convert(source, "video_chatgpt", tmp_path / "out", parts=parts, vocabulary=VOCABULARY))


def test_a_model_trained_in_whole(release, tmp_path):
    _, paths, _, settings = release
    model = tiny_model()
    ours = {k: t for k, t in model.state_dict().items() if not k.startswith("vision_model")}
    whole = restore_keys(ours, [*llama_rows(), *linear_rows(1)])
    settings = settings | {"vocab_size": FIRST + 3, "vid_patch_token": FIRST}
    source = write(tmp_path / "trained", "pytorch_model.bin", whole, settings)
    shutil.copy(VOCABULARY, source)
    same_weights(hfvlm.convert(source, "video_chatgpt", tmp_path / "out", parts={"vision": paths["vision"]}))


def test_what_is_missing_is_named(release, tmp_path):
    source, paths, _, _ = release
    with pytest.raises(FileNotFoundError, match=r"needs its vision \(--vision.*OpenAI's CLIP"):
        hfvlm.convert(source, "video_chatgpt/video-chatgpt-7b", tmp_path / "out", parts={"base": paths["base"]})
    with pytest.raises(FileNotFoundError, match=r"needs its base \(--base.*LLaVA-Lightning 7B v1.1"):
        hfvlm.convert(source, "video_chatgpt/video-chatgpt-7b", tmp_path / "out", parts={"vision": paths["vision"]})
    with pytest.raises(KeyTableError, match="is not what video_chatgpt/video-chatgpt-7b .projector. expects"):
        hfvlm.convert(source, "video_chatgpt/video-chatgpt-7b", tmp_path / "out", parts=paths)
    assert not (tmp_path / "out").exists()


def test_verify(folder):
    checks = {check.name: check for check in hfvlm.verify(folder)}
    assert len(checks) == 11
    assert all(check.passed for check in checks.values()), checks


# Processor


def test_the_template_reads_a_film(model, processor, clip):
    """From a path in a message to an answer."""
    said = [{"type": "video", "video": str(clip)}, {"type": "text", "text": "What happens first?"}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": said}],
        tokenize=True,
        add_generation_prompt=True,
        return_dict=True,
        return_tensors="pt",
    )
    assert inputs["pixel_values_videos"].shape == (1, 6, 3, 28, 28)
    assert (inputs["input_ids"] == processor.video_token_id).sum() == model.config.count_tokens(6) == 104
    output = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    answer = processor.batch_decode(output, new_tokens_only=inputs)[0].strip()
    assert answer == hfvlm.Chat(model, processor).ask("What happens first?", videos=[clip], max_new_tokens=4)
    text = processor.tokenizer.decode(inputs["input_ids"][0])
    assert "What happens first?\n" in text.replace("<vid_start>", "\n").replace("\n\n", "\n")


def test_a_film_however_it_comes(processor, clip):
    text = "What is it?\n<video>"
    expected = processor(text=text, videos=clip)
    frames = film(7, frames=6)
    pictures = [Image.fromarray(frame) for frame in frames]
    for given in ([clip], [[clip]], clip.read_bytes(), frames, [frames], [pictures], [(pictures, 8.0)], [[frames]]):
        inputs = processor(text=text, videos=given)
        assert torch.equal(inputs["input_ids"], expected["input_ids"])
        close(inputs["pixel_values_videos"], expected["pixel_values_videos"], 1e-6, "pixels")


def test_films_and_texts_must_fit(processor):
    with pytest.raises(ValueError, match=r"places \('<video>'\) for \[1\] videos, but \[2\] were given"):
        processor(text="What?\n<video>", videos=[film(0), film(1)])
    with pytest.raises(ValueError, match="reads videos"):
        processor(images=[film()[0]], text="What?")
    with pytest.raises(ValueError, match="needs text"):
        processor(videos=[film()])


def test_batches_are_padded(model, processor):
    texts = ["What is it?\n<video>", "Hello.", "Tell me more about this one.\n<video>"]
    inputs = processor(text=texts, videos=[film(0, frames=2), film(1, frames=5)])
    assert inputs["num_frames"].tolist() == [2, 5]
    assert inputs["pixel_values_videos"].shape[:2] == (2, 5)
    together = model.generate(**inputs, max_new_tokens=4, do_sample=False)[:, inputs["input_ids"].shape[1] :]
    for i, own in ((0, film(0, frames=2)), (1, None), (2, film(1, frames=5))):
        alone = processor(text=texts[i], videos=own)
        new = model.generate(**alone, max_new_tokens=4, do_sample=False)[0, alone["input_ids"].shape[1] :]
        assert torch.equal(together[i], new), i


def test_long_films_are_sampled(model, processor):
    long = film(0, frames=130, size=(8, 8))
    inputs = processor(text="What?\n<video>", videos=[long])
    assert inputs["num_frames"].tolist() == [100]
    more = processor(text="What?\n<video>", videos=[long], num_frames=120)
    assert (more["input_ids"] == processor.video_token_id).sum() == model.config.count_tokens(120) == 124
    with torch.no_grad():
        assert model(**more).logits.shape[1] == more["input_ids"].shape[1]


def test_processor_survives_a_round_trip(processor, tmp_path):
    processor.save_pretrained(tmp_path)
    again = AutoProcessor.from_pretrained(tmp_path)
    assert type(again) is type(processor)
    text = "What?\n<video>"
    for name, value in processor(text=text, videos=[film()]).items():
        assert torch.equal(again(text=text, videos=[film()])[name], value)
    assert again.training_conversation == "vicuna_v1_1"


def test_pipeline(folder, chat, clip):
    answer = pipeline("video-text-to-text", model=str(folder), device="cpu")
    options = {"generate_kwargs": {"max_new_tokens": 6, "do_sample": False}}
    expected = []
    for source in (str(clip), film()):
        chat.reset()
        expected.append(chat.ask("What?", videos=[source]))
    found = answer([str(clip), film()], ["What?", "What?"], **options)
    assert [given[0]["generated_text"].strip() for given in found] == expected
    assert answer(str(clip), "What?", **options)[0]["generated_text"].strip() == expected[0]
    content = [{"type": "video", "video": str(clip)}, {"type": "text", "text": "What?"}]
    messages = answer([{"role": "user", "content": content}], **options)[0]["generated_text"]
    assert messages[-1]["role"] == "assistant"
    assert messages[-1]["content"].strip() == expected[0]
    with pytest.raises(ValueError, match="1 videos and 2 texts are no pairs"):
        answer([film()], ["a", "b"])


def test_truncation_never_cuts_a_film(processor):
    text = "What?\n<video> And after it?"
    whole = processor(text=text, videos=[film()])["input_ids"].shape[1]
    cut = processor(text=text, videos=[film()], max_length=whole - 2, truncation=True)
    assert cut["input_ids"].shape[1] == whole - 2
    with pytest.raises(ValueError, match="raise max_length"):
        processor(text=text, videos=[film()], max_length=50, truncation=True)
    dropped = processor(text=text, videos=[film()], max_length=50, truncation="pictures")
    assert "pixel_values_videos" not in dropped


# Answers


def afresh(chat, films):
    prompt = chat.processor.apply_chat_template(chat.messages[:-1], add_generation_prompt=True)
    inputs = chat.processor(text=prompt, videos=films)
    new = chat.model.generate(**inputs, **chat.options)[0, inputs["input_ids"].shape[1] :]
    return chat.processor.decode(new, skip_special_tokens=True).strip()


def test_answers_are_those_to_the_whole_conversation(chat):
    seen = []
    chat.model.vision_model.register_forward_hook(lambda m, a, o: seen.append(len(o.last_hidden_state)))
    films = []
    for text, shown in (("What is it?", [film(0)]), ("And now?", []), ("And this?", [film(1, frames=2)])):
        films += shown
        seen.clear()
        answer = chat.ask(text, videos=shown)
        assert seen == [len(own) for own in shown], "each film is read once"
        assert answer == afresh(chat, films)


def test_pictures_are_refused(chat):
    with pytest.raises(ValueError, match="reads videos alone"):
        chat.ask("What?", images=[film()[0]])


def test_command_line(folder, clip):
    def letters(text):  # a terminal is not shown control characters, which a model without training may write
        return "".join(letter for letter in text if letter.isprintable()).strip()

    arguments = ["chat", str(folder), "--max-new-tokens", "4"]
    expected = hfvlm.Chat.from_pretrained(folder).ask("What is it?", videos=[clip], max_new_tokens=4)
    result = CliRunner().invoke(app, [*arguments, "--video", str(clip), "--ask", "What is it?"])
    assert result.exit_code == 0, result.output
    assert letters(result.output) == letters(expected)
    talk = CliRunner().invoke(app, arguments, input=f"/video {clip}\nWhat is it?\n")
    assert letters(expected) in letters(talk.output)


# Training

EXAMPLES = [
    {
        "messages": [
            {"role": "user", "content": [{"type": "video"}, {"type": "text", "text": "What is it?"}]},
            {"role": "assistant", "content": "A cat runs."},
        ],
        "videos": [film(0)],
    },
    {
        "conversations": [
            {"from": "human", "value": "<video>\nWhich?"},
            {"from": "gpt", "value": "It is a small dog."},
        ],
        "video": film(1, frames=2),
    },
    {"messages": [{"role": "user", "content": "Hello."}, {"role": "assistant", "content": "Hi!"}]},
]


def test_answers_alone_are_trained_on(processor):
    batch = ChatCollator(processor)(EXAMPLES)
    assert batch["num_frames"].tolist() == [FRAMES, 2]
    places = (batch["input_ids"] == processor.video_token_id).sum(dim=1)
    assert places.tolist() == [104, 104, 0]
    answers = [processor.tokenizer.decode(row[row >= 0]) for row in batch["labels"]]
    assert [answer.strip() for answer in answers] == ["A cat runs.</s>", "It is a small dog.</s>", "Hi!</s>"]


def test_trainer_and_adapter(folder, processor, tmp_path):
    """The loss falls, the projector travels with the adapter, and merging changes no logit."""
    from peft import PeftModel

    tuned = hfvlm.lora(AutoModelForImageTextToText.from_pretrained(folder), r=16, quiet=True)
    batch = ChatCollator(processor)(EXAMPLES)
    with torch.no_grad():
        before = tuned.eval()(**batch).logits
        close(before, AutoModelForImageTextToText.from_pretrained(folder).eval()(**batch).logits, 1e-6, "start")
    trained = {name for name, p in tuned.named_parameters() if p.requires_grad}
    assert {name.split(".")[2] for name in trained} == {"language_model", "projector"}
    arguments = TrainingArguments(
        tmp_path / "run",
        max_steps=40,
        per_device_train_batch_size=3,
        learning_rate=2e-2,
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        logging_steps=1,
        remove_unused_columns=False,
        gradient_checkpointing=True,
    )
    trainer = Trainer(tuned, arguments, data_collator=ChatCollator(processor), train_dataset=EXAMPLES * 2)
    with redirect_stdout(io.StringIO()):
        trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < 0.8 * losses[0], losses
    tuned.eval().save_pretrained(tmp_path / "adapter")
    with torch.no_grad():
        expected = tuned(**batch).logits
        again = PeftModel.from_pretrained(AutoModelForImageTextToText.from_pretrained(folder), tmp_path / "adapter")
        close(again.eval()(**batch).logits, expected, 1e-6, "reloaded")
        close(again.merge_and_unload()(**batch).logits, expected, 1e-4, "merged")
