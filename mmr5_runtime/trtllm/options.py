"""Which options hold on TensorRT-LLM; those that cannot are refused before any work starts.

The table is in the text of the package. What is let through either holds as it is, or is told of in
the result (``stop_reason``, ``status``, ``exactness``).
"""

from __future__ import annotations

from collections.abc import Mapping

from mmr5_runtime.options import RerankOptions
from mmr5_runtime.trtllm.prompt import Runner
from mmr5_runtime.types import RequestError

_BACKEND = "the TensorRT-LLM backend"
# Options of ``Reranker.load`` that say how our own engine computes, with what asks for nothing.
_UNSETTLED: dict[str, tuple[object, ...]] = {
    "dtype": ("auto",),
    "kernels": ("auto",),
    "prefill": ("exact",),
    "kv": ("bf16",),
    "graphs": (None,),
}


def check_options(options: RerankOptions, ignores: frozenset[str] = frozenset()) -> None:
    """Raises RequestError for an option of a request that cannot hold.

    Such options need the steps of our own engine, or are among those that the installed version
    of TensorRT-LLM ``ignores``.
    """
    refused = (
        (
            options.seed is not None and "seed" in ignores,
            f"seed={options.seed}",
            "the LLM API of this version draws with a seed of its own; leave it out, or install "
            "TensorRT-LLM 1.4",
        ),
        (
            options.deadline_ms is not None,
            f"deadline_ms={options.deadline_ms}",
            "an answer under way cannot be closed early; leave it out and lower max_new_tokens",
        ),
        (
            options.think == "auto",
            "think='auto'",
            "it needs the probability of every first choice; pass 'full', 'off' or a number",
        ),
        (
            options.draft,
            "draft=True",
            "drafts are checked step by step; leave it out",
        ),
        (
            options.image_kv != "exact",
            f"image_kv={options.image_kv!r}",
            "keys and values cannot be moved there; pass image_kv='exact'",
        ),
        (
            options.plan == "cascade",
            "plan='cascade'",
            "it judges pages by the logits of two words; pass another plan",
        ),
    )
    for asked, what, why in refused:
        if asked:
            raise RequestError(f"{what} does not work on {_BACKEND}: {why}.")


def check_document(runner: Runner) -> None:
    """Raises RequestError where no page can be encoded ahead of a question."""
    if runner.encodes_pages:
        raise RequestError(
            f"open_document does not work on {_BACKEND} with its LLM API, which encodes pages "
            "itself, with each prompt; rerank pages without opening a document first."
        )


def check_load(options: Mapping[str, object]) -> None:
    """Raises RequestError for an option of ``Reranker.load``, by name, that export has settled."""
    for name, value in options.items():
        if value not in _UNSETTLED[name]:
            raise RequestError(
                f"{name}={value!r} cannot be chosen on {_BACKEND}, which computes as its bundle "
                f"says; leave {name} out, or pass backend='native'."
            )
