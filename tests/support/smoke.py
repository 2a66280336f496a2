"""Try an installed hfvlm as a user's first minute: import, `hfvlm list`, convert what ships, classify an image.

`make release-check` runs it with `python -I`, outside of the repository.
"""

import subprocess
import sys
import tempfile
from importlib.resources import as_file, files
from pathlib import Path

import numpy as np

import hfvlm
from hfvlm.samples import scenes


def main() -> None:
    installed, environment = Path(hfvlm.__file__).resolve(), Path(sys.prefix).resolve()
    assert installed.is_relative_to(environment), f"{installed}: not of {environment}"
    command = Path(sys.executable).parent / "hfvlm"
    presets = subprocess.run([command, "list"], capture_output=True, text=True, check=True).stdout
    assert "clip/tiny" in presets
    with tempfile.TemporaryDirectory() as folder, as_file(files("hfvlm.samples") / "clip-tiny") as shipped:
        model = Path(folder) / "clip-tiny"
        convert = ["convert", shipped / "clip-tiny.pt", "--preset", "clip/tiny", "-o", model, "--verify"]
        subprocess.run([command, *convert], check=True)
        kinds = scenes.all_scenes()
        captions = [kind.caption() for kind in kinds]
        classifier = hfvlm.ZeroShotClassifier.from_pretrained(model, captions, "name", device="cpu")
        found = classifier.scores([kind.render(np.random.RandomState(0)) for kind in kinds]).argmax(axis=1)
        right = np.mean(found == np.arange(len(kinds)))
        assert right > 0.9, f"only {right:.0%} of the images get their label"
    sys.stdout.write(f"hfvlm {hfvlm.__version__} from {installed.parent}: installed, converts and classifies\n")


if __name__ == "__main__":
    main()
