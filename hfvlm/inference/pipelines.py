"""Pipelines that transformers 5 lacks."""

from typing import Any

from transformers import AutoModel, AutoModelForImageTextToText, AutoModelForVisualQuestionAnswering, pipelines
from transformers.pipelines import PIPELINE_REGISTRY, ImageTextToTextPipeline, Pipeline

from hfvlm.inference.media_pipelines import ConversationPipeline, register_media_pipelines


class VisualQuestionAnsweringPipeline(Pipeline):
    """`pipeline("visual-question-answering", model=folder)(image, question)` -> `[{"answer": "..."}]`.

    Takes one image and one question, lists of both, or `{"image": ..., "question": ...}` and lists of these. With
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
            raise ValueError(f"{len(images)} images and {len(questions)} questions are no pairs.")
        count = max(len(images), len(questions))
        images, questions = (x * count if len(x) == 1 else x for x in (images, questions))
        pairs = [{"image": i, "question": q} for i, q in zip(images, questions, strict=True)]
        return super().__call__(pairs if several else pairs[0], **kwargs)

    def _sanitize_parameters(
        self, answers: list[str] | None = None, allow_urls: Any = None, **generate: Any
    ) -> tuple[Any, ...]:
        before = {} if allow_urls is None else {"allow_urls": allow_urls}
        return before, ({"answers": answers} if answers else {}) | generate, {}

    def preprocess(self, pair: Any, *, allow_urls: Any = False) -> Any:  # type: ignore[override]
        from hfvlm.media.images import read_image

        image = read_image(pair["image"], upright=False, allow_urls=allow_urls)
        return self.processor(images=[image], text=[self.processor.asked(pair["question"])], return_tensors="pt")

    def _forward(self, inputs: Any, answers: list[str] | None = None, **generate: Any) -> dict[str, Any]:  # type: ignore[override]
        from hfvlm.inference.captioner import decode_generated

        model: Any = self.model
        if answers is None:
            return {"answers": decode_generated(self.processor, model.generate(**inputs, **generate), inputs)}
        best = model.rank(**inputs, candidates=self.processor.answers(answers).to(model.device)).best
        return {"answers": [answers[i] for i in best.tolist()]}

    def postprocess(self, outputs: dict[str, Any]) -> list[dict[str, str]]:  # type: ignore[override]
        return [{"answer": text} for text in outputs["answers"]]


class VideoTextToTextPipeline(ConversationPipeline, ImageTextToTextPipeline):  # type: ignore[misc]
    """`pipeline("video-text-to-text", model=folder)(video, text)` -> `[{"generated_text": "..."}]`.

    Takes a video, as `hfvlm.media.read_video` reads it, and a text, or lists of both of one length; or, as
    "image-text-to-text" does, messages with `{"type": "video", "video": video}` in their content, or a list of such
    conversations. Of messages, all of them come back, the answer last, unless `return_full_text=False`.
    """

    def __call__(self, videos: Any = None, text: Any = None, **kwargs: Any) -> Any:  # type: ignore[override]
        if videos is None or text is None:
            return super().__call__(text=videos if text is None else text, **kwargs)
        several = isinstance(text, list)
        videos, texts = (videos, text) if several else ([videos], [text])
        if len(videos) != len(texts):
            raise ValueError(f"{len(videos)} videos and {len(texts)} texts are no pairs.")
        conversations: Any = [_message(video, one) for video, one in zip(videos, texts, strict=True)]
        given = super().__call__(text=conversations, **{"return_full_text": False} | kwargs)
        return given if several else given[0]


def _message(video: Any, text: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": [{"type": "video", "video": video}, {"type": "text", "text": text}]}]


class TextToImagePipeline(Pipeline):
    """`pipeline("text-to-image", model=folder)(text)` -> `[{"image": image}]`.

    Of a list of texts, a list of such lists. `num_return_sequences=4` draws four images of each text; other options
    are those of `generate`, as `guidance_scale`, `top_k` and `temperature`.
    """

    _load_processor: Any = True
    _load_tokenizer: Any = False
    _load_image_processor: Any = False
    _load_feature_extractor: Any = False

    processor: Any

    def _sanitize_parameters(self, **generate: Any) -> tuple[Any, ...]:
        from hfvlm.inference.text_to_image import check_options

        check_options(generate)
        return {}, generate, {}

    def preprocess(self, text: Any) -> Any:  # type: ignore[override]
        return self.processor(text=[text], return_tensors="pt")

    def _forward(self, inputs: Any, **generate: Any) -> dict[str, Any]:  # type: ignore[override]
        model: Any = self.model
        return {"pixels": model.draw(**inputs, **generate)}

    def postprocess(self, outputs: dict[str, Any]) -> list[dict[str, Any]]:  # type: ignore[override]
        return [{"image": image} for image in self.processor.to_images(outputs["pixels"])]


# Of each task its pipeline and the Auto class that finds the model.
TASKS: dict[str, tuple[type[Pipeline], Any]] = {
    "visual-question-answering": (VisualQuestionAnsweringPipeline, AutoModelForVisualQuestionAnswering),
    "video-text-to-text": (VideoTextToTextPipeline, AutoModelForImageTextToText),
    "text-to-image": (TextToImagePipeline, AutoModel),
}


def register_pipelines() -> None:
    """Add what the installed transformers lacks, or refuses by name."""
    register_media_pipelines()
    for task, (pipeline, model) in TASKS.items():
        getattr(pipelines, "REMOVED_TASKS", {}).pop(task, None)
        if task not in PIPELINE_REGISTRY.get_supported_tasks():
            PIPELINE_REGISTRY.register_pipeline(task, pipeline_class=pipeline, pt_model=model, type="multimodal")
