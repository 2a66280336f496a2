"""A setting is declared once: its annotation carries the check, its value is the default."""

from typing import Annotated, Any

import pytest
from PIL import Image

from hfvlm.processing import HfvlmImageProcessor
from hfvlm.processing.settings import Checked, Edge, number, whole


class Base(Checked):
    edge: Edge
    share: Annotated[float, number(above=0, most=1)]
    note: str = "no setting: nothing checks it"


class Derived(Base):
    share: Annotated[float, number(least=0)]
    count: Annotated[int, whole(1, 9)]


def test_annotations_are_the_table():
    assert list(Base.SETTINGS) == ["edge", "share"]
    assert list(Derived.SETTINGS) == ["edge", "share", "count"]


def test_a_subclass_replaces_a_check_and_leaves_the_others():
    assert Derived().checked_value("share", 0) == 0
    with pytest.raises(ValueError, match="Base: share must be a finite number above 0 and of 1 or less, not 0"):
        Base().checked_value("share", 0)
    with pytest.raises(ValueError, match="Derived: edge must be an integer of 1 to 16384, not 0"):
        Derived().checked_value("edge", 0)
    assert Derived().checked_value("unknown", "as it is") == "as it is"


def test_a_new_setting_is_saved_loaded_and_taken_by_a_call(tmp_path):
    class Sharpened(HfvlmImageProcessor):
        sharpness: Annotated[int, whole(0, 3)] = 1

        def batch(self, arrays: list[Any], settings: Any, return_tensors: str | None) -> Any:
            return settings["sharpness"]

    Sharpened(sharpness=2).save_pretrained(tmp_path)
    again = Sharpened.from_pretrained(tmp_path)
    assert again.sharpness == 2
    assert again(Image.new("L", (2, 2)), sharpness=3) == 3
    with pytest.raises(ValueError, match="Sharpened: sharpness must be an integer of 0 to 3, not 4"):
        again(Image.new("L", (2, 2)), sharpness=4)
