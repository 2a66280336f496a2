"""vilbert-multi-task's cases: both classes with their intermediates, readers of regions and texts, and the tasks."""

import hashlib
import random
import tempfile
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor

from hfvlm.conversion.vilbert import FIELDS, config_from_original, layout_of
from hfvlm.models.vilbert import HfvlmViLBERTProcessor, HfvlmViLBERTTokenizer
from hfvlm.models.vilbert import modeling_vilbert_pretraining as pretraining
from hfvlm.models.vilbert import processing_vilbert_pretraining as masking
from hfvlm.models.vilbert import processing_vilbert_tasks as examples
from hfvlm.models.vilbert.regions import Regions, regions_of_record
from hfvlm.models.vilbert.tasks import KINDS, Task
from tests.originals.common import converted
from tests.support.golden import Golden

# Options of the constructor beside its config, and of how it was called, that the tensors tell as well.
SHAPES = ("num_labels", "batch", "text length", "regions (incl. global)")
CALL = ("output_all_attention_masks", "torch.manual_seed before the losses")
TEXTS = ("vocab", "do_lower_case", "max_seq_length", "texts", "pairs")
PRETRAINING = ("captions", "seq_len", "region_len", "visual_target", "objective", "features", "images")
SEEDS = ("random.seed", "numpy.random.seed")
TASK = ("config", "split", "images", "gt_images", "entries", "use", "names", *SEEDS)
FURTHER = {
    "retrieval": ("train_image_list", "train_hard_pool"),
    "dialog": ("questions", "answers", "captions"),
    "V-logit-mc": ("annotations", "image_bbox_list", "bboxes_dict"),
}
TASK_CONFIG = (
    *("name", "type", "loss", "process", "task_id", "max_seq_length", "max_region_num"),
    # Of training, and of no part here.
    *("lr", "num_epoch", "batch_size", "eval_batch_size", "train_split", "val_split"),
)
TYPES = {
    "VL-classifier": "answer",
    "VL-classifier-GQA": "gqa",
    "VL-logit": "choice",
    "V-logit": "grounding",
    "V-logit-mc": "pointing",
    "VL-binary-classifier": "pair",
    "VL-tri-classifier": "entailment",
}
HEADS = {
    "vil_prediction": "answer_logits",
    "vil_prediction_gqa": "gqa_logits",
    "vil_logit": "score_logits",
    "vil_binary_prediction": "pair_logits",
    "vil_tri_prediction": "entailment_logits",
    "vision_prediction": "region_logits",
    "vision_logit": "grounding_logits",
    "linguisic_prediction": "prediction_logits",
    "linguisic_logit": "token_logits",
    "prediction_scores_t": "prediction_logits",
    "prediction_scores_v": "region_logits",
    "seq_relationship_score": "alignment_logits",
    "masked_lm_loss": "mlm_loss",
    "masked_img_loss": "region_loss",
    "next_sentence_loss": "alignment_loss",
    "sequence_output_t": "last_hidden_state",
    "sequence_output_v": "vision_last_hidden_state",
    "pooled_output_t": "text_pooled",
    "pooled_output_v": "vision_pooled",
    "bert.t_pooler": "text_pooled",
    "bert.v_pooler": "vision_pooled",
}
INPUTS = {
    "input_ids": "input_ids",
    "input_txt": "input_ids",
    "image_feat": "region_features",
    "input_imgs": "region_features",
    "image_loc": "region_locations",
    "attention_mask": "attention_mask",
    "image_attention_mask": "region_mask",
    "token_type_ids": "token_type_ids",
    "task_ids": "task_ids",
}
LABELS = {
    "masked_lm_labels": "mlm_labels",
    "image_label": "region_labels",
    "image_target": "region_targets",
    "next_sentence_label": "alignment_labels",
}


def compare(golden: Golden) -> None:
    arguments = golden.section("arguments")
    if "tasks" in arguments:
        return tasks(golden)
    if golden.state_dict:
        return whole_model(golden)
    if "images" in golden.case:
        golden.check()
        return regions(golden)
    if "captions" in arguments:
        golden.check(arguments=("vocab", "do_lower_case", *PRETRAINING, *SEEDS))
        return masked(golden)
    golden.check(arguments=TEXTS)
    return texts(golden)


