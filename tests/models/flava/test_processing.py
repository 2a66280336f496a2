from collections import Counter
from random import Random

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoProcessor, BertTokenizer

from hfvlm.models.flava import HfvlmFLAVAImageProcessor, HfvlmFLAVAProcessor, HfvlmFLAVATokenizer
from hfvlm.models.flava.block_mask import BlockMask
from hfvlm.training.augmentation import RandomResizedCrop
from hfvlm.training.data import Rows
from hfvlm.training.masking import MaskingCollator, draw_words, mask_words, whole_words
from tests.support.suite import close

PIECES = [
    "[PAD]",
    "[UNK]",
    "[CLS]",
    "[SEP]",
    "[MASK]",
    "a",
    "photo",
    "of",
    "cat",
    "##s",
    "dog",
    "red",
    "blue",
    "green",
]


@pytest.fixture
def processor(tmp_path):
    (tmp_path / "vocab.txt").write_text("\n".join(PIECES) + "\n")
    tokenizer = HfvlmFLAVATokenizer.from_vocabulary(tmp_path / "vocab.txt", model_max_length=12)
    sizes = {"size": 32, "codebook_size": 32, "input_size_patches": 4}
    images = HfvlmFLAVAImageProcessor(**sizes, total_mask_patches=6, mask_group_min_patches=2)
    return HfvlmFLAVAProcessor(images, tokenizer)


def sample_image(seed=0, size=(50, 40)):
    return Image.fromarray(np.random.RandomState(seed).randint(0, 256, (size[1], size[0], 3), dtype=np.uint8))


# Masks


@pytest.mark.parametrize("edge", [4, 14])
def test_rectangles_are_hidden_up_to_a_number(edge):
    total = 6 if edge == 4 else 75
    draw = BlockMask(edge, edge, total, least=2 if edge == 4 else 16)
    masks = np.stack([draw(Random(seed)) for seed in range(200)])
    counts = masks.sum(axis=(1, 2))
    assert set(np.unique(masks)) == {0, 1}
    assert counts.max() <= total
    assert counts.mean() > 0.8 * total
    assert (masks.mean(axis=0) > 0).all()
    assert np.array_equal(draw(Random(3)), masks[3])


def test_a_rectangle_adds_no_more_than_its_most():
    draw = BlockMask(10, 10, total=40, least=4, most=8)
    mask, random = np.zeros((10, 10), dtype=np.int64), Random(0)
    before = 0
    while draw.hide(mask, 8, random) and mask.sum() < 60:
        assert 0 < mask.sum() - before <= 8
        before = mask.sum()


def test_nothing_fits_and_nothing_hangs():
    assert BlockMask(2, 2, total=4, least=4)(Random(0)).sum() == 0


def test_whole_words():
    tokens = ["[CLS]", "cat", "##s", "a", "dog", "##s", "##s", "[SEP]", "[PAD]"]
    assert whole_words(tokens) == [[1, 2], [3], [4, 5, 6], [8]]
    random, seen = np.random.default_rng(0), Counter()
    for _ in range(300):
        chosen = set(np.flatnonzero(draw_words(tokens, 0.4, random)))
        assert len(chosen) <= 4
        assert all(set(word) <= chosen or not set(word) & chosen for word in whole_words(tokens))
        seen.update(chosen)
    assert not {0, 7} & set(seen)
    assert {1, 3, 4, 8} <= set(seen)
    assert draw_words(tokens, 0.01, random).sum() in (0, 1)


def test_most_words_are_hidden_some_replaced():
    ids, random = np.full(20_000, 7), np.random.default_rng(0)
    chosen = np.arange(len(ids)) % 2 == 0
    masked, labels = mask_words(ids, chosen, 4, 1000, random)
    assert (labels[chosen] == 7).all()
    assert (labels[~chosen] == -100).all()
    assert (masked[~chosen] == 7).all()
    shares = (masked[chosen] == 4).mean(), (masked[chosen] == 7).mean()
    assert shares == (pytest.approx(0.8, abs=0.02), pytest.approx(0.1, abs=0.02))


# Images


