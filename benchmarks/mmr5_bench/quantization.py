"""What each way of quantizing mini costs, on the same held-out lists.

Every case is one list of 2 to 10 pages. The reference engine answers it greedily; every engine is
then held against that answer, position by position (KL, next token), and against its ranking with
the engine's own greedy answer. Page embeddings are computed once per case and vision tower.

Results are kept per case in a journal beside the output, so that a run can be interrupted, widened
to more cases or to more engines, and only what is missing is run.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch

from mmr5_bench.minidocs.lists import HELD_OUT_SEEDS, RerankCase, make_case
from mmr5_bench.minidocs.pages import render_page
from mmr5_bench.outcomes import Key, Outcome, OutcomeFile
from mmr5_export.agreement import TokenSums, compare
from mmr5_export.evaluate import Answer, Reading, encode_pages, read_question
from mmr5_runtime.artifact import Manifest, TensorReader, read_manifest
from mmr5_runtime.loading import LoadedEngine, load_engine

LIST_SIZES = range(2, 11)
# Three times the longest answer of mini to ten pages: what is cut off here would never have ended.
MAX_NEW_TOKENS = 512
CASES_PER_TASK = 20  # loading the engines for a task then takes a few percent of its time


def draw_case(index: int, seed: int) -> RerankCase:
    """Case ``index`` of the set ``seed``: a held-out list whose size runs through 2..10.

    Depends on nothing but its arguments, so a larger set begins with the smaller one. The three
    numbers that seed it keep it apart from ``held_out_cases``, whatever its seed.
    """
    size = LIST_SIZES[index % len(LIST_SIZES)]
    rng = np.random.default_rng([seed, index, size])
    return make_case(rng, size, held_out=True, seeds=HELD_OUT_SEEDS)


@dataclass(frozen=True)
class Contender:
    """An engine folder; ``key`` stands for all that decides its answers, ``vision`` for a tower."""

    path: Path
    key: str
    vision: str
    manifest: Manifest


def open_contender(path: Path) -> Contender:
    """Reads the manifest and hashes the vision tensors; EngineError when it is no engine folder.

    The identity is of the weights and not of the manifest: describing an engine anew does not make
    its measurements void.
    """
    manifest = read_manifest(path)
    formats = {linear: format.name for linear, format in manifest.formats.items()}
    weights = {name: manifest.files[name].sha256 for name in set(manifest.tensors.values())}
    deciding = [formats, weights, asdict(manifest.pixel_budget), asdict(manifest.image)]
    digest = hashlib.sha256()
    with TensorReader(path, manifest) as reader:
        for name in sorted(name for name in manifest.tensors if name.startswith("visual.")):
            tensor = reader.get(name).contiguous()
            digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
            digest.update(tensor.flatten().view(torch.uint8).numpy().tobytes())
    # Equal tensors are multiplied differently where activations are quantized.
    tower = {linear: name for linear, name in formats.items() if linear.startswith("visual.")}
    digest.update(json.dumps(tower, sort_keys=True).encode())
    key = hashlib.sha256(json.dumps(deciding, sort_keys=True).encode())
    return Contender(path, key.hexdigest()[:16], digest.hexdigest()[:16], manifest)


def check_comparable(reference: Contender, engines: Sequence[Contender]) -> None:
    """ValueError unless every engine reads the reference's prompts: tokenizer, template, pixels."""
    wanted = _prompt_identity(reference)
    for engine in engines:
        for what, value in _prompt_identity(engine).items():
            if value != wanted[what]:
                raise ValueError(
                    f"{engine.path} has another {what} than {reference.path}; compare engines "
                    "exported from one checkpoint with the same options"
                )


def _prompt_identity(engine: Contender) -> dict[str, object]:
    manifest = engine.manifest
    return {
        "tokenizer": manifest.files["tokenizer.json"].sha256,
        "prompt template": manifest.template_sha256,
        "pixel budget": manifest.pixel_budget,
        "image preparation": manifest.image,
    }


