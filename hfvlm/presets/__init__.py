"""What is known of the released checkpoints: presets, licences, model cards."""

from hfvlm.presets.files import Preset, list_presets, load_preset

__all__ = ["Preset", "list_presets", "load_preset"]
