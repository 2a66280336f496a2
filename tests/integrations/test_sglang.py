"""SGLang's registry of processors, its processor and its backend for transformers' models, from its Python sources.

No GPU runs here, without which SGLang does not begin: what it imports next to these files, kernels and a server, are
stand-ins. Attention, which it has kernels for, is computed by its definition; the rest of the way from a request to
hidden states is SGLang's own code and hfvlm's.
"""

import __future__

import ast
import asyncio
import importlib.machinery
import sys
import typing
from pathlib import Path
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
sources("sglang")
msgspec = pytest.importorskip("msgspec", reason="comes with SGLang")

NAMES = ("llava", "llava_tiles", "blip2-opt", "qwen_vl", "shikra")
# SGLang's files that run whole, in the order of their imports.
WHOLE = (
    "sglang.srt.multimodal.modality", "sglang.srt.multimodal.processors.base_processor",
    "sglang.srt.multimodal.processors.transformers_auto", "sglang.srt.managers.multimodal_processor",
    "sglang.srt.models.transformers",
)  # fmt: skip
# Of a file of 4,000 lines, what these take from it.
ITEMS = "sglang.srt.managers.schedule_batch", ("MultimodalDataItem", "MultimodalProcessorOutput")
SETTINGS = {
    "get_mm": {
        "allowed_media_domains": None, "media_url_max_file_size_mb": 1, "mm_feature_transport": "cpu",
        "image_processor_backend": "pil", "disable_fast_image_processor": True, "mm_process_config": {},
        "mm_preprocess_cache_size_mb": 0, "trust_mm_content_hashes": False, "mm_io_worker_num": 1,
        "mm_processor_worker_num": 1,
    },
    "get_serving": {"skip_tokenizer_init": False, "tokenizer_worker_num": 1},
    "get_model": {"model_impl": "transformers"},
}  # fmt: skip


class Anything:
    """A class of SGLang's that is not run."""

    def __init__(self, *args, **kwargs):
        pass

    def __or__(self, other):
        return self

    def __getattr__(self, name):
        return False


class StandIns:
    """Finds SGLang's modules that do not run: whatever name is read in them does nothing."""

    def find_spec(self, name, path=None, target=None):
        return importlib.machinery.ModuleSpec(name, self, is_package=True) if name.split(".")[0] == "sglang" else None

    def create_module(self, spec):
        module = ModuleType(spec.name)
        module.__getattr__ = named
        for name, values in SETTINGS.items():
            setattr(module, name, lambda values=values: SimpleNamespace(**values))
        module.load_image = lambda image: (image, image.size)
        return module

    def exec_module(self, module):
        pass


def named(name):
    if name.startswith("__"):
        raise AttributeError(name)
    return type(name, (Anything,), {}) if name[0].isupper() and not name.isupper() else MagicMock(name=name)


def load(folder):
    """Run SGLang's files."""
    sys.meta_path.insert(0, StandIns())
    name, classes = ITEMS
    items = ModuleType(name)
    items.__getattr__ = named
    for each in (WHOLE[0], None, *WHOLE[1:]):
        if each is None:  # after the modalities, which these name
            path = folder / (name.replace(".", "/") + ".py")
            tree = ast.parse(path.read_text(encoding="utf-8"))
            tree.body = [node for node in tree.body if isinstance(node, ast.ClassDef) and node.name in classes]
            modalities = sys.modules[WHOLE[0]]
            vars(items).update({each: getattr(typing, each) for each in typing.__all__}, msgspec=msgspec, torch=torch)
            items.Modality, items.MultimodalInputFormat = modalities.Modality, modalities.MultimodalInputFormat
            items.MultimodalDataValue, sys.modules[name] = object, items
            exec(compile(tree, str(path), "exec", __future__.annotations.compiler_flag), vars(items))
            continue
        path = folder / (each.replace(".", "/") + ".py")
        module = sys.modules[each] = ModuleType(each)
        exec(compile(path.read_text(encoding="utf-8"), str(path), "exec"), vars(module))
    return [sys.modules[each] for each in WHOLE]


