"""What must hold for every model whose language model has an encoder, which reads the images, and a decoder."""

import torch
from transformers import T5ForConditionalGeneration

from tests.support.suite import close, relative

T5 = {"model_type": "t5", "vocab_size": 60, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
T5 |= {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False, "dropout_rate": 0.0}
T5 |= {"decoder_start_token_id": 0}


class Seq2SeqSuite:
    """For tests of models around a T5 that subclass `ModelSuite` after it; the batch has three rows, one image a
    row."""

    lora_layers = ["q", "v", "q_proj", "v_proj"]
    implementations = ("sdpa",) if T5ForConditionalGeneration._supports_sdpa else ()

    def decoder_inputs(self):
        return {"decoder_input_ids": torch.tensor([[0, 7, 8], [0, 9, 1], [0, 4, 6]])}

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

    def test_another_image_changes_the_output(self, model, batch):
        with torch.no_grad():
            before = model(**batch).logits
            after = model(**batch | {"pixel_values": batch["pixel_values"].flip(0)}).logits
        assert relative(after[:, -1], before[:, -1]) > 1e-4