def model_of(golden: Golden) -> Any:
    config = config_from_original(golden.case, golden.state_dict)
    return converted("vilbert", golden.state_dict, config, layout_of(golden.case))


# Models


@torch.no_grad()
def whole_model(golden: Golden) -> None:
    config = ("config", "config attributes")
    sections = {"arguments__config": FIELDS, "arguments__config attributes": FIELDS}
    golden.check(arguments=(*config, *SHAPES, *CALL), **sections)
    unknown = set(golden.inputs) - set(INPUTS) - set(LABELS)
    assert not unknown, f"the runner knows no inputs {unknown}"
    model = model_of(golden)
    model.set_attn_implementation("eager")
    inputs = {ours: golden.inputs[theirs] for theirs, ours in INPUTS.items() if theirs in golden.inputs}
    seen = Seen(model)
    output = model(**inputs, output_hidden_states=True, output_attentions=True)
    values: dict[str, Any] = seen.named(model) | attentions(output)
    if "negative_index" in golden.outputs:
        values["negative_index"] = negatives(golden, model)
    labels = {ours: golden.inputs[theirs] for theirs, ours in LABELS.items() if theirs in golden.inputs}
    if labels:
        more = {"negatives": values["negative_index"]} if "negative_index" in values else {}
        output = model(**inputs, **labels, **more)
    for name in golden.in_order():
        golden.compare(name, values[name] if name in values else stored(name, output))
    missing = set(golden.outputs) - golden.compared
    assert not missing, f"not compared: {missing}"


def stored(name: str, output: Any) -> Tensor:
    """What the original calls an output; of an odd batch, its head of pairs gave another's output."""
    value = output[HEADS[name]] if output.get(HEADS[name]) is not None else output["alignment_logits"]
    if name.endswith("_loss"):
        return value.reshape(1)
    return value.unsqueeze(-1) if name in ("vision_logit", "linguisic_logit") else value


def negatives(golden: Golden, model: Any) -> Tensor:
    """The regions that the original drew, from the same random numbers."""
    torch.manual_seed(golden.section("arguments")["torch.manual_seed before the losses"])
    return pretraining.draw_negatives(golden.inputs["image_label"].shape, model.config.num_negatives)


def attentions(output: Any) -> dict[str, Tensor]:
    values = {}
    for stream, part in (("text", output.text_model_output), ("image", output.vision_model_output)):
        values |= {f"{stream}.{i}.attn": weights for i, weights in enumerate(part.attentions)}
    for i, (text, image) in enumerate(output.cross_attentions):
        values |= {f"connection.{i}.attn1": text, f"connection.{i}.attn2": image}
    return values


class Seen:
    """Outputs of every module of a model."""

    def __init__(self, model: Any):
        self.seen: dict[str, Any] = {}
        for name, module in model.named_modules():
            module.register_forward_hook(self.hook(name))

    def hook(self, name: str) -> Any:
        def record(_: Any, __: Any, output: Any) -> None:
            self.seen[name] = output

        return record

    def named(self, model: Any) -> dict[str, Tensor]:
        """By the original's names."""
        seen, config = self.seen, model.config
        values = {
            "bert.embeddings": seen["text_model.embeddings"],
            "bert.v_embeddings": seen["vision_model.embeddings"],
        }
        streams = (("text", "layer", "text_model"), ("image", "v_layer", "vision_model"))
        for stream, theirs, ours in streams:
            heads = getattr(config, ours.replace("model", "config")).num_attention_heads
            for i in range(len(getattr(model, ours).layers)):
                layer = f"{ours}.layers.{i}"
                values[f"bert.encoder.{theirs}.{i}"] = seen[layer][0]
                values[f"{stream}.{i}.queries"] = split(seen[f"{layer}.attention.q_proj"], heads)
                values[f"{stream}.{i}.keys"] = split(seen[f"{layer}.attention.k_proj"], heads)
        for i in range(len(model.connections)):
            text, image, _ = seen[f"connections.{i}"]
            values[f"bert.encoder.c_layer.{i} (text)"] = values[f"bert.encoded_layers_t[{i}]"] = text
            values[f"bert.encoder.c_layer.{i} (image)"] = values[f"bert.encoded_layers_v[{i}]"] = image
            for side, queries, keys in (("text", "queries1", "keys1"), ("vision", "querues2", "keys2")):
                for place, part in ((queries, "q_proj"), (keys, "k_proj")):
                    made = seen[f"connections.{i}.{side}.attention.{part}"]
                    values[f"connection.{i}.{place}"] = split(made, config.num_connection_heads)
        return values


