"""From an engine folder to everything a request needs, or one clear error."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from mmr5_kernels.target import Target
from mmr5_runtime.artifact import Manifest, TensorReader, read_manifest, verify_hashes
from mmr5_runtime.backends import choose_backend
from mmr5_runtime.capacity import kv_bytes_per_token, loaded_bytes
from mmr5_runtime.compute import Compute, resolve, resolve_device
from mmr5_runtime.engine import Engine
from mmr5_runtime.exhaustion import memory_errors, weights_shortage
from mmr5_runtime.image import PixelBudget
from mmr5_runtime.language import Language
from mmr5_runtime.model import Model
from mmr5_runtime.onnx import loading as onnx
from mmr5_runtime.onnx.files import BACKEND as ONNXRUNTIME
from mmr5_runtime.options import Layout
from mmr5_runtime.prompt import (
    DEFAULT_PROFILE,
    PromptTokenizer,
    load_template,
    profile_names,
)
from mmr5_runtime.reuse.identity import engine_identity
from mmr5_runtime.trtllm import loading as trtllm
from mmr5_runtime.types import EngineError, RequestError


@dataclass(frozen=True)
class EngineInfo:
    """What a loaded engine is, for reports and for telling two of them apart.

    ``identity`` (64 hex digits) stands for everything that may change a bit of what it computes;
    pixels are the limits per page; ``context`` is in tokens. ``step_bytes`` are the weights that
    one decode step reads, ``token_kv_bytes`` the keys and values of one token it looks back at.
    0 bytes are unknown ones. ``backend``, ``kernels``, ``prefill``, ``kv`` and ``graphs`` are how
    it computes: see ``Reranker.load``.
    """

    identity: str
    profile: str
    dtype: str
    device: str
    min_pixels: int
    max_pixels: int
    context: int
    step_bytes: int
    token_kv_bytes: int
    kernels: str = "portable"
    prefill: str = "exact"
    kv: str = "bf16"
    graphs: bool = False
    backend: str = "native"


@dataclass(frozen=True)
class LoadedEngine:
    """One engine folder in memory; immutable and shared by all requests.

    ``identity`` (32 bytes) names everything that may change a bit of what the engine computes;
    ``rounds_activations`` says whether it has linears that quantize their inputs, where a last bit
    can become a whole step.
    """

    engine: Engine
    tokenizer: PromptTokenizer
    budget: PixelBudget
    image_settings: Mapping[str, Any]  # keyword arguments of image.preprocess
    generation_config: Mapping[str, Any]
    context: int  # tokens of prompt and reply together
    identity: bytes
    rounds_activations: bool = False
    backend: str = "native"

    @cached_property
    def language(self) -> Language:
        """What decoding has to know of the tokens."""
        return Language.of(self.tokenizer, self.engine.spec, self.engine.device)

    @property
    def info(self) -> EngineInfo:
        """The engine in a few plain values."""
        model, compute = self.engine.model, self.engine.compute
        # What TensorRT-LLM computes with was decided when its engines were built.
        built = trtllm.bundle_model(self.engine) is not None
        kv_bytes = kv_bytes_per_token(model.spec.text, model.dtype, model.kv)
        return EngineInfo(
            identity=self.identity.hex(),
            profile=self.tokenizer.template.profile,
            dtype=str(model.dtype).removeprefix("torch."),
            device=str(self.engine.device),
            min_pixels=self.budget.min_pixels,
            max_pixels=self.budget.max_pixels,
            context=self.context,
            step_bytes=model.step_bytes,
            token_kv_bytes=0 if built else kv_bytes,
            kernels=self.backend if built else compute.target.kernels,
            prefill=compute.prefill,
            kv="built" if built else compute.kv,
            graphs=compute.graphs,
            backend=self.backend,
        )

    def prompts(self, layout: Layout) -> PromptTokenizer:
        """The engine's prompts in ``layout``; RequestError when its profile has no such layout."""
        if layout == "reference":
            return self.tokenizer
        name = f"{self.tokenizer.template.profile}-{layout.replace('_', '-')}"
        if name not in profile_names():
            raise RequestError(
                f"profile {self.tokenizer.template.profile} has no layout {layout!r}; pass "
                "layout='reference', or load the engine with another profile."
            )
        return self.profile(name)

    def profile(self, name: str) -> PromptTokenizer:
        """The same tokenizer with another profile."""
        return self.tokenizer.with_template(load_template(name))


