"""LAVIS's BLIP-2 and InstructBLIP (https://github.com/salesforce/LAVIS at 506965b), run at tiny sizes."""

import ast
import copy
import re
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSeq2SeqLM, LlamaConfig, OPTConfig, T5Config

from hfvlm.checkpoints.conversion import Source
from hfvlm.checkpoints.key_table import Row, Table, convert_tables, restore_keys
from hfvlm.conversion.blip2 import (
    ARGUMENTS,
    BERT_FIELDS,
    VISION_FIELDS,
    config_from_original,
    tables_for,
    vision_rows,
)
from hfvlm.losses.processes import positives
from hfvlm.models.blip2 import (
    HfvlmBLIP2Config,
    HfvlmBLIP2ImageProcessor,
    HfvlmBLIP2Processor,
    HfvlmBLIP2QFormerTokenizer,
    HfvlmBLIP2Tokenizer,
    HfvlmInstructBLIPProcessor,
)
from hfvlm.presets import Preset
from hfvlm.processing.assembly import IGNORE
from hfvlm.release.plans import empty_model
from tests.originals.common import bert_vocabulary, fitting, made_of
from tests.support.golden import Golden, UnknownOptionError, companions, read_key_list, stem_of
from tests.support.shapes import shapes_of

FIRST_STAGE = ("Blip2Qformer", "Blip2ITM")


# What one call of `generate` is given, and of `predict_answers`.
GENERATE = ("num_beams", "max_length", "min_length", "repetition_penalty", "length_penalty")
ANSWERS = {
    "num_beams": "num_beams",
    "max_len": "max_length",
    "min_len": "min_length",
    "length_penalty": "length_penalty",
}
# The originals' own limits of texts.
LIMITS = {"max_txt_len": 32, "max_output_txt_len": 32}
INSTRUCT_LIMITS = {"max_txt_len": 128, "max_output_txt_len": 256}


def compare(golden: Golden) -> None:
    if not golden.state_dict:
        golden.check()
        return pixels(golden) if "files" in golden.case else tokens(golden)
    models = ("bert_config", "opt_config", "t5_config", "llm_config")
    golden.check(
        # The last is what the original sets itself.
        arguments=(*ARGUMENTS, *models, "t5_config.dense_act_fn (set by LAVIS)"),
        arguments__bert_config=BERT_FIELDS,
        arguments__vision_override=VISION_FIELDS,
        **language_options(),
        generate=golden.section("generate"),
    )
    first = golden.case["class"].rpartition(".")[2] in FIRST_STAGE
    return first_stage(golden) if first else second_stage(golden)


def language_options() -> dict[str, Any]:
    """What transformers knows of a language model."""
    kinds = {"opt": OPTConfig, "t5": T5Config, "llm": LlamaConfig}
    own = ("num_key_value_heads", "feed_forward_proj", "decoder_start_token_id", "rope_theta", "rope_scaling")
    return {f"arguments__{name}_config": (*kind().to_dict(), *own) for name, kind in kinds.items()}


# Processors


def pixels(golden: Golden) -> None:
    for name, file in golden.case["files"].items():
        for size, stride in golden.case["stride"].items():
            processor = HfvlmBLIP2ImageProcessor(size=int(size), upright=False)
            image = processor(golden.folder / file, return_tensors="pt")["pixel_values"][0]
            golden.compare(f"{name}@{size}", image[:, ::stride, ::stride])
            exact = image.double().flatten(1)
            golden.compare(f"{name}@{size}.mean_std", torch.stack([exact.mean(1), exact.std(1, correction=0)]))


