import pytest
import torch
from huggingface_hub.errors import StrictDataclassClassValidationError
from torch.nn import functional as F
from transformers import AutoModel, AutoModelForMultipleChoice, AutoModelForPreTraining

import hfvlm
from hfvlm.models.merlot_reserve import (
    HfvlmMERLOTReserveAudioConfig,
    HfvlmMERLOTReserveAudioModel,
    HfvlmMERLOTReserveConfig,
    HfvlmMERLOTReserveForMultipleChoice,
    HfvlmMERLOTReserveForPreTraining,
    HfvlmMERLOTReserveForVideoMultipleChoice,
    HfvlmMERLOTReserveModel,
    HfvlmMERLOTReserveVisionConfig,
    HfvlmMERLOTReserveVisionModel,
)
from hfvlm.models.merlot_reserve.encoders import rotary_factors
from hfvlm.models.merlot_reserve.modeling_merlot_reserve import unit
from tests.support.suite import ModelSuite, PartSuite, close, same

SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2}
SIZES |= {"initializer_range": 0.2}
VISION = SIZES | {"image_size": [16, 24], "patch_size": 4, "projection_dim": 64}
AUDIO = SIZES | {"num_frames": 12, "num_channels": 9, "num_tokens": 2, "projection_dim": 64}
PAD, MASK, AUDIO_MASK, SOUND, POOL = 0, 3, 4, 5, 6
# Two segments of three clips each: a text with a mask, then audio; then a shorter text with padding.
IDS = torch.tensor([[10, 11, MASK, *[SOUND] * 6, 12], [MASK, 13, *[SOUND] * 4, 14, PAD, PAD, PAD]])
SEGMENTS = torch.tensor([[0, 0, 0, *[1] * 6, 1], [0, 0, *[1] * 4, 1, -1, -1, -1]])
CLIPS = torch.tensor([[0, 0, 0, 3, 3, 4, 4, 5, 5, 3], [0, 0, 4, 4, 5, 5, 3, -1, -1, -1]])


def config(head: str = "HfvlmMERLOTReserveModel", **fields) -> HfvlmMERLOTReserveConfig:
    return HfvlmMERLOTReserveConfig(
        architectures=[head],
        vision_config=dict(VISION),
        audio_config=dict(AUDIO),
        **{**SIZES, "vocab_size": 40, "num_span_layers": 2, "max_span_length": 4, "num_target_spans": 3, **fields},
    )


def frames(rows: int = 2, segments: int = 2) -> torch.Tensor:
    return torch.rand(rows, segments, 3, 16, 24)


def audio_clips(rows: int = 2, clips: int = 6) -> torch.Tensor:
    return torch.randn(rows, clips, 12, 9)


class TestVision(PartSuite):
    model_class, auto_class = HfvlmMERLOTReserveVisionModel, AutoModel

    def config(self):
        return HfvlmMERLOTReserveVisionConfig(**VISION)

    def inputs(self):
        return {"pixel_values": frames()[0]}

    def test_takes_any_grid_that_pools(self, model):
        """No weight depends on the grid; a 2 x 2 square of patches is a token."""
        output = model(torch.rand(1, 3, 24, 8))
        assert output.tokens.shape == (1, 3, 64)
        assert output.last_hidden_state.shape == (1, 13, 64)
        with pytest.raises(ValueError, match=r"3 x 4 patches.*squares of 2 \(pool_size\)"):
            model(torch.rand(1, 3, 12, 16))

    def test_a_token_is_of_its_own_square(self, model):
        """Without layers, tokens depend on the four patches that they pool, row by row."""
        model.encoder.layers = type(model.encoder.layers)()
        pixels = torch.rand(1, 3, 16, 24)
        before = model(pixels).tokens
        pixels[..., 8:16, 16:24] += 0.5
        changed = (model(pixels).tokens - before).abs().amax(dim=-1)[0] > 1e-6
        assert changed.tolist() == [False] * 5 + [True]


class TestAudio(PartSuite):
    model_class, auto_class = HfvlmMERLOTReserveAudioModel, AutoModel

    def config(self):
        return HfvlmMERLOTReserveAudioConfig(**AUDIO)

    def inputs(self):
        return {"input_features": audio_clips()[0, :2]}

    def test_clips_of_another_size_are_refused(self, model):
        with pytest.raises(ValueError, match=r"\(1, 14, 9\).*num_frames 12, num_channels 9"):
            model(torch.rand(1, 14, 9))


