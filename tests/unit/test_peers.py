"""Parts of the comparison with other runtimes: what is checked, parsed, skipped and multiplied."""

from __future__ import annotations

import random
import subprocess
import sys
from dataclasses import replace
from functools import cache
from itertools import permutations
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from helpers.answer_streams import random_text
from helpers.peers_journal import last_run
from helpers.reference_parser import reference_order
from mmr5_bench.evidence.document import Entry
from mmr5_bench.peers.base import (
    Answer,
    ListWork,
    Reading,
    Setting,
    Shape,
    WorkMismatchError,
    check,
)
from mmr5_bench.peers.contenders import all_peers, choose_peers
from mmr5_bench.peers.journal import Journal, journal_path
from mmr5_bench.peers.names import PEERS
from mmr5_bench.peers.prompts import PromptReader
from mmr5_bench.peers.reference_answer import read_as_reference
from mmr5_bench.peers.rounds import Round, Track, entries_of, identical
from mmr5_bench.peers.run import Plan, turns
from mmr5_bench.peers.tinygemm import GROUP_SIZES, Int4Linear, dequantize, quantize_groups
from mmr5_bench.peers.vllm_offline import collapse_pads
from mmr5_bench.peers.workloads import Workload
from mmr5_export.source import locate
from mmr5_runtime.prompt import load_template
from mmr5_runtime.types import PageError

PAGES = 3
DTYPES = ("float32", "bfloat16")


@cache
def reader(shape: Shape = "tiny") -> PromptReader:
    return PromptReader.from_random(shape)


def workload(pages: int = PAGES, generated: int = 12) -> Workload:
    return Workload("small", pages, generated, reader(), forced=True)


def answer(work: ListWork, text: str = "", **changes: object) -> Answer:
    made = Answer(text, tuple(range(len(work.pages))), "ok", work.max_new_tokens)
    return replace(made, **changes)  # type: ignore[arg-type]


def test_a_reading_of_the_work_is_accepted() -> None:
    work = workload().list(0)
    reading = reader().reading(work, pixels=True)
    check(work, answer(work), reading, reader().pixels(work))


def test_differences_are_refused() -> None:
    work = workload().list(0)
    whole = reader().reading(work, pixels=True)
    ids = whole.prompt_ids or ()
    other = (*ids[:5], ids[5] + 1, *ids[6:])
    cases: list[tuple[Reading, str]] = [
        (replace(whole, prompt_ids=other), "at token 5"),
        (replace(whole, prompt_ids=ids[:-1]), f"at token {len(ids) - 1}"),
        (replace(whole, prompt_tokens=len(ids) + 2), f"{len(ids) + 2} prompt tokens"),
        (replace(whole, grids=((1, 4, 4),) * PAGES), "max_pixels"),
        (replace(whole, pixels="0" * 64), "pixel values"),
        (Reading(len(ids) - 1), "prompt tokens instead of"),
    ]
    for reading, message in cases:
        with pytest.raises(WorkMismatchError, match=message):
            check(work, answer(work), reading, whole.pixels)


def test_another_length_and_no_permutation_are_refused() -> None:
    work = workload().list(0)
    reading = reader().reading(work, pixels=False)
    with pytest.raises(WorkMismatchError, match="wrote 11 tokens where 12 are forced"):
        check(work, answer(work, tokens=11), reading, None)
    with pytest.raises(WorkMismatchError, match="no order of 3 pages"):
        check(work, answer(work, order=(0, 0, 1)), reading, None)


def test_other_budgets_read_other_grids() -> None:
    work = workload().list(0)
    narrow = replace(reader(), budget=reader().budget.replaced(None, 6 * 784))
    with pytest.raises(WorkMismatchError, match="patch grids"):
        check(work, answer(work), narrow.reading(work, pixels=False), None)


@settings(max_examples=200)
@given(st.integers(0, 1 << 32), st.integers(1, 12))
def test_answers_are_read_as_the_reference_reads_them(seed: int, pages: int) -> None:
    text = random_text(random.Random(seed), pages)
    order, status = read_as_reference(text, pages)
    expected = reference_order(text, pages)
    assert sorted(order) == list(range(pages))
    if status == "fallback":
        assert expected in (None, list(range(pages)))  # no list, or no page that there is
        assert order == tuple(range(pages))
    elif expected is None:
        raise AssertionError(f"{text!r} was read as {order}, {status}")
    else:
        assert list(order) == list(dict.fromkeys(expected))
        assert status in ("ok", "repaired")


