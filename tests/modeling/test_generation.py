"""Every model that generates: with a cache, without one, and by hand it predicts the same."""

import inspect

import pytest
import torch
from transformers import GenerationMixin
from transformers.generation import LogitsProcessor, RepetitionPenaltyLogitsProcessor
from transformers.generation import utils as generation_utils

from hfvlm.modeling.captioning import CaptioningModel, TextDecoder
from hfvlm.modeling.compat import CACHE, cache_of
from hfvlm.modeling.generation import Generation, WholeTextBeams, WithinVocabulary, Without
from hfvlm.modeling.image_text import ImageTextModel
from hfvlm.modeling.image_text_seq2seq import Seq2SeqImageTextModel
from hfvlm.modeling.text_to_image import TextToImageModel
from hfvlm.models.paligemma import HfvlmPaliGemmaForConditionalGeneration
from hfvlm.modules.context import Context
from tests.modeling.test_keywords import CLASSES, deprecated_cache_name
from tests.models.blip import test_modeling as blip
from tests.models.blip2 import test_modeling as blip2
from tests.models.coca import test_modeling as coca
from tests.models.dalle_mini import test_modeling as dalle_mini
from tests.models.flamingo import test_modeling as flamingo
from tests.models.llava import test_modeling as llava
from tests.models.mammut import test_modeling as mammut
from tests.models.pali import test_modeling as pali
from tests.models.paligemma import test_modeling as paligemma
from tests.models.qwen_vl import test_modeling as qwen_vl
from tests.models.shikra import test_modeling as shikra
from tests.models.video_chatgpt import test_modeling as video_chatgpt
from tests.support.suite import ModelSuite, close, relative

MODULES = (*(blip, blip2, coca, dalle_mini, flamingo, llava, mammut, pali, paligemma, qwen_vl, shikra, video_chatgpt),)
SUITES = {
    f"{module.__name__.split('.')[2]}.{name}": suite
    for module in MODULES
    for name, suite in vars(module).items()
    if isinstance(suite, type) and issubclass(suite, ModelSuite) and hasattr(suite, "model_class")
    if suite.model_class.can_generate()
    if not issubclass(suite.model_class, TextDecoder)
    or "context" in suite().inputs()
    or "pixel_values" in suite().inputs()
}
STEPS = 5
OPTIONS = {"do_sample": False, "max_new_tokens": STEPS, "min_new_tokens": STEPS, "eos_token_id": None}
OPTIONS |= {"return_dict_in_generate": True, "output_logits": True, "renormalize_logits": False}


def sharpened(model):
    """Give weights a size at which what a token attends to decides what follows it, and open gates that are closed."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(0.2 / parameter.std().clamp_min(1e-6))
            elif parameter.numel() == 1 and not parameter.any():
                parameter.fill_(0.5)
    return model.eval()


class Subject:
    """A model with a batch of prompts; a subclass knows how it is called."""

    def __init__(self, suite):
        torch.manual_seed(0)
        self.model = sharpened(suite.model_class(suite().config()))
        torch.manual_seed(1)
        self.batch = suite().inputs()
        self.rows = range(self.batch["input_ids"].shape[0])

    def prompt(self, i):
        """Row i's token ids without padding, (1, N)."""
        ids, mask = self.batch["input_ids"][i : i + 1], self.batch.get("attention_mask")
        return ids if mask is None else ids[:, mask[i].bool()]

    def begin(self, ids):
        """The ids that a generated text begins with."""
        return ids

    def padded(self, *, left):
        """All prompts, with two more tokens of padding."""
        prompts = [self.prompt(i)[0] for i in self.rows]
        length = max(map(len, prompts)) + 2
        pad = self.model.config.get_text_config(decoder=True).pad_token_id or 0
        ids, mask = torch.full((len(prompts), length), pad), torch.zeros(len(prompts), length, dtype=torch.long)
        for i, prompt in enumerate(prompts):
            place = slice(length - len(prompt), None) if left else slice(0, len(prompt))
            ids[i, place], mask[i, place] = prompt, 1
        return {"input_ids": ids, "attention_mask": mask}

    def media(self, rows):
        """What is given beside the texts of these rows."""
        return {
            name: value[list(rows)]
            for name, value in self.batch.items()
            if name not in ("input_ids", "attention_mask", "decoder_input_ids")
        }

    def score(self, ids, i):
        """Row i's scores of what comes after each of its ids, without a cache."""
        return self.model(input_ids=ids, **self.media([i])).logits

    def best(self, scores):
        """The likeliest token that is no placeholder."""
        placeholders = [self.model.placeholder(kind) for kind in getattr(self.model, "media_inputs", ())]
        never = [token for token in placeholders if token < scores.shape[-1]]
        return scores.index_fill(1, torch.tensor(never, dtype=torch.long), -torch.inf).argmax(-1, keepdim=True)

    def generate(self, rows=None, *, left=True, **options):
        """The scores of each step, (B, steps, V), and the whole output."""
        rows = self.rows if rows is None else rows
        text = {name: value[list(rows)] for name, value in self.padded(left=left).items()}
        output = self.model.generate(**text, **self.media(rows), **OPTIONS | options)
        return torch.stack(output.logits, dim=1), output


