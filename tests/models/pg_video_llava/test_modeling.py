"""What PG-Video-LLaVA adds to Video-ChatGPT: sizes, transcripts, and the entities of an answer."""

import shutil

import numpy as np
import pytest
import torch
from tokenizers.pre_tokenizers import ByteLevel
from transformers import (
    ASTConfig,
    ASTFeatureExtractor,
    ASTForAudioClassification,
    AutoModelForImageTextToText,
    AutoProcessor,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
    WhisperTokenizer,
    pipeline,
)

import hfvlm
from hfvlm.checkpoints.key_table import restore_keys
from hfvlm.conversion.blocks import llama_rows, transformers_vision_rows
from hfvlm.conversion.llava import EMBEDDING, HEAD, linear_rows
from hfvlm.conversion.pg_video_llava import config_from_original
from hfvlm.models.pg_video_llava import HfvlmPGVideoLLaVAConfig, HfvlmPGVideoLLaVAForConditionalGeneration
from hfvlm.models.pg_video_llava.entities import common_tags, marked, name_entities, question, read_reply
from hfvlm.models.pg_video_llava.transcripts import is_spoken, transcribe
from tests.models.llava.tiny import TEXT, VISION, vision_settings, write
from tests.models.video_chatgpt.test_use import FIRST, VOCABULARY, video
from tests.support.suite import close


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    """The release on its base: the model, and the folder that is made."""
    folder = tmp_path_factory.mktemp("release")
    text = TEXT | {"vocab_size": FIRST + 3}
    config = HfvlmPGVideoLLaVAConfig(vision_config=VISION, text_config=text, video_token_id=FIRST)
    model = HfvlmPGVideoLLaVAForConditionalGeneration(config).eval()
    head = model.language_model.lm_head.weight.data
    head[FIRST:] = head[:FIRST].mean(dim=0)
    ours = model.state_dict()

    def part(start, rows):
        return restore_keys({k: t for k, t in ours.items() if k.startswith(start)}, rows)

    language = part("language_model.", llama_rows())
    trained = part("projector.", linear_rows(2)) | {EMBEDDING: language[EMBEDDING]}
    base = (
        language
        | {name: language[name][:FIRST] for name in (EMBEDDING, HEAD)}
        | {f"model.mm_projector.{i}.{name}": torch.randn(2) for i in (0, 2) for name in ("weight", "bias")}
    )
    vision = part("vision_model.", transformers_vision_rows("vision_model", "vision_model"))
    settings = {name: getattr(config.text_config, name) for name in TEXT if name != "model_type"}
    settings |= {"vocab_size": FIRST, "rms_norm_eps": config.text_config.rms_norm_eps, "model_type": "llava"}
    settings |= {"mm_projector_type": "mlp2x_gelu"}
    parts = {
        "vision": write(folder / "clip", "model.safetensors", vision, vision_settings(model)),
        "base": write(folder / "llava", "pytorch_model.bin", base, settings),
    }
    shutil.copy(VOCABULARY, parts["base"])
    source = write(folder / "release", "mm_projector_7b_1.5_336px.bin", trained)
    return model, hfvlm.convert(
        source / "mm_projector_7b_1.5_336px.bin", "pg_video_llava", folder / "out", parts=parts
    )


def test_a_projector_is_put_on_its_base(converted):
    model, folder = converted
    loaded, info = AutoModelForImageTextToText.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    for name, value in model.state_dict().items():
        close(loaded.state_dict()[name], value, 1e-6, name)
    assert all(check.passed for check in hfvlm.verify(folder))


