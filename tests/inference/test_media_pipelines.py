"""Pipelines read media as the processors do, and fetch nothing."""

import io

import numpy as np
import pytest
import soundfile
import torch
from PIL import Image, ImageCms
from transformers import AutoImageProcessor, AutoModel, AutoProcessor, CLIPConfig, CLIPModel, pipeline
from transformers.pipelines import PIPELINE_REGISTRY, ZeroShotImageClassificationPipeline

import hfvlm
from hfvlm.inference import media_pipelines
from hfvlm.media import MediaError, read_image
from hfvlm.models.clip import HfvlmCLIPForImageClassification

LABELS = ["a zero", "a one", "a two"]
Y, X = np.mgrid[:60, :90]
COLOURS = Image.fromarray(np.dstack([X * 2.8, Y * 4.2, (X + Y) * 1.7]).clip(0, 255).astype(np.uint8))


def to_lab(image):
    profiles = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
    return ImageCms.applyTransform(image, ImageCms.buildTransform(*profiles, "RGB", "LAB"))


def in_mode(mode):
    if mode == "I;16":
        return Image.fromarray((X * 700).astype(np.uint16))
    if mode == "LAB":
        return to_lab(COLOURS)
    if mode == "PA":
        return COLOURS.quantize(16).convert("PA")
    if mode in ("La", "RGBa"):
        return COLOURS.convert(mode[:-1] + "A").convert(mode)
    return COLOURS.quantize(16) if mode == "P" else COLOURS.convert(mode)


# Of each mode a format that stores it; the others come as PIL images.
STORED = {"1": "PNG", "L": "PNG", "LA": "PNG", "P": "PNG", "RGB": "PNG", "RGBA": "PNG", "CMYK": "JPEG", "I;16": "PNG"}
STORED |= {"YCbCr": "TIFF", "LAB": "TIFF", "F": "TIFF", "I": "TIFF", "PA": None, "RGBa": None, "La": None, "HSV": None}


@pytest.fixture(scope="module")
def clip(clip_folder):
    return (
        pipeline("zero-shot-image-classification", model=str(clip_folder)),
        AutoModel.from_pretrained(clip_folder).eval(),
        AutoProcessor.from_pretrained(clip_folder),
    )


def piped(classify, source, **options):
    found = classify(source, candidate_labels=LABELS, hypothesis_template="{}", **options)
    scores = {row["label"]: row["score"] for row in found}
    return np.array([scores[label] for label in LABELS])


@torch.no_grad()
def called(model, processor, source):
    inputs = processor(images=[source], text=LABELS, padding=True)
    return model(**inputs).logits_per_image.softmax(-1)[0].numpy()


@pytest.mark.parametrize("mode", STORED)
def test_a_pipeline_reads_every_mode_as_the_processor(clip, mode, tmp_path):
    image = in_mode(mode)
    sources = [image]
    if STORED[mode]:
        sources.append(str(tmp_path / f"image.{STORED[mode].lower()}"))
        image.save(sources[1], STORED[mode])
    for source in sources:
        assert np.abs(piped(clip[0], source) - called(*clip[1:], source)).max() < 1e-5, type(source)


