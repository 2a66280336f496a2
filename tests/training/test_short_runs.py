import pytest
from transformers import TrainingArguments

from hfvlm.training import ContrastiveTrainingArguments, short_run


def test_a_short_run_writes_nothing_and_shows_its_losses(tmp_path):
    arguments = short_run(tmp_path / "run", 7, seed=3)
    assert type(arguments) is TrainingArguments
    assert (arguments.max_steps, arguments.seed, arguments.save_strategy, arguments.report_to) == (7, 3, "no", [])
    assert not arguments.remove_unused_columns
    assert not (tmp_path / "run").exists()


def test_fields_may_be_changed(tmp_path):
    arguments = short_run(tmp_path, 7, ContrastiveTrainingArguments, learning_rate=1e-3, recall_at=[1])
    assert type(arguments) is ContrastiveTrainingArguments
    assert (arguments.learning_rate, arguments.recall_at, arguments.weight_decay) == (1e-3, [1], 0.01)
    with pytest.raises(TypeError, match="made_up"):
        short_run(tmp_path, 7, made_up=1)
    with pytest.raises(ValueError, match="steps must be an integer"):
        short_run(tmp_path, 0)