def split(x: Tensor, heads: int) -> Tensor:
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


# Readers of regions and texts


def regions(golden: Golden) -> None:
    for image in golden.case["images"]:
        name = image["image_id"]
        features = golden.inputs[f"{name}.features[:, ::32]"]
        boxes = golden.inputs[f"{name}.boxes"]
        record = {"features": features.numpy(), "boxes": boxes.numpy()} | {
            "image_w": image["image_w"],
            "image_h": image["image_h"],
        }
        found = regions_of_record(record)
        assert len(found) == image["num_boxes"]
        numbers, locations, pixels = found.with_mean()
        areas = found.locations[:, 4:]
        size = np.array([[image["image_w"] * image["image_h"]]], dtype=np.float32)
        values = {
            "features[:, ::32]": numbers,
            "num_boxes": np.array(len(numbers)),
            "image_location": locations,
            "image_location_ori": np.concatenate([pixels, np.concatenate([size, areas])], axis=1),
        }
        for part, value in values.items():
            golden.compare(f"{name}.{part}", torch.from_numpy(value))
    assert golden.compared == set(golden.outputs)


def processor_of(golden: Golden, longest: int = 512) -> HfvlmViLBERTProcessor:
    arguments = golden.section("arguments")
    assert arguments["do_lower_case"] is True, "all releases are of lower case"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "vocab.txt"
        path.write_text("\n".join(arguments["vocab"]) + "\n", encoding="utf-8")
        return HfvlmViLBERTProcessor(HfvlmViLBERTTokenizer.from_vocabulary(path, model_max_length=longest))


