"""Running out of memory in the middle of a request: said in a sentence, with the engine intact.

What a request holds (its arena, activations) hangs on the frames that the error passed through.
They are let go before the new error is raised, and the allocator's spare blocks are given back, so
that the next request finds the memory free.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING

import torch

from mmr5_runtime.capacity import Need, gib, vision_bytes
from mmr5_runtime.planning import most_pages
from mmr5_runtime.spec import VisionSpec
from mmr5_runtime.types import OutOfMemoryError

if TYPE_CHECKING:
    from mmr5_runtime.request import Request

# How other allocators say it: the CPU's, page-locked memory, CUDA itself, cuBLAS and cuDNN.
_SIGNS = ("out of memory", "can't allocate memory", "cannot allocate memory", "alloc_failed")


def is_exhaustion(error: BaseException) -> bool:
    """Whether ``error`` says that memory, of the device or the machine, was not enough."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error).lower() for sign in _SIGNS)


def free_bytes(device: torch.device) -> int | None:
    """Bytes that tensors on ``device`` can still take; None where nobody knows, as on a CPU."""
    if device.type != "cuda":
        return None
    free, _ = torch.cuda.mem_get_info(device)
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(free) + unused


@contextmanager
def memory_errors(device: torch.device, explain: Callable[[int | None], str]) -> Iterator[None]:
    """Turns running out of memory in the body into :class:`OutOfMemoryError`.

    ``explain(free)`` gives the message; ``free`` are the bytes that are free once everything that
    the body held is released, None if unknown.
    """
    try:
        yield
        return
    except OutOfMemoryError as error:  # a part of the body has explained it better
        traceback.clear_frames(error.__traceback__)
        raise
    except (MemoryError, RuntimeError) as error:  # torch's own is a RuntimeError
        if not is_exhaustion(error):
            raise
        traceback.clear_frames(error.__traceback__)
    if device.type == "cuda":
        torch.cuda.empty_cache()
    raised = OutOfMemoryError(explain(free_bytes(device)))
    try:
        raise raised
    finally:
        raised.__context__ = None  # the first error, on which everything hangs


def within_memory(request: Request) -> AbstractContextManager[None]:
    """:func:`memory_errors` for serving ``request``, whose largest prompt the message describes."""
    loaded = request.loaded
    model, device, planned = loaded.engine.model, loaded.engine.device, request.bank.planned

    def explain(free: int | None) -> str:
        reply, tokenizer = request.options.max_new_tokens, request.tokenizer
        pages = most_pages(tokenizer, loaded.context, request.query, planned, reply)
        pages = max(1, min(pages, request.options.window or pages))
        largest = sorted((page.tokens for page in planned), reverse=True)[:pages]
        prompt = len(tokenizer.segments(request.query, largest).ids)
        need = Need.of(
            model.spec,
            model.dtype,
            model.kv,
            pages=pages,
            page_tokens=largest[0],
            other_tokens=prompt - sum(largest) + reply,
        )
        halved = model.kv == "int8" or loaded.backend != "native"
        return prompt_shortage(need, device, free, model.spec.vision.factor, not halved)

    return memory_errors(device, explain)


def prompt_shortage(
    need: Need, device: torch.device, free: int | None, factor: int, can_halve_kv: bool
) -> str:
    """What a prompt asked for, what is free and what would fit, in one sentence.

    ``factor`` is the side of one merged token in pixels; ``can_halve_kv`` says whether 8-bit keys
    and values are still to be had.
    """
    asked = (
        f"{device} ran out of memory: a prompt over {need.pages} pages of up to {need.page_tokens} "
        f"tokens ({need.tokens} in all, with the text and the reply) takes {gib(need.kv)} for keys "
        f"and values and about {gib(need.activations)} for activations"
    )
    remedies: list[str] = []
    if free is not None and need.total <= free:
        return _main_memory(asked, device, free)
    if free is None:
        remedies += ["pass fewer pages", "lower max_pixels"]
    else:
        asked += f", and {gib(free)} is free"
        fitting = min(need.pages_within(free), need.pages - 1)
        if fitting > 0:
            remedies.append(f"pass {fitting} pages at a time (window={fitting})")
        if smaller := min(need.page_tokens_within(free), need.page_tokens - 1):
            remedies.append(f"max_pixels={smaller * factor**2}")
    if can_halve_kv:
        remedies.append("load with kv='int8'")
    if not remedies:
        remedies.append("free memory that other programs hold")
    return f"{asked}; {', or '.join(remedies)}."


def page_shortage(
    vision: VisionSpec, dtype: torch.dtype, patches: int, device: torch.device, free: int | None
) -> str:
    """The same for a page of so many patches that was to be encoded."""
    taken = vision_bytes(vision, dtype, patches)
    asked = (
        f"{device} ran out of memory: encoding a page of {patches // vision.merge_unit} tokens "
        f"takes about {gib(taken)}"
    )
    if free is None:
        return f"{asked}; lower max_pixels."
    if taken <= free:
        return _main_memory(asked, device, free)
    fitting = min(patches - 1, patches * free // taken) // vision.merge_unit
    remedy = f"max_pixels={fitting * vision.factor**2}" if fitting else "free memory on the device"
    return f"{asked}, and {gib(free)} is free; {remedy}."


def weights_shortage(
    total: int,
    device: torch.device,
    free: int | None,
    *,
    prefill: str = "exact",
    kernels: str = "portable",
) -> str:
    """The same for weights of ``total`` bytes that were to be loaded, with these options."""
    asked = f"{device} ran out of memory: the weights of this engine take {gib(total)}"
    remedies = []
    if prefill != "exact":
        asked += f", with the second copy that prefill={prefill!r} makes"
        remedies.append("load with prefill='exact'")
    if kernels == "cuda":
        remedies.append("load with kernels='triton', which keeps int4 in one layout")
    if free is not None and total <= free:
        return _main_memory(asked, device, free)
    held = "" if free is None else f", and {gib(free)} is free"
    remedies.append("load an engine of fewer bits (mmr5-export --quant int4)")
    return f"{asked}{held}; {', or '.join(remedies)}, or free memory that other programs hold."


def recording_shortage(device: torch.device, free: int | None) -> str:
    """The same for decode steps that were to be recorded ahead."""
    held = "" if free is None else f", and {gib(free)} is free"
    return (
        f"{device} ran out of memory: recording decode steps takes memory beside the weights"
        f"{held}; load with a lower concurrency or with graphs=False, or free memory that other "
        "programs hold."
    )


def _main_memory(asked: str, device: torch.device, free: int) -> str:
    """Where the device has enough of it, other memory was short."""
    what = asked.removeprefix(f"{device} ran out of memory: ")
    return (
        f"main memory probably ran out: {what}, and {gib(free)} is free on {device}; lower "
        "embeddings_gib and kv_gib of CacheConfig, which keep pages and prompts in main memory, or "
        "free some that other programs hold."
    )