class TestModel(ModelSuite):
    model_class, auto_class = HfvlmMERLOTReserveModel, AutoModel

    def config(self):
        return config()

    def inputs(self):
        media = {"pixel_values": frames(), "input_features": audio_clips()}
        return {"input_ids": IDS, **media, "segment_ids": SEGMENTS, "audio_ids": CLIPS}

    def objective(self, model, batch):
        """With what only comparisons need: the three embeddings, and the temperatures."""
        embeds = [
            model.get_image_features(batch["pixel_values"][0]).pooler_output,
            model.get_audio_features(batch["input_features"][0]).pooler_output,
            model.get_text_features(torch.tensor([[10, 11, PAD]])).pooler_output,
        ]
        scales = [getattr(model, f"{name}_logit_scale").exp() for name in ("image", "audio", "span")]
        return super().objective(model, batch) + sum(x.square().mean() for x in (*embeds, *scales))

    def check_recorded(self, output, plain):
        same(output, plain, 1e-6)

    def test_precomputed_media_change_nothing(self, model, batch):
        media = {name: batch[name] for name in ("pixel_values", "input_features")}
        places = {name: batch[name] for name in batch if name not in media}
        images, audio = model.encode_images(batch["pixel_values"]), model.encode_audio(batch["input_features"])
        expected = model(**batch).embeds
        close(model(**places, image_tokens=images, audio_tokens=audio).embeds, expected, 1e-5, "both")
        half = model(
            **places, image_tokens=images[:, :1], pixel_values=batch["pixel_values"][:, 1:], audio_tokens=audio
        )
        close(half.embeds, expected, 1e-5, "images before images")

    def test_every_input_matters_to_a_mask(self, model, batch):
        def mask(**changes):
            return model(**batch | changes).embeds[0, 2]

        expected = mask()
        for name, value in {
            "pixel_values": batch["pixel_values"].flip(1),
            "input_features": batch["input_features"].flip(1),
            "segment_ids": 1 - SEGMENTS.clamp_min(0),
            "audio_ids": CLIPS.roll(1, 1),
            "input_ids": torch.where(IDS == 12, 20, IDS),
        }.items():
            assert (mask(**{name: value}) - expected).abs().max() > 1e-3, name

    def test_padding_does_not_matter(self, model, batch):
        """Nor does its segment; an attention mask says the same as padding ids."""
        expected = model(**batch).embeds[1, :7]
        media = {name: batch[name][1:] for name in ("pixel_values", "input_features")}
        alone = model(IDS[1:, :7], **media, segment_ids=SEGMENTS[1:, :7], audio_ids=CLIPS[1:, :7])
        close(alone.embeds[0], expected, 1e-5, "without")
        other = IDS.masked_fill(IDS == PAD, 20)
        masked = model(**batch | {"input_ids": other}, attention_mask=(IDS != PAD).long())
        close(masked.embeds[1, :7], expected, 1e-5, "masked")
        names = ("input_ids", "segment_ids", "audio_ids")
        left = model(**batch | {name: batch[name].roll(3, 1) for name in names})
        close(left.embeds[1, 3:], expected, 1e-5, "on the left")

    def test_videos_in_one_row_do_not_see_each_other(self, model, batch):
        ids = torch.tensor([[0, 1], [0, 0]])
        expected = model(**batch, video_ids=ids).embeds
        changed = batch | {"input_features": batch["input_features"].flip(2)}
        found = model(**changed, video_ids=ids).embeds
        close(found[0, :3], expected[0, :3], 1e-6, "the other video's audio")
        assert (found[1, :2] - expected[1, :2]).abs().max() > 1e-3
        assert (model(**batch).embeds[0, :3] - expected[0, :3]).abs().max() > 1e-3
        close(model(**batch, video_ids=torch.zeros(2, 2).long()).embeds, model(**batch).embeds, 1e-5, "one video")

    def test_audio_comes_in_order_by_default(self, model):
        ids = torch.tensor([[10, *[SOUND] * 6, 11]])
        clips = audio_clips(1, 3)
        expected = model(ids, input_features=clips, audio_ids=torch.tensor([[0, 0, 0, 1, 1, 2, 2, 0]])).embeds
        close(model(ids, input_features=clips).embeds, expected, 1e-6, "in order")

    def test_masks_are_compared_with_texts(self, model, batch):
        labels = torch.tensor([[20, 21, PAD, PAD], [22, PAD, PAD, PAD], [23, 24, 25, 26]])
        spans = model.get_text_features(labels).pooler_output
        close(model.get_text_features(labels[1:2, :1]).pooler_output[0], spans[1], 1e-5, "padding")
        output = model(**batch)
        logits = model.label_logits(output.embeds, IDS, spans)
        assert logits.shape == (2, 3)
        close(logits[1], 100 * output.embeds[1, 0] @ unit(spans).t(), 1e-5, "the second row's mask")
        with pytest.raises(ValueError, match=r"Texts of 5 tokens; the span encoder takes 4 \(max_span_length\)"):
            model.get_text_features(torch.ones(1, 5).long())

    def test_short_texts_are_projections_of_their_class_tokens(self, model):
        ids = torch.tensor([[20, 21, PAD], [22, 23, 24]])
        output = model.get_text_features(ids)
        assert output.last_hidden_state.shape == (2, 4, 64)
        close(model.span.projection(output.last_hidden_state[:, 0]), output.pooler_output, 0.0, "class tokens")
        for name in ("output_hidden_states", "output_attentions"):
            with pytest.raises(ValueError, match=f"{name}: .* records nothing"):
                model.get_text_features(ids, **{name: True})
        close(model.get_text_features(ids, output_attentions=False).pooler_output, output.pooler_output, 0.0, "False")

    def test_frames_of_another_grid(self, model, batch):
        larger = model(IDS, torch.rand(2, 2, 3, 24, 24), segment_ids=SEGMENTS)
        assert larger.last_hidden_state.shape == (2, 10 + 2 * 9, 64)
        with pytest.raises(ValueError, match="9 tokens, a grid of 2 x 3 has 6"):
            model(IDS, image_tokens=torch.rand(2, 2, 9, 64))

    def test_an_unknown_keyword_is_refused(self, model):
        with pytest.raises(TypeError, match="segment_id"):
            model(IDS, segment_id=SEGMENTS)


