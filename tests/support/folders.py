"""Small folders of architectures that learned nothing, with processors, as `convert` writes them."""

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from transformers import AutoModel

import hfvlm
from hfvlm.release.sentence_files import write_sentence_files
from hfvlm.release.sources import conversion_of
from hfvlm.release.untrained import KINDS
from tests.conftest import SHIPPED
from tests.support.paths import OURS

BYTES = SHIPPED / "bpe_simple_vocab.txt.gz"
VOCABULARIES = {"clip": BYTES, "filip": BYTES, "languagebind": BYTES}
VOCABULARIES["siglip"] = OURS / "siglip" / "processor-tokenizer-tiny" / "tiny.model"


def tiny_folder(name: str, folder: Path) -> Path:
    """Write a folder of an architecture's tiny preset; "blip2" is of the first stage, "blip2-opt" of the second."""
    if name in KINDS:
        hfvlm.untrained(name, folder)
        model = AutoModel.from_pretrained(folder)
    else:
        torch.manual_seed(0)
        model, processor = parts_of(name)
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
    write_sentence_files(folder, model)
    return folder


def parts_of(name: str) -> tuple:
    """A model and its processor."""
    if name.startswith("blip2"):
        from tests.models.blip2.test_conversion import BERT, CASES, tiny

        kind = name.partition("-")[2]
        model = tiny(kind or None)
        return model, processor_of("blip2", model.config, {}, CASES / "opt-eva" / "opt_vocab.json" if kind else BERT)
    preset = hfvlm.load_preset(f"{name}/tiny")
    if name in VOCABULARIES:
        config = preset.make_config()
        return AutoModel.from_config(config), processor_of(name, config, preset.processor, VOCABULARIES[name])
    with TemporaryDirectory() as scratch:  # of word pieces, as BERT's
        config, processor = KINDS["vilbert"](preset, Path(scratch))
    return AutoModel.from_config(config), processor


def processor_of(name: str, config: Any, settings: dict, vocabulary: Path) -> Any:
    return conversion_of(name).processor_for(config, settings, vocabulary)
