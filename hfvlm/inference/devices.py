"""The device that a name stands for, or an error that says which there are."""

import torch

from hfvlm.messages import shown


def device_of(name: str | torch.device) -> torch.device:
    """The device of a name; "auto" is the accelerator where there is one, and the CPU otherwise.

    Raises:
        ValueError: there is no such device here.
    """
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if str(name) == "auto":
        return accelerator or torch.device("cpu")
    kinds = ["cpu", "meta", *([accelerator.type] if accelerator else [])]
    try:
        device = torch.device(name)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"device {shown(name)} is none: use auto, {', '.join(kinds)}.") from error
    count = torch.accelerator.device_count() if accelerator else 0
    if device.type not in kinds or (accelerator and device.type == accelerator.type and (device.index or 0) >= count):
        there = f"{count} of {accelerator.type}, and the CPU" if accelerator else "the CPU alone"
        raise ValueError(f"device {shown(str(name))} is not here, but {there}: use device='auto' or 'cpu'.")
    return device