def triples(ids, clips, spans):
    return torch.stack([torch.tensor(ids), torch.tensor(clips), torch.tensor(spans)], dim=-1)


class TestPreTraining(ModelSuite):
    """Two videos of four segments, in groups of two, three clips a segment; each masks one clip for its audio and one
    for its text."""

    model_class, auto_class = HfvlmMERLOTReserveForPreTraining, AutoModelForPreTraining
    test_rows_of_a_batch_do_not_influence_each_other = None  # by the loss, they do
    test_compiles_as_one_graph = test_exports = None  # what it adds to the model above are sums

    def config(self):
        return config("HfvlmMERLOTReserveForPreTraining", mask_share=0.1, video_split_rate=0.5)

    def inputs(self):
        to_audio = triples(
            [[MASK, AUDIO_MASK, 10, 11, 12, PAD], [13, 14, 15, 16, PAD, PAD]],
            [[1, 1, 2, 3, 5, -1], [6, 7, 9, 11, -1, -1]],
            [[0, 0, -1, -1, -1, -1], [-1] * 6],
        )
        to_text = triples(
            [[SOUND, SOUND, 10, 11, PAD, PAD], [SOUND, SOUND, MASK, 12, 13, PAD]],
            [[0, 0, 1, 3, -1, -1], [6, 6, 8, 9, 11, -1]],
            [[-1] * 6, [-1, -1, 1, -1, -1, -1]],
        )
        matching = triples([POOL, SOUND, SOUND, POOL, 10, POOL, 11, POOL, 12], [0, 0, 0, 3, 3, 6, 6, 9, 9], [-1] * 9)
        texts = triples([[20, MASK, 21, 22, PAD]], [[0, 1, 2, 2, -1]], [[-1, 2, -1, -1, -1]])
        spans = torch.tensor([[[30, 31, PAD, PAD], [32, PAD, PAD, PAD], [33, 34, 35, PAD]]])
        # The second video's words are others.
        rows = {"text_to_audio": to_audio, "audio_to_text": to_text, "matching": matching, "texts": texts}
        rows = {name: torch.stack([row, shifted(row)]) for name, row in rows.items()}
        media = {"pixel_values": frames(2, 4), "input_features": audio_clips(2, 12)}
        return media | rows | {"span_ids": torch.cat([spans, spans.where(spans == PAD, spans + 3)])}

    def objective(self, model, batch):
        torch.manual_seed(2)  # of what training draws
        return model(**batch).loss

    def test_losses_are_those_of_the_paper(self, model, batch):
        output = model(**batch)
        pairs = {
            "image": (output.image_predictions, output.image_embeds, None),
            "audio": (output.audio_predictions, output.audio_embeds, output.other_audio_embeds),
            "span": (output.span_predictions, output.span_embeds, None),
        }
        assert [len(pair[0]) for pair in pairs.values()] == [8, 2, 6]
        assert len(output.other_audio_embeds) == 22
        for name, (a, b, others) in pairs.items():
            scale = getattr(model, f"{name}_logit_scale").exp()
            target = torch.arange(len(a))
            forth = F.cross_entropy(scale * a @ (b if others is None else torch.cat([b, others])).t(), target)
            back = F.cross_entropy(scale * b @ a.t(), target)
            close(output[f"{name}_loss"], (forth + back) / 2, 1e-5, name)
        close(output.loss, output.image_loss + output.audio_loss + output.span_loss, 1e-6, "sum")
        counts = torch.stack([(output.span_tasks == i).sum() for i in range(3)])
        assert counts.tolist() == [2, 2, 2]
        close((output.task_losses * counts).sum() / 6, output.span_loss, 1e-4, "by task")

    def test_masked_audio_is_the_target(self, model, batch):
        clips = batch["input_features"]
        expected = unit(model.get_audio_features(clips[:, 1]).pooler_output)
        close(model(**batch).audio_embeds, expected, 1e-5, "clip 1 of each")

    def test_texts_that_nothing_masks_are_not_predicted(self, model, batch):
        model.config.num_target_spans = 2
        batch["span_ids"][:, 2] = PAD
        assert sorted(model(**batch).span_tasks.tolist()) == [0, 0, 1, 1]

    def test_training_draws(self, model, batch):
        model.train()
        losses = {float(model(**batch).loss) for _ in range(8)}
        assert len(losses) > 1, "no row was split"
        model.config.video_split_rate = 0.0
        close(model(**batch).loss, model.eval()(**batch).loss, 1e-5, "nothing is left to chance")

    def test_groups_that_do_not_divide_are_refused(self, model, batch):
        model.config.num_segment_groups = 3
        with pytest.raises(ValueError, match="do not divide into num_segment_groups 3"):
            model(**batch)


