"""One export, checked: what can be known and refused before the first byte is written."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from mmr5_export.assemble import Progress
from mmr5_export.backends import check_backends, needs_ranges
from mmr5_export.checkpoint import Checkpoint, open_checkpoint
from mmr5_export.finite import require_finite
from mmr5_export.generator import Generator, weights_sha256
from mmr5_export.hf_checkpoint import check_target
from mmr5_export.options import ExportOptions, OptionError
from mmr5_export.plan import Plan, make_plan
from mmr5_export.prequantized import QuantizedCheckpoint, is_quantized, open_quantized
from mmr5_export.processor import image_settings, read_processor
from mmr5_export.recipe import ROUNDING, Recipe
from mmr5_export.resolve import (
    refuse_requantizing,
    refuse_threshold,
    resolve_pixels,
    resolve_place,
    resolve_recipe,
)
from mmr5_export.samples import Sample, choose, read_samples, samples_sha256, shipped_set
from mmr5_export.source import MINI, Location, locate
from mmr5_export.wish import Wish
from mmr5_runtime.artifact import ImageSettings, PixelRange, file_sha256, tool_versions
from mmr5_runtime.image import PixelBudget
from mmr5_runtime.onnx.files import BACKEND as ONNXRUNTIME
from mmr5_runtime.onnx.session import obstacle
from mmr5_runtime.prompt import DEFAULT_PROFILE, PromptTokenizer, Template, load_template
from mmr5_runtime.spec import ModelSpec, tensor_shapes
from mmr5_runtime.types import CheckpointError, EngineError, ExportError

DEFAULT_QUANT = "int4"
# Taken over as they are. The processor's settings may be in either of two files.
_REQUIRED = ("config.json", "tokenizer.json")
_OPTIONAL = (
    "tokenizer_config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "generation_config.json",
    "chat_template.json",
    "chat_template.jinja",
)


@dataclass(frozen=True)
class Job:
    """A checked export. ``recipe`` is None when the checkpoint is quantized already;
    ``quant_asked`` is what the caller said.

    ``hashes`` are the sha256 of the checkpoint's files. ``calibration`` and ``held_out`` are empty
    where they are not needed; ``unverified`` says why nothing is verified, where that is so.
    """

    location: Location
    output: Path
    options: ExportOptions
    checkpoint: Checkpoint | QuantizedCheckpoint
    quant_asked: str | None
    recipe: Recipe | None
    image: ImageSettings
    budget: PixelRange
    copied: tuple[Path, ...]
    hashes: Mapping[str, str]
    calibration: tuple[Sample, ...]
    held_out: tuple[Sample, ...]
    unverified: str | None
    device: torch.device
    dtype: torch.dtype

    @property
    def spec(self) -> ModelSpec:
        return self.checkpoint.spec

    @property
    def pixel_budget(self) -> PixelBudget:
        return PixelBudget(self.budget.min_pixels, self.budget.max_pixels)

    @property
    def samples(self) -> tuple[Sample, ...]:
        return (*self.calibration, *self.held_out)

    @property
    def samples_name(self) -> str:
        """The calibration data by its own name only: results do not depend on where it lies."""
        data = self.options.calib_data
        return f"the set shipped for {MINI}" if data is None else data.resolve().name

    @property
    def response_cache(self) -> Path:
        """Where answers are kept for the next export of these weights."""
        folder = Path.home() / ".cache" / "mmr5-runtime" / "answers"
        return self.options.response_cache or folder / f"{self.weights_sha256[:16]}.jsonl"

    @property
    def quant(self) -> str:
        """What to call the result: the recipe's name, or that it was taken over."""
        return "as-stored" if self.recipe is None else self.recipe.name

    def plan(self, recipe: Recipe | None = None) -> Plan:
        """The engine's layout, with ``recipe`` in place of the job's own (a mixed choice made)."""
        chosen = recipe or self.recipe
        if chosen is None:
            assert isinstance(self.checkpoint, QuantizedCheckpoint)
            return make_plan(self.spec, self.checkpoint.formats, self.options.max_file_bytes)
        return make_plan(self.spec, chosen.formats(self.spec), self.options.max_file_bytes)

    def methods(self, recipe: Recipe | None = None) -> dict[str, str]:
        """Method by quantized linear."""
        chosen = recipe or self.recipe
        formats = self.plan(recipe).formats
        return {name: chosen.method(name) if chosen else "as-stored" for name in formats}

    @property
    def wish(self) -> Wish:
        """What is asked for besides the native engine."""
        plan, recipe = self.plan(), self.recipe
        methods = set(self.methods().values())
        mixed = recipe is not None and recipe.mixed is not None
        walks = mixed or bool(methods - set(ROUNDING)) or needs_ranges(plan.formats, self.options)
        return Wish(
            spec=self.spec,
            formats=plan.formats,
            budget=self.budget,
            options=self.options,
            original=recipe is not None,
            ranges=recipe is not None and walks,
            chosen_later=mixed,
        )

    @property
    def weights_sha256(self) -> str:
        """One hash for all weight files."""
        names = self.checkpoint.weight_files
        return weights_sha256({name: self.hashes[name] for name in names})

    def generator(self, quant: str) -> Generator:
        """What writes answers with these weights in bf16 or as ``quant``."""
        assert isinstance(self.checkpoint, Checkpoint)
        return Generator(
            checkpoint=self.checkpoint,
            weights_sha256=self.weights_sha256,
            budget=self.pixel_budget,
            device=str(self.device),
            dtype=str(self.dtype).removeprefix("torch."),
            quant=quant,
            max_new_tokens=self.options.max_new_tokens,
            profile=self.options.profile,
        )

    @property
    def template(self) -> Template:
        """The prompt that the engine ranks with."""
        return load_template(self.options.profile)

    def tokenizer(self) -> PromptTokenizer:
        """The checkpoint's tokenizer with that prompt."""
        return PromptTokenizer.from_file(self.checkpoint.folder / "tokenizer.json", self.template)

    def identity(self) -> dict[str, Any]:
        """All that the result depends on."""
        options = {
            key: value
            for key, value in asdict(self.options).items()
            if key not in _NOT_IDENTIFYING and value not in (None, ())
        }
        return {
            "model": self.location.name,
            "revision": self.location.revision,
            "files": dict(self.hashes),
            "recipe": None if self.recipe is None else self.recipe.to_json(),
            "pixel_budget": asdict(self.budget),
            "template": self.template.sha256,
            "samples": samples_sha256(self.samples, [()] * len(self.samples)),
            "answers": [sample.response for sample in self.samples],
            "options": {key: _plain(value) for key, value in options.items()},
            **self.environment,
        }

    @property
    def environment(self) -> dict[str, Any]:
        """What the export runs on, as far as it can change the last bit of a result."""
        versions = tool_versions() | {name: _version(name) for name in _LIBRARIES}
        if any("gptq" in method for method in self.methods().values()):
            versions |= {name: _version(name) for name in _GPTQ_LIBRARIES}
        versions |= {name: _version(name) for name in _graph_libraries(self.options)}
        gpu = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else None
        capability = torch.backends.cpu.get_cpu_capability()
        return {
            "versions": versions,
            "device": gpu or f"cpu {platform.machine()} {capability}",
            "dtype": str(self.dtype).removeprefix("torch."),
            "threads": torch.get_num_threads(),
        }