def tokens(golden: Golden) -> None:
    path = bert_vocabulary(golden.folder)
    tokenizer = HfvlmBLIP2QFormerTokenizer.from_vocabulary(path, model_max_length=512)
    special = golden.section("special_ids")
    for name, value in {"[DEC] (bos_token)": tokenizer.bos_token_id, "len(tokenizer)": len(tokenizer)}.items():
        assert special.get(name, value) == value

    @cache
    def cleaning(kind: str, words: int) -> HfvlmBLIP2QFormerTokenizer:
        return HfvlmBLIP2QFormerTokenizer.from_vocabulary(path, clean=kind, max_words=words)

    def cut(text: str, size: str, side: str = "right") -> list[int]:
        own = HfvlmBLIP2QFormerTokenizer.from_vocabulary(path, truncation_side=side, model_max_length=int(size))
        return own(text)["input_ids"]

    # What a row's field holds says what was done to its text.
    fields = {
        r"Blip(Caption|Question)Processor\((?:prompt='(.*?)')?(?:, )?(?:max_words=(\d+))?\)": (
            lambda text, kind, prompt, words: (prompt or "") + cleaning(kind.lower(), int(words or 50)).cleaned(text)
        ),
        r"qformer_ids_max_length_(\d+)": cut,
        r"instruct_qformer_ids_left_truncation_max_length_(\d+)": lambda text, size: cut(text, size, "left"),
    }
    for row in golden.case["texts"]:
        text = row.pop("text")
        assert {name: made_of(fields, name, text) for name in row} == row, text


# Released files


def compose(path: Path) -> tuple[HfvlmBLIP2Config, list[Table]]:
    """A released file and, without memory, the others that its preset names: the configuration and the tables. A
    tower's own file is tried with a release that leaves it out."""
    tower = not any(key.startswith("Qformer.") for key in read_key_list(path))
    return fitting("blip2", "" if tower else stem_of(path), lambda preset: composed(path, preset, tower=tower))


def composed(path: Path, preset: Preset, *, tower: bool) -> tuple[HfvlmBLIP2Config, list[Table]]:
    config, parts = preset.make_config(), preset.source.get("parts", {})
    own = shapes_of(config)[0]
    given = {stem_of(other).lower(): other for other in companions(path)}
    name = Path(parts.get("vision", "")).stem.lower()
    if tower:
        assert name == stem_of(path).lower(), f"{preset.name} has another tower"
    main = given.get(preset.name.rpartition("/")[2]) if tower else path
    assert main, f"there is no key list of {preset.name}"
    tensors = {"main": read_key_list(main)}
    if "vision" in parts:
        found = path if tower else given.get(name)
        tensors["vision"] = read_key_list(found) if found else restored(own, "vision_model", vision_rows(config))
    if "base" in parts:
        tensors["base"] = language_model(config)
    sources = {role: Source(path, part, {}) for role, part in tensors.items()}
    return config, tables_for(config, "lavis", sources)


def restored(own: dict[str, Tensor], part: str, rows: list[Row]) -> dict[str, Tensor]:
    return restore_keys({key: t for key, t in own.items() if key.startswith(part)}, rows)


def language_model(config: HfvlmBLIP2Config) -> dict[str, Tensor]:
    """In its own folder, without the token that InstructBLIP adds."""
    text = copy.deepcopy(config.text_config)
    kind: Any = AutoModelForSeq2SeqLM if text.is_encoder_decoder else AutoModelForCausalLM
    if text.model_type == "llama":
        text.vocab_size, text.pad_token_id = text.vocab_size - 1, None
    with torch.device("meta"):
        return kind.from_config(text).state_dict()


# Models


def model_of(golden: Golden) -> Any:
    """The original's weights in our model, without dropout, since the cases were made without."""
    case, folder = golden.case, golden.folder
    vocabulary = next(folder.glob("*vocab.txt")).read_text().splitlines()
    newline = next((value for key, value in case.items() if key.startswith("eos_token_id")), None)
    ids = {"sep_token_id": vocabulary.index("[SEP]")} | ({} if newline is None else {"newline_token_id": newline})
    config = config_from_original({**case, **ids}, golden.state_dict)
    config.qformer_config.hidden_dropout = config.qformer_config.attention_dropout = 0.0
    empty = empty_model(config)
    tables = tables_for(config, "lavis", {"main": Source(Path("main"), golden.state_dict, {})})
    tensors = {
        k: t.contiguous().clone() for part in convert_tables(tables, empty.state_dict()) for k, t in part.items()
    }
    model, info = type(empty).from_pretrained(None, config=config, state_dict=tensors, output_loading_info=True)
    assert not any(info.values()), info
    assert {type(m) for m in model.modules()} == {type(m) for m in AutoModel.from_config(config).modules()}
    assert all(torch.isfinite(p).all() for p in model.parameters())
    return model.eval()


