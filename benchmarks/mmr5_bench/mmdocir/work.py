"""Everything that decides a run, opened and checked before the engine is loaded.

Data, candidates, engine and options go in; out come the questions to ask and a key over all that
decides their records. Two runs with one key ask the same and get the same (but for time).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, cast

import PIL

import mmr5_kernels
import mmr5_runtime
from mmr5_bench.evidence import observe
from mmr5_bench.evidence.machine import describe_machine
from mmr5_bench.mmdocir.annotations import (
    Annotations,
    Question,
    find_annotations,
    read_annotations,
)
from mmr5_bench.mmdocir.candidates import Candidates, load_candidates
from mmr5_bench.mmdocir.pages import PageTable, find_shards
from mmr5_bench.quantization import Contender, open_contender
from mmr5_runtime import Reranker
from mmr5_runtime.artifact import file_sha256
from mmr5_runtime.compute import resolve_device, resolve_dtype
from mmr5_runtime.image import PixelBudget
from mmr5_runtime.options import RerankKeywords, RerankOptions, Stop, ThinkMode
from mmr5_runtime.prompt import load_template
from mmr5_runtime.reuse.config import CacheConfig
from mmr5_runtime.types import PlanName

K = 10  # candidates that the paper reranks
# Modules beside this one that decide what is asked, or what is kept of the reply.
_DECIDING = ("annotations", "candidates", "pages", "records", "run", "work")


@dataclass(frozen=True)
class Options:
    """How every question is asked; the fields are options of a rerank or of ``Reranker.load``.

    ``k`` candidates per question, of the first ``limit`` questions or all. ``plan`` is ``single``:
    a list that does not fit one prompt is an error of its question and not another protocol.
    ``cache="off"`` keeps nothing between questions, so that every time is that of a cold request.

    Raises RequestError for an option the runtime refuses, ValueError for the others.
    """

    k: int = K
    limit: int | None = None
    top_k: int | None = None
    max_new_tokens: int = 2048
    temperature: float = 0.0
    seed: int | None = None
    stop: Stop = "determined"
    think: ThinkMode | int = "full"
    plan: PlanName | Literal["auto"] = "single"
    min_pixels: int | None = None
    max_pixels: int | None = None
    profile: str | None = None
    device: str = "auto"
    dtype: str = "auto"
    cache: Literal["off", "on"] = "off"

    def __post_init__(self) -> None:
        if self.k < 1:
            raise ValueError(f"--k {self.k} reranks nothing; ask for 1 candidate or more")
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"--limit {self.limit} asks nothing; ask 1 question or more")
        if self.temperature and self.seed is None:
            raise ValueError("a run that samples cannot be repeated without --seed; pass one")
        RerankOptions(top_k=self.top_k, **self.keywords())

    def keywords(self) -> RerankKeywords:
        """What every rerank is asked for, beside ``top_k``."""
        names = ("max_new_tokens", "temperature", "seed", "stop", "think", "plan")
        return cast(RerankKeywords, {name: getattr(self, name) for name in names})


@dataclass(frozen=True)
class Work:
    """An opened run; ``identity`` is what its result says of where it comes from.

    ``key`` has 16 hex digits over everything that decides a record, times included. The limit is
    not part of it, for a question is asked alike however many follow; nor is the name of the
    engine's folder.
    """

    annotations: Annotations
    shards: tuple[Path, ...]
    candidates: Candidates
    engine: Contender
    options: Options
    identity: dict[str, Any]
    machine: dict[str, Any]
    key: str

    @property
    def questions(self) -> tuple[Question, ...]:
        """Those to ask, in file order."""
        return self.annotations.questions[: self.options.limit]

    def load(self) -> Reranker:
        """The engine as the options have it; raises like ``Reranker.load``."""
        options = self.options
        return Reranker.load(
            self.engine.path,
            options.device,
            dtype=options.dtype,
            min_pixels=options.min_pixels,
            max_pixels=options.max_pixels,
            cache=CacheConfig() if options.cache == "on" else CacheConfig.off(),
            profile=options.profile,
            backend="native",
        )


def open_work(
    data: Path, candidates: Path, engine: Path, options: Options, annotations: Path | None = None
) -> Work:
    """Reads and checks all of it; ``annotations`` replaces the file in the folder ``data``.

    Takes a few seconds: the pages file is hashed, because other pixels are another benchmark.
    ValueError or EngineError naming what is wrong and the remedy.
    """
    read = read_annotations(annotations or find_annotations(data))
    shards = tuple(find_shards(data))
    with PageTable(shards) as table:
        table.check(read)
        rows = table.num_rows
    lists = load_candidates(candidates, read)
    for question in read.questions[: options.limit]:
        lists.cut(question.id, options.k)
    contender = open_contender(engine)
    device = resolve_device(options.device)
    hashes = "".join(file_sha256(path) for path in shards)
    manifest = contender.manifest
    budget = PixelBudget(manifest.pixel_budget.min_pixels, manifest.pixel_budget.max_pixels)
    budget = budget.replaced(options.min_pixels, options.max_pixels)
    template = load_template(options.profile or manifest.template.name)
    identity = {
        "data": {
            "annotations_sha256": read.sha256,
            "pages_sha256": hashlib.sha256(hashes.encode()).hexdigest(),
            "published": read.published,
            "documents": len(read.documents),
            "questions": len(read.questions),
            "pages": rows,
        },
        "candidates": {
            "sha256": lists.sha256,
            "first_stage": lists.first_stage,
            "depth": lists.depth,
            "k": options.k,
        },
        "prompt": {
            "profile": template.profile,
            "template_sha256": template.sha256,
            "tokenizer_sha256": manifest.files["tokenizer.json"].sha256,
        },
        "pixels": {**asdict(budget), "image": asdict(manifest.image)},
        "engine": {
            "name": engine.resolve().name,
            "key": contender.key,
            "quant": manifest.quant_name,
            "method": manifest.quant.method,
            "source": manifest.source.name,
            "dtype": str(resolve_dtype(options.dtype, device)).removeprefix("torch."),
            "device": device.type,
        },
    }
    # As JSON has it, so that what is read back from a result compares equal.
    identity = json.loads(json.dumps(identity))
    machine = describe_machine(str(device))
    key = _key(identity, options, machine)
    return Work(read, shards, lists, contender, options, identity, machine, key)


def _key(identity: dict[str, Any], options: Options, machine: dict[str, Any]) -> str:
    engine = {name: value for name, value in identity["engine"].items() if name != "name"}
    asked = {name: value for name, value in asdict(options).items() if name != "limit"}
    code = code_sha256(code_files())
    # Another version of PIL may decode other pixels from the same file.
    deciding = [{**identity, "engine": engine}, asked, machine["id"], code, PIL.__version__]
    text = json.dumps(deciding, sort_keys=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def code_files() -> list[Path]:
    """Every source file that answers a question, asks it, times it or makes its record."""
    folders = [Path(module.__path__[0]) for module in (mmr5_runtime, mmr5_kernels)]
    found = [file for folder in folders for file in sorted(folder.rglob("*.py"))]
    own = [Path(__file__).with_name(f"{name}.py") for name in _DECIDING]
    return [*found, *own, Path(observe.__file__)]


def code_sha256(files: Sequence[Path]) -> str:
    """Of names and contents, in this order."""
    digest = hashlib.sha256()
    for file in files:
        content = file.read_bytes()
        digest.update(f"{file.name} {len(content)}\n".encode() + content)
    return digest.hexdigest()
