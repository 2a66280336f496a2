import pytest
from PIL import Image

from hfvlm.models.clip import HfvlmCLIPImageProcessor
from hfvlm.models.wukong import HfvlmWukongImageProcessor, HfvlmWukongTokenizer
from tests.support.paths import OURS

VOCABULARY = OURS / "wukong" / "processor-tokenizer" / "vocab.txt"


@pytest.fixture(scope="module")
def tokenizer():
    return HfvlmWukongTokenizer.from_vocabulary(VOCABULARY, model_max_length=12)


def test_texts_are_as_long_as_the_model_was_trained_on(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    for one in (tokenizer, HfvlmWukongTokenizer.from_pretrained(tmp_path)):
        encoded = one(["一只猫", "dog " * 20])
        assert [len(ids) for ids in encoded["input_ids"]] == [12, 12]
        assert encoded["input_ids"][0] == [3, 6, 7, 8, 4, *[0] * 7]
        assert encoded["input_ids"][1] == [3, *[24] * 10, 4]
        assert encoded["attention_mask"][0] == [1] * 5 + [0] * 7
    assert one("dog", padding=False)["input_ids"] == [3, 24, 4]
    assert one.decode([3, 6, 7, 8, 4, 0], skip_special_tokens=True) == "一 只 猫"


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        ("[SEP]", "[SEP]"),
        ("cat [CLS] [UNK]", "cat [CLS] [UNK]"),
        # Chinese characters are words of their own, so what stands next to them is one, too.
        ("猫[SEP]狗", "猫 [SEP] 狗"),
        # Elsewhere brackets and letters are what they are, none of which this vocabulary has.
        ("[SEP]cat", "[UNK] [UNK] [UNK] cat"),
        ("[SEP].", "[UNK] [UNK] [UNK] ."),
        ("[sep]", "[UNK] [UNK] [UNK]"),
        ("[MASK] [PAD]", "[UNK] [UNK] [UNK] [UNK] [UNK] [UNK]"),
        # A character without width is dropped before words are separated.
        ("[SEP]\u200b cat", "[SEP] cat"),
        ("[SEP]\u200bcat", "[UNK] [UNK] [UNK] cat"),
        # So is one that Unicode has not assigned, of which tokenizers' engine makes a letter.
        ("ca\ud7fft", "cat"),
        ("dog\U0002b820dog", "dog [UNK] dog"),
    ],
)
def test_special_tokens_in_a_text_are_those_of_the_original(tokenizer, text, pieces):
    assert tokenizer.tokenize(text) == pieces.split()


def test_images_are_those_of_clip():
    image = Image.radial_gradient("L").convert("RGB").resize((90, 61))
    found, expected = (
        kind(size=32)(image)["pixel_values"] for kind in (HfvlmWukongImageProcessor, HfvlmCLIPImageProcessor)
    )
    assert (found[0] == expected[0]).all()
