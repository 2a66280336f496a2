import struct

import pytest
import torch
from transformers import AutoModel, AutoProcessor

import hfvlm
from hfvlm.checkpoints.key_table import restore_keys
from hfvlm.checkpoints.originals import UnsupportedOriginalError
from hfvlm.conversion.merlot_reserve import CONVERSION, config_from_original
from hfvlm.models.merlot_reserve import HfvlmMERLOTReserveForMultipleChoice, HfvlmMERLOTReserveModel
from hfvlm.presets import list_presets, load_preset
from tests.models.merlot_reserve.test_modeling import config
from tests.models.merlot_reserve.vocabulary import written_vocabulary


def packed(value) -> bytes:
    """What flax.serialization makes of nested dictionaries of arrays."""
    if isinstance(value, dict):
        entries = b"".join(packed(name) + packed(item) for name, item in value.items())
        return b"\xde" + struct.pack(">H", len(value)) + entries
    if isinstance(value, str):
        return b"\xd9" + bytes([len(value)]) + value.encode()
    if value is None:
        return b"\xc0"
    if isinstance(value, int):
        return b"\xce" + struct.pack(">I", value)
    shape = b"\xdc" + struct.pack(">H", value.ndim) + b"".join(b"\xce" + struct.pack(">I", n) for n in value.shape)
    data = value.numpy().tobytes()
    inner = b"\x93" + shape + packed("float16") + b"\xc6" + struct.pack(">I", len(data)) + data
    return b"\xc9" + struct.pack(">I", len(inner)) + b"\x01" + inner


def released(model, path):
    """A file as the authors' training saves it: half precision, next to the number of its steps."""
    rows = CONVERSION.keys_for(model.config)
    tree: dict = {}
    for key, tensor in restore_keys(model.state_dict(), rows).items():
        *names, last = key.split("/")
        place = tree
        for name in names:
            place = place.setdefault(name, {})
        place[last] = tensor.half().contiguous()
    path.write_bytes(packed({"step": 750_000, "params": tree, "opt_state": None}))
    return path


# Heads of 32 of 64: two, which the shapes tell.
SIZES = {"num_span_layers": 4, "max_span_length": 15, "num_target_spans": 48}
ORIGINAL = {
    "output_grid": [4, 6],
    "audio_seq_length": 12,
    "audio_token_length": 2,
    "vit_patch_size": 4,
    "text_span_length": 15,
    "hidden_size": 64,
}


@pytest.mark.parametrize("head", ["HfvlmMERLOTReserveModel", "HfvlmMERLOTReserveForMultipleChoice"])
def test_a_released_file_becomes_a_folder(head, tmp_path):
    kind = {k.__name__: k for k in (HfvlmMERLOTReserveModel, HfvlmMERLOTReserveForMultipleChoice)}[head]
    torch.manual_seed(0)
    model = kind(config(head, **SIZES)).eval()
    path = released(model, tmp_path / "base")
    vocabulary = written_vocabulary(tmp_path / "lowercase_encoder.json", 40)
    hfvlm.convert(path, "merlot_reserve", tmp_path / "out", original=ORIGINAL, vocabulary=vocabulary)
    loaded = AutoModel.from_pretrained(tmp_path / "out")
    assert type(loaded) is kind
    for name, value in model.state_dict().items():
        torch.testing.assert_close(loaded.state_dict()[name].float(), value, atol=1e-3, rtol=1e-3)
    processor = AutoProcessor.from_pretrained(tmp_path / "out")
    assert processor.image_processor.size == {"height": 16, "width": 24}
    assert (processor.feature_extractor.num_frames, processor.num_audio_tokens) == (12, 2)


def test_what_cannot_be_done_is_refused(tmp_path):
    tensors = restore_keys(HfvlmMERLOTReserveModel(config(**SIZES)).state_dict(), CONVERSION.keys_for(config(**SIZES)))
    for original in (
        {"model": {"made_up": 1}},
        {"model": {}, "made_up": 1},
        {"output_grid": [4, 6], "no_vision": True},
    ):
        with pytest.raises(UnsupportedOriginalError, match="made_up|no_vision"):
            config_from_original(original, tensors)
    with pytest.raises(UnsupportedOriginalError, match="do_rotary"):
        config_from_original({"model": {"do_rotary": False}}, tensors)


def test_every_release_has_a_preset():
    sizes = [f"{kind}{size}{suffix}" for size in ("base", "large") for kind, suffix in
             (("", ""), ("", "_resadapt"), ("vcr_finetune_", ""), ("tvqa_finetune_", ""))]  # fmt: skip
    assert {f"merlot_reserve/{name}" for name in (*sizes, "tiny")} == set(list_presets("merlot_reserve"))
    adapted = load_preset("merlot_reserve/large_resadapt").make_config()
    assert adapted.vision_config.grid == (18, 32)
    assert adapted.num_hidden_layers == 24
