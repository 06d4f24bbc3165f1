"""The model's own answers to calibration samples, generated once by the engine that will run them.

Calibration text has to be what the model writes itself: the reasoning it decodes is the larger half
of a rerank, and nobody else's text meets its weights the same way.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path

import torch
from tokenizers import Tokenizer

from mmr5_export.checkpoint import Checkpoint
from mmr5_export.generator import Generator
from mmr5_export.response_cache import Response, ResponseCache
from mmr5_export.samples import DataError, Sample, of_sample, page_sha256
from mmr5_runtime.answer import parse_answer
from mmr5_runtime.cursor import Cursor
from mmr5_runtime.deadline import Deadline
from mmr5_runtime.decoding import Decoding
from mmr5_runtime.image import preprocess
from mmr5_runtime.loading import LoadedEngine
from mmr5_runtime.options import DEFAULT_MAX_NEW_TOKENS, RerankOptions
from mmr5_runtime.pages import open_page
from mmr5_runtime.planning import plan_context
from mmr5_runtime.prompt import PromptTokenizer
from mmr5_runtime.sampler import Sampler, SamplingParams
from mmr5_runtime.timing import Timings

Progress = Callable[[str, int, int], None]
"""Called with the stage "respond", how many samples have their response, and their total."""


def _ignore(stage: str, done: int, total: int) -> None:
    return None


class Responder:
    """Answers samples greedily with a loaded engine, token by token as ``Reranker`` does.

    It honours the checkpoint's ``generation_config.json`` in the same way. The difference is that
    token ids are kept: the text of an answer may tokenize differently from how it was generated.
    """

    def __init__(self, loaded: LoadedEngine, max_new_tokens: int = DEFAULT_MAX_NEW_TOKENS) -> None:
        self._loaded = loaded
        self._max_new_tokens = max_new_tokens

    def respond(self, sample: Sample) -> Response:
        """The model's answer to ``sample``.

        Raises :class:`DataError` naming the sample when a page cannot be read or the context
        cannot hold its pages.
        """
        loaded, engine = self._loaded, self._loaded.engine
        with of_sample(sample):
            images = [open_page(page, index=index) for index, page in enumerate(sample.pages)]
            plan = plan_context(
                loaded.tokenizer,
                engine.spec.vision,
                loaded.context,
                sample.query,
                sample.pages,
                [image.size for image in images],
                loaded.budget,
                self._max_new_tokens,
            )
        cursor = Cursor(engine, len(plan.token_ids) + plan.max_new_tokens)
        cursor.read(plan.segments.head)
        for image, ids in zip(images, plan.segments.pages, strict=True):
            patched = preprocess(image, loaded.budget, **loaded.image_settings)
            embeddings = engine.encode_page(patched.pixel_values, patched.grid)
            cursor.read(ids, [embeddings], [patched.grid])
        params = SamplingParams.from_generation_config(
            loaded.generation_config, temperature=0.0, seed=0
        )
        decoding = Decoding(
            loaded.language,
            cursor,
            cursor.logits(cursor.read(plan.segments.tail)),
            Sampler(params, plan.token_ids, engine.spec.text.vocab_size, engine.device),
            len(images),
            # What the model writes when nothing holds it back.
            RerankOptions(stop="eos", constrain=False),
            plan.max_new_tokens,
            Timings(engine.device),
            Deadline(None),
        )
        text = loaded.tokenizer.decode(list(decoding))
        answer = parse_answer(text, len(images))
        return Response(
            tuple(decoding.answer.tokens),
            text,
            decoding.answer.stop_reason,
            answer.order,
            answer.status,
        )


class GivenResponses:
    """Turns responses that come with the data into what the model would have decoded."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        """Raises :class:`EngineError` when the checkpoint has no usable tokenizer."""
        path = checkpoint.folder / "tokenizer.json"
        PromptTokenizer.from_file(path)  # its checks and messages
        self._tokenizer = Tokenizer.from_file(str(path))
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        added = self._tokenizer.get_added_tokens_decoder().values()
        self._special = [token.content for token in added if token.special]
        self._end = checkpoint.spec.eos_token_ids[0]

    def respond(self, sample: Sample, text: str) -> Response:
        """``text`` as the response to ``sample``, the end token behind it.

        Raises :class:`DataError` when it holds a special token, which would be read as markup.
        """
        if reserved := next((token for token in self._special if token in text), None):
            raise DataError(
                f"{sample.name}: the response contains the reserved token {reserved}; remove it, "
                "the end token is added by itself."
            )
        ids = self._tokenizer.encode(text, add_special_tokens=False).ids
        answer = parse_answer(text, len(sample.pages))
        return Response((*ids, self._end), text, "eos", answer.order, answer.status)


def missing_answers(
    samples: Sequence[Sample], generator: Generator, cache: Path | None = None
) -> int:
    """How many of ``samples`` :func:`respond` would have to generate an answer for.

    Those that neither come with one nor have one of this very ``generator`` in the file ``cache``.
    Raises :class:`ExportError` for a cache that cannot be used, :class:`DataError` for a page that
    cannot be read.
    """
    open_ones = [sample for sample in samples if sample.response is None]
    if not open_ones:
        return 0
    known, key = ResponseCache(cache), _keys(generator)
    return sum(known.get(key(sample)) is None for sample in open_ones)


def _keys(generator: Generator) -> Callable[[Sample], str]:
    """Key of a sample's answer: of all that decides it, and not of where its pages lie."""
    identity, page_hash = generator.identity(), lru_cache(maxsize=None)(page_sha256)

    def key(sample: Sample) -> str:
        content = [identity, sample.query, [page_hash(page) for page in sample.pages]]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()

    return key


def respond(
    samples: Sequence[Sample],
    generator: Generator,
    cache: Path | None = None,
    progress: Progress = _ignore,
) -> list[Response]:
    """A response per sample: its own, else the one in the file ``cache``, else a generated one.

    The model is loaded only when something has to be generated, and freed before this returns. An
    interrupted run keeps what it generated so far in ``cache``. Raises :class:`DataError` naming
    the sample that cannot be answered, :class:`ExportError` for a cache that cannot be used.
    """
    known, key_of = ResponseCache(cache), _keys(generator)
    given = GivenResponses(generator.checkpoint)
    responder: Responder | None = None
    responses = []
    for done, sample in enumerate(samples):
        progress("respond", done, len(samples))
        if sample.response is not None:
            responses.append(given.respond(sample, sample.response))
            continue
        key = key_of(sample)
        response = known.get(key)
        if response is None:
            if responder is None:
                responder = Responder(generator.load(), generator.max_new_tokens)
            response = responder.respond(sample)
            known.put(key, response)
        responses.append(response)
    progress("respond", len(samples), len(samples))
    del responder
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
    return responses
