"""Processors, tokenizers and their parts swallow nothing: every keyword is known, every value is checked."""

import json
import threading

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from transformers import AutoProcessor, AutoTokenizer, PreTrainedTokenizerBase, ProcessorMixin

from hfvlm.processing.features import HfvlmFeatureExtractor
from hfvlm.processing.image_text import ImageTextProcessor
from hfvlm.processing.images import HfvlmImageProcessor
from hfvlm.processing.settings import Settings
from hfvlm.processing.tokenization import HfvlmTokenizer
from hfvlm.registry import architectures
from tests.conftest import SHIPPED

IMAGE = Image.fromarray(np.random.RandomState(0).randint(0, 256, (30, 40, 3), dtype=np.uint8))
VOCABULARY = SHIPPED / "bpe_simple_vocab.txt.gz"
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "man", "'", "s", "hat", ",", ".", "##s"]


def public(kind):
    """Every public class of a kind, found through the registry."""
    found = {getattr(each, name) for each in architectures().values() for name in each.names}
    return sorted((cls for cls in found if isinstance(cls, type) and issubclass(cls, kind)), key=lambda c: c.__name__)


PARTS = public(Settings)
TOKENIZERS = public(PreTrainedTokenizerBase)
PROCESSORS = public(ProcessorMixin)
OF_TEXTS = [cls for cls in PROCESSORS if "tokenizer" in cls.get_attributes()]


def engine():
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = ["<unk>", "<s>", "</s>", "a", "b", "c", "!"]
    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.add_special_tokens(
        ["<unk>", "<s>", "</s>", "<image>", "<video>", "<im_patch>", "<vid_patch>", "[PAD]", "[SEP]", "eng_Latn"]
    )
    return made


