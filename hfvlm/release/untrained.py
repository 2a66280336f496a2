"""Small models that learned nothing, to try code with where no checkpoint is at hand.

They have everything that a converted folder has: the architecture, a processor, a vocabulary. What they generate makes
no sense, and takes milliseconds.
"""

import base64
from collections.abc import Callable, Mapping
from importlib.resources import as_file, files
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from hfvlm.media.sources import import_extra
from hfvlm.presets import Preset, load_preset
from hfvlm.registry import find_class
from hfvlm.samples.scenes import all_scenes
from hfvlm.writing import new_folder

WORDS = "what where how many is are the a an of in on and there this picture image shape colour dog cat no yes ? ."
CHARACTERS = "一只个张的照片图画里有什么在上下红绿蓝黄紫白色大小圆正方三角形十字猫狗人是不吗。"
BERT = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
PIECES, LENGTH = 300, 40


def untrained(
    architecture: str, folder: str | Path, *, model: str | None = None, seed: int = 0, overwrite: bool = False
) -> Path:
    """Write a folder of an architecture's tiny preset, with weights by chance.

    Args:
        architecture: one of `KINDS`.
        folder: the new folder.
        model: name of the class; by default the architecture's first.
        seed: of the weights.
        overwrite: replace an existing folder.

    Returns:
        The folder.

    Raises:
        ValueError: there is none of that architecture.
        ImportError: sentencepiece is not installed, which the vocabularies of LLaMA's kind need.
        FileExistsError: there is such a folder already.
    """
    if architecture not in KINDS:
        raise ValueError(f"There is no untrained {architecture}; there are {', '.join(KINDS)}.")
    preset = load_preset(f"{architecture}/tiny")
    with new_folder(folder, overwrite=overwrite) as target, TemporaryDirectory() as scratch:
        config, processor = KINDS[architecture](preset, Path(scratch))
        config.architectures = None
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            made = find_class(model or _first_class(architecture))(config)
        made.save_pretrained(target)
        processor.save_pretrained(target)
    return Path(folder)


def _first_class(architecture: str) -> str:
    from hfvlm.registry import architectures

    return next(iter(architectures()[architecture].models.values()))[0]


def _parts(preset: Preset, changes: Mapping[str, Any], *vocabularies: Path, **settings: Any) -> tuple[Any, Any]:
    from hfvlm.release.sources import conversion_of

    config = type(preset.make_config())(**{**preset.config, **changes})
    return config, conversion_of(preset.architecture).processor_for(
        config, {**preset.processor, **settings}, *vocabularies
    )


def _with_bytes(preset: Preset, scratch: Path) -> tuple[Any, Any]:
    """Return the small CLIP's vocabulary."""
    with as_file(files("hfvlm.samples") / "clip-tiny" / "bpe_simple_vocab.txt.gz") as path:
        return _parts(preset, {}, path)


def _with_words(preset: Preset, scratch: Path) -> tuple[Any, Any]:
    """Return a vocabulary of BERT's kind, and the two tokens that BLIP adds."""
    path = scratch / "vocab.txt"
    size = _words(path)
    ids = {"vocab_size": size + 2, "bos_token_id": size, "encoder_token_id": size + 1}
    ids |= {"eos_token_id": BERT.index("[SEP]"), "pad_token_id": BERT.index("[PAD]")}
    return _parts(preset, {"text_config": {**preset.config["text_config"], **ids}}, path)


def _with_pieces_of_words(preset: Preset, scratch: Path) -> tuple[Any, Any]:
    """Return a vocabulary of BERT's kind."""
    path = scratch / "vocab.txt"
    return _parts(preset, {"text_config": {**preset.config["text_config"], "vocab_size": _words(path)}}, path)


def _with_characters(preset: Preset, scratch: Path) -> tuple[Any, Any]:
    """Return a vocabulary of the Chinese BERT's kind."""
    path = scratch / "vocab.txt"
    sizes = {"vocab_size": _words(path, *CHARACTERS)}
    return _parts(preset, {"text_config": {**preset.config["text_config"], **sizes}}, path)