class Calls:
    """Outputs of modules by the original's names, one for each call."""

    def __init__(self, model: Any):
        self.seen: dict[str, list[Any]] = defaultdict(list)
        for name, module in model.named_modules():
            module.register_forward_hook(self.hook(name))

    def hook(self, name: str) -> Any:
        def record(_: Any, __: Any, output: Any) -> None:
            self.seen[name].append(output[0] if isinstance(output, tuple) else output)

        return record

    NAMES = {
        r"visual_encoder\.patch_embed": "vision_model.patches",
        r"visual_encoder\.conv1": "vision_model.patches.projection",
        r"visual_encoder\.ln_pre": "vision_model.pre_norm",
        r"visual_encoder\.(?:transformer\.res)?blocks\.(\d+)": r"vision_model.layers.\1",
        r"visual_encoder": "vision_model",
        r"ln_vision": "qformer_model.context_norm",
        r"Qformer\.bert\.embeddings": "qformer_model.embeddings",
        r"Qformer\.bert\.encoder\.layer\.(\d+)": r"qformer_model.layers.\1",
        r"(?:opt|t5|llm)_model\.(.+)": r"language_model.\1",
    }

    def path(self, name: str) -> str | None:
        found = (
            re.sub(f"^{theirs}$", ours, name) for theirs, ours in self.NAMES.items() if re.fullmatch(theirs, name)
        )
        return next(found, None)

    def compare(self, golden: Golden) -> None:
        """All stored intermediates that the first call has."""
        for name in golden.in_order():
            path = self.path(name)
            if path is not None and name not in golden.compared:
                output = self.seen[path][0]
                golden.compare(name, output if isinstance(output, Tensor) else output.last_hidden_state)


@torch.no_grad()
def first_stage(golden: Golden) -> None:
    model = model_of(golden)
    image, ids = (golden.inputs[name] for name in ("image", "text.input_ids"))
    mask = golden.mask("text.attention_mask", "text.input_ids")
    pair_ids = golden.inputs.get("image_id")
    calls, drawn = Calls(model), []
    recorded = iter([golden.outputs["neg_image_idx"], golden.outputs["neg_text_idx"]])
    model.draw = lambda weights: drawn.append(weights) or next(recorded)
    output = model(ids, image, mask, pair_ids, return_loss=True)
    calls.compare(golden)
    golden.compare("Qformer.bert.embeddings (text)", calls.seen["qformer_model.embeddings"][1])
    size = len(image)
    last = calls.seen[f"qformer_model.layers.{len(model.qformer_model.layers) - 1}"]
    begun = ids.clone()
    begun[:, 0] = model.config.qformer_config.bos_token_id
    similarities = torch.einsum("iqd,td->itq", output.image_embeds, output.text_embeds)
    same = positives(size, pair_ids, ids.device, None).float()
    values = {
        "query_output": output.vision_model_output.last_hidden_state,
        "image_feats": output.image_embeds,
        "text_output": output.text_model_output.last_hidden_state,
        "text_feat": output.text_embeds,
        "sim_q2t": similarities,
        "sim_t2q": similarities.transpose(0, 1),
        "sim_targets": 0.9 * same / same.sum(1, keepdim=True) + 0.1 / size,
        "weights_t2i": drawn[0],
        "weights_i2t": drawn[1],
        "neg_image_idx": golden.outputs["neg_image_idx"],
        "neg_text_idx": golden.outputs["neg_text_idx"],
        "itm.last_hidden_state": last[2],
        "itm.logits": output.matching_logits,
        "itm.labels": torch.tensor([1] * size + [0] * 2 * size),
        "lm.logits": model(begun, None, mask, context=model.read(image)).logits,
        "lm.labels": begun.masked_fill(mask == 0, -100),
        "loss_itc": output.contrastive_loss,
        "loss_itm": output.matching_loss,
        "loss_lm": output.captioning_loss,
        "loss": output.loss,
    }
    # The features were made of texts padded to the longest alone.
    longest = int(mask.sum(1).max())
    texts, shown = ids[:, :longest], mask[:, :longest]
    seen, read = model.get_image_features(image), model.get_text_features(texts, shown)
    projected = model.text_projection(read.last_hidden_state)
    values |= {
        "features.image_embeds": seen.last_hidden_state,
        "features.image_embeds_proj": F.normalize(seen.pooler_output, dim=-1),
        "features.text_embeds": read.last_hidden_state,
        "features.text_embeds_proj": F.normalize(projected, dim=-1),
        "features.multimodal_embeds": model.get_multimodal_features(texts, image, shown).pooler_output,
        "compute_itm": model.match(ids, mask, seen.image_tokens)[:, 1],
        "blip2_itm.itm (sample 0)": model.match(ids[:1], mask[:1], seen.image_tokens[:1]),
        "blip2_itm.itc (sample 0)": model.score(output.image_embeds[:1], output.text_embeds[:1]),
    }
    golden.check(generate=(*GENERATE, "use_nucleus_sampling", "top_p"))
    options = {name: value for name, value in golden.section("generate").items() if name in GENERATE}
    if "generated_ids" in golden.outputs:
        values["generated_ids"] = model.generate(image, do_sample=False, **options)
    for name in golden.in_order():
        if name in values:
            golden.compare(name, values[name])


