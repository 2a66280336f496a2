import os
from pathlib import Path

# Nothing in the tests needs the network; whatever tries it fails at once.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
import transformers

import hfvlm

torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))
transformers.utils.logging.disable_progress_bar()


SHIPPED = Path(hfvlm.__file__).parent / "samples" / "clip-tiny"


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory):
    """The checkpoint that ships with hfvlm, converted. Read only."""
    return hfvlm.convert(SHIPPED / "clip-tiny.pt", "clip/tiny", tmp_path_factory.mktemp("converted") / "clip-tiny")


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
