"""LAVIS's BLIP-2 and InstructBLIP (https://github.com/salesforce/LAVIS at 506965b), run at tiny sizes."""

import copy
import re
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from hfvlm.conversion.blip2 import config_from_original, keys_for, tables_for, vision_rows
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSeq2SeqLM

from hfvlm.converter import Source, empty_model
from hfvlm.key_table import Row, Table, convert_tables, restore_keys
from hfvlm.losses.best_query import partners
from hfvlm.media_text import IGNORE
from hfvlm.models.blip2 import (
    HfvlmBLIP2Config,
    HfvlmBLIP2ImageProcessor,
    HfvlmBLIP2Processor,
    HfvlmBLIP2QFormerTokenizer,
    HfvlmBLIP2Tokenizer,
    HfvlmInstructBLIPProcessor,
)
from hfvlm.presets import load_preset
from tests.golden import Golden, read_key_list
from tests.originals.common import bert_vocabulary

CLEANINGS = (
    ("BlipCaptionProcessor()", "caption", 50),
    ("BlipQuestionProcessor()", "question", 50),
    ("BlipQuestionProcessor(max_words=4)", "question", 4),
)
FIRST_STAGE = ("Blip2Qformer", "Blip2ITM")


def compare(golden: Golden) -> None:
    case = golden.case
    if "sizes" in case:
        pixels(golden)
    elif "class" not in case:
        tokens(golden)
    elif case["class"].rpartition(".")[2] in FIRST_STAGE:
        first_stage(golden)
    else:
        second_stage(golden)


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
    tokenizer = HfvlmBLIP2QFormerTokenizer.from_vocabulary(path)
    special = golden.case["special_ids"]
    assert tokenizer.bos_token_id == special["[DEC] (bos_token)"]
    assert len(tokenizer) == special["len(tokenizer)"]
    instruction = HfvlmBLIP2QFormerTokenizer.from_vocabulary(path, truncation_side="left", model_max_length=16)
    cleaned = {
        name: HfvlmBLIP2QFormerTokenizer.from_vocabulary(path, clean=kind, max_words=words)
        for name, kind, words in CLEANINGS
    }
    shorter = HfvlmBLIP2QFormerTokenizer.from_vocabulary(path, clean="caption", max_words=5)
    for row in golden.case["texts"]:
        text = row["text"]
        for name, cleaning in cleaned.items():
            assert cleaning.cleaned(text) == row[name], (text, name)
        assert "a photo of " + shorter.cleaned(text) == row["BlipCaptionProcessor(prompt='a photo of ', max_words=5)"]
        assert tokenizer(text)["input_ids"] == row["qformer_ids_max_length_32"], text
        assert instruction(text)["input_ids"] == row["instruct_qformer_ids_left_truncation_max_length_16"], text


# Released files

# A tower's own file is tried with a release that leaves it out.
TOWERS = {"eva_vit_g": "blip2_pretrained", "clip_vit_L": "blip2_pretrained_vitL"}


def compose(path: Path) -> tuple[HfvlmBLIP2Config, list[Table]]:
    """A released file and, without memory, the others that its preset names: the configuration and the tables."""
    stem = path.name.removesuffix(".gz").removesuffix(".json")
    preset = load_preset(f"blip2/{TOWERS.get(stem, stem).lower()}")
    config, parts = preset.make_config(), preset.source.get("parts", {})
    own = empty_model(config).state_dict()
    given = {
        name: read_key_list(found) for found in path.parent.glob("*.json*") for name in [found.name.split(".js")[0]]
    }
    tensors = {"main": given.get(TOWERS.get(stem, stem)) or restored(own, "qformer_model", keys_for(config))}
    if "vision" in parts:
        name = Path(parts["vision"]).stem
        tensors["vision"] = given.get(name) or restored(own, "vision_model", vision_rows(config))
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
    model, case = model_of(golden), golden.case
    image, ids, mask = (golden.inputs[name] for name in ("image", "text.input_ids", "text.attention_mask"))
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
    same = partners(size, pair_ids, ids.device, None).float()
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
    options = case.get("generate", {})
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
        "prompt": golden.case["arguments"].get("prompt", ""),
        "kind": model.config.text_config.model_type,
    }
    pictures = HfvlmBLIP2ImageProcessor(size=model.config.vision_config.image_size)
    if model.config.qformer_config.vocab_size is None:
        return HfvlmBLIP2Processor(pictures, tokenizer, **options)
    words = next(golden.folder.glob("*vocab.txt"))
    longest = golden.case["arguments"].get("max_txt_len", 128)
    qformer = HfvlmBLIP2QFormerTokenizer.from_vocabulary(words, truncation_side="left", model_max_length=longest)
    return HfvlmInstructBLIPProcessor(pictures, tokenizer, qformer, **options)