# Beside torch: what turns pages into pixels and text into tokens, solves GPTQ, writes graphs.
_LIBRARIES = ("numpy", "pillow", "tokenizers")
_GPTQ_LIBRARIES = ("llmcompressor", "compressed-tensors", "transformers")
_ONNX_TARGETS = {"engine", "onnx"}
_NOT_IDENTIFYING = {
    "calib_data",  # its content is, under samples
    "profile",  # its content is, under template
    "response_cache",
    "resume",
    "force",
    "free_bytes",
    "free_memory",
    "min_top1_agreement",
    "checkpoint_out",
}


def _graph_libraries(options: ExportOptions) -> list[str]:
    """What writes, runs and compiles the graphs that are asked for."""
    found = ["onnx"] if ONNXRUNTIME in options.backend or _ONNX_TARGETS & {*options.targets} else []
    if ONNXRUNTIME in options.backend:
        found.append("onnxruntime")
    if options.aot == "rtx":
        found.append("tensorrt-rtx-cu13-libs")
    return found


def graphs_unverified(job: Job) -> str | None:
    """Why graphs of ONNX Runtime are not verified where the engine is; None when they are."""
    if job.device.type != "cpu":
        return f"they run on a CPU, and this export on {job.device.type}"
    return obstacle()


def prepare(
    model: str | Path,
    quant: str | None,
    output: Path,
    options: ExportOptions,
    progress: Progress,
    *,
    download: bool = True,
) -> Job:
    """Finds and checks everything; nothing is written. See :func:`mmr5_export.pipeline.export`.

    Without ``download`` a hub id has to be in the hub's cache already.
    """
    if options.checkpoint_out is None and options.checkpoint_for != ExportOptions.checkpoint_for:
        raise OptionError(
            "--checkpoint-for is about the folder of --checkpoint-out; give both or neither."
        )
    location = locate(str(model), options.revision, download=download)
    already = is_quantized(location.folder)
    checkpoint = open_quantized(location.folder) if already else open_checkpoint(location.folder)
    recipe = None if already else resolve_recipe(quant or DEFAULT_QUANT, options)
    if already:
        refuse_requantizing(location.name, quant, options)
    processor = read_processor(location.folder)
    _check_tokenizer(checkpoint)
    device, dtype = resolve_place(options)
    names = (*_REQUIRED, *_OPTIONAL)
    copied = tuple(path for name in names if (path := location.folder / name).is_file())
    job = Job(
        location=location,
        output=output,
        options=options,
        checkpoint=checkpoint,
        quant_asked=quant,
        recipe=recipe,
        image=image_settings(processor, checkpoint.spec.vision),
        budget=resolve_pixels(processor, options),
        copied=copied,
        hashes={},
        calibration=(),
        held_out=(),
        unverified=None,
        device=device,
        dtype=dtype,
    )
    formats = job.plan().formats  # its errors come before the long reading of every file
    if options.checkpoint_out is not None:
        decoder = {name: kind for name, kind in formats.items() if ".layers." in name}
        try:
            check_target(decoder, options.checkpoint_for)
        except ExportError as error:
            raise OptionError(str(error)) from error
    check_backends(job.wish)
    job = replace(job, hashes=_hash_files(checkpoint, copied, progress))
    job = _with_samples(job)
    if job.samples:
        _require_finite(checkpoint, progress)
    return job


