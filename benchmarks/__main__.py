"""All workloads, one after the other.

python -m benchmarks [--quick] [--rounds 7] [--device cuda] [--output benchmarks.json] [--page]
"""

from benchmarks import converting, language, losses, media, rerank, search, towers, zero_shot
from benchmarks.report import main

WORKLOADS = {
    module.__name__.rpartition(".")[2]: module.rows
    for module in (towers, losses, zero_shot, search, rerank, media, language, converting)
}

if __name__ == "__main__":
    main(WORKLOADS, __doc__)
