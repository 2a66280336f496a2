"""The versions of transformers that hfvlm is known to work with, and the warning on others.

hfvlm builds on parts of transformers that change without notice. Within the range every test passed; outside of it
results may be wrong without an error, which `hfvlm doctor` detects.
"""

import re
import warnings
from importlib.metadata import PackageNotFoundError, version

__version__ = "0.1.0"

# The oldest, and the first that is not known; pyproject.toml repeats them.
OLDEST, UNKNOWN = "5.4", "5.25"
# `make test-matrix` runs these, of which the last is in constraints.txt.
TESTED = ("5.4.0", "5.12.0", "5.20.0", "5.23.0", "5.24.0")
RANGE = f"transformers>={OLDEST},<{UNKNOWN}"


class UntestedVersionWarning(UserWarning):
    """transformers is of a version that hfvlm was not tested on."""


def numbers(text: str) -> tuple[int, ...]:
    """Read the release of a version: (5, 24, 0) of "5.24.0rc1"."""
    found = re.match(r"\d+(\.\d+)*", text)
    return tuple(map(int, found[0].split("."))) if found else ()


def is_tested(installed: str) -> bool:
    """Check whether a version of transformers is in the range."""
    return numbers(OLDEST) <= numbers(installed) < numbers(UNKNOWN)


def installed_version(package: str) -> str | None:
    """Return the version of a package; None if it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def warn_if_untested() -> None:
    """Warn that transformers is of a version outside the tested range."""
    installed = installed_version("transformers")
    if installed is not None and not is_tested(installed):
        warnings.warn(
            f"hfvlm was tested with {RANGE}, and not with {installed}, which is installed: outputs may be wrong. Run "
            f"`hfvlm doctor`, which tests every architecture that generates, or pip install '{RANGE}'.",
            UntestedVersionWarning,
            stacklevel=3,
        )
