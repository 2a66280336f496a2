"""Python sources of neighbours that bring another torch, or need a GPU: downloaded with pip, unpacked, not installed.

`python -m tests.support.neighbours FOLDER` downloads them; `sources(name)` puts one on the path, or skips a test.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

# What pip downloads, by the package's name when it is imported. vLLM's wheel is ten times as large as its sources.
PACKAGES = {
    "lmms_eval": ("lmms-eval",),
    "sglang": ("sglang",),
    "vllm": ("--no-build-isolation", "--no-binary", "vllm", "vllm"),
}
# What vLLM's modules import and hfvlm's tests do not use, without what these need.
UNUSED = ("xgrammar", "apache-tvm-ffi", "llguidance", "outlines_core", "lark", "uvloop")


def download(folder: Path) -> None:
    """Download the newest release of each, and unpack it."""
    folder.mkdir(parents=True, exist_ok=True)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    subprocess.run([*pip, "install", "--quiet", "--no-deps", *UNUSED], check=True)
    for name, arguments in PACKAGES.items():
        files = folder / f"{name}-files"
        build = {}
        if name == "vllm":  # an archive's version must be that of its name
            listed = subprocess.run([*pip, "index", "versions", name], check=True, capture_output=True, text=True)
            build = {"VLLM_TARGET_DEVICE": "empty", "VLLM_VERSION_OVERRIDE": listed.stdout.split("(")[1].split(")")[0]}
        command = [*pip, "download", "--quiet", "--no-deps", "--dest", files, *arguments]
        subprocess.run(command, check=True, env=os.environ | build)
        (archive,) = files.iterdir()
        shutil.unpack_archive(archive, folder / name, "zip" if archive.suffix == ".whl" else None)
        inner = list((folder / name).glob(f"*/{name}"))
        if inner:  # an archive of sources has a folder around them
            shutil.move(inner[0], folder / name / name)


def sources(name: str) -> Path:
    """Put a neighbour's sources on the path, and return their folder.

    Raises:
        pytest.skip.Exception: they are not there.
    """
    folder = Path(os.environ.get("HFVLM_NEIGHBOURS", ".venv-integrations/sources")).absolute() / name
    if not (folder / name).is_dir():
        pytest.skip(f"the sources of {name} are downloaded by `make integrations`", allow_module_level=True)
    if str(folder) not in sys.path:
        sys.path.append(str(folder))
    return folder


if __name__ == "__main__":
    download(Path(sys.argv[1]))
