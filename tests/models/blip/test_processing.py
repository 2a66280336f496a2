"""Texts, prompts and labels; interop with transformers; the pipelines. Pixels and ids are compared by the goldens."""

import json

import pytest
import torch
from PIL import Image
from transformers import (
    AutoModel,
    AutoProcessor,
    BlipConfig,
    BlipForConditionalGeneration,
    BlipForImageTextRetrieval,
    BlipForQuestionAnswering,
    BlipModel,
    pipeline,
)

import hfvlm
from hfvlm.checkpoints.key_table import restore_keys
from hfvlm.checkpoints.originals import UnsupportedOriginalError
from hfvlm.conversion import blip
from hfvlm.models.blip import HfvlmBLIPConfig, HfvlmBLIPImageProcessor, HfvlmBLIPProcessor, HfvlmBLIPTokenizer
from hfvlm.modules.context import Context
from tests.support.suite import close, same

PIECES = [
    "[PAD]",
    "[UNK]",
    "[CLS]",
    "[SEP]",
    "[MASK]",
    "a",
    "picture",
    "of",
    "cat",
    "dog",
    "##s",
    "what",
    "?",
    "30",
    "9",
]
SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
RED, BLUE = Image.new("RGB", (40, 30), "red"), Image.new("L", (20, 50), 90)


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory):
    path = tmp_path_factory.mktemp("vocabulary") / "vocab.txt"
    path.write_text("\n".join(PIECES) + "\n")
    return path


@pytest.fixture
def processor(vocabulary):
    tokenizer = HfvlmBLIPTokenizer.from_vocabulary(vocabulary, clean="caption", model_max_length=8)
    return HfvlmBLIPProcessor(HfvlmBLIPImageProcessor(size=16), tokenizer, prompt="a picture of ")


def test_images_alone_come_with_the_prompt(processor):
    inputs = processor(images=[RED, BLUE])
    assert inputs["input_ids"].tolist() == [[2, 5, 6, 7, 3]] * 2
    assert inputs["pixel_values"].shape == (2, 3, 16, 16)
    processor.prompt = ""
    assert set(processor(images=RED)) == {"pixel_values"}
    assert set(processor(text="a cat")) == {"input_ids", "attention_mask"}


def test_pairs_of_images(processor):
    pairs = processor(images=[[RED, BLUE], [BLUE, BLUE]], text=["a cat", "dogs"])["pixel_values"]
    assert pairs.shape == (2, 2, 3, 16, 16)
    assert torch.equal(pairs[1, 0], pairs[0, 1])
    with pytest.raises(ValueError, match="as many images"):
        processor(images=[[RED, BLUE], [BLUE]], text=["a cat", "dogs"])


def test_captions_do_not_learn_their_prompt(processor):
    inputs = processor.captions([RED, BLUE], ["Dogs.", "a cat"])
    assert inputs["input_ids"].tolist() == [[2, 5, 6, 7, 9, 10, 3], [2, 5, 6, 7, 5, 8, 3]]
    assert inputs["labels"].tolist() == [[-100] * 4 + [9, 10, 3], [-100] * 4 + [5, 8, 3]]
    assert processor.decode_captions(inputs["input_ids"]) == ["dogs", "a cat"]


def test_answers_are_taken_as_they_are(processor):
    """The original cleans questions and not answers: there, a colon would vanish."""
    processor.tokenizer.clean = "question"
    assert processor.answers(["9", "a dog?"]).tolist() == [[2, 14, 3, -100, -100], [2, 5, 9, 12, 3]]
    assert processor.answers(["30:9"])[0, 2] == 1
    assert processor.tokenizer.clean == "question"


def test_words_are_counted_before_pieces(vocabulary):
    tokenizer = HfvlmBLIPTokenizer.from_vocabulary(vocabulary, clean="caption", max_words=2)
    assert tokenizer(["Dogs! a cat", "a"])["input_ids"] == [[2, 9, 10, 5, 3], [2, 5, 3, 0, 0]]


def test_the_processor_survives_a_round_trip(processor, tmp_path):
    processor.save_pretrained(tmp_path)
    again = AutoProcessor.from_pretrained(tmp_path)
    assert type(again) is HfvlmBLIPProcessor
    assert again.prompt == "a picture of "
    texts = ["Dogs! [ENC] cat", "a"]
    assert again(images=RED, text=texts)["input_ids"].tolist() == processor(text=texts)["input_ids"].tolist()
    assert again.tokenizer.bos_token_id == 15
    assert again.tokenizer.convert_tokens_to_ids("[ENC]") == 16