# Language models


def tokenizer_of(golden: Golden, model: Any) -> HfvlmBLIP2Tokenizer:
    text = model.config.text_config
    names = ("*vocab.json", "*tokenizer.json", "*.model")
    path = next(found for name in names for found in sorted(golden.folder.glob(name)))
    return HfvlmBLIP2Tokenizer.from_vocabulary(path, kind=text.model_type, size=text.vocab_size)


def processor_of(golden: Golden, model: Any) -> HfvlmBLIP2Processor:
    tokenizer = tokenizer_of(golden, model)
    options = {
        "num_queries": model.config.qformer_config.num_queries,
        "prompt": golden.section("arguments").get("prompt", ""),
        "kind": model.config.text_config.model_type,
    }
    pictures = HfvlmBLIP2ImageProcessor(size=model.config.vision_config.image_size)
    if model.config.qformer_config.vocab_size is None:
        return HfvlmBLIP2Processor(pictures, tokenizer, **options)
    words = next(golden.folder.glob("*vocab.txt"))
    longest = golden.section("arguments").get("max_txt_len", INSTRUCT_LIMITS["max_txt_len"])
    qformer = HfvlmBLIP2QFormerTokenizer.from_vocabulary(words, truncation_side="left", model_max_length=longest)
    return HfvlmInstructBLIPProcessor(pictures, tokenizer, qformer, **options)


class Generated:
    """What the model generates, as the original's `generate` returns it."""

    # Of `generate`, and of `predict_answers`.
    DEFAULTS = {"num_beams": 5, "min_length": 1, "max_length": 30, "repetition_penalty": 1.0, "length_penalty": 1.0}
    INSTRUCT = DEFAULTS | {"max_length": 256, "repetition_penalty": 1.5}

    def __init__(self, golden: Golden, model: Any, processor: HfvlmBLIP2Processor):
        self.golden, self.model, self.processor = golden, model, processor
        self.kind = model.config.text_config.model_type
        instructed = golden.case["class"].endswith("Instruct")
        self.defaults = self.INSTRUCT if instructed else self.DEFAULTS

    def inputs(self, texts: list[str]) -> dict[str, Tensor]:
        """Prompts as the original cuts them, with the case's images."""
        blank = [Image.new("RGB", (8, 8))] * len(texts)
        options = {}
        if self.kind == "opt":
            longest = self.golden.section("arguments").get("max_txt_len", LIMITS["max_txt_len"])
            options = {"truncation": True, "max_length": self.processor.num_queries + longest}
        return {**self.processor(blank, texts, **options), "pixel_values": self.golden.inputs["image"]}

    def __call__(self, inputs: dict[str, Tensor], **options: Any) -> Tensor:
        """Of all but T5, the returned ids begin with a start token that is made up, and counted in all lengths."""
        options = self.defaults | options
        made_up = 0 if self.kind == "t5" else 1
        longest, shortest = options.pop("max_length"), options.pop("min_length")
        options |= {"max_new_tokens": longest - made_up, "min_new_tokens": max(shortest - 1, 0)}
        if self.kind == "t5":
            return self.model.generate(**inputs, do_sample=False, **options)
        ids = self.model.generate(**inputs, do_sample=False, **options)[:, inputs["input_ids"].shape[1] :]
        start = self.model.config.text_config.bos_token_id
        ids = torch.cat([torch.full_like(ids[:, :1], start), ids], dim=1)
        if self.kind == "llama":  # the original makes end tokens of its padding
            ids = ids.masked_fill((ids == 0) | (ids == self.processor.tokenizer.pad_token_id), 2)
        return ids