def tokenizer_of(cls):
    return cls(tokenizer_object=engine(), pad_token="[PAD]", bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def processor_of(cls):
    """A processor with parts of its own architecture."""
    architecture = next(each for each in architectures().values() if cls.__name__ in each.names)
    parts = {}
    for name in cls.get_attributes():
        if "tokenizer" in name:
            parts[name] = tokenizer_of(getattr(architecture, architecture.tokenizers[-1 if "qformer" in name else 0]))
        elif name == "image_processor":
            parts[name] = getattr(architecture, architecture.image_processors[0])()
        else:
            kind = name.removesuffix("feature_extractor").strip("_")
            found = [
                getattr(architecture, n) for n in (*architecture.feature_extractors, *architecture.video_processors)
            ]
            parts[name] = next(c for c in found if kind in c.__name__.lower().replace("hfvlm", "") or not kind)()
    return cls(**parts)


def test_the_registry_names_them():
    assert len(PARTS) > 20
    assert len(TOKENIZERS) > 12
    assert len(PROCESSORS) > 12


@pytest.mark.parametrize("cls", PARTS)
def test_parts_refuse_unknown_keywords(cls, tmp_path):
    first = next(iter(cls.SETTINGS))
    words = f"{cls.__name__} got an unexpected keyword argument '{first}x'. The nearest that it knows is '{first}'"
    with pytest.raises(TypeError, match=words):
        cls(**{f"{first}x": 1})
    part = cls()
    with pytest.raises(TypeError, match=words):
        part(IMAGE, **{f"{first}x": 1})
    part.save_pretrained(tmp_path)
    with pytest.raises(TypeError, match=words):
        cls.from_pretrained(tmp_path, **{f"{first}x": 1})
    again, unused = cls.from_pretrained(tmp_path, made_up=1, return_unused_kwargs=True)
    assert unused["made_up"] == 1
    assert {name: getattr(again, name) for name in cls.SETTINGS} == {
        name: getattr(part, name) for name in cls.SETTINGS
    }
    path = tmp_path / "preprocessor_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"made_up": 1}))
    with pytest.raises(TypeError, match="'made_up'"):
        cls.from_pretrained(tmp_path)


@pytest.mark.parametrize("cls", TOKENIZERS)
def test_tokenizers_refuse_unknown_keywords(cls, tmp_path):
    words = (
        f"{cls.__name__} got an unexpected keyword argument 'paddin_side'. The nearest that it knows is 'padding_side'"
    )
    with pytest.raises(TypeError, match=words):
        cls(tokenizer_object=engine(), paddin_side="left")
    tokenizer = tokenizer_of(cls)
    for call in (tokenizer, tokenizer.encode, tokenizer.tokenize):
        with pytest.raises(TypeError, match="'max_lenght'. The nearest that it knows is 'max_length'"):
            call("a b", max_lenght=3)
    with pytest.raises(TypeError, match="tokenizer_kwargs got an unexpected keyword argument 'made_up'"):
        tokenizer("a b", tokenizer_kwargs={"made_up": 1})
    for call in (tokenizer.decode, tokenizer.batch_decode):
        with pytest.raises(TypeError, match="'made_up'"):
            call([[3, 4]], made_up=1)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(TypeError, match="'made_up'"):
        AutoTokenizer.from_pretrained(tmp_path, made_up=1)
    assert type(AutoTokenizer.from_pretrained(tmp_path, use_fast=True, trust_remote_code=False)) is cls


@pytest.mark.parametrize("cls", OF_TEXTS)
def test_processors_refuse_unknown_keywords(cls, tmp_path):
    processor = processor_of(cls)
    parts = {name: getattr(processor, name) for name in cls.get_attributes()}
    with pytest.raises(TypeError, match="unexpected keyword argument 'made_up'. The nearest that it knows is"):
        cls(**parts, made_up=1)
    cls(**parts, processor_class=cls.__name__, name_or_path="x")
    with pytest.raises(TypeError, match="'paddin'. The nearest that it knows is 'padding'"):
        processor(text=["a b"], paddin=True)
    for group in ("text", "images", "videos", "audio", "common"):
        with pytest.raises(TypeError, match=rf"{group}_kwargs got an unexpected keyword argument 'made_up'"):
            processor(text=["a b"], **{f"{group}_kwargs": {"made_up": 1}})
    with pytest.raises(ValueError, match=f"{cls.__name__} got padding twice, by itself and in text_kwargs"):
        processor(text=["a b"], padding=True, text_kwargs={"padding": False})
    if isinstance(processor, ImageTextProcessor):  # videos are lists of frames
        processor(text=["a b"], do_sample_frames=False)
        with pytest.raises(ValueError, match="do_sample_frames must be False"):
            processor(text=["a b"], do_sample_frames=True)
    standing = {f"{group}_kwargs": {} for group in ("images", "videos", "audio")}
    found = processor(text=["a b"], text_kwargs={"padding": True}, common_kwargs={"return_tensors": "pt"}, **standing)
    assert isinstance(found["input_ids"], torch.Tensor)
    processor.save_pretrained(tmp_path)
    with pytest.raises(TypeError, match=f"{cls.__name__} got an unexpected keyword argument 'made_up'"):
        AutoProcessor.from_pretrained(tmp_path, made_up=1)
    path = tmp_path / "processor_config.json"
    fields = json.loads(path.read_text())
    path.write_text(json.dumps(fields | {"num_querys": 3}))
    with pytest.raises(TypeError, match=r"processor_config.json\) got an unexpected keyword argument 'num_querys'"):
        cls.from_pretrained(tmp_path)
    for broken in ("[]", "3", '"text"', "null"):
        path.write_text(broken)
        with pytest.raises(ValueError, match="processor_config.json: no JSON object"):
            cls.from_pretrained(tmp_path)


def test_settings_of_a_part_may_be_given_to_the_whole(clip_folder):
    processor = AutoProcessor.from_pretrained(clip_folder, size=24, padding_side="right", do_normalize=False)
    assert processor.image_processor.size == {"height": 24, "width": 24}
    assert "size" not in processor.tokenizer.init_kwargs
    with pytest.raises(ValueError, match="size must be"):
        AutoProcessor.from_pretrained(clip_folder, size=-24)


# Values


@pytest.mark.parametrize("cls", PARTS)
def test_every_setting_is_checked(cls):
    part = cls()
    for name in cls.SETTINGS:
        for wrong in ("nonsense", [object()], float("nan"), {"a": 1}, -(10**6), b""):
            if wrong == -(10**6) and ("mean" in name or name == "rescale_factor"):
                continue
            with pytest.raises(ValueError, match=rf"{cls.__name__}: {name} must be"):
                cls(**{name: wrong})
            if name not in getattr(cls, "SOURCE_OPTIONS", ()):
                with pytest.raises(ValueError, match=rf"{cls.__name__}: {name} must be"):
                    part(IMAGE, **{name: wrong})


@pytest.mark.parametrize("cls", public(HfvlmImageProcessor))
def test_numbers_of_image_processors(cls):
    for name, wrongs in {
        "rescale_factor": (0, float("nan"), float("inf"), "1/255", True),
        "image_std": (0, [1, 1, 0], [1, 1], [1, 1, 1, 1], [1, float("nan"), 1], -1),
        "image_mean": ([0, 0], "mean", [0, float("inf"), 0]),
        "resample": (6, -1, 2.5, "bicubic", True),
        "do_resize": (1, "yes", 0),
        "size": (0, -3, 2.5, {"height": 3}, {"height": 3, "width": 0}, {"longest_edge": 3}, True, 10**6),
    }.items():
        for wrong in wrongs if name in cls.SETTINGS else ():
            with pytest.raises(ValueError, match=rf"{cls.__name__}: {name} must be"):
                cls(**{name: wrong})
            with pytest.raises(ValueError, match=rf"{cls.__name__}: {name} must be"):
                cls.from_dict(cls().to_dict(), **{name: wrong})
    with pytest.raises(ValueError, match="do_convert_rgb must be True"):
        cls()(IMAGE, do_convert_rgb=False)
    with pytest.raises(ValueError, match="data_format must be 'channels_first'"):
        cls()(IMAGE, data_format="channels_last")


def test_rescaling_by_another_factor():
    from hfvlm.models.siglip import HfvlmSigLIPImageProcessor

    plain = HfvlmSigLIPImageProcessor(size=30, do_normalize=False)
    usual = plain(IMAGE, return_tensors="pt")["pixel_values"]
    twice = plain(IMAGE, return_tensors="pt", rescale_factor=2 / 255)["pixel_values"]
    assert torch.allclose(usual * 2, twice)
    negative = plain(IMAGE, return_tensors="pt", rescale_factor=-2 / 255)["pixel_values"]
    assert torch.equal(negative, -twice)
    assert torch.equal(usual, plain(IMAGE, return_tensors="pt", do_rescale=False)["pixel_values"] / 255)


def test_arrays_that_could_lie_either_way():
    from hfvlm.models.siglip import HfvlmSigLIPImageProcessor

    part = HfvlmSigLIPImageProcessor(size=3)
    array = np.random.RandomState(0).randint(0, 256, (3, 4, 3), dtype=np.uint8)
    expected = part(Image.fromarray(np.moveaxis(array, 0, -1)), return_tensors="pt")["pixel_values"]
    for source in (array, torch.from_numpy(array)):
        found = part(source, return_tensors="pt", input_data_format="channels_first")["pixel_values"]
        assert torch.equal(found, expected)
    assert not torch.equal(part(array, return_tensors="pt")["pixel_values"], expected)


@pytest.mark.parametrize("cls", public(HfvlmFeatureExtractor))
def test_feature_extractors_take_padding_and_truncation(cls):
    for options in ({"padding": True}, {"padding": "max_length", "truncation": True}, {"padding": False}, {}):
        with pytest.raises(ValueError, match="was given an empty batch"):
            cls()([], **options)
    with pytest.raises(ValueError, match=f"{cls.__name__}: padding must be one of"):
        cls()([], padding="everything")
    with pytest.raises(ValueError, match="truncation must be True or False"):
        cls()([], truncation="some")


def test_padding_changes_no_feature():
    from hfvlm.models.imagebind import HfvlmImageBindFeatureExtractor

    extractor, wave = HfvlmImageBindFeatureExtractor(), np.sin(np.arange(20_000) / 9).astype(np.float32)
    plain = extractor((wave, 16_000), return_tensors="pt")["input_features"]
    padded = extractor((wave, 16_000), return_tensors="pt", padding=True, truncation=True)["input_features"]
    assert torch.equal(plain, padded)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"max_length": 0}, "max_length must be an integer of 1"),
        ({"max_length": -1}, "max_length must be an integer of 1"),
        ({"max_length": "7"}, "max_length must be an integer of 1"),
        ({"max_length": 2.5}, "max_length must be an integer of 1"),
        ({"pad_to_multiple_of": 0}, "pad_to_multiple_of must be an integer of 1"),
        ({"stride": -1}, "stride must be an integer of 0"),
        ({"padding": "some"}, "some"),
        ({"truncation": "some"}, "some"),
        ({"padding_side": "top"}, "padding_side must be"),
    ],
)
def test_numbers_of_tokenizers(clip_folder, options, words):
    with pytest.raises(ValueError, match=words):
        AutoTokenizer.from_pretrained(clip_folder)("a b", **options)


