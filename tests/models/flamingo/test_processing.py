import json

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, pipeline

import hfvlm
from hfvlm.media import read_video
from hfvlm.models.flamingo import HfvlmFlamingoImageProcessor, HfvlmFlamingoProcessor, HfvlmFlamingoTokenizer
from hfvlm.training.chat import ChatCollator
from tests.models.flamingo.tiny import PIECES, converted, vocabulary
from tests.models.llava.tiny import VOCABULARY
from tests.support.suite import close

END, IMAGE, PADDING = PIECES, PIECES + 1, PIECES + 2
SHOTS = [{"answer": "two cats"}, {"answer": "a sink"}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return converted(tmp_path_factory.mktemp("flamingo"))


@pytest.fixture
def processor(folder):
    return AutoProcessor.from_pretrained(folder)


@pytest.fixture
def model(folder):
    return AutoModelForImageTextToText.from_pretrained(folder).eval()


def image(seed=0, size=(40, 30)):
    return Image.fromarray(np.random.RandomState(seed).randint(0, 256, (size[1], size[0], 3), dtype=np.uint8))


def test_prompts_of_different_lengths(processor, model):
    texts = [processor.few_shot("caption", SHOTS), processor.few_shot("caption"), "no image"]
    assert texts[0] == "<image>Output:two cats<|endofchunk|><image>Output:a sink<|endofchunk|><image>Output:"
    inputs = processor(images=[[image(0), image(1), image(2)], [image(3)], []], text=texts)
    assert inputs["pixel_values"].shape == (4, 3, 28, 28)
    assert (inputs["input_ids"] == IMAGE).sum(dim=1).tolist() == [3, 1, 0]
    assert inputs["attention_mask"][:, -1].tolist() == [1, 1, 1]  # padded on the left, to be continued together
    assert set(inputs["input_ids"][1, :10].tolist()) == {PADDING}
    new = model.generate(**inputs, max_new_tokens=4, eos_token_id=None)
    alone = processor(images=[image(3)], text=texts[1])
    expected = model.generate(**alone, max_new_tokens=4, eos_token_id=None)
    assert torch.equal(new[1, inputs["input_ids"].shape[1] :], expected[0, alone["input_ids"].shape[1] :])


def video(frames=5, seed=3):
    return [image(seed + i) for i in range(frames)]


def test_videos_stand_where_images_do(processor, model):
    """A video of one frame is an image; frames that a video does not have change nothing."""
    processor.num_frames = 4
    texts = ["<image>Output:", "<image>a<|endofchunk|><image>b"]
    inputs = processor(videos=[video(9), video(2), [image(1)]], text=texts)
    assert inputs["pixel_values"].shape == (3, 4, 3, 28, 28)
    assert inputs["num_frames"].tolist() == [4, 2, 1]
    taken = processor(images=[video(9)[i] for i in (1, 3, 5, 7)], text="<image>" * 4)["pixel_values"]
    assert torch.equal(inputs["pixel_values"][0], taken)
    with torch.no_grad():
        together = model(**inputs).logits
        for row, own in enumerate(([video(9)], [video(2), [image(1)]])):
            alone = model(**processor(videos=own, text=texts[row])).logits
            close(together[row, -alone.shape[1] :], alone[0], 1e-5, f"row {row}")
        mixed = processor(images=[read_video(video(2)), image(1)], text=texts[1])
        close(model(**mixed).logits, alone, 1e-5, "images among videos")
        plain = processor(images=image(1), text="<image>c")
        close(
            model(**plain).logits, model(**processor(videos=[[image(1)]], text="<image>c")).logits, 1e-5, "one frame"
        )
    by_text = processor(videos=[[video(9)], [video(2), [image(1)]]], text=texts)
    assert torch.equal(by_text["pixel_values"], inputs["pixel_values"])
    with pytest.raises(ValueError, match="reads images or videos"):
        processor(images=image(), videos=[video()], text="<image><image>")
    with pytest.raises(ValueError, match="num_frames must be an integer"):
        HfvlmFlamingoProcessor(processor.image_processor, processor.tokenizer, num_frames=0)


def test_videos_in_messages_and_conversations(processor, model):
    messages = [{"role": "user", "content": [{"type": "video"}, {"type": "text", "text": "Output:"}]}]
    assert processor.apply_chat_template(messages) == "<image>Output:"
    answered = [{"role": "user", "content": "<image>Output:"}, {"role": "assistant", "content": "a cat"}]
    clips = [read_video(video(3)), image(0)]
    batch = ChatCollator(processor)([{"messages": answered, "images": [clip]} for clip in clips])
    assert batch["num_frames"].tolist() == [3, 1]
    assert torch.isfinite(model(**batch).loss)


def test_captions_and_pages_train_as_the_authors_make_them(processor, model):
    page = "Cats. <image> A cat sleeps. <image> It wakes."
    batch = processor.captions([image(0), [image(1), image(2)]], [" a roof ", page])
    texts = [
        processor.tokenizer.decode(ids[mask == 1])
        for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
    ]
    assert texts == [
        "<image>a roof<|endofchunk|><|endoftext|>",
        "Cats.<image>A cat sleeps.<|endofchunk|><image>It wakes.<|endofchunk|><|endoftext|>",
    ]
    labels = [processor.tokenizer.decode(row[row != -100]) for row in batch["labels"]]
    assert labels == ["a roof<|endofchunk|><|endoftext|>", "A cat sleeps.<|endofchunk|>It wakes.<|endofchunk|>"]
    assert len(batch["pixel_values"]) == 3
    assert torch.isfinite(model(**batch).loss)
    short = processor.captions([[image(1), image(2)]], [page], max_length=20)
    assert short["input_ids"].shape == (1, 20)
    assert len(short["pixel_values"]) == 1
    (safe,) = processor.captions([image(0)], ["a<|endofchunk|>b"])["labels"]
    assert (safe == END).sum() == 1


def test_few_shot_prompts_equal_the_authors(processor):
    prompt = processor.few_shot("vqa", [{"question": "What?", "answer": "a cat"}], question="How many?")
    assert prompt == ("<image>Question:What? Short answer:a cat<|endofchunk|><image>Question:How many? Short answer:")
    own = processor.few_shot("<image>It shows {what}; so", [{"what": "snow", "answer": " cold"}], what="sun")
    assert own == "<image>It shows snow; so cold<|endofchunk|><image>It shows sun; so"
    with pytest.raises(ValueError, match="task 'vqa' needs 'question'"):
        processor.few_shot("vqa")
    with pytest.raises(ValueError, match="task must be one of caption, vqa, classify, hateful_memes, or a text with"):
        processor.few_shot("captions")


def test_conversations_are_examples(processor):
    messages = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Output:"}]},
        {"role": "assistant", "content": "two cats"},
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Output:"}]},
    ]
    text = processor.apply_chat_template(messages, add_generation_prompt=True)
    assert text == processor.few_shot("caption", SHOTS[:1])


