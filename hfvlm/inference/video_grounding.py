"""Grounding in videos: the things that an answer names, found by a detector and followed through each scene.

Source: grounding_evaluation and video_chatgpt/chat.py of https://github.com/mbzuai-oryx/Video-LLaVA at 0c8810f.
There, GroundingDINO detects in every fifth frame, MobileSAM segments what it finds, CLIP confirms it, and DEVA carries
the masks to the frames between. Here, boxes are joined from frame to frame by how much they overlap.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from hfvlm.checks.ranges import check_integer, check_number
from hfvlm.inference.detection import BoxSegmenter, Detection, TextDetector, confirmed, distinct, overlap
from hfvlm.inference.embedder import Embedder
from hfvlm.inference.grounding import draw_boxes
from hfvlm.inference.zero_shot import ZeroShotClassifier
from hfvlm.media.sources import import_extra
from hfvlm.media.video import Video, read_video

# Frames a second of a video that does not define its own rate; seconds of the shortest scene.
FPS, SHORTEST_SCENE = 25.0, 0.6


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
        """Interpolate the box between the frames in which it was found; None before the first and after the last."""
        if not self.first <= frame <= self.last:
            return None
        before = max(i for i in self.found if i <= frame)
        after = min(i for i in self.found if i >= frame)
        share = (frame - before) / (after - before) if after > before else 0.0
        corners = zip(self.found[before].box_xyxy, self.found[after].box_xyxy, strict=True)
        return [start + share * (end - start) for start, end in corners]


class VideoGrounder:
    """Finder of things in videos, which follows each through its scene.

    Example:
        >>> grounder = VideoGrounder.from_pretrained("grounding-dino-tiny", segmenter="sam-vit-base")
        >>> tracks = grounder("clip.mp4", ["dog", "ball"])
        >>> for image in draw_tracks("clip.mp4", tracks): ...

    Args:
        detector: `detector(images, things)` -> of each image a list of `Detection`, as `TextDetector`.
        segmenter: `segmenter(image, boxes)` -> a mask of each box, as `BoxSegmenter`; None leaves masks out.
        embedder: of a CLIP, which confirms detections, as in the original; None trusts the detector.
        every: n: things are detected in each n-th frame, and in the last of each scene.
        most_overlap: of two boxes that overlap more (intersection over union) the less likely is suppressed.
        least_overlap: boxes that overlap less from one frame to the next are two things.
        missed: n: a track ends when its thing was not detected n + 1 times in a row.
        most: tracks at a time.
        batch_size: frames that the detector takes at a time.

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
        if embedder is not None:
            embedder.check_one_vector("Confirmation")
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
        """Load folders: a GroundingDINO's, and if given a SAM's and a CLIP's; `settings` are the class's own."""
        return cls(
            TextDetector.from_pretrained(detector, threshold=threshold, device=device),
            segmenter=None if segmenter is None else BoxSegmenter.from_pretrained(segmenter, device=device),
            embedder=None if embedder is None else Embedder.from_pretrained(embedder, device=device),
            **settings,
        )

    def __call__(self, film: Any, things: Sequence[str], *, scenes: Sequence[range] | None = None) -> list[Track]:
        """Find the tracks of `things`, scene by scene.

        Args:
            film: a video, whatever `hfvlm.media.read_video` reads.
            things: names, such as the tags of an answer's entities.
            scenes: the frames of each scene; by default where PySceneDetect finds cuts.

        Raises:
            ImportError: scenes are to be found, and PySceneDetect is not installed.
        """
        video, names = read_video(film), list(dict.fromkeys(things))
        if not names:
            return []
        classifier = None if self.embedder is None else ZeroShotClassifier(self.embedder, names, "imagenet")
        tracks: list[Track] = []
        for scene in find_scenes(video) if scenes is None else scenes:
            tracks += self.follow(scene, self.detect(video, scene, names, classifier))
        return tracks

    def detect(
        self, video: Video, scene: range, names: list[str], classifier: ZeroShotClassifier | None
    ) -> Iterator[tuple[int, list[Detection]]]:
        """Yield some frames of a scene, with the detections in each."""
        chosen = sorted({*scene[:: self.every], scene[-1]})
        images = map(Image.fromarray, video.stream(chosen))
        for start in range(0, len(chosen), self.batch_size):
            frames = chosen[start : start + self.batch_size]
            batch = list(islice(images, len(frames)))
            for frame, image, detections in zip(frames, batch, self.detector(batch, names), strict=True):
                found = distinct(detections, self.most_overlap)
                if self.segmenter is not None and found:
                    masks = self.segmenter(image, [each.box_xyxy for each in found])
                    for each, mask in zip(found, masks, strict=True):
                        each.mask = mask
                yield frame, found if classifier is None else confirmed(image, found, classifier)

    def follow(self, scene: range, frames: Iterator[tuple[int, list[Detection]]]) -> list[Track]:
        """Join the detections in the frames of a scene, in their order, to tracks."""
        tracks: list[Track] = []
        waiting: dict[int, int] = {}  # how often each track that goes on was missed
        for frame, detections in frames:
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
                    tracks[taken[j]].found[frame] = each
        return tracks


def find_scenes(video: Any) -> list[range]:
    """Find the frames of each scene of a video, by the cuts that PySceneDetect's command finds by default.

    Raises:
        ImportError: PySceneDetect is not installed.
    """
    scenedetect = import_extra("scenedetect", "scenes", "Finding scenes")
    video = read_video(video)
    fps = video.fps or FPS
    detector = scenedetect.AdaptiveDetector(min_scene_len=round(SHORTEST_SCENE * fps))
    cuts: list[int] = []
    for i, frame in enumerate(video.stream(range(len(video)))):
        step = max(1, frame.shape[1] // 256)  # small frames are enough to detect cuts
        small = np.ascontiguousarray(frame[::step, ::step, ::-1])  # blue, green, red
        cuts += [cut.frame_num for cut in detector.process_frame(scenedetect.FrameTimecode(i, fps), small)]
    cuts += [cut.frame_num for cut in detector.post_process(scenedetect.FrameTimecode(len(video) - 1, fps))]
    ends = [0, *sorted(set(cuts)), len(video)]
    return [range(start, end) for start, end in pairwise(ends)]


def tracks_at(tracks: Sequence[Track], frame: int) -> list[dict[str, Any]]:
    """Return the boxes in one frame, as `hfvlm.draw_boxes` takes them."""
    boxes = ((track.label, track.box_at(frame)) for track in tracks)
    return [{"label": label, "box_xyxy": box} for label, box in boxes if box is not None]


def draw_tracks(film: Any, tracks: Sequence[Track], frames: Sequence[int] | None = None) -> Iterator[Image.Image]:
    """Yield a video's frames, by default all, in their order, with boxes and their labels."""
    video = read_video(film)
    chosen = range(len(video)) if frames is None else sorted(frames)
    for frame, pixels in zip(chosen, video.stream(chosen), strict=True):
        yield draw_boxes(Image.fromarray(pixels), tracks_at(tracks, frame))
