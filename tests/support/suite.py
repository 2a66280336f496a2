"""What must hold for every model. A test of one subclasses `ModelSuite` and gives a tiny configuration and inputs."""

import copy
from collections import OrderedDict

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import AutoConfig, PreTrainedModel, __version__
from transformers.utils.generic import can_return_loss, find_labels

from hfvlm.modeling.base import HfvlmPreTrainedModel
from hfvlm.versions import numbers

LORA = ["q_proj", "v_proj"]


from_disk = pytest.mark.skipif(
    numbers(__version__) < (5, 20),
    reason="transformers before 5.20 runs no model all of whose weights are on the disk",
)


class ModelSuite:
    """Subclasses say `model_class`, `auto_class`, `config()` and `inputs()`."""

    model_class: type[PreTrainedModel]
    auto_class: type
    records = ("hidden_states", "attentions")
    lora_layers = LORA
    implementations = ("sdpa", "flex_attention")
    row_inputs: tuple[str, ...] | None = None  # inputs with a row an example; all by default

    def config(self):
        raise NotImplementedError

    def inputs(self):
        raise NotImplementedError

    def loss_inputs(self):
        """What is added to the inputs so that the model returns a loss; nothing for towers."""
        return {}

    @pytest.fixture(scope="class")
    @classmethod
    def made(cls):
        """What each test gets a copy of, which is made sooner than a model."""
        torch.manual_seed(0)
        return cls.model_class(cls().config()).eval()

    @pytest.fixture(scope="class")
    @classmethod
    def saved(cls, made, tmp_path_factory):
        """Its folder. Read only."""
        folder = tmp_path_factory.mktemp("model")
        copied(made).save_pretrained(folder)
        return folder

    @pytest.fixture
    def model(self, made):
        return copied(made)

    @pytest.fixture
    def shallow(self):
        """The model with one layer less of those that are alike: a trace goes through each as through the first."""
        return self.model_class(shallow(self.config())).eval()

    @pytest.fixture
    def batch(self):
        torch.manual_seed(1)
        return self.inputs()

    def run(self, model, batch):
        with torch.no_grad():
            return tensors(model(**batch))

    def objective(self, model, batch):
        """A scalar that every parameter has a part in."""
        output = model(**batch, **self.loss_inputs())
        if getattr(output, "loss", None) is not None:
            return output.loss
        return sum(value.float().square().mean() for value in tensors(output).values())

    def gradients(self, model, batch):
        model.zero_grad()
        self.objective(model, batch).backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    # Saving, loading, finding

    def test_save_and_load_is_bit_equal(self, model, batch, saved):
        expected = self.run(model, batch)
        loaded, info = self.model_class.from_pretrained(saved, output_loading_info=True)
        assert not any(info.values()), info
        same(self.run(loaded.eval(), batch), expected, exact=True)

    @from_disk
    def test_offloaded_weights_change_nothing(self, model, batch, saved, tmp_path):
        """They are on the disk until a module is called: what reads a parameter otherwise finds none."""
        expected = self.run(model, batch)
        disk = {"device_map": {"": "disk"}, "offload_folder": tmp_path}
        same(self.run(self.model_class.from_pretrained(saved, **disk), batch), expected, 1e-6)

    def test_auto_class_finds_it(self, made, saved):
        assert type(self.auto_class.from_config(self.config())) is self.model_class
        assert type(AutoConfig.from_pretrained(saved)) is type(made.config)
        assert type(self.auto_class.from_pretrained(saved)) is self.model_class

    def test_config_survives_a_round_trip(self, tmp_path):
        config = self.config()
        config.save_pretrained(tmp_path)
        again = type(config).from_pretrained(tmp_path).to_dict()
        expected = config.to_dict()
        for volatile in ("_name_or_path", "transformers_version"):
            again.pop(volatile, None)
            expected.pop(volatile, None)
        assert again == expected

    def test_config_checks_its_fields(self):
        config = self.config()
        with pytest.raises(Exception, match="initializer_range"):
            type(config)(initializer_range="wide")

    def test_names_that_transformers_reads_exist(self, made):
        kinds = {type(module).__name__ for module in made.modules()}
        assert set(made._no_split_modules) & kinds
        assert made.base_model_prefix
        assert made.get_input_embeddings() is not None

    # Numbers

    def test_attention_implementations_agree(self, model, batch, uncompiled_flex_attention):
        model.set_attn_implementation("eager")
        expected = self.run(model, batch)
        for implementation in self.implementations:
            if implementation == "flex_attention" and not model._supports_flex_attn:
                continue
            model.set_attn_implementation(implementation)
            same(self.run(model, batch), expected, 1e-5)

    def test_rows_of_a_batch_do_not_influence_each_other(self, model, batch):
        expected = self.run(model, batch)
        rows = self.row_inputs or tuple(batch)
        for i in range(len(batch[rows[0]])):
            alone = self.run(model, {k: v[i : i + 1] if k in rows else v for k, v in batch.items()})
            for name, value in alone.items():
                if expected[name].ndim == 2 and name.startswith("logits_per"):
                    value, row = value[0, 0], expected[name][i, i]
                elif name.endswith(("_scale", "_bias")):
                    row = expected[name]
                else:
                    value, row = value[0], expected[name][i]
                close(value, row, 1e-5, f"row {i} of {name}")

    def test_tuple_output_is_the_same(self, model, batch):
        with torch.no_grad():
            output, plain = model(**batch), model(**batch, return_dict=False)
        assert isinstance(plain, tuple)
        for left, right in zip(flat(output.to_tuple()), flat(plain), strict=True):
            close(left, right, 0.0, "tuple")

    def test_bfloat16(self, model, batch):
        expected = self.run(model, batch)
        half = self.run(model.to(torch.bfloat16), batch)
        for name, value in half.items():
            assert torch.isfinite(value).all(), name
            assert relative(value.float(), expected[name]) < 0.1, name

    def test_every_module_is_initialised(self, model, monkeypatch):
        """Also one without parameters of its own: it may initialise those of its parts."""
        seen = set()
        for kind in {type(part) for part in model.modules() if isinstance(part, PreTrainedModel)}:

            def record(model, module, initialise=kind._init_weights):
                seen.add(module)
                initialise(model, module)

            monkeypatch.setattr(kind, "_init_weights", record)
        fresh = self.model_class(self.config())
        assert {type(module).__name__ for module in set(fresh.modules()) - seen} == set()

    def test_every_weight_is_initialised_from_nothing(self, made):
        """Models are made without memory and then filled; what no rule covers would be garbage."""
        torch.manual_seed(0)
        fresh = self.model_class.from_pretrained(None, config=self.config(), state_dict={})
        expected = dict(made.named_parameters()) | dict(made.named_buffers())
        for name, value in (*fresh.named_parameters(), *fresh.named_buffers()):
            left, right = value.float(), expected[name].float()
            assert torch.isfinite(left).all(), name
            spread, wanted = left.std(correction=0), right.std(correction=0)
            if wanted == 0:
                assert spread == 0, f"{name}: {spread} against 0"
            else:
                factor = 2 if right.numel() >= 16 else 4  # of a few numbers, the deviation says little
                assert 1 / factor < spread / wanted < factor, f"{name}: {spread} against {wanted}"

    # Training

    def test_every_parameter_gets_a_gradient(self, model, batch):
        model.train()
        grads = self.gradients(model, batch)
        assert [name for name, p in model.named_parameters() if p.requires_grad and name not in grads] == []
        assert [name for name, grad in grads.items() if not torch.isfinite(grad).all()] == []

    @pytest.mark.parametrize("reentrant", [False, True])
    def test_gradient_checkpointing_changes_nothing(self, model, batch, reentrant):
        if not model.supports_gradient_checkpointing:  # of batch norms, which would count their batches twice
            with pytest.raises(ValueError, match="does not support .* checkpointing"):
                model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            return
        model.train()
        plain = self.gradients(model, batch)
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        if reentrant:
            model.enable_input_require_grads()
        # Keys' biases have no gradient but rounding, which depends on the order of additions.
        largest = max(float(grad.abs().max()) for grad in plain.values())
        alive = {name for name, grad in plain.items() if float(grad.abs().max()) > 1e-6 * largest}
        again = self.gradients(model, batch)
        assert again.keys() == plain.keys()
        same({name: again[name] for name in alive}, {name: plain[name] for name in alive}, 1e-5)

    def test_lora_starts_as_identity_and_trains_alone(self, model, batch):
        expected = self.run(model, batch)
        tuned = get_peft_model(model, LoraConfig(target_modules=self.lora_layers))
        same(self.run(tuned, batch), expected, 1e-6)
        assert all("lora" in name for name, p in tuned.named_parameters() if p.requires_grad)

    @pytest.mark.parametrize("reentrant", [False, True])
    def test_every_adapter_learns_under_gradient_checkpointing(self, model, batch, reentrant):
        """LoRA with checkpointing can train with zero gradients, silently, where inputs carry none."""
        if model.supports_gradient_checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        tuned = get_peft_model(model, LoraConfig(target_modules=self.lora_layers)).train()
        grads = self.gradients(tuned, batch)
        dead = [name for name, grad in grads.items() if "lora_B" in name and not grad.abs().max() > 0]
        assert dead == []
        assert sum("lora_B" in name for name in grads) >= len(self.lora_layers)

    def test_lora_merges_and_reloads(self, model, batch, tmp_path):
        base = copied(model)
        tuned = get_peft_model(model, LoraConfig(target_modules=self.lora_layers, init_lora_weights=False)).eval()
        expected = self.run(tuned, batch)
        tuned.save_pretrained(tmp_path)
        again = PeftModel.from_pretrained(base, tmp_path).eval()
        same(self.run(again, batch), expected, 1e-6)
        same(self.run(again.merge_and_unload(), batch), expected, 1e-4)

    # Tools

    def test_trainer_evaluates_by_the_loss(self, model, batch):
        given = batch | self.loss_inputs()
        with torch.no_grad():
            output = model(**given)
        assert getattr(output, "loss", None) is None or trainer_finds_loss(self.model_class, given)

    def test_compiles_as_one_graph(self, shallow, batch):
        expected = self.run(shallow, batch)
        torch._dynamo.reset()
        compiled = torch.compile(shallow, fullgraph=True, backend="eager")
        same(self.run(compiled, batch), expected, 1e-6)

    def test_exports(self, shallow, batch):
        with torch.no_grad():
            expected = all_tensors(shallow(**batch))
            program = torch.export.export(shallow, (), dict(batch), strict=False)
        same(all_tensors(program.module()(**batch)), expected, 1e-5)

    def test_records_hidden_states_and_attentions(self, model, batch):
        model.set_attn_implementation("eager")
        flags = {f"output_{name}": True for name in self.records}
        with torch.no_grad():
            plain, output = model(**batch), model(**batch, **flags)
        self.check_recorded(tensors(output), tensors(plain))
        for holder, config in recorders(output, model):
            layers = getattr(config, "num_hidden_layers", None)
            for name in self.records:
                values = holder[name]
                assert values, name
                assert all(torch.isfinite(value).all() for value in values)
                if layers:
                    assert len(values) == layers + (name == "hidden_states"), name

    def check_recorded(self, output, plain):
        same(output, plain, exact=True)

    def test_attention_implementation_of_one_tower(self):
        config = self.config()
        if not config.sub_configs:
            model = self.model_class._from_config(config, attn_implementation="eager")
            assert model.config._attn_implementation == "eager"
            return
        first = next(iter(config.sub_configs))
        model = self.model_class._from_config(config, attn_implementation={first: "eager"})
        for name in config.sub_configs:
            tower = getattr(model, name.replace("_config", "_model"), None)
            if tower is not None:
                assert tower.config is getattr(model.config, name), name
                assert (tower.config._attn_implementation == "eager") == (name == first), name

    def test_towers_alone_equal_those_inside(self, made, saved):
        for name, inside in made.named_children():
            if isinstance(inside, HfvlmPreTrainedModel):  # transformers' own look for no names of a composite
                alone, info = type(inside).from_pretrained(saved, output_loading_info=True)
                assert not any(info.values()), (name, info)
                for left, right in zip(alone.state_dict().values(), inside.state_dict().values(), strict=True):
                    assert torch.equal(left, right), name


