import re
from collections import defaultdict
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from hfvlm.conversion.blip import MED_FIELDS, config_from_original
from hfvlm.models.blip import HfvlmBLIPImageProcessor, HfvlmBLIPProcessor, HfvlmBLIPTokenizer
from hfvlm.modules.context import Context
from hfvlm.processing.cleaning import clean_caption, clean_question
from tests.originals.common import bert_vocabulary, converted, made_of
from tests.support.golden import Golden, UnknownOptionError

# Their values are those of the weights, or of a fresh start alone.
ARGUMENTS = (
    *("image_size", "vit", "create_vit_override", "med_config", "prompt", "embed_dim", "queue_size", "momentum"),
    *("negative_all_rank", "vit_grad_ckpt", "vit_ckpt_layer"),
)
GENERATE = ("num_beams", "max_length", "min_length", "repetition_penalty")
# The original's default.
PROMPT = "a picture of "


def compare(golden: Golden) -> None:
    if not golden.state_dict:
        golden.check()
        return pixels(golden) if "files" in golden.case else tokens(golden)
    golden.check(
        arguments=ARGUMENTS,
        arguments__med_config=MED_FIELDS,
        arguments__create_vit_override=("patch_size", "embed_dim", "depth", "num_heads"),
        generate=golden.section("generate"),
    )
    classes = {
        "BLIP_Base": features,
        "BLIP_Decoder": captions,
        "BLIP_ITM": matching,
        "BLIP_NLVR": reasoning,
        "BLIP_Pretrain": pretraining,
        "BLIP_Retrieval": retrieval if "k_test" in golden.case else momentum_retrieval,
        "BLIP_VQA": answers,
    }
    return classes[golden.case["class"].rpartition(".")[2]](golden)


def pixels(golden: Golden) -> None:
    case = golden.case
    normalisation = {f"image_{name}": case[name] for name in ("mean", "std") if name in case}
    for name, file in case["files"].items():
        for size, stride in case["stride"].items():
            processor = HfvlmBLIPImageProcessor(size=int(size), upright=False, **normalisation)
            image = processor(golden.folder / file, return_tensors="pt")["pixel_values"][0]
            golden.compare(f"{name}@{size}", image[:, ::stride, ::stride])
            exact = image.double().flatten(1)
            golden.compare(f"{name}@{size}.mean_std", torch.stack([exact.mean(1), exact.std(1, correction=0)]))


def tokens(golden: Golden) -> None:
    path = bert_vocabulary(golden.folder)
    tokenizer = HfvlmBLIPTokenizer.from_vocabulary(path, model_max_length=512)
    for name, token_id in golden.section("special_ids").items():
        assert tokenizer.convert_tokens_to_ids(name.split()[0]) == token_id
    for name, ids in golden.case.items():
        if prompt := re.fullmatch(r"prompt '(.*)' ids", name):
            assert tokenizer(prompt[1])["input_ids"] == ids

    @cache
    def cleaning(kind: str, longest: int, words: int) -> HfvlmBLIPTokenizer:
        return HfvlmBLIPTokenizer.from_vocabulary(path, clean=kind, model_max_length=longest, max_words=words)

    # What a row's field holds says what was done to its text.
    fields = {
        r"ids": lambda text: tokenizer(text)["input_ids"],
        r"ids_padded_(\d+)": lambda text, size: tokenizer(
            text, padding="max_length", truncation=True, max_length=int(size)
        )["input_ids"],
        r"pre_(caption|question)(?:_max_words_(\d+))?": lambda text, kind, words: cleaning(
            kind, 512, int(words or 50)
        ).cleaned(text),
        r"ids_of_pre_(caption|question)(?:_max_words_(\d+))?(?:_max_length_(\d+))?": (
            lambda text, kind, words, size: cleaning(kind, int(size or 512), int(words or 50))(text)["input_ids"]
        ),
    }
    for row in golden.case["texts"]:
        text = row.pop("text")
        assert {name: made_of(fields, name, text) for name in row} == row, text
        for clean in (clean_caption, clean_question):
            assert clean(clean(text)) == clean(text)


def model_of(golden: Golden, head: str | None = None) -> Any:
    """The original's weights in our model, without dropout, since the cases were made without."""
    case = dict(golden.case)
    if (words := golden.folder / "vocab.txt").exists():
        case["sep_token_id"] = words.read_text(encoding="utf-8").splitlines().index("[SEP]")
    config = config_from_original(case, golden.state_dict)
    config.text_config.hidden_dropout = config.text_config.attention_dropout = 0.0
    config.vision_config.drop_path_rate = 0.0
    if head:
        config.architectures = [head]
    model = converted("blip", golden.state_dict, config, "salesforce")
    own = model.config.vision_config.image_size
    if (size := golden.section("arguments").get("image_size", own)) != own:
        model.vision_model.resize_positions(size)
    return model


