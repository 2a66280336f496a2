"""Small folders of architectures that learned nothing, with processors, as `convert` writes them."""

from collections.abc import Iterable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from transformers import AutoModel

import hfvlm
from hfvlm.release.sentence_files import write_sentence_files
from hfvlm.release.sources import conversion_of
from tests.support.towers import TOWERS, parts_with_tower


def tiny_folder(name: str, folder: Path) -> Path:
    """Write a folder of an architecture's tiny preset, or of one of `TOWERS`; "blip2" is of the first stage,
    "blip2-opt" of the second."""
    if name.partition("-")[0] in ("blip2", "merlot_reserve") or name in TOWERS:
        model, processor = parts_of(name)
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
    else:
        hfvlm.untrained(name, folder)
        model = AutoModel.from_pretrained(folder)
    write_sentence_files(folder, model)
    return folder


def served_folders(names: Iterable[str], factory: Any) -> dict[str, str]:
    """Write the folders that servers load, one of a LLaVA that reads tiles; `factory` is pytest's of folders."""
    folders = {}
    for name in names:
        parent = factory.mktemp(name)
        if name == "llava_tiles":
            from tests.models.llava.tiny import GRID, converted

            folder = converted(parent, grid_pinpoints=GRID, patch_merge="spatial_unpad")
        else:
            folder = tiny_folder(name, parent / name)
        folders[name] = str(folder)
    return folders


def parts_of(name: str) -> tuple[Any, Any]:
    """Make a model and its processor."""
    if name.startswith("blip2"):
        from tests.models.blip2.test_conversion import BERT, CASES, tiny

        kind = name.partition("-")[2]
        model = tiny(kind or None)
        vocabulary = CASES / "opt-eva" / "opt_vocab.json" if kind else BERT
        return model, conversion_of("blip2").processor_for(model.config, {}, vocabulary)
    if name != "merlot_reserve":
        return parts_with_tower(name)
    from tests.models.merlot_reserve.vocabulary import written_vocabulary

    preset = hfvlm.load_preset("merlot_reserve/tiny")
    config = preset.make_config()
    with TemporaryDirectory() as scratch:
        vocabulary = written_vocabulary(Path(scratch) / "lowercase_encoder.json", config.vocab_size)
        processor = conversion_of(name).processor_for(config, preset.processor, vocabulary)
    torch.manual_seed(0)
    return AutoModel.from_config(config).eval(), processor
