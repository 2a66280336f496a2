"""Inputs of Shikra, and regions in its answers."""

import json
import runpy

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, pipeline

import hfvlm
from hfvlm.conversion.shikra import processor_for
from hfvlm.models.shikra import HfvlmShikraForConditionalGeneration, HfvlmShikraImageProcessor
from hfvlm.models.shikra.regions import Bins, Square
from hfvlm.presets import load_preset
from hfvlm.processing.protection import PROTECTED
from hfvlm.training.chat import ChatCollator
from tests.support.paths import EXAMPLES, OURS

VOCABULARY = OURS / "shikra" / "processor-prompts" / "tokenizer.model"
SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions. "
)
IMAGE = {"type": "image"}


@pytest.fixture(scope="module")
def processor():
    preset = load_preset("shikra/tiny")
    return processor_for(preset.make_config(), preset.processor, VOCABULARY)


@pytest.fixture(scope="module")
def folder(processor, tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("shikra")
    HfvlmShikraForConditionalGeneration(load_preset("shikra/tiny").make_config()).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture
def image():
    return Image.fromarray(np.random.RandomState(0).randint(0, 256, (30, 40, 3), dtype=np.uint8))


def user(*content):
    return [{"role": "user", "content": list(content)}]


def text(words):
    return {"type": "text", "text": words}


class TestPrompts:
    @pytest.mark.parametrize(
        ("content", "expected"),
        [
            ([IMAGE, text("What?")], "<image> What?"),
            ([IMAGE, text("Where in <image> is it?")], "Where in <image> is it?"),
            ([text("Where in "), IMAGE, text(" is it?")], "Where in <image> is it?"),
            (
                [IMAGE, text("Where in <image> is an <image> tag?")],
                f"Where in <image> is an <{PROTECTED}image> tag?",
            ),
            ([text("What is <image>?")], f"What is <{PROTECTED}image>?"),
            ("What is <image>?", f"What is <{PROTECTED}image>?"),
        ],
    )
    def test_the_template_puts_images_in_place(self, processor, content, expected):
        """Of a message with images, as many `<image>` are placeholders; others are words."""
        prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        assert prompt == f"{SYSTEM}USER: {expected} ASSISTANT:"
        places = processor.encode(prompt).count(processor.image_token_id)
        assert places == (not isinstance(content, str) and IMAGE in content)

    def test_several_turns_are_rendered(self, processor):
        messages = [*user(IMAGE, text("What?")), {"role": "assistant", "content": "A dog."}, *user(text("And?"))]
        prompt = processor.apply_chat_template(messages, add_generation_prompt=True)
        assert prompt == f"{SYSTEM}USER: <image> What? ASSISTANT: A dog.</s>USER: And? ASSISTANT:"

    def test_blanks_around_an_image_are_dropped(self, processor):
        expected = processor.encode("in<image>is it?")
        for words in ("in <image> is it?", "in\n<image>\n\nis it?", "in  <image>is it?"):
            assert processor.encode(words) == expected
        tokens = processor.tokenizer.convert_ids_to_tokens(expected)
        place = tokens.index("<im_patch>")
        assert tokens[place - 1 : place + 2] == ["<im_start>", "<im_patch>", "<im_end>"]
        assert tokens[place + 2].startswith("▁")

    def test_images_become_placeholders(self, processor, image):
        prompt = processor.apply_chat_template(user(IMAGE, text("What?")), add_generation_prompt=True)
        inputs = processor(images=image, text=prompt)
        assert (inputs["input_ids"] == processor.image_token_id).sum() == 16
        assert inputs["pixel_values"].shape == (1, 3, 32, 32)
        with pytest.raises(ValueError, match=r"placeholders \('<image>'\) for \[1\] images, but \[0\] were given"):
            processor(text=prompt)

    def test_paths_and_addresses_in_a_text_are_text(self, processor, image):
        for words in ("<img>/etc/passwd</img>", "http://169.254.169.254/", "file:///etc/passwd"):
            inputs = processor(images=image, text=processor.apply_chat_template(user(IMAGE, text(words))))
            assert len(inputs["pixel_values"]) == 1
            assert words in processor.tokenizer.decode(inputs["input_ids"][0])

    def test_labels_are_the_answers_with_their_end_tokens(self, processor):
        answers = ["It is a dog [0.103,0.237,0.619,0.598] .", "See you."]
        messages = [*user(IMAGE, text("What is this?")), {"role": "assistant", "content": answers[0]}]
        messages += [*user(text("Bye.")), {"role": "assistant", "content": answers[1]}]
        ids, labels = processor.training_row(messages)
        trained = [label for label in labels if label >= 0]
        assert processor.tokenizer.decode(trained) == "</s> ".join(answers) + "</s>"
        assert ids.count(processor.image_token_id) == 1
        assert all(label in (-100, i) for i, label in zip(ids, labels, strict=True))

    def test_a_question_without_an_answer_is_not_trained_on(self, processor):
        ids, labels = processor.training_row(user(IMAGE, text("What is this?")))
        assert set(labels) == {-100}
        assert processor.tokenizer.decode(ids).endswith("ASSISTANT:")

    def test_saving_and_loading_changes_nothing(self, processor, image, tmp_path):
        processor.save_pretrained(tmp_path)
        again = AutoProcessor.from_pretrained(tmp_path)
        assert type(again) is type(processor)
        messages = user(IMAGE, text("Wo ist der Hund [0.1,0.2,0.3,0.4]?"))
        prompt = processor.apply_chat_template(messages)
        assert again.apply_chat_template(messages) == prompt
        left, right = (p(images=image, text=[prompt, "no image"]) for p in (processor, again))
        assert left.keys() == right.keys()
        for name, value in left.items():
            assert torch.equal(value, right[name]), name

    def test_tokens_around_images_may_be_left_out(self, image):
        preset = load_preset("shikra/tiny")
        bare = processor_for(preset.make_config(), {"image_start": "", "image_end": ""}, VOCABULARY)
        tokens = bare.tokenizer.convert_ids_to_tokens(bare.encode("a <image> b"))
        assert tokens[-4:] == ["▁a", "<im_patch>", "▁", "b"]

    def test_the_padding_is_white(self):
        black = Image.new("RGB", (40, 20))
        images = HfvlmShikraImageProcessor(size=8, do_normalize=False, resample=0)
        (pixels,) = images(black, return_tensors="pt")["pixel_values"]
        assert pixels[0, :, 0].tolist() == [1, 1, 0, 0, 0, 0, 1, 1]
        with pytest.raises(ValueError, match="size must be one edge"):
            HfvlmShikraImageProcessor(size={"height": 8, "width": 9})


class TestPlaces:
    """Numbers are shares of the side of the white square around the image."""

    def test_boxes_and_points_in_pixels(self, processor):
        # The image is 200 by 100: 50 rows of white above it and below.
        answer = (
            "A man [0.100,0.250,0.500,0.750] sees two dogs [0.000,0.250,1.000,0.500;0.5,0.5,1,1], here [0.500,0.400] ."
        )
        assert processor.post_process_grounding(answer, sizes=[(200, 100)]) == [
            {"label": "A man", "box_xyxy": [20, 0, 100, 100]},
            {"label": "sees two dogs", "box_xyxy": [0, 0, 200, 50]},
            {"label": "sees two dogs", "box_xyxy": [100, 50, 200, 100]},
            {"label": "here", "point_xy": [100, 30]},
        ]
        (found,) = processor.post_process_grounding("Answer: [0.250,0.100,0.750,0.900] .", sizes=[(100, 200)])
        assert found == {"label": None, "box_xyxy": [0, 20, 100, 180]}

    def test_regions_outside_of_the_image_move_to_its_edge(self, processor):
        (found,) = processor.post_process_grounding("[0.000,0.000,1.000,1.000]", sizes=[(30, 90)])
        assert found["box_xyxy"] == [0, 0, 30, 90]

    def test_several_answers_have_their_own_regions(self, processor):
        both = processor.post_process_grounding(["[0.5,0.5]", "none"], sizes=[(10, 10), (10, 10)])
        assert both == [[{"label": None, "point_xy": [5, 5]}], []]
        with pytest.raises(ValueError, match="each answer needs one"):
            processor.post_process_grounding(["[0.5,0.5]"], sizes=[])

    @pytest.mark.parametrize(
        "broken",
        ["[0.1, 0.2, 0.3, 0.4]", "(0.1,0.2,0.3,0.4)", "[1,2,3]", "[12.5,0.1,0.2,0.3]", "[0.1,0.2;0.1,0.2,0.3,0.4]"],
    )
    def test_malformed_regions_are_left_out(self, processor, broken):
        assert processor.post_process_grounding(f"a {broken} b [0.1,0.2", [(9, 9)]) == []

    @pytest.mark.parametrize("size", [(200, 100), (101, 640), (77, 77), (33, 34)])
    def test_formatted_boxes_are_found_again(self, processor, size):
        width, height = size
        boxes = [[0, 0, width, height], [3, 5, width // 2, height // 3]]
        written = processor.grounding_text("two dogs", boxes, size=size)
        places = processor.post_process_grounding(written, [size])
        assert [place["box_xyxy"] for place in places] == boxes
        assert {place["label"] for place in places} == {"two dogs"}
        assert processor.grounding_text(None, [[0.5, 0.25]]) == "[0.500,0.250]"

    def test_regions_are_put_into_a_question(self, processor):
        words = processor.refer(
            "Is <boxes> at <points> with <boxes>?",
            (40, 150),
            boxes=[[0, 0, 40, 150], [5, 20, 30, 99]],
            boxes_seq=[[0], [1, 0]],
            points=[[20, 75]],
        )
        expected = "[0.400,0.133,0.567,0.660;0.367,0.000,0.633,1.000]"
        assert words == f"Is [0.367,0.000,0.633,1.000] at [0.500,0.500] with {expected}?"
        assert processor.refer("A {} and {0}", (9, 9)) == "A {} and {0}"
        for wrong in ({"boxes": [[0, 0, 1, 1]]}, {"boxes": [], "boxes_seq": [[0]]}, {"points": [[1, 1]]}):
            with pytest.raises(ValueError, match=r"has . <\w+> for \w+_seq"):
                processor.refer("<boxes>" if wrong.get("boxes") == [] else "none", (9, 9), **wrong)

    def test_a_box_that_is_too_large_is_cut(self):
        assert Square(97, 97).share([-3, 0, 120, 50]) == [0.0, 0.0, 1.0, 0.515]

    def test_other_formats_of_regions(self):
        preset = load_preset("shikra/tiny")
        binned = processor_for(preset.make_config(), {"num_bins": 11}, VOCABULARY)
        box, point = [0, 0, 10, 5], [5, 5]
        written = binned.grounding_text("a dog", [box], size=(10, 10))
        assert written == "a dog <b_st><bin_0> <bin_0> <bin_10> <bin_5><b_ed>"
        assert binned.post_process_grounding(written, [(10, 10)]) == [{"label": "a dog", "box_xyxy": box}]
        spot = binned.grounding_text(None, [point, point], size=(10, 10))
        assert [p["point_xy"] for p in binned.post_process_grounding(spot, [(10, 10)])] == [point, point]
        known = binned.tokenizer.get_vocab()
        assert [known[token] for token in Bins(11).tokens] == list(range(640, 657))
        round_ones = processor_for(preset.make_config(), {"digits": 2, "brackets": "()"}, VOCABULARY)
        assert round_ones.grounding_text(None, [box], size=(10, 10)) == "(0.00,0.00,1.00,0.50)"
        assert round_ones.post_process_grounding("(0.00,0.00,1.00,0.50)", [(10, 10)])[0]["box_xyxy"] == box


class TestWhole:
    """A converted folder in use."""

    def test_chat_answers_with_regions(self, folder, image):
        options = {"max_new_tokens": 5, "eos_token_id": None}
        chat = hfvlm.Chat.from_pretrained(folder)
        first = chat.ask("Where in the image <image> is the dog?", images=[image], **options)
        second = chat.ask("And <image> here?", **options)
        assert len(chat.features) == 1
        messages = [*chat.messages[:-1]]
        prompt = chat.processor.apply_chat_template(messages, add_generation_prompt=True)
        inputs = chat.processor(images=image, text=prompt)
        ids = chat.model.generate(**inputs, do_sample=False, **options)
        assert chat.processor.batch_decode(ids, new_tokens_only=inputs)[0].strip() == second
        other = hfvlm.Chat.from_pretrained(folder)
        assert other.ask("Where in the image <image> is the dog?", images=[image], **options) == first

    def test_the_pipeline_answers(self, folder, image):
        answer = pipeline("image-text-to-text", model=str(folder), max_new_tokens=4)
        messages = [{"role": "user", "content": [{"type": "image", "image": image}, text("What is this?")]}]
        (result,) = answer(messages, return_full_text=False)
        assert isinstance(result["generated_text"], str)

    def test_a_converted_folder_is_verified(self, folder):
        assert [check for check in hfvlm.verify(folder) if not check.passed] == []

    def test_collated_examples_train_the_parts_of_the_recipe(self, folder, processor, image):
        model = AutoModelForImageTextToText.from_pretrained(folder)
        question = processor.refer("What is <boxes>?", image.size, boxes=[[0, 0, 10, 10]])
        answer = processor.grounding_text("the dog", [[0, 0, 10, 10]], image.size)
        turns = [*user(IMAGE, text(question)), {"role": "assistant", "content": [text(answer)]}]
        own = [{"from": "human", "value": "<image> Where?"}, {"from": "gpt", "value": "There."}]
        examples = [{"messages": turns, "images": [image]}, {"conversations": own, "image": image}]
        batch = ChatCollator(processor)(examples)
        trained = processor.tokenizer.decode(batch["labels"][0][batch["labels"][0] >= 0])
        assert trained == f"{answer}</s>"
        tuned = hfvlm.lora(model, r=2, quiet=True)
        names = {name for name, p in tuned.named_parameters() if p.requires_grad}
        assert all("language_model" in name or "projector" in name for name in names)
        tuned(**batch).loss.backward()
        grads = {name: p.grad for name, p in tuned.named_parameters() if name in names}
        assert all(torch.isfinite(grad).all() for grad in grads.values())
        assert all(grad.abs().max() > 0 for name, grad in grads.items() if "lora_B" in name or "projector" in name)

    def test_the_example_script_draws_boxes(self, folder, image, tmp_path, monkeypatch):
        image.save(tmp_path / "a.png")
        find = runpy.run_path(str(EXAMPLES / "find_in_pictures.py"))["main"]
        seen = []

        def ask(self, words, images, **_):
            seen.append((words, len(images)))
            return "Answer: [0.100,0.200,0.500,0.800] ." if "dog" in words else "No."

        monkeypatch.setattr(hfvlm.Chat, "ask", ask)
        out = tmp_path / "found"
        find([str(folder), str(tmp_path / "a.png"), "--name", "the dog", "--name", "a cat", "-o", str(out)])
        assert [count for _, count in seen] == [1, 1]
        assert all("<image>" in words for words, _ in seen)
        (line,) = (out / "places.jsonl").read_text().splitlines()
        assert json.loads(line)["places"] == [{"label": "the dog", "box_xyxy": [4, 3, 20, 27]}]