def test_another_vocabulary_is_refused(vocabulary, tmp_path):
    config = native_config(BlipForConditionalGeneration)
    config = blip.config_from_original(config.to_dict() | {"architectures": ["BlipForConditionalGeneration"]}, {})
    other = tmp_path / "vocab.txt"
    other.write_text("\n".join(PIECES[:-1]))
    blip.processor_for(config, {}, vocabulary)
    with pytest.raises(ValueError, match=r"\(16, 14, 3\), the model's \(17, 15, 3\).*another model"):
        blip.processor_for(config, {}, other)
    other.write_text("a\nb")
    with pytest.raises(ValueError, match=r"no \[CLS\]"):
        blip.processor_for(config, {}, other)


NATIVES = (BlipForConditionalGeneration, BlipForQuestionAnswering, BlipForImageTextRetrieval)


def native_config(kind) -> BlipConfig:
    text = SIZES | {"vocab_size": 17, "max_position_embeddings": 12, "bos_token_id": 15, "sep_token_id": 3}
    vision = SIZES | {"image_size": 16, "patch_size": 8, "layer_norm_eps": 1e-5}
    return BlipConfig(
        architectures=[kind.__name__],
        text_config=text | {"eos_token_id": 3},
        vision_config=vision,
        image_text_hidden_size=16,
        label_smoothing=0.1,
    )


def native_folder(kind, folder, vocabulary):
    native = kind(native_config(kind)).eval()
    for parameter in native.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    native.save_pretrained(folder)
    (folder / "vocab.txt").write_text(vocabulary.read_text())
    return native


def outputs(native, ours, ids, mask, pixels):
    """The same quantities of both."""
    if isinstance(native, BlipForConditionalGeneration):
        begun = ours.begin(ids, mask)
        return native(pixels, begun, mask).logits, ours(pixels, ids, mask).logits
    if isinstance(native, BlipForQuestionAnswering):
        # transformers leaves [CLS] where the original has [ENC].
        start, tokens = torch.tensor([[15, 5], [15, 6]]), ours.vision_model(pixels).last_hidden_state
        theirs = native.text_encoder(ids, mask, encoder_hidden_states=native.vision_model(pixels).last_hidden_state)
        mine = ours.text_model(ids, mask, Context(tokens)).last_hidden_state
        # transformers' decoder attends to a question's padding even where a mask hides it.
        read = {"encoder_hidden_states": theirs.last_hidden_state, "encoder_attention_mask": None}
        return native.text_decoder(start, **read).logits, ours.text_decoder(start, None, Context(mine)).logits
    theirs = native(ids, pixels, attention_mask=mask, use_itm_head=False).itm_score
    return theirs, ours(ids, pixels, mask).logits_per_image


@pytest.mark.parametrize("kind", NATIVES, ids=lambda kind: kind.__name__)
def test_folders_go_both_ways(kind, vocabulary, tmp_path):
    (tmp_path / "native").mkdir()
    native = native_folder(kind, tmp_path / "native", vocabulary)
    folder = hfvlm.convert(tmp_path / "native", "blip", tmp_path / "ours")
    ours = AutoModel.from_pretrained(folder).eval()
    assert type(ours).__name__ == "Hfvlm" + kind.__name__.replace("Blip", "BLIP")
    ids = torch.tensor([[2, 5, 8, 3, 0], [2, 5, 9, 10, 3]])
    batch = ids, (ids != 0).long(), torch.randn(2, 3, 16, 16, dtype=torch.float64)
    ours.save_pretrained(folder)
    with torch.no_grad():
        theirs, mine = outputs(native.double(), ours.double(), *batch)
    close(mine, theirs, 1e-9, "converted")
    hfvlm.export(folder, tmp_path / "back")
    again, info = kind.from_pretrained(tmp_path / "back", output_loading_info=True)
    assert not any(info.values()), info
    assert json.loads((tmp_path / "back" / "config.json").read_text())["architectures"] == [kind.__name__]
    for key, value in native.float().state_dict().items():
        assert torch.equal(again.state_dict()[key], value), key
    with torch.no_grad():
        close(outputs(again.double().eval(), ours, *batch)[0], theirs, 1e-9, "exported")
    texts = ["a picture of dogs", "what?"]
    exported, ours = AutoProcessor.from_pretrained(tmp_path / "back"), AutoProcessor.from_pretrained(folder)
    left, right = exported(images=[RED, RED], text=texts, padding=True, return_tensors="pt"), ours([RED, RED], texts)
    assert torch.equal(left["input_ids"], right["input_ids"])
    close(left["pixel_values"], right["pixel_values"], 1e-5, "pixels")