def _require_finite(checkpoint: Checkpoint | QuantizedCheckpoint, progress: Progress) -> None:
    """Looks at every tensor before the model answers anything with them: NaN would answer too."""
    names = list(tensor_shapes(checkpoint.spec))
    for done, name in enumerate(names):
        progress("check", done, len(names))
        require_finite(name, checkpoint.read(name))
    progress("check", len(names), len(names))


def _hash_files(
    checkpoint: Checkpoint | QuantizedCheckpoint, copied: Sequence[Path], progress: Progress
) -> dict[str, str]:
    paths = sorted([*copied, *(checkpoint.folder / name for name in checkpoint.weight_files)])
    hashes = {}
    for done, path in enumerate(paths):
        progress("hash", done, len(paths))
        hashes[path.name] = file_sha256(path)
    progress("hash", len(paths), len(paths))
    return hashes


def _check_tokenizer(checkpoint: Checkpoint | QuantizedCheckpoint) -> None:
    """The tokenizer must be there, and must know the markup under the ids of config.json."""
    path = checkpoint.folder / "tokenizer.json"
    if not path.is_file():
        raise CheckpointError(
            f"{path} is missing; download it, or write it with transformers: "
            "AutoTokenizer.from_pretrained(folder).save_pretrained(folder)."
        )
    try:
        tokenizer = PromptTokenizer.from_file(path)
    except EngineError as error:
        raise CheckpointError(str(error)) from error
    if tokenizer.image_pad_id != checkpoint.spec.image_token_id:
        raise CheckpointError(
            f"{path} has id {tokenizer.image_pad_id} for an image token but config.json has "
            f"{checkpoint.spec.image_token_id}; use the tokenizer that belongs to the weights."
        )


def _with_samples(job: Job) -> Job:
    """Draws the samples the job needs, or says why there is nothing to verify."""
    if job.recipe is None:
        return replace(job, unverified="the checkpoint is quantized; its original is not at hand")
    formats = job.plan().formats
    methods = {method for method in job.methods().values() if method not in ROUNDING}
    ranges = needs_ranges(formats, job.options)
    calibrated = bool(methods) or job.recipe.mixed is not None or ranges
    if not formats:
        job = replace(job, unverified="nothing is quantized")
    elif not job.options.verify:
        job = replace(job, unverified="--no-verify")
    refuse_threshold(job.options, job.unverified)
    if job.unverified and not calibrated:
        return job
    source = job.options.calib_data or (shipped_set() if job.location.name == MINI else None)
    if source is None:
        purpose = f"{' and '.join(sorted(methods))} calibration" if methods else "verification"
        way_out = "--method rtn --no-verify" if calibrated else "--no-verify"
        if ranges:
            purpose, way_out = "TensorRT's scale of 8-bit activations", "--quant int4 or bf16"
        raise OptionError(
            f"{purpose} needs questions with pages; pass --calib-data FILE.jsonl (query, pages), "
            f"or do without: {way_out}."
        )
    options = job.options
    samples = read_samples(source, job.weights_sha256)
    if options.profile != DEFAULT_PROFILE:
        # The model's own answers that data comes with were given to the default prompt.
        samples = [replace(s, response=None, own=False) if s.own else s for s in samples]
    calibration, held_out = choose(
        samples,
        options.calib_samples if calibrated else 0,
        0 if job.unverified else options.held_out,
        options.seed,
    )
    return replace(job, calibration=tuple(calibration), held_out=tuple(held_out))


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"  # what needs it says so, with the remedy


def _plain(value: Any) -> Any:
    """As JSON has it."""
    if isinstance(value, tuple):
        return list(value)
    return str(value) if isinstance(value, Path) else value
