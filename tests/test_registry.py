"""`import hfvlm`: cheap, silent, repeatable, and found by every Auto class."""

import json
import subprocess
import sys
import tomllib

import pytest
import transformers
from transformers import AutoConfig, AutoModel, AutoProcessor, AutoTokenizer, pipeline
from transformers.models.auto import modeling_auto

# Under this name it needs no torchvision in any transformers 5.
from transformers.models.auto.image_processing_auto import AutoImageProcessor

import hfvlm
from hfvlm.registry import architectures
from tests.support.paths import ROOT
from tests.support.processes import run_fresh

AUTO = "from transformers import AutoConfig, AutoModel, AutoProcessor, AutoTokenizer, pipeline"
COSTS = """
import json, sys, time
def memory(): return int(open("/proc/self/statm").read().split()[1]) * 4096
start, before = time.process_time(), memory()
import hfvlm
seconds, grown = time.process_time() - start, memory() - before
loaded = [name for name in sys.modules if "modeling_" in name and name.startswith("hfvlm")]
print(json.dumps([seconds, grown, loaded]))
"""
FOUND = """
import sys
import hfvlm
from transformers.models.auto.tokenization_auto import AutoTokenizer
import transformers
from transformers.models.auto.image_processing_auto import AutoImageProcessor
autos = [AutoTokenizer, AutoImageProcessor, transformers.AutoProcessor, transformers.AutoModel]
autos += [transformers.AutoConfig, transformers.AutoModelForZeroShotImageClassification]
found = [type(auto.from_pretrained(folder)).__name__.removeprefix("HfvlmCLIP") for auto in autos]
from transformers.pipelines import PIPELINE_REGISTRY
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as table
found += ["video-text-to-text" in PIPELINE_REGISTRY.get_supported_tasks()]
found += [table[t] == ["q_proj", "v_proj"] for t in ("hfvlm_clip", "hfvlm_siglip", "hfvlm_clip_vision")]
for host in (transformers, sys.modules["transformers"]):
    found += [host.HfvlmCLIPModel.config_class.__name__ == "HfvlmCLIPConfig"]
print(found)
"""
TAKEN = """
from transformers.models.auto import configuration_auto, modeling_auto
configuration_auto.CONFIG_MAPPING_NAMES["hfvlm_clip"] = "HfvlmCLIPConfig"
configuration_auto.CONFIG_MAPPING._mapping["hfvlm_clip"] = "HfvlmCLIPConfig"
modeling_auto.MODEL_MAPPING_NAMES["hfvlm_clip"] = "HfvlmCLIPModel"
modeling_auto.MODEL_MAPPING._reverse_config_mapping["HfvlmCLIPConfig"] = "hfvlm_clip"
import hfvlm
config = AutoConfig.for_model("hfvlm_clip")
print(type(config).__module__, AutoModel._model_mapping[type(config)].__name__)
"""
ALONE = """
from hfvlm.models.siglip.configuration_siglip import HfvlmSigLIPTextConfig
print(type(AutoModel.from_config(HfvlmSigLIPTextConfig(num_hidden_layers=1))).__name__)
"""
# What follows an import of transformers' Auto classes, each in a fork of the process that has imported them. The costs
# are taken three times: what else runs on the machine, and the pages that a fork copies, only add to them.
AFTERWARDS = {"everything": f"import peft\n{FOUND}", "taken": TAKEN, "alone": ALONE}
AFTERWARDS |= {f"costs {i}": COSTS for i in range(3)}
FORKS = """
import gc, os, sys
gc.collect()
gc.freeze()
for code in afterwards:
    if child := os.fork():
        assert os.waitpid(child, 0)[1] == 0, code
    else:
        exec(code)
        sys.stdout.flush()
        os._exit(0)
"""


def run(code: str) -> str:
    """In a process that has imported nothing of transformers; what it prints last."""
    return run_fresh(code).stdout.strip().splitlines()[-1]


@pytest.fixture(scope="module")
def afterwards(clip_folder):
    """What each of `AFTERWARDS` prints last."""
    code = f"{AUTO}\nfolder, afterwards = {str(clip_folder)!r}, {list(AFTERWARDS.values())!r}\n{FORKS}"
    lines = run_fresh(code).stdout.splitlines()
    assert len(lines) == len(AFTERWARDS), lines
    return dict(zip(AFTERWARDS, lines, strict=True))


