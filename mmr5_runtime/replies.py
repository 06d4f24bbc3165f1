"""Greedy answers of one prompt, remembered token by token with their KV.

A greedy answer is a function of its prompt, so a request that repeats one, or asks for more of the
same list, goes on where the last one stopped. What is remembered hangs behind the prompt's last
page in the segment store as a chain of nodes: each holds the steps that one request added, and the
keys and values of all but the last of them, which was never read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mmr5_runtime.cursor import Cursor, Mark
from mmr5_runtime.reuse.chain import text_key
from mmr5_runtime.reuse.segments import Node, SegmentStore


@dataclass(frozen=True)
class Step:
    """One token of an answer: the log-probability of what it chose in the list, if it chose."""

    token: int
    logprob: float | None = None
    intervened: bool = False


@dataclass(frozen=True)
class Replay:
    """Remembered steps, and the nodes that hold their keys and values."""

    steps: tuple[Step, ...]
    nodes: tuple[Node, ...]

    def load(self, cursor: Cursor) -> None:
        """Put a cursor behind the last step but one."""
        tokens = [step.token for step in self.steps]
        for node in self.nodes:
            count = node.k.shape[2]
            cursor.load(node.k, node.v, tokens[:count], ())
            tokens = tokens[count:]


class Replies:
    """The answers to one prompt under one way of decoding."""

    def __init__(self, store: SegmentStore, prompt_key: bytes, parent: bytes, how: str) -> None:
        """``prompt_key`` names the whole prompt, ``parent`` the node of its last page.

        ``how`` spells out every option that can change a token of the answer.
        """
        self._store, self._parent = store, parent
        self._first = text_key(prompt_key, f"reply {how}", ())

    def recall(self) -> Replay | None:
        """All steps that are remembered, or None."""
        steps: list[Step] = []
        nodes: list[Node] = []
        for node in self._chain():
            steps += node.note  # type: ignore[arg-type]
            nodes.append(node)
        return Replay(tuple(steps), tuple(nodes)) if nodes else None

    def remember(self, steps: Sequence[Step], cursor: Cursor, prompt: Mark, cost_ms: float) -> None:
        """Keep those of ``steps`` that are new; the cursor stands behind at least all but one."""
        key, parent, loaded = self._first, self._parent, 0
        before: list[Step] = []
        for node in self._chain():
            key, parent = text_key(node.key, "reply", ()), node.key
            before += node.note  # type: ignore[arg-type]
            loaded += node.k.shape[2]
        known = len(before)
        read = cursor.mark.length - prompt.length
        end = min(read, len(steps) - 1)
        if known >= len(steps) or end <= loaded:
            return
        if [step.token for step in before] != [step.token for step in steps[:known]]:
            return  # two runs with drafts parted at a tie; nothing may be made of both
        k, v = cursor.arena.view(prompt.length + loaded, prompt.length + end)
        self._store.insert(key, parent, k, v, cost_ms, note=tuple(steps[known:]))

    def _chain(self) -> list[Node]:
        found, key = [], self._first
        while (node := self._store.peek(key)) is not None:
            found.append(node)
            key = text_key(node.key, "reply", ())
        return found
