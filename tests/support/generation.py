"""What must hold for every model that answers about images."""

import pytest
import torch
from transformers import CompileConfig

from hfvlm.modeling.compat import cache_of
from tests.support.suite import close, from_disk, relative

NEW = {"do_sample": False, "max_new_tokens": 5, "eos_token_id": None}


class GenerationSuite:
    """For tests that subclass `ModelSuite` after it; the batch has one image a row and no padding on the right."""

    encoder = "vision_model"
    modality, pixels = "image", "pixel_values"

    def test_tuple_output_is_the_same(self, model, batch):
        model.language_model.config.use_cache = False  # a cache is no tensor
        super().test_tuple_output_is_the_same(model, batch)
        model.config.return_dict = False
        with torch.no_grad():
            assert isinstance(model(**batch), tuple)

    def test_exports(self, shallow, batch):
        shallow.language_model.config.use_cache = False
        super().test_exports(shallow, batch)

    def answer(self, model, batch, **options):
        return model.generate(**batch, **NEW | {"pad_token_id": 0} | options)[:, batch["input_ids"].shape[1] :]

    def one(self, batch, i):
        """Row i alone, without its padding."""
        alone = {name: value[i : i + 1] for name, value in batch.items()}
        real = alone["attention_mask"][0].bool()
        return alone | {name: alone[name][:, real] for name in ("input_ids", "attention_mask")}

    @from_disk
    def test_generates_with_offloaded_weights(self, model, batch, saved, tmp_path):
        batch, expected = self.one(batch, 0), self.answer(model, self.one(batch, 0))
        loaded = self.model_class.from_pretrained(saved, device_map={"": "disk"}, offload_folder=tmp_path)
        assert torch.equal(self.answer(loaded, batch), expected)

    def test_shifted_labels_give_the_same_loss(self, model, batch):
        labels = self.loss_inputs()["labels"]
        shifted = torch.cat([labels[:, 1:], torch.full_like(labels[:, :1], -100)], dim=1)
        with torch.no_grad():
            expected = model(**batch, labels=labels).loss
            close(model(**batch, shift_labels=shifted).loss, expected, 1e-6, "shifted alone")
            close(model(**batch, labels=labels.flip(1), shift_labels=shifted).loss, expected, 1e-6, "both")

    def test_prefill_steps_and_one_forward_agree(self, model, batch):
        batch = self.one(batch, 0)
        ids = batch.pop("input_ids")
        with torch.no_grad():
            whole = model(input_ids=ids, **batch).logits
            prompt = ids.shape[1] - 3
            mask = batch.pop("attention_mask")
            output = model(input_ids=ids[:, :prompt], attention_mask=mask[:, :prompt], use_cache=True, **batch)
            steps = [output.logits]
            for i in range(prompt, ids.shape[1]):
                output = model(
                    input_ids=ids[:, i : i + 1],
                    attention_mask=mask[:, : i + 1],
                    cache=cache_of(output),
                    use_cache=True,
                )
                steps.append(output.logits)
        close(torch.cat(steps, dim=1), whole, 1e-5, "step by step")

    def test_generate_follows_the_forward(self, model, batch):
        batch = self.one(batch, 0)
        expected, ids, rest = (
            [],
            batch["input_ids"],
            {k: v for k, v in batch.items() if k not in ("input_ids", "attention_mask")},
        )
        with torch.no_grad():
            for _ in range(NEW["max_new_tokens"]):
                best = model(input_ids=ids, **rest).logits[:, -1:].argmax(-1)
                ids = torch.cat([ids, best], dim=1)
                expected.append(best)
        expected = torch.cat(expected, dim=1)
        assert torch.equal(self.answer(model, batch), expected)
        assert torch.equal(self.answer(model, batch, use_cache=False), expected)
        assert torch.equal(self.answer(model, batch, cache_implementation="static"), expected)

    def test_decoding_compiles_as_one_graph(self, shallow, batch):
        """With a static cache, as generate does where there is a GPU."""
        batch = self.one(batch, 0)
        expected = self.answer(shallow, batch)
        options = CompileConfig(fullgraph=True, backend="eager", mode=None)
        options._compile_all_devices = True
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        answer = self.answer(shallow, batch, cache_implementation="static", compile_config=options)
        assert torch.equal(answer, expected)
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0

    def test_split_over_devices(self, model, batch, saved, tmp_path):
        """Part of it in memory, the rest on disk: no layer is in two places, and nothing else changes."""
        pytest.importorskip("accelerate", reason="comes with hfvlm[train]")
        room = sum(p.nbytes for p in model.parameters())
        layers = [name for name, _ in model.named_modules() if name.rpartition(".")[0].endswith("layers")]
        for share in (0.85, 0.95):
            places = {"device_map": "auto", "max_memory": {"cpu": int(room * share)}, "offload_folder": str(tmp_path)}
            split = type(model).from_pretrained(saved, **places)
            assert set(split.hf_device_map.values()) == {"cpu", "disk"}
            assert not any(part.startswith(f"{layer}.") for part in split.hf_device_map for layer in layers)
            with torch.no_grad():
                close(split(**batch).logits, model(**batch).logits, 1e-6, "split")
            assert torch.equal(self.answer(split, batch), self.answer(model, batch))

    def test_attention_implementations_of_tower_and_language_model(self):
        chosen = {"vision_config": "eager", "text_config": "sdpa"}
        model = self.model_class._from_config(self.config(), attn_implementation=chosen)
        assert model.vision_model.config._attn_implementation == "eager"
        assert model.language_model.config._attn_implementation == "sdpa"

    def test_another_image_changes_the_output(self, model, batch):
        with torch.no_grad():
            before = model(**batch).logits
            after = model(**batch | {self.pixels: batch[self.pixels] + 1}).logits
        assert relative(after[:, -1], before[:, -1]) > 1e-3

    def test_each_image_is_encoded_once(self, model, batch):
        calls = []
        model.get_submodule(self.encoder).register_forward_hook(lambda *_: calls.append(1))
        for options in ({}, {"num_beams": 2}, {"use_cache": False}):
            calls.clear()
            self.answer(model, batch, **options)
            assert len(calls) == 1, options

    def test_a_batch_generates_what_its_rows_generate(self, model, batch):
        left = self.answer(model, batch)
        assert torch.equal(self.answer(model, self.padded(batch, 3)), left)
        for i in range(len(left)):
            assert torch.equal(self.answer(model, self.one(batch, i))[0], left[i]), i

    def test_padding_on_either_side_changes_no_logits(self, model, batch):
        alone = self.one(batch, 0)
        length = alone["input_ids"].shape[1]
        with torch.no_grad():
            expected = model(**alone).logits
            close(model(**self.padded(alone, 3)).logits[:, 3:], expected, 1e-5, "left")
            close(model(**self.padded(alone, 3, left=False)).logits[:, :length], expected, 1e-5, "right")

    def padded(self, batch, count, left=True):
        padding = torch.zeros(len(batch["input_ids"]), count, dtype=torch.long)
        parts = {name: [padding, batch[name]] for name in ("input_ids", "attention_mask")}
        return batch | {name: torch.cat(two if left else two[::-1], dim=1) for name, two in parts.items()}

    def test_beams_and_several_answers_attend_to_the_image_of_their_row(self, model, batch):
        alone = [self.answer(model, self.one(batch, i), num_beams=3, num_return_sequences=2) for i in range(3)]
        together = self.answer(model, batch, num_beams=3, num_return_sequences=2, repetition_penalty=1.0)
        assert torch.equal(together, torch.cat(alone))

    def test_a_row_without_an_image_changes_no_other_row(self, model, batch):
        """A row may have no image; the others keep theirs."""
        mixed = dict(batch) | {"input_ids": batch["input_ids"].clone()}
        ids = mixed["input_ids"]
        ids[1] = ids[1].masked_fill(ids[1] == getattr(model.config, f"{self.modality}_token_id"), 3)
        media = [name for name in batch if name not in ("input_ids", "attention_mask")]
        mixed |= {name: mixed[name][[0, 2]] for name in media}
        with torch.no_grad():
            expected, actual = model(**batch).logits, model(**mixed).logits
        close(actual[[0, 2]], expected[[0, 2]], 1e-5, "rows with pictures")
        assert relative(actual[1, -1], expected[1, -1]) > 1e-4

    def test_hidden_states_without_the_output_layer(self, model, batch):
        """Trainers that compute the loss in blocks ask the base model for them."""
        with torch.no_grad():
            hidden = model.base_model(**batch, use_cache=False).last_hidden_state
            close(model.get_output_embeddings()(hidden), model(**batch).logits, 1e-6, "hidden states")
        assert model.get_encoder() is model
        assert model.get_decoder() is model.language_model

    def test_features_may_be_given(self, model, batch):
        media = {name: batch[name] for name in batch if name not in ("input_ids", "attention_mask")}
        text = {name: batch[name] for name in ("input_ids", "attention_mask")}
        with torch.no_grad():
            features = {self.modality: getattr(model, f"get_{self.modality}_features")(**media)}
            close(model(**text, mm_encoder_outputs=features).logits, model(**batch).logits, 0.0, "features")
        given = model.generate(**text, mm_encoder_outputs=features, **NEW)
        assert torch.equal(given[:, text["input_ids"].shape[1] :], self.answer(model, batch))

    def test_logits_of_the_last_positions_alone(self, model, batch):
        with torch.no_grad():
            close(model(**batch, logits_to_keep=2).logits, model(**batch).logits[:, -2:], 1e-6, "last")

    def test_placeholders_must_match_the_features(self, model, batch):
        media = {name: batch[name][:2] for name in batch if name not in ("input_ids", "attention_mask")}
        kind = self.modality
        with pytest.raises(ValueError, match=rf"{kind} placeholders \({kind}_token_id .*\), but the {kind}s make"):
            model(input_ids=batch["input_ids"], **media)
        with pytest.raises(ValueError, match=f"no {kind} was given"):
            model(input_ids=batch["input_ids"])
