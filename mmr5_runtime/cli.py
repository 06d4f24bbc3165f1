"""``mmr5-rerank``: rerank page images for a question from the command line."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TextIO, cast, get_args

import torch

from mmr5_runtime.backends import BackendName
from mmr5_runtime.capacity import KVFormat
from mmr5_runtime.compute import Kernels, Prefill
from mmr5_runtime.options import (
    DEFAULT_MAX_NEW_TOKENS,
    ImageKV,
    Layout,
    RerankKeywords,
    Stop,
    ThinkMode,
)
from mmr5_runtime.pages import DEFAULT_MAX_IMAGE_PIXELS, Page, describe
from mmr5_runtime.pdf import count_pdf_pages
from mmr5_runtime.reranker import Reranker
from mmr5_runtime.reuse.config import CacheConfig
from mmr5_runtime.types import (
    CacheUse,
    Mmr5Error,
    PageError,
    PlanName,
    ReasoningDelta,
    RequestError,
    RerankResult,
)

# Named as the options of a request are.
_REQUEST_OPTIONS = (
    "max_new_tokens", "temperature", "seed", "stop", "think", "deadline_ms", "samples", "draft",
    "min_pixels", "max_pixels", "plan", "window", "stride", "anchors", "layout", "image_kv",
    "answer",
)  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code: 0 done, 1 an error in one line on stderr, 2 usage."""
    options = _parser().parse_intermixed_args(argv)
    try:
        return _run(options)
    except Mmr5Error as error:
        print(f"mmr5-rerank: error: {error}", file=sys.stderr)
        return 1
    except BrokenPipeError:  # the reader of stdout has left; say nothing, not even at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        print(f"mmr5-rerank: error: {error}; check the file and its permissions", file=sys.stderr)
        return 1
    except (MemoryError, torch.OutOfMemoryError):
        print(
            "mmr5-rerank: error: the model or the pages do not fit into memory; lower "
            "--max-pixels, pass fewer pages or take --device cpu",
            file=sys.stderr,
        )
        return 1
    except KeyboardInterrupt:
        print("mmr5-rerank: interrupted", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="mmr5-rerank",
        description="Rank page images by how well they answer a question.",
    )
    parser.add_argument("query", help="the question")
    parser.add_argument("pages", nargs="*", help="page images: paths or data URIs")
    parser.add_argument("--engine", required=True, help="folder written by mmr5-export")
    parser.add_argument("--pdf", action="append", default=[], help="add all pages of a PDF")
    parser.add_argument("--top-k", type=int, help="show only the best K pages")
    parser.add_argument("--min-pixels", type=int, help="least pixels per page after resizing")
    parser.add_argument("--max-pixels", type=int, help="most pixels per page after resizing")
    parser.add_argument(
        "--max-image-pixels",
        type=int,
        default=DEFAULT_MAX_IMAGE_PIXELS,
        help="refuse larger images before they are decoded (default: %(default)s)",
    )
    _add_decoding(parser.add_argument_group("decoding"))
    _add_reuse(parser.add_argument_group("long lists and reuse"))
    _add_compute(parser.add_argument_group("device"))
    parser.add_argument("--verify", action="store_true", help="check the SHA-256 of every file")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    parser.add_argument("--stream", action="store_true", help="show the reasoning as it comes")
    return parser


