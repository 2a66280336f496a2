"""Texts are cleaned, padded and cut as the models were trained; the ids of real texts are in the goldens."""

import base64
import itertools
import json
import logging
import random
import unicodedata

import pytest
import torch
from transformers import AutoTokenizer
from transformers.utils import logging as host

from hfvlm.models.align import HfvlmALIGNTokenizer
from hfvlm.models.blip import HfvlmBLIPImageProcessor, HfvlmBLIPProcessor, HfvlmBLIPTokenizer
from hfvlm.models.blip2 import HfvlmBLIP2QFormerTokenizer, HfvlmBLIP2Tokenizer
from hfvlm.models.clip import HfvlmCLIPTokenizer
from hfvlm.models.coca import HfvlmCoCaTokenizer
from hfvlm.models.flava import HfvlmFLAVATokenizer
from hfvlm.models.siglip import HfvlmSigLIPTokenizer
from hfvlm.processing.cleaning import CLEANINGS
from hfvlm.processing.tokenization import HfvlmTokenizer
from hfvlm.processing.vocabularies import byte_letters, tiktoken_bpe
from tests.conftest import SHIPPED
from tests.models.llava.tiny import VOCABULARY
from tests.support.paths import OURS


@pytest.fixture
def clip():
    return HfvlmCLIPTokenizer.from_vocabulary(SHIPPED / "bpe_simple_vocab.txt.gz", model_max_length=12)


@pytest.fixture(scope="session", params=["unigram", "bpe", "bpe that strips"])
def sentencepiece_model(tmp_path_factory, request):
    """A small sentencepiece model: unigram as SigLIP 1's, BPE with byte fallback as Gemma's."""
    kind = request.param.split()[0]
    trainer = pytest.importorskip("sentencepiece", reason="comes with hfvlm[convert]").SentencePieceTrainer
    folder = tmp_path_factory.mktemp(kind)
    colours, things = ("red", "green", "blue", "small"), ("cat", "dog", "bus", "tree", "hand", "mountain")
    corpus = folder / "corpus.txt"
    corpus.write_text(
        "\n".join(f"a {c} {t} with a {d} {u}" for c in colours for d in colours for t in things for u in things)
    )
    gemma = kind == "bpe"
    trainer.train(
        input=str(corpus),
        model_prefix=str(folder / "tiny"),
        vocab_size=330 if gemma else 60,
        model_type=kind,
        remove_extra_whitespaces=request.param != "bpe",
        pad_id=0,
        eos_id=1,
        bos_id=2 if gemma else -1,
        unk_id=3 if gemma else 2,
        pad_piece="<pad>",
        eos_piece="<eos>" if gemma else "</s>",
        bos_piece="<bos>",
        byte_fallback=gemma,
        add_dummy_prefix=not gemma,
        normalization_rule_name="identity",
        hard_vocab_limit=False,
        minloglevel=2,
    )
    return kind, folder / "tiny.model"


def test_sentencepiece_ids_are_sentencepieces_own(sentencepiece_model):
    import sentencepiece

    _, path = sentencepiece_model
    ours = HfvlmSigLIPTokenizer.from_vocabulary(path, clean="none", model_max_length=64)
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(path))
    for text in ("a red cat with a small mountain", "dog", "the unseen zebra", "a  red   cat", "\N{SNOWMAN} cat"):
        ids = theirs.encode(text)
        assert ours(text, padding=False)["input_ids"] == [*ids, 1], text


def test_siglip_always_pads_to_full_length(sentencepiece_model):
    """A shorter sequence would be pooled at another position than in training, silently."""
    _, path = sentencepiece_model
    tokenizer = HfvlmSigLIPTokenizer.from_vocabulary(path, model_max_length=16)
    for options in ({}, {"padding": True}, {"padding": "max_length", "max_length": 64, "truncation": True}):
        ids = tokenizer(["a cat", "a red dog"], return_tensors="pt", **options)["input_ids"]
        assert ids.shape == (2, 16), options
    assert list(tokenizer("a cat")) == ["input_ids"], "no mask: the model was trained without one"
    assert len(tokenizer("a cat", padding=False)["input_ids"]) < 16


def test_siglip_2_pads_with_its_own_token(sentencepiece_model):
    _, path = sentencepiece_model
    tokenizer = HfvlmSigLIPTokenizer.from_vocabulary(path, model_max_length=16, pad_token="<pad>")
    ids = tokenizer("a cat")["input_ids"]
    assert ids[-1] == 0
    assert ids.count(1) == 1