def test_a_small_tower_has_one_projector_layer():
    vision = {"model_type": "clip_vision_model", "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 2}
    vision |= {"num_attention_heads": 1, "patch_size": 14}
    for size, depth in ((224, 1), (336, 2)):
        own = TEXT | {"vision_config": vision | {"image_size": size}, "mm_projector_type": "mlp2x_gelu"}
        assert config_from_original(own, {}).projector_depth == depth


def test_a_transcript_changes_the_output(converted):
    model, folder = converted
    processor = AutoProcessor.from_pretrained(folder)
    prompts = [{"type": "video", "video": video()}, {"type": "text", "text": "What is it?"}]

    def inputs(words):
        chat = [{"role": "user", "content": [*prompts, *words]}]
        text = processor.apply_chat_template(chat, add_generation_prompt=True)
        return text, processor(text=text, videos=[video()])

    (silent, without), (heard, given) = inputs([]), inputs([{"type": "transcript", "text": "a dog runs"}])
    assert silent.startswith("You are PG-Video-LLaVA,")
    assert inputs([{"type": "transcript", "text": ""}])[0] == silent
    added = '\nThe noisy audio transcript of this video is:\n"a dog runs" ASSISTANT:'
    assert heard == silent.removesuffix(" ASSISTANT:") + added
    with torch.no_grad():
        assert not torch.equal(model(**given).logits[0, -1], model(**without).logits[0, -1])


def test_transcripts_leave_out_music():
    """Segments with music are left out; the models get audio at 16 kHz."""
    heard = []

    def recognizer(sound, return_timestamps):
        assert sound["sampling_rate"] == 16_000
        assert return_timestamps
        assert len(sound["raw"]) == 48_000
        return {"chunks": [{"timestamp": (0.0, 1.0), "text": " hello"}, {"timestamp": (1.0, None), "text": " la la"}]}

    def tagger(sound, top_k):
        heard.append(len(sound["raw"]))
        names = ("Speech", "Music") if len(heard) == 1 else ("Music", "Speech")
        return [{"label": names[0], "score": 0.9}, {"label": names[1], "score": 0.05}]

    wave = np.random.RandomState(0).uniform(-0.5, 0.5, (2, 3 * 8_000)).astype(np.float32)
    assert transcribe((wave, 8_000), recognizer, tagger) == "hello"
    assert heard == [16_000, 32_000]


def test_segments_of_no_length_are_left_out():
    def recognizer(sound, return_timestamps):
        return {"chunks": [{"timestamp": (0.0, 0.0), "text": "a"}, {"timestamp": (0.5, 0.51), "text": "b"}]}

    assert transcribe((np.zeros((1, 16_000), np.float32), 16_000), recognizer, None) == ""


def test_transcripts_by_pipelines_of_transformers():
    """Untrained Whisper and tagger: inputs and outputs fit."""
    torch.manual_seed(0)
    names = ["<|endoftext|>", "<|startoftranscript|>", "<|notimestamps|>", *(f"<|{i / 50:.2f}|>" for i in range(1501))]
    vocabulary = {letter: i for i, letter in enumerate(sorted(ByteLevel.alphabet()))}
    tokenizer = WhisperTokenizer(vocab=vocabulary, merges=[], unk_token="a")
    tokenizer.add_tokens(names)
    end, start, untimed = tokenizer.convert_tokens_to_ids(names[:3])
    sizes = {
        f"{part}_{name}": 1 for part in ("encoder", "decoder") for name in ("layers", "attention_heads", "ffn_dim")
    }
    ids = {"bos_token_id": end, "eos_token_id": end, "pad_token_id": end, "decoder_start_token_id": start}
    config = WhisperConfig(vocab_size=len(tokenizer), d_model=16, max_target_positions=64, **sizes, **ids)
    model = WhisperForConditionalGeneration(config)
    timed = {"no_timestamps_token_id": untimed, "max_initial_timestamp_index": 50, "is_multilingual": False}
    for name, value in (timed | {"max_length": 32}).items():
        setattr(model.generation_config, name, value)
    recognizer = pipeline(
        "automatic-speech-recognition", model=model, tokenizer=tokenizer, feature_extractor=WhisperFeatureExtractor()
    )
    labels = {0: "Speech", 1: "Music", 2: "Wind"}
    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    small |= {"max_length": 128, "num_mel_bins": 64}
    ears = ASTForAudioClassification(ASTConfig(id2label=labels, **small))
    tagger = pipeline(
        "audio-classification", model=ears, feature_extractor=ASTFeatureExtractor(max_length=128, num_mel_bins=64)
    )
    wave = np.random.RandomState(0).randn(1, 48_000).astype(np.float32) * 0.1
    words = recognizer({"raw": wave[0], "sampling_rate": 16_000}, return_timestamps=True)
    assert all(set(chunk) == {"timestamp", "text"} for chunk in words["chunks"])
    assert isinstance(transcribe((wave, 16_000), recognizer, tagger), str)

    def whole(sound, return_timestamps):
        return {"chunks": [{"timestamp": (0.5, None), "text": " hello"}]}

    # Of three classes speech is one, and weights that know nothing let nothing drown it.
    assert transcribe((wave, 16_000), whole, tagger) == "hello"


def test_speech_is_distinguished_from_music():
    assert is_spoken([("Music", -0.5), ("Conversation", -1.5)])
    assert not is_spoken([("Music", -0.5), ("Speech", -1.7)])
    assert not is_spoken([("Wind", -0.1), ("Rain", -0.2), ("Music", -0.3), ("Speech", -0.4)])
    assert not is_spoken([])


def test_entities_of_an_answer_are_found():
    text, tags = "The dog and the other dog play with a ball.", ["dog", "ball", "park"]
    assert "dog, ball, park" in question(text, tags)
    reply = "ball - Ball\ndog - dog\nother dog - dog\ncat - cat\npark - park\n - dog\nno line"
    entities = read_reply(text, tags, reply)
    assert [(text[e.start : e.end], e.tag) for e in entities] == [
        ("dog", "dog"),
        ("other dog", "dog"),
        ("ball", "ball"),
    ]
    pieces = marked(text, entities)
    assert "".join(piece for piece, _ in pieces) == text
    assert [number for _, number in pieces] == [None, 1, None, 2, None, 3, None]
    assert read_reply(text, tags, "dog - dog\n" * 4) == read_reply(text, tags, "dog - dog\ndog - dog")
    assert common_tags([["a", "b"], ["b"], ["c", "b", "a"]], most=2) == ["b", "a"]


def test_a_language_model_finds_the_entities_of_an_answer():
    prompts = []

    def ask(words):
        prompts.append(words)
        return "brown dog - dog\nball - ball"

    text = "A brown dog has a ball."
    assert [entity.tag for entity in name_entities(text, ask, ["dog"])] == ["dog"]
    assert [entity.tag for entity in name_entities(text, ask)] == ["dog", "ball"]
    assert "one of these things: dog?" in prompts[0]
    assert "that can be seen?" in prompts[1]
    assert all(text in words for words in prompts)
