"""``mmr5-bench backends``: the same work for everybody, comparisons, and the table made of them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from mmr5_bench.backends.agreement import LEAST, agreement, require
from mmr5_bench.backends.contenders import Contender, Session, contenders
from mmr5_bench.backends.entries import compared, entries_of, goals_of
from mmr5_bench.backends.folders import engine_folder
from mmr5_bench.backends.machine import instructions
from mmr5_bench.backends.measure import Rounds, Timed, measure_shape
from mmr5_bench.backends.names import BASELINE, MEASURED, NATIVE, REFERENCE, SHAPE_NAMES, SUBJECTS
from mmr5_bench.backends.shapes import SHAPES, Case, Shape, shapes_of
from mmr5_bench.cli import main
from mmr5_bench.evidence.document import Evidence, load_evidence, new_evidence, write_evidence
from mmr5_bench.evidence.statistics import Interval
from mmr5_bench.peers.base import WorkMismatchError
from mmr5_bench.readme import load_document, table_of
from mmr5_runtime.spec import ModelSpec

TINY = SHAPES["tiny"]
SHORT = replace(TINY, cases=(Case("prefill", 5, 0), Case("step", 2, 7)))


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the tiny engine."""
    folder = tmp_path_factory.mktemp("backends")
    engine_folder(TINY, "int4", folder)
    return folder


def run(folder: Path, taking_part: tuple[Contender, ...], shape: Shape = SHORT) -> list[Timed]:
    last: list[Timed] = []

    def keep(tracks: object) -> None:
        last[:] = tracks  # type: ignore[call-overload]

    measure_shape(shape, folder, taking_part, Rounds(2, 1), 0, keep, lambda line: None)
    return last


class _WrongIds:
    """A session that reads other tokens than it is given."""

    def __init__(self, session: Session) -> None:
        self._session = session

    def read(self, ids: Tensor) -> None:
        self._session.read(ids)

    def rewind(self, behind: int) -> None:
        self._session.rewind(behind)

    def prefill(self, ids: Tensor) -> Tensor:
        return self._session.prefill(ids.flip(0) + 1)

    def step(self, ids: Tensor) -> Tensor:
        return self._session.step(ids)


class _ForgetsThePrefix(_WrongIds):
    """A session that steps behind nothing."""

    def prefill(self, ids: Tensor) -> Tensor:
        return self._session.prefill(ids)

    def step(self, ids: Tensor) -> Tensor:
        self._session.rewind(0)
        return self._session.step(ids)


@contextmanager
def _cheated(cheat: type[_WrongIds], honest: Contender, folder: Path) -> Iterator[Session]:
    with honest.open(folder) as session:
        yield cheat(session)