def measure(
    reference: Contender,
    engines: Sequence[Contender],
    journal: Path,
    *,
    num_cases: int,
    seed: int,
    dtype: str = "float32",
    jobs: int = 1,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[Key, Outcome]:
    """Runs what ``journal`` lacks; returns the outcome of every case and engine, the reference too.

    ``jobs`` processes share the cases, one thread each: more threads do not speed mini up.
    ``progress`` is called with finished and wanted outcomes after every few cases. Raises
    ValueError for engines that read other prompts than the reference.
    """
    if num_cases < 1:
        raise ValueError(f"--cases {num_cases} measures nothing; ask for 1 or more")
    check_comparable(reference, engines)
    contenders = list({engine.key: engine for engine in [reference, *engines]}.values())
    run = f"{reference.key} {seed} {dtype} {MAX_NEW_TOKENS} {LIST_SIZES}"
    store = OutcomeFile(journal, hashlib.sha256(run.encode()).hexdigest()[:16])
    wanted = {(index, engine.key) for index in range(num_cases) for engine in contenders}
    found = store.read()
    progress(len(wanted & set(found)), len(wanted))
    missing = sorted({index for index, _ in wanted - set(found)})
    tasks = [missing[at : at + CASES_PER_TASK] for at in range(0, len(missing), CASES_PER_TASK)]
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as executor:
        try:
            running = [
                executor.submit(_run_task, contenders, task, store, seed, dtype) for task in tasks
            ]
            for future in as_completed(running):
                found |= future.result()
                progress(len(wanted & set(found)), len(wanted))
        finally:  # after an error or Ctrl-C only what is running is waited for
            executor.shutdown(cancel_futures=True)
    return {key: found[key] for key in sorted(wanted)}


def _run_task(
    contenders: Sequence[Contender], cases: Sequence[int], store: OutcomeFile, seed: int, dtype: str
) -> dict[Key, Outcome]:
    torch.set_num_threads(1)
    known, loaded = store.read(), {engine.key: load(engine.path, dtype) for engine in contenders}
    found: dict[Key, Outcome] = {}
    for index in cases:
        outcomes = run_case(draw_case(index, seed), index, contenders, loaded, known)
        store.append(outcomes)
        found |= outcomes
    return found


def load(path: Path, dtype: str) -> LoadedEngine:
    """The engine on the CPU; raises like :func:`load_engine`."""
    return load_engine(
        path, device="cpu", dtype=dtype, min_pixels=None, max_pixels=None, check_hashes=False
    )


def run_case(
    case: RerankCase,
    index: int,
    contenders: Sequence[Contender],
    loaded: Mapping[str, LoadedEngine],
    known: Mapping[Key, Outcome],
) -> dict[Key, Outcome]:
    """What ``known`` lacks of one case, by every engine; the first of ``contenders`` is reference.

    ``loaded`` maps the key of a contender to its engine.
    """
    reference = contenders[0]
    original = loaded[reference.key]
    pages = [render_page(page.topic, page.kind, page.seed) for page in case.pages]
    question = read_question(original, case.question, pages, MAX_NEW_TOKENS)
    towers = {reference.vision: encode_pages(original, question)}
    reading = Reading(original, question, towers[reference.vision])
    outcomes: dict[Key, Outcome] = {}
    given = known.get((index, reference.key))
    if given is not None and given.response is not None:
        response = given.response
        logits = reading.logits(response)
    else:
        answer = reading.answer()
        response = answer.token_ids
        logits = reading.logits(response)
        sums = compare(logits, logits, torch.tensor(response))
        outcomes[index, reference.key] = _outcome(answer, sums, response)
    for engine in contenders[1:]:
        if (index, engine.key) in known:
            continue
        if engine.vision not in towers:
            towers[engine.vision] = encode_pages(loaded[engine.key], question)
        own = Reading(loaded[engine.key], question, towers[engine.vision])
        found, answer = own.follow(response)
        name = f"case {index} by {engine.path.name}"
        sums = compare(logits, found, torch.tensor(response), name)
        outcomes[index, engine.key] = _outcome(answer, sums)
    return outcomes


def _outcome(answer: Answer, sums: TokenSums, response: tuple[int, ...] | None = None) -> Outcome:
    return Outcome(
        order=answer.ranking.order,
        status=answer.ranking.status,
        stop_reason=answer.stop_reason,
        completion_tokens=len(answer.token_ids),
        response=response,
        **asdict(sums),
    )