def test_tokenizer_json_is_as_good_as_the_model(sentencepiece_model, tmp_path):
    _, path = sentencepiece_model
    tokenizer = HfvlmSigLIPTokenizer.from_vocabulary(path, model_max_length=16)
    tokenizer.save_pretrained(tmp_path)
    again = HfvlmSigLIPTokenizer.from_vocabulary(tmp_path / "tokenizer.json", model_max_length=16)
    auto = AutoTokenizer.from_pretrained(tmp_path)
    text = "A red CAT, and a dog!"
    assert again(text)["input_ids"] == auto(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert auto.clean == "canonical"


def test_a_broken_sentencepiece_model_is_named(tmp_path):
    (tmp_path / "x.model").write_bytes(b"nonsense" * 10)
    with pytest.raises(ValueError, match="x.model: not a sentencepiece model"):
        HfvlmSigLIPTokenizer.from_vocabulary(tmp_path / "x.model")


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("lower", "  A Photo\n of\ta CAT ", "a photo of a cat"),
        ("lower", "&lt;b&gt; l\x92a \u201cquoted\u201d \ufb01ne", '<b> l\'a "quoted" fine'),
        ("canonical", "A Photo, of a CAT!", "a photo of a cat"),
        ("canonical", "don't_stop", "dont stop"),
        ("case", "A Photo, of a CAT!", "a photo, of a cat!"),
        ("none", " As it IS ", " As it IS "),
    ],
)
def test_cleaning(name, text, expected):
    assert CLEANINGS[name](text) == expected


def test_cleaning_is_saved_and_checked(clip, tmp_path):
    clip.clean = "lower"
    clip.save_pretrained(tmp_path)
    assert AutoTokenizer.from_pretrained(tmp_path).clean == "lower"
    with pytest.raises(ValueError, match="clean must be one of .*canonical.* none"):
        HfvlmTokenizer(tokenizer_object=clip.backend_tokenizer, clean="thorough")


def test_clip_pads_to_the_longest_by_default(clip):
    ids = clip(["a red circle", "three"], return_tensors="pt")
    assert ids["input_ids"].shape[0] == 2
    assert ids["attention_mask"][0].all()
    assert not ids["attention_mask"][1].all()
    assert ids["input_ids"][1, -1] == clip.eos_token_id


def test_cut_texts_are_named_in_a_warning(clip, caplog):
    host.enable_propagation()
    logging.getLogger("transformers").setLevel(logging.WARNING)
    clip(["short", "a large red circle and " * 5, "short too"])
    assert "Text 1 is too long and was cut to 12 tokens: 'a large red circle and a large" in caplog.text
    assert "Text 0" not in caplog.text
    caplog.clear()
    clip(["short"])
    assert caplog.text == ""


def test_cut_texts_keep_their_end(clip):
    ids = clip("a large red circle and " * 5)["input_ids"]
    assert len(ids) == 12
    assert (ids[0], ids[-1]) == (clip.bos_token_id, clip.eos_token_id)


def test_special_tokens_in_a_text_are_special(clip):
    """As in OpenAI's tokenizer; open_clip renamed the tokens and reads them as plain text."""
    assert clip("<|startoftext|>a<|ENDOFTEXT|>")["input_ids"].count(clip.eos_token_id) == 2


def test_decoding_gives_the_text_back(clip):
    assert clip.decode(clip("a small blue triangle")["input_ids"], skip_special_tokens=True) == "a small blue triangle"
    assert clip.decode(clip("")["input_ids"], skip_special_tokens=True) == ""


def test_pretokenised_texts_are_left_alone(clip):
    words = clip([["A", "RED"]], is_split_into_words=True)["input_ids"]
    assert len(words) == 1


def joined(piece, ranks):
    """tiktoken's rule, as a loop: of all neighbours the pair that makes the lowest rank, the first of equals."""
    parts = [bytes([byte]) for byte in piece]
    while True:
        pairs = [(ranks[a + b], i) for i, (a, b) in enumerate(itertools.pairwise(parts)) if a + b in ranks]
        if not pairs:
            return [ranks[part] for part in parts]
        i = min(pairs)[1]
        parts[i : i + 2] = [parts[i] + parts[i + 1]]


