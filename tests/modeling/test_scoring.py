"""Models that score texts with images or videos: from a chat model's folder, padded on either side."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForImageTextToText, AutoModelForSequenceClassification, AutoProcessor

import hfvlm
from hfvlm.modeling.scoring import last_tokens
from hfvlm.samples.scenes import MovingScene, Scene
from hfvlm.training.chat import ChatCollator
from tests.support.suite import close

CHAT = ("llava", "shikra", "qwen_vl", "video_chatgpt")
ANSWERS = ("A dog.", "There is a shape on a picture.")


def rows(modality):
    images = [Scene("red", "circle", "large").render(), Scene("blue", "square", "small").render()]
    videos = [(MovingScene("red", "circle", way).render(), 8.0) for way in ("left", "up")]
    media = {"image": images, "video": videos}[modality]
    return [
        {
            "messages": [{"role": "user", "content": "What is this?"}, {"role": "assistant", "content": answer}],
            f"{modality}s": [own],
        }
        for own, answer in zip(media, ANSWERS, strict=True)
    ]


def batch_of(processor):
    batch = ChatCollator(processor)(rows(processor.modality))
    return {name: value for name, value in batch.items() if name != "labels"}


def moved_to_the_left(batch):
    """The same rows, padded in front."""
    ids, mask = batch["input_ids"].clone(), batch["attention_mask"].clone()
    for i, count in enumerate((mask == 0).sum(dim=1).tolist()):
        ids[i], mask[i] = ids[i].roll(count), mask[i].roll(count)
    return batch | {"input_ids": ids, "attention_mask": mask}


@pytest.mark.parametrize("name", CHAT)
def test_a_chat_model_becomes_a_reward(name, tmp_path):
    folder = hfvlm.untrained(name, tmp_path / "chat")
    processor = AutoProcessor.from_pretrained(folder)
    torch.manual_seed(0)
    model, info = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1, output_loading_info=True)
    assert type(model).__name__.endswith("ForSequenceClassification")
    assert (info["missing_keys"], info["unexpected_keys"]) == ({"score.weight"}, set())
    chat = AutoModelForImageTextToText.from_pretrained(folder).state_dict()
    for key, value in model.state_dict().items():
        assert key == "score.weight" or torch.equal(value, chat[key]), key
    batch = batch_of(processor)
    assert (batch["attention_mask"] == 0).sum(dim=1).tolist()[1] == 0 < (batch["attention_mask"] == 0).sum()
    with torch.no_grad():
        scores = model.eval()(**batch).logits
        close(model(**moved_to_the_left(batch)).logits, scores, 1e-4, "padded on the left")
        shorter = {name: value[:1] for name, value in batch.items()}
        length = int(shorter["attention_mask"].sum())
        shorter |= {name: shorter[name][:, :length] for name in ("input_ids", "attention_mask")}
        close(model(**shorter).logits, scores[:1], 1e-4, "without padding")
        pixels = next(name for name in batch if name.startswith("pixel_values"))
        assert (model(**batch | {pixels: batch[pixels].flip(0)}).logits - scores).abs().min() > 1e-6
    assert scores.shape == (2, 1)
    model.save_pretrained(tmp_path / "reward")
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "reward").eval()
    assert again.config.num_labels == 1
    with torch.no_grad():
        close(again(**batch).logits, scores, 1e-6, "loaded again")


def test_every_model_that_chats_has_one():
    for name in (*CHAT, "pg_video_llava"):
        config = hfvlm.load_preset(f"{name}/tiny").make_config()
        with torch.device("meta"):
            model = AutoModelForSequenceClassification.from_config(config)
        assert type(model) is getattr(hfvlm, type(config).__name__.replace("Config", "ForSequenceClassification"))


def test_scores_are_of_the_last_token_that_is_not_padding():
    x = torch.arange(12.0).reshape(3, 4, 1)
    mask = torch.tensor([[1, 1, 0, 0], [0, 0, 1, 1], [0, 1, 1, 0]])
    assert last_tokens(x, mask).flatten().tolist() == [1, 7, 10]
    assert last_tokens(x, mask.bool()).flatten().tolist() == [1, 7, 10]
    assert last_tokens(x, None).flatten().tolist() == [3, 7, 11]
    with pytest.raises(ValueError, match=r"attention_mask must be \(3, 4\), a number a token.*\(3, 1, 4, 4\)"):
        last_tokens(x, torch.ones(3, 1, 4, 4))


def test_a_reward_writes_nothing(tmp_path):
    folder = hfvlm.untrained("llava", tmp_path / "chat")
    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1)
    assert not model.can_generate()
    with pytest.raises(TypeError, match="scores texts; AutoModelForImageTextToText loads the model that generates"):
        model.generate(input_ids=torch.ones(1, 2, dtype=torch.long))
    assert model.get_output_embeddings() is None


def test_nothing_is_tied_to_what_is_gone(tmp_path):
    """A language model whose output layer is its table of embeddings."""
    config = hfvlm.load_preset("llava/tiny").make_config()
    config.text_config.tie_word_embeddings = True
    config.num_labels = 1
    hfvlm.HfvlmLLaVAForConditionalGeneration(config).save_pretrained(tmp_path / "chat")
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "chat", num_labels=1)
    model.save_pretrained(tmp_path / "reward")
    again, info = AutoModelForSequenceClassification.from_pretrained(tmp_path / "reward", output_loading_info=True)
    assert not any(info.values()), info
    assert not any("lm_head" in key for key in again.state_dict())
    for key, value in model.state_dict().items():
        assert torch.equal(value, again.state_dict()[key]), key


def test_adapters_train_the_score_in_full(tmp_path):
    folder = hfvlm.untrained("llava", tmp_path / "chat")
    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1)
    tuned = hfvlm.lora(model, "language", r=2, quiet=True)
    trained = {name for name, parameter in tuned.named_parameters() if parameter.requires_grad}
    score = "base_model.model.score.modules_to_save.default.weight"
    assert {name for name in trained if "lora_" not in name} == {score}
    layers = LoraConfig(task_type="SEQ_CLS", target_modules=["q_proj"])
    plain = get_peft_model(AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1), layers)
    assert any("score.modules_to_save" in name for name, p in plain.named_parameters() if p.requires_grad)
    batch = batch_of(AutoProcessor.from_pretrained(folder))
    assert plain(**batch).logits.shape == (2, 1)