def shifted(rows: torch.Tensor) -> torch.Tensor:
    """Other words in the same places."""
    return torch.where((torch.arange(3) == 0) & (rows >= 10) & (rows < 30), rows + 1, rows)


class TestMultipleChoice(ModelSuite):
    test_compiles_as_one_graph = None  # a linear layer on the model above
    model_class, auto_class = HfvlmMERLOTReserveForMultipleChoice, AutoModelForMultipleChoice

    def config(self):
        return config("HfvlmMERLOTReserveForMultipleChoice")

    def inputs(self):
        ids = torch.randint(10, 40, (2, 2, 3, 6))
        ids[..., 4], ids[..., 5] = MASK, PAD
        return {"input_ids": ids, "pixel_values": frames()[:, 0]}

    def loss_inputs(self):
        return {"labels": torch.tensor([[0, 2], [1, 1]])}

    def check_recorded(self, output, plain):
        same(output, plain, 1e-6)

    def test_attention_implementation_of_one_tower(self):
        model = self.model_class._from_config(self.config(), attn_implementation={"vision_config": "eager"})
        assert model.vision_model.config._attn_implementation == "eager" != model.config._attn_implementation

    def test_towers_alone_equal_those_inside(self, model, tmp_path):
        """All but the projection, which chooses nothing."""
        model.save_pretrained(tmp_path)
        alone, info = type(model.vision_model).from_pretrained(tmp_path, output_loading_info=True)
        assert info["missing_keys"] == {"encoder.projection.weight", "encoder.projection.bias"}
        for name, value in model.vision_model.state_dict().items():
            assert torch.equal(alone.state_dict()[name], value)

    def test_one_question_is_a_row_of_several(self, model, batch):
        logits = model(**batch, **self.loss_inputs())
        close(logits.loss, F.cross_entropy(logits.logits.flatten(0, 1), torch.tensor([0, 2, 1, 1])), 1e-6, "loss")
        one = model(batch["input_ids"][:, 1], batch["pixel_values"])
        close(one.logits, logits.logits[:, 1], 1e-5, "second question")

    def test_temperatures_stay_exact_where_there_are_any(self, model):
        whole = HfvlmMERLOTReserveModel._from_config(config(), dtype=torch.bfloat16)
        for name in ("image", "audio", "span"):
            assert getattr(whole, f"{name}_logit_scale").scale.dtype == torch.float32
        assert whole.head.weight.dtype == torch.bfloat16
        assert not any(part._keep_in_fp32_modules_strict for part in (model, model.vision_model))

    def test_starts_from_the_pretrained_model(self, tmp_path):
        HfvlmMERLOTReserveModel(config()).save_pretrained(tmp_path)
        head, info = self.model_class.from_pretrained(tmp_path, output_loading_info=True)
        assert info["missing_keys"] == {"classifier.weight"}
        assert not info["unexpected_keys"]
        assert not hasattr(head, "audio_model")


