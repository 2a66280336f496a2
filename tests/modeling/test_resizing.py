"""Models whose vocabulary grows or shrinks: every table and every head of it does, also in what is saved."""

import importlib
import pkgutil

import pytest
import torch
from torch import nn

import tests.models
from hfvlm.models.blip import HfvlmBLIPForPreTraining
from tests.support.suite import ModelSuite, same, tensors

MORE = 5


def suites(parent: type = ModelSuite):
    for suite in parent.__subclasses__():
        yield suite
        yield from suites(suite)


for package in pkgutil.iter_modules(tests.models.__path__):
    importlib.import_module(f"tests.models.{package.name}.test_modeling")
SUITES = [
    suite
    for suite in dict.fromkeys(suites())
    if suite.__name__.startswith("Test") and any("ids" in name for name in suite().inputs())
]


def vocabulary(suite):
    """A model and the table of its tokens."""
    torch.manual_seed(0)
    model = suite.model_class(suite.config()).eval()
    table = model.get_input_embeddings()
    assert isinstance(table, nn.Embedding)
    return model, table


def with_token(suite, token):
    """The inputs of a suite, texts of which end in `token`."""
    torch.manual_seed(1)
    batch = suite.inputs()
    apart = hasattr(suite.config(), "decoder_config")  # a decoder with a table of its own
    for name in ("input_ids",) if apart else ("input_ids", "decoder_input_ids"):
        if name in batch:
            batch[name] = batch[name].clone()
            batch[name][:, -1] = token
    return batch


@pytest.fixture(params=SUITES, ids=lambda suite: f"{suite.__module__.split('.')[2]}-{suite.__name__}")
def suite(request):
    return request.param()


def test_a_new_token_is_read_scored_trained_and_saved(suite, tmp_path):
    model, table = vocabulary(suite)
    rows = table.weight.shape[0]
    old = table.weight.detach().clone()
    grown = model.resize_token_embeddings(rows + MORE)
    assert grown is model.get_input_embeddings()
    assert grown.weight.shape[0] == model.config.get_text_config().vocab_size == model.vocab_size == rows + MORE
    assert torch.equal(grown.weight[:rows], old)
    if (head := model.get_output_embeddings()) is not None:
        assert head.weight.shape[0] == rows + MORE
    assert [name for name, x in model.named_parameters() if rows in x.shape and "token" in name] == []
    batch = with_token(suite, rows + MORE - 1)
    gradients = model.train() and suite_gradients(suite, model, batch)
    assert gradients
    model.eval()
    expected = suite.run(model, batch)
    model.save_pretrained(tmp_path)
    loaded, info = suite.model_class.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    for parameter in loaded.parameters():  # products with one column are rounded by where in memory factors begin
        parameter.data = parameter.data.clone()
    same(suite.run(loaded.eval(), batch), expected, exact=True)


def suite_gradients(suite, model, batch):
    model.zero_grad()
    suite.objective(model, batch).backward()
    return [name for name, p in model.named_parameters() if p.grad is not None]


def test_tables_are_padded_and_shrink(suite, tmp_path):
    model, table = vocabulary(suite)
    rows = table.weight.shape[0]
    model.resize_token_embeddings(pad_to_multiple_of=64, mean_resizing=False)
    padded = model.get_input_embeddings().weight.shape[0]
    assert padded % 64 == 0
    assert padded >= rows
    model.resize_token_embeddings(rows + MORE)
    model.save_pretrained(tmp_path)
    loaded = suite.model_class.from_pretrained(tmp_path)
    same(dict(loaded.state_dict()), dict(model.state_dict()), exact=True)
    assert suite.run(loaded.eval(), with_token(suite, rows + MORE - 1))


def test_tied_tables_of_pretraining_stay_one():
    suite = next(s for s in SUITES if s.model_class is HfvlmBLIPForPreTraining)()
    model, table = vocabulary(suite)
    rows = table.weight.shape[0]
    model.resize_token_embeddings(rows + MORE)
    weight = model.text_model.embeddings.token.weight
    assert model.text_decoder.embeddings.token.weight is weight
    assert model.text_decoder.lm_head.decoder.weight is weight
    assert model.text_decoder.lm_head.decoder.bias.shape[0] == rows + MORE
    teacher = model.teacher.text_model.embeddings.token.weight
    assert torch.equal(teacher, weight)
    assert not teacher.requires_grad
    assert tensors(model(**with_token(suite, rows + 1)))
