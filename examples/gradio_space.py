"""A Space of the Hub: an image or an audio clip, and labels of one's own, to probabilities.

Copy this file to a Space of Gradio as app.py, with a requirements.txt of one line, hfvlm[audio], and set its variable
MODEL to the Hub id of a converted model. By default it is the small ImageBind that ships, which knows coloured shapes.
Here: pip install gradio, then python examples/gradio_space.py
"""

import os
from importlib.resources import files

import gradio

import hfvlm

MODEL = os.environ.get("MODEL") or str(files("hfvlm.samples") / "imagebind-tiny")
embedder = hfvlm.Embedder.from_pretrained(MODEL, dtype="float32")


def classify(image: str | None, audio: str | None, labels: str, templates: str) -> dict[str, float]:
    """Classify one file by labels, one a line."""
    names = list(dict.fromkeys(line.strip() for line in labels.splitlines() if line.strip()))
    if not names or (image is None) == (audio is None):
        raise gradio.Error("Give labels, and one image or one audio clip.")
    try:
        classifier = hfvlm.ZeroShotClassifier(embedder, names, templates)
        found = classifier.predict(image or audio, "image" if image else "audio", top_k=len(names))
    except ValueError as error:
        raise gradio.Error(str(error)) from error
    return dict(found)


page = gradio.Interface(
    classify,
    [gradio.Image(type="filepath"), gradio.Audio(type="filepath"), gradio.Textbox("red circle\nblue square", lines=4),
     gradio.Dropdown(["single", "name", "imagenet-7", "imagenet"])],
    gradio.Label(label="Probabilities"), title="hfvlm", flagging_mode="never",
)  # fmt: skip
if __name__ == "__main__":
    page.launch()