class Attention:
    """What SGLang's attention computes of one request's prompt."""

    def __init__(self, heads, key_heads, size):
        self.heads, self.key_heads, self.size, self.scaling = heads, key_heads, size, size**-0.5

    def forward(self, query, key, value, forward_batch):
        query, key, value = (
            x.unflatten(-1, (heads, self.size)).transpose(0, 1)
            for x, heads in ((query, self.heads), (key, self.key_heads), (value, self.key_heads))
        )
        out = torch.nn.functional.scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=self.scaling, enable_gqa=True
        )
        return out.transpose(0, 1).flatten(1)


def image(size):
    return Image.fromarray(np.random.default_rng(sum(size)).integers(0, 255, (*size[::-1], 3), dtype=np.uint8))


def served(folders, root):
    """What SGLang makes of each folder, or how it fails, in a process of its own: stand-ins stay."""
    _, _, _, registry, backend = load(Path(root))

    from hfvlm.integrations import serving

    serving.register()
    found = {}
    for name, folder in folders.items():
        try:
            found[name] = outcome(folder, registry, backend)
        except Exception as error:
            found[name] = {"raised": repr(error)}
    return found


@torch.no_grad()
def outcome(folder, registry, backend):
    from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoProcessor

    whole, own = AutoModelForImageTextToText.from_pretrained(folder).eval(), AutoProcessor.from_pretrained(folder)
    config = AutoConfig.from_pretrained(folder)
    process = registry.get_mm_processor(config, SimpleNamespace(base_gpu_id=0), own, None, skip_mm_pool=True)
    content = [{"type": "image"}, {"type": "image"}, {"type": "text", "text": "What is it?"}]
    text = own.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    media = [image((40, 30)), image((30, 60))]
    request = SimpleNamespace(video_data=None)
    made = asyncio.run(process.process_mm_data_async(media, None, text, request))
    expected = own(text=text, images=media)

    kind = backend._resolve_attention_backend_model_cls(config)
    config.get_text_config()._attn_implementation = "sglang"
    lean = AutoModel.from_config(config).eval()
    lean.load_state_dict(whole.state_dict(), strict=False)
    sizes = config.get_text_config()
    heads, key_heads = sizes.num_attention_heads, getattr(sizes, "num_key_value_heads", None)
    size = getattr(sizes, "head_dim", None) or sizes.hidden_size // heads
    attention = {i: Attention(heads, key_heads or heads, size) for i in range(sizes.num_hidden_layers)}
    served_model = object.__new__(backend.TransformersMultiModalForCausalLM)
    torch.nn.Module.__init__(served_model)
    served_model.model, served_model.embed_scale, served_model.attention_instances = lean, None, attention
    served_model.text_config = sizes
    batch = SimpleNamespace(
        forward_mode=SimpleNamespace(is_decode=lambda: False), contains_mm_inputs=lambda: True,
        mm_inputs=[SimpleNamespace(mm_items=made.mm_items)],
    )  # fmt: skip
    ids = torch.tensor(made.input_ids)
    states = served_model._forward_hidden_states(ids, torch.arange(len(ids)), batch)
    logits = whole.get_output_embeddings()(states)
    return {
        "processor": type(process).__name__,
        "kind": kind.__name__,
        "backend": kind._supports_attention_backend,
        "ids": made.input_ids,
        "expected": expected["input_ids"][0].tolist(),
        "places": [[last - first + 1 for first, last in item.offsets] for item in made.mm_items],
        "counts": own.count_tokens([(each.height, each.width) for each in media]),
        "error": float((logits - whole(**expected).logits[0]).abs().max()),
        "plans": (len(served_model._get_model_tp_plan()), len(served_model._get_model_pp_plan())),
    }


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return run_alone(served, served_folders(NAMES, tmp_path_factory), str(sources("sglang")))


@pytest.mark.parametrize("name", NAMES)
def test_a_folder_is_served(results, name):
    found = results[name]
    assert "raised" not in found, found
    assert found["processor"] == "TransformersAutoMultimodalProcessor"
    assert found["kind"].endswith("ForConditionalGeneration")
    assert found["backend"]
    assert found["ids"] == found["expected"]
    assert sum(sum(lengths) for lengths in found["places"]) == sum(found["counts"]) > 0
    assert found["error"] < 1e-4
    assert min(found["plans"]) >= 3