class TestVideoMultipleChoice(TestMultipleChoice):
    model_class = HfvlmMERLOTReserveForVideoMultipleChoice
    test_one_question_is_a_row_of_several = test_starts_from_the_pretrained_model = None
    test_compiles_as_one_graph = test_exports = None  # of the parts of the two others

    def config(self):
        return config("HfvlmMERLOTReserveForVideoMultipleChoice")

    def inputs(self):
        ids = torch.randint(10, 40, (2, 3, 8))
        ids[..., 2], ids[..., 7] = MASK, PAD
        audio = torch.cat([ids[..., :3], torch.full((2, 3, 12), SOUND)], dim=-1)
        places = torch.tensor([0, 0, 0, 1, 1, 2, 2, 0]).expand(2, 3, -1)
        return {
            "input_ids": ids,
            "pixel_values": frames(),
            "audio_input_ids": audio,
            "input_features": audio_clips(),
            "segment_ids": places,
            "audio_segment_ids": torch.tensor([0] * 3 + [1] * 6 + [2] * 6).expand(2, 3, -1),
        }

    def loss_inputs(self):
        return {"labels": torch.tensor([0, 2])}

    def test_both_kinds_of_evidence_count(self, model, batch):
        output = model(**batch, **self.loss_inputs())
        close(output.loss, output.text_loss + output.audio_loss, 1e-6, "loss")
        both = (output.logits_from_text.softmax(-1) + output.logits_from_audio.softmax(-1)) / 2
        close(output.logits.softmax(dim=-1), both, 1e-5, "probabilities")
        other = model(**batch | {"input_features": batch["input_features"].flip(1)})
        close(other.logits_from_text, output.logits_from_text, 1e-5, "subtitles do not depend on audio")
        assert (other.logits_from_audio - output.logits_from_audio).abs().max() > 1e-4

    def test_the_question_is_before_the_first_frame(self, model, batch):
        """Frames count from 1: subtitles in segment 1 are those of the first."""
        seen = []
        model.joint.register_forward_pre_hook(lambda _, args: seen.append(args[1]))
        model(**batch)
        (coordinates,) = seen
        frames_of_rows = coordinates[0, 15 : 15 + 12, 2] if coordinates.shape[1] == 27 else coordinates[0, -12:, 2]
        assert (frames_of_rows * 16).unique().tolist() == [1, 2]


def test_positions_scale_channels():
    """Sine and cosine are swapped and pairs are not mixed; channels beyond the 32nd hold none."""
    factors = rotary_factors(torch.tensor([[[0.0], [0.3]]]), 40)[0, 0]
    assert factors.shape == (2, 40)
    assert factors[0, :32].tolist() == [-1.0, 1.0] * 16
    angle = torch.tensor(0.3 * torch.pi)
    close(factors[1, :2], torch.stack([angle.sin() - angle.cos(), angle.sin() + angle.cos()]), 1e-6, "lowest")
    highest = 5 * angle
    expected = torch.stack([highest.sin() - highest.cos(), highest.sin() + highest.cos()])
    close(factors[1, 30:32], expected, 1e-5, "highest")
    assert (factors[:, 32:] == 1).all()


def test_bad_sizes_are_refused():
    error = StrictDataclassClassValidationError
    with pytest.raises(error, match="heads of 16 .* narrower than the 32 channels"):
        config(num_attention_heads=4)
    with pytest.raises(error, match="hidden_size 32 must be vision_config's hidden_size 64"):
        config(hidden_size=32, num_attention_heads=1)
    with pytest.raises(error, match="num_frames 14 is not a multiple of patch_size 2 times num_tokens 2"):
        HfvlmMERLOTReserveAudioConfig(**AUDIO | {"num_frames": 14})
    with pytest.raises(error, match=r"does not divide into squares of pool_size 2"):
        HfvlmMERLOTReserveVisionConfig(**VISION | {"image_size": [12, 24]})


def test_recipes():
    tuned = hfvlm.lora(HfvlmMERLOTReserveModel(config()), quiet=True)
    trained = [name for name, parameter in tuned.named_parameters() if parameter.requires_grad]
    assert {name.split(".")[2] for name in trained} >= {"vision_model", "audio_model", "joint", "span"}
    assert {part for name in trained for part in ("q_proj", "v_proj") if part in name} == {"q_proj", "v_proj"}
