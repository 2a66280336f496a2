"""Conversations: processors, answers, and training."""

import io
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import redirect_stdout

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, Trainer, TrainingArguments, pipeline
from typer.testing import CliRunner

import hfvlm
from hfvlm.cli.commands import app
from hfvlm.modeling.streaming import until
from hfvlm.models.llava.conversations import CONVERSATIONS
from hfvlm.processing.image_text import ImageTextProcessor
from hfvlm.training.chat import MANY, ChatCollator, ChatTrainer, length_of
from tests.models.llava.tiny import GRID, VISION, VOCABULARY, converted, tiny_model
from tests.support.suite import close

ASK = [{"type": "image"}, {"type": "text", "text": "What is it?"}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return converted(tmp_path_factory.mktemp("padded"))


@pytest.fixture(scope="module")
def tiled_folder(tmp_path_factory):
    return converted(tmp_path_factory.mktemp("tiled"), grid_pinpoints=GRID, patch_merge="spatial_unpad")


@pytest.fixture
def processor(folder):
    return AutoProcessor.from_pretrained(folder)


@pytest.fixture
def model(folder):
    return AutoModelForImageTextToText.from_pretrained(folder).eval()


def image(seed=0, size=(40, 30)):
    return Image.fromarray(np.random.RandomState(seed).randint(0, 256, (size[1], size[0], 3), dtype=np.uint8))


# Processor


def test_texts_and_images_become_the_models_inputs(processor, model):
    texts = ["USER: <image>\nWhat? ASSISTANT:", "Hello", "<image><image> two"]
    inputs = processor(images=[image(0), image(1), image(2)], text=texts)
    assert inputs["pixel_values"].shape == (3, 3, 28, 28)
    assert (inputs["input_ids"] == processor.image_token_id).sum(dim=1).tolist() == [4, 0, 8]
    assert inputs["attention_mask"][0].tolist()[-1] == 1  # padded on the left, to be answered together
    nested = processor(images=[[image(0)], [], [image(1), image(2)]], text=texts)
    assert torch.equal(nested["pixel_values"], inputs["pixel_values"])
    output = model(**inputs)
    assert torch.isfinite(output.logits).all()


def test_a_wrong_number_of_images_is_refused(processor):
    with pytest.raises(ValueError, match=r"placeholders \('<image>'\) for \[1\] images, but \[0\] were given"):
        processor(text="<image> what?")
    with pytest.raises(ValueError, match=r"for \[1, 0\] images, but \[1, 1\] were given"):
        processor(images=[image(), image()], text=["<image>", "none"])
    with pytest.raises(ValueError, match="needs text"):
        processor(images=image())
    with pytest.raises(TypeError, match="unexpected keyword argument 'colour'"):
        processor(text="a", colour="red")


def test_a_path_in_a_text_is_nothing_but_text(processor):
    inputs = processor(text="/etc/passwd https://example.com/cat.jpg")
    assert set(inputs) == {"input_ids", "attention_mask"}


def test_truncation_never_cuts_an_image(processor):
    text, images = "one <image> two <image> three", [image(0), image(1)]
    whole = processor(images=images, text=text)["input_ids"][0].tolist()
    first, last = whole.index(480), len(whole) - 1 - whole[::-1].index(480)
    inside = processor(images=images, text=text, max_length=last + 1, truncation=True)
    assert inside["input_ids"][0].tolist() == whole[: last + 1]
    assert len(inside["pixel_values"]) == 2
    for length in (last, first + 2):
        with pytest.raises(ValueError, match=f"text 0 has {len(whole)} tokens.*max_length {length} leaves room for"):
            processor(images=images, text=text, max_length=length, truncation=True)
        dropped = processor(images=images, text=text, max_length=length, truncation="pictures")
        fitting = 1 if length == last else 0
        assert len(dropped.get("pixel_values", ())) == fitting
        assert (dropped["input_ids"] == 480).sum() == 4 * fitting
        assert dropped["input_ids"][0].tolist() == whole[: dropped["input_ids"].shape[1]]


def test_processor_survives_a_round_trip(processor, tmp_path):
    processor.save_pretrained(tmp_path)
    again = AutoProcessor.from_pretrained(tmp_path)
    assert type(again) is type(processor)
    assert again.to_dict() == processor.to_dict()
    assert again.chat_template == processor.chat_template
    text = "</s>a <s> b<image> c"
    assert again.encode(text) == processor.encode(text)


@pytest.mark.parametrize("legacy", [True, False])
def test_tokenizer_survives_a_round_trip(legacy, tmp_path):
    from hfvlm.models.llava import HfvlmLLaVATokenizer

    tokenizer = HfvlmLLaVATokenizer.from_vocabulary(VOCABULARY, legacy=legacy)
    tokenizer.save_pretrained(tmp_path)
    again = HfvlmLLaVATokenizer.from_pretrained(tmp_path)
    for text in ("a photo", "  two", "x</s>y </s> z", "</s>"):
        ids = tokenizer(text)["input_ids"]
        assert again(text)["input_ids"] == ids
    assert again.decode(tokenizer("a photo of")["input_ids"], skip_special_tokens=True) == "a photo of"


def test_tokens_of_tiles_are_counted_as_the_model_makes_them(tiled_folder):
    processor = AutoProcessor.from_pretrained(tiled_folder)
    model = AutoModelForImageTextToText.from_pretrained(tiled_folder)
    images = [image(i, size) for i, size in enumerate([(90, 30), (30, 90), (50, 51), (300, 20)])]
    inputs = processor(images=images, text=["<image>"] * 4)
    features = model.get_image_features(inputs["pixel_values"], inputs["image_sizes"]).pooler_output
    assert [len(rows) for rows in features] == (inputs["input_ids"] == 480).sum(dim=1).tolist()
    new = model.generate(**inputs, max_new_tokens=3, do_sample=False)
    for i in range(4):
        alone = processor(images=images[i], text="<image>")
        expected = model.generate(**alone, max_new_tokens=3, do_sample=False)[0, alone["input_ids"].shape[1] :]
        assert torch.equal(new[i, inputs["input_ids"].shape[1] :], expected)


def test_unknown_settings_are_named(processor):
    from hfvlm.models.llava import HfvlmLLaVAImageProcessor, HfvlmLLaVAProcessor

    with pytest.raises(ValueError, match="conversation must be one of v0"):
        HfvlmLLaVAProcessor(processor.image_processor, processor.tokenizer, conversation="v9")
    with pytest.raises(ValueError, match="grid_pinpoints and resize_mode 'tiles' go together"):
        HfvlmLLaVAImageProcessor(resize_mode="tiles")
    with pytest.raises(ValueError, match="resize_mode must be one of crop, pad, tiles"):
        HfvlmLLaVAImageProcessor(resize_mode="squash")


def test_thin_images_stay_small(processor):
    inputs = processor.image_processor(Image.new("RGB", (60000, 1)), return_tensors="pt")
    assert inputs["pixel_values"].shape == (1, 3, 28, 28)
    cropped = processor.image_processor(Image.new("RGB", (1, 3_000_000)), resize_mode="crop", return_tensors="pt")
    assert cropped["pixel_values"].shape == (1, 3, 28, 28)


# Pipelines


def test_image_text_to_text_pipeline(folder, processor, model):
    answer = pipeline("image-text-to-text", model=str(folder), device="cpu")
    message = {"role": "user", "content": [{"type": "image", "image": image()}, ASK[1]]}
    options = {"max_new_tokens": 4, "do_sample": False}
    result = answer([message], return_full_text=False, generate_kwargs=options)[0]["generated_text"]
    text = processor.apply_chat_template([{"role": "user", "content": ASK}], add_generation_prompt=True)
    inputs = processor(images=image(), text=text)
    ids = model.generate(**inputs, **options)[0, inputs["input_ids"].shape[1] :]
    assert result.strip() == processor.decode(ids, skip_special_tokens=True).strip()


# Chat


@pytest.fixture
def chat(model, processor):
    return hfvlm.Chat(model, processor, max_new_tokens=6, eos_token_id=None)


def without_cache(chat, images):
    """The last answer, computed without a cache."""
    text = chat.processor.apply_chat_template(chat.messages[:-1], add_generation_prompt=True)
    inputs = chat.processor(images=images or None, text=text)
    new = chat.model.generate(**inputs, **chat.options)[0, inputs["input_ids"].shape[1] :]
    return chat.processor.decode(new, skip_special_tokens=True).strip()


def test_answers_are_those_to_the_whole_conversation(chat):
    images = []
    for text, shown in (("What is it?", [image(0)]), ("And now?", []), ("And these?", [image(1), image(2)])):
        images += shown
        answer = chat.ask(text, shown)
        assert answer == without_cache(chat, images)
        assert chat.messages[-1] == {"role": "assistant", "content": answer}


def test_nothing_is_computed_twice(chat):
    encoded, read = [], []
    chat.model.vision_model.register_forward_hook(lambda m, a, o: encoded.append(len(o.last_hidden_state)))
    embedding = chat.model.language_model.get_input_embeddings()
    embedding.register_forward_hook(lambda m, a, o: read.append(o.shape[1]))
    chat.ask("What is it?", [image(0)])
    first = read[0]
    read.clear()
    chat.ask("And what is on the left of it?")
    assert encoded == [1]
    assert 5 < read[0] < first, "the second question runs alone"
    chat.ask("And this?", [image(1)])
    assert encoded == [1, 1]


def test_an_answer_comes_in_pieces(chat):
    pieces = list(chat.stream("What is it?", [image(0)]))
    assert len(pieces) > 1
    answer = "".join(pieces).strip()
    chat.reset()
    assert chat.ask("What is it?", [image(0)]) == answer


def test_an_unfinished_answer_is_dropped(chat):
    expected = chat.ask("What is it?", [image(0)])
    before = list(chat.messages)
    stream = chat.stream("And now?", [image(1)], max_new_tokens=200)
    next(stream)
    stream.close()
    assert chat.messages == before
    assert chat.ask("And?") == without_cache(chat, [image(0)])
    chat.reset()
    assert chat.ask("What is it?", [image(0)]) == expected


def test_a_conversation_takes_one_thread_at_a_time(chat, monkeypatch):
    """Another answer is refused while one is generated, and the messages stay whole."""

    def answered(self, text, images, videos, options):
        for piece in ["four", "words", "of", "answer"]:
            time.sleep(0.01)
            yield piece
        turns = ("user", text), ("assistant", "answer")
        self.messages = [*self.messages, *({"role": role, "content": content} for role, content in turns)]

    monkeypatch.setattr(hfvlm.Chat, "answered", answered)
    chat.reset()
    first = chat.stream("what is this ?")
    next(first)
    with pytest.raises(RuntimeError, match="in the middle of an answer.*several threads need one each"):
        chat.ask("and this ?")
    with pytest.raises(RuntimeError, match="in the middle of an answer"):
        chat.reset()
    list(first)

    def ask(i):
        try:
            return chat.ask(f"what is {i} ?")
        except RuntimeError:
            return None

    with ThreadPoolExecutor(8) as pool:
        answers = [answer for answer in pool.map(ask, range(8)) if answer is not None]
    assert answers
    assert [message["role"] for message in chat.messages] == ["user", "assistant"] * (1 + len(answers))
    chat.stream("unread").close()
    next(left := chat.stream("left"))
    left.close()
    assert chat.ask("again")


@pytest.mark.parametrize(
    "options", [{"max_new_tokens": 0}, {"temperature": float("nan")}, {"top_p": 2}, {"num_beams": True}]
)
def test_numbers_of_an_answer_are_checked(chat, options):
    with pytest.raises(ValueError, match=f"{next(iter(options))} must be"):
        chat.ask("hello", **options)


def test_errors_of_the_thread_are_raised(chat):
    with pytest.raises(TypeError, match="unexpected keyword argument 'nonsense'"):
        chat.ask("What is it?", nonsense=1)
    assert chat.messages == []


def test_a_system_message_replaces_the_checkpoints(model, processor):
    chat = hfvlm.Chat(model, processor, system="Answer in French.", max_new_tokens=2)
    chat.ask("What?")
    assert processor.apply_chat_template(chat.messages).startswith("Answer in French. USER: What?")


def test_texts_end_at_stop_strings():
    assert "".join(until(iter(["a #", "# b ##", "# c"]), ["###"])) == "a ## b "
    assert list(until(iter(["a#", "b", "#", "##x"]), ["###"])) == ["a", "#b"]
    assert "".join(until(iter(["a", "##"]), ["###"])) == "a##"
    assert "".join(until(iter(["plain ", "text"]), [])) == "plain text"


def test_old_checkpoints_stop_at_their_separator(model, processor, tmp_path):
    processor.conversation = "llava_v0"
    processor.chat_template = CONVERSATIONS["llava_v0"].chat_template()
    assert processor.stop_strings == ["###"]
    assert isinstance(hfvlm.Chat(model, processor, max_new_tokens=3).ask("Hi"), str)


def test_command_line(folder, tmp_path):
    image().save(tmp_path / "a.png")
    arguments = ["chat", str(folder), "--image", str(tmp_path / "a.png"), "--max-new-tokens", "4"]
    result = CliRunner().invoke(app, [*arguments, "--ask", "What is it?"])
    assert result.exit_code == 0, result.output
    expected = hfvlm.Chat.from_pretrained(folder).ask("What is it?", [image()], max_new_tokens=4)
    assert result.output.strip() == expected
    talk = CliRunner().invoke(app, arguments, input=f"What is it?\n/image {tmp_path / 'a.png'}\nAnd this?\n/reset\n")
    assert talk.exit_code == 0, talk.output
    assert expected in talk.output


# Training

EXAMPLES = [
    {
        "messages": [{"role": "user", "content": ASK}, {"role": "assistant", "content": "A cat."}],
        "images": [image(0)],
    },
    {
        "conversations": [
            {"from": "human", "value": "Which?\n<image>"},
            {"from": "gpt", "value": "It is a small dog."},
        ],
        "image": image(1),
    },
    {"messages": [{"role": "user", "content": "Hello."}, {"role": "assistant", "content": "Hi!"}]},
]


def test_answers_alone_are_trained_on(processor):
    batch = ChatCollator(processor)(EXAMPLES)
    assert batch["pixel_values"].shape[0] == 2
    assert batch["input_ids"].shape == batch["labels"].shape == batch["attention_mask"].shape
    learned = [processor.decode([i for i in row if i >= 0]) for row in batch["labels"].tolist()]
    assert learned == ["A cat.</s>", "It is a small dog.</s>", "Hi!</s>"]
    assert (batch["labels"][batch["input_ids"] == 480] == -100).all()
    assert (batch["input_ids"] == 480).sum(dim=1).tolist() == [4, 4, 0]


def test_labels_by_default_are_answers_with_their_end_tokens(processor):
    """Several answers, each with its end token."""
    answers = [{"role": "assistant", "content": text} for text in ("A cat.", "It is small.")]
    questions = [{"role": "user", "content": content} for content in (ASK, "And its size?")]
    messages = processor.protected([questions[0], answers[0], questions[1], answers[1]])
    ids, labels = ImageTextProcessor.labelled(processor, messages)
    trained = "".join(processor.decode([label]) if label >= 0 else "|" for label in labels)
    assert [part for part in trained.split("|") if part] == ["Acat.</s>", "Itissmall.</s>"]
    assert all(label in (i, -100) for i, label in zip(ids, labels, strict=True))


def test_the_forms_of_an_example_mean_the_same(processor):
    answer = {"role": "assistant", "content": "A cat."}
    forms = [
        {"messages": [{"role": "user", "content": ASK}, answer], "images": [image()]},
        {"messages": [{"role": "user", "content": "What is it?"}, answer], "images": [image()]},
        {"messages": [{"role": "user", "content": [{"type": "image", "image": image()}, ASK[1]]}, answer]},
        {
            "conversations": [
                {"from": "human", "value": "<image>\nWhat is it?"},
                {"from": "gpt", "value": "A cat."},
            ],
            "image": image(),
        },
    ]
    collate = ChatCollator(processor)
    expected = collate(forms[:1])
    for form in forms[1:]:
        batch = collate([form])
        assert batch.keys() == expected.keys()
        assert all(torch.equal(batch[name], expected[name]) for name in batch)


def test_long_examples_are_cut_but_not_in_an_image(processor):
    whole = ChatCollator(processor)(EXAMPLES[:1])
    length = whole["input_ids"].shape[1]
    cut = ChatCollator(processor, max_length=length - 2)(EXAMPLES[:1])
    assert torch.equal(cut["labels"], whole["labels"][:, : length - 2])
    short = 60
    with pytest.raises(ValueError, match="example 0 has .* tokens with its media"):
        ChatCollator(processor, max_length=5)(EXAMPLES[:1])
    assert "pixel_values" not in ChatCollator(processor, max_length=5, truncation="pictures")(EXAMPLES[:1])
    assert ChatCollator(processor, pad_to_multiple_of=short)(EXAMPLES)["input_ids"].shape[1] % short == 0


def test_batches_of_one_length(processor, tmp_path):
    """Of conversations about images, or of others, alone."""
    texts = [" ".join(["word"] * (1 + i * 7 % 20)) for i in range(400)]
    rows = [
        {"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": text}]} for text in texts
    ]
    rows = [row | ({"images": ["a.png"]} if i % 2 else {}) for i, row in enumerate(rows)]
    assert [length_of(row) for row in rows[:2]] == [2, MANY + 16]
    assert length_of(EXAMPLES[0]) == MANY + 5
    assert length_of(EXAMPLES[1]) == MANY + 7
    assert length_of({"messages": [], "videos": [np.zeros((2, 4, 4, 3))], "images": None}) == MANY
    assert length_of({"messages": [], "image": np.zeros((4, 4, 3)), "images": []}) == MANY
    assert length_of({"messages": [], "images": []}) == 0
    arguments = {"per_device_train_batch_size": 4, "train_sampling_strategy": "group_by_length", "use_cpu": True}
    trainer = ChatTrainer(
        torch.nn.Linear(1, 1), TrainingArguments(tmp_path, **arguments), ChatCollator(processor), train_dataset=rows
    )
    order = list(trainer._get_train_sampler())
    assert sorted(order) == list(range(400))
    batches = [[length_of(rows[i]) for i in order[k : k + 4]] for k in range(0, 400, 4)]
    assert sum(max(batch) - min(batch) <= 4 for batch in batches) > 85
    trainer.args.train_sampling_strategy = "random"
    assert isinstance(trainer._get_train_sampler(), torch.utils.data.RandomSampler)