def _add_compute(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    group.add_argument(
        "--backend",
        choices=get_args(BackendName),
        default="auto",
        help="what runs the engine: auto is onnxruntime for a quantized one with graphs on a CPU",
    )
    group.add_argument("--dtype", default="auto", help="auto, bfloat16 or float32")
    group.add_argument(
        "--kernels",
        choices=get_args(Kernels),
        default="auto",
        help="torch alone, also Triton kernels, also CUDA ones, or those proven here (default)",
    )
    group.add_argument(
        "--prefill",
        choices=get_args(Prefill),
        default="exact",
        help="read prompts with an 8-bit copy of int4 weights: approximate, meant for speed",
    )
    group.add_argument(
        "--kv",
        choices=get_args(KVFormat),
        default="bf16",
        help="int8 keeps keys and values in 8 bits: half the memory, approximate",
    )
    group.add_argument(
        "--graphs",
        action=argparse.BooleanOptionalAction,
        help="record decode steps as CUDA graphs (default: where the Triton kernels run them)",
    )


def _add_decoding(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--max-new-tokens", type=int, default=DEFAULT_MAX_NEW_TOKENS)
    group.add_argument("--temperature", type=float, default=0.0, help="0 is greedy (default)")
    group.add_argument("--seed", type=int, help="makes sampling repeatable")
    group.add_argument(
        "--stop",
        choices=get_args(Stop),
        default="determined",
        help="when nothing can change the order (default), at </answer>, or at the end token",
    )
    group.add_argument(
        "--think",
        type=_think,
        default="full",
        help=f"{', '.join(get_args(ThinkMode))}, or the most tokens of reasoning (default: full)",
    )
    group.add_argument("--deadline-ms", type=float, help="answer with what is known by then")
    group.add_argument("--samples", type=int, help="mean order of so many seeded samples")
    group.add_argument("--draft", action="store_true", help="guess ahead and verify")


def _add_reuse(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--plan", choices=("auto", *get_args(PlanName)), default="auto")
    group.add_argument("--window", type=int, help="pages per prompt (default: 20, or what fits)")
    group.add_argument("--stride", type=int, help="how far a sliding window moves")
    group.add_argument("--anchors", type=int, help="pages that head every anchored window")
    group.add_argument("--layout", choices=get_args(Layout), default="reference")
    group.add_argument("--image-kv", choices=get_args(ImageKV), default="exact")
    group.add_argument("--answer", action="store_true", help="with --plan cascade: answer too")
    group.add_argument("--profile", help="prompts to use instead of the engine's")
    group.add_argument("--cache-dir", help="folder that keeps page embeddings between runs")


def _think(text: str) -> ThinkMode | int:
    if text in get_args(ThinkMode):
        return cast(ThinkMode, text)
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is neither {', '.join(get_args(ThinkMode))} nor a number of tokens"
        ) from None


def _run(options: argparse.Namespace) -> int:
    pages: list[Page] = list(options.pages)
    for pdf in options.pdf:
        try:
            count = count_pdf_pages(Path(pdf))
        except PageError as error:
            raise PageError(f"--pdf {pdf}: {error}") from error
        pages += [(pdf, number) for number in range(1, count + 1)]
    if not pages:
        raise RequestError("no pages were given; add page images or --pdf FILE.")
    with Reranker.load(
        options.engine,
        options.device,
        dtype=options.dtype,
        max_image_pixels=options.max_image_pixels,
        verify_hashes=options.verify,
        cache=CacheConfig(disk=options.cache_dir),
        profile=options.profile,
        kernels=options.kernels,
        prefill=options.prefill,
        kv=options.kv,
        graphs=options.graphs,
        backend=options.backend,
    ) as reranker:
        backend = reranker.info.backend
        result = _consume(reranker, options, pages)
    if options.json:
        print(json.dumps(as_json(result), ensure_ascii=False))
    else:
        _print_result(result, pages, backend, sys.stdout, with_reasoning=not options.stream)
    return 0


def _consume(
    reranker: Reranker, options: argparse.Namespace, pages: Sequence[Page]
) -> RerankResult:
    """Run the request; with --stream the reasoning goes to stdout, or stderr beside --json."""
    out = sys.stderr if options.json else sys.stdout
    asked = cast(RerankKeywords, {name: getattr(options, name) for name in _REQUEST_OPTIONS})
    for event in reranker.stream(options.query, pages, options.top_k, **asked):
        if isinstance(event, ReasoningDelta):
            if options.stream:
                out.write(event.text)
                out.flush()
        else:
            if options.stream:
                out.write("\n\n")
            return event
    raise AssertionError("a stream ends with its result")


def as_json(result: RerankResult) -> dict[str, Any]:
    """The result as one JSON-ready document, with ``top`` and ``scores`` spelled out."""
    document = dataclasses.asdict(result)
    derived = {"top": result.top, "ranking": result.ranking, "scores": result.scores}
    return {**document, **derived, "score_type": result.score_type}


def _print_result(
    result: RerankResult,
    pages: Sequence[Page],
    backend: str,
    out: TextIO,
    *,
    with_reasoning: bool,
) -> None:
    if with_reasoning:
        out.write(f"Reasoning\n{_indented(result.reasoning)}\n\n")
    out.write("Ranking\n")
    for place, index in enumerate(result.top, start=1):
        out.write(f"  {place:>2}. {describe(pages[index], index)}\n")
    usage, cache, plan = result.usage, result.cache, result.plan
    if result.answer is not None:
        out.write(f"\nAnswer\n{_indented(result.answer)}\n")
    out.write(
        f"\nBackend      {backend}\n"
        f"Status       {result.status}, {result.exactness}\n"
        f"Stop reason  {result.stop_reason} (reasoning {result.reasoning_end}, about "
        f"{result.tokens_saved} tokens saved)\n"
        f"Tokens       {usage.prompt_tokens} prompt ({usage.image_tokens} of pages), "
        f"{usage.completion_tokens} new\n"
        f"Plan         {plan.name}, {len(plan.windows)} prompts in {plan.rounds} rounds\n"
        f"Cache        {cache.pages_encoded} pages encoded, {cache.pages_remembered} remembered; "
        f"{cache.tokens_read} prompt tokens read, {cache.tokens_remembered} remembered"
        f"{_reasons(cache)}\n"
        "Timings ms   "
        + ", ".join(f"{stage} {value:.1f}" for stage, value in result.timings_ms.items())
        + "\n"
    )


def _reasons(cache: CacheUse) -> str:
    """Why something had to be computed, most frequent first."""
    misses = sorted(cache.misses.items(), key=lambda item: -item[1])
    return f" (new: {', '.join(f'{name} {count}' for name, count in misses)})" if misses else ""


def _indented(text: str) -> str:
    return "\n".join(f"  {line}" for line in text.strip().splitlines())
