"""vLLM as a contender, offline in this process: bf16, fp8 by its own rounding, and GPTQ int4.

NOT RUN: written against vLLM's documentation (``vllm.LLM``, "Multimodal inputs", 0.2x) without a
machine that has it; only the reasons for skipping and the preparation of prompts are tested. vLLM
prepares images by itself, with the checkpoint's processor, and expands one pad per image; the ids
it reports are the expanded ones and are held against ours.
"""

from __future__ import annotations

import io
import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image

from mmr5_bench.peers.base import Answer, ListWork, Peer, Reading, Setting
from mmr5_bench.peers.prompts import PromptReader
from mmr5_bench.peers.reference_answer import read_as_reference
from mmr5_runtime.image import smart_resize

MAX_PAGES = 20


@dataclass(frozen=True)
class VllmPeer(Peer):
    """``gptq`` reads the setting's packed checkpoint, the others the unquantized one."""

    kind: Literal["bf16", "fp8", "gptq"]

    @property
    def name(self) -> str:
        return f"vllm-{self.kind}"

    def subject(self, setting: Setting) -> str:
        return f"vLLM {self.kind}"

    def axes(self, setting: Setting) -> dict[str, Any]:
        return {"quant": "int4" if self.kind == "gptq" else self.kind, "stop": "eos"}

    def why_not(self, setting: Setting) -> str | None:
        if find_spec("vllm") is None:
            return "vLLM is not installed; pip install vllm in an environment of its own"
        if not (setting.on_gpu and torch.cuda.is_available()):
            return "vLLM is compared on a CUDA device only; pass --device cuda"
        if setting.dtype != "bfloat16":
            return f"vLLM is compared in bfloat16 only, not {setting.dtype}; pass --dtype bfloat16"
        if setting.random is not None:
            return "vLLM reads a checkpoint folder; pass --checkpoint instead of --random"
        if setting.checkpoint is None:
            return "no unquantized checkpoint was given; pass --checkpoint FOLDER"
        if self.kind == "gptq" and setting.packed is None:
            return "no GPTQ checkpoint; mmr5-export --checkpoint-out writes one for --packed FOLDER"
        return None

    @contextmanager
    def open(self, setting: Setting) -> Iterator[VllmSession]:
        """Starts the engine with every cache off; raises as vLLM does."""
        from vllm import LLM

        folder = setting.packed if self.kind == "gptq" else setting.checkpoint
        if folder is None or setting.checkpoint is None:
            raise ValueError(self.why_not(setting))
        reader = PromptReader.from_checkpoint(setting.checkpoint)
        budget = reader.budget
        engine = LLM(
            model=str(folder),
            dtype="bfloat16",
            quantization="fp8" if self.kind == "fp8" else None,
            limit_mm_per_prompt={"image": MAX_PAGES},
            mm_processor_kwargs={"min_pixels": budget.min_pixels, "max_pixels": budget.max_pixels},
            enable_prefix_caching=False,
            mm_processor_cache_gb=0,
            max_num_seqs=1,
            seed=setting.seed,
            disable_log_stats=False,  # else there is no time to the first token
        )
        try:
            yield VllmSession(engine, reader.tokenizer.image_pad_id, repetition_penalty(folder))
        finally:
            del engine


class VllmSession:
    """A running engine."""

    def __init__(self, engine: Any, pad_id: int, penalty: float) -> None:
        self._engine, self._pad_id, self._penalty = engine, pad_id, penalty
        self._ids: tuple[int, ...] = ()

    def forget(self) -> None:
        """Nothing is kept: its caches are off."""

    def answer(self, work: ListWork) -> Answer:
        """One request, greedy, with the checkpoint's repetition penalty."""
        from vllm import SamplingParams

        began = time.perf_counter()
        prompt = {
            "prompt_token_ids": collapse_pads(work.prompt_ids, self._pad_id),
            "multi_modal_data": {"image": load_pages(work.pages)},
        }
        loaded = time.perf_counter()
        params = SamplingParams(
            temperature=0.0,
            repetition_penalty=self._penalty,
            max_tokens=work.max_new_tokens,
            min_tokens=work.max_new_tokens if work.forced else 0,
            ignore_eos=work.forced,
        )
        [output] = self._engine.generate([prompt], params, use_tqdm=False)
        self._ids = tuple(output.prompt_token_ids)
        [written] = output.outputs
        order, status = read_as_reference(written.text, len(work.pages))
        first = getattr(output.metrics, "first_token_latency", None)
        return Answer(
            text=written.text,
            order=order,
            status=status,
            tokens=len(written.token_ids),
            token_ids=tuple(written.token_ids),
            ttft_ms=None if first is None else 1e3 * (loaded - began + first),
            stages_ms={"image_decode": 1e3 * (loaded - began)},
        )

    def reading(self, work: ListWork, *, pixels: bool) -> Reading:
        """The expanded ids; vLLM shows neither grids nor pixels."""
        return Reading(len(self._ids), self._ids)


def collapse_pads(ids: Sequence[int], pad_id: int) -> list[int]:
    """``ids`` with one pad for each run of them.

    vLLM expands every pad it is given, so expanded prompts would be expanded again (huggingface/trl
    #6294).
    """
    return [
        token
        for index, token in enumerate(ids)
        if not (token == pad_id and index and ids[index - 1] == pad_id)
    ]


def load_pages(pages: Sequence[bytes]) -> list[Image.Image]:
    """The pages as the reference's page loader hands them to a processor."""
    loaded = []
    for page in pages:
        image = Image.open(io.BytesIO(page)).convert("RGB")
        height, width = smart_resize(image.height, image.width)
        loaded.append(image.resize((width, height), Image.Resampling.BICUBIC))
    return loaded


def repetition_penalty(folder: Path) -> float:
    """What the checkpoint's ``generation_config.json`` asks for; 1.0 when it is silent."""
    path = folder / "generation_config.json"
    if not path.is_file():
        return 1.0
    return float(json.loads(path.read_text(encoding="utf-8")).get("repetition_penalty") or 1.0)