def test_trainer_and_adapter(folder, processor, tmp_path):
    """The loss falls, the projector travels with the adapter, and merging changes no logit."""
    from peft import PeftModel

    model = AutoModelForImageTextToText.from_pretrained(folder)
    tuned = hfvlm.lora(model, r=16, quiet=True)
    trained = {name for name, p in tuned.named_parameters() if p.requires_grad}
    assert {name.split(".")[2] for name in trained} == {"language_model", "projector"}
    assert not any("vision_model" in name for name in trained)
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
    trainer = Trainer(tuned, arguments, data_collator=ChatCollator(processor), train_dataset=EXAMPLES * 4)
    with redirect_stdout(io.StringIO()):
        trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < 0.8 * losses[0], losses
    tuned.eval().save_pretrained(tmp_path / "adapter")
    batch = ChatCollator(processor)(EXAMPLES)
    with torch.no_grad():
        expected = tuned(**batch).logits
        again = PeftModel.from_pretrained(AutoModelForImageTextToText.from_pretrained(folder), tmp_path / "adapter")
        close(again.eval()(**batch).logits, expected, 1e-6, "reloaded")
        close(again.merge_and_unload()(**batch).logits, expected, 1e-4, "merged")


def test_a_converted_folder_is_verified(folder, tiled_folder):
    for each in (folder, tiled_folder):
        checks = {check.name: check for check in hfvlm.verify(each)}
        assert len(checks) == 11
        assert all(check.passed for check in checks.values()), checks


