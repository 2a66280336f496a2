"""Pipelines that transformers 5 has no longer."""

from typing import Any

from transformers import AutoModelForVisualQuestionAnswering, pipelines
from transformers.pipelines import PIPELINE_REGISTRY, Pipeline

TASK = "visual-question-answering"


class VisualQuestionAnsweringPipeline(Pipeline):
    """`pipeline("visual-question-answering", model=folder)(image, question)` -> `[{"answer": "..."}]`.

    Takes one picture and one question, lists of both, or `{"image": ..., "question": ...}` and lists of these. With
    `answers=[...]`, the best of them is chosen; other options are those of `generate`.
    """

    _load_processor: Any = True
    _load_tokenizer: Any = False
    _load_image_processor: Any = False
    _load_feature_extractor: Any = False

    processor: Any

    def __call__(self, image: Any, question: Any = None, **kwargs: Any) -> Any:  # type: ignore[override]
        if question is None:
            return super().__call__(image, **kwargs)
        several = isinstance(image, list) or isinstance(question, list)
        images, questions = ([x] if not isinstance(x, list) else x for x in (image, question))
        if len(images) != len(questions) and 1 not in (len(images), len(questions)):
            raise ValueError(f"{len(images)} pictures and {len(questions)} questions are no pairs.")
        count = max(len(images), len(questions))
        images, questions = (x * count if len(x) == 1 else x for x in (images, questions))
        pairs = [{"image": i, "question": q} for i, q in zip(images, questions, strict=True)]
        return super().__call__(pairs if several else pairs[0], **kwargs)

    def _sanitize_parameters(self, answers: list[str] | None = None, **generate: Any) -> tuple[Any, ...]:
        return {}, ({"answers": answers} if answers else {}) | generate, {}

    def preprocess(self, pair: Any, **_: Any) -> Any:  # type: ignore[override]
        return self.processor(images=[pair["image"]], text=[pair["question"]], return_tensors="pt")

    def _forward(self, inputs: Any, answers: list[str] | None = None, **generate: Any) -> dict[str, Any]:  # type: ignore[override]
        model: Any = self.model
        if answers is None:
            return {"ids": model.generate(**inputs, **generate)}
        best = model.rank(**inputs, candidates=self.processor.answers(answers).to(model.device)).best
        return {"answers": [answers[i] for i in best.tolist()]}

    def postprocess(self, outputs: dict[str, Any], **_: Any) -> list[dict[str, str]]:  # type: ignore[override]
        written = outputs.get("answers") or self.processor.batch_decode(outputs["ids"], skip_special_tokens=True)
        return [{"answer": text} for text in written]


def register_pipelines() -> None:
    """Add what the installed transformers lacks, and refuses by name."""
    getattr(pipelines, "REMOVED_TASKS", {}).pop(TASK, None)
    if TASK not in PIPELINE_REGISTRY.get_supported_tasks():
        PIPELINE_REGISTRY.register_pipeline(
            TASK,
            pipeline_class=VisualQuestionAnsweringPipeline,
            pt_model=AutoModelForVisualQuestionAnswering,
            type="multimodal",
        )
