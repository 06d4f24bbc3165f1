"""What decoding has to know of a checkpoint's tokens; made once per engine."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from mmr5_runtime.prompt import PromptTokenizer
from mmr5_runtime.spec import ModelSpec
from mmr5_runtime.stopping.mask import PermutationMask
from mmr5_runtime.stopping.vocabulary import token_bytes


@dataclass(frozen=True, eq=False)
class Language:
    """``vocabulary[id]`` are the bytes a token adds to the text, ``encode`` turns text to ids."""

    encode: Callable[[str], list[int]]
    vocabulary: tuple[bytes, ...]
    mask: PermutationMask
    end_ids: frozenset[int]

    @classmethod
    def of(cls, tokenizer: PromptTokenizer, spec: ModelSpec, device: torch.device) -> Language:
        """The language of one checkpoint, its masks on ``device``."""
        vocabulary = token_bytes(tokenizer.tokenizer, spec.text.vocab_size)
        return cls(
            encode=tokenizer.text_ids,
            vocabulary=vocabulary,
            mask=PermutationMask(vocabulary, device),
            end_ids=frozenset(spec.eos_token_ids),
        )

    def list_rest(self, named: tuple[int, ...], missing: tuple[int, ...]) -> int:
        """Tokens of a canonical list after ``named``: the ids ``missing``, the close and the end.

        An estimate of what stopping early saves; the model may have written less, or on and on.
        """
        whole = self.encode(f"[{', '.join(map(str, (*named, *missing)))}]</answer>")
        return len(whole) + 1 - len(self.encode(f"[{', '.join(map(str, named))}"))