class Calls:
    """Outputs of modules by the original's names, one for each call."""

    def __init__(self, model: Any):
        self.model, self.seen = model, defaultdict(list)
        for name, module in model.named_modules():
            module.register_forward_hook(self.hook(name))

    def hook(self, name: str) -> Any:
        def record(_: Any, __: Any, output: Any) -> None:
            self.seen[name].append(output[0] if isinstance(output, tuple) else output)

        return record

    def __call__(self, name: str, call: int = 0) -> Tensor:
        return self.seen[self.path(name)][call]

    def path(self, name: str) -> str:
        tower, _, place = name.partition(".")
        ours = {
            "visual_encoder": "vision_model",
            "visual_encoder_m": "teacher.vision_model",
            "text_encoder": "text_model",
            "text_encoder_m": "teacher.text_model",
            "text_decoder": "text_decoder",
        }[tower]
        place = place.removeprefix("bert.")
        layers = self.model.get_submodule(f"{ours}.layers")
        fixed = {
            "patch_embed": "patches",
            "norm": "post_norm",
            "embeddings": "embeddings",
            "last_hidden_state": f"layers.{len(layers) - 1}",
        }
        if place in fixed:
            return f"{ours}.{fixed[place]}"
        number, crossing = re.fullmatch(r"(?:blocks|encoder\.layer)\.(\d+)(\.crossattention)?", place).groups()
        return f"{ours}.layers.{number}" + (".cross_attention_norm" if crossing else "")

    def compare(self, golden: Golden) -> None:
        """All stored intermediates that the first call has."""
        for name in golden.in_order():
            if name not in golden.compared and re.match(r"(visual|text)_(encoder|decoder)(_m)?\.[^ ]+$", name):
                if name == "visual_encoder.pos_embed":
                    golden.compare(name, self.model.vision_model.position[None])
                else:
                    golden.compare(name, self(name))


def text(golden: Golden, name: str = "text") -> tuple[Tensor, Tensor]:
    ids = f"{name}.input_ids"
    return golden.inputs[ids], golden.mask(f"{name}.attention_mask", ids)


@torch.no_grad()
def features(golden: Golden) -> None:
    model, image = model_of(golden), golden.inputs["image"]
    calls = Calls(model)
    tokens = model.get_image_features(image).last_hidden_state
    golden.compare("image_embeds", tokens)
    golden.compare("text_embeds", model.get_text_features(*text(golden, "caption")).last_hidden_state)
    ids, mask = text(golden, "caption")
    both = model.get_multimodal_features(ids, image, mask).last_hidden_state
    golden.compare("multimodal_embeds", both)
    golden.compare("text_encoder.encoder.layer.0 (multimodal)", calls("text_encoder.encoder.layer.0", 1))
    if "padded.input_ids" in golden.inputs:
        ids, mask = text(golden, "padded")
    golden.compare("padded_text_embeds", model.text_model(ids, mask).last_hidden_state)
    golden.compare("padded_multimodal_embeds", model.text_model.ground(ids, mask, Context(tokens)).last_hidden_state)
    calls.compare(golden)


@torch.no_grad()
def captions(golden: Golden) -> None:
    model, image = model_of(golden), golden.inputs["image"]
    processor = processor_of(golden, golden.section("arguments").get("prompt", PROMPT))
    calls = Calls(model)
    if "text.input_ids" in golden.inputs:
        texts = [text.removeprefix(processor.prompt) for text in golden.case["texts"]["caption"]]
        inputs = processor.captions(list(image), texts)
        assert torch.equal(inputs["input_ids"][:, 1:], text(golden)[0][:, 1:])
        golden.compare("decoder_targets", inputs["labels"])
        output = model(image, *text(golden), inputs["labels"])
        golden.compare("loss_lm", output.loss)
        golden.compare("decoder_logits", output.logits)
        calls.compare(golden)
    prompts = processor(text=[processor.prompt] * len(image))
    for name in golden.section("generate"):
        if f"ids_{name}" not in golden.outputs:
            raise UnknownOptionError(f"{golden.folder.name}: generate has {name}, whose ids are not stored")
        golden.check(**{f"generate__{name}": ("arguments", "captions"), f"generate__{name}__arguments": GENERATE})
        setting = golden.section(f"generate.{name}")
        generated = model.generate(image, **prompts, **golden.section(f"generate.{name}.arguments"))
        golden.compare(f"ids_{name}", generated)
        if "captions" in setting:
            assert processor.decode_captions(generated) == setting["captions"]


def processor_of(golden: Golden, prompt: str = "") -> HfvlmBLIPProcessor:
    """With pixels as they are: the cases store them."""
    tokenizer = HfvlmBLIPTokenizer.from_vocabulary(golden.folder / "vocab.txt", model_max_length=40)
    return HfvlmBLIPProcessor(Untouched(), tokenizer, prompt=prompt)


