"""What hfvlm overrides or reads of transformers that is private: each is listed, and still there and in use.

Those of `generate` are in tests/modeling/test_generation.py.
"""

import inspect

import pytest
import torch
from transformers import PreTrainedModel, Trainer, modeling_utils, trainer
from transformers.integrations import flex_attention
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.auto import auto_factory, configuration_auto, modeling_auto
from transformers.pipelines import base as pipelines_base
from transformers.utils import hub

import hfvlm
from hfvlm import auto
from hfvlm.inference import media_pipelines, pipelines
from hfvlm.modeling.base import HfvlmPreTrainedModel
from hfvlm.modeling.generation import Generation, WholeTextBeams
from hfvlm.registry import architectures
from hfvlm.training import chat as chat_training
from hfvlm.training import row_trainer
from hfvlm.training import trainer as contrastive_trainer

# Methods and class attributes that classes of hfvlm override: (transformers' class, the module that uses it).
OVERRIDDEN = {
    "_init_weights": (PreTrainedModel, modeling_utils),
    "_no_split_modules": (PreTrainedModel, modeling_utils),
    "_keep_in_fp32_modules_strict": (PreTrainedModel, modeling_utils),
    "_keys_to_ignore_on_load_unexpected": (PreTrainedModel, modeling_utils),
    "_skip_keys_device_placement": (PreTrainedModel, modeling_utils),
    "_supports_sdpa": (PreTrainedModel, modeling_utils),
    "_supports_flash_attn": (PreTrainedModel, modeling_utils),
    "_supports_flex_attn": (PreTrainedModel, modeling_utils),
    "_can_set_attn_implementation": (PreTrainedModel, modeling_utils),
    "_set_gradient_checkpointing": (PreTrainedModel, modeling_utils),
    "_upload_modified_files": (hub.PushToHubMixin, modeling_utils),
    "_get_train_sampler": (Trainer, trainer),
    "_get_dataloader": (Trainer, trainer),
    "_sanitize_parameters": (pipelines_base.Pipeline, pipelines_base),
}
# Read, not overridden.
READ = {
    "_model_mapping": (modeling_auto.AutoModel, auto_factory),
    "_from_config": (PreTrainedModel, auto_factory),
    "is_custom_code": (PreTrainedModel, modeling_utils),
}


def classes_of_hfvlm():
    """Every public class, and those that transformers' Trainer and pipelines run."""
    names = {name for architecture in architectures().values() for name in architecture.names}
    public = [getattr(hfvlm, name) for name in sorted(names)]
    modules = (row_trainer, contrastive_trainer, chat_training, pipelines, media_pipelines)
    return [*public, *(value for module in modules for value in vars(module).values() if isinstance(value, type))]


def overridden():
    """Names by which a class of hfvlm has what a class of transformers calls private."""
    found = set()
    for model_class in classes_of_hfvlm():
        own = [base for base in model_class.__mro__ if base.__module__.startswith("hfvlm.")]
        foreign = [base for base in model_class.__mro__ if base.__module__.startswith("transformers.")]
        for name in {name for base in own for name in vars(base)}:
            if name.startswith("_") and not name.startswith("__") and any(name in vars(base) for base in foreign):
                found.add(name)
    return found


def test_nothing_private_is_overridden_unlisted():
    of_generation = {name for owner in (Generation, WholeTextBeams) for name in vars(owner)}
    # What transformers documents for every model, or Python makes.
    contracts = {
        "_tied_weights_keys",
        "_input_embed_layer",
        "_can_record_outputs",
        "_abc_impl",
        "_supports_attention_backend",
    }
    contracts |= {"_can_compile_fullgraph", "_auto_class", "_load_processor", "_load_image_processor"}
    contracts |= {"_load_feature_extractor", "_load_tokenizer", "_forward"}
    assert overridden() - of_generation - contracts <= set(OVERRIDDEN)


@pytest.mark.parametrize("name", {**OVERRIDDEN, **READ})
def test_transformers_still_has(name):
    owner, user = (OVERRIDDEN | READ)[name]
    if name == "is_custom_code" and "is_custom_code" not in inspect.getsource(user):
        pytest.skip("transformers before 5.20 makes no difference between its own code and others'")
    assert hasattr(owner, name), f"{owner.__name__} has no {name} any more"
    assert name in inspect.getsource(user), f"{user.__name__} does not use {name} any more"


def test_tables_of_auto_classes_take_stand_ins():
    """`auto` writes to them what transformers' own `register` would, without importing a model."""
    assert inspect.signature(auto_factory._LazyAutoMapping.register).parameters.keys() >= {"key", "value", "exist_ok"}
    assert isinstance(modeling_auto.AutoModel._model_mapping, auto_factory._LazyAutoMapping)
    assert isinstance(configuration_auto.CONFIG_MAPPING, configuration_auto._LazyConfigMapping)
    assert auto.TABLES


def test_layers_that_are_run_twice_lose_their_cache():
    """Under gradient checkpointing, as `compat.begin_cache` relies on models to give none."""
    assert "gradient_checkpointing" in vars(GradientCheckpointingLayer)
    model = hfvlm.HfvlmBLIPTextDecoder(
        hfvlm.HfvlmBLIPTextConfig(
            num_hidden_layers=1,
            hidden_size=32,
            vocab_size=40,
            intermediate_size=32,
            num_attention_heads=2,
            bos_token_id=1,
            encoder_token_id=2,
            eos_token_id=3,
        )
    )
    model.train().gradient_checkpointing_enable()
    ids = torch.ones(1, 3, dtype=torch.long)
    assert model(ids, use_cache=True).get("cache") is None


@pytest.mark.integration
def test_flex_attention_compiles():
    """As transformers does; elsewhere the tests run it as plain operations, through the same function."""
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    tower = hfvlm.HfvlmSigLIPVisionModel(hfvlm.HfvlmSigLIPVisionConfig(**sizes, image_size=16, patch_size=8)).eval()
    pixels = torch.randn(1, 3, 16, 16)
    with torch.no_grad():
        expected = tower(pixels).pooler_output
        tower.set_attn_implementation("flex_attention")
        torch._dynamo.reset()
        assert torch.allclose(tower(pixels).pooler_output, expected, atol=1e-5)
    assert flex_attention.WrappedFlexAttention._instance._is_flex_compiled


def subclasses(kind):
    for child in kind.__subclasses__():
        yield child
        yield from subclasses(child)


def test_no_name_of_a_part_keeps_attention_implementations_from_being_set():
    """transformers reads the source: a part `class ...Attention(nn.Module)` must call the implementations itself."""
    for architecture in architectures().values():
        architecture.load()
    ours = [kind for kind in subclasses(HfvlmPreTrainedModel) if kind.__module__.startswith("hfvlm.")]
    assert [kind.__name__ for kind in ours if not kind._can_set_attn_implementation()] == []