def test_natives_that_are_no_release_are_refused(tmp_path):
    BlipModel(native_config(BlipModel)).save_pretrained(tmp_path / "native")
    with pytest.raises(UnsupportedOriginalError, match="'BlipModel'.*no model that BLIP's authors released"):
        hfvlm.convert(tmp_path / "native", "blip", tmp_path / "ours", vocabulary="none")
    config = hfvlm.load_preset("blip/model_base").make_config()
    with pytest.raises(UnsupportedOriginalError, match="transformers has no BLIP like HfvlmBLIPForPreTraining"):
        blip.CONVERSION.export.config(config)


@pytest.mark.parametrize("kind", NATIVES[:2], ids=lambda kind: kind.__name__)
def test_stock_pipelines_generate(kind, vocabulary, tmp_path):
    (tmp_path / "native").mkdir()
    native_folder(kind, tmp_path / "native", vocabulary)
    folder = hfvlm.convert(tmp_path / "native", "blip", tmp_path / "ours")
    write = pipeline("image-text-to-text", model=str(folder))
    text = write(RED, text="a picture of", max_new_tokens=3, return_full_text=False)[0]["generated_text"]
    model, processor = AutoModel.from_pretrained(folder).eval(), AutoProcessor.from_pretrained(folder)
    ids = model.generate(**processor(images=RED, text="a picture of"), max_new_tokens=3)
    whole = processor.batch_decode(ids, skip_special_tokens=True)[0]
    assert text == whole.removeprefix("a picture of")
    two = write([RED, BLUE], text=["a cat", "a picture of"], max_new_tokens=2)
    assert len(two) == 2


HEADS = (
    "HfvlmBLIPModel",
    "HfvlmBLIPForConditionalGeneration",
    "HfvlmBLIPForQuestionAnswering",
    "HfvlmBLIPForImageTextRetrieval",
    "HfvlmBLIPForVisualReasoning",
    "HfvlmBLIPForPreTraining",
)


@pytest.mark.parametrize("head", HEADS)
def test_released_files_become_verified_folders(head, vocabulary, tmp_path):
    """A file in the original's layout, as its authors saved it: a dictionary with the tensors under "model"."""
    torch.manual_seed(0)
    joint = 16 if head in (HEADS[0], HEADS[3], HEADS[5]) else None
    tokens = {"vocab_size": 17, "max_position_embeddings": 24} | blip.special_tokens(17, 3)
    config = HfvlmBLIPConfig(
        architectures=[head],
        vision_config=SIZES | {"image_size": 16, "patch_size": 8, "projection_dim": joint, "initializer_range": 0.3},
        text_config=SIZES | tokens | {"context_size": 32, "projection_dim": joint, "initializer_range": 0.3},
        queue_size=8,
    )
    model = AutoModel.from_config(config)
    state = restore_keys(model.state_dict(), blip.keys_for(config))
    torch.save({"model": state, "optimizer": {}, "epoch": 3}, tmp_path / "model.pth")
    arguments = {"med_config": {"num_attention_heads": 2}, "create_vit_override": {"num_heads": 2}}
    folder = hfvlm.convert(
        tmp_path / "model.pth",
        "blip",
        tmp_path / "ours",
        original={"arguments": arguments | {"prompt": "a picture of "}, "sep_token_id": 3},
        vocabulary=vocabulary,
    )
    again = AutoModel.from_pretrained(folder)
    assert type(again).__name__ == head
    same(again.state_dict(), model.state_dict(), exact=True)
    assert AutoProcessor.from_pretrained(folder).prompt == "a picture of "
    checks = hfvlm.verify(folder)
    assert all(check.passed for check in checks), [check for check in checks if not check.passed]