def _words(path: Path, *more: str) -> int:
    """Write a vocabulary of words, and of letters for the others; return the number of its pieces."""
    words = dict.fromkeys([*WORDS.split(), *" ".join(scene.caption() for scene in all_scenes()).split()])
    letters = [chr(code) for code in range(33, 127)]
    pieces = list(dict.fromkeys([*BERT, *words, *letters, *(f"##{letter}" for letter in letters), *more]))
    path.write_text("\n".join(pieces) + "\n", encoding="utf-8")
    return len(pieces)


def _with_pieces(preset: Preset, scratch: Path) -> tuple[Any, Any]:
    """Return a vocabulary of LLaMA's kind, learned from the captions of scenes."""
    path = _pieces(scratch, model_type="bpe", byte_fallback=False)
    return _parts(preset, {}, path)


def _with_gemma_pieces(preset: Preset, scratch: Path) -> tuple[Any, Any]:
    """Return a vocabulary of Gemma's kind, and the pieces of regions."""
    path = _pieces(
        scratch, model_type="bpe", pad_id=0, eos_id=1, bos_id=2, unk_id=3, user_defined_symbols=["<mask>", "\n"],
        add_dummy_prefix=False, remove_extra_whitespaces=False, split_digits=True,
    )  # fmt: skip
    from hfvlm.models.paligemma import HfvlmPaliGemmaTokenizer

    size = len(HfvlmPaliGemmaTokenizer.from_vocabulary(path)) - 1
    text = {**preset.config["text_config"], "vocab_size": size}
    return _parts(preset, {"text_config": text, "image_token_id": size}, path)


def _with_mt5_pieces(preset: Preset, scratch: Path) -> tuple[Any, Any]:
    """Return a vocabulary of mT5's kind."""
    path = _pieces(scratch, model_type="unigram", pad_id=0, eos_id=1, unk_id=2, bos_id=-1, split_digits=True)
    return _parts(preset, {}, path)


def _pieces(scratch: Path, **options: Any) -> Path:
    """Learn pieces from the captions of scenes -> sentencepiece's file."""
    sentencepiece = import_extra("sentencepiece", "convert", "A vocabulary of pieces")
    corpus = scratch / "corpus.txt"
    printable = "".join(chr(code) for code in range(33, 127))
    corpus.write_text("\n".join([WORDS, " ".join(printable), *(scene.caption() for scene in all_scenes())]))
    sentencepiece.SentencePieceTrainer.train(
        input=str(corpus), model_prefix=str(scratch / "tokenizer"), vocab_size=PIECES, character_coverage=1.0,
        normalization_rule_name="identity", hard_vocab_limit=False, minloglevel=2, **options,
    )  # fmt: skip
    return scratch / "tokenizer.model"


def _with_unigrams(preset: Preset, scratch: Path) -> tuple[Any, Any]:
    """Return a vocabulary of SigLIP's kind; its pieces are short, and texts have more of them than the preset's."""
    path = _pieces(scratch, model_type="unigram", pad_id=0, eos_id=1, unk_id=2, bos_id=-1)
    text = {**preset.config["text_config"], "max_position_embeddings": LENGTH}
    return _parts(preset, {"text_config": text}, path, tokenizer={"model_max_length": LENGTH})


def _with_ranks(preset: Preset, scratch: Path) -> tuple[Any, Any]:
    """Return a vocabulary of tiktoken's kind: single bytes, and pairs up to the number that the preset has."""
    size = preset.make_config().text_config.pad_token_id
    tokens = [bytes([byte]) for byte in range(256)]
    tokens += [bytes(pair) for pair in zip(b"eaitonsr" * 32, b"thaeinro" * 8 + b"stndlrcm" * 24, strict=True)]
    ranks = list(dict.fromkeys(tokens))
    ranks += [bytes([first, second]) for first in b"ABCDEFGHIJKLM" for second in b"abcdefghijklmnopqrstuvwxyz"]
    path = scratch / "qwen.tiktoken"
    lines = (f"{base64.b64encode(token).decode()} {rank}" for rank, token in enumerate(ranks[:size]))
    path.write_text("\n".join(lines) + "\n")
    return _parts(preset, {}, path)