@torch.no_grad()
def second_stage(golden: Golden) -> None:
    model = model_of(golden)
    processor = processor_of(golden, model)
    generated = Generated(golden, model, processor)
    if "text_input" in golden.section("texts"):
        training(golden, model, processor)
    for name in golden.section("generate"):
        if f"ids_{name}" not in golden.outputs:
            raise UnknownOptionError(f"{golden.folder.name}: generate has {name}, whose ids are not stored")
        path = f"generate__{name}"
        golden.check(**{path: (*GENERATE, "samples"), f"{path}__samples": ("prompt",)})
        options = golden.section(f"generate.{name}")
        prompts = options.pop("samples", {}).get("prompt", processor.prompt)
        prompts = [prompts] * len(golden.inputs["image"]) if isinstance(prompts, str) else prompts
        golden.compare(f"ids_{name}", generated(generated.inputs(prompts), **options))
    if "vqa.ids" in golden.outputs:
        answers(golden, generated)
    if "video.ids" in golden.outputs:
        video(golden, generated, model)


def training(golden: Golden, model: Any, processor: HfvlmBLIP2Processor) -> None:
    calls = Calls(model)
    inputs, stored = training_inputs(golden, processor)
    output = model(**inputs)
    calls.compare(golden)
    values = stored | {
        "loss": output.loss,
        "logits": output.logits,
        "query_output": calls.seen["qformer_model"][0].last_hidden_state,
        **{f"inputs_{name}": calls.seen["projector"][0] for name in ("opt", "t5", "llm")},
    }
    for name, value in values.items():
        golden.compare(name, value)


@contextmanager
def cut(golden: Golden, processor: HfvlmBLIP2Processor) -> Iterator[Callable[[str], list[int]]]:
    """Texts as long as the original's arguments let them be in training; yields the ids of what is to be answered."""
    limits = INSTRUCT_LIMITS if golden.case["class"].endswith("Instruct") else LIMITS
    given, answered = (golden.section("arguments").get(name, limits[name]) for name in limits)
    whole, answer_ids = processor.text_ids, processor.answer_ids

    def within(longest: int) -> Callable[[str], list[int]]:
        return partial(whole, truncation=True, max_length=longest)

    def answer(text: str) -> list[int]:
        processor.text_ids = within(answered)
        try:
            return answer_ids(text)
        finally:
            processor.text_ids = within(given)

    processor.text_ids, processor.answer_ids = within(given), answer
    try:
        yield within(answered)
    finally:
        processor.text_ids, processor.answer_ids = whole, answer_ids