def test_a_pipeline_turns_images_as_the_processor(clip, tmp_path):
    for orientation in range(2, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        COLOURS.save(tmp_path / "a.png", exif=exif)
        upright = called(*clip[1:], read_image(tmp_path / "a.png"))
        for source in (str(tmp_path / "a.png"), Image.open(tmp_path / "a.png")):
            assert np.abs(piped(clip[0], source) - upright).max() < 1e-5


def test_pipelines_take_bytes_arrays_and_lists(clip, tmp_path):
    COLOURS.save(tmp_path / "a.png")
    expected = piped(clip[0], COLOURS)
    for source in ((tmp_path / "a.png").read_bytes(), tmp_path / "a.png", np.asarray(COLOURS)):
        assert np.allclose(piped(clip[0], source), expected, atol=1e-6)
    both = clip[0]([COLOURS, str(tmp_path / "a.png")], candidate_labels=LABELS, batch_size=2)
    assert both[0] == both[1]


def test_other_tasks_for_images(clip, tmp_path):
    path = str(tmp_path / "a.png")
    (one_bit := in_mode("1")).save(path)
    model, processor = clip[1:]
    pixels = processor(images=[path])["pixel_values"]

    embed = pipeline("image-feature-extraction", model=model.vision_model, image_processor=processor.image_processor)
    with torch.no_grad():
        expected = model.vision_model(pixels).last_hidden_state
    assert torch.allclose(torch.tensor(embed(path)), expected, atol=1e-5)

    torch.manual_seed(0)
    classifier = HfvlmCLIPForImageClassification(model.config).eval()
    classify = pipeline("image-classification", model=classifier, image_processor=processor.image_processor)
    with torch.no_grad():
        shares = classifier(pixels).logits.softmax(-1)[0]
    for source in (path, one_bit):
        found = {row["label"]: row["score"] for row in classify(source)}
        assert found["LABEL_0"] == pytest.approx(shares[0].item(), abs=1e-5)


def test_texts_about_images(small_blip, tmp_path, monkeypatch):
    path = str(tmp_path / "a.png")
    in_mode("I;16").save(path)
    folder = small_blip("HfvlmBLIPForConditionalGeneration")
    describe, seen = pipeline("image-text-to-text", model=str(folder)), []
    forward = describe._forward
    monkeypatch.setattr(describe, "_forward", lambda i, **k: (seen.append(i["pixel_values"]), forward(i, **k))[1])
    describe(images=[path], text=["a picture"], generate_kwargs={"max_new_tokens": 2})
    expected = AutoProcessor.from_pretrained(folder)(images=[path], text=["a picture"])["pixel_values"]
    assert torch.allclose(seen[0], expected, atol=1e-6)
    with pytest.raises(MediaError, match="URLs are refused"):
        describe(images=["http://127.0.0.1:9/a.png"], text=["a picture"])
    assert media_pipelines.HfvlmAnyToAnyPipeline.preprocess is type(describe).preprocess


def test_audio_is_read_as_the_feature_extractor_reads_it(imagebind_folder, tmp_path):
    wave = np.stack([np.sin(np.arange(44_100 * 3) * f) / 3 for f in (0.05, 0.011)]).astype(np.float32)
    path = str(tmp_path / "a.wav")
    soundfile.write(path, wave.T, 44_100)
    classify = pipeline("zero-shot-audio-classification", model=str(imagebind_folder))
    model, processor = (
        AutoModel.from_pretrained(imagebind_folder).eval(),
        AutoProcessor.from_pretrained(imagebind_folder),
    )
    with torch.no_grad():
        inputs = processor(audio=[path], text=LABELS, padding=True)
        scores = model(**inputs).logits_per_audio.softmax(-1)[0]
    found = {row["label"]: row["score"] for row in classify(path, candidate_labels=LABELS, hypothesis_template="{}")}
    assert [found[label] for label in LABELS] == pytest.approx(scores.tolist(), abs=1e-5)
    with pytest.raises(MediaError, match="URLs are refused"):
        classify("http://127.0.0.1:9/a.wav", candidate_labels=LABELS)


def test_no_pipeline_fetches_a_url_that_was_not_allowed(clip, monkeypatch):
    fetched = []

    def fetch(url, hosts=None):
        fetched.append((url, hosts))
        buffer = io.BytesIO()
        COLOURS.save(buffer, "PNG")
        return buffer.getvalue()

    monkeypatch.setattr("hfvlm.media.urls.fetch", fetch)
    with pytest.raises(MediaError, match="URLs are refused"):
        piped(clip[0], "https://example.org/a.png")
    assert not fetched
    allowed = piped(clip[0], "https://example.org/a.png", allow_urls=["example.org"])
    assert np.allclose(allowed, piped(clip[0], COLOURS), atol=1e-6)
    assert fetched == [("https://example.org/a.png", ["example.org"])]


def test_other_models_keep_the_pipelines_of_transformers(clip):
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    config = CLIPConfig(text_config=sizes, vision_config=sizes | {"image_size": 8, "patch_size": 4}, projection_dim=8)
    native = pipeline(
        "zero-shot-image-classification",
        model=CLIPModel(config),
        tokenizer=clip[0].tokenizer,
        image_processor=clip[0].image_processor,
    )
    assert type(native) is ZeroShotImageClassificationPipeline
    assert isinstance(clip[0], ZeroShotImageClassificationPipeline)
    assert set(media_pipelines.TASKS) <= set(PIPELINE_REGISTRY.get_supported_tasks())


def test_another_libraries_image_processor_is_given_rgb(clip):
    class Foreign(AutoImageProcessor):
        def __init__(self):
            pass

        def __call__(self, images, return_tensors):
            assert [image.mode for image in images] == ["RGB"]
            assert type(images[0]) is Image.Image
            return clip[2].image_processor(images, return_tensors=return_tensors)

    classify = pipeline(
        "zero-shot-image-classification", model=clip[1], tokenizer=clip[2].tokenizer, image_processor=Foreign()
    )
    assert np.isfinite(piped(classify, in_mode("LA"))).all()
    assert hfvlm.__version__