class Untouched(HfvlmBLIPImageProcessor):
    def preprocess(self, images: Any, **kwargs: Any) -> Any:
        return {"pixel_values": torch.stack(images)}


@torch.no_grad()
def matching(golden: Golden) -> None:
    model, image = model_of(golden), golden.inputs["image"]
    ids, mask = text(golden)
    calls = Calls(model)
    tokens = model.vision_model(image).last_hidden_state
    # Its class leaves [CLS] where training and evaluation have [ENC].
    golden.compare("itm_output", model.itm_head(model.text_model(ids, mask, Context(tokens)).pooler_output))
    output = model(ids, image, mask)
    # Cosines, also of a file that holds the temperature of a training.
    golden.compare("itc_sim", output.image_embeds @ output.text_embeds.t())
    golden.compare("text_encoder.last_hidden_state (text mode)", output.text_model_output.last_hidden_state)
    golden.compare("vision_proj", output.vision_model_output.pooler_output)
    golden.compare("text_proj", output.text_model_output.pooler_output)
    golden.compare("image_feat", output.image_embeds)
    golden.compare("text_feat", output.text_embeds)
    calls.compare(golden)


@torch.no_grad()
def reasoning(golden: Golden) -> None:
    model = model_of(golden)
    first, second = golden.inputs["image"].chunk(2)
    order = torch.arange(len(first)).repeat_interleave(2) + torch.tensor([0, len(first)]).repeat(len(first))
    calls = Calls(model)
    output = model(torch.stack([first, second], dim=1), *text(golden), golden.inputs.get("targets"))
    golden.compare("prediction", output.logits)
    if output.loss is not None:
        golden.compare("loss", output.loss)
    # The original's images are all the first ones, then all the second ones.
    for name in golden.in_order():
        if name.startswith("visual_encoder."):
            golden.compare(name, calls(name)[order.argsort()])
    calls.compare(golden)


@torch.no_grad()
def answers(golden: Golden) -> None:
    model, image, case = model_of(golden), golden.inputs["image"], golden.case
    question = text(golden, "question")
    start = model.config.text_config.bos_token_id
    if "answer.input_ids" in golden.inputs:
        trained(golden, model, image, question)
    # Its generation attends to the padding of questions.
    context = Context(model.read(image, *question).tokens)
    golden.check(generate=GENERATE)
    options = {"num_beams": 3, "max_length": 10, "min_length": 1} | golden.section("generate")
    generated = model.generate(context=context, **options)
    golden.compare("generated_ids", generated)
    if "generated_answers" in case:
        assert processor_of(golden).batch_decode(generated, skip_special_tokens=True) == case["generated_answers"]
    if "candidates.input_ids" not in golden.inputs:
        return
    ids, mask = text(golden, "candidates")
    ranked = model.rank(image, *question, ids.masked_fill(mask == 0, -100), top_k=case["k_test"])
    golden.compare("rank_max_ids", ranked.best)
    golden.compare("rank.topk_ids", ranked.indices)
    golden.compare("rank.log_probs_sum", ranked.scores)
    begun = torch.full_like(question[0][:, :1], start)
    first = model.text_decoder(begun, None, model.read(image, *question)).logits
    golden.compare("rank.logits", first[:, 0])
    golden.compare("rank.topk_probs", first[:, 0].softmax(1)[:, ids[:, 1]].gather(1, ranked.indices))


def trained(golden: Golden, model: Any, image: Tensor, question: tuple[Tensor, Tensor]) -> None:
    """The answers that the model is trained on."""
    ids, mask = text(golden, "answer")
    labels = ids.masked_fill(mask == 0, -100)
    assert torch.equal(processor_of(golden).answers(golden.case["texts"]["answer"])[:, 1:], labels[:, 1:])
    calls, start = Calls(model), model.config.text_config.bos_token_id
    output = model(image, *question, labels, golden.inputs["n"], golden.inputs["weights"])
    golden.compare("loss", output.loss)
    golden.compare("question_states", output.text_model_output.last_hidden_state)
    golden.compare("answer_logits", output.logits)
    golden.compare("answer_targets", torch.cat([torch.full_like(labels[:, :1], start), labels[:, 1:]], dim=1))
    golden.compare("answer_loss_per_answer", model.answer_losses(output.logits, labels))
    calls.compare(golden)


