"""PEFT's own loading of models of a package, which has to be allowed."""

import pytest
import torch
from peft import AutoPeftModel
from transformers import AutoModelForImageTextToText

import hfvlm
from tests.models.llava.tiny import converted

pytestmark = pytest.mark.integration


def test_the_package_has_to_be_allowed(tmp_path):
    folder = converted(tmp_path)
    tuned = hfvlm.lora(AutoModelForImageTextToText.from_pretrained(folder), r=2, quiet=True).eval()
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    tuned.save_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match="not in the import allowlist"):
        AutoPeftModel.from_pretrained(tmp_path / "adapter")
    again = AutoPeftModel.from_pretrained(tmp_path / "adapter", import_allowlist=["hfvlm"]).eval()
    ids = torch.tensor([[1, 5, 7, 9]])
    with torch.no_grad():
        torch.testing.assert_close(again(input_ids=ids).logits, tuned(input_ids=ids).logits)
