"""Texts in which images come first, and boxes in shares of an image."""

import pytest

from hfvlm.models.paligemma import HfvlmPaliGemmaImageProcessor, HfvlmPaliGemmaProcessor, HfvlmPaliGemmaTokenizer
from hfvlm.processing.image_patches import box_in_pixels
from hfvlm.processing.vocabularies import VocabularyError, add_placeholders, sentencepiece
from tests.support.paths import OURS

VOCABULARY = OURS / "paligemma" / "processor-text" / "base.model"


@pytest.fixture(scope="module")
def processor():
    tokenizer = HfvlmPaliGemmaTokenizer.from_vocabulary(VOCABULARY)
    return HfvlmPaliGemmaProcessor(HfvlmPaliGemmaImageProcessor(size=28), tokenizer)


def test_each_patch_is_a_token(processor):
    assert processor.count_tokens([(30, 40), (5, 5)]) == [4, 4]


def test_images_are_counted_before_the_words(processor):
    assert processor.divided("<image><image>ocr") == (2, "ocr")
    assert processor.divided(" <image> ocr") == (1, " ocr")
    assert processor.divided(" ocr") == (0, " ocr")
    with pytest.raises(ValueError, match="images come first in PaliGemma's texts, <image> before words"):
        processor.divided("<image>what is <image>?")


def test_images_without_a_text_are_captioned(processor):
    assert processor.asking([1, 2], None) == ["<image>caption en"] * 2
    assert processor.asking(object(), None) == "<image>caption en"
    assert processor.asking([1, 2], ["a", "b"]) == ["a", "b"]
    with pytest.raises(ValueError, match="2 texts, and suffix has 1: each text has one answer"):
        processor.answers_to(2, "an answer")


def test_a_box_and_back(processor):
    box = box_in_pixels([0.5, 0.25, 1.0, 0.75], (40, 20))
    assert box == [10.0, 10.0, 30.0, 20.0]
    text = processor.grounding_text("dog", [box], (40, 20))
    (found,) = processor.regions(text, (40, 20))
    assert found["label"] == "dog"
    assert found["box_xyxy"] == pytest.approx(box, abs=0.05)


def test_placeholders_come_after_the_table_s_rows():
    engine = sentencepiece(VOCABULARY)
    pieces = engine.get_vocab_size()
    add_placeholders(engine, VOCABULARY, pieces + 2, "<film>", "<image>")
    assert [engine.token_to_id(token) for token in ("<film>", "<image>")] == [pieces + 2, pieces + 3]
    assert engine.id_to_token(pieces) == f"<unused_{pieces}>"
    with pytest.raises(VocabularyError, match=f"its {pieces} pieces are more than the model's {pieces - 1}"):
        add_placeholders(sentencepiece(VOCABULARY), VOCABULARY, pieces - 1, "<image>")
