"""Files as the authors released them."""

import re

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModel, AutoProcessor, pipeline
from transformers.models.auto.image_processing_auto import AutoImageProcessor
from typer.testing import CliRunner

import hfvlm
from hfvlm.checkpoints.key_table import restore_keys
from hfvlm.checkpoints.originals import UnsupportedOriginalError
from hfvlm.cli import app
from hfvlm.conversion.dalle_mini import config_from_original, dvae_rows, keys_for, min_dalle_rows, vqgan_rows
from hfvlm.inference.text_to_image import ImageGenerator, image_grid
from hfvlm.models.dalle_mini import (
    HfvlmDALLEMiniDVAEConfig,
    HfvlmDALLEMiniTokenizer,
    HfvlmDALLEMiniVQGANConfig,
)
from hfvlm.presets import list_presets, load_preset
from hfvlm.release.untrained import untrained

SCALELESS = re.compile(r".*\.(attention_norm|context_norm|mlp\.norm|mlp\.mid_norm|final_norm)\.weight")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return untrained("dalle_mini", tmp_path_factory.mktemp("dalle") / "model")


@pytest.fixture(scope="module")
def model(folder):
    model = AutoModel.from_pretrained(folder)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not SCALELESS.fullmatch(name):
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model.eval()


def packed(path, tensors):
    """A file as Flax's own serialization writes it."""
    msgpack = pytest.importorskip("msgpack", reason="a package that others need")
    tree = {}
    for name, tensor in tensors.items():
        *parents, last = name.split("/")
        inner = tree
        for parent in parents:
            inner = inner.setdefault(parent, {})
        value = np.ascontiguousarray(tensor.numpy())
        data = msgpack.packb((value.shape, value.dtype.name, value.tobytes()), use_bin_type=True)
        inner[last] = msgpack.ExtType(1, data)
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(msgpack.packb(tree))
    return path


def scanned(tensors):
    """Layers stacked, as Flax scans over them."""
    found, layers = {}, {}
    for name, tensor in tensors.items():
        if match := re.fullmatch(r"(.*/FlaxBart(?:En|De)coderLayer)_(\d+)/(.*)", name):
            layers.setdefault(f"{match[1]}s/{match[3]}", {})[int(match[2])] = tensor
        else:
            found[name] = tensor
    return found | {name: torch.stack([parts[i] for i in sorted(parts)]) for name, parts in layers.items()}


def without_codec(model):
    return {key: tensor for key, tensor in model.state_dict().items() if not key.startswith("codec.")}


def codec_of(model):
    return {key: tensor for key, tensor in model.state_dict().items() if key.startswith("codec.")}


def same_weights(folder, model, but=()):
    loaded = AutoModel.from_pretrained(folder)
    expected = {key: tensor for key, tensor in model.state_dict().items() if not key.startswith(but or ("\0",))}
    assert loaded.state_dict().keys() == expected.keys()
    assert all(torch.equal(loaded.state_dict()[key], tensor) for key, tensor in expected.items())
    return loaded


@pytest.mark.parametrize("stacked", [False, True])
def test_flax_files_to_a_pipeline(model, folder, tmp_path, stacked):
    """Norms before linear layers have no scale there; here it is one."""
    kept = {key: tensor for key, tensor in without_codec(model).items() if not SCALELESS.fullmatch(key)}
    tensors = restore_keys(kept, keys_for(model.config))
    main = packed(tmp_path / "mini" / "flax_model.msgpack", scanned(tensors) if stacked else tensors)
    codec = restore_keys(codec_of(model), vqgan_rows(model.config.codec_config, ["a/b"], "codec."))
    part = packed(tmp_path / "vqgan" / "flax_model.msgpack", codec)
    sizes = model.config.codec_config
    (part.parent / "config.json").write_text(
        f'{{"ch": {sizes.hidden_size}, "ch_mult": [1, 1], "num_res_blocks": 1, "resolution": 8, '
        f'"attn_resolutions": [], "z_channels": 16, "embed_dim": 16, "n_embed": 32}}'
    )
    original = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "dropout": 0.0}
    out = tmp_path / "out"
    hfvlm.convert(main, "dalle_mini", out, original=original, parts={"codec": part}, vocabulary=vocabulary(folder))
    same_weights(out, model)
    draw = pipeline("text-to-image", model=str(out))
    found = draw(["a red ball", "a cross"], num_return_sequences=2)
    assert [[row["image"].size for row in rows] for rows in found] == [[(8, 8)] * 2] * 2
    with pytest.raises(ValueError, match="top_p must be"):
        draw("a red ball", top_p=2.0)
    alone = tmp_path / "alone"
    hfvlm.convert(main, "dalle_mini", alone, original=original, vocabulary="none")
    same_weights(alone, model, but=("codec.",))