def test_recipes_adapt_the_parts_in_their_names(model):
    def adapted(recipe):
        tuned = hfvlm.lora(AutoModelForImageTextToText.from_pretrained(model.name_or_path), recipe, quiet=True)
        return {name.removeprefix("base_model.model.") for name, p in tuned.named_parameters() if p.requires_grad}

    assert all(name.startswith("language_model.") and "lora_" in name for name in adapted("language"))
    both = adapted("vision+language")
    seen = {name.split(".")[2] for name in both if name.startswith("vision_model.layers")}
    assert seen == {"0", "1"}, "the last layer of the tower is unused, and not adapted"


def test_unused_modules_are_not_trained():
    """A tower of a CLIP may have its projection."""
    model = tiny_model(vision_config=VISION | {"projection_dim": 16})
    assert "vision_model.projection" in model.unused_modules
    tuned = hfvlm.lora(model, "language+projection", quiet=True)
    parts = {name.split(".")[2] for name, p in tuned.named_parameters() if p.requires_grad}
    assert parts == {"language_model", "projector"}


@pytest.mark.parametrize(("bits", "kind"), [(4, "Linear4bit"), (8, "Linear8bitLt")])
def test_quantised_loading_keeps_the_projector(folder, processor, bits, kind):
    pytest.importorskip("bitsandbytes", reason="comes with hfvlm[quantization]")
    from transformers import BitsAndBytesConfig

    options = {"bnb_4bit_compute_dtype": torch.float32} if bits == 4 else {}
    config = BitsAndBytesConfig(**{f"load_in_{bits}bit": True}, **options)
    model = AutoModelForImageTextToText.from_pretrained(folder, quantization_config=config, dtype=torch.float32)
    kinds = {
        name: type(module).__name__ for name, module in model.named_modules() if "Linear" in type(module).__name__
    }
    assert kinds["language_model.model.layers.0.self_attn.q_proj"] == kind
    for name in ("projector.layers.0", "vision_model.layers.0.attention.q_proj", "language_model.lm_head"):
        assert kinds[name] == "Linear", name
        assert model.get_submodule(name).weight.dtype == torch.float32
    whole = AutoModelForImageTextToText.from_pretrained(folder)
    inputs = processor(images=image(), text="<image> What?")
    with torch.no_grad():
        pixels = inputs["pixel_values"]
        (seen,), (expected,) = (m.get_image_features(pixels).pooler_output for m in (model, whole))
        assert torch.equal(seen, expected)
        if bits == 8:  # in 4 bits, bitsandbytes computes no layers as small as these without gradients
            close(model(**inputs).logits, whole(**inputs).logits, 0.1, "logits")
