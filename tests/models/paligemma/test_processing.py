"""Inputs of PaliGemma, and boxes and masks in its answers."""

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModel, AutoModelForImageTextToText, AutoProcessor

import hfvlm
from hfvlm.models.paligemma import (
    HfvlmPaliGemmaImageProcessor,
    HfvlmPaliGemmaMaskConfig,
    HfvlmPaliGemmaProcessor,
    HfvlmPaliGemmaTokenizer,
)
from hfvlm.models.paligemma.regions import crop_mask, find, format_box, format_mask, mask_overlap, paste_mask
from hfvlm.processing.assembly import IGNORE
from hfvlm.training.chat import ChatCollator
from tests.support.paths import OURS

VOCABULARY = OURS / "paligemma" / "processor-text" / "base.model"


@pytest.fixture(scope="module")
def processor():
    tokenizer = HfvlmPaliGemmaTokenizer.from_vocabulary(VOCABULARY)
    return HfvlmPaliGemmaProcessor(HfvlmPaliGemmaImageProcessor(size=28), tokenizer)


@pytest.fixture
def image():
    return Image.fromarray(np.random.RandomState(0).randint(0, 256, (30, 40, 3), dtype=np.uint8))


def words(processor, ids):
    return processor.tokenizer.decode(ids)


class TestTexts:
    def test_images_come_before_the_start_token(self, processor, image):
        inputs = processor(images=[image, image], text="<image><image>caption en")
        ids = inputs["input_ids"][0].tolist()
        assert ids[:8] == [processor.image_token_id] * 8
        assert words(processor, ids[8:]) == "<s>caption en\n"
        assert inputs["pixel_values"].shape == (2, 3, 28, 28)
        assert processor(images=image, text="<image>caption en\n")["input_ids"].tolist() == [ids[4:]]

    def test_an_image_after_words_is_refused(self, processor, image):
        with pytest.raises(ValueError, match="images come first"):
            processor(images=image, text="caption <image> en")

    def test_images_alone_are_captioned(self, processor, image):
        for images, count in ((image, 1), ([image, image], 2)):
            ids = processor(images=images)["input_ids"]
            assert len(ids) == count
            assert words(processor, ids[0][4:]) == "<s>caption en\n"

    def test_answers_become_labels(self, processor, image):
        inputs = processor(images=[image] * 2, text=["<image>ocr", "<image>answer en"], suffix=["a", "a longer one"])
        for ids, labels, answer in zip(inputs["input_ids"], inputs["labels"], ("a", "a longer one"), strict=True):
            trained = labels != IGNORE
            assert words(processor, labels[trained]) == f"{answer}</s>"
            assert torch.equal(ids[trained], labels[trained])
            assert bool(trained[-1])  # padded on the left
        right = processor(
            images=image, text="<image>ocr", suffix="a", padding="max_length", max_length=20, padding_side="right"
        )
        assert right["labels"].shape == right["input_ids"].shape == (1, 20)
        assert right["labels"][0, -1] == IGNORE
        with pytest.raises(ValueError, match="2 texts, and suffix has 1"):
            processor(images=[image] * 2, text=["<image>a", "<image>b"], suffix=["a"])

    def test_conversations_have_one_answer(self, processor, image):
        question = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "ocr"}]}
        answer = {"role": "assistant", "content": "a"}
        batch = ChatCollator(processor)([{"messages": [question, answer], "images": [image]}])
        assert words(processor, batch["input_ids"][0][4:]) == "<s>ocr\na</s>"
        for others in ([question, answer, question], [answer], [{"role": "system", "content": "a"}, question]):
            with pytest.raises(Exception, match="one message of the user"):
                processor.apply_chat_template(others)

    def test_special_tokens_that_somebody_typed_are_words(self, processor, image):
        content = [{"type": "image"}, {"type": "text", "text": "what is <image> and <s>?"}]
        ids = processor(images=image, text=processor.apply_chat_template([{"role": "user", "content": content}]))
        assert (ids["input_ids"] == processor.image_token_id).sum() == 4
        assert (ids["input_ids"] == processor.tokenizer.bos_token_id).sum() == 1

    def test_saving_and_loading_changes_nothing(self, processor, image, tmp_path):
        processor.save_pretrained(tmp_path)
        again = AutoProcessor.from_pretrained(tmp_path)
        assert type(again) is type(processor)
        text = "<image>detect cat <loc0003><seg005>"
        for left, right in zip(
            processor(images=image, text=text).values(), again(images=image, text=text).values(), strict=True
        ):
            assert torch.equal(left, right)
        assert again.tokenizer.convert_tokens_to_ids("<loc0003>") == 403

    def test_the_tokenizer_of_the_language_model_alone(self):
        tokenizer = HfvlmPaliGemmaTokenizer.from_vocabulary(VOCABULARY, regions=False)
        assert len(tokenizer) == 400
        assert tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id

    def test_images_are_bilinear(self, image):
        with pytest.raises(ValueError, match="resample must be 2"):
            HfvlmPaliGemmaImageProcessor(resample=3)
        exact = HfvlmPaliGemmaImageProcessor(size=20)(image, return_tensors="pt")["pixel_values"]
        cut = HfvlmPaliGemmaImageProcessor(size=20, whole=True)(image, return_tensors="pt")["pixel_values"]
        steps = (exact - cut) * 127.5
        assert steps.min() > -1e-3
        assert steps.max() < 1.001


