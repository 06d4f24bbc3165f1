"""Every call into TensorRT-LLM as data: the keywords, by version, that our values go in by.

Nothing here imports it. Names were read in its public sources (``trtllm_signatures.json`` among the
golden files says which), and a test binds every set of keywords to the signatures found there.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image

from mmr5_runtime.image import PixelBudget
from mmr5_runtime.sampler import SamplingParams
from mmr5_runtime.spec import ModelSpec
from mmr5_runtime.trtllm.inputs import EngineInputs
from mmr5_runtime.trtllm.prompt import Limits
from mmr5_runtime.trtllm.stops import StopWords
from mmr5_runtime.types import EngineError

ENGINE_VERSION = "1.2.1"  # the last stable release that runs TensorRT engines
FIRST_API_VERSION = (1, 2, 1)
# The LLM API took these and did nothing with them: until pull request 17172 its sampler had one
# seed for all requests, and until 16485 it knew no repetition penalty.
_IGNORED = frozenset(("seed", "repetition_penalty"))
_HEEDED_SINCE = (1, 4)
KV_CACHE = "kv_cache_config"
KV_SHARE = 0.8  # of the memory that is free once an engine is loaded; the rest is for its outputs


@dataclass(frozen=True)
class Ends:
    """How answers end: ``first`` is the end token an engine takes, ``others`` are stop words."""

    first: int
    others: tuple[int, ...]
    pad: int

    @classmethod
    def of(cls, spec: ModelSpec) -> Ends:
        """Those of a checkpoint; the first of its end tokens is the one it was trained to write."""
        first, *others = spec.eos_token_ids
        return cls(first, tuple(others), spec.pad_token_id)

    @property
    def ids(self) -> frozenset[int]:
        """All of them."""
        return frozenset((self.first, *self.others))


def check_version(found: str, target: str) -> tuple[int, ...]:
    """``found`` as numbers; EngineError if the bundle's ``target`` cannot run on it."""
    match = re.match(r"(\d+)\.(\d+)(?:\.(\d+))?", found)
    numbers = tuple(int(part or 0) for part in match.groups()) if match else ()
    if target == "engine" and found != ENGINE_VERSION:
        raise EngineError(
            f"tensorrt_llm {found} is installed, but this bundle holds TensorRT engines, which "
            f"only {ENGINE_VERSION} builds and runs; install tensorrt_llm=={ENGINE_VERSION}, or "
            "export with --trt-target llm-api."
        )
    if target == "llm-api" and numbers < FIRST_API_VERSION:
        first = ".".join(map(str, FIRST_API_VERSION))
        raise EngineError(
            f"tensorrt_llm {found} is installed, but this bundle was written for {first} and "
            f"later; install one of those."
        )
    return numbers


def ignored(version: Sequence[int]) -> frozenset[str]:
    """Sampling options that the LLM API of a ``version``, as numbers, silently ignores."""
    return frozenset() if tuple(version) >= _HEEDED_SINCE else _IGNORED


def from_dir(folder: str, reuse: bool, gpu: int) -> dict[str, Any]:
    """Keywords of ``ModelRunnerCpp.from_dir``. ``reuse``: whether blocks can be shared."""
    return {
        "engine_dir": folder,
        "rank": 0,
        "device_ids": [gpu],
        "kv_cache_free_gpu_memory_fraction": KV_SHARE,
        "kv_cache_enable_block_reuse": reuse,
    }


def engine_generate(
    inputs: EngineInputs,
    mrope_params: object,
    limit: int,
    params: SamplingParams,
    ends: Ends,
    stops: StopWords | None,
) -> dict[str, Any]:
    """Keywords of ``ModelRunnerCpp.generate`` for one request.

    ``mrope_params`` is what the package makes of :func:`mrope`.
    """
    words = stops.nested(ends.others) if stops else [[[token] for token in ends.others]]
    return {
        "batch_input_ids": [inputs.input_ids],
        "mrope_params": mrope_params,
        "prompt_table": inputs.prompt_table,
        "prompt_tasks": "0",
        "input_token_extra_ids": [inputs.extra_ids],
        "max_new_tokens": limit,
        "end_id": ends.first,
        "pad_id": ends.pad,
        "stop_words_list": words if words[0] else None,
        "return_dict": True,
        "output_sequence_lengths": True,
        **_renamed(_sampling(params), {"seed": "random_seed"}),
    }


def mrope(inputs: EngineInputs) -> dict[str, Any]:
    """Keywords of ``MropeParams``."""
    return {
        "mrope_rotary_cos_sin": inputs.rotary_cos_sin,
        "mrope_position_deltas": inputs.position_deltas,
    }


def llm(folder: str, arguments: Mapping[str, Any], kv_cache: object) -> dict[str, Any]:
    """Keywords of ``LLM``: the ``arguments`` of a bundle, with its KV cache as the package's own.

    ``kv_cache`` is what the package makes of ``arguments["kv_cache_config"]``.
    """
    return {"model": folder, **arguments, KV_CACHE: kv_cache}


def llm_limits(arguments: Mapping[str, Any]) -> Limits:
    """What the LLM API was told to make room for; KeyError where the bundle does not say."""
    prompt = int(arguments["max_input_len"])
    return Limits(sequence=int(arguments["max_seq_len"]), prompt=prompt, images=prompt)


def llm_sampling(
    limit: int,
    params: SamplingParams,
    ends: Ends,
    stops: StopWords | None,
    ignores: frozenset[str] = frozenset(),
) -> dict[str, Any]:
    """Keywords of the LLM API's ``SamplingParams``, without those that it ``ignores``.

    It makes one stop word of every text by tokenizing it alone, so all of ours are given. It does
    so only where it looks up the end token itself: there must be no ``end_id`` here.
    """
    sampling = _sampling(params)
    return {
        "max_tokens": limit,
        "stop": list(stops.texts) if stops else None,
        "include_stop_str_in_output": True,
        "stop_token_ids": [ends.first, *ends.others],
        "add_special_tokens": False,
        "skip_special_tokens": True,
        **{name: value for name, value in sampling.items() if name not in ignores},
    }


def llm_inputs(
    token_ids: Sequence[int], images: Sequence[Image.Image], pixels: PixelBudget
) -> dict[str, Any]:
    """One prompt of ``LLM.generate``: ids with one image token per page, and the pages.

    Pages come at their final size, and the pixel budget of the request goes with them, so that the
    processor leaves them as they are. With pictures it decodes the ids and tokenizes the text
    again, and drops every key but these.
    """
    return {
        "prompt_token_ids": list(token_ids),
        "multi_modal_data": {"image": list(images)},
        "mm_processor_kwargs": {
            "min_pixels": pixels.min_pixels,
            "max_pixels": pixels.max_pixels,
        },
    }


def llm_generate(inputs: object, sampling_params: object) -> dict[str, Any]:
    """Keywords of ``LLM.generate`` for one prompt."""
    return {"inputs": inputs, "sampling_params": sampling_params, "use_tqdm": False}


def _sampling(params: SamplingParams) -> dict[str, Any]:
    """Greedy is a choice among one: a temperature of 0 is none that the samplers know."""
    chosen: dict[str, Any] = {"repetition_penalty": params.repetition_penalty}
    if params.temperature == 0.0:
        return {**chosen, "top_k": 1}
    chosen |= {
        "temperature": params.temperature,
        "top_k": params.top_k,
        "top_p": params.top_p,
    }
    return chosen if params.seed is None else {**chosen, "seed": params.seed}


def _renamed(keywords: dict[str, Any], names: dict[str, str]) -> dict[str, Any]:
    return {names.get(name, name): value for name, value in keywords.items()}
