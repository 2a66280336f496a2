"""Run a script under accelerate's FSDP2 on CPUs: `python -m tests.support.sharded_on_cpus SCRIPT ARGUMENTS`.

accelerate shards where it finds GPUs. Here it believes that it has found some, that their device is the CPU and their
backend gloo; what shards, gathers, saves and loads is its own code, and PyTorch's.
"""

import os
import runpy
import sys

from accelerate import PartialState
from accelerate.utils import DistributedType

if __name__ == "__main__":
    os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
    PartialState._prepare_backend = lambda *_: ("gloo", DistributedType.MULTI_GPU)
    sys.argv = sys.argv[1:]
    runpy.run_path(sys.argv[0], run_name="__main__")