class DecoderSubject(Subject):
    """A text decoder with a context of its own for each row."""

    def media(self, rows):
        context = self.batch["context"]
        return {"context": Context(context.tokens[list(rows)])}


class LanguageModelSubject(Subject):
    def media(self, rows):
        return {}


class CaptioningSubject(Subject):
    """A vision tower and a text decoder: prompts lose their end token."""

    @property
    def decoder(self):
        return self.model.text_decoder

    def prompt(self, i):
        ids = super().prompt(i)
        return ids[:, ids[0] != self.model.config.get_text_config(decoder=True).eos_token_id]

    def begin(self, ids):
        return self.model.begin(ids, None)

    def media(self, rows):
        return {"pixel_values": self.batch["pixel_values"][list(rows)]}

    def score(self, ids, i):
        return self.decoder(ids, None, self.model.read(**self.media([i]))).logits


class AnsweringSubject(CaptioningSubject):
    """The decoder attends to a question, and begins with its start token alone."""

    def begin(self, ids):
        return torch.full_like(ids[:, :1], self.model.config.text_config.bos_token_id)

    def score(self, ids, i):
        return self.decoder(ids, None, self.model.read(**self.media([i]), input_ids=self.prompt(i))).logits


class QFormerSubject(CaptioningSubject):
    def begin(self, ids):
        return torch.cat([torch.full_like(ids[:, :1], self.model.config.qformer_config.bos_token_id), ids[:, 1:]], 1)

    def score(self, ids, i):
        return self.model(ids, context=self.model.read(**self.media([i]))).logits


class EncoderDecoderSubject(Subject):
    def begin(self, ids):
        return torch.full_like(ids[:, :1], self.model.config.text_config.decoder_start_token_id)

    def score(self, ids, i):
        return self.model(input_ids=self.prompt(i), decoder_input_ids=ids, **self.media([i])).logits


class TextToImageSubject(EncoderDecoderSubject):
    """Images of texts, which are padded on the right alone; of the ids that are scored, some are no codes."""

    def begin(self, ids):
        return torch.full_like(ids[:, :1], self.model.config.decoder_config.bos_token_id)

    def padded(self, *, left):
        return {name: self.batch[name] for name in ("input_ids", "attention_mask")}

    def best(self, scores):
        return scores[:, : self.model.codec.config.num_codes].argmax(-1, keepdim=True)

    def generate(self, rows=None, *, left=True, **options):
        return super().generate(rows, left=left, guidance_scale=1.0, **options)


class PrefixSubject(Subject):
    """All tokens of a prompt attend to each other."""

    def score(self, ids, i):
        return self.model(input_ids=ids, prefix_length=self.prompt(i).shape[1], **self.media([i])).logits


