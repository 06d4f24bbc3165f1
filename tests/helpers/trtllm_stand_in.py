"""A TensorRT-LLM that computes with our own engine, behind the signatures read in its sources.

It is given exactly the keywords that the real package would be given, and looks at nothing else:
image tokens are rows of the prompt table, rotations come out of the rotary table, a token behind
the prompt turns by its number plus the delta, and blocks of keys and values are shared between
prompts by token ids and extra ids. A wrong id, table or delta therefore gives another answer.

Its LLM API has the habits that were found in the sources: a prompt with pictures is decoded and
tokenized again, keys it does not expect there are dropped, texts to stop at are tokenized only
where no end token is given, and old versions ignore some options.
"""

from __future__ import annotations

import inspect
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mmr5_runtime.engine import Engine
from mmr5_runtime.image import PixelBudget, preprocess
from mmr5_runtime.model import Model
from mmr5_runtime.prompt import PromptTokenizer
from mmr5_runtime.rope import Grid, TextRotary, mrope_positions
from mmr5_runtime.sampler import Sampler, SamplingParams

BLOCK = 32  # tokens of a shared block
SIGNATURES = Path(__file__).parents[1] / "golden" / "trtllm_signatures.json"
Block = tuple[tuple[int, int], ...]


@cache
def signatures() -> Mapping[str, Mapping[str, Any]]:
    found: Mapping[str, Mapping[str, Any]] = json.loads(SIGNATURES.read_text())["callables"]
    return found


def bind(name: str, keywords: Mapping[str, object]) -> None:
    """TypeError unless the callable ``name`` takes ``keywords``."""
    given = signatures()[name]
    empty, kinds = inspect.Parameter.empty, inspect.Parameter
    parameters = [
        inspect.Parameter(
            parameter,
            kinds.POSITIONAL_OR_KEYWORD if parameter in given["positional"] else kinds.KEYWORD_ONLY,
            default=empty if parameter in given["required"] else None,
        )
        for parameter in (*given["positional"], *given["keyword"])
    ]
    inspect.Signature(parameters).bind(**keywords)


class TableRotary(nn.Module):
    """Rotations by token number: the table's for the prompt, by number and delta behind it."""

    def __init__(self, own: TextRotary, table: Tensor, delta: int, prompt: int) -> None:
        super().__init__()
        self._own, self._delta, self._prompt = own, delta, prompt
        self._table = table.view(-1, len(own.inv_freq), 2)

    def forward(self, numbers: Tensor) -> tuple[Tensor, Tensor]:
        cos, sin = self._own(numbers + self._delta)
        inside = numbers[0] < self._prompt
        rows = self._table[numbers[0][inside]]
        cos[inside], sin[inside] = rows[..., 0], rows[..., 1]
        return cos, sin


