"""What holds for every model that matches images with texts and writes about them."""

import pytest
import torch
from transformers import AutoModelForZeroShotImageClassification

from hfvlm.losses import captioning_loss, contrastive_loss, focal_contrastive_loss
from hfvlm.modeling.compat import cache_of
from hfvlm.modeling.outputs import contrastive_fields
from hfvlm.training.gradient_cache import cached_backward
from tests.support.suite import ModelSuite, PartSuite, close, same

START, END, PAD = 48, 49, 0
IDS = torch.tensor([[START, 7, 8, END, PAD, PAD], [START, 9, 10, 11, 12, END]])
MASK = (IDS != PAD).long()
LEFT = torch.tensor([[PAD, PAD, START, 7, 8, END], [START, 9, 10, 11, 12, END]])


def random_images(count: int = 2) -> torch.Tensor:
    return torch.randn(count, 3, 24, 24)


class VisionSuite(PartSuite):
    def inputs(self):
        return {"pixel_values": random_images()}

    def test_any_size_with_interpolated_positions(self, model, batch):
        same_size = model(**batch, interpolate_pos_encoding=True).embeds
        close(same_size, model(**batch).embeds, 1e-6, "same size")
        larger = torch.randn(1, 3, 40, 32)
        expected = model(larger, interpolate_pos_encoding=True).last_hidden_state
        with pytest.raises(ValueError, match="interpolate_pos_encoding"):
            model(larger)
        model.resize_positions((40, 32))
        close(model(larger).last_hidden_state, expected, 1e-6, "resized for good")


class ContrastiveCaptionerSuite(ModelSuite):
    """Subclasses also say `limit`, the tokens of the longest text."""

    auto_class = AutoModelForZeroShotImageClassification
    implementations = ("sdpa",)
    limit: int

    def inputs(self):
        return {"input_ids": IDS, "pixel_values": random_images(), "attention_mask": MASK}

    def loss_inputs(self):
        return {"return_loss": True}

    # Losses

    def test_loss_is_the_weighted_sum(self, model, batch):
        output = model(**batch, return_loss=True)
        pairs = contrastive_loss(output.image_embeds, output.text_embeds, output.logit_scale)
        words = captioning_loss(output.logits[:, :-1], IDS.masked_fill(IDS == PAD, -100)[:, 1:])
        close(output.loss, pairs + 2 * words, 1e-6, "sum")
        close(model.contrast(output), output.loss, 1e-6, "from the output's fields")
        focal = focal_contrastive_loss(output.image_embeds, output.text_embeds, output.logit_scale)
        close(model.contrast(output, focal_contrastive_loss), focal + 2 * words, 1e-6, "another loss of pairs")
        assert model(**batch).logits is None

    def test_positions_without_a_label_have_no_loss(self, model, batch):
        labels = IDS.masked_fill(IDS == PAD, -100)
        close(model(**batch, labels=labels).loss, model(**batch, return_loss=True).loss, 1e-6, "all")
        labels[:, 1:3] = -100
        output = model(**batch, labels=labels)
        assert output.text_lengths.tolist() == [1, 3]
        chances = output.logits.log_softmax(-1)
        close(output.text_losses[0], -chances[0, 2, END], 1e-5, "the end alone")

    def test_mini_batches_have_the_batchs_gradients(self, model, batch):
        """Of both losses, though each text has another number of tokens."""
        batch |= {"labels": IDS.masked_fill(IDS == PAD, -100)}
        loss = model(**batch).loss
        loss.backward()
        expected = {name: p.grad.clone() for name, p in model.named_parameters()}
        model.zero_grad()
        close(cached_backward(model, model.contrast, batch, 1), loss, 1e-6, "loss")
        largest = max(float(grad.abs().max()) for grad in expected.values())
        for name, parameter in model.named_parameters():
            assert (parameter.grad - expected[name]).abs().max() < 1e-5 * largest, name
        rows, _ = contrastive_fields(model(**batch))
        assert set(rows) == {"image_embeds", "text_embeds", "text_losses", "text_lengths"}

    # Writing

    def write(self, model, images, inputs, **options):
        ids = model.generate(images, **inputs, do_sample=False, min_new_tokens=4, max_new_tokens=4, **options)
        return [row[row != PAD].tolist() for row in ids]

    @pytest.mark.parametrize("beams", [1, 3])
    def test_a_batch_generates_what_its_rows_generate(self, model, beams):
        images = random_images()
        batches = [{"input_ids": ids, "attention_mask": (ids != PAD).long()} for ids in (IDS, LEFT)]
        written = [self.write(model, images, batch, num_beams=beams) for batch in batches]
        alone = [
            self.write(model, images[i : i + 1], {"input_ids": IDS[i : i + 1, : MASK[i].sum()]}, num_beams=beams)[0]
            for i in range(2)
        ]
        assert written[0] == written[1] == alone

    def test_another_image_gives_another_text(self, model):
        images, prompt = random_images(), {"input_ids": IDS, "attention_mask": MASK}
        assert self.write(model, images, prompt) != self.write(model, -images, prompt)

    def test_the_image_is_encoded_once(self, model):
        """For all beams and returned texts; so are its keys and values in every layer."""
        counts = {"vision": 0, "keys": 0}

        def count(name):
            return lambda *_: counts.__setitem__(name, counts[name] + 1)

        model.vision_model.register_forward_hook(count("vision"))
        for layer in model.text_model.grounding_layers:
            layer.attention.k_proj.register_forward_hook(count("keys"))
        ids = model.generate(random_images(), num_beams=4, num_return_sequences=2, max_new_tokens=4)
        assert len(ids) == 4
        assert counts == {"vision": 1, "keys": len(model.text_model.grounding_layers)}

    def test_greedy_equals_steps_by_hand(self, model):
        images = random_images(1)
        written = model.generate(images, max_new_tokens=5, eos_token_id=None)
        context, ids = model.read(images), torch.tensor([[START]])
        for _ in range(5):
            ids = torch.cat([ids, model.text_model(ids, None, context).logits[:, -1:].argmax(-1)], dim=1)
        assert torch.equal(written, ids)

    def test_beams_equal_a_plain_search(self, model):
        images = random_images(1)
        written = model.generate(images, num_beams=3, max_length=5, length_penalty=1.0)
        context, beams, finished = model.read(images), [(0.0, [START])], []
        for _ in range(4):
            grown = []
            for score, ids in beams:
                chances = model.text_model(torch.tensor([ids]), None, context).logits[0, -1].log_softmax(-1)
                grown += [(score + chance, [*ids, token]) for token, chance in enumerate(chances.tolist())]
            grown.sort(key=lambda beam: -beam[0])
            finished += [(score / (len(ids) - 1), ids) for score, ids in grown[:3] if ids[-1] == END]
            beams = [beam for beam in grown if beam[1][-1] != END][:3]
        finished += [(score / (len(ids) - 1), ids) for score, ids in beams]
        assert written[0].tolist() == max(finished)[1]

    def test_a_static_cache_generates_the_same(self, model):
        images, prompt = random_images(), {"input_ids": LEFT, "attention_mask": (LEFT != PAD).long()}
        assert self.write(model, images, prompt, cache_implementation="static") == self.write(model, images, prompt)

    def test_sampling_is_seeded(self, model):
        runs = []
        for _ in range(2):
            torch.manual_seed(3)
            runs.append(
                model.generate(random_images(1) * 0 + 1, do_sample=True, num_return_sequences=3, max_new_tokens=4)
            )
        assert torch.equal(*runs)
        assert len(runs[0]) == 3

    def test_no_text_is_longer_than_there_are_positions(self, model):
        ids = model.generate(random_images(1), max_new_tokens=256, eos_token_id=None)
        assert ids.shape == (1, self.limit)
        with pytest.raises(ValueError, match=f"positions for {self.limit}"):
            model.get_text_features(torch.ones(1, self.limit + 1, dtype=torch.long))


