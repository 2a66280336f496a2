"""Scenes of several objects: captions name what the pixels show."""

import numpy as np

from hfvlm.samples import scenes


def test_captions_name_what_an_image_shows():
    scene = scenes.ObjectScene((("white", "square"), ("red", "cross")), ("southeast", "northwest"))
    assert scene.caption() == "a red cross and a white square"
    pixels = np.asarray(scene.render(np.random.RandomState(0))).astype(int)
    (x, y), (left, top) = scenes.PLACES["southeast"], scenes.PLACES["northwest"]
    assert pixels[round(y * 32), round(x * 32)].min() > 200
    red, green, _ = pixels[round(top * 32), round(left * 32)]
    assert red - green > 100
    for place in ("northeast", "southwest"):
        x, y = scenes.PLACES[place]
        assert pixels[round(y * 32), round(x * 32)].max() < 60, place


def test_objects_are_read_from_texts():
    objects = [("red", "cross"), ("white", "square"), ("red", "cross")]
    assert scenes.named_objects(scenes.caption_of(objects)) == objects
    assert scenes.named_objects("red, a circle, infrared square, a red squares and the red red cross") == [
        ("red", "cross")
    ]
    assert scenes.named_objects("") == []
