"""Language models that write what a test wants, behind the real cursor, arena and decode loop.

A :class:`Script` is a model's opinion: logits as a function of what was written so far, text that
others forced into it included. :class:`TokenCursor` is a cursor whose arena holds, as keys and
values, the tokens themselves, and which asks the script about what lies in the arena: a cursor that
was rewound, forked or loaded wrongly gives other logits. :func:`opinionated` runs a real model and
replaces nothing but its logits.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property
from importlib import resources

import torch
from tokenizers import Tokenizer
from torch import Tensor

from helpers.qwen_ranks import bpe, vocabulary
from mmr5_runtime.batching import Seat
from mmr5_runtime.cursor import Cursor, Mark
from mmr5_runtime.deadline import Deadline
from mmr5_runtime.engine import Engine
from mmr5_runtime.kvcache import KVArena
from mmr5_runtime.language import Language
from mmr5_runtime.model import MAX_DECODE_TOKENS
from mmr5_runtime.rope import Grid
from mmr5_runtime.spec import TextSpec
from mmr5_runtime.stopping.mask import PermutationMask
from mmr5_runtime.stopping.vocabulary import token_bytes

PROMPT = (7, 7, 7)  # what a TokenCursor has read before the answer
LIST_OPEN = b"<answer>["
_TEXT = TextSpec(8, 4, 1, 2, 1, 4, 4, 1e-6, 1e4, (1, 1, 0), 4096, False)


@cache
def qwen_language() -> Language:
    """The true vocabulary; its end token is `<|im_end|>`."""
    whole = (*vocabulary(), b"", b"", b"")
    mask = PermutationMask(whole, torch.device("cpu"))
    return Language(bpe, whole, mask, frozenset({len(whole) - 1}))


@cache
def mini_language() -> Language:
    """The vocabulary of the embedded checkpoint, which is small."""
    file = resources.files("mmr5_runtime") / "assets" / "mini" / "tokenizer.json"
    tokenizer = Tokenizer.from_str(file.read_text(encoding="utf-8"))
    whole = token_bytes(tokenizer, tokenizer.get_vocab_size())
    end = tokenizer.token_to_id("<|im_end|>")
    assert end is not None
    return Language(
        encode=lambda text: list(tokenizer.encode(text, add_special_tokens=False).ids),
        vocabulary=whole,
        mask=PermutationMask(whole, torch.device("cpu")),
        end_ids=frozenset({end}),
    )


@dataclass(frozen=True)
class Script:
    """Wants to write ``tokens`` and then to end, or to start again where ``endless``.

    Text forced up to a list makes it go on with its own list; any other token that it did not want
    stands for the one it wanted. What else it considers is random but a function of what was
    written. ``certainty`` is by how much the wanted logit stands out of noise of spread 1;
    ``unsure`` takes that away from the first id of a list without reasoning.
    """

    language: Language
    tokens: tuple[int, ...]
    certainty: float = 20.0
    endless: bool = False
    unsure: bool = False
    seed: int = 0

    @classmethod
    def of(cls, language: Language, text: str) -> Script:
        return cls(language, tuple(language.encode(text)))

    def but(self, **changes: float | bool) -> Script:
        return replace(self, **changes)  # type: ignore[arg-type]

    @cached_property
    def _list(self) -> int:
        """Where the first list begins in ``tokens``; behind them if there is none."""
        text = b""
        for index, token in enumerate(self.tokens):
            text += self.language.vocabulary[token]
            if text.endswith(LIST_OPEN):
                return index + 1
        return len(self.tokens)

    def wants(self, written: Sequence[int]) -> int:
        """The likeliest token behind ``written``."""
        place, faithful, text = 0, True, b""
        for token in written:
            text += self.language.vocabulary[token]
            faithful &= place < len(self.tokens) and token == self.tokens[place]
            place += 1
            if not faithful and text.endswith(LIST_OPEN):
                place, faithful = self._list, True
        if self.endless:
            place %= len(self.tokens)
        return self.tokens[place] if place < len(self.tokens) else min(self.language.end_ids)

    def logits(self, written: Sequence[int]) -> Tensor:
        """fp32 logits [V] behind ``written``."""
        rng = random.Random(f"{self.seed} {list(written)}")
        size = len(self.language.vocabulary)
        considered = [*_digits(self.language), *(rng.randrange(size) for _ in range(40))]
        row = torch.full((size,), -30.0)
        row[considered] = torch.tensor([rng.gauss(0.0, 1.0) for _ in considered])
        text = b"".join(self.language.vocabulary[token] for token in written)
        torn = self.unsure and text == b"<think></think>" + LIST_OPEN
        if torn:
            row[_digits(self.language)] = self.certainty
        else:
            row[self.wants(written)] = self.certainty
        return row


@cache
def _digits(language: Language) -> list[int]:
    return [language.vocabulary.index(b"%d" % digit) for digit in range(10)]


class Said:
    """What a script says, each of it made up once."""

    def __init__(self, script: Script) -> None:
        self.language = script.language
        self._script = script
        self._rows: dict[tuple[int, ...], Tensor] = {}

    def logits(self, written: Sequence[int]) -> Tensor:
        """:meth:`Script.logits`; not to be changed."""
        key = tuple(written)
        if key not in self._rows:
            self._rows[key] = self._script.logits(written)
        return self._rows[key]


class TokenCursor(Cursor):
    """Stands behind :data:`PROMPT`; the keys and values of a token are its id."""

    def __init__(self, script: Script | Said, capacity: int) -> None:
        self.arena = KVArena(_TEXT, capacity + len(PROMPT))
        self.position = self.steps = self.launched = 0
        self._script = script
        for token in PROMPT:
            self._append(token)

    @property
    def written(self) -> list[int]:
        """The tokens behind the prompt, out of the arena."""
        keys, values = self.arena.view(len(PROMPT), self.arena.length)
        assert torch.equal(keys, values)
        ids: list[int] = keys[0, 0, :, 0].long().tolist()
        return ids

    def prompt_logits(self) -> Tensor:
        return self._script.logits([])

    def _append(self, token: int) -> None:
        row = torch.full((1, 1, 1, 4), float(token))
        self.arena.load(row, row)
        self.position += 1

    def load(self, k: Tensor, v: Tensor, token_ids: Sequence[int], grids: Sequence[Grid]) -> None:
        assert k[0, 0, :, 0].long().tolist() == list(token_ids)
        self.arena.load(k, v)
        self.position += len(token_ids)

    def step(self, token_ids: Sequence[int] | Tensor) -> Tensor:
        assert len(token_ids) and self.position == self.arena.length
        rows = []
        for token in torch.as_tensor(token_ids).tolist():
            self._append(token)
            rows.append(self._script.logits(self.written))
        passes = -(-len(token_ids) // MAX_DECODE_TOKENS)
        self.steps += passes
        self.launched += passes
        return torch.stack(rows)


def opinionated(script: Callable[[Cursor], Script]) -> type[Cursor]:
    """A class of cursors that read with their model and then say what ``script`` would.

    ``script`` is asked once per cursor, when the prompt has been read.
    """

    class Opinionated(Cursor):
        def __init__(self, engine: Engine, capacity: int, seat: Seat | None = None) -> None:
            super().__init__(engine, capacity, seat)
            self.tokens: list[int] = []

        def rewind(self, mark: Mark) -> None:
            super().rewind(mark)
            del self.tokens[mark.length :]

        def read(
            self,
            token_ids: Sequence[int],
            embeddings: Sequence[Tensor] = (),
            grids: Sequence[Grid] = (),
        ) -> Tensor:
            self.tokens += token_ids
            return super().read(token_ids, embeddings, grids)

        def load(
            self, k: Tensor, v: Tensor, token_ids: Sequence[int], grids: Sequence[Grid]
        ) -> None:
            self.tokens += token_ids
            super().load(k, v, token_ids, grids)

        def logits(self, hidden: Tensor) -> Tensor:
            self.script, self.prompt = script(self), len(self.tokens)
            return self._say(super().logits(hidden))

        def step(self, token_ids: Sequence[int] | Tensor) -> Tensor:
            real = super().step(token_ids)
            rows = []
            for token, row in zip(torch.as_tensor(token_ids).tolist(), real, strict=True):
                self.tokens.append(token)
                rows.append(self._say(row))
            assert len(self.tokens) == self.arena.length
            return torch.stack(rows)

        def _say(self, real: Tensor) -> Tensor:
            said = self.script.logits(self.tokens[self.prompt :])
            padding = len(real) - len(said)  # a model may have more rows than its tokenizer ids
            return torch.cat([said, said.new_full((padding,), -30.0)])

    return Opinionated


class StepDeadline(Deadline):
    """Time that passes by steps: it is over after ``steps`` of them, each as slow as the other."""

    def __init__(self, steps: int) -> None:
        super().__init__(None)
        self._left = steps

    def observe(self, seconds: float) -> None:
        self._left -= 1

    def passed(self, steps_needed: int = 0) -> bool:
        return self._left - steps_needed <= 0