def test_labels_equal_the_authors(processor):
    ids = torch.tensor([[5, IMAGE, 6, 7, END, 8, 9, IMAGE, 3, END, 0, PADDING], [IMAGE, 4, END, 0] + [PADDING] * 8])
    pages = [[-100, -100, 6, 7, END, -100, -100, -100, 3, END, -100, -100], [-100, 4, END] + [-100] * 9]
    assert processor.labels(ids).tolist() == pages
    captions = [[5, -100, 6, 7, END, 8, 9, -100, 3, END, 0, -100], [-100, 4, END, 0] + [-100] * 8]
    assert processor.labels(ids, interleaved=False).tolist() == captions


def test_conversations_train_their_answers(processor, model):
    question = {"role": "user", "content": "<image>Output:"}
    examples = [
        {"messages": [question, {"role": "assistant", "content": "a cat"}], "images": [image(0)]},
        {"messages": [question, {"role": "assistant", "content": "snow on a roof"}], "images": [image(1)]},
    ]
    batch = ChatCollator(processor)(examples)
    decoded = [processor.decode(row[row != -100]) for row in batch["labels"]]
    assert decoded == ["a cat<|endofchunk|>", "snow on a roof<|endofchunk|>"]
    assert torch.isfinite(model(**batch).loss)


def test_processor_survives_a_round_trip(processor, tmp_path):
    processor.save_pretrained(tmp_path)
    again = AutoProcessor.from_pretrained(tmp_path)
    assert type(again) is HfvlmFlamingoProcessor
    assert again.to_dict() == processor.to_dict()
    for text in ("<image>a  b<|endofchunk|> c<|endoftext|>", "é😀"):
        assert again.encode(text) == processor.encode(text)
        assert again.decode(again.encode(text)) == text