class Written:
    """What the model writes, as the original's `generate` returns it."""

    # Of `generate`, and of `predict_answers`.
    DEFAULTS = {"num_beams": 5, "min_length": 1, "max_length": 30, "repetition_penalty": 1.0, "length_penalty": 1.0}
    INSTRUCT = DEFAULTS | {"max_length": 256, "repetition_penalty": 1.5}

    def __init__(self, golden: Golden, model: Any, processor: HfvlmBLIP2Processor):
        self.golden, self.model, self.processor = golden, model, processor
        self.kind = model.config.text_config.model_type
        instructed = golden.case["class"].endswith("Instruct")
        self.defaults = self.INSTRUCT if instructed else self.DEFAULTS

    def inputs(self, texts: list[str]) -> dict[str, Tensor]:
        """Prompts as the original cuts them, with the case's pictures."""
        blank = [Image.new("RGB", (8, 8))] * len(texts)
        options = {}
        if self.kind == "opt":
            longest = self.golden.case["arguments"].get("max_txt_len", 32)
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
    model, case = model_of(golden), golden.case
    processor = processor_of(golden, model)
    calls, written = Calls(model), Written(golden, model, processor)
    inputs, stored = training_inputs(golden, processor)
    output = model(**inputs)
    calls.compare(golden)
    values = stored | {
        "loss": output.loss,
        "logits": output.logits,
        "query_output": calls.seen["qformer_model"][0].last_hidden_state,
        **{f"inputs_{name}": calls.seen["projector"][0] for name in ("opt", "t5", "llm")},
    }
    for name in golden.in_order():
        if name in values:
            golden.compare(name, values[name])
    for name, options in case.get("generate", {}).items():
        options = dict(options)
        prompts = options.pop("samples", {}).get("prompt", processor.prompt)
        prompts = [prompts] * len(golden.inputs["image"]) if isinstance(prompts, str) else prompts
        golden.compare(f"ids_{name}", written(written.inputs(prompts), **options))
    if "vqa.ids" in golden.outputs:
        answers(golden, written)
    if "video.ids" in golden.outputs:
        film(golden, written, model)


def training_inputs(golden: Golden, processor: HfvlmBLIP2Processor) -> tuple[dict[str, Any], dict[str, Any]]:
    """What the model is trained on, and the same by the original's names."""
    texts, queries, pad = golden.case["texts"], processor.num_queries, processor.tokenizer.pad_token_id
    given, wanted = texts["text_input"], texts.get("text_output")
    if wanted is None:
        wanted = [text.removeprefix(processor.prompt).lstrip() for text in given]
        given = [processor.prompt] * len(wanted)
    blank = [Image.new("RGB", (8, 8))] * len(given)
    inputs = {**processor.examples(blank, given, wanted), "pixel_values": golden.inputs["image"]}
    asked = padded(map(processor.text_ids, given), pad)
    said = padded((processor.text_ids(text + (processor.tokenizer.eos_token or "")) for text in wanted), pad)
    if processor.kind == "t5":
        inputs["decoder_attention_mask"] = (inputs["labels"] != IGNORE).long()
    if processor.kind == "llama":  # padding of what is asked and of what is answered is not shared
        missing = queries + asked.shape[1] + said.shape[1] - 1 - inputs["input_ids"].shape[1]
        for name, value in (("input_ids", pad), ("attention_mask", 0), ("labels", IGNORE)):
            inputs[name] = F.pad(inputs[name], (0, missing), value=value)
    return inputs, {
        "attention_mask": inputs["attention_mask"],
        "encoder_atts": inputs["attention_mask"],
        "targets": inputs["labels"],
        "output_tokens.input_ids": inputs["labels"].masked_fill(inputs["labels"] == IGNORE, pad),
        "text_input_tokens.input_ids": asked,
        "text_output_tokens.input_ids": said,
        **{f"{name}_tokens.input_ids": inputs["input_ids"][:, queries:] for name in ("opt", "llm", "input")},
        **{f"text_Qformer.{name}": inputs.get(f"qformer_{name}") for name in ("input_ids", "attention_mask")},
    }


def padded(rows: Any, value: int) -> Tensor:
    return pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=value)


def answers(golden: Golden, written: Written) -> None:
    """`predict_answers`, as the case says that it was called."""
    said = re.search(r"predict_answers\((.*?)\)", golden.case["how"])[1]
    prompt = re.search(r"prompt='(.*?)'", said)[1]
    beams, longest = (int(re.search(rf"{name}=(\d+)", said)[1]) for name in ("num_beams", "max_len"))
    inputs = written.inputs([prompt.format(question) for question in golden.case["texts"]["questions"]])
    golden.compare("vqa.prompt_ids", inputs["input_ids"][:, written.processor.num_queries :])
    golden.compare("vqa.attention_mask", inputs["attention_mask"])
    penalty = -1.0 if written.kind == "t5" else 0.0
    longest += written.kind == "opt"  # which counts new tokens here
    ids = written(inputs, num_beams=beams, max_length=longest, length_penalty=penalty)
    golden.compare("vqa.ids", ids)


def film(golden: Golden, written: Written, model: Any) -> None:
    """Three frames, each read as a picture with the same instruction."""
    image, count = golden.inputs["image"], written.processor.num_queries
    inputs = written.inputs(golden.case["texts"]["text_input"])
    place = model.config.video_token_id
    ids, mask = inputs.pop("input_ids"), inputs.pop("attention_mask")
    del inputs["pixel_values"]
    inputs["pixel_values_videos"] = torch.stack([image, image.flip(-1), image * 0.5], dim=1)
    features = model.get_video_features(**inputs).pooler_output
    name = next(name for name in golden.outputs if name.startswith("video.inputs_"))
    golden.compare(name, features)
    inputs["input_ids"] = torch.cat([torch.full((len(ids), 3 * count), place), ids[:, count:]], dim=1)
    inputs["attention_mask"] = torch.cat([torch.ones(len(ids), 3 * count, dtype=torch.long), mask[:, count:]], dim=1)
    longest = golden.outputs["video.ids"].shape[1] - (written.kind == "t5")
    golden.compare("video.ids", written(inputs, num_beams=1, max_length=longest))
