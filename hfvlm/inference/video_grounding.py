"""Where in a film the things are that an answer names: found by a detector, followed through each scene.

Source: grounding_evaluation and video_chatgpt/chat.py of https://github.com/mbzuai-oryx/Video-LLaVA at 0c8810f.
There, GroundingDINO looks at every fifth frame, MobileSAM cuts out what it finds, CLIP confirms it, and DEVA carries
the masks to the frames between. Here, boxes are joined from frame to frame by how much they overlap.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import AutoModelForMaskGeneration, AutoModelForZeroShotObjectDetection, AutoProcessor

from hfvlm.checks.ranges import check_integer, check_number
from hfvlm.inference.embedder import Embedder, chosen_device
from hfvlm.inference.grounding import draw_boxes
from hfvlm.inference.zero_shot import ZeroShotClassifier
from hfvlm.media.video import Video, read_video

# Of a scene, unless the film says its own rate; and how long it is at least.
FPS, SHORTEST_SCENE = 25.0, 0.6
# What CLIP must say of a thing that was found: its cosine, and its probability among all things.
CONFIRMED_COSINE, CONFIRMED_SHARE = 0.2, 0.1


@dataclass
class Detection:
    """A thing in one frame; the box is left, top, right and bottom in pixels, the mask `(H, W)`, bool."""

    label: str
    score: float
    box_xyxy: list[float]
    mask: np.ndarray | None = None


@dataclass
class Track:
    """One thing through a scene, by the frames in which it was found."""

    label: str
    scene: range
    found: dict[int, Detection] = field(default_factory=dict)

    @property
    def first(self) -> int:
        return min(self.found)

    @property
    def last(self) -> int:
        return max(self.found)

    def box_at(self, frame: int) -> list[float] | None:
        """The box, between two frames in which it was found on the way from one to the other; None outside them."""
        if not self.first <= frame <= self.last:
            return None
        before = max(i for i in self.found if i <= frame)
        after = min(i for i in self.found if i >= frame)
        share = (frame - before) / (after - before) if after > before else 0.0
        corners = zip(self.found[before].box_xyxy, self.found[after].box_xyxy, strict=True)
        return [start + share * (end - start) for start, end in corners]


class VideoGrounder:
    """Finds things in films and follows each through its scene.

    Example:
        >>> grounder = VideoGrounder.from_pretrained("grounding-dino-tiny", segmenter="sam-vit-base")
        >>> tracks = grounder("clip.mp4", ["dog", "ball"])
        >>> for picture in draw_tracks("clip.mp4", tracks): ...

    Args:
        detector: `detector(pictures, things)` -> of each picture a list of `Detection`, as `TextDetector`.
        segmenter: `segmenter(picture, boxes)` -> a mask of each box, as `BoxSegmenter`; None leaves masks out.
        embedder: of a CLIP, which confirms what was found, as in the original; None believes the detector.
        every: of so many frames one is looked at, and the last of each scene.
        most_overlap: of two boxes that overlap more (intersection over union) the likelier is kept.
        least_overlap: boxes that overlap less from one frame to the next are two things.
        missed: a thing that was not found so many times in a row, and once more, is gone.
        most: things at a time.
        batch_size: frames that the detector looks at together.

    Raises:
        ValueError: a number is out of its range.
    """

    def __init__(  # noqa: PLR0913 (the steps, and their settings)
        self,
        detector: Any,
        *,
        segmenter: Any = None,
        embedder: Embedder | None = None,
        every: int = 5,
        most_overlap: float = 0.8,
        least_overlap: float = 0.3,
        missed: int = 1,
        most: int = 5,
        batch_size: int = 4,
    ):
        for name, value, low in (("every", every, 1), ("missed", missed, 0), ("most", most, 1)):
            check_integer(name, value, low)
        check_integer("batch_size", batch_size)
        check_number("most_overlap", most_overlap, 0, 1)
        check_number("least_overlap", least_overlap, 0, 1)
        self.detector, self.segmenter, self.embedder = detector, segmenter, embedder
        self.every, self.missed, self.most, self.batch_size = every, missed, most, batch_size
        self.most_overlap, self.least_overlap = most_overlap, least_overlap

    @classmethod
    def from_pretrained(
        cls,
        detector: str | Path,
        *,
        segmenter: str | Path | None = None,
        embedder: str | Path | None = None,
        threshold: float = 0.5,
        device: str = "cpu",
        **settings: Any,
    ) -> "VideoGrounder":
        """Of folders: a GroundingDINO's, and if given a SAM's and a CLIP's; `settings` as the class has them."""
        return cls(
            TextDetector.from_pretrained(detector, threshold=threshold, device=device),
            segmenter=None if segmenter is None else BoxSegmenter.from_pretrained(segmenter, device=device),
            embedder=None if embedder is None else Embedder.from_pretrained(embedder, device=device),
            **settings,
        )

    def __call__(self, film: Any, things: Sequence[str], *, scenes: Sequence[range] | None = None) -> list[Track]:
        """The tracks of `things`, scene by scene.

        Args:
            film: whatever `hfvlm.media.read_video` reads.
            things: names, such as the tags of an answer's entities.
            scenes: the frames of each scene; by default where PySceneDetect finds cuts.

        Raises:
            ImportError: scenes are to be found, and PySceneDetect is not installed.
        """
        film, names = read_video(film), list(dict.fromkeys(things))
        if not names:
            return []
        classifier = None if self.embedder is None else ZeroShotClassifier(self.embedder, names, "imagenet")
        found: list[Track] = []
        for scene in find_scenes(film) if scenes is None else scenes:
            found += self.follow(scene, self.look(film, scene, names, classifier))
        return found

    def look(
        self, film: Video, scene: range, names: list[str], classifier: ZeroShotClassifier | None
    ) -> Iterator[tuple[int, list[Detection]]]:
        """The frames of a scene that are looked at, and what is in each."""
        chosen = sorted({*scene[:: self.every], scene[-1]})
        frames = map(Image.fromarray, film.stream(chosen))
        for start in range(0, len(chosen), self.batch_size):
            places = chosen[start : start + self.batch_size]
            pictures = list(islice(frames, len(places)))
            for place, picture, every in zip(places, pictures, self.detector(pictures, names), strict=True):
                kept = distinct(every, self.most_overlap)
                if self.segmenter is not None and kept:
                    masks = self.segmenter(picture, [each.box_xyxy for each in kept])
                    for each, mask in zip(kept, masks, strict=True):
                        each.mask = mask
                yield place, kept if classifier is None else confirmed(picture, kept, classifier)

    def follow(self, scene: range, frames: Iterator[tuple[int, list[Detection]]]) -> list[Track]:
        """What is in each frame of a scene, in their order -> one track a thing."""
        tracks: list[Track] = []
        waiting: dict[int, int] = {}  # how often each track that goes on was missed
        for place, detections in frames:
            pairs = sorted(
                (
                    (overlap(tracks[i].found[tracks[i].last], each), i, j)
                    for i in waiting
                    for j, each in enumerate(detections)
                ),
                key=lambda pair: -pair[0],
            )
            taken: dict[int, int] = {}
            for share, i, j in pairs:
                same = tracks[i].label == detections[j].label and share >= self.least_overlap
                if same and i not in taken.values() and j not in taken:
                    taken[j] = i
            waiting = {i: 0 if i in taken.values() else count + 1 for i, count in waiting.items()}
            waiting = {i: count for i, count in waiting.items() if count <= self.missed}
            for j, each in sorted(enumerate(detections), key=lambda pair: -pair[1].score):
                if j not in taken and len(waiting) < self.most:
                    tracks.append(Track(each.label, scene))
                    taken[j] = len(tracks) - 1
                    waiting[taken[j]] = 0
                if j in taken:
                    tracks[taken[j]].found[place] = each
        return tracks


