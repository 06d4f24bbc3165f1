"""Callables that can be timed to their end, and clear refusals of those that cannot.

pytest-benchmark calls what it is given and stops the clock when that returns: of an ``async def``
it times the making of a coroutine that nobody ever runs.
"""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from mmr5_runtime.types import RerankResult

Call = Callable[..., RerankResult]


@contextmanager
def runnable(target: Callable[..., Any]) -> Iterator[Call]:
    """A plain call of ``target`` that ends when the result is there.

    A coroutine function is run to its end by one event loop, which is made before the first call
    and closed after the last. ValueError for an async generator, for a coroutine function while an
    event loop runs already, and, when it is called, for a result that is no RerankResult.
    """
    name = getattr(target, "__qualname__", None) or repr(target)
    if _is(inspect.isasyncgenfunction, target):
        raise ValueError(
            f"{name} is an async generator, which does nothing when it is called; measure an "
            "async def that reads it to its end and returns the RerankResult."
        )
    if not _is(inspect.iscoroutinefunction, target):
        yield lambda *arguments: _checked(name, target(*arguments))
        return
    try:
        asyncio.get_running_loop()
    except RuntimeError:  # none runs, which is what is wanted
        pass
    else:
        raise ValueError(
            f"{name} is measured in an event loop of its own, but this test runs inside one; make "
            "the test a plain def."
        )
    with asyncio.Runner() as runner:
        yield lambda *arguments: _checked(name, runner.run(target(*arguments)))


def _is(kind: Callable[[Any], bool], target: Callable[..., Any]) -> bool:
    """Of functions, methods, partials of them, and objects with such a ``__call__``."""
    return kind(target) or kind(type(target).__call__)


def _checked(name: str, result: Any) -> RerankResult:
    if isinstance(result, RerankResult):
        return result
    if inspect.iscoroutine(result):
        result.close()  # it will not be run, and need not be warned about
    if inspect.isawaitable(result):
        raise ValueError(
            f"{name} returns something to be awaited, so only its making would be timed; measure "
            "the async def itself."
        )
    lazily = inspect.isgenerator(result) or inspect.isasyncgen(result)
    remedy = "read it to its end and return the result" if lazily else "return the result"
    raise ValueError(f"{name} returned {type(result).__name__}, no RerankResult; {remedy}.")