@pytest.mark.parametrize(
    "options",
    [
        {"model_max_length": 0},
        {"model_max_length": "x"},
        {"truncation_side": "top"},
        {"padding": "some"},
        {"padding": 1},
        {"max_length": 0},
    ],
)
def test_settings_of_tokenizers(clip_folder, options):
    with pytest.raises(ValueError, match=f"{next(iter(options))} must be"):
        AutoTokenizer.from_pretrained(clip_folder, **options)


@pytest.mark.parametrize("cls", TOKENIZERS)
def test_the_padding_of_calls_is_a_setting(cls, tmp_path):
    options = {"tokenizer_object": engine(), "pad_token": "[PAD]", "unk_token": "<unk>", "model_max_length": 12}
    tokenizer = cls(**options, padding="max_length", max_length=9)
    assert {len(row) for row in tokenizer(["a b", "a"])["input_ids"]} == {tokenizer.capped(9)}
    tokenizer.save_pretrained(tmp_path)
    again = cls.from_pretrained(tmp_path)
    assert again(["a b", "a"])["input_ids"] == tokenizer(["a b", "a"])["input_ids"]
    assert len(again("a b", padding=False)["input_ids"]) < 9
    rows = cls(**options, padding=False)(["a b", "a"])["input_ids"]
    assert len(rows[0]) > len(rows[1])
    trained, padded = cls(**options), cls(**options, padding=True)
    assert padded(["a b", "a"])["input_ids"] == trained(["a b", "a"], padding=True)["input_ids"]
    of_another_call = cls(**options, max_length=3)
    assert of_another_call(["a b", "a"])["input_ids"] == trained(["a b", "a"])["input_ids"]