def test_requested_outputs_are_added(processor):
    images = processor.image_processor
    assert set(images(sample_image(), return_tensors="pt")) == {"pixel_values"}
    both = {"return_codebook_pixels": True, "return_image_mask": True}
    made = images([sample_image(), sample_image(1)], mask_seed=5, return_tensors="pt", **both)
    assert made["codebook_pixel_values"].shape == (2, 3, 32, 32)
    extremes = made["codebook_pixel_values"].min(), made["codebook_pixel_values"].max()
    assert extremes == (pytest.approx(0.1, abs=0.05), pytest.approx(0.9, abs=0.05))
    assert made["bool_masked_pos"].shape == (2, 4, 4)
    again = images([sample_image(), sample_image(1)], mask_seed=5, return_tensors="pt", **both)
    assert torch.equal(again["bool_masked_pos"], made["bool_masked_pos"])
    others = [images([sample_image()], return_tensors="pt", **both)["bool_masked_pos"] for _ in range(8)]
    assert any(not torch.equal(other, others[0]) for other in others)
    arrays = processor(images=sample_image(), return_image_mask=True, return_tensors="np")["bool_masked_pos"]
    assert isinstance(arrays, np.ndarray)
    with pytest.raises(ValueError, match="codebook_size must be"):
        HfvlmFLAVAImageProcessor(codebook_size="small")


def test_settings_survive(processor, tmp_path):
    processor.save_pretrained(tmp_path / "saved")
    again = AutoProcessor.from_pretrained(tmp_path / "saved")
    assert type(again) is HfvlmFLAVAProcessor
    assert again.image_processor.total_mask_patches == 6
    assert again.image_processor.codebook_size == {"height": 32, "width": 32}
    alone = HfvlmFLAVAImageProcessor.from_pretrained(tmp_path / "saved")
    assert alone.mask_group_min_patches == 2


def test_pixels_are_those_of_transformers():
    """But for the codebook's, which transformers makes from the image as it comes."""
    from transformers.models.flava.image_processing_pil_flava import FlavaImageProcessorPil

    native, ours = FlavaImageProcessorPil(), HfvlmFLAVAImageProcessor()
    squashed = sample_image(size=(224, 224))
    for image in (squashed, sample_image(size=(300, 200))):
        expected = native(image, return_codebook_pixels=True, return_tensors="pt")
        actual = ours(image, return_codebook_pixels=True, return_tensors="pt")
        close(actual["pixel_values"], expected["pixel_values"].float(), 1e-5, "pixels")
        codebook = actual["codebook_pixel_values"], expected["codebook_pixel_values"].float()
        if image is squashed:
            close(*codebook, 1e-5, "codebook")
        else:
            assert (codebook[0] - codebook[1]).abs().max() > 0.01


# Texts


def test_texts_are_padded_as_in_training(processor, tmp_path):
    tokenizer = processor.tokenizer
    batch = tokenizer(["A photo of CÁTS", "dog"], return_tensors="pt")
    assert batch["input_ids"].shape == (2, 12)
    assert tokenizer.convert_ids_to_tokens(batch["input_ids"][0])[:7] == "[CLS] a photo of cat ##s [SEP]".split()  # noqa: SIM905
    assert batch["attention_mask"].sum(dim=1).tolist() == [7, 3]
    native = BertTokenizer(vocab=tokenizer.get_vocab(), model_max_length=12)
    for text in ("A photo of CÁTS", "dog [MASK] bird", "a " * 30):
        expected = native(text, padding="max_length", truncation=True)["input_ids"]
        assert tokenizer(text)["input_ids"] == expected
    tokenizer.save_pretrained(tmp_path / "saved")
    assert HfvlmFLAVATokenizer.from_pretrained(tmp_path / "saved")("cats dog") == tokenizer("cats dog")


# Batches


def rows(count=64):
    colours = ["red", "blue", "green"]
    return [{"image": sample_image(i), "text": [f"a photo of cats {colours[i % 3]} dog"]} for i in range(count)]


def test_a_batch_of_pairs(processor):
    data = rows()
    collator = MaskingCollator(processor, strangers=data, augment={"image": RandomResizedCrop(32, (0.5, 1.0))})
    read = Rows(data, collator.read, seed=3)
    batch = collator([read[i, 0] for i in range(64)])
    assert batch["pixel_values"].shape == (64, 3, 32, 32)
    assert batch["codebook_pixel_values"].shape == (64, 3, 32, 32)
    assert batch["bool_masked_pos"].shape == (64, 4, 4)
    ids, masked, labels = (batch[name] for name in ("input_ids", "input_ids_masked", "mlm_labels"))
    told = labels >= 0
    assert torch.equal(labels[told], ids[told])
    assert torch.equal(masked[~told], ids[~told])
    assert not told[ids <= 4].any()
    assert told.any()
    pieces = (ids == 8) & (ids.roll(-1, 1) == 9)  # "cat", "##s"
    assert torch.equal(told[pieces], told.roll(-1, 1)[pieces])
    # One text in ten is another row's; of three kinds, a negative of the same kind is not taken.
    strangers = batch["itm_labels"] == 0
    assert 1 <= strangers.sum() <= 16
    colours = torch.tensor([11, 12, 13])[torch.arange(64) % 3]
    own = (ids == colours[:, None]).any(dim=1)
    assert torch.equal(own, ~strangers)
    again = collator([read[i, 0] for i in range(64)])
    assert all(torch.equal(batch[name], again[name]) for name in batch)
    other = collator([read[i, 1] for i in range(64)])
    assert not torch.equal(other["bool_masked_pos"], batch["bool_masked_pos"])
    assert not torch.equal(other["pixel_values"], batch["pixel_values"])