def test_costs_little_beyond_the_auto_classes(afterwards):
    costs = [json.loads(printed) for of, printed in afterwards.items() if of.startswith("costs")]
    seconds, grown, loaded = min(costs)
    assert seconds <= 0.1, costs
    assert grown <= 20e6
    assert loaded == []


def test_imports_nothing_of_transformers():
    heavy = "('torch', 'transformers', 'numpy', 'huggingface_hub', 'typer', 'PIL')"
    code = f"import hfvlm, hfvlm.presets, sys; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


BEFORE = {"nothing": "", "configurations": "from transformers import AutoConfig", "everything": None}


@pytest.mark.parametrize("before", BEFORE)
def test_auto_classes_and_peft_know_the_models_in_any_order_of_imports(before, clip_folder, afterwards):
    """The tokenizer's class is the first to be looked for, before any module of a model is loaded."""
    code = BEFORE[before]
    printed = afterwards[before] if code is None else run(f"{code}\nfolder = {str(clip_folder)!r}\n{FOUND}")
    classes = ["Tokenizer", "ImageProcessor", "Processor", "Model", "Config", "Model"]
    assert printed == str([*classes, *[True] * 6])


def test_needs_no_network_and_no_extra_but_names_its_pip_line():
    printed = run("""
        import socket, sys
        def refuse(*_, **__): raise AssertionError("network")
        socket.socket.connect = socket.getaddrinfo = refuse
        for name in ("peft", "sklearn", "matplotlib", "datasets", "evaluate", "sentencepiece", "av", "bitsandbytes"):
            sys.modules[name] = None
        import hfvlm
        hfvlm.HfvlmCLIPModel, hfvlm.HfvlmSigLIPProcessor
        try: hfvlm.lora(None)
        except ImportError as error: print(error)
    """)
    assert "pip install 'hfvlm[train]'" in printed


def test_survives_upstream_taking_its_names(afterwards):
    assert afterwards["taken"] == "hfvlm.models.clip.configuration_clip HfvlmCLIPModel"


def test_registering_again_changes_nothing():
    before = dict(architectures())
    hfvlm.register()
    assert architectures() == before


def test_servers_find_the_models_that_chat():
    for architecture in architectures().values():
        for name in architecture.models.get("AutoModelForImageTextToText", ()):
            assert name in modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.values()
            real = getattr(hfvlm, name)
            assert getattr(transformers, name) is real


def test_auto_classes(clip_folder):
    assert type(AutoConfig.from_pretrained(clip_folder)).__name__ == "HfvlmCLIPConfig"
    assert type(AutoModel.from_pretrained(clip_folder)).__name__ == "HfvlmCLIPModel"
    assert type(AutoProcessor.from_pretrained(clip_folder)).__name__ == "HfvlmCLIPProcessor"
    assert type(AutoTokenizer.from_pretrained(clip_folder)).__name__ == "HfvlmCLIPTokenizer"
    assert type(AutoImageProcessor.from_pretrained(clip_folder)).__name__ == "HfvlmCLIPImageProcessor"


def test_every_public_class_is_reachable_from_the_top():
    for architecture in architectures().values():
        for name in architecture.names:
            found = getattr(hfvlm, name)
            assert found.__name__ == name
            assert found.__doc__, name


def test_a_model_made_from_a_configuration_alone_is_found(afterwards):
    assert afterwards["alone"] == "HfvlmSigLIPTextModel"


def test_vllm_finds_the_entry_point():
    from importlib.metadata import EntryPoint

    from hfvlm.integrations import serving

    points = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]
    entry = EntryPoint("hfvlm", points["vllm.general_plugins"]["hfvlm"], "vllm.general_plugins")
    assert entry.load() is serving.register


def test_stock_pipeline(clip_folder):
    from hfvlm.samples import digits

    classify = pipeline("zero-shot-image-classification", model=str(clip_folder))
    seven = next(d.image for d in digits.load_digits("test") if d.label == 7)
    answers = classify(seven, candidate_labels=["zero", "three", "seven"], hypothesis_template="a handwritten {}")
    assert answers[0]["label"] == "seven"
    assert answers[0]["score"] > 0.9


def test_unknown_names_are_attribute_errors():
    with pytest.raises(AttributeError, match="hfvlm has no 'nothing'"):
        hfvlm.nothing  # noqa: B018
    with pytest.raises(AttributeError, match=r"hfvlm.models.clip has no 'HfvlmCLAPModel'; it has HfvlmCLIPConfig"):
        hfvlm.models.clip.HfvlmCLAPModel  # noqa: B018