class Played:
    """Decodes greedily, or as the sampling keywords say, with the model of ``engine``."""

    def __init__(self, engine: Engine) -> None:
        assert isinstance(engine.model, Model)
        self.model, self.device = engine.model, engine.device
        self.blocks: dict[Block, tuple[Tensor, Tensor]] = {}
        self.reused = 0  # tokens that were not read, as a block had them
        self.calls: list[dict[str, Any]] = []
        self.loaded: list[dict[str, Any]] = []
        self.shut_down = 0

    @torch.inference_mode()
    def decode(
        self,
        embeds: Tensor,
        rotary: nn.Module,
        names: Sequence[tuple[int, int]],
        limit: int,
        sampler: Sampler,
        words: Sequence[Sequence[int]],
        end: int,
    ) -> tuple[list[int], str]:
        """New tokens behind a prompt of ``embeds`` [T, hidden], and why there are no more.

        ``names`` tell blocks apart.
        """
        model, total = self.model, len(embeds)
        arena = model.new_arena(total + limit)
        known = 0
        while known + BLOCK < total and tuple(names[: known + BLOCK]) in self.blocks:
            arena.load(*self.blocks[tuple(names[: known + BLOCK])])
            known += BLOCK
        self.reused += known
        written: list[int] = []
        with self._turning(rotary):
            numbers = torch.arange(total).expand(3, -1)
            hidden = model.read(embeds[known:], numbers[:, known:], [arena], [total - known])
            for start in range(0, total - BLOCK + 1, BLOCK):
                k, v = arena.view(start, start + BLOCK)
                self.blocks.setdefault(tuple(names[: start + BLOCK]), (k.clone(), v.clone()))
            while len(written) < limit:
                token = sampler.pick(model.logits(hidden[-1:])[0])
                if token == end:
                    return written, "stop"
                written.append(token)
                if any(written[-len(word) :] == list(word) for word in words):
                    return written, "stop"
                number = torch.full((3, 1), total + len(written) - 1)
                hidden = model.read(model.embed(torch.tensor([token])), number, [arena], [1])
        return written, "length"

    @contextmanager
    def _turning(self, rotary: nn.Module) -> Any:
        own = self.model.decoder.rotary
        self.model.decoder.rotary = rotary  # type: ignore[assignment]
        try:
            yield
        finally:
            self.model.decoder.rotary = own

    def sampler(self, ids: Sequence[int], keywords: Mapping[str, Any], seed: str) -> Sampler:
        """As the sampling keywords say; TensorRT-LLM draws with seed 0 where none is given."""
        params = SamplingParams(
            temperature=0.0 if keywords["top_k"] == 1 else keywords["temperature"],
            top_k=keywords["top_k"],
            top_p=keywords.get("top_p", 1.0),
            repetition_penalty=keywords.get("repetition_penalty", 1.0),
            seed=keywords.get(seed, 0),
        )
        size = self.model.spec.text.vocab_size
        return Sampler(params, [token for token in ids if token < size], size, self.device)


class PlayedModelRunner:
    """``ModelRunnerCpp``."""

    played: Played

    @classmethod
    def from_dir(cls, **keywords: Any) -> PlayedModelRunner:
        bind("ModelRunnerCpp.from_dir", keywords)
        cls.played.loaded.append(keywords)
        assert (Path(keywords["engine_dir"]) / "rank0.engine").is_file()
        return cls()

    def generate(self, **keywords: Any) -> dict[str, Tensor]:
        bind("ModelRunnerCpp.generate", keywords)
        played, [ids] = self.played, keywords["batch_input_ids"]
        played.calls.append(keywords)
        [extra], [table] = keywords["input_token_extra_ids"], keywords["prompt_table"]
        model, vocabulary = played.model, played.model.spec.text.vocab_size
        fake = ids >= vocabulary
        embeds = model.embed(torch.where(fake, 0, ids).long())
        embeds[fake] = table[(ids[fake] - vocabulary).long()].to(embeds)
        mrope = keywords["mrope_params"]
        rotary = TableRotary(
            model.decoder.rotary,
            mrope.mrope_rotary_cos_sin[0],
            int(mrope.mrope_position_deltas[0, 0]),
            len(ids),
        )
        prompt = ids.tolist()
        words = (keywords["stop_words_list"] or [[]])[0]
        new, _ = played.decode(
            embeds,
            rotary,
            list(zip(prompt, extra, strict=True)),
            keywords["max_new_tokens"],
            played.sampler(prompt, keywords, "random_seed"),
            words,
            keywords["end_id"],
        )
        # Prompt and answer, filled up with the end token.
        whole = [*prompt, *new]
        filled = [*whole, *[keywords["end_id"]] * 7]
        return {
            "output_ids": torch.tensor([[filled]], dtype=torch.int32),
            "sequence_lengths": torch.tensor([[len(whole)]], dtype=torch.int32),
        }