def test_evaluations_hide_the_same(processor):
    data = rows(8)
    collator = MaskingCollator(processor, augment={"image": RandomResizedCrop(32, (0.1, 0.2))})
    read = Rows(data, collator.read)
    batch = collator([read[i] for i in range(8)])
    assert "itm_labels" not in batch
    assert torch.equal(batch["bool_masked_pos"], collator([read[i] for i in range(8)])["bool_masked_pos"])
    expected = processor.image_processor(data[0]["image"], return_codebook_pixels=True, return_tensors="pt")
    assert torch.equal(batch["codebook_pixel_values"][:1], expected["codebook_pixel_values"])
    assert torch.equal(batch["pixel_values"][:1], expected["pixel_values"])


def test_the_codebook_takes_the_crop(processor):
    """In training, at its own size: not the squashed image of the image encoder."""
    crop = RandomResizedCrop(32, (0.5, 0.6))
    collator = MaskingCollator(processor, augment={"image": crop})
    row = Rows(rows(1), collator.read, seed=1)[0, 0]
    assert row["image"].size != (32, 32)
    images = processor.image_processor
    expected = images.codebook_pixels([row["image"]], images.settings_for({}))
    batch = collator([row])
    assert np.array_equal(batch["codebook_pixel_values"].numpy(), expected)
    assert torch.equal(batch["pixel_values"], images(row["image"], return_tensors="pt")["pixel_values"])
    whole = rows(1)[0]["image"]
    box = crop.box(*whole.size, np.random.default_rng(7))
    assert crop.cut(whole, np.random.default_rng(7)).tobytes() == whole.crop(box).tobytes()


def test_batches_of_one_kind(processor):
    collator = MaskingCollator(processor, strangers=rows(2), mlm_probability=0.5)
    texts = Rows([{"text": "a photo of cats"}] * 40, collator.read)
    batch = collator([texts[i, 0] for i in range(40)])
    assert set(batch) >= {"input_ids_masked", "mlm_labels", "attention_mask"}
    assert not {"pixel_values", "bool_masked_pos", "itm_labels"} & set(batch)
    told = batch["mlm_labels"] >= 0
    assert told[:, 1:6].float().mean() == pytest.approx(0.5, abs=0.12)
    first, second = told[:, 4], told[:, 5]  # "cat", "##s", each on its own
    assert not torch.equal(first, second)
    images = Rows([{"image": sample_image()}] * 3, collator.read)
    batch = collator([images[i, 0] for i in range(3)])
    assert {"pixel_values", "codebook_pixel_values", "bool_masked_pos"} <= set(batch)
    assert not {"input_ids", "itm_labels"} & set(batch)


def test_negatives_without_texts_are_passed_over(processor):
    strangers = [{"text": None}, {"text": "red dog"}]
    collator = MaskingCollator(processor, strangers=strangers, itm_probability=1.0)
    read = Rows(rows(3), collator.read)
    batch = collator([read[i] for i in range(3)])
    assert batch["itm_labels"].tolist() == [0, 0, 0]
    texts = processor.tokenizer.batch_decode(batch["input_ids"], skip_special_tokens=True)
    assert texts == ["red dog"] * 3


def test_vocabularies_of_others_are_refused(tmp_path):
    from hfvlm.conversion.flava import processor_for
    from hfvlm.presets import load_preset

    (tmp_path / "vocab.txt").write_text("\n".join(PIECES) + "\n")
    config = load_preset("flava/tiny").make_config()
    with pytest.raises(ValueError, match=r"are \(14, 0\), the model's \(1000, 0\)"):
        processor_for(config, {}, tmp_path / "vocab.txt")
