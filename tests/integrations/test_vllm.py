"""vLLM's registry and processor of its backend for transformers' models, from its Python sources, on folders of hfvlm.

No GPU runs here: of vLLM, what looks models up and prepares their inputs. Its compiled kernels, and packages for audio
that this part imports and does not use, are stand-ins; the models are hfvlm's own, as AutoModel makes them there.
"""

import importlib.machinery
import sys
from types import ModuleType, SimpleNamespace
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch
from PIL import Image

from tests.support.folders import served_folders
from tests.support.neighbours import sources
from tests.support.processes import run_alone

pytestmark = pytest.mark.integration
sources("vllm")

NAMES = ("llava", "llava_tiles", "blip2-opt", "qwen_vl", "shikra", "video_chatgpt")
STAND_INS = ("soxr", "vllm._C", "vllm._C_stable_libtorch", "vllm._moe_C")


class StandIns:
    """Finds modules that are not there, whose names may be read, and do nothing."""

    def find_spec(self, name, path=None, target=None):
        return importlib.machinery.ModuleSpec(name, self, is_package=True) if name in STAND_INS else None

    def create_module(self, spec):
        module = ModuleType(spec.name)
        module.__getattr__ = lambda name: MagicMock(name=name)
        return module

    def exec_module(self, module):
        pass


def image(size):
    return Image.fromarray(np.random.default_rng(sum(size)).integers(0, 255, (*size[::-1], 3), dtype=np.uint8))


def served(folders):
    """What vLLM makes of each folder, or how it fails, in a process of its own: its import changes much of torch."""
    sys.meta_path.append(StandIns())
    sources("vllm")

    from hfvlm.integrations import serving

    serving.register()
    found = {}
    for name, folder in folders.items():
        try:
            found[name] = outcome(folder)
        except Exception as error:
            found[name] = {"raised": repr(error)}
    return found


@torch.no_grad()
def outcome(folder):
    from transformers import AutoModel, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer
    from vllm.config.multimodal import MultiModalConfig
    from vllm.model_executor.models.registry import ModelRegistry
    from vllm.model_executor.models.transformers.multimodal import (
        MultiModalDummyInputsBuilder,
        MultiModalProcessingInfo,
        MultiModalProcessor,
    )
    from vllm.multimodal.processing import InputProcessingContext

    # Off, as of all models of this backend: none of them normalises pixels itself.
    settings = MultiModalConfig(mm_device_do_normalize=False)
    whole, own = AutoModelForImageTextToText.from_pretrained(folder).eval(), AutoProcessor.from_pretrained(folder)
    config = SimpleNamespace(
        model=folder, hf_config=whole.config, dtype=torch.float32, multimodal_config=settings, revision=None,
        get_multimodal_config=lambda: settings, trust_remote_code=False, encoder_config=None, max_model_len=None,
        hf_image_processor_config={}, processor_revision=None, model_impl="auto",
        _get_transformers_backend_cls=lambda: "TransformersMultiModalForCausalLM",
    )  # fmt: skip
    backend = ModelRegistry._try_resolve_transformers(whole.config.architectures[0], config)
    info = MultiModalProcessingInfo(InputProcessingContext(config, AutoTokenizer.from_pretrained(folder)))
    process = MultiModalProcessor(info, MultiModalDummyInputsBuilder(info))
    content = [{"type": own.modality}, {"type": own.modality}, {"type": "text", "text": "What is it?"}]
    text = own.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    media = [image((40, 30)), image((30, 60))]
    data, group = {"image": media}, {"images": media}
    if own.modality == "video":
        media = [np.random.default_rng(i).integers(0, 255, (4 + i, 32, 32, 3), dtype=np.uint8) for i in range(2)]
        about = [
            {
                "fps": 1,
                "total_num_frames": len(each),
                "frames_indices": [*range(len(each))],
                "do_sample_frames": True,
            }
            for each in media
        ]
        data, group = {"video": list(zip(media, about, strict=True))}, {"videos": media}
    expected = own(text=text, **group)
    made = process(text if own.media_mark else own.encode(text), info.get_data_parser().parse_mm_data(data))
    inputs = made["mm_kwargs"].get_data()
    lean = AutoModel.from_config(whole.config).eval()
    lean.load_state_dict(whole.state_dict(), strict=False)
    features = getattr(lean, f"get_{own.modality}_features")
    known = {key: value for key, value in inputs.items() if not key.startswith("num_") or key == "num_frames"}
    states = lean(
        inputs_embeds=lean.embed(torch.tensor([made["prompt_token_ids"]]), {own.modality: features(**known)})
    )
    logits = whole.get_output_embeddings()(states[0])
    limits = info.get_mm_max_tokens_per_item(1024, {own.modality: 1})
    return {
        "backend": backend,
        "ids": made["prompt_token_ids"],
        "expected": expected["input_ids"][0].tolist(),
        "places": [int(each.get_num_embeds()) for each in made["mm_placeholders"][own.modality]],
        "counts": [len(rows) for rows in features(**known).pooler_output],
        "error": float((logits - whole(**expected).logits).abs().max()),
        "limits": limits,
        "plans": (len(lean.tp_plan), len(lean.pp_plan)),
    }


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return run_alone(served, served_folders(NAMES, tmp_path_factory))


@pytest.mark.parametrize("name", NAMES)
def test_a_folder_is_served(results, name):
    found = results[name]
    assert "raised" not in found, found
    assert found["backend"] == "TransformersMultiModalForCausalLM"
    assert found["ids"] == found["expected"]
    assert found["places"] == found["counts"]
    assert found["error"] < 1e-4
    assert min(found["limits"].values()) > 0
    assert min(found["plans"]) >= 3
