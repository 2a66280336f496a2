"""The files of OpenAI's discrete VAE, whose encoder FLAVA's have, too.

Source: https://github.com/openai/DALL-E at 5be4b23.
"""

from itertools import product
from typing import NamedTuple

from hfvlm.checkpoints.key_table import Row
from hfvlm.modules.dvae import GROUPS


class CodebookNames(NamedTuple):
    """What differs between OpenAI's names and transformers'."""

    block: str
    path: str
    weight: str
    bias: str


OPENAI = CodebookNames("group_{}.block_{}", "res_path", "w", "b")
TRANSFORMERS = CodebookNames("group_{}.group.block_{}", "res_path.path", "weight", "bias")


def codebook_rows(
    depth: int, names: CodebookNames = OPENAI, source: str = "", target: str = "", *, changed: bool = False
) -> list[Row]:
    """Return the rows of an encoder, or a decoder.

    Args:
        depth: blocks of a group.
        names: the file's.
        source: before its keys.
        target: before ours.
        changed: the first block changes the number of channels, too, as those of the other groups do.
    """
    rows = []
    for theirs, ours in ((names.weight, "weight"), (names.bias, "bias")):
        rows.append(Row(f"{source}blocks.input.{theirs}", f"{target}stem.{ours}"))
        rows.append(Row(f"{source}blocks.output.conv.{theirs}", f"{target}head.{ours}"))
        for group, block in product(range(GROUPS), range(depth)):
            there = f"{source}blocks.{names.block.format(group + 1, block + 1)}"
            here = f"{target}groups.{group}.{block}"
            rows.append(Row(f"{there}.{names.path}.conv_{{}}.{theirs}", f"{here}.conv{{}}.{ours}"))
            if not block and (group or changed):
                rows.append(Row(f"{there}.id_path.{theirs}", f"{here}.shortcut.{ours}"))
    return rows
