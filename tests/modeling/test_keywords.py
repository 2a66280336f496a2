"""No keyword argument is swallowed."""

import inspect
import re
from contextlib import nullcontext
from functools import cache
from typing import Any, Unpack

import pytest
import torch
from transformers import PreTrainedModel
from transformers.utils.generic import TransformersKwargs, find_labels

import hfvlm
from hfvlm.modeling import keywords
from hfvlm.modeling.compat import CACHE
from hfvlm.modeling.keywords import Keywords, StrictKeywords, keywords_of, parameters
from hfvlm.presets import list_presets, load_preset
from hfvlm.registry import architectures
from tests.originals.common import needs_timm


def public_classes():
    names = {
        name for architecture in architectures().values() for group in architecture.models.values() for name in group
    }
    return [getattr(hfvlm, name) for name in sorted(names)]


@cache
def configs():
    """Return every preset's configuration and those inside it, tiny ones first."""
    names = sorted(list_presets(), key=lambda name: not name.endswith("/tiny"))
    whole = [load_preset(name).make_config() for name in names]
    return [*whole, *(getattr(config, name) for config in whole for name in config.sub_configs)]


@cache
def without_memory(model_class):
    """Return a model of a class, of the first preset that has one."""
    own = [config for config in configs() if type(config) is model_class.config_class]
    named = [config for config in own if config.architectures == [model_class.__name__]]
    config = (named or own or [model_class.config_class()])[0]
    needs_timm(config)
    with torch.device("meta"):
        return model_class(config)


CLASSES = public_classes()
METHODS = [
    (model_class, name)
    for model_class in CLASSES
    for name in dir(model_class)
    if name in ("forward", "generate") or re.fullmatch(r"get_\w+_features", name)
    if name != "generate" or model_class.can_generate()
]


@pytest.mark.parametrize(("model_class", "method"), METHODS, ids=lambda value: getattr(value, "__name__", value))
def test_an_unknown_keyword_is_named(model_class, method):
    """With the nearest that is known, before anything is computed."""
    model = without_memory(model_class)
    call = getattr(model, method)
    with pytest.raises(TypeError, match=rf"{model_class.__name__}\.{method}\(\) .*'made_up'.*nearest"):
        call(made_up=1)
    first = next(iter(inspect.signature(call).parameters))
    with pytest.raises(TypeError, match=rf"'{first}x'.*nearest that it knows is '{first}'"):
        call(**{f"{first}x": 1})


def test_every_public_class_is_strict():
    assert [
        c.__name__ for c in CLASSES if not issubclass(c, StrictKeywords) or not issubclass(c, PreTrainedModel)
    ] == []


@pytest.mark.parametrize("model_class", CLASSES, ids=lambda c: c.__name__)
def test_keywords_of_transformers_are_known(model_class):
    """Those of its runtime pass the check; the forward then asks for its own arguments."""
    known = dict.fromkeys(TransformersKwargs.__optional_keys__ - {"position_ids"})
    with pytest.raises((TypeError, ValueError)) as caught:
        without_memory(model_class).forward(**known)
    assert "unexpected keyword" not in str(caught.value)


def test_they_are_all_that_transformers_has():
    assert set(TransformersKwargs.__optional_keys__) - {"position_ids"} <= set(Keywords.__optional_keys__)


def deprecated_cache_name(name):
    """Expect a warning where a cache has a name that transformers gave up."""
    if name == CACHE or CACHE == "past_key_values":
        return nullcontext()
    return pytest.warns(FutureWarning, match=f"`{name}` is deprecated for")


def test_a_cache_has_two_names():
    class Model(StrictKeywords):
        def forward(self, x: int, cache: Any = None) -> Any:
            return cache

    with deprecated_cache_name("past_key_values"):
        assert Model().forward(1, past_key_values="kept") == "kept"
    assert Model().forward(1, cache="kept") == "kept"
    assert CACHE in inspect.signature(Model.forward).parameters
    with deprecated_cache_name("past_key_values"), pytest.raises(TypeError, match="both"):
        Model().forward(1, past_key_values="kept", cache="kept")


def test_the_trainer_evaluates_batches_without_shifted_labels():
    """It computes a loss in evaluations where a batch has all labels that a signature names."""
    named = {name for model_class in CLASSES for name in find_labels(model_class)}
    assert "labels" in named
    assert "shift_labels" not in named
    assert "shift_labels" in inspect.signature(hfvlm.HfvlmBLIPForConditionalGeneration.forward).parameters


def test_what_is_handed_on_must_be_declared():
    with pytest.raises(TypeError, match="must declare"):

        class Swallower(StrictKeywords):
            def forward(self, **kwargs: Any) -> Any:
                """Take anything."""

    class Declared(StrictKeywords):
        def forward(self, **kwargs: Unpack[Keywords]) -> Any:
            return kwargs

    assert Declared().forward(output_attentions=True) == {"output_attentions": True}


def test_a_signature_is_read_once_for_a_class(monkeypatch):
    class Reader(torch.nn.Module):
        def forward(self, x, scale=1.0):
            return x * scale

    reader, read = Reader(), []
    monkeypatch.setattr(keywords, "parameters", lambda method: (read.append(method), parameters(method))[1])
    for _ in range(3):
        assert keywords_of(Reader()) == {"x", "scale"}
    assert len(read) == 1
    reader.forward = lambda x, shift: x + shift  # as hooks replace it
    assert keywords_of(reader) == {"x", "shift"}
    monkeypatch.setattr(Reader, "forward", lambda self, y: y)  # as patches of kernels do
    assert keywords_of(Reader()) == {"y"}