def load_engine(
    path: Path,
    *,
    device: str,
    dtype: str,
    min_pixels: int | None,
    max_pixels: int | None,
    check_hashes: bool,
    profile: str | None = None,
    kernels: str = "auto",
    prefill: str = "exact",
    kv: str = "bf16",
    graphs: bool | None = None,
    target: Target | None = None,
    backend: str = "native",
) -> LoadedEngine:
    """Read and check the manifest, then bring the weights to the device.

    ``profile`` replaces the one that the engine was exported for; the options behind it are those
    of ``Reranker.load``. ``target`` replaces what ``kernels`` gives, for tests.

    Raises EngineError for anything wrong with the folder and for a GPU or driver that does not
    serve what was asked, RequestError for an option.
    """
    manifest = read_manifest(path)
    if check_hashes:
        verify_hashes(path, manifest)
    template = load_template(manifest.template.name)
    if manifest.template_sha256 != template.sha256:
        raise EngineError(
            f"{path} was exported with another prompt template than this mmr5-runtime has; "
            "export it again with this version."
        )
    if profile is not None:
        template = load_template(profile)
    if template.pointwise:
        raise EngineError(
            f"profile {template.profile} judges single pages and ranks none; load the engine with "
            f"profile='{DEFAULT_PROFILE}' and use plan='cascade'."
        )
    # Graphs run on the CPU also where there is a GPU.
    where = resolve_device("cpu" if (device, backend) == ("auto", ONNXRUNTIME) else device)
    options = {"dtype": dtype, "kernels": kernels, "prefill": prefill, "kv": kv, "graphs": graphs}
    native_only = target is not None or onnx.native_option(options) is not None
    chosen = choose_backend(backend, path, manifest, where, native_only)
    compute = None
    if chosen == ONNXRUNTIME:
        onnx.check_options(options)
    elif chosen == trtllm.BACKEND:
        trtllm.check_load(options)
    else:
        compute = resolve(
            device,
            dtype,
            manifest.formats,
            kernels=kernels,
            prefill=prefill,
            kv=kv,
            graphs=graphs,
            target=target,
        )
    # Everything small is checked before the weights are read, which takes minutes at 7B.
    stored = manifest.pixel_budget
    budget = PixelBudget(stored.min_pixels, stored.max_pixels).replaced(min_pixels, max_pixels)
    tokenizer = PromptTokenizer.from_file(path / "tokenizer.json", template)
    generation_config = _read_optional(path / "generation_config.json")
    context = manifest.spec.text.max_position_embeddings
    if chosen == trtllm.BACKEND:
        engine = trtllm.open_bundle(path, manifest, tokenizer, where, check_hashes)
        how, rounds = trtllm.identity(path), False
        context = trtllm.context(manifest, engine)
    elif compute is None:
        engine = onnx.open_onnx(path, manifest, where)
        how, rounds = onnx.identity(manifest), onnx.rounds_activations(manifest.formats)
    else:
        engine, how = _open_native(path, manifest, compute), compute.to_json()
        rounds = any(format.activations for format in manifest.formats.values())
    return LoadedEngine(
        engine=engine,
        tokenizer=tokenizer,
        budget=budget,
        image_settings=manifest.image_settings,
        generation_config=generation_config,
        context=context,
        identity=engine_identity(manifest, engine.model.dtype, where, how),
        rounds_activations=rounds,
        backend=chosen,
    )


def _open_native(path: Path, manifest: Manifest, compute: Compute) -> Engine:
    """Streams the weights to the device."""
    spec, formats = manifest.spec, manifest.formats

    def shortage(free: int | None) -> str:
        total = loaded_bytes(spec, formats, compute.dtype, compute.target, compute.prefill)
        kernels = compute.target.kernels
        return weights_shortage(
            total, compute.device, free, prefill=compute.prefill, kernels=kernels
        )

    with TensorReader(path, manifest) as reader, memory_errors(compute.device, shortage):
        model = Model.from_tensors(
            spec,
            reader.get,
            formats,
            compute.dtype,
            compute.device,
            target=compute.target,
            prefill=compute.prefill,
            kv=compute.kv,
        )
        return Engine(model, compute.device, compute)


def _read_optional(path: Path) -> Mapping[str, Any]:
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise EngineError(f"{path} cannot be read ({error}); export the engine again.") from error
    if not isinstance(content, dict):
        raise EngineError(f"{path} holds no JSON object; export the engine again.")
    return content