class PlayedLLM:
    """``LLM``: one image token per page in the prompt, and pages that it encodes itself."""

    played: Played
    settings: Mapping[str, Any]  # keyword arguments of image.preprocess
    tokenizer: PromptTokenizer
    ignores: frozenset[str]  # of the sampling options

    def __init__(self, **keywords: Any) -> None:
        bind("LLM", keywords)
        self.played.loaded.append(keywords)

    def shutdown(self) -> None:
        self.played.shut_down += 1

    def generate(self, **keywords: Any) -> SimpleNamespace:
        bind("LLM.generate", keywords)
        inputs, sampling = keywords["inputs"], dict(keywords["sampling_params"])
        bind("TokensPrompt", inputs)
        played, model = self.played, self.played.model
        played.calls.append(inputs | {"sampling": sampling})
        if sampling.get("end_id") is not None and sampling["stop"]:
            raise RuntimeError("SamplingParams.stop is not processed by tokenizer")
        for name in self.ignores:
            sampling.pop(name, None)
        text = self.tokenizer.decode(inputs["prompt_token_ids"], skip_special=False)
        kept = ("multi_modal_data", "mm_processor_kwargs")
        inputs = {"prompt": text, **{name: inputs[name] for name in kept}}
        limits = inputs["mm_processor_kwargs"]
        budget = PixelBudget(limits["min_pixels"], limits["max_pixels"])
        pages = [
            preprocess(image, budget, **self.settings)
            for image in inputs["multi_modal_data"]["image"]
        ]
        image_id, waiting = model.spec.image_token_id, iter(pages)
        ids: list[int] = []
        for token in self.tokenizer.text_ids(inputs["prompt"]):
            ids += [token] * (next(waiting).num_tokens if token == image_id else 1)
        assert next(waiting, None) is None
        embeds = model.embed(torch.tensor(ids))
        encoded = [model.encode_page(page.pixel_values, page.grid) for page in pages]
        embeds[torch.tensor(ids) == image_id] = torch.cat(encoded)
        grids: list[Grid] = [page.grid for page in pages]
        places, behind = mrope_positions(ids, grids, model.spec)
        own = model.decoder.rotary
        rotary = TableRotary(
            own, torch.stack(own(places), dim=-1).flatten(), behind - len(ids), len(ids)
        )
        names = [(len(played.calls), place) for place in range(len(ids))]  # nothing is shared
        # Every text is tokenized alone, which is how the package makes its stop words.
        words = [self.tokenizer.text_ids(text) for text in sampling["stop"] or ()]
        words += [[token] for token in sampling["stop_token_ids"] or ()]
        new, reason = played.decode(
            embeds,
            rotary,
            names,
            sampling["max_tokens"],
            played.sampler(ids, sampling, "seed"),
            words,
            model.spec.eos_token_ids[0],  # the tokenizer's own
        )
        return SimpleNamespace(outputs=[SimpleNamespace(token_ids=new, finish_reason=reason)])


def install(
    monkeypatch: pytest.MonkeyPatch,
    played: Played,
    tokenizer: PromptTokenizer,
    settings: Mapping[str, Any],
    version: str = "1.2.1",
) -> None:
    """Makes ``import tensorrt_llm`` find the stand-in, for an engine of ``tokenizer``.

    ``settings`` are the keyword arguments of ``image.preprocess``.
    """
    package, runtime, layers, llmapi = (
        ModuleType(name)
        for name in (
            "tensorrt_llm",
            "tensorrt_llm.runtime",
            "tensorrt_llm.layers",
            "tensorrt_llm.llmapi",
        )
    )

    def keeps(name: str, make: Callable[..., Any]) -> Callable[..., Any]:
        def call(**keywords: Any) -> Any:
            bind(name, keywords)
            return make(**keywords)

        return call

    class Runner(PlayedModelRunner):
        pass

    class Api(PlayedLLM):
        pass

    Runner.played = Api.played = played
    Api.tokenizer, Api.settings = tokenizer, settings
    old = version.startswith(("1.2", "1.3"))
    Api.ignores = frozenset(("seed", "repetition_penalty")) if old else frozenset()
    contents: dict[ModuleType, dict[str, Any]] = {
        package: {
            "__version__": version,
            "LLM": Api,
            "SamplingParams": keeps("SamplingParams", dict),
        },
        runtime: {"ModelRunnerCpp": Runner},
        layers: {"MropeParams": keeps("MropeParams", SimpleNamespace)},
        llmapi: {"KvCacheConfig": keeps("KvCacheConfig", dict)},
    }
    for module, values in contents.items():
        for name, value in values.items():
            setattr(module, name, value)
        monkeypatch.setitem(sys.modules, module.__name__, module)