def texts(golden: Golden) -> None:
    arguments = golden.section("arguments")
    processor, length = processor_of(golden), arguments["max_seq_length"]
    tokenizer, task = processor.tokenizer, Task(0, "answer", length)
    for i, text in enumerate(arguments.get("texts", [])):
        made = processor.inputs(task, [processor.sentence(text, task)], [(np.zeros((1, 1)), np.zeros((1, 5)))])
        called = tokenizer(text, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
        assert torch.equal(called["input_ids"], made["input_ids"]), text
        golden.compare(f"{i}.input_ids", made["input_ids"][0])
        golden.compare(f"{i}.input_mask", made["attention_mask"][0])
        golden.compare(f"{i}.segment_ids", made["token_type_ids"][0])
        tokens = " ".join(tokenizer.convert_ids_to_tokens(tokenizer.pieces(text))).encode()
        golden.compare(f"{i}.tokens (UTF-8, space between)", torch.tensor(list(tokens), dtype=torch.uint8))
    for i, (first, second) in enumerate(arguments.get("pairs", [])):
        ids, _ = processor.joined(tokenizer.pieces(first), tokenizer.pieces(second))
        golden.compare(f"pair {i}.input_ids", torch.tensor(ids))
    assert golden.compared == set(golden.outputs)


def masked(golden: Golden) -> None:
    arguments, seed = golden.section("arguments"), golden.case["seed"]
    processor = processor_of(golden)
    found = []
    for i, image in enumerate(arguments["images"]):
        boxes = np.array(image["boxes"], dtype=np.float32)
        logits = torch.from_numpy(normals(f"target/{i}", [len(boxes), 1601], seed)).double()
        features = normals(f"features/{i}", [len(boxes), 2048], seed)
        found.append(Regions(features, boxes, image["w"], image["h"], logits.softmax(-1).float().numpy()))
    random.seed(arguments["random.seed"])
    np.random.seed(arguments["numpy.random.seed"])
    near: list[np.ndarray] = []
    draw = masking.mask_regions

    def recorded(*args: Any) -> Any:
        drawn = draw(*args)
        near.append(np.pad(drawn[1], (0, arguments["region_len"] - len(drawn[1]))))
        return drawn

    options = {
        "others": [] if arguments["objective"] == 2 else arguments["captions"],
        "text_length": arguments["seq_len"],
        "most_regions": arguments["region_len"],
        "features_as_targets": arguments["visual_target"] != 0,
    }
    with patch.object(masking, "mask_regions", recorded):
        pairs = zip(arguments["captions"], found, strict=True)
        made = [masking.masked_example(processor, *pair, **options) for pair in pairs]
    batch = processor.collate(made)
    values = {
        "input_ids": batch["input_ids"],
        "input_mask": batch["attention_mask"],
        "segment_ids": batch["token_type_ids"],
        "lm_label_ids": batch["mlm_labels"],
        "is_next": batch["alignment_labels"],
        "image_loc": batch["region_locations"],
        "image_label": batch["region_labels"],
        "image_mask": batch["region_mask"],
        "masked_label (overlap with a masked region)": torch.from_numpy(np.stack(near)),
        "image_feat[:, :, ::64]": batch["region_features"][:, :, ::64],
        "image_target[:, :, ::64]": batch["region_targets"][:, :, ::64],
    }
    for name in golden.in_order():
        golden.compare(name, values[name])


# Tasks


def normals(key: str, shape: list[int], seed: int) -> np.ndarray:
    """Standard normals by a name."""
    digest = hashlib.sha256(f"{seed}:{key}".encode()).digest()
    state = np.random.RandomState(np.frombuffer(digest[:16], dtype=np.uint32))
    return state.standard_normal(int(np.prod(shape, dtype=np.int64))).reshape(shape).astype(np.float32)


def tasks(golden: Golden) -> None:
    config = {"arguments__config": FIELDS, "arguments__config attributes": FIELDS}
    golden.check(arguments=("config", "config attributes", "do_lower_case", "vocab", "features", "tasks"), **config)
    model, processor = model_of(golden), processor_of(golden)
    for name, section in golden.section("arguments.tasks").items():
        settings = section["config"]
        further = (FURTHER.get(kind, ()) for kind in (settings["process"], settings["type"]))
        golden.check(**{f"arguments__tasks__{name}__config": TASK_CONFIG})
        unknown = set(section) - {*TASK, *(each for names in further for each in names)}
        assert not unknown, f"{name}: the runner knows no {unknown}"
        task = Task(
            settings["task_id"],
            TYPES[settings["type"]],
            50 if settings["process"] == "dialog" else settings["max_seq_length"],
            settings["max_region_num"],
        )
        if "random.seed" in section:
            random.seed(section["random.seed"])
        if "numpy.random.seed" in section:
            np.random.seed(section["numpy.random.seed"])
        made = Annotations(processor, task, settings, section, golden.case["seed"], model.config)
        run_task(golden, model, name, task, processor.collate(made.examples()))
    missing = set(golden.outputs) - golden.compared
    assert not missing, f"not compared: {missing}"


class Annotations:
    """A task's section of a case: its images and its entries, as the original's data set reads them."""

    def __init__(self, processor: Any, task: Task, settings: Any, section: Any, seed: int, config: Any):
        self.processor, self.task, self.settings, self.section = processor, task, settings, section
        self.seed, self.config = seed, config

    def regions(self, image: Any, kind: str = "images") -> Regions:
        made = self.section[kind][str(image)]
        boxes = np.array(made["boxes"], dtype=np.float32)
        place = "detected" if kind == "images" else "gt"
        features = normals(
            f"features/{place}/{image}", [len(boxes), self.config.vision_config.feature_size], self.seed
        )
        return Regions(features, boxes, made["w"], made["h"])

    def examples(self) -> list[Any]:
        make = {
            "answer": self.classified,
            "gqa": self.classified,
            "entailment": self.classified,
            "pair": self.paired,
            "grounding": self.grounded,
            "pointing": self.pointed,
            "choice": {"retrieval": self.retrieved, "dialog": self.conversed, "expand": self.reasoned}.get(
                self.settings["process"]
            ),
        }[self.task.kind]
        assert make is not None, f"the runner knows no process {self.settings['process']!r} of a choice"
        return make()

    def used(self, entries: list[Any]) -> list[Any]:
        return [entries[i] for i in self.section["use"]]

    @staticmethod
    def answers(entry: Any) -> dict[int, float]:
        answer = entry["answer"]
        return dict(zip(answer["labels"], answer["scores"], strict=True))

    def classified(self) -> list[Any]:
        classes = {"answer": self.config.num_answers, "gqa": self.config.num_gqa_answers}.get(self.task.kind)
        text = "hypothesis" if self.settings["name"] == "VisualEntailment" else "question"
        return [
            examples.classified(
                self.processor, self.task, e[text], self.regions(e["image_id"]), self.answers(e), classes
            )
            for e in self.used(self.section["entries"])
        ]

    def paired(self) -> list[Any]:
        return [
            examples.paired(
                self.processor,
                self.task,
                e["sentence"],
                (self.regions(e["image_id_0"]), self.regions(e["image_id_1"])),
                self.answers(e),
                as_released=True,
            )
            for e in self.used(self.section["entries"])
        ]

    def grounded(self) -> list[Any]:
        made = []
        for e in self.used(self.section["entries"]):
            box = list(e["refBox"])
            if self.settings["name"] != "FlickrGrounding":
                box = [*box[:2], box[0] + box[2], box[1] + box[3]]
            truth = self.regions(e["image_id"], "gt_images") if self.section["split"] == "train" else None
            detected = self.regions(e["image_id"])
            made.append(examples.grounded(self.processor, self.task, e["caption"], detected, box, truth))
        return made

    def pointed(self) -> list[Any]:
        found = self.visual7w() if "annotations" in self.section else self.guesswhat()
        most = None if "annotations" in self.section else 204
        return [
            examples.pointed(
                self.processor,
                self.task,
                text,
                self.regions(image),
                self.regions(image, "gt_images"),
                box,
                candidates,
                most,
            )
            for text, image, box, candidates in self.used(found)
        ]

    def visual7w(self) -> list[Any]:
        notes = self.section["annotations"]
        boxes = {b["box_id"]: [b["x"], b["y"], b["x"] + b["width"], b["y"] + b["height"]] for b in notes["boxes"]}
        found = []
        for image in notes["images"]:
            if image["split"] != self.section["split"]:
                continue
            every = sorted({i for qa in image["qa_pairs"] for i in (*qa["multiple_choices"], qa["answer"])})
            for qa in image["qa_pairs"]:
                chosen = [every.index(i) for i in sorted([*qa["multiple_choices"], qa["answer"]])]
                found.append((qa["question"], f"v7w_{image['image_id']}", boxes[qa["answer"]], chosen))
        return found

    def guesswhat(self) -> list[Any]:
        found = []
        for e in self.section["entries"]:
            image = e["image"]["id"]
            every = sorted(set(self.section["image_bbox_list"][str(image)]["bboxes"]))
            chosen = [every.index(i) for i in sorted(o["id"] for o in e["objects"])]
            text = examples.guesswhat_text([(qa["question"], qa["answer"]) for qa in e["qas"]])
            found.append((text, image, self.section["bboxes_dict"][str(e["object_id"])], chosen))
        return found

    def retrieved(self) -> list[Any]:
        entries, made = self.section["entries"], []
        captions_of: dict[Any, list[str]] = {}
        for e in entries:
            captions_of.setdefault(e["image_id"], []).append(e["caption"])
        for e in self.used(entries):
            similar = None
            if self.section["split"] == "train":
                names = self.section["train_image_list"]
                pool = self.section["train_hard_pool"][names.index(e["image_id"])]
                similar = [names[i] for i in pool]
            caption, image, hard = examples.retrieval_negatives(e["image_id"], list(captions_of), captions_of, similar)
            texts = [e["caption"], caption, e["caption"], hard]
            images = [self.regions(each) for each in (e["image_id"], e["image_id"], image, e["image_id"])]
            made.append(examples.retrieved(self.processor, self.task, texts, images))
        return made

    def reasoned(self) -> list[Any]:
        rationale, made = self.settings["name"] == "VCR_QA-R", []
        for e in self.section["entries"]:
            names = examples.person_names(e["names"], self.section["names"])
            question, options, right = e["question"], e["answer_choices"], e["answer_label"]
            if rationale:
                question = [*question, "[SEP]", *options[right]]
                options, right = e["rationale_choices"], e["rationale_label"]
            image = e["img_fn"]
            made.append((question, options, names, self.regions(image), self.regions(image, "gt_images"), right))
        return [examples.reasoned(self.processor, self.task, *each) for each in self.used(made)]

    def conversed(self) -> list[Any]:
        questions, answers, captions = (self.section[name] for name in ("questions", "answers", "captions"))
        made = []
        for e in self.used(self.section["entries"]):
            turns = [(questions[r["question"]], answers[r["answer"]]) for r in e["dialog"]]
            options = [
                [answers[r["answer_options"][i]] for i in examples.dialog_options(r["gt_index"])] for r in e["dialog"]
            ]
            image = self.regions(e["image_id"])
            made.append(examples.conversed(self.processor, self.task, captions[e["caption"]], turns, options, image))
        return made


@torch.no_grad()
def run_task(golden: Golden, model: Any, name: str, task: Task, batch: dict[str, Tensor]) -> None:
    labels, candidates = batch.pop("labels"), batch.pop("candidates", None)
    if task.kind == "pair" and batch["input_ids"].shape[0] % 2:
        raise AssertionError("pairs have two rows each")
    output = model(**batch)
    logits = output[KINDS[task.kind].head]
    score = task.score(logits, labels, candidates)
    arranged = task.options(logits, labels, candidates)
    mask = batch["region_mask"].bool()
    few = [0, -1]
    theirs = next(key for key, ours in HEADS.items() if ours == KINDS[task.kind].head)
    target = labels
    if task.kind in ("grounding", "pointing"):
        target = labels.unsqueeze(-1)
    nonzero = target.nonzero()
    head = logits.unsqueeze(-1) if theirs == "vision_logit" else logits
    values: dict[str, Any] = {
        "loss": task.loss(logits, labels, candidates).reshape(1),
        "score_val": score.sum().reshape(1),
        "score_train": (score.sum() / len(score)).reshape(1),
        "eval.region": arranged.argmax(1),
        "eval.iou": labels.gather(1, arranged.argmax(1, keepdim=True)).squeeze(1) if labels.ndim == 2 else labels,
        "eval.probabilities": arranged.softmax(-1),
        "model.question": batch["input_ids"],
        "model.segment_ids": batch["token_type_ids"],
        "model.input_mask": batch["attention_mask"],
        "model.image_mask": batch["region_mask"],
        "model.task_tokens": batch["task_ids"].unsqueeze(-1),
        "target": target,
        "target.nonzero": nonzero,
        "target.values": target[tuple(nonzero.t())],
        "target.size": torch.tensor(target.shape),
        "multiple_choice_ids": candidates,
        theirs: head,
        f"{theirs}[:, ::16]": head[:, ::16],
    }
    # What is masked in the original may hold another image's numbers, which have no effect.
    masked_values = {
        "model.features_sum": (batch["region_features"].double().sum(-1), mask),
        "model.features[first, last][:, :, ::256]": (
            batch["region_features"][few][:, :, ::256],
            mask[few].unsqueeze(-1),
        ),
        "model.spatials[first, last]": (batch["region_locations"][few], mask[few].unsqueeze(-1)),
    }
    for place in golden.in_order():
        task_name, _, key = place.partition("/")
        if task_name != name:
            continue
        if key in masked_values:
            golden.compare(place, *masked_values[key])
        elif key == "target" and task.kind == "choice":
            golden.compare(place, labels.reshape(golden.outputs[place].shape))
        else:
            golden.compare(place, values[key])
