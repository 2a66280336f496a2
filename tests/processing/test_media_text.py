"""What processors of texts with media give beyond ids and pixels."""

import numpy as np
import pytest
import torch
from PIL import Image

from hfvlm.models.llava import HfvlmLLaVAImageProcessor, HfvlmLLaVAProcessor, HfvlmLLaVATokenizer
from hfvlm.processing.media_text import MediaTextProcessor
from hfvlm.processing.protection import ENDED, GENERATED, generated_spans, marks_generation
from tests.models.llava.tiny import VOCABULARY
from tests.processing.test_strictness import PROCESSORS, processor_of

CHATS = [cls for cls in PROCESSORS if issubclass(cls, MediaTextProcessor)]


def conversation(*turns):
    roles = ("user", "assistant")
    return [{"role": roles[i % 2], "content": [{"type": "text", "text": turn}]} for i, turn in enumerate(turns)]


MASKS = {"tokenize": True, "return_dict": True, "return_assistant_tokens_mask": True}


@pytest.fixture(scope="module")
def llava():
    tokenizer = HfvlmLLaVATokenizer.from_vocabulary(VOCABULARY, added=("<image>",), model_max_length=512)
    return HfvlmLLaVAProcessor(HfvlmLLaVAImageProcessor(size=28), tokenizer)


# PaLI's texts have no answers, and PaliGemma's one.
ANSWERS = {"HfvlmPaLIProcessor": 0, "HfvlmPaliGemmaProcessor": 1}


@pytest.mark.parametrize("cls", [cls for cls in CHATS if ANSWERS.get(cls.__name__, 2)])
def test_templates_mark_what_the_assistant_says(cls):
    template = marks_generation(processor_of(cls).chat_template)
    processor = processor_of(cls)
    messages = conversation(*("a b", "b c!", "a", "c")[: 2 * ANSWERS.get(cls.__name__, 2)])
    marked = processor.apply_chat_template(messages, chat_template=template)
    text, spans = generated_spans(marked)
    assert text == processor.apply_chat_template(messages)
    said = [text[start:end] for start, end in spans]
    assert "b c!" in said[0]
    assert "c" in said[-1]
    assert len(said) == ANSWERS.get(cls.__name__, 2)
    assert text[: spans[0][0]].rstrip().endswith(("a b", "ASSISTANT:", "Answer:", "assistant"))


@pytest.mark.parametrize("side", ["left", "right"])
def test_masks_of_answers(llava, side):
    image = Image.new("RGB", (28, 28))
    several, one = conversation("cat", "a dog", "bus", "two"), conversation("dog", "cat")
    several[0]["content"] = [
        {"type": "image", "image": image},
        {"type": "image", "image": image},
        *several[0]["content"],
    ]
    inputs = llava.apply_chat_template(
        [several, one],
        tokenize=True,
        return_dict=True,
        return_assistant_tokens_mask=True,
        processor_kwargs={"padding": True, "padding_side": side},
    )
    masks = inputs["assistant_masks"].bool()
    said = [llava.tokenizer.decode(ids[mask]) for ids, mask in zip(inputs["input_ids"], masks, strict=True)]
    assert [text.replace(" ", "") for text in said] == ["adog</s>two</s>", "cat</s>"]
    assert not (masks & (inputs["attention_mask"] == 0)).any()
    plain = llava.apply_chat_template(
        [several, one], tokenize=True, return_dict=True, processor_kwargs={"padding": True, "padding_side": side}
    )
    assert torch.equal(plain["input_ids"], inputs["input_ids"])
    assert "assistant_masks" not in plain


def test_masks_without_an_answer_are_zero_and_those_that_cannot_be_are_refused(llava):
    inputs = llava.apply_chat_template(conversation("cat"), **MASKS)
    assert inputs["assistant_masks"].shape == inputs["input_ids"].shape
    assert not inputs["assistant_masks"].any()
    with pytest.raises(ValueError, match="needs a chat template that has"):
        llava.apply_chat_template(conversation("cat"), **MASKS, chat_template="{{ messages[0].content[0].text }}")
    for wrong in ({"tokenize": False}, {"return_dict": False}, {"continue_final_message": True}):
        with pytest.raises(ValueError, match="needs tokenize=True and return_dict=True, and whole messages"):
            llava.apply_chat_template(conversation("cat", "dog"), **MASKS | wrong)


def test_marks_in_a_message_mark_nothing(llava):
    plain = llava.apply_chat_template(conversation("cat dog", "bus"), **MASKS)
    marked = llava.apply_chat_template(conversation(f"cat {GENERATED}dog{ENDED}", "bus"), **MASKS)
    assert torch.equal(plain["input_ids"], marked["input_ids"])
    assert torch.equal(plain["assistant_masks"], marked["assistant_masks"])