class PartSuite(ModelSuite):
    """What must hold for a part of a model that is tested as a whole: the graph of the whole holds its graph. That its
    adapters are used is seen where they learn; merging them is PEFT's."""

    test_compiles_as_one_graph = test_exports = test_lora_merges_and_reloads = None


class ImageClassifierSuite(ModelSuite):
    """What must hold for a linear layer on the vision tower of a dual encoder; subclasses also say `whole_class`. The
    tower is in the graph of the dual encoder; CLIP's is traced with the layer, too."""

    test_compiles_as_one_graph = test_exports = None
    whole_class: type[PreTrainedModel]
    # Of the tower, what the classifier makes its logits of.
    pooled_output = "pooler_output"

    def loss_inputs(self):
        return {"labels": torch.tensor([0, 3, 1])}

    def check_recorded(self, output, plain):
        """Without records, the last layer computes the pooled token alone, in other blocks of additions."""
        same(output, plain, 1e-6)

    def test_towers_alone_equal_those_inside(self, model, batch, tmp_path):
        """A classifier has all of its tower but the projection into the joint space."""
        model.save_pretrained(tmp_path)
        alone, info = type(model.vision_model).from_pretrained(tmp_path, output_loading_info=True)
        assert all(key.startswith("projection.") for key in info.pop("missing_keys"))
        assert not any(info.values()), info
        with torch.no_grad():
            found, expected = (tower.eval()(**batch)[self.pooled_output] for tower in (alone, model.vision_model))
        close(found, expected, 1e-6, "summary")

    def test_starts_from_a_dual_encoder(self, batch, tmp_path):
        whole = self.whole_class(self.config()).eval()
        whole.save_pretrained(tmp_path)
        head, info = self.model_class.from_pretrained(tmp_path, num_labels=4, output_loading_info=True)
        assert set(info["missing_keys"]) == {"classifier.weight", "classifier.bias"}
        assert not info["unexpected_keys"]
        summary = whole.vision_model(**batch)[self.pooled_output]
        close(head.vision_model.eval()(**batch)[self.pooled_output], summary, 1e-6, "summary")


