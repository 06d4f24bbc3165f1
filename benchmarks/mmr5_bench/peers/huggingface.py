"""``transformers``' generate as contenders: the way the public script runs the model, and others.

Page bytes -> images -> the page loader's resize and the Pillow image processor -> chat template
and tokenizer -> ``generate`` -> text, read as the script reads it. Everything from bytes to order
is timed. The script wants flash-attention; SDPA gives the same greedy tokens and is always there.
Other weights (bitsandbytes, tinygemm) take the place of the decoder's linears in the same model.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, Literal

import torch
from torch import Tensor, nn

from mmr5_bench.peers.base import Answer, ListWork, Peer, Reading, Setting
from mmr5_bench.peers.huggingface_inputs import InputReader, Inputs, open_inputs
from mmr5_bench.peers.prompts import hash_pixels
from mmr5_bench.peers.reference_answer import read_as_reference
from mmr5_runtime.compute import DTYPES
from mmr5_runtime.rope import Grid
from mmr5_runtime.timing import Timings

REFERENCE_TEMPERATURE = 0.3


@dataclass(frozen=True)
class TransformersPeer(Peer):
    """Dense weights with a growing or a preallocated KV cache, greedy or sampled."""

    cache: Literal["dynamic", "static"] = "dynamic"
    temperature: float = 0.0

    @property
    def name(self) -> str:
        sampled = "-sampled" if self.temperature else ""
        return f"transformers{sampled}" + ("-static" if self.cache == "static" else "")

    def subject(self, setting: Setting) -> str:
        way = f"T={self.temperature}" if self.temperature else "greedy"
        cache = " static cache" if self.cache == "static" else ""
        return f"transformers {setting.dtype} sdpa {way}{cache}"

    def axes(self, setting: Setting) -> dict[str, Any]:
        return {"quant": setting.dtype, "stop": "eos"}

    def why_not(self, setting: Setting) -> str | None:
        if reason := missing(setting):
            return reason
        if self.cache == "static" and setting.on_gpu and find_spec("triton") is None:
            return "a static cache is compiled on a GPU, which needs triton; pip install triton"
        return None

    @contextmanager
    def open(self, setting: Setting) -> Iterator[TransformersSession]:
        """Loads the model; raises as ``from_pretrained`` does."""
        with dense_model(setting) as model:
            yield TransformersSession(model, setting, self.cache, self.temperature)


def missing(setting: Setting) -> str | None:
    """Why ``transformers`` cannot run the setting's model."""
    if find_spec("transformers") is None:
        return "transformers is not installed; pip install 'mmr5-runtime[bench]'"
    if setting.random is None and setting.checkpoint is None:
        return "no unquantized checkpoint was given; pass --checkpoint FOLDER"
    if setting.on_gpu and not torch.cuda.is_available():
        return f"there is no {setting.device} here; pass --device cpu"
    return None


@contextmanager
def dense_model(setting: Setting) -> Iterator[Any]:
    """The setting's ``Qwen2_5_VLForConditionalGeneration``, in eval mode; freed at the end."""
    model = _load(setting)
    try:
        yield model
    finally:
        del model
        if setting.on_gpu:
            torch._dynamo.reset()  # what was compiled holds on to the weights
        gc.collect()
        if setting.on_gpu:
            torch.cuda.empty_cache()


def _load(setting: Setting) -> Any:
    from transformers import Qwen2_5_VLForConditionalGeneration

    from mmr5_bench.random_engine import random_transformers

    dtype = DTYPES[setting.dtype]
    if setting.random is not None:
        return random_transformers(setting.random, setting.device, dtype)
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(
        setting.checkpoint, dtype=dtype, attn_implementation="sdpa"
    )
    return model.to(setting.device).eval()


def replace_decoder_linears(model: Any, make: Callable[[nn.Linear], nn.Module]) -> int:
    """Puts ``make(linear)`` in the place of every linear of the decoder layers; returns how many.

    The vision tower, the embeddings and the head stay as they are, as they do in our engines and
    in the checkpoints that they are exported to.
    """
    count = 0
    for layer in model.model.language_model.layers:
        for parent in list(layer.modules()):
            for name, child in list(parent.named_children()):
                if isinstance(child, nn.Linear):
                    setattr(parent, name, make(child))
                    count += 1
    return count