@pytest.mark.parametrize("tiled", [False, True])
def test_servers_count_the_tokens_and_views_of_images(llava, tiled):
    grid = {"resize_mode": "tiles", "grid_pinpoints": [[28, 56], [56, 28], [56, 56]]} if tiled else {}
    processor = HfvlmLLaVAProcessor(HfvlmLLaVAImageProcessor(size=28, **grid), llava.tokenizer)
    sizes = [(28, 28), (100, 20), (20, 100), (70, 64)]
    images = [Image.new("RGB", (width, height)) for height, width in sizes]
    found = processor._get_num_multimodal_tokens(image_sizes=sizes)
    inputs = processor(images=images, text=["<image>"] * 4, return_mm_token_type_ids=True, padding=True)
    assert inputs["mm_token_type_ids"].sum(dim=1).tolist() == found["num_image_tokens"]
    assert inputs["pixel_values"].shape[0] == sum(found["num_image_patches"])
    assert (max(found["num_image_patches"]) > 1) is tiled
    asked = processor(images=images[:2], text=["<image>"] * 2, return_text_replacement_offsets=True, padding=True)
    assert [row.tolist() for row in asked.get("image_sizes", [])] == ([[28, 28], [100, 20]] if tiled else [])
    assert isinstance(asked.get("image_sizes", []), list), "a server divides tensors by their views"
    assert processor._get_num_multimodal_tokens()["num_image_tokens"] is None
    with pytest.raises(TypeError, match="without \\['crop'\\]"):
        processor._get_num_multimodal_tokens(image_sizes=sizes, do_normalize=False, crop=1)
    assert processor._get_num_multimodal_tokens(image_sizes=sizes, do_normalize=False) == found


@pytest.mark.parametrize("cls", CHATS)
def test_the_padding_of_a_tokenizer_is_that_of_whole_rows(cls):
    processor = processor_of(cls)
    expected = processor(text=["a b", "a"], padding="max_length", max_length=70)
    processor.tokenizer.call_defaults = {"padding": "max_length", "max_length": 70}
    assert expected["input_ids"].shape == (2, 70)
    assert torch.equal(processor(text=["a b", "a"])["input_ids"], expected["input_ids"])
    assert processor(text="a b", padding=False)["input_ids"].shape[1] < 70


# Those that servers run, whose tokens the small vocabulary has.
EXPANDED = ("LLaVA", "BLIP2", "Shikra", "VideoChatGPT", "PGVideoLLaVA")


@pytest.mark.parametrize("name", EXPANDED)
def test_servers_read_what_each_input_becomes(name):
    """From the replacements, put in the text's place, the tokenizer alone makes the placeholders' ids."""
    processor = processor_of(next(cls for cls in CHATS if cls.__name__ == f"Hfvlm{name}Processor"))
    image, modality = Image.new("RGB", (28, 28)), processor.modality
    media = {"images": [image] * 2} if modality == "image" else {"videos": [[image], [image]]}
    text = f"{processor.media_token}a{processor.media_token} b"
    inputs = processor(text=[text], **media, return_text_replacement_offsets=True)
    (found,) = inputs.pop("text_replacement_offsets")
    assert [each["type"] for each in found] == [modality] * 2
    assert [text[slice(*each["span"])] for each in found] == [processor.media_token] * 2
    whole = text
    for each in reversed(found):
        start, end = each["span"]
        whole = whole[:start] + each["replacement"] + whole[end:]
    assert [whole[slice(*each["new_span"])] for each in found] == [each["replacement"] for each in found]
    ids = processor.tokenizer(found[0]["replacement"], add_special_tokens=False, padding=False)["input_ids"]
    counts = processor._get_num_multimodal_tokens(**sizes(modality))[f"num_{modality}_tokens"]
    assert ids.count(processor.media_token_id) == counts[0]
    expected = processor(text=[text], **media)
    assert inputs["input_ids"].tolist() == expected["input_ids"].tolist()
    assert ",".join(map(str, ids)) in ",".join(map(str, expected["input_ids"][0].tolist()))


def sizes(modality):
    return {"image_sizes": [(28, 28)]} if modality == "image" else {"video_sizes": [(1, 28, 28)]}


def test_the_metadata_of_videos_are_counted():
    processor = processor_of(next(cls for cls in CHATS if cls.__name__ == "HfvlmVideoChatGPTProcessor"))
    video, about = np.zeros((1, 28, 28, 3), np.uint8), {"fps": 1.0, "total_num_frames": 1}
    text = processor.media_token
    plain = processor(text=text, videos=[video])
    assert torch.equal(processor(text=text, videos=[video], video_metadata=[about])["input_ids"], plain["input_ids"])
    with pytest.raises(ValueError, match="video_metadata is of 2 videos, and there are 1"):
        processor(text=text, videos=[video], video_metadata=[about, about])


def test_instructions_are_part_of_images():
    """Which a server would prepare without them."""
    (cls,) = (cls for cls in CHATS if "InstructBLIP" in cls.__name__)
    with pytest.raises(ValueError, match="return_text_replacement_offsets must be False"):
        processor_of(cls)(text="a", return_text_replacement_offsets=True)
