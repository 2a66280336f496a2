import gc
import logging
import os
import shutil
import tempfile
from functools import cache
from itertools import count
from pathlib import Path

# Nothing in the tests needs the network; whatever tries it fails at once.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest

import hfvlm

# torch, transformers and what imports them are imported where they are used: the process that hands the tests out to
# others reads this file too, and they begin when it has.

# To write over a file waits for the disk, up to a tenth of a second: where memory has room for files, they lie there.
MEMORY = Path("/dev/shm")
if "TMPDIR" not in os.environ and MEMORY.is_dir() and shutil.disk_usage(MEMORY).free >= 6 * 2**30:
    os.environ["TMPDIR"] = tempfile.tempdir = str(MEMORY)

NUMBERS = count()
SHIPPED = Path(hfvlm.__file__).parent / "samples" / "clip-tiny"


@pytest.fixture(scope="session", autouse=True)
def _quiet_and_few_threads():
    import torch
    import transformers

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))
    transformers.utils.logging.disable_progress_bar()


@pytest.fixture(autouse=True)
def _logs_as_by_default(_quiet_and_few_threads):
    """Whatever an earlier test, or a library that it started, has set."""
    ours, theirs = logging.getLogger("hfvlm"), logging.getLogger("transformers")
    for logger, level in ((ours, logging.NOTSET), (theirs, logging.WARNING)):
        if logger.level != level:  # setting it empties the cache of every logger
            logger.setLevel(level)
    if logging.root.manager.disable:
        logging.disable(logging.NOTSET)
    for name, logger in list(logging.root.manager.loggerDict.items()):
        if name.startswith("hfvlm") and isinstance(logger, logging.Logger):
            logger.disabled = False
    ours.propagate = True


@pytest.hookimpl(wrapper=True)
def pytest_collection():
    """What is imported stays: garbage is not looked for in the meantime, and never again in it, which each run of a
    Trainer would do."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.collect()
        gc.freeze()
        gc.set_threshold(20_000, 20, 20)  # a model is thousands of objects, none of which is garbage while it is built
        gc.enable()


@pytest.fixture
def tmp_path(tmp_path):
    """A folder of a name that no other test has, though pytest uses that of a removed one again: what reads a file may
    know it by its path."""
    folder = tmp_path / str(next(NUMBERS))
    folder.mkdir()
    return folder


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory):
    """The checkpoint that ships with hfvlm, converted. Read only."""
    return hfvlm.convert(SHIPPED / "clip-tiny.pt", "clip/tiny", tmp_path_factory.mktemp("converted") / "clip-tiny")


@pytest.fixture(scope="session")
def imagebind_folder(tmp_path_factory):
    """An ImageBind that learned nothing yet: the tiny preset with the small CLIP's vocabulary. Read only."""
    import torch
    from transformers import AutoModel

    from hfvlm.conversion.imagebind import processor_for

    folder = tmp_path_factory.mktemp("imagebind")
    preset = hfvlm.load_preset("imagebind/tiny")
    config = preset.make_config()
    torch.manual_seed(0)
    AutoModel.from_config(config).save_pretrained(folder)
    processor_for(config, preset.processor, SHIPPED / "bpe_simple_vocab.txt.gz").save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def small_blip(tmp_path_factory):
    """A BLIP of a given class that learned nothing yet: the tiny preset with a few words. Read only."""
    import torch

    from hfvlm.conversion import blip
    from hfvlm.models.blip import HfvlmBLIPConfig

    @cache
    def make(name):
        folder = tmp_path_factory.mktemp("blip")
        pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"a picture of what shape ? circle square".split()]  # noqa: SIM905
        (folder / "vocab.txt").write_text("\n".join(pieces) + "\n")
        preset = hfvlm.load_preset("blip/tiny")
        ids = {"vocab_size": 15, "bos_token_id": 13, "encoder_token_id": 14, "eos_token_id": 3, "pad_token_id": 0}
        config = HfvlmBLIPConfig(**preset.config | {"text_config": preset.config["text_config"] | ids})
        torch.manual_seed(0)
        getattr(hfvlm, name)(config).save_pretrained(folder)
        blip.processor_for(config, preset.processor, folder / "vocab.txt").save_pretrained(folder)
        return folder

    return make


@pytest.fixture(scope="session")
def flava_folder(tmp_path_factory):
    """A FLAVA for pretraining that learned nothing yet: the tiny preset with a few words. Read only."""
    import torch

    from hfvlm.conversion import flava

    folder = tmp_path_factory.mktemp("flava")
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"a picture of what ##s shape circle square".split()]  # noqa: SIM905
    (folder / "vocab.txt").write_text("\n".join(pieces) + "\n")
    preset = hfvlm.load_preset("flava/tiny")
    config = preset.make_config()
    config.text_config.vocab_size = len(pieces)
    torch.manual_seed(0)
    hfvlm.HfvlmFLAVAForPreTraining(config).save_pretrained(folder)
    flava.processor_for(config, preset.processor, folder / "vocab.txt").save_pretrained(folder)
    return folder


@pytest.fixture
def uncompiled_flex_attention(monkeypatch):
    """Run flex attention as plain operations: compiling it takes ten seconds for every shape of a mask."""
    import torch
    from transformers.integrations.flex_attention import WrappedFlexAttention

    monkeypatch.setattr(torch.nn.attention.flex_attention, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    monkeypatch.setattr(WrappedFlexAttention, "_instance", None)  # what it did not compile ends with the test
    monkeypatch.setattr(
        WrappedFlexAttention, "__call__", lambda self: torch.nn.attention.flex_attention.flex_attention
    )


@pytest.fixture(autouse=True)
def _seed():
    import torch

    torch.default_generator.manual_seed(0)  # `torch.manual_seed` notes the stack for a GPU that is not there
