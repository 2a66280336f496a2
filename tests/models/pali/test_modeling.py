import pytest
import torch
from transformers import AutoModelForImageTextToText, T5ForConditionalGeneration

from hfvlm.models.pali import HfvlmPaLIConfig, HfvlmPaLIForConditionalGeneration
from tests.models.paligemma.test_modeling import VISION
from tests.support.suite import ModelSuite, close, relative

T5 = {"model_type": "t5", "vocab_size": 60, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
T5 |= {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False, "dropout_rate": 0.0}
T5 |= {"decoder_start_token_id": 0}
IMAGE = 60


class TestPaLI(ModelSuite):
    model_class, auto_class = HfvlmPaLIForConditionalGeneration, AutoModelForImageTextToText
    lora_layers = ["q", "v", "q_proj", "v_proj"]
    implementations = ("sdpa",) if T5ForConditionalGeneration._supports_sdpa else ()

    def config(self):
        return HfvlmPaLIConfig(vision_config=VISION, text_config=T5, image_token_id=IMAGE)

    def inputs(self):
        words = torch.tensor([[5, 8, 7, 1], [6, 3, 9, 1], [9, 9, 11, 1]])
        ids = torch.cat([torch.full((3, 4), IMAGE), words], dim=1)
        return {
            "input_ids": ids,
            "pixel_values": torch.randn(3, 3, 28, 28),
            "attention_mask": torch.ones_like(ids),
            "decoder_input_ids": torch.tensor([[0, 7, 8], [0, 9, 1], [0, 4, 6]]),
        }

    def loss_inputs(self):
        return {"labels": torch.tensor([[7, 8, 1], [9, 1, -100], [4, 6, 1]])}

    def run(self, model, batch):
        """Without what the encoder gives, whose padding means nothing."""
        return {"logits": super().run(model, batch)["logits"]}

    def test_tuple_output_is_the_same(self, model, batch):
        super().test_tuple_output_is_the_same(model, batch | {"use_cache": False})  # a cache is no tensor

    def test_exports(self, shallow, batch):
        batch = batch | {"use_cache": False}
        with torch.no_grad():
            program = torch.export.export(shallow, (), dict(batch), strict=False)
        close(program.module()(**batch).logits, self.run(shallow, batch)["logits"], 1e-5, "exported")

    def test_records_hidden_states_and_attentions(self, model, batch):
        with torch.no_grad():
            output = model(**batch, output_hidden_states=True)
        assert len(output.encoder_hidden_states) == len(output.decoder_hidden_states) == 3

    def answer(self, model, batch, **options):
        batch = {name: value for name, value in batch.items() if name != "decoder_input_ids"}
        return model.generate(**batch, **{"do_sample": False, "max_new_tokens": 5, "eos_token_id": None} | options)

    def test_generate_follows_the_forward(self, model, batch):
        given = {name: value for name, value in batch.items() if name != "decoder_input_ids"}
        ids = torch.zeros(3, 1, dtype=torch.long)
        with torch.no_grad():
            for _ in range(5):
                best = model(**given, decoder_input_ids=ids).logits[:, -1:].argmax(-1)
                ids = torch.cat([ids, best], dim=1)
        assert torch.equal(self.answer(model, batch), ids)
        assert torch.equal(self.answer(model, batch, use_cache=False), ids)

    def test_a_batch_answers_as_its_rows(self, model, batch):
        left = self.answer(model, batch)
        for i in range(3):
            assert torch.equal(
                self.answer(model, {name: value[i : i + 1] for name, value in batch.items()})[0], left[i]
            )
        padded = {
            name: torch.cat([batch[name], torch.zeros(3, 2, dtype=torch.long)], dim=1) for name in ("input_ids",)
        }
        padded["attention_mask"] = (torch.arange(10) < 8).long().expand(3, -1)
        assert torch.equal(self.answer(model, batch | padded), left)

    def test_another_image_changes_the_output(self, model, batch):
        with torch.no_grad():
            before = model(**batch).logits
            after = model(**batch | {"pixel_values": batch["pixel_values"].flip(0)}).logits
        assert relative(after[:, -1], before[:, -1]) > 1e-4

    def test_a_text_without_an_image(self, model):
        ids = torch.tensor([[5, 8, 7, 1]])
        with torch.no_grad():
            close(
                model(input_ids=ids).logits,
                model.language_model(input_ids=ids, decoder_input_ids=torch.zeros(1, 1, dtype=torch.long)).logits,
                1e-6,
                "text",
            )

    def test_the_output_layer_is_its_own(self, model):
        assert model.language_model.lm_head.weight is not model.language_model.shared.weight
        with pytest.raises(Exception, match="mT5's output layer is its own"):
            HfvlmPaLIConfig(
                vision_config=VISION, text_config={**T5, "tie_word_embeddings": True}, image_token_id=IMAGE
            )

    def test_without_a_projection_widths_agree(self):
        config = HfvlmPaLIConfig(vision_config=VISION, text_config=T5, image_token_id=IMAGE, projector_depth=0)
        assert not list(self.model_class(config).projector.parameters())
        with pytest.raises(Exception, match="is not d_model 32"):
            HfvlmPaLIConfig(vision_config=VISION | {"hidden_size": 24}, text_config=T5, projector_depth=0)
