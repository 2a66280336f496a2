"""Reads the tensors of a released file without running anything that is in it.

safetensors, PyTorch's files (`.pt .pth .bin`, zip archives and those from before 1.6), TorchScript archives, NumPy's
`.npz`, TensorFlow's checkpoints, and folders of shards. The format is recognised by content, never by name. Tensors
stay in the file until they are used, and are checked against the file's checksums, where it has some, when they are.
"""

from hfvlm.checkpoints.errors import CheckpointError
from hfvlm.checkpoints.reading import TABLE_END, WEIGHTS, Checkpoint, read_checkpoint, weights_in
from hfvlm.checkpoints.wrappers import WRAPPERS, without_prefix

__all__ = [
    "TABLE_END",
    "WEIGHTS",
    "WRAPPERS",
    "Checkpoint",
    "CheckpointError",
    "read_checkpoint",
    "weights_in",
    "without_prefix",
]