def vocabulary(folder):
    return folder / "tokenizer.json"


@pytest.mark.parametrize("scaled", [False, True])
def test_min_dalle_files_by_a_preset(model, folder, tmp_path, scaled, monkeypatch):
    """Its files most likely lack the weights of norms that have no scale in Flax."""
    for half, prefix, name in (
        ("encoder", "text_model.", "encoder_mini.pt"),
        ("decoder", "image_decoder.", "decoder_mini.pt"),
    ):
        kept = {key: t for key, t in model.state_dict().items() if key.startswith(prefix)}
        kept = {key: t for key, t in kept.items() if scaled or not SCALELESS.fullmatch(key)}
        torch.save(dict(restore_keys(kept, min_dalle_rows(half))), tmp_path / name)
    codec = {key: t for key, t in codec_of(model).items() if not key.startswith(("codec.encoder.", "codec.to_codes."))}
    sizes = model.config.codec_config.to_dict() | {"has_encoder": False, "group_norm_eps": 1e-5}
    torch.save(
        dict(restore_keys(codec, vqgan_rows(HfvlmDALLEMiniVQGANConfig(**sizes), ["embedding.weight"], "codec."))),
        tmp_path / "detoker.pt",
    )
    preset = load_preset("dalle_mini/min-dalle-mini")
    fields = model.config.to_dict() | {"codec_config": sizes}
    monkeypatch.setattr(type(preset), "make_config", lambda _: type(model.config)(**fields))
    out = tmp_path / "out"
    with pytest.raises(FileNotFoundError, match=r"needs its codec .*detoker.pt"):
        hfvlm.convert(tmp_path / "encoder_mini.pt", "dalle_mini/min-dalle-mini", out, vocabulary="none")
    options = {"parts": {"codec": tmp_path / "detoker.pt"}, "vocabulary": vocabulary(folder)}
    hfvlm.convert(tmp_path / "encoder_mini.pt", "dalle_mini/min-dalle-mini", out, **options)
    same_weights(out, model, but=("codec.encoder.", "codec.to_codes."))
    assert AutoProcessor.from_pretrained(out).tokenizer.clean == "min-dalle"
    with pytest.raises(UnsupportedOriginalError, match="two files"):
        hfvlm.convert(tmp_path / "encoder_mini.pt", "dalle_mini", tmp_path / "no", vocabulary="none")


@pytest.mark.parametrize("kind", ["flax", "taming"])
def test_a_vqgan_alone(model, tmp_path, kind):
    config = model.config.codec_config
    tensors = restore_keys(model.codec.state_dict(), vqgan_rows(config, ["a/b"] if kind == "flax" else []))
    if kind == "flax":
        path = packed(tmp_path / "vqgan.msgpack", tensors)
    else:
        path = tmp_path / "last.ckpt"
        torch.save({"state_dict": {**tensors, "loss.discriminator.main.0.weight": torch.zeros(1)}}, path)
    hfvlm.convert(path, "dalle_mini", tmp_path / "out", original={"resolution": 8})
    loaded = same_weights(tmp_path / "out", model.codec)
    pixels = AutoImageProcessor.from_pretrained(tmp_path / "out")(
        np.full((9, 12, 3), 255, np.uint8), "pt"
    ).pixel_values
    assert pixels.shape == (1, 3, 8, 8)
    assert pixels.min() == 1
    assert torch.equal(loaded.encode(pixels).codes, model.codec.encode(pixels).codes)


def test_openai_files_by_their_preset(tmp_path, monkeypatch):
    sizes = {"hidden_size": 8, "decoder_hidden_size": 8, "decoder_input_size": 8, "blocks_per_group": 1}
    config = HfvlmDALLEMiniDVAEConfig(**sizes, decoder_blocks_per_group=1, num_codes=12)
    dvae = AutoModel.from_config(config)
    for half in ("encoder", "decoder"):
        kept = {key: tensor for key, tensor in dvae.state_dict().items() if key.startswith(half)}
        torch.save(dict(restore_keys(kept, dvae_rows(config, half))), tmp_path / f"{half}.pkl")
    preset = load_preset("dalle_mini/openai-dvae")
    monkeypatch.setattr(
        type(preset),
        "make_config",
        lambda _: HfvlmDALLEMiniDVAEConfig(**sizes, decoder_blocks_per_group=1, num_codes=12),
    )
    hfvlm.convert(tmp_path, "dalle_mini/openai-dvae", tmp_path / "out")
    same_weights(tmp_path / "out", dvae)