def training_inputs(golden: Golden, processor: HfvlmBLIP2Processor) -> tuple[dict[str, Any], dict[str, Any]]:
    """What the model is trained on, and the same by the original's names."""
    texts, queries, pad = golden.case["texts"], processor.num_queries, processor.tokenizer.pad_token_id
    given, wanted = texts["text_input"], texts.get("text_output")
    if wanted is None:
        wanted = [text.removeprefix(processor.prompt).lstrip() for text in given]
        given = [processor.prompt] * len(wanted)
    blank = [Image.new("RGB", (8, 8))] * len(given)
    with cut(golden, processor) as answer_ids:
        inputs = {**processor.examples(blank, given, wanted), "pixel_values": golden.inputs["image"]}
        asked = padded(map(processor.text_ids, given), pad)
        answered = padded((answer_ids(text + (processor.tokenizer.eos_token or "")) for text in wanted), pad)
    if processor.kind == "t5":
        inputs["decoder_attention_mask"] = (inputs["labels"] != IGNORE).long()
    if processor.kind == "llama":  # padding of what is asked and of what is answered is not shared
        missing = queries + asked.shape[1] + answered.shape[1] - 1 - inputs["input_ids"].shape[1]
        for name, value in (("input_ids", pad), ("attention_mask", 0), ("labels", IGNORE)):
            inputs[name] = F.pad(inputs[name], (0, missing), value=value)
    return inputs, {
        "attention_mask": inputs["attention_mask"],
        "encoder_atts": inputs["attention_mask"],
        "targets": inputs["labels"],
        "output_tokens.input_ids": inputs["labels"].masked_fill(inputs["labels"] == IGNORE, pad),
        "text_input_tokens.input_ids": asked,
        "text_output_tokens.input_ids": answered,
        **{f"{name}_tokens.input_ids": inputs["input_ids"][:, queries:] for name in ("opt", "llm", "input")},
        **{f"text_Qformer.{name}": inputs.get(f"qformer_{name}") for name in ("input_ids", "attention_mask")},
    }


def padded(rows: Any, value: int) -> Tensor:
    return pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=value)


def answers(golden: Golden, generated: Generated) -> None:
    """`predict_answers`, with the original's defaults."""
    golden.check(predict_answers=(*ANSWERS, "prompt"))
    options = golden.section("predict_answers") or written_call(golden)
    prompt = options.pop("prompt", "")
    questions = golden.case["texts"]["questions"]
    inputs = generated.inputs([prompt.format(question) if prompt else question for question in questions])
    golden.compare("vqa.prompt_ids", inputs["input_ids"][:, generated.processor.num_queries :])
    golden.compare("vqa.attention_mask", inputs["attention_mask"])
    penalty = -1.0 if generated.kind == "t5" else 0.0
    options = {"max_length": 10, "length_penalty": penalty} | {ANSWERS[name]: value for name, value in options.items()}
    options["max_length"] += generated.kind == "opt"  # which counts new tokens here
    golden.compare("vqa.ids", generated(inputs, **options))


def written_call(golden: Golden) -> dict[str, Any]:
    """The call itself, where the case has no section of its options."""
    call = re.search(r"predict_answers\(.*?\)", golden.case["how"])
    assert call, f"{golden.folder.name}: no predict_answers, whose options vqa.ids were made with"
    options = {word.arg: ast.literal_eval(word.value) for word in ast.parse(call[0]).body[0].value.keywords}
    if unknown := sorted(set(options) - {*ANSWERS, "prompt"}):
        raise UnknownOptionError(f"{golden.folder.name}: predict_answers has {', '.join(unknown)}")
    return options


def video(golden: Golden, generated: Generated, model: Any) -> None:
    """Frames, each read as an image with the same instruction."""
    image, count = golden.inputs["image"], generated.processor.num_queries
    inputs = generated.inputs(golden.case["texts"]["text_input"])
    place = model.config.video_token_id
    ids, mask = inputs.pop("input_ids"), inputs.pop("attention_mask")
    del inputs["pixel_values"]
    made = torch.stack([image, image.flip(-1), image * 0.5], dim=2)  # of a case that stores none
    inputs["pixel_values_videos"] = golden.inputs.get("video", made).transpose(1, 2)
    features = model.get_video_features(**inputs).pooler_output
    for name in golden.outputs:
        if name.startswith("video.inputs_"):
            golden.compare(name, features)
    size = inputs["pixel_values_videos"].shape[1] * count
    inputs["input_ids"] = torch.cat([torch.full((len(ids), size), place), ids[:, count:]], dim=1)
    inputs["attention_mask"] = torch.cat([torch.ones(len(ids), size, dtype=torch.long), mask[:, count:]], dim=1)
    longest = golden.outputs["video.ids"].shape[1] - (generated.kind == "t5")
    golden.compare("video.ids", generated(inputs, num_beams=1, max_length=longest))