def subject_of(suite):
    kinds = {
        blip.HfvlmBLIPForQuestionAnswering: AnsweringSubject,
        blip2.HfvlmBLIP2ForPreTraining: QFormerSubject,
        Seq2SeqImageTextModel: EncoderDecoderSubject,
        TextToImageModel: TextToImageSubject,
        HfvlmPaliGemmaForConditionalGeneration: PrefixSubject,
        ImageTextModel: Subject,
        CaptioningModel: CaptioningSubject,
        TextDecoder: DecoderSubject,
        GenerationMixin: LanguageModelSubject,
    }
    return next(kind for base, kind in kinds.items() if issubclass(suite.model_class, base))(suite)


@pytest.fixture(params=SUITES, scope="module")
def subject(request):
    return subject_of(SUITES[request.param])


@pytest.fixture
def expected(subject):
    """Each row's scores of each step, from one forward over all ids so far, for the likeliest token each time."""
    rows = []
    with torch.no_grad():
        for i in subject.rows:
            ids, steps = subject.begin(subject.prompt(i)), []
            for _ in range(STEPS):
                steps.append(subject.score(ids, i)[:, -1])
                ids = torch.cat([ids, subject.best(steps[-1])], dim=1)
            rows.append(torch.stack(steps, dim=1))
            alone = (
                subject.score(ids[:, -2:-1], i) if type(subject) in (LanguageModelSubject, DecoderSubject) else None
            )
            assert alone is None or relative(alone[:, -1], steps[-1]) > 1e-2, "what came before must matter"
    return torch.cat(rows)


def test_every_class_that_generates_is_tried():
    generating = {model_class for model_class in CLASSES if model_class.can_generate()}
    assert {c.__name__ for c in generating - {suite.model_class for suite in SUITES.values()}} == set()


def test_the_cache_decides_what_a_step_predicts(subject):
    """Or the other tests would see nothing: a step without what came before predicts something else."""
    ids = subject.begin(subject.prompt(0))
    ids = torch.cat([ids, torch.full((1, 3), 5), torch.full((1, 1), 7)], dim=1)
    other = ids.clone()
    other[:, -3:-1] = 9
    with torch.no_grad():
        assert relative(subject.score(other, 0)[:, -1], subject.score(ids, 0)[:, -1]) > 1e-2


@pytest.mark.parametrize("left", [True, False], ids=["left", "right"])
@pytest.mark.parametrize("options", [{}, {"use_cache": False}, {"cache_implementation": "static"}], ids=str)
def test_greedy_steps_equal_one_forward_by_hand(subject, expected, options, left):
    if not left and type(subject) in (Subject, PrefixSubject, LanguageModelSubject):
        pytest.skip("language models of transformers continue after the padding: it belongs on the left")
    found, _ = subject.generate(left=left, **options)
    for i in subject.rows:
        close(found[i], expected[i], 1e-4, f"row {i}")


def test_beams_with_a_cache_equal_beams_without(subject):
    beams = {"num_beams": 3, "num_return_sequences": 2, "output_scores": True}
    _, kept = subject.generate(**beams)
    _, plain = subject.generate(**beams, use_cache=False)
    assert torch.equal(kept.sequences, plain.sequences)
    close(kept.sequences_scores, plain.sequences_scores, 1e-4, "scores")


def test_a_second_turn_goes_on_from_the_cache(subject):
    """As a conversation does, whichever name the cache is given by."""
    if type(subject) not in (Subject, LanguageModelSubject):
        pytest.skip("its prompt is read with every call: there is no second turn")
    text = {"input_ids": subject.prompt(0)}
    media = subject.media([0])
    new = torch.full((1, 2), 5)
    for name in ("cache", "past_key_values"):
        first = subject.model.generate(**text, **media, **OPTIONS)
        ids = torch.cat([first.sequences, new], dim=1)
        again = subject.model.generate(input_ids=ids, **media, **OPTIONS)
        with deprecated_cache_name(name):
            more = subject.model.generate(input_ids=ids, **{name: cache_of(first)}, **OPTIONS)
        assert torch.equal(more.sequences, again.sequences)
        close(torch.stack(more.logits), torch.stack(again.logits), 1e-4, name)