def overlap(left: Detection, right: Detection) -> float:
    """Intersection over union of two boxes."""
    (a, b, c, d), (e, f, g, h) = left.box_xyxy, right.box_xyxy
    shared = max(0.0, min(c, g) - max(a, e)) * max(0.0, min(d, h) - max(b, f))
    union = (c - a) * (d - b) + (g - e) * (h - f) - shared
    return shared / union if union > 0 else 0.0


def distinct(detections: Sequence[Detection], most_overlap: float) -> list[Detection]:
    """The likeliest first, without those that overlap a likelier one more."""
    kept: list[Detection] = []
    for each in sorted(detections, key=lambda each: -each.score):
        if all(overlap(each, other) <= most_overlap for other in kept):
            kept.append(each)
    return kept


def confirmed(
    picture: Image.Image, detections: Sequence[Detection], classifier: ZeroShotClassifier
) -> list[Detection]:
    """Those that CLIP, too, calls by their name; it sees what is in the box, black outside of the mask."""
    if not detections:
        return []
    crops = [cut_out(picture, each) for each in detections]
    cosines = classifier.scores(crops)
    predicted = classifier.predict(crops)
    return [
        each
        for each, row, ((label, share),) in zip(detections, cosines, predicted, strict=True)
        if label == each.label and share > CONFIRMED_SHARE and row.max() >= CONFIRMED_COSINE
    ]