@torch.no_grad()
def retrieval(golden: Golden) -> None:
    model, image = model_of(golden), golden.inputs["image"]
    ids, mask = text(golden)
    output = model(ids, image, mask)
    golden.compare("image_embeds", output.image_embeds)
    golden.compare("text_embeds", output.text_embeds)
    golden.compare("sims_matrix (t2i)", output.text_embeds @ output.image_embeds.t())
    scores = model.rerank(image, ids, mask, top_k=golden.case["k_test"])
    golden.compare("score_matrix_i2t", scores.per_image)
    golden.compare("score_matrix_t2i", scores.per_text)


def momentum_retrieval(golden: Golden) -> None:
    """Steps of training."""
    model = model_of(golden, "HfvlmBLIPForRetrievalTraining")
    train(golden, model, pair_ids=golden.inputs["idx"])
    golden.compare("vision_proj_m.weight (after)", model.teacher.vision_model.projection.weight)
    golden.compare("visual_encoder_m.cls_token (after)", model.teacher.vision_model.class_token[None, None])


def pretraining(golden: Golden) -> None:
    train(golden, model_of(golden))


def recorded_draws(recorded: list[Tensor], weights: list[Tensor]) -> Any:
    """What is drawn, in order; the weights that it is drawn with are kept."""
    remaining = iter(recorded)

    def draw(given: Tensor) -> Tensor:
        weights.append(given)
        return next(remaining)

    return draw


@torch.no_grad()
def train(golden: Golden, model: Any, **inputs: Tensor) -> None:
    """Steps of training without an optimiser, with the recorded negatives."""
    image, (ids, mask), case = golden.inputs["image"], text(golden), golden.case
    calls, size = Calls(model), len(image)
    steps = len({name.partition(".")[0] for name in golden.outputs if name.startswith("step")})
    for step in range(steps):
        queue = model.teacher.text_queue.clone()
        ids_before = model.teacher.id_queue.clone() if "pair_ids" in inputs else None
        drawn: list[Tensor] = []
        recorded = [golden.outputs[f"step{step}.neg_{kind}_idx"] for kind in ("image", "text")]
        model.draw = recorded_draws(recorded, drawn)
        output = model.train()(ids, image, mask, **inputs, distillation=case.get("alpha", 0.4), return_loss=True)
        per_image, per_text = output.logits_per_image, output.logits_per_text
        texts = torch.cat([output.momentum_text_embeds, queue])
        targets = output.targets_per_image, output.targets_per_text
        values = {
            "loss_ita": output.contrastive_loss,
            "loss_itm": output.matching_loss,
            "loss_lm": output.captioning_loss,
            "neg_image_idx": recorded[0],
            "neg_text_idx": recorded[1],
            "weights_t2i": drawn[0],
            "weights_i2t": drawn[1],
            "image_feat": output.image_embeds,
            "text_feat": output.text_embeds,
            "image_feat_m": output.momentum_image_embeds,
            "text_feat_m": output.momentum_text_embeds,
            "sim_i2t": per_image,
            "sim_t2i": per_text,
            "sim_i2t_targets": targets[0],
            "sim_t2i_targets": targets[1],
            "sim_i2t_momentum_softmax_input": output.momentum_image_embeds @ texts.t() * output.logit_scale,
            "vl_output": output.matching_logits,
            "itm_labels": torch.tensor([1] * size + [0] * 2 * size),
            "loss_i2t": F.cross_entropy(per_image, targets[0]),
            "loss_t2i": F.cross_entropy(per_text, targets[1]),
            "image_queue": model.teacher.image_queue.t(),
            "text_queue": model.teacher.text_queue.t(),
            "queue_ptr": model.teacher.pointer,
            "ptr_queue": model.teacher.pointer,
        }
        start = model.config.text_config.bos_token_id
        values["decoder_targets"] = torch.cat([torch.full_like(ids[:, :1], start), ids[:, 1:]], 1).masked_fill(
            mask == 0, -100
        )
        if "pair_ids" in inputs:
            values["idx_queue"] = model.teacher.id_queue[None]
            hard = (inputs["pair_ids"][:, None] == torch.cat([inputs["pair_ids"], ids_before])).float()
            values["sim_targets"] = hard / hard.sum(1, keepdim=True)
        for name in golden.in_order():
            prefix, _, rest = name.partition(".")
            if prefix == f"step{step}" and rest in values:
                golden.compare(name, values[rest])
        if step == 0:
            first = output
    last = "text_encoder.last_hidden_state"
    own = {
        "vision_proj": first.vision_model_output.pooler_output,
        "text_proj": first.text_model_output.pooler_output,
        f"{last} (text mode)": calls(last, 0),
        f"{last} (positive pairs)": calls(last, 1)[:size],
        f"{last} (2B negative pairs)": calls(last, 1)[size:],
        "decoder_logits": calls.seen["text_decoder.lm_head"][0] if "text_decoder.lm_head" in calls.seen else None,
    }
    for name, value in own.items():
        if name in golden.outputs:
            golden.compare(name, value)
    calls.compare(golden)
