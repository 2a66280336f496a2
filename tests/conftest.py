import os
from pathlib import Path

# Nothing in the tests needs the network; whatever tries it fails at once.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
import transformers
from hfvlm.conversion.imagebind import processor_for
from transformers import AutoModel

import hfvlm
from hfvlm.presets import load_preset

torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))
transformers.utils.logging.disable_progress_bar()


SHIPPED = Path(hfvlm.__file__).parent / "samples" / "clip-tiny"


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory):
    """The checkpoint that ships with hfvlm, converted. Read only."""
    return hfvlm.convert(SHIPPED / "clip-tiny.pt", "clip/tiny", tmp_path_factory.mktemp("converted") / "clip-tiny")


@pytest.fixture(scope="session")
def imagebind_folder(tmp_path_factory):
    """An ImageBind that learned nothing yet: the tiny preset with the small CLIP's vocabulary. Read only."""
    folder = tmp_path_factory.mktemp("imagebind")
    preset = load_preset("imagebind/tiny")
    config = preset.make_config()
    torch.manual_seed(0)
    AutoModel.from_config(config).save_pretrained(folder)
    processor_for(config, preset.processor, SHIPPED / "bpe_simple_vocab.txt.gz").save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