@pytest.mark.parametrize(
    "listed, order, status",
    [
        ("2, 1, 3", (1, 0, 2), "ok"),
        ("2, 2, 1, 3", (1, 0, 2), "repaired"),
        ("3", (2, 0, 1), "repaired"),
        ("3, 9, 1, 2", (2, 0, 1), "repaired"),
        ("two", (0, 1, 2), "fallback"),
        ("9, 0", (0, 1, 2), "fallback"),
        ("", (0, 1, 2), "fallback"),
    ],
)
def test_how_a_list_was_read(listed: str, order: tuple[int, ...], status: str) -> None:
    assert read_as_reference(f"<think></think><answer>[{listed}]</answer>", 3) == (order, status)


def test_identical_answers() -> None:
    work = workload().list(0)
    one = answer(work, "text")
    assert identical(one, one)
    assert not identical(one, replace(one, tokens=one.tokens + 1))
    assert not identical(one, replace(one, text="other"))
    ids = replace(one, token_ids=(1, 2))
    assert identical(ids, one)
    assert not identical(ids, replace(ids, token_ids=(2, 1)))


def test_lists_depend_on_nothing_but_their_number() -> None:
    lists, again = workload(), workload()
    assert lists.list(3) == again.list(3)
    assert lists.list(3).digest == again.list(3).digest
    different = {lists.list(0).digest, lists.list(1).digest, lists.warmup(0).digest}
    assert len(different) == 3


