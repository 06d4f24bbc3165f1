"""The benchmark plugin on mini: what every state of memory saves, and that it is the real thing."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from helpers.exporting import quick_export
from helpers.plugin_runs import measured, run_pytest

pytest_plugins = ["pytester"]

SUITE = """
import pytest

@pytest.mark.rerank_axes(cache=("cold", "warm", "seen"))
@pytest.mark.rerank_axes(cache="seen", stop="eos")
def test_rerank(rerank_case, mmr5_benchmark):
    results = mmr5_benchmark(rerank_case)
    assert all(result.cache.replayed_tokens == 0 for result in results)

@pytest.mark.rerank_axes(cache="cold")
def test_arerank(rerank_case, mmr5_benchmark):
    mmr5_benchmark(rerank_case, rerank_case.arerank, base="arerank", subject="async")
"""
QUICK = ("--mmr5-pages=3", "--mmr5-lists=2", "--mmr5-warmup=0", "--mmr5-threads=1")


def test_cells_of_mini(pytester: pytest.Pytester, mini_int4: Path) -> None:
    pytester.makepyfile(SUITE)
    result = run_pytest(pytester, f"--mmr5-engine={mini_int4}", *QUICK, "--benchmark-json=out.json")
    result.assert_outcomes(passed=5)
    evidence = measured(pytester)
    assert evidence["title"] == "Rerank benchmark of mini"
    assert "say nothing about MM-R5" in evidence["note"]
    assert evidence["machine"]["threads"] == 1
    entries = {entry["name"]: entry for entry in evidence["entries"]}
    cells = {
        (cache, stop): entries[f"rerank[pages=3,quant=int4,cache={cache},stop={stop},think=full]"]
        for cache, stop in [(c, "determined") for c in ("cold", "warm", "seen")] + [("seen", "eos")]
    }
    cold, warm, seen = (cells[cache, "determined"] for cache in ("cold", "warm", "seen"))
    assert {entry["subject"] for entry in cells.values()} == {"ours int4"}
    assert all(len(entry["samples_ms"]) == 2 for entry in entries.values())

    # What is remembered is not computed, and nothing but that is left out.
    assert cold["tokens"]["remembered"] == 0 < seen["tokens"]["remembered"]
    assert warm["tokens"]["remembered"] < seen["tokens"]["remembered"]
    assert "vision" in cold["stages_ms"] and cold["stages_ms"]["vision"] > 0
    assert all(entry["stages_ms"].get("vision", 0) == 0 for entry in (warm, seen))
    assert all(entry["tokens"]["replayed"] == 0 for entry in entries.values())
    assert warm["tokens"]["completion"] == seen["tokens"]["completion"]
    assert cold["tokens"]["completion"] < cells["seen", "eos"]["tokens"]["completion"]

    # Equal work is the same requests; how decoding stops decides what is asked.
    assert cold["work"] == warm["work"] == seen["work"] != cells["seen", "eos"]["work"]
    arerank = entries["arerank[pages=3,quant=int4,cache=cold,stop=determined,think=full]"]
    assert (arerank["subject"], arerank["work"]) == ("async", cold["work"])
    assert arerank["quality"] == cold["quality"] == warm["quality"]
    assert cold["quality"]["cases"] == 2 and "recall@1" in cold["quality"]
    assert "top1_agreement" not in cold["quality"]  # no engine is bf16
    assert cold["rates"]["decode_bytes_per_s"] > 0
    for entry in entries.values():
        mean = sum(entry["samples_ms"]) / 2
        assert sum(entry["stages_ms"].values()) == pytest.approx(mean)
        assert len(entry["pace_ms"]) == 2 and min(entry["pace_ms"]) > 0


def test_orders_are_held_against_the_reference(pytester: pytest.Pytester, mini_int4: Path) -> None:
    pytester.makepyfile(
        """
        import pytest

        @pytest.mark.rerank_axes(cache="cold")
        def test_rerank(rerank_case, mmr5_benchmark):
            results = mmr5_benchmark(rerank_case)
            assert len(results) == 2 and rerank_case.reranker.info.dtype == "float32"
        """
    )
    copy = shutil.copytree(mini_int4, pytester.path / "copy")
    run_pytest(
        pytester,
        f"--mmr5-engine=own={mini_int4}",
        f"--mmr5-reference={copy}",
        *QUICK,
        "--benchmark-json=out.json",
    ).assert_outcomes(passed=1)
    (entry,) = measured(pytester)["entries"]
    assert entry["axes"]["quant"] == "own"
    for metric in ("top1_agreement", "order_agreement", "kendall_tau"):
        assert entry["quality"][metric]["value"] == 1.0


def test_a_reference_that_reads_other_pixels_is_refused(
    pytester: pytest.Pytester, mini_int4: Path
) -> None:
    pytester.makepyfile(
        """
        import pytest

        @pytest.mark.rerank_axes(cache="cold")
        def test_rerank(rerank_case, mmr5_benchmark):
            mmr5_benchmark(rerank_case)
        """
    )
    quick_export("mini", "int4", pytester.path / "smaller", max_pixels=28 * 28 * 30)
    result = run_pytest(
        pytester,
        f"--mmr5-engine=own={mini_int4}",
        "--mmr5-reference=smaller",
        *QUICK,
        "--benchmark-json=out.json",
    )
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["*the reference engine has max_pixels 23520 and the measured*"])
    (entry,) = measured(pytester)["entries"]  # the times are kept
    assert "quality" not in entry