def copied(model):
    """A deep copy; a module's dozen empty dictionaries are made again, which take as long as tensors."""
    kinds = (OrderedDict, dict, set)
    parts = (value for part in model.modules() for value in vars(part).values() if type(value) in kinds)
    return copy.deepcopy(model, {id(value): type(value)() for value in parts if not value})


def shallow(config):
    """A configuration after taking a layer from each stack of two or three; where layers are of two kinds, none."""
    for name in config.sub_configs:
        if part := getattr(config, name):
            shallow(part)
    for name in ("num_hidden_layers", "num_decoder_layers"):
        if getattr(config, name, None) in (2, 3) and not hasattr(config, "cross_attention_frequency"):
            setattr(config, name, getattr(config, name) - 1)
    return config


def tensors(output) -> dict[str, Tensor]:
    """The floating-point tensors of an output."""
    return {k: v for k, v in output.items() if isinstance(v, Tensor) and v.is_floating_point()}


def trainer_finds_loss(model_class, batch) -> bool:
    """Whether transformers' Trainer evaluates a batch by its loss, where training has one."""
    if labels := find_labels(model_class):
        return all(name in batch for name in labels)
    return bool(batch.get("return_loss", can_return_loss(model_class)))


def all_tensors(output) -> dict[str, Tensor]:
    """The floating-point tensors of an output and of the outputs of towers in it."""
    inner = {f"{k}.{name}": x for k, v in output.items() if isinstance(v, dict) for name, x in all_tensors(v).items()}
    return tensors(output) | inner


