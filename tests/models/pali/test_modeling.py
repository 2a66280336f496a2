import pytest
import torch
from transformers import AutoModelForImageTextToText

from hfvlm.models.pali import HfvlmPaLIConfig, HfvlmPaLIForConditionalGeneration
from tests.models.paligemma.test_modeling import VISION
from tests.support.seq2seq import T5, Seq2SeqSuite
from tests.support.suite import ModelSuite, close

IMAGE = 60


class TestPaLI(Seq2SeqSuite, ModelSuite):
    test_compiles_as_one_graph = None  # mT5 is transformers', and the tower that of SigLIP
    model_class, auto_class = HfvlmPaLIForConditionalGeneration, AutoModelForImageTextToText

    def config(self):
        return HfvlmPaLIConfig(vision_config=VISION, text_config=T5, image_token_id=IMAGE)

    def inputs(self):
        words = torch.tensor([[5, 8, 7, 1], [6, 3, 9, 1], [9, 9, 11, 1]])
        ids = torch.cat([torch.full((3, 4), IMAGE), words], dim=1)
        pixels = {"pixel_values": torch.randn(3, 3, 28, 28)}
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)} | pixels | self.decoder_inputs()

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
