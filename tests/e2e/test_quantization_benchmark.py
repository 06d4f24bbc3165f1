"""The quantization benchmark on mini: against plain reranks, resumed, widened, and misused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from helpers.exporting import quick_export
from mmr5_bench.cli import main
from mmr5_bench.minidocs.pages import render_page
from mmr5_bench.outcomes import Outcome
from mmr5_bench.quantization import draw_case, load, measure, open_contender, run_case
from mmr5_runtime import Reranker
from mmr5_runtime.engine import Engine
from mmr5_runtime.rope import Grid
from mmr5_runtime.types import EngineError

Engines = Callable[[str], Path]
SEED = 3


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory) -> Engines:
    options: dict[str, dict[str, Any]] = {
        "bf16": {"quant": "bf16"},
        "int4": {"quant": "int4"},
        "vision": {"quant": "int8", "quantize_vision": "int8"},
        "small": {"quant": "bf16", "max_pixels": 12_544},
    }
    folder = tmp_path_factory.mktemp("engines")

    def make(name: str) -> Path:
        if not (folder / name).is_dir():
            quick_export("mini", output=folder / name, **options[name])
        return folder / name

    return make


def _loaded(*paths: Path) -> tuple[list[Any], dict[str, Any]]:
    contenders = [open_contender(path) for path in paths]
    return contenders, {c.key: load(c.path, "float32") for c in contenders}


def test_cases_do_not_depend_on_how_many_are_drawn() -> None:
    sizes = [len(draw_case(index, SEED).pages) for index in range(18)]
    assert sizes == [2, 3, 4, 5, 6, 7, 8, 9, 10] * 2
    assert draw_case(5, SEED) == draw_case(5, SEED) != draw_case(14, SEED)
    assert draw_case(5, SEED) != draw_case(5, SEED + 1)


@pytest.mark.parametrize("index", [2, 8])
def test_orders_are_those_of_plain_reranks(engines: Engines, index: int) -> None:
    names = ("bf16", "int4", "vision")
    contenders, loaded = _loaded(*(engines(name) for name in names))
    case = draw_case(index, SEED)
    found = run_case(case, index, contenders, loaded, {})
    pages = [render_page(page.topic, page.kind, page.seed) for page in case.pages]
    for contender in contenders:
        with Reranker.load(contender.path, "cpu", dtype="float32") as reranker:
            result = reranker.rerank(case.question, pages, stop="eos", constrain=False)
        outcome = found[index, contender.key]
        assert (outcome.order, outcome.status) == (result.order, result.status)
        assert outcome.completion_tokens == result.usage.completion_tokens
        assert outcome.tokens == found[index, contenders[0].key].completion_tokens
    reference = found[index, contenders[0].key]
    assert reference.kl == 0.0 and reference.agreeing == reference.tokens
    assert all(found[index, contender.key].kl > 0.0 for contender in contenders[1:])


def test_pages_are_encoded_once_per_vision_tower(
    engines: Engines, monkeypatch: pytest.MonkeyPatch
) -> None:
    contenders, loaded = _loaded(engines("bf16"), engines("int4"), engines("vision"))
    assert contenders[0].vision == contenders[1].vision != contenders[2].vision
    encoded: list[Engine] = []
    original = Engine.encode_page

    def counted(engine: Engine, pixel_values: Tensor, grid: Grid) -> Tensor:
        encoded.append(engine)
        return original(engine, pixel_values, grid)

    monkeypatch.setattr(Engine, "encode_page", counted)
    run_case(draw_case(0, SEED), 0, contenders, loaded, {})
    bf16, _, vision = (loaded[contender.key].engine for contender in contenders)
    assert encoded == [bf16, bf16, vision, vision]  # two pages


def test_an_interrupted_run_goes_on_and_can_be_widened(engines: Engines, tmp_path: Path) -> None:
    reference, int4 = open_contender(engines("bf16")), open_contender(engines("int4"))
    options: dict[str, Any] = {"seed": SEED, "num_cases": 3}
    whole = measure(reference, [int4], tmp_path / "whole.jsonl", **options)
    assert len(whole) == 6
    text = (tmp_path / "whole.jsonl").read_bytes()
    lines = [line for line in text.splitlines(keepends=True) if line.strip()]
    part = tmp_path / "part.jsonl"
    part.write_bytes(b"".join(lines[:3]) + lines[3][:40])  # killed while writing case 1
    counts: list[tuple[int, int]] = []
    resumed = measure(
        reference, [int4], part, **options, progress=lambda *count: counts.append(count)
    )
    assert resumed == whole and counts[0] == (3, 6) and counts[-1] == (6, 6)

    before = part.read_bytes()
    vision = open_contender(engines("vision"))
    widened = measure(reference, [int4, vision], part, **options)
    assert part.read_bytes().startswith(before)
    rest = part.read_bytes()[len(before) :]
    added = [json.loads(line) for line in rest.splitlines() if line]
    assert [line["engine"] for line in added] == [vision.key] * 3
    assert {key: widened[key] for key in whole} == whole
    assert measure(reference, [int4, vision], part, **options) == widened
    assert part.read_bytes().endswith(json.dumps(added[-1], separators=(",", ":")).encode() + b"\n")


def test_an_engine_described_anew_keeps_its_results(engines: Engines, tmp_path: Path) -> None:
    first = open_contender(engines("int4"))
    again = tmp_path / "again"
    quick_export("mini", "int4", again)
    manifest = json.loads((again / "mmr5_engine.json").read_text())
    manifest["report"]["note"] = "written later"
    (again / "mmr5_engine.json").write_text(json.dumps(manifest))
    assert open_contender(again).key == first.key != open_contender(engines("bf16")).key


def test_the_command_writes_results(
    engines: Engines, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "results" / "r.json"
    arguments = ["quantization", str(engines("int4")), "--reference", str(engines("bf16"))]
    arguments += ["--cases", "3", "--jobs", "1", "-o", str(output)]
    assert main(arguments) == 0
    document = json.loads(output.read_text())
    assert [row["label"] for row in document["rows"]] == ["bf16", "int4 rtn"]
    assert document["rows"][0]["metrics"]["first_choice"]["value"] == 1.0
    assert [len(order) for order in document["rows"][1]["records"]["order"]] == [2, 3, 4]
    assert document["gold"][0] in ("0", "1")
    printed = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert printed["rows"][0]["records"] is None
    assert output.with_suffix(".jsonl").is_file()


def test_misuse_is_named(engines: Engines, tmp_path: Path) -> None:
    reference = open_contender(engines("bf16"))
    journal = tmp_path / "r.jsonl"
    with pytest.raises(ValueError, match="another pixel budget"):
        measure(reference, [open_contender(engines("small"))], journal, num_cases=1, seed=SEED)
    with pytest.raises(ValueError, match="--cases 0"):
        measure(reference, [], journal, num_cases=0, seed=SEED)
    with pytest.raises(EngineError, match="no engine folder"):
        open_contender(tmp_path / "absent")
    assert not journal.exists()


def test_a_reference_outcome_without_its_answer_is_measured_again(engines: Engines) -> None:
    contenders, loaded = _loaded(engines("bf16"))
    empty = Outcome((0, 1), "ok", "eos", 1, 1, 0.0, 0.0, 0.0, 1)
    found = run_case(draw_case(0, SEED), 0, contenders, loaded, {(0, contenders[0].key): empty})
    assert found[0, contenders[0].key].response