class WritingTowerSuite(PartSuite):
    """The text tower with a context; subclasses say `auto_class` and `config()`."""

    def test_rows_of_a_batch_do_not_influence_each_other(self, model, batch):
        expected, context = model(**batch).logits, batch["context"]
        for i in range(2):
            row = model(IDS[i : i + 1], MASK[i : i + 1], type(context)(context.tokens[i : i + 1]))
            close(row.logits[0], expected[i], 1e-5, "row")

    def objective(self, model, batch):
        """Of both uses."""
        read = model(IDS)
        return super().objective(model, batch) + read.embeds.square().mean()

    def test_steps_equal_one_forward(self, model, batch):
        """With an id in the middle that padding has too."""
        ids = IDS[1:].clone()
        ids[0, 2] = PAD
        context = type(batch["context"])(batch["context"].tokens[:1])
        whole = model(ids, None, context).logits
        reused = context.for_reuse()
        first = model.prepare_inputs_for_generation(ids[:, :3], attention_mask=torch.ones(1, 3))
        seen = {key: value for key, value in first.items() if key == "visible"}
        output = model(ids[:, :3], None, reused, use_cache=True, **seen)
        close(output.logits, whole[:, :3], 1e-5, "prefill")
        kept = next(iter(reused.kept.values()))
        for i in range(3, 6):
            step = model.prepare_inputs_for_generation(ids[:, : i + 1], attention_mask=torch.ones(1, i + 1))
            seen = {key: value for key, value in step.items() if key == "visible"}
            output = model(ids[:, i : i + 1], None, reused, cache=cache_of(output), **seen)
            close(output.logits[:, 0], whole[:, i], 1e-5, f"step {i}")
        assert next(iter(reused.kept.values())) is kept
        close(model(ids, None, context, logits_to_keep=2).logits, whole[:, -2:], 1e-6, "last")

    def test_output_embeddings_can_be_replaced(self, model, batch):
        assert model.get_output_embeddings() is model.lm_head
        model.set_output_embeddings(torch.nn.Linear(model.lm_head.in_features, 7))
        assert model(**batch).logits.shape[-1] == 7

    def test_no_token_attends_to_later_ones(self, model, batch):
        changed = IDS.clone()
        changed[1, 4] = 20
        before, after = model(**batch).logits, model(**batch | {"input_ids": changed}).logits
        close(after[1, :4], before[1, :4], 1e-6, "past")
        assert (after[1, 4:] - before[1, 4:]).abs().max() > 1e-3

    def test_several_texts_attend_to_one_image(self, model, batch):
        context, tokens = type(batch["context"]), batch["context"].tokens[:1]
        together = model(IDS, MASK, context(tokens)).logits
        close(model(IDS, MASK, context(tokens.expand(2, -1, -1))).logits, together, 1e-5, "shared")

    def test_records_hidden_states_and_attentions(self, model, batch):
        model.set_attn_implementation("eager")
        output = model(**batch, output_hidden_states=True, output_attentions=True)
        layers = model.config.num_hidden_layers
        assert (len(output.hidden_states), len(output.attentions)) == (layers + 1, layers)
        assert len(output.cross_attentions) == len(model.grounding_layers)
        same({"logits": output.logits}, {"logits": model(**batch).logits}, exact=True)