def test_what_the_original_cannot_run_is_refused(model):
    tensors = restore_keys(without_codec(model), keys_for(model.config))
    for option in ({"ln_positions": "postln"}, {"use_alibi": True}, {"tie_word_embeddings": True}):
        with pytest.raises(UnsupportedOriginalError, match=f"{next(iter(option))}=.*does not run so"):
            config_from_original(option, tensors)
    with pytest.raises(UnsupportedOriginalError, match="made_up"):
        config_from_original({"made_up": 1}, tensors)


def test_every_release_has_a_preset():
    names = {name.partition("/")[2] for name in list_presets("dalle_mini")}
    assert names == {
        *("mini", "mega", "mega-fp16", "min-dalle-mini", "min-dalle-mega", "min-dalle-detoker"),
        *("vqgan_imagenet_f16_16384", "openai-dvae", "tiny"),
    }


class Judge:
    """Finds that images with more red fit a text."""

    def encode(self, image, text):
        self.red = torch.tensor([[np.asarray(each)[..., 0].mean()] for each in image])
        return self

    def similarity(self, a, b):
        return self.red


def test_images_of_texts(folder, model):
    processor = AutoProcessor.from_pretrained(folder)
    draws = ImageGenerator(model, processor, top_k=0, temperature=3.0)
    first = draws("a red ball", 4, seed=3)
    again = draws(["a red ball", "a cross"], 4, seed=3, batch_size=4)
    assert [np.array_equal(a, b) for a, b in zip(first, again[0], strict=True)] == [True] * 4
    ranked = ImageGenerator(model, processor, Judge(), top_k=0, temperature=3.0)("a red ball", 4, seed=3)
    red = [np.asarray(image)[..., 0].mean() for image in ranked]
    assert red == sorted((np.asarray(image)[..., 0].mean() for image in first), reverse=True)
    assert red[0] > red[-1]
    grid = image_grid(first[:3])
    assert grid.size == (16, 16)
    assert np.array_equal(np.asarray(grid)[:8, 8:], np.asarray(first[1]))
    with pytest.raises(ValueError, match="text is an empty list"):
        draws([])
    with pytest.raises(ValueError, match="guidance_scale"):
        draws("a", guidance_scale=-1)
    with pytest.raises(ValueError, match="draws no images"):
        ImageGenerator(model.codec, processor)


def test_the_command_writes_a_grid(folder, tmp_path):
    out = tmp_path / "grid.png"
    arguments = [
        "draw",
        "a red ball",
        "--model",
        str(folder),
        "-o",
        str(out),
        "-n",
        "4",
        "--seed",
        "1",
        "--device",
        "cpu",
    ]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    with Image.open(out) as grid:
        assert grid.size == (16, 16)
    for more in ([], ["--overwrite", "--keep", "1"], ["--overwrite", "-o", str(tmp_path / "grid.made_up")]):
        assert CliRunner().invoke(app, [*arguments, *more]).exit_code != 0
    (tmp_path / "folder.png").mkdir()
    for name, message in (
        ("folder.png", "is a folder"),
        ("none/grid.png", "there is no folder"),
        ("grid.psd", "no kind of image that can be written"),
    ):
        result = CliRunner().invoke(app, [*arguments, "--overwrite", "-o", str(tmp_path / name)])
        assert message in str(result.exception), result.output
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder.png", "grid.png"]


def test_texts_keep_their_tokenizer(folder, tmp_path):
    words = tmp_path / "words"
    words.mkdir()
    (words / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes())
    (words / "enwiki-words-frequency.txt").write_text("red 10\nball 9\n")
    tokenizer = HfvlmDALLEMiniTokenizer.from_vocabulary(
        words / "tokenizer.json", model_max_length=24, hashtag_file=words / "enwiki-words-frequency.txt"
    )
    tokenizer.save_pretrained(tmp_path / "saved")
    again = HfvlmDALLEMiniTokenizer.from_pretrained(tmp_path / "saved")
    for each in (tokenizer, again):
        assert each.cleaned_text("A #RedBall!") == " a red ball"
    plain = AutoProcessor.from_pretrained(folder).tokenizer
    assert plain.cleaned_text("a #redball") == " a redball"
    assert again("a #redball")["input_ids"] == plain("a red ball")["input_ids"]