class TestBoxes:
    ANSWER = "<loc0000><loc0000><loc1023><loc0512> a cat ; <loc0100><loc0200><loc0300><loc0400> dog"

    def test_boxes_in_pixels(self, processor):
        found = processor.post_process_grounding(self.ANSWER, sizes=[(1023, 2046)])
        assert [region["label"] for region in found] == ["a cat", "dog"]
        assert found[0]["box_xyxy"] == pytest.approx([0, 0, 512, 2046])
        assert found[1]["box_xyxy"] == pytest.approx([200, 200, 400, 600])

    def test_formatted_boxes_are_found_again(self, processor):
        text = processor.grounding_text("cat", [[10, 20, 30, 40], [0, 0, 100, 200]], (100, 200))
        assert text.count(" ; ") == 1
        found = processor.post_process_grounding(text, [(100, 200)])
        assert [region["label"] for region in found] == ["cat", "cat"]
        for region, box in zip(found, ([10, 20, 30, 40], [0, 0, 100, 200]), strict=True):
            assert region["box_xyxy"] == pytest.approx(box, abs=0.11)

    @pytest.mark.parametrize(
        "broken",
        [
            "<loc0001><loc0002><loc0003>",
            "<loc0005><loc0005><loc0005><loc0009> thin",
            "<loc0009><loc0009><loc0001><loc0020> upside down",
            "<loc2000><loc0000><loc2001><loc0020> beyond",
            "<loc0000><loc0000><loc0020><loc0020><seg001> half a mask",
            "nothing",
        ],
    )
    def test_malformed_regions_are_left_out(self, processor, broken):
        assert processor.post_process_grounding(broken, [(9, 9)]) == []

    def test_an_answer_box(self, processor):
        assert processor.answered_box(self.ANSWER, (1023, 1023)) == pytest.approx([0, 0, 512, 1023])
        assert processor.answered_box("none", (10, 10)) is None
        assert processor.locating("the dog") == "<image>detect the dog\n"


class TestMasks:
    @pytest.fixture(scope="class")
    @classmethod
    def model(cls):
        torch.manual_seed(0)
        return AutoModel.from_config(HfvlmPaliGemmaMaskConfig()).eval()

    def test_masks_there_and_back(self, processor, model):
        codes = list(range(16))
        text = f"{format_box([0.1, 0.2, 0.6, 0.9])}{format_mask(codes)} cat ; <loc0000><loc0000><loc1023><loc0512> dog"
        (region,) = processor.post_process_masks(text, (50, 30), model)
        assert (region["label"], region["mask_codes"], region["mask"].shape) == ("cat", codes, (30, 50))
        (match, _) = find(text)
        inside = paste_mask(model.decode_codes(torch.tensor([codes]))[0], match.box, (50, 30))
        assert np.array_equal(inside, region["mask"])
        assert not region["mask"][:2].any()
        assert not region["mask"][:, :9].any()
        assert len(processor.post_process_grounding(text, [(50, 30)])) == 2
        assert processor.post_process_masks("<loc0000><loc0000><loc1023><loc0512> dog", (50, 30), model) == []

    def test_boxes_thinner_than_a_pixel_have_no_mask(self, model):
        assert paste_mask(torch.ones(64, 64), (0, 0, 10, 1000), (20, 20)) is None
        assert mask_overlap(None, np.ones((2, 2), dtype=bool)) == 0

    def test_a_crop_holds_what_is_in_the_box(self):
        mask = np.zeros((40, 60), dtype=bool)
        mask[10:20, 30:45] = True
        assert (crop_mask(mask, [0.25, 0.5, 0.5, 0.75]) == 1).all()
        assert crop_mask(mask, [0, 0, 1, 1]).mean() == pytest.approx(150 / 2400, abs=1e-3)
        assert torch.equal(crop_mask(mask, [0, 0, 1, 1]), crop_mask(mask.astype(np.uint8) * 255, [0, 0, 1, 1]))
        with pytest.raises(ValueError, match="has none of the mask"):
            crop_mask(mask, [0.5, 0.5, 0.5, 0.75])

    def test_codes_are_checked(self):
        with pytest.raises(ValueError, match="16 codes below 128"):
            format_mask([1, 2])
        with pytest.raises(ValueError, match="16 codes below 128"):
            format_mask([128] * 16)


def test_an_untrained_model_answers(tmp_path, image):
    folder = hfvlm.untrained("paligemma", tmp_path / "model")
    model, processor = AutoModelForImageTextToText.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
    assert model.config.image_token_id == processor.image_token_id == model.config.text_config.vocab_size
    texts = hfvlm.Captioner(model, processor)([image, image], max_new_tokens=3)
    assert len(texts) == 2
