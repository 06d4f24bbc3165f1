"""``mmr5-rerank``: rerank page images for a question from the command line."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TextIO

import torch

from mmr5_runtime.pages import DEFAULT_MAX_IMAGE_PIXELS, Page, describe
from mmr5_runtime.pdf import count_pdf_pages
from mmr5_runtime.reranker import DEFAULT_MAX_NEW_TOKENS, Reranker
from mmr5_runtime.types import Mmr5Error, PageError, ReasoningDelta, RequestError, RerankResult


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
    parser.add_argument("--max-new-tokens", type=int, default=DEFAULT_MAX_NEW_TOKENS)
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy (default)")
    parser.add_argument("--seed", type=int, help="makes sampling repeatable")
    parser.add_argument("--min-pixels", type=int, help="least pixels per page after resizing")
    parser.add_argument("--max-pixels", type=int, help="most pixels per page after resizing")
    parser.add_argument(
        "--max-image-pixels",
        type=int,
        default=DEFAULT_MAX_IMAGE_PIXELS,
        help="refuse larger images before they are decoded (default: %(default)s)",
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--dtype", default="auto", help="auto, bfloat16 or float32")
    parser.add_argument("--verify", action="store_true", help="check the SHA-256 of every file")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    parser.add_argument("--stream", action="store_true", help="show the reasoning as it comes")
    return parser


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
    ) as reranker:
        result = _consume(reranker, options, pages)
    if options.json:
        print(json.dumps(as_json(result), ensure_ascii=False))
    else:
        _print_result(result, pages, sys.stdout, with_reasoning=not options.stream)
    return 0


def _consume(
    reranker: Reranker, options: argparse.Namespace, pages: Sequence[Page]
) -> RerankResult:
    """Run the request; with --stream the reasoning goes to stdout, or stderr beside --json."""
    out = sys.stderr if options.json else sys.stdout
    for event in reranker.stream(
        options.query,
        pages,
        options.top_k,
        options.max_new_tokens,
        options.temperature,
        options.seed,
        min_pixels=options.min_pixels,
        max_pixels=options.max_pixels,
    ):
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
    return {**document, "top": result.top, "scores": result.scores, "score_type": "rank"}


def _print_result(
    result: RerankResult, pages: Sequence[Page], out: TextIO, *, with_reasoning: bool
) -> None:
    if with_reasoning:
        out.write(f"Reasoning\n{_indented(result.reasoning)}\n\n")
    out.write("Ranking\n")
    for place, index in enumerate(result.top, start=1):
        out.write(f"  {place:>2}. {describe(pages[index], index)}\n")
    usage = result.usage
    out.write(
        f"\nStatus       {result.status}\n"
        f"Stop reason  {result.stop_reason}\n"
        f"Tokens       {usage.prompt_tokens} prompt ({usage.image_tokens} of pages), "
        f"{usage.completion_tokens} new\n"
        "Timings ms   "
        + ", ".join(f"{stage} {value:.1f}" for stage, value in result.timings_ms.items())
        + "\n"
    )


def _indented(text: str) -> str:
    return "\n".join(f"  {line}" for line in text.strip().splitlines())