def cut_out(picture: Image.Image, detection: Detection) -> Image.Image:
    """The box's part of a picture, at least one pixel of it."""
    pixels = np.asarray(picture.convert("RGB"))
    if detection.mask is not None:
        pixels = pixels * detection.mask[..., None]
    left, top, right, bottom = detection.box_xyxy
    left, top = (min(max(0, int(np.floor(v))), n - 1) for v, n in zip((left, top), picture.size, strict=True))
    return Image.fromarray(pixels[top : max(top + 1, int(np.ceil(bottom))), left : max(left + 1, int(np.ceil(right)))])


def find_scenes(film: Any) -> list[range]:
    """The frames of each scene of a film, where PySceneDetect finds cuts as its command does by default.

    Raises:
        ImportError: PySceneDetect is not installed.
    """
    try:
        from scenedetect import AdaptiveDetector, FrameTimecode
    except ImportError as error:
        raise ImportError("Scenes are found by PySceneDetect: `pip install 'hfvlm[scenes]'`.") from error
    film = read_video(film)
    fps = film.fps or FPS
    detector = AdaptiveDetector(min_scene_len=round(SHORTEST_SCENE * fps))
    cuts: list[int] = []
    for place, frame in enumerate(film.stream(range(len(film)))):
        step = max(1, frame.shape[1] // 256)  # cuts are seen in little
        small = np.ascontiguousarray(frame[::step, ::step, ::-1])  # blue, green, red
        cuts += [cut.frame_num for cut in detector.process_frame(FrameTimecode(place, fps), small)]
    cuts += [cut.frame_num for cut in detector.post_process(FrameTimecode(len(film) - 1, fps))]
    ends = [0, *sorted(set(cuts)), len(film)]
    return [range(start, end) for start, end in pairwise(ends)]


def tracks_at(tracks: Sequence[Track], frame: int) -> list[dict[str, Any]]:
    """Where the things are in one frame, as `hfvlm.draw_boxes` takes them."""
    boxes = ((track.label, track.box_at(frame)) for track in tracks)
    return [{"label": label, "box_xyxy": box} for label, box in boxes if box is not None]


def draw_tracks(film: Any, tracks: Sequence[Track], frames: Sequence[int] | None = None) -> Iterator[Image.Image]:
    """The film's frames, or those that are asked for, in their order, with boxes and their labels."""
    film = read_video(film)
    places = range(len(film)) if frames is None else sorted(frames)
    for place, frame in zip(places, film.stream(places), strict=True):
        yield draw_boxes(Image.fromarray(frame), tracks_at(tracks, place))


class TextDetector:
    """Finds named things in pictures: GroundingDINO, or what transformers has with its interface.

    Args:
        model: as `AutoModelForZeroShotObjectDetection` loads it.
        processor: its own.
        threshold: of a box, and of each word of what it shows.
    """

    def __init__(self, model: Any, processor: Any, *, threshold: float = 0.5):
        self.threshold = check_number("threshold", threshold, 0, 1)
        self.model, self.processor = model.eval(), processor

    @classmethod
    def from_pretrained(cls, folder: str | Path, *, threshold: float = 0.5, device: str = "cpu") -> "TextDetector":
        model = AutoModelForZeroShotObjectDetection.from_pretrained(folder).to(chosen_device(device))
        return cls(model, AutoProcessor.from_pretrained(folder), threshold=threshold)

    @torch.no_grad()
    def __call__(self, pictures: Sequence[Image.Image], things: Sequence[str]) -> list[list[Detection]]:
        prompt = ". ".join(thing.lower() for thing in things) + "."
        inputs = self.processor(images=list(pictures), text=[prompt] * len(pictures), return_tensors="pt")
        inputs = inputs.to(self.model.device)
        found = self.processor.post_process_grounded_object_detection(
            self.model(**inputs),
            inputs["input_ids"],
            threshold=self.threshold,
            text_threshold=self.threshold,
            target_sizes=[(picture.height, picture.width) for picture in pictures],
        )
        return [self.read(result, things, picture.size) for result, picture in zip(found, pictures, strict=True)]

    def read(self, result: Mapping[str, Any], things: Sequence[str], size: tuple[int, int]) -> list[Detection]:
        """What the detector says of one picture; boxes end where the picture does."""
        limits = torch.tensor([*size, *size], dtype=torch.float32)
        boxes: Tensor = result["boxes"].float().cpu().clamp(min=0).minimum(limits)
        # Of no boxes the host decodes one label, which is empty.
        rows = zip(result["text_labels"], result["scores"].tolist(), boxes.tolist(), strict=False)
        named = ((meant(phrase, things), score, box) for phrase, score, box in rows)
        return [Detection(label, score, box) for label, score, box in named if label is not None]


def meant(phrase: str, things: Sequence[str]) -> str | None:
    """The thing that shares most words with a phrase, which the detector puts together of single words."""
    said = set(re.findall(r"\w+", phrase.lower()))

    def share(thing: str) -> float:
        words = set(re.findall(r"\w+", thing.lower()))
        return len(words & said) / max(1, len(words | said))

    best = max(things, key=share)
    return best if share(best) > 0 else None


class BoxSegmenter:
    """Cuts out what is in a box: SAM, as `AutoModelForMaskGeneration` loads it, the best of its three masks."""

    def __init__(self, model: Any, processor: Any):
        self.model, self.processor = model.eval(), processor

    @classmethod
    def from_pretrained(cls, folder: str | Path, *, device: str = "cpu") -> "BoxSegmenter":
        model = AutoModelForMaskGeneration.from_pretrained(folder).to(chosen_device(device))
        return cls(model, AutoProcessor.from_pretrained(folder))

    @torch.no_grad()
    def __call__(self, picture: Image.Image, boxes: Sequence[Sequence[float]]) -> list[np.ndarray]:
        """Boxes -> masks, `(H, W)`, bool."""
        inputs = self.processor(images=picture, input_boxes=[[list(box) for box in boxes]], return_tensors="pt")
        inputs = inputs.to(self.model.device)
        output = self.model(pixel_values=inputs["pixel_values"], input_boxes=inputs["input_boxes"])
        sizes = (inputs["original_sizes"], inputs["reshaped_input_sizes"])
        (masks,) = self.processor.post_process_masks(output.pred_masks, *sizes)
        best = output.iou_scores[0].argmax(dim=-1).tolist()
        return [mask[i].cpu().numpy() for mask, i in zip(masks, best, strict=True)]
