"""Sizes and versions that TensorRT can and cannot be written for. Nothing is written.

Everything here is known before an export starts: the architecture, the pages' pixel budget and the
options. So is every refusal. Those for the storage of the decoder's linears are in
:mod:`mmr5_export.trtllm.modelopt_formats`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from mmr5_export.largest_page import largest_page_tokens
from mmr5_export.options import ExportOptions, OptionError
from mmr5_export.trtllm.versions import ENGINE_VERSION, VERSIONS, Version, known_version
from mmr5_kernels.layout import Format
from mmr5_runtime.lists.plans import DEFAULT_WINDOW
from mmr5_runtime.manifest import PixelRange
from mmr5_runtime.spec import ModelSpec

TEXT_TOKENS = 512  # of a prompt beside its pages: the instructions take about 220, and a question
LEAST_PAGES = 2  # of a list


@dataclass(frozen=True)
class Limits:
    """What one engine is built for, in prompts and tokens.

    ``max_multimodal_len`` counts tokens of pages in all prompts of a batch together,
    ``page_tokens`` those of one page of the largest size.
    """

    max_batch_size: int
    max_input_len: int
    max_seq_len: int
    max_multimodal_len: int
    page_tokens: int

    @property
    def max_num_tokens(self) -> int:
        """Tokens in one pass: a whole prompt, since none is cut into pieces."""
        return max(8192, self.max_input_len)


def resolve_limits(spec: ModelSpec, budget: PixelRange, options: ExportOptions) -> Limits:
    """The sizes that ``options`` ask for; what they leave out holds the longest default request.

    That is a prompt of as many pages as one prompt takes by default, each as large as ``budget``
    allows, as far as the context goes. Raises :class:`OptionError` with the number that would do.
    """
    page = largest_page_tokens(spec.vision, budget)
    context = spec.text.max_position_embeddings
    answer = min(options.max_new_tokens, context // 2)
    least = LEAST_PAGES * page + TEXT_TOKENS
    longest = options.max_input_len
    if longest is None:
        seq = context if options.max_seq_len is None else options.max_seq_len
        longest = max(1, min(DEFAULT_WINDOW * page + TEXT_TOKENS, seq - answer))
    if longest < least:
        given = options.max_input_len is not None
        what = f"--max-input-len {longest}" if given else f"a prompt of {longest} tokens"
        remedies = _longer(least, answer, context, options)
        raise OptionError(
            f"{what} does not hold {LEAST_PAGES} pages of up to {page} tokens and a question; "
            f"{', or '.join((*remedies, 'lower --max-pixels'))}."
        )
    seq = options.max_seq_len if options.max_seq_len is not None else longest + answer
    if seq <= longest:
        raise OptionError(
            f"--max-seq-len {seq} leaves no room for an answer to a prompt of {longest} tokens; "
            f"pass {min(longest + answer, context)}, or a smaller --max-input-len."
        )
    if seq > context:
        raise OptionError(
            f"prompt and answer may have {seq} tokens but the model's context has {context}; pass "
            f"--max-seq-len {context} or less, and a --max-input-len below it."
        )
    batch = options.max_batch_size or 1
    usual = DEFAULT_WINDOW * page
    pages = batch * min(usual, longest - TEXT_TOKENS)
    # A prompt of a length that was asked for can be all pages but for a few words.
    default = batch * (longest if options.max_input_len is not None else min(usual, longest))
    multimodal = options.max_multimodal_len
    if multimodal is not None and multimodal < pages:
        raise OptionError(
            f"--max-multimodal-len {multimodal} is too small for the page budget: {batch} prompts "
            f"of up to {longest} tokens hold {pages} tokens of pages; pass {pages}, or lower "
            "--max-pixels, --max-input-len or --max-batch-size."
        )
    return Limits(batch, longest, seq, multimodal or default, page)


def _longer(least: int, answer: int, context: int, options: ExportOptions) -> Iterator[str]:
    """What to pass for a prompt of ``least`` tokens, as far as the context goes."""
    if options.max_input_len is not None:
        if least < context:
            yield f"pass --max-input-len {least} or more"
        return
    if options.max_seq_len is not None and least + answer <= context:
        yield f"pass --max-seq-len {least + answer} or more"
    room = min(options.max_seq_len or context, context) - least
    if room > 0:
        yield f"pass --max-new-tokens {room} or less"


def engine_version(options: ExportOptions) -> Version:
    """The version that builds engines; raises :class:`OptionError` for one that does not."""
    version = known_version(options.trt_version or ENGINE_VERSION)
    if not version.engines:
        raise OptionError(
            f"TensorRT-LLM {version.name} builds no engines any more; pass --trt-version "
            f"{ENGINE_VERSION}, the last stable release that does, or --trt-target llm-api."
        )
    return version


def api_versions(options: ExportOptions) -> tuple[Version, ...]:
    """The versions to write LLM arguments for: the one asked for, or all that are known."""
    if options.trt_version is not None:
        return (known_version(options.trt_version),)
    return tuple(VERSIONS.values())


def refuse_lost(formats: Mapping[str, Format], original: bool, target: str) -> None:
    """Head and tower are written dense: raises where the source holds them quantized only."""
    lost = sorted(name for name in formats if not name.startswith("model.layers."))
    if lost and not original:
        raise OptionError(
            f"--trt-target {target} stores {lost[0]} in 16 bits, which a checkpoint that is "
            "quantized already no longer has; export from the original bf16 checkpoint."
        )
