"""The evaluations of models that generate texts: captions and answers."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hfvlm.checks.ranges import check_generation
from hfvlm.evaluation.answering import accuracy_of
from hfvlm.evaluation.captioning import bleu, cider_of_each, rouge_l_of_each
from hfvlm.evaluation.clip_score import Judge, add_scores
from hfvlm.evaluation.data import Data, check_any, read_texts
from hfvlm.evaluation.report import MOST_MISTAKES, Mistake, Report, Result
from hfvlm.inference.captioner import Captioner
from hfvlm.inference.embedder import Embedder
from hfvlm.media.rows import UNREADABLE, path_of

BATCH = 16


def caption(
    folder: str,
    data: Data,
    *,
    generate: Mapping[str, Any] | None = None,
    judge: str | Path | None = None,
    **options: Any,
) -> Report:
    """Compare captions with those that people wrote.

    Args:
        folder: the model's.
        data: with images and captions.
        generate: options of `generate`.
        judge: the folder of a CLIP, by which CLIPScore and RefCLIPScore are computed, too.
        **options: of `Captioner.from_pretrained`.
    """
    scorer = None if judge is None else Judge(Embedder.from_pretrained(judge, device=options.get("device", "auto")))
    rows = data.rows()
    references, errors = read_texts(data.column(rows, "text"))
    generate = dict(generate or {"num_beams": 3, "max_new_tokens": 30})
    captioner = Captioner.from_pretrained(folder, **options)
    images = data.column(rows, "image")
    generated, errors = generate_each(captioner, images, dict.fromkeys(references), errors, generate)
    numbers, captions = list(generated), list(generated.values())
    texts = [references[row] for row in numbers]
    report = Report("caption", folder, data.dataset, len(numbers), generate | {"split": data.split}, errors=errors)
    report.about = data.about(rows, ["image", "text"], captioner.model)
    report.results = [
        Result(f"BLEU-{size}", score, n=len(numbers)) for size, score in enumerate(bleu(captions, texts), start=1)
    ]
    report.add("ROUGE-L", numbers, np.array(rouge_l_of_each(captions, texts)))
    scores = np.array(cider_of_each(captions, texts))
    report.add("CIDEr-D", numbers, scores)
    if scorer is not None:
        found, _ = scorer([images[row] for row in numbers], captions, texts)
        add_scores(report, found, numbers)
        report.protocol |= {"judge": str(judge)}
    worst = np.argsort(scores, kind="stable")[:MOST_MISTAKES].tolist()
    report.mistakes = [Mistake(path_of(images[numbers[i]]), f"{captions[i]} (not: {texts[i][0]})") for i in worst]
    return report


def vqa(folder: str, data: Data, *, generate: Mapping[str, Any] | None = None, **options: Any) -> Report:
    """Compare answers with those that people gave, by the VQA challenge's accuracy; arguments as `caption`."""
    rows = data.rows()
    images, questions = data.column(rows, "image"), data.column(rows, "question")
    references, errors = read_texts(data.column(rows, "answers"))
    generate = dict(generate or {"num_beams": 3, "max_new_tokens": 10})
    captioner = Captioner.from_pretrained(folder, **options)
    prompts: dict[int, Any] = {}
    for row in references:
        if isinstance(questions[row], str):
            prompts[row] = captioner.processor.asked(questions[row])
        else:
            errors[row] = f"question: a text is needed, not {questions[row]!r}."
    generated, errors = generate_each(captioner, images, prompts, errors, generate)
    numbers = list(generated)
    scores = np.array([accuracy_of(answer, references[row]) for row, answer in generated.items()])
    report = Report("vqa", folder, data.dataset, len(numbers), generate | {"split": data.split}, errors=errors)
    report.about = data.about(rows, ["image", "question", "answers"], captioner.model)
    report.add("VQA accuracy", numbers, scores)
    worst = [numbers[i] for i in np.argsort(scores, kind="stable")[:MOST_MISTAKES].tolist() if scores[i] < 1]
    report.mistakes = [
        Mistake(path_of(images[row]), f"{questions[row]} {generated[row]} (not: {references[row][0]})")
        for row in worst
    ]
    return report


def generate_each(
    captioner: Captioner,
    images: Sequence[Any],
    prompts: Mapping[int, str | None],
    errors: Mapping[int, str],
    generate: Mapping[str, Any],
) -> tuple[dict[int, str], dict[int, str]]:
    """Return, by row number, the texts that are generated from images, and what is wrong with the unreadable rows.

    Raises:
        ValueError: no row can be read, or an option of `generate` is out of its range.
    """
    check_generation(generate)

    def texts_of(batch: Sequence[int]) -> list[str]:
        texts = [prompt for row in batch if (prompt := prompts[row]) is not None]
        return captioner([images[row] for row in batch], texts or None, batch_size=BATCH, **generate)

    rows, found, wrong = list(prompts), dict[int, str](), dict(errors)
    for start in range(0, len(rows), BATCH):
        batch = rows[start : start + BATCH]
        try:
            found |= dict(zip(batch, texts_of(batch), strict=True))
        except UNREADABLE:
            for row in batch:
                try:
                    (found[row],) = texts_of([row])
                except UNREADABLE as error:
                    wrong[row] = str(error)
    check_any(found, wrong)
    return found, dict(sorted(wrong.items()))