@pytest.mark.parametrize("number_of_tokens", [1, 4])
def test_an_assistant_changes_nothing_but_the_time(subject, number_of_tokens):
    if type(subject) is not Subject:
        pytest.skip("transformers' assisted decoding knows models with the prompt in input_ids alone")
    end = {"eos_token_id": subject.model.config.get_text_config(decoder=True).vocab_size - 1}
    _, output = subject.generate([0], **end)
    assistant = subject.model
    assistant.generation_config.num_assistant_tokens = number_of_tokens
    _, assisted = subject.generate([0], assistant_model=assistant, **end)
    assert torch.equal(assisted.sequences, output.sequences)
    _, looked = subject.generate([0], prompt_lookup_num_tokens=number_of_tokens, **end)
    assert torch.equal(looked.sequences, output.sequences)


def test_placeholders_are_never_generated(subject):
    """Even where they have the largest score: there would be no image for them."""
    if not isinstance(subject.model, ImageTextModel) or subject.model.config.is_encoder_decoder:
        pytest.skip("has no placeholders in what it generates")
    for modality in subject.model.media_inputs:
        placeholder = subject.model.placeholder(modality)
        head = subject.model.get_output_embeddings()
        if placeholder >= head.weight.shape[0]:
            continue
        kept = head.weight.detach().clone()
        with torch.no_grad():
            head.weight[placeholder] = 50 * kept.abs().max() * torch.sign(kept[0])
        _, output = subject.generate([0])
        with torch.no_grad():
            head.weight.copy_(kept)
        assert not (output.sequences[:, -STEPS:] == placeholder).any()


# What hfvlm overrides of transformers' generation that is private, with the arguments that it reads or hands on.
SEAMS = {
    "_get_candidate_generator": {"generation_config"},
    "_prepare_generated_length": {"generation_config"},
    "_get_logits_processor": {"generation_config", "input_ids_seq_length"},
    "_expand_inputs_for_generation": {"expand_size", "is_encoder_decoder", "input_ids"},
    "_update_finished_beams": {
        "topk_running_sequences",
        "topk_log_probs",
        "cur_len",
        "length_penalty",
        "decoder_prompt_len",
    },
    "_check_early_stop_heuristic": {"decoder_prompt_len"},
}


@pytest.mark.parametrize("name", SEAMS)
def test_transformers_still_has(name):
    assert SEAMS[name] <= set(inspect.signature(getattr(GenerationMixin, name)).parameters)
    assert f"self.{name}(" in inspect.getsource(generation_utils.GenerationMixin), f"nothing calls {name} any more"


def test_nothing_else_that_is_private_is_overridden():
    private = {
        name for owner in (Generation, WholeTextBeams) for name in vars(owner) if hasattr(GenerationMixin, name)
    }
    assert {name for name in private if name.startswith("_") and not name.startswith("__")} == set(SEAMS)


def test_transformers_calls_the_cache_by_a_name_that_is_known():
    assert CACHE in inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters


class Shifted(LogitsProcessor):
    """A processor that takes more than ids and scores."""

    def __call__(self, input_ids, scores, shift):
        return scores + shift


def test_processors_of_logits_get_what_they_take():
    ids, scores = torch.tensor([[1, 9]]), torch.zeros(1, 5)
    processors = WithinVocabulary([RepetitionPenaltyLogitsProcessor(2.0), Shifted(), Without([3, 7])])
    expected = torch.tensor([[1.0, 1, 1, -torch.inf, 1]])
    assert torch.equal(processors(ids, scores, shift=1.0), expected)
    assert not scores.any()
    with pytest.raises(ValueError, match="Shifted needs shift"):
        processors(ids, scores)
    assert Without([7])(ids, scores) is scores
