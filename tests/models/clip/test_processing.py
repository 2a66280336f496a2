"""Tokenizers of open_clip's text towers next to OpenAI's."""

import json

import pytest
from tokenizers import Tokenizer, models
from transformers import AutoTokenizer

from hfvlm.conversion.clip import CONVERSION
from hfvlm.conversion.processors import special_tokens
from hfvlm.models.clip import (
    HfvlmCLIPATokenizer,
    HfvlmCLIPConfig,
    HfvlmCLIPNLLBTokenizer,
    HfvlmCLIPPaddedTokenizer,
    HfvlmCLIPProcessor,
    HfvlmCLIPRobertaTokenizer,
    HfvlmCLIPTokenizer,
    HfvlmCLIPXLMTokenizer,
)
from hfvlm.processing.vocabularies import VocabularyError, byte_letters
from tests.conftest import SHIPPED
from tests.models.clip.test_modeling import TEXT, VISION
from tests.models.clip.test_trunks import NLLB, ROBERTA
from tests.support.golden import OURS

TEXTS = ["a photo of a cat", "&lt;s&gt; [SEP] cat </s>  dog", ""]


@pytest.fixture
def roberta(tmp_path):
    """GPT-2's letters and two merges, with fairseq's tokens."""
    pieces = ["<s>", "<pad>", "</s>", "<unk>", *byte_letters().values(), "ca", "cat", "<mask>"]
    (tmp_path / "vocab.json").write_text(json.dumps({piece: i for i, piece in enumerate(pieces)}))
    (tmp_path / "merges.txt").write_text("#version: 0.2\nc a\nca t\n")
    return HfvlmCLIPRobertaTokenizer.from_vocabulary(tmp_path / "vocab.json")


@pytest.fixture
def nllb(tmp_path):
    pieces = ["<s>", "<pad>", "</s>", "<unk>", *"catdog", "eng_Latn", "deu_Latn", "<mask>"]
    engine = Tokenizer(models.BPE({piece: i for i, piece in enumerate(dict.fromkeys(pieces))}, [], unk_token="<unk>"))
    engine.add_special_tokens(["eng_Latn", "deu_Latn"])
    engine.save(str(tmp_path / "tokenizer.json"))
    return HfvlmCLIPNLLBTokenizer.from_vocabulary(tmp_path / "tokenizer.json")


@pytest.fixture
def clipa():
    return HfvlmCLIPATokenizer.from_vocabulary(OURS / "clip/processor-tokenizer-clipa/vocab.txt")


@pytest.fixture
def xlm():
    return HfvlmCLIPXLMTokenizer.from_vocabulary(OURS / "clip/processor-tokenizer-xlm/sentencepiece.bpe.model")


@pytest.mark.parametrize("name", ["roberta", "nllb", "clipa", "xlm"])
def test_save_and_load(name, request, tmp_path):
    tokenizer = request.getfixturevalue(name)
    expected = tokenizer(TEXTS)
    tokenizer.save_pretrained(tmp_path / "saved")
    again = AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert type(again) is type(tokenizer)
    assert again(TEXTS).data == expected.data
    assert type(tokenizer).from_vocabulary(tmp_path / "saved" / "tokenizer.json")(TEXTS).data == expected.data


def test_roberta_puts_texts_between_its_tokens(roberta):
    ids = roberta(" cat cat")["input_ids"]
    assert roberta.convert_ids_to_tokens(ids) == ["<s>", "cat", "Ġ", "cat", "</s>"]


def test_nllb_begins_with_the_language(nllb):
    english = nllb("cat")["input_ids"]
    nllb.set_language("deu_Latn")
    german = nllb("cat")["input_ids"]
    assert nllb.convert_ids_to_tokens([english[0], german[0]]) == ["eng_Latn", "deu_Latn"]
    assert english[1:] == german[1:]
    assert german[-1] == nllb.eos_token_id
    with pytest.raises(ValueError, match="'xyz' is none of this vocabulary"):
        nllb.set_language("xyz")


def test_clipa_is_padded_to_its_full_length_on_the_right(clipa):
    assert len(clipa("a cat", padding=True)["input_ids"]) == 32
    assert len(clipa("a cat " * 40, max_length=64)["input_ids"]) == 32
    with pytest.raises(ValueError, match="padding_side must be 'right'"):
        clipa("a cat", padding_side="left")


def test_other_vocabularies_are_refused(tmp_path):
    vocab = OURS / "clip/processor-tokenizer-clipa/vocab.txt"
    with pytest.raises(VocabularyError, match="vocab.txt"):
        HfvlmCLIPXLMTokenizer.from_vocabulary(vocab)
    HfvlmCLIPATokenizer.from_vocabulary(vocab).save_pretrained(tmp_path)
    with pytest.raises(VocabularyError, match="eng_Latn"):
        HfvlmCLIPNLLBTokenizer.from_vocabulary(tmp_path / "tokenizer.json")


def config_with(trunk, **changes):
    text = {"model_type": "hfvlm_text_trunk", "trunk_config": trunk | changes, "projection_dim": 16}
    return HfvlmCLIPConfig(vision_config=dict(VISION), text_config=text)


def test_the_text_tower_decides_on_the_tokenizer(roberta, nllb, tmp_path):
    for tokenizer, trunk, spare in ((roberta, ROBERTA, 0), (nllb, NLLB, 2)):
        config = config_with(trunk, vocab_size=len(tokenizer) + spare)
        tokenizer.save_pretrained(tmp_path)
        assert CONVERSION.vocabularies_for(config)[0][-1] == "tokenizer.json"
        processor = CONVERSION.processor_for(config, {}, tmp_path / "tokenizer.json")
        assert type(processor) is HfvlmCLIPProcessor
        assert type(processor.tokenizer) is type(tokenizer)
        assert processor.tokenizer.model_max_length == 77
        with pytest.raises(ValueError, match="vocabulary of another model"):
            CONVERSION.processor_for(config_with(trunk, vocab_size=50), {}, tmp_path / "tokenizer.json")


def test_mobileclip_pads_with_zeros_to_full_length(tmp_path):
    """As open_clip's own tokenizer. CLIP's causal tower reads nothing after the end; MobileCLIP's attends to it."""
    path = SHIPPED / "bpe_simple_vocab.txt.gz"
    plain = HfvlmCLIPTokenizer.from_vocabulary(path, model_max_length=16)
    text = TEXT | {"model_type": "hfvlm_clip_bidirectional_text", "vocab_size": len(plain)}
    text |= {"max_position_embeddings": 16} | special_tokens(len(plain), pad=0)
    config = HfvlmCLIPConfig(vision_config=dict(VISION), text_config=text)
    CONVERSION.processor_for(config, {}, path).save_pretrained(tmp_path)
    padded = AutoTokenizer.from_pretrained(tmp_path)
    assert type(padded) is HfvlmCLIPPaddedTokenizer
    for sentence in TEXTS:
        ids = plain(sentence)["input_ids"]
        for options in ({}, {"padding": True}, {"max_length": 99}):
            assert padded(sentence, **options) == {"input_ids": ids + [0] * (16 - len(ids))}