# Sides


@pytest.mark.parametrize("cls", [cls for cls in TOKENIZERS if cls.padding_sides == ("right",)])
def test_models_that_read_padding_refuse_it_on_the_left(cls):
    with pytest.raises(ValueError, match="padding_side must be 'right', not 'left'"):
        cls(tokenizer_object=engine(), padding_side="left", unk_token="<unk>")
    tokenizer = tokenizer_of(cls)
    with pytest.raises(ValueError, match="padding_side must be 'right'"):
        tokenizer(["a", "a b"], padding_side="left")
    with pytest.raises(ValueError, match="padding_side must be 'right'"):
        tokenizer.pad({"input_ids": [[1], [1, 2]]}, padding_side="left")
    with pytest.raises(ValueError, match="padding_side must be 'right'"):
        tokenizer.padding_side = "left"


# What callers hand over


class Column:
    """As pyarrow's."""

    def __init__(self, items):
        self.items = items

    def to_pylist(self):
        return list(self.items)


@pytest.mark.parametrize(
    "container", [list, tuple, iter, np.array, pd.Series, Column, lambda items: (item for item in items)]
)
def test_batches_in_any_container(clip_folder, tmp_path, container):
    processor = AutoProcessor.from_pretrained(clip_folder)
    paths = [str(tmp_path / f"{i}.png") for i in range(2)]
    for path in paths:
        IMAGE.save(path)
    texts = ["a red circle", "a square"]
    expected = processor(images=paths, text=texts)
    found = processor(images=container(paths), text=container(texts))
    assert torch.equal(found["pixel_values"], expected["pixel_values"])
    assert torch.equal(found["input_ids"], expected["input_ids"])