def test_the_command_times_every_contender_on_every_case(
    work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "tiny.json"
    command = f"backends --shapes tiny --rounds 2 --threads 1 --work {work} -o {output}"
    assert main(command.split()) == 0
    shown = json.loads(capsys.readouterr().out.splitlines()[-1])
    document = load_evidence(output)
    assert shown["machine"] == document["machine"]
    subjects = [entry["subject"] for entry in document["entries"]]
    assert subjects == [*SUBJECTS] * len(TINY.cases)
    for number, entry in enumerate(document["entries"]):
        case = TINY.cases[number // len(SUBJECTS)]
        assert len(entry["samples_ms"]) == (1 if case.kind == "prefill" else 2)
        assert entry["quality"]["cosine"]["value"] > LEAST and entry["rates"]["tokens_per_s"] > 0
        rivals = {BASELINE, REFERENCE} - {entry["subject"]}
        rivals |= {NATIVE} if entry["subject"] == MEASURED else set()
        assert set(entry["speedups"]) == rivals
        assert ("ratios" in entry) == (entry["subject"] != BASELINE)
    works = [entry["work"] for entry in document["entries"]]
    assert len(set(works)) == len(TINY.cases)
    assert len(document["verdict"]) == len(TINY.cases)
    assert set(document["machine"]["flags"]) >= {"avx2", "avx512_bf16"}
    assert {"transformers", "onnxruntime"} <= set(document["provenance"])
    name, table = table_of(load_document(output), output.stem)
    assert name == "tiny" and "step of 8 behind 40" in table and "1 to 2 rounds" in table


def test_contenders_agree_and_use_the_same_work(work: Path) -> None:
    tracks = run(work / "tiny-int4", contenders((0, 7), 7))
    assert [track.contender.subject for track in tracks] == [*SUBJECTS] * 2
    ours = [a.cosine for t in tracks if t.contender.backend == "native" for a in t.agreements]
    assert ours and min(ours) > 1 - 1e-6  # the same weights, in the same arithmetic


@pytest.mark.parametrize(
    "cheat, case", [(_WrongIds, "prompt of 5"), (_ForgetsThePrefix, "step of 2 behind 7")]
)
def test_other_work_is_refused_before_anything_is_timed(
    cheat: type[_WrongIds], case: str, work: Path
) -> None:
    honest = contenders((0, 7), 7)
    cheater = replace(honest[2], open=partial(_cheated, cheat, honest[2]))
    kept: list[object] = []
    with pytest.raises(WorkMismatchError, match=f"{cheater.subject}, {case}: logits"):
        measure_shape(
            SHORT,
            work / "tiny-int4",
            (honest[1], cheater),
            Rounds(1, 1),
            0,
            kept.append,
            lambda line: None,
        )
    assert not kept


def test_a_missing_backend_is_an_error(tmp_path: Path) -> None:
    made = engine_folder(TINY, "int4", tmp_path)
    (made / "decoder.onnx").unlink()
    command = f"backends --shapes tiny --rounds 1 --work {tmp_path} -o {tmp_path / 'out.json'}"
    assert main(command.split()) == 1
    assert not (tmp_path / "out.json").exists()


def test_an_engine_without_graphs_is_named(tmp_path: Path) -> None:
    made = engine_folder(TINY, "int4", tmp_path)
    manifest = json.loads((made / "mmr5_engine.json").read_text())
    for graph in manifest["backends"].pop("onnxruntime")["files"]:
        del manifest["files"][graph]
    (made / "mmr5_engine.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match="tiny-int4 has no graphs"):
        engine_folder(TINY, "int4", tmp_path)


def test_agreement_is_of_what_differs_between_tokens() -> None:
    row = torch.tensor([[5.0, 4.0, 3.0]])
    assert agreement(row + 100, row).cosine == pytest.approx(1)
    # Uncentred, these two would agree to 0.99.
    found = agreement(torch.tensor([[100.0, 101.0, 102.0]]), torch.tensor([[102.0, 101.0, 100.0]]))
    assert found.cosine == pytest.approx(-1) and not found.greedy
    with pytest.raises(WorkMismatchError, match="-1.000"):
        require(found, "somebody", SHORT.cases[0])
    with pytest.raises(WorkMismatchError, match="not finite"):
        agreement(row * float("nan"), row)
    with pytest.raises(WorkMismatchError, match=r"\[1, 2\]"):
        agreement(row[:, :2], row)


@given(st.integers(2, 8), st.integers(0, 7))
def test_the_row_that_agrees_least_counts(rows: int, wrong: int) -> None:
    reference = torch.randn(rows, 40, generator=torch.Generator().manual_seed(rows))
    logits = reference.clone()
    logits[wrong % rows] *= -1
    assert agreement(logits, reference).cosine == pytest.approx(-1)


def test_speedups_are_the_other_way_round_than_ratios() -> None:
    times = {BASELINE: [40.0, 44.0], REFERENCE: [20.0, 20.0], MEASURED: [10.0, 11.0]}
    made = {c.subject: c for c in contenders((0,), 1)}
    case = Case("step", 1, 7)
    alike = agreement(torch.eye(3), torch.eye(3))
    tracks = [Timed(made[s], case, ms, [1.0], [alike]) for s, ms in times.items()]
    rows = {row["subject"]: row for row in compared(entries_of(TINY, tracks, 0))}
    assert rows[MEASURED]["ratios"]["p50"] == {"value": 0.25, "low": 0.25, "high": 0.25}
    assert rows[MEASURED]["speedups"][BASELINE]["p50"]["value"] == 4
    assert rows[MEASURED]["speedups"][REFERENCE]["p50"]["low"] == pytest.approx(20 / 11)
    assert "ratios" not in rows[BASELINE]
    [goal] = goals_of(list(rows.values()))
    assert goal["holds"] and goal["least"] == 3


def test_a_goal_holds_only_with_its_whole_interval() -> None:
    interval: Interval = {"value": 3.2, "low": 2.9, "high": 3.4}
    axes = {"shape": "x", "label": "step of 1", "case": "step"}
    row = {"subject": MEASURED, "axes": axes, "speedups": {BASELINE: {"p50": interval}}}
    assert [goal["holds"] for goal in goals_of([row])] == [False]
    row["axes"] = {**axes, "case": "prefill"}
    assert [goal["holds"] for goal in goals_of([row])] == [True]


def _document() -> Evidence:
    """One case of all contenders, and a whole rerank; no file of this machine."""
    document = new_evidence("t", "Note.", {"host_cpu": "x", "threads": 2, "flags": {"avx2": True}})
    versions = {"transformers": "5", "onnxruntime": "1", "torch": "2", "commit": "abc"}
    document["provenance"].update(versions)
    alike = agreement(torch.eye(3), torch.eye(3))
    made = contenders((0,), 1)
    times = (400.0, 200.0, 300.0, 100.0)
    case = Case("step", 1, 1024)
    tracks = [
        Timed(one, case, [ms, ms], [2.0], [alike]) for one, ms in zip(made, times, strict=True)
    ]
    rows = compared(entries_of(TINY, tracks, 0))
    share: Interval = {"value": 0.5, "low": 0.1, "high": 0.9}
    rerank = rows[3].copy()
    rerank |= {"name": "backends[rerank]", "subject": "ours", "quality": {"identical": share}}
    rerank["axes"] = {"case": "rerank", "pages": 5}
    document["verdict"] = goals_of(rows)
    document["entries"] = [*rows, rerank]
    return document


def test_the_table_has_a_row_per_case_and_one_per_rerank(tmp_path: Path) -> None:
    path = tmp_path / "backends-cpu.json"
    write_evidence(_document(), path)
    name, table = table_of(load_document(path), path.stem)
    assert name == "backends-cpu"
    four, two = "4.00 [4.00, 4.00]", "2.00 [2.00, 2.00]"
    assert (
        "| tiny | step of 1 behind 1,024 | 400 / 400 | 200 / 200 | 300 / 300 | 100 / 100 | "
        f"{four} | {four} | {two} | 3.00 [3.00, 3.00] | 1.0000 |"
    ) in table
    assert f"| 5 | ours | 100 | 100 | {four} | {four} | {two} | 3.00 [3.00, 3.00] | 50 % |" in table
    assert "Goals met, the whole interval: 1 of 1." in table and "commit abc" in table


def test_a_goal_that_is_missed_stands_in_the_table() -> None:
    document = _document()
    document["verdict"][0] |= {"holds": False, "what": "this"}
    assert "0 of 1. **Not met:** this: found 4.00" in table_of(document, "x")[1]


def test_shapes_are_models_of_their_sizes() -> None:
    assert tuple(SHAPES) == SHAPE_NAMES
    half, wide = (SHAPES[name].config for name in ("0.5b", "7b-layers"))
    assert half is not None and wide is not None
    text = ModelSpec.from_hf_config(half()).text
    sizes = (text.hidden_size, text.num_layers, text.num_heads, text.num_kv_heads, text.head_dim)
    assert sizes == (896, 24, 14, 2, 64)
    assert (text.intermediate_size, text.vocab_size) == (4864, 151936)
    text = ModelSpec.from_hf_config(wide()).text
    assert (text.hidden_size, text.num_heads, text.num_kv_heads, text.head_dim) == (
        3584,
        28,
        4,
        128,
    )
    assert text.intermediate_size == 18944


def test_options_that_mean_nothing_are_refused() -> None:
    with pytest.raises(ValueError, match="'8b' is unknown"):
        shapes_of("tiny,8b")
    with pytest.raises(ValueError, match="twice"):
        shapes_of("tiny,tiny")
    with pytest.raises(ValueError, match="no more rounds"):
        Rounds(2, 3)
    with pytest.raises(ValueError, match="at least 1"):
        Rounds(0, 0)


def test_flags_of_a_processor_are_whole_words(tmp_path: Path) -> None:
    info = tmp_path / "cpuinfo"
    info.write_text("processor : 0\nflags\t\t: fpu avx2 avx512_bf16x\nflags : amx_bf16\n")
    found = instructions(info)
    assert found["avx2"] and not found["avx512_bf16"] and not found["amx_bf16"]
    assert instructions(tmp_path / "none") == {}