def flat(values) -> list[Tensor]:
    return [item for v in values for item in (flat(v) if isinstance(v, tuple) else [v])]


def recorders(output, model):
    """(output, config) of the model or, in a composite, of each tower."""
    inner = [(f"{name}_output", child.config) for name, child in model.named_children() if f"{name}_output" in output]
    recorder = next(
        (part for name in ("language_model", "vision_model") if (part := getattr(model, name, None))), model
    )
    return [(output[name], config) for name, config in inner] or [(output, recorder.config)]


def relative(actual: Tensor, expected: Tensor) -> float:
    return float((actual.double() - expected.double()).abs().max() / expected.double().abs().max().clamp_min(1e-9))


def close(actual: Tensor, expected: Tensor, tolerance: float | None, name: str, absolute: float = 0.0) -> None:
    assert actual.shape == expected.shape, f"{name}: {tuple(actual.shape)} against {tuple(expected.shape)}"
    if tolerance is None:
        assert (actual.double() - expected.double()).abs().max() <= absolute, name
    else:
        error = relative(actual, expected)
        assert error <= tolerance, f"{name}: differs by {error:.2e} of its largest value"


def same(actual, expected, tolerance: float = 0.0, *, exact: bool = False) -> None:
    assert actual.keys() == expected.keys()
    for name, value in actual.items():
        if exact:
            assert torch.equal(value, expected[name]), f"{name}: not bit-equal"
        else:
            close(value, expected[name], tolerance, name)