def _with_byte_pairs(preset: Preset, scratch: Path) -> tuple[Any, Any]:
    """Return a vocabulary of BART's kind, learned from the captions of scenes."""
    _byte_pairs("<s>", "<pad>", "</s>", "<unk>").model.save(str(scratch))
    return _parts(preset, {}, scratch / "vocab.json")


def _with_opt_pairs(preset: Preset, scratch: Path) -> tuple[Any, Any]:
    """Return a vocabulary of OPT's kind; a new line ends what is generated."""
    engine = _byte_pairs("<s>", "<pad>", "</s>", "<unk>")
    engine.model.save(str(scratch))
    text = {**preset.config["text_config"], "eos_token_id": engine.token_to_id("Ċ")}
    return _parts(preset, {"text_config": text}, scratch / "vocab.json")


def _with_neox_pairs(preset: Preset, scratch: Path) -> tuple[Any, Any]:
    """Return a vocabulary of GPT-NeoX's kind, and the tokens that Flamingo adds."""
    from tokenizers import decoders

    engine = _byte_pairs("<|endoftext|>")
    engine.decoder = decoders.ByteLevel()
    engine.save(str(scratch / "tokenizer.json"))
    size = engine.get_vocab_size()
    ids = {"eos_token_id": size, "image_token_id": size + 1, "pad_token_id": size + 2}
    text = {**preset.config["text_config"], "vocab_size": size + 3}
    return _parts(preset, {"text_config": text, **ids}, scratch / "tokenizer.json")


def _with_lower_case_pairs(preset: Preset, scratch: Path) -> tuple[Any, Any]:
    """Return a vocabulary of MERLOT Reserve's kind, whose first tokens have meanings of their own."""
    from tokenizers import decoders, normalizers

    names = ("PAD", "START", "END", "MASK", "MASKAUDIO", "AUDIOSPAN", "LTOVPOOL", "UNK")
    engine = _byte_pairs(*(f"<|{name}|>" for name in names))
    engine.normalizer, engine.decoder = normalizers.BertNormalizer(lowercase=True), decoders.ByteLevel()
    engine.save(str(scratch / "lowercase_encoder.json"))
    return _parts(preset, {"vocab_size": engine.get_vocab_size()}, scratch / "lowercase_encoder.json")


def _byte_pairs(*special: str) -> Any:
    """Learn byte pairs from the captions of scenes -> an engine of tokenizers."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    engine = Tokenizer(models.BPE())
    engine.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    options: dict[str, Any] = {"initial_alphabet": pre_tokenizers.ByteLevel.alphabet(), "show_progress": False}
    trainer = trainers.BpeTrainer(vocab_size=PIECES, special_tokens=list(special), **options)
    engine.train_from_iterator((f" {scene.caption()}" for scene in all_scenes()), trainer)
    return engine


KINDS: dict[str, Callable[[Preset, Path], tuple[Any, Any]]] = {
    "align": _with_pieces_of_words,
    "blip": _with_words,
    "blip2": _with_opt_pairs,
    "clip": _with_bytes,
    "coca": _with_bytes,
    "dalle_mini": _with_byte_pairs,
    "filip": _with_bytes,
    "flamingo": _with_neox_pairs,
    "flava": _with_pieces_of_words,
    "imagebind": _with_bytes,
    "languagebind": _with_bytes,
    "llava": _with_pieces,
    "mammut": _with_bytes,
    "merlot_reserve": _with_lower_case_pairs,
    "pali": _with_mt5_pieces,
    "paligemma": _with_gemma_pieces,
    "painter": lambda preset, _: _parts(preset, {}),
    "pg_video_llava": _with_pieces,
    "qwen_vl": _with_ranks,
    "shikra": _with_pieces,
    "siglip": _with_unigrams,
    "video_chatgpt": _with_pieces,
    "vilbert": _with_pieces_of_words,
    "wukong": _with_characters,
}
