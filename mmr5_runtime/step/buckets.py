"""Sizes of a decode step, rounded up: each bucket is one graph.

A step is computed for ``sequences`` x ``tokens`` rows that look back at ``span`` keys at most. What
is added by rounding up is harmless: a slot without a sequence is skipped, and a padded token comes
after the asked ones, which never see it, at places of the arena that are not committed.
"""

from __future__ import annotations

from dataclasses import dataclass

from mmr5_kernels.sequences import COLUMNS

SEQUENCES = (1, 2, 4, 8)
TOKENS = (1, 4, 8)
MAX_ROWS = 64


@dataclass(frozen=True, order=True)
class Bucket:
    """``sequences`` B, ``tokens`` T of each, and ``span``: keys that any row may look back at."""

    sequences: int
    tokens: int
    span: int

    @property
    def rows(self) -> int:
        """Rows of every linear: B x T."""
        return self.sequences * self.tokens

    @property
    def input_size(self) -> int:
        """Numbers a step is told: an id and a position per row, and the table of sequences."""
        return 2 * self.rows + COLUMNS * self.sequences

    def __str__(self) -> str:
        return f"{self.tokens} tokens of {self.sequences} sequences of at most {self.span} tokens"


def pick(sequences: int, tokens: int, longest: int, chunk: int) -> Bucket:
    """The smallest bucket for ``tokens`` more of each of ``sequences``, ``longest`` tokens at most.

    ``span`` is ``chunk`` times a power of two. Padded tokens are counted, so that their rows too
    stay within it. Raises ``ValueError`` for more than 8 sequences or tokens, or for none.
    """
    rounded_sequences = _round_up(sequences, SEQUENCES, "sequences")
    rounded_tokens = _round_up(tokens, TOKENS, "tokens")
    chunks = -(-(longest + rounded_tokens) // chunk)
    return Bucket(rounded_sequences, rounded_tokens, chunk << (chunks - 1).bit_length())


def spans(longest: int, chunk: int) -> list[int]:
    """Every span up to the one that holds ``longest`` tokens, ascending."""
    found = [chunk]
    while found[-1] < longest:
        found.append(2 * found[-1])
    return found


def _round_up(count: int, sizes: tuple[int, ...], name: str) -> int:
    if not 1 <= count <= sizes[-1]:
        raise ValueError(f"a decode step takes 1 to {sizes[-1]} {name}, not {count}.")
    return next(size for size in sizes if size >= count)