@pytest.mark.parametrize("cls", OF_TEXTS)
@pytest.mark.parametrize(
    ("text", "error", "words"),
    [
        ([], ValueError, "text is an empty list"),
        (["a", None], ValueError, "text 1 is missing"),
        (["a", float("nan")], ValueError, "text 1 is missing"),
        (["a", 3], TypeError, "text 1 must be a string, not int"),
        (b"a", TypeError, "text must be a string or a list of strings, not bytes"),
        ({"text": "a"}, TypeError, "text must be a string or a list of strings, not dict"),
    ],
)
def test_texts_that_are_none(cls, text, error, words):
    with pytest.raises(error, match=words):
        processor_of(cls)(text=text)


@pytest.mark.parametrize("cls", PROCESSORS)
def test_no_images(cls):
    """Beside a text they count as none where texts say where images are; elsewhere they are refused by name."""
    processor = processor_of(cls)
    if hasattr(processor, "media_token"):
        assert "pixel_values" not in processor(text=["a b"], images=[], videos=[], audio=[], audios=None)
        with pytest.raises(ValueError, match="not audio"):
            processor(text=["a b"], audio=[np.zeros(8)])
    elif "image" in processor.modalities:
        with pytest.raises(ValueError, match="was given no images"):
            processor(images=[])
        with pytest.raises(ValueError, match="needs "):
            processor()


@pytest.mark.parametrize("cls", public(HfvlmImageProcessor))
def test_lists_in_lists_are_flattened(cls):
    part = cls()
    expected = part([IMAGE, IMAGE], return_tensors="pt")["pixel_values"]
    for nested in ([[IMAGE], [IMAGE]], [[IMAGE, IMAGE]], ([IMAGE], (IMAGE,)), [[[IMAGE]], IMAGE]):
        assert torch.equal(part(nested, return_tensors="pt")["pixel_values"], expected)


def test_llava_names_the_inputs_that_it_gives():
    from hfvlm.models.llava import HfvlmLLaVAImageProcessor

    for options in ({"size": 28}, {"size": 28, "resize_mode": "tiles", "grid_pinpoints": [[28, 56], [56, 28]]}):
        part = HfvlmLLaVAImageProcessor(**options)
        assert set(part(IMAGE, return_tensors="pt")) == set(part.model_input_names), options


# Threads


def test_one_tokenizer_in_several_threads(clip_folder):
    tokenizer = AutoTokenizer.from_pretrained(clip_folder)
    assert isinstance(tokenizer, HfvlmTokenizer)
    jobs = [
        {"padding": "max_length", "max_length": 20},
        {"padding": "max_length", "max_length": 9},
        {"padding": True},
        {"padding": False, "truncation": True, "max_length": 5},
        {"split_special_tokens": True, "padding": "max_length", "max_length": 16},
    ]
    texts = ["a large red circle and a small blue square <|endoftext|>", "three"]
    expected = [tokenizer(texts, **job)["input_ids"] for job in jobs]
    wrong = []

    def work(number):
        for i in range(60):
            job = (number + i) % len(jobs)
            if tokenizer(texts, **jobs[job])["input_ids"] != expected[job]:
                wrong.append(job)
            if i % 10 == 0 and tokenizer.encode(texts[1]) != tokenizer.encode(texts[1]):
                wrong.append("encode")

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_locked_tokenizer_can_be_copied_and_pickled(clip_folder):
    import copy
    import pickle

    tokenizer = AutoTokenizer.from_pretrained(clip_folder)
    for again in (copy.deepcopy(tokenizer), copy.copy(tokenizer), pickle.loads(pickle.dumps(tokenizer))):
        assert again("a red circle")["input_ids"] == tokenizer("a red circle")["input_ids"]
    assert copy.copy(tokenizer).lock is tokenizer.lock  # they share an engine