class FirstToken:
    """A logits processor that only notes when the first logits are there."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.at: float | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Scores [1, V] as they came."""
        if self.at is None:
            if self._device.type == "cuda":
                torch.cuda.synchronize(self._device)
            self.at = time.perf_counter()
        return scores


class TransformersSession:
    """A loaded model with its tokenizer and image processor."""

    def __init__(
        self,
        model: Any,
        setting: Setting,
        cache: Literal["dynamic", "static"] = "dynamic",
        temperature: float = 0.0,
    ) -> None:
        self._model, self._seed = model, setting.seed
        self._device = torch.device(setting.device)
        self._cache, self._temperature = cache, temperature
        self._reader: InputReader = open_inputs(setting)
        self._inputs: Inputs | None = None

    def forget(self) -> None:
        """Drop the inputs, and the length that a static cache is made no shorter than.

        ``generate`` remembers the longest static cache of the model so as not to compile anew, and
        a list would be decoded over that of a longer one. On a GPU a length that is new is compiled
        for, so lists of one workload should be of one length there.
        """
        self._inputs = None
        self._model._previous_max_cache_length = -1

    def answer(self, work: ListWork) -> Answer:
        """Runs the pipeline; with a temperature every list is drawn from the setting's seed."""
        timings = Timings(self._device)
        began = time.perf_counter()
        with timings.span("image_decode"):
            images = self._reader.decode(work.pages)
        with timings.span("preprocess"):
            self._inputs = self._reader.prepare(work.question, images)
        first = FirstToken(self._device)
        start = time.perf_counter()
        generated = self._generate(work, self._inputs, first, timings)
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        over = time.perf_counter()
        ids = generated.tolist()
        text = self._reader.tokenizer.decode(
            ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        order, status = read_as_reference(text, len(work.pages))
        stages = {name: ms for name, ms in timings.total().items() if name != "total"}
        reached = first.at or over
        stages["prefill"] = 1e3 * (reached - start) - stages.get("vision", 0.0)
        stages["decode"] = 1e3 * (over - reached)
        return Answer(
            text=text,
            order=order,
            status=status,
            tokens=len(ids),
            token_ids=tuple(ids),
            ttft_ms=1e3 * (reached - began),
            stages_ms=stages,
        )

    def _generate(
        self, work: ListWork, inputs: Inputs, first: FirstToken, timings: Timings
    ) -> Tensor:
        """Ids [T] of what was written."""
        from transformers import LogitsProcessorList

        options: dict[str, Any] = {"do_sample": False}
        if self._temperature:
            torch.manual_seed(self._seed)
            options = {"do_sample": True, "temperature": self._temperature}
        if self._cache == "static":
            options["cache_implementation"] = "static"
        if work.forced:
            options["min_new_tokens"] = work.max_new_tokens
        with _timed(self._model.model.visual, timings, "vision"):
            out: Tensor = self._model.generate(
                **{name: tensor.to(self._device) for name, tensor in inputs.items()},
                **options,
                max_new_tokens=work.max_new_tokens,
                logits_processor=LogitsProcessorList([first]),
            )
        return out[0, inputs["input_ids"].shape[1] :]

    def reading(self, work: ListWork, *, pixels: bool) -> Reading:
        """The ids and grids that went into ``generate``."""
        if self._inputs is None:
            raise RuntimeError("nothing was read yet")
        ids = tuple(self._inputs["input_ids"][0].tolist())
        grids: tuple[Grid, ...] = tuple(
            (int(t), int(rows), int(columns))
            for t, rows, columns in self._inputs["image_grid_thw"].tolist()
        )
        seen = hash_pixels([self._inputs["pixel_values"]]) if pixels else None
        return Reading(len(ids), ids, grids, seen)


@contextmanager
def _timed(module: nn.Module, timings: Timings, stage: str) -> Iterator[None]:
    """Adds the calls of ``module`` to ``stage`` of ``timings``."""
    spans: list[Any] = []

    def enter(*_: Any) -> None:
        span = timings.span(stage)
        span.__enter__()
        spans.append(span)

    def leave(*_: Any) -> None:
        spans.pop().__exit__(None, None, None)

    hooks = [module.register_forward_pre_hook(enter), module.register_forward_hook(leave)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