@pytest.mark.parametrize("name, tokens", [("mmdocir", 616), ("dense", 1280), ("vidore", 2560)])
def test_pages_have_the_tokens_they_are_named_for(name: str, tokens: int) -> None:
    work = Workload(name, 2, 30, reader("7b"), forced=True).list(0)  # type: ignore[arg-type]
    assert [rows * columns // 4 for _, rows, columns in work.grids] == [tokens] * 2
    assert work.prompt_ids.count(reader("7b").tokenizer.image_pad_id) == 2 * tokens
    assert (work.max_new_tokens, work.forced) == (30, True)


def test_a_budget_that_shrinks_pages_is_refused() -> None:
    mini = PromptReader.from_checkpoint(locate("mini").folder)
    with pytest.raises(ValueError, match="616 visual tokens, but .* max_pixels=37632"):
        Workload("mmdocir", 5, 30, mini)
    with pytest.raises(ValueError, match="whose answers end by themselves"):
        Workload("mini", 5, 30, mini)
    with pytest.raises(ValueError, match="1 pages have one order"):
        Workload("mini", 1, None, mini)


def test_a_file_that_is_no_image_is_refused() -> None:
    with pytest.raises(PageError):
        reader().work("Which?", [b"no image"], 5)


def test_a_plan_that_measures_nothing_is_refused() -> None:
    for options in ({"lists": 0}, {"lists": 1, "warmup": -1}, {"lists": 1, "seconds": 0.0}):
        with pytest.raises(ValueError, match="--"):
            Plan(**options)


def test_names_of_contenders() -> None:
    assert tuple(peer.name for peer in all_peers()) == PEERS
    assert [peer.name for peer in choose_peers(["ours-int4", "transformers"])] == [
        "ours-int4",
        "transformers",
    ]
    setting = Setting(random="tiny")
    assert len({peer.subject(setting) for peer in all_peers()}) == len(PEERS)
    with pytest.raises(ValueError, match="no contender 'tensorrt'; there are transformers"):
        choose_peers(["tensorrt"])


def test_reasons_for_skipping() -> None:
    drawn = {peer.name: peer.why_not(Setting(random="tiny")) for peer in all_peers()}
    assert drawn["ours-bf16"] is None and drawn["transformers"] is None
    assert "early" in (drawn["ours-bf16-default"] or "")
    nothing = {peer.name: peer.why_not(Setting()) for peer in all_peers()}
    assert "--engine int4=FOLDER" in (nothing["ours-int4"] or "")
    assert "--checkpoint" in (nothing["transformers"] or "")
    assert "--llama-server" in (nothing["llama.cpp"] or "")
    assert all(nothing[name] for name in PEERS)


def test_vllm_says_why_it_is_left_out() -> None:
    mini = Setting(checkpoint=locate("mini").folder)
    for peer in choose_peers(["vllm-bf16", "vllm-fp8", "vllm-gptq"]):
        reason = peer.why_not(mini)
        assert reason is not None and ("pip install vllm" in reason or "--device cuda" in reason)


@given(st.lists(st.integers(1, 6), min_size=1, max_size=8))
def test_collapsed_prompts_have_one_pad_per_page(counts: list[int]) -> None:
    pad, ids = 7, [1, 2]
    for count in counts:
        ids += [3, *[pad] * count, 4]
    collapsed = collapse_pads(ids, pad)
    assert collapsed.count(pad) == len(counts)
    assert [token for token in collapsed if token != pad] == [t for t in ids if t != pad]


def test_the_command_loads_neither_torch_nor_transformers() -> None:
    code = (
        "import sys, mmr5_bench.peers.command as c, argparse\n"
        "c.add_arguments(argparse.ArgumentParser())\n"
        "sys.exit(sorted(m for m in ('torch', 'transformers', 'numpy') if m in sys.modules) or 0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_ratios_are_of_the_lists_that_both_answered() -> None:
    lists, setting = workload(), Setting(random="tiny")
    slow, fast = choose_peers(["transformers", "ours-bf16"])
    tracks = [Track.of(peer, setting, 1) for peer in (slow, fast)]
    for track, ms, count in ((tracks[0], 100.0, 4), (tracks[1], 50.0, 2)):
        for index in range(count):
            work = lists.list(index)
            stages = {"image_decode": 1.0, "load_pages": 2.0, "decode": ms / 2}
            made = answer(work, ttft_ms=10.0, stages_ms=stages)
            kept = track.rounds.setdefault(lists.label, [])
            kept.append(Round.of(index, work, ms + index, made))
    baseline, ours = entries_of(tracks, [lists], "transformers")
    assert "ratios" not in baseline
    assert dict(ours)["ratios"]["mean"]["value"] == pytest.approx(50.5 / 100.5)  # type: ignore[index]
    assert baseline["work"] == ours["work"]  # the same lists, of which one answered fewer
    assert sum(ours["stages_ms"].values()) == pytest.approx(50.5)
    assert ours["stages_ms"]["load_pages"] == 3.0 and "image_decode" not in ours["stages_ms"]
    assert ours["name"] == "peers[workload=small,pages=3,generated=12,dtype=float32]"
    assert ours["axes"] == {
        "pages": 3, "workload": "small", "generated": 12, "forced": True, "cache": "cold",
        "dtype": "float32", "quant": "bf16", "stop": "eos",
    }  # fmt: skip
    assert ours["tokens"]["image"] == 3 * 12
    assert ours["per_token_ms"]["p50"]["value"] == pytest.approx(40.5 / 11)


def entry(lists: Workload, setting: Setting, name: str = "transformers") -> Entry:
    """Of one list that took 9 ms."""
    [peer] = choose_peers([name])
    track = Track.of(peer, setting, 0)
    work = lists.list(0)
    track.rounds[lists.label] = [Round.of(0, work, 9.0, answer(work))]
    [found] = entries_of([track], [lists], "transformers")
    return found


def test_work_is_of_everything_that_decides_the_lists() -> None:
    setting = Setting(random="tiny")
    lists = workload()
    narrow = replace(reader(), budget=reader().budget.replaced(None, 20 * 784))
    template = load_template("mm-r5-images-first")
    profiled = replace(reader(), tokenizer=reader().tokenizer.with_template(template))
    others = [
        replace(lists, seed=1),
        replace(lists, pages=4),
        replace(lists, generated=13),
        replace(lists, forced=False),
        replace(lists, reader=narrow),
        replace(lists, reader=profiled),
    ]
    works = {entry(one, setting)["work"] for one in (lists, *others)}
    assert len(works) == 1 + len(others)
    assert entry(lists, replace(setting, seed=5))["work"] == entry(lists, setting)["work"]


def test_another_compute_type_is_another_entry() -> None:
    for name in ("transformers", "ours-int4", "tinygemm-g64", "bitsandbytes-nf4"):
        found = [entry(workload(), Setting(random="tiny", dtype=t), name) for t in DTYPES]
        assert [one["axes"]["dtype"] for one in found] == list(DTYPES)
        assert len({one["name"] for one in found}) == len(DTYPES)


def test_stages_beyond_the_wall_time_are_refused() -> None:
    work = workload().list(0)
    Round.of(0, work, 100.0, answer(work, stages_ms={"prefill": 60.0, "decode": 40.9}))
    with pytest.raises(ValueError, match=r"stages of 102.000 ms in a wall time of 100.000 ms"):
        Round.of(0, work, 100.0, answer(work, stages_ms={"prefill": 60.0, "decode": 42.0}))


def test_turns_are_drawn_anew_and_spread_who_follows_whom() -> None:
    drawn = [tuple(turns(3, 0, index, 0)) for index in range(300)]
    assert drawn == [tuple(turns(3, 0, index, 0)) for index in range(300)]
    counts = {order: drawn.count(order) for order in permutations(range(3))}
    assert all(30 <= count <= 70 for count in counts.values()), counts
    assert drawn[:20] != [tuple(turns(3, 1, index, 0)) for index in range(20)]
    assert drawn[:20] != [tuple(turns(3, 0, index, 1)) for index in range(20)]


def test_the_journal_keeps_every_run_and_reads_back_the_last(tmp_path: Path) -> None:
    path, lists = journal_path(tmp_path / "out.json"), workload()
    rounds = [
        Round.of(i, lists.list(i), 5.0 + i, answer(lists.list(i), "text", token_ids=(1, i)))
        for i in range(2)
    ]
    first = Journal.begin(path, {"title": "first"})
    first.add("ours", lists.label, rounds[0])
    before = path.read_bytes()
    second = Journal.begin(path, {"title": "second"})
    for one in rounds:
        second.add("ours", lists.label, one)
    assert path.read_bytes().startswith(before)
    path.write_bytes(path.read_bytes() + b'{"run":"cut o')
    assert last_run(path) == ({"title": "second"}, {("ours", lists.label): rounds})
    with pytest.raises(ValueError, match="has no run"):
        last_run(tmp_path / "other.jsonl")


def test_a_document_that_is_its_own_journal_is_refused() -> None:
    for name in ("x.jsonl", "x.JSONL"):
        with pytest.raises(ValueError, match=f"-o {name} .* name the document x.json"):
            journal_path(Path(name))


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("group", GROUP_SIZES)
def test_tinygemm_multiplies_the_dequantized_weight(
    group: int, dtype: torch.dtype, tolerance: float
) -> None:
    torch.manual_seed(group)
    linear = nn.Linear(256, 96, dtype=dtype)
    codes, both = quantize_groups(linear.weight.detach(), group)
    weight = dequantize(codes, both.to(dtype))
    for rows in (1, 5, 33):
        x = torch.randn(2, rows, 256, dtype=dtype)
        found = Int4Linear(linear, group)(x).float()
        expected = x.float() @ weight.T + linear.bias.float()
        assert found.shape == (2, rows, 96)
        assert (found - expected).abs().max() <= tolerance * expected.abs().max()


@given(st.integers(0, 50), st.sampled_from(GROUP_SIZES))
def test_rounding_is_within_half_a_step(seed: int, group: int) -> None:
    weight = torch.randn(16, 128, generator=torch.Generator().manual_seed(seed))
    codes, both = quantize_groups(weight, group)
    assert 0 <= int(codes.min()) and int(codes.max()) <= 15
    step = both[..., 0].transpose(0, 1).repeat_interleave(group, dim=1)
    assert ((dequantize(codes, both) - weight).abs() <= step / 2 + 1e-5).all()


def test_groups_have_to_divide_the_columns() -> None:
    with pytest.raises(RuntimeError, match="groups of 128 do not divide 192 columns"):
        quantize_groups(torch.zeros(4, 192), 128)