def test_ranks_are_joined_as_tiktoken_does():
    path = OURS / "qwen_vl" / "processor-tokenizer" / "qwen.tiktoken"
    ranks = {base64.b64decode(piece): int(rank) for piece, rank in map(str.split, path.read_text().splitlines())}
    engine = tiktoken_bpe(path, words=r"[\s\S]+")
    chance = random.Random(0)
    pieces = sorted(ranks)
    for _ in range(300):
        text = b"".join(chance.choices(pieces, k=8)).decode("utf-8", errors="ignore")
        text = unicodedata.normalize("NFC", text)
        expected = [ranks[text.encode()]] if text.encode() in ranks else joined(text.encode(), ranks)
        assert engine.encode(text).ids == expected, text
        assert engine.decode(expected) == text


# From ids to texts


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    """A BERT's vocabulary, small."""
    path = tmp_path_factory.mktemp("bert") / "vocab.txt"
    pieces = "[PAD] [UNK] [CLS] [SEP] [MASK] a man ' s hat , and the dog don t . ! ? it i m ve re ##s n a ##n".split()  # noqa: SIM905
    path.write_text("\n".join(dict.fromkeys(pieces)) + "\n")
    return path


@pytest.mark.parametrize(
    "cls", [HfvlmBLIPTokenizer, HfvlmBLIP2QFormerTokenizer, HfvlmFLAVATokenizer, HfvlmALIGNTokenizer]
)
def test_word_pieces_are_decoded_as_bert_does(cls, words, tmp_path):
    """transformers 4's BertTokenizer, which the originals decode with, takes spaces before punctuation out."""
    tokenizer = cls.from_vocabulary(words)
    tokenizer.save_pretrained(tmp_path)
    for each in (tokenizer, AutoTokenizer.from_pretrained(tmp_path)):
        for text, expected in (
            ("a man ' s hat", "a man's hat"),
            ("a man, and the dog!", "a man, and the dog!"),
            ("i ' m a man . it ' s the hat ?", "i'm a man. it's the hat?"),
        ):
            ids = each(text, padding=False)["input_ids"]
            assert each.decode(ids, skip_special_tokens=True) == expected
            assert each.batch_decode([ids, ids], skip_special_tokens=True) == [expected, expected]
            assert each.decode(torch.tensor([ids]), skip_special_tokens=True) == [expected]
        ids = each("a man ' s hat", padding=False)["input_ids"]
        assert each.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False) == "a man ' s hat"
    assert cls.from_vocabulary(words, clean_up_tokenization_spaces=False).decode(ids, True) == "a man ' s hat"


def test_captions_are_spelt_as_the_original_spells_them(words):
    processor = HfvlmBLIPProcessor(
        HfvlmBLIPImageProcessor(), HfvlmBLIPTokenizer.from_vocabulary(words), prompt="a man and "
    )
    ids = processor.tokenizer(["a man and the dog ' s hat", "a man and it ."])["input_ids"]
    assert processor.decode_captions(ids) == ["the dog's hat", "it."]


def test_bytes_are_decoded_as_they_are(clip):
    """OpenAI's and open_clip's decoders clean nothing up."""
    ids = clip("a dog ' s toy ,", padding=False)["input_ids"]
    assert clip.decode(ids, skip_special_tokens=True) == "a dog ' s toy ,"
    cleaned = clip.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=True)
    assert cleaned == "a dog's toy,"
    coca = HfvlmCoCaTokenizer.from_vocabulary(SHIPPED / "bpe_simple_vocab.txt.gz", model_max_length=20)
    ids = coca("a man ' s hat !")["input_ids"]
    assert coca.decode(ids, skip_special_tokens=True).strip() == "a man ' s hat !"
    assert coca.batch_decode(torch.tensor([ids, ids]), skip_special_tokens=True)[1].strip() == "a man ' s hat !"
    assert coca.decode(ids).count("<|endoftext|>") == 1


@pytest.mark.parametrize(("kind", "cleans"), [("opt", True), ("llama", False)])
def test_language_models_are_decoded_as_lavis_does(kind, cleans, tmp_path):
    path = VOCABULARY
    if kind == "opt":
        letters = {letter: i for i, letter in enumerate([*byte_letters().values(), "<s>", "<pad>", "</s>", "<unk>"])}
        path = tmp_path / "vocab.json"
        path.write_text(json.dumps(letters))
        (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = HfvlmBLIP2Tokenizer.from_vocabulary(path, kind=kind)
    text = "a dog , and it 's"
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids, skip_special_tokens=True).strip() == ("a dog, and it's" if cleans else text)
    tokenizer.save_pretrained(tmp_path / "saved")
    again = AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert again.decode(ids, skip_special_tokens=True) == tokenizer.decode(ids, skip_special_tokens=True)