def test_vocabularies_get_missing_tokens(tmp_path):
    plain = HfvlmFlamingoTokenizer.from_vocabulary(vocabulary(tmp_path))
    assert plain.convert_tokens_to_ids(["<|endofchunk|>", "<image>", "<PAD>"]) == [PIECES, PIECES + 1, PIECES + 2]
    plain.save_pretrained(tmp_path / "again")
    again = HfvlmFlamingoTokenizer.from_vocabulary(tmp_path / "again" / "tokenizer.json")
    assert again.get_vocab() == plain.get_vocab()
    llama = HfvlmFlamingoTokenizer.from_vocabulary(VOCABULARY)
    assert llama.convert_tokens_to_ids(["<|endofchunk|>", "<image>", "<PAD>"]) == [480, 481, 482]
    ids = HfvlmFlamingoProcessor(HfvlmFlamingoImageProcessor(), llama).encode("<image>Output:")
    assert ids[:2] == [1, 481]  # LLaMA's texts have a start token
    llama.save_pretrained(tmp_path / "llama")
    assert HfvlmFlamingoTokenizer.from_pretrained(tmp_path / "llama")("<image>Output:")["input_ids"] == ids


# Tools


def test_image_text_to_text_pipeline(folder, processor, model):
    answer = pipeline("image-text-to-text", model=str(folder), device="cpu")
    options = {"max_new_tokens": 4, "do_sample": False}
    prompt = processor.few_shot("caption", SHOTS[:1])
    images = [image(0), image(1)]
    result = answer(images=images, text=prompt, return_full_text=False, generate_kwargs=options)
    inputs = processor(images=images, text=prompt)
    (expected,) = processor.batch_decode(model.generate(**inputs, **options), new_tokens_only=inputs)
    assert result[0]["generated_text"] == expected
    shown = [{"type": "image", "image": images[0]}, {"type": "text", "text": "Output:"}]
    output = answer([{"role": "user", "content": shown}], return_full_text=False, generate_kwargs=options)
    inputs = processor(images=images[:1], text=processor.few_shot("caption"))
    (expected,) = processor.batch_decode(model.generate(**inputs, **options), new_tokens_only=inputs)
    assert output[0]["generated_text"] == expected


def test_chat_continues_few_shot_prompts(processor, model):
    chat = hfvlm.Chat(model, processor, max_new_tokens=4, eos_token_id=None)
    calls = []
    handle = model.vision_model.register_forward_hook(lambda _, args, out: calls.append(len(args[0])))
    for i in range(3):
        chat.ask("Output:", images=[image(i)])
        chat.messages[-1]["content"] = f"image {i}"  # as an example, what the user knows better
    handle.remove()
    assert calls == [1, 1, 1]
    last = chat.ask("Output:", images=[image(3)])
    text = processor.few_shot("caption", [{"answer": f"image {i}"} for i in range(3)])
    inputs = processor(images=[image(i) for i in range(4)], text=text)
    new = model.generate(**inputs, max_new_tokens=4, eos_token_id=None)
    assert last == processor.batch_decode(new, new_tokens_only=inputs)[0].strip()


def test_the_example_captions_images_in_the_style_of_its_shots(folder, processor, model, tmp_path, capsys):
    from examples.few_shot_captions import main

    for i in range(4):
        image(i).save(tmp_path / f"{i}.png")
    lines = [json.dumps({"image": f"{i}.png", **shot}) for i, shot in enumerate(SHOTS)]
    (tmp_path / "shots.jsonl").write_text("\n".join(lines))
    queries = [str(tmp_path / f"{i}.png") for i in (2, 3)]
    main([str(folder), str(tmp_path / "shots.jsonl"), *queries, "--beams", "1", "--max-new-tokens", "3"])
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["image"] for row in rows] == queries
    inputs = processor(images=[image(0), image(1), image(3)], text=processor.few_shot("caption", SHOTS))
    ids = model.generate(**inputs, max_new_tokens=3, do_sample=False)
    assert rows[1]["answer"] == processor.batch_decode(ids, new_tokens_only=inputs)[0].strip()
