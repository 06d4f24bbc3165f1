"""Runs of several contenders over mini's lists: same tokens, same prompts, nothing lost."""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from helpers.exporting import quick_export
from helpers.peers_journal import last_run
from mmr5_bench.evidence.document import Evidence, load_evidence, new_evidence
from mmr5_bench.evidence.gpu import GpuSampler
from mmr5_bench.evidence.machine import describe_machine
from mmr5_bench.evidence.memory import PeakMemory
from mmr5_bench.files import read_lines
from mmr5_bench.peers import command, ours
from mmr5_bench.peers.base import Answer, ListWork, Peer, Reading, Session, Setting
from mmr5_bench.peers.checkpoints import check_engines
from mmr5_bench.peers.contenders import choose_peers
from mmr5_bench.peers.huggingface import (
    TransformersSession,
    dense_model,
    replace_decoder_linears,
)
from mmr5_bench.peers.ours import OursPeer
from mmr5_bench.peers.prompts import PromptReader
from mmr5_bench.peers.run import Plan, run_peers, turns
from mmr5_bench.peers.tinygemm import Int4Linear
from mmr5_bench.peers.workloads import Workload
from mmr5_export.source import locate
from mmr5_runtime.loading import LoadedEngine
from mmr5_runtime.types import EngineError

PAGES = 2
SUMMARY = {
    "clock_mhz": {"min": 1400, "mean": 1700, "max": 1980},
    "throttled": True,
    "reasons": ["power cap"],
}


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> Setting:
    folder = tmp_path_factory.mktemp("mini") / "bf16"
    quick_export("mini", "bf16", folder)
    return Setting(checkpoint=locate("mini").folder, engines={"bf16": folder})


@dataclass(frozen=True)
class Altered(OursPeer):
    """Our engine with something wrong with it from the second list on."""

    title: str = ""
    error: type[BaseException] | None = None
    suffix: str = ""
    opens: bool = True

    @property
    def name(self) -> str:
        return self.title

    def subject(self, setting: Setting) -> str:
        return self.title

    @contextmanager
    def open(self, setting: Setting) -> Iterator[Session]:
        if not self.opens:
            raise EngineError("no memory")
        with super().open(setting) as session:
            yield AlteredSession(session, self.error, self.suffix)


class AlteredSession:
    """Raises ``error`` at the second list, or asks another question than it was given."""

    def __init__(
        self, session: Session, error: type[BaseException] | None, suffix: str = ""
    ) -> None:
        self._session, self._error, self._suffix = session, error, suffix
        self._asked = 0

    def forget(self) -> None:
        self._session.forget()

    def answer(self, work: ListWork) -> Answer:
        self._asked += 1
        if self._error is not None and self._asked == 2:
            raise self._error("out of luck")
        return self._session.answer(self._changed(work))

    def reading(self, work: ListWork, *, pixels: bool) -> Reading:
        return self._session.reading(self._changed(work), pixels=pixels)

    def _changed(self, work: ListWork) -> ListWork:
        return replace(work, question=work.question + self._suffix)


def run(
    peers: Sequence[Peer], setting: Setting, output: Path, *, lists: int = 2, **options: Any
) -> Evidence:
    assert setting.checkpoint is not None
    workload = Workload("mini", PAGES, None, PromptReader.from_checkpoint(setting.checkpoint))
    evidence = new_evidence("test", "mini", describe_machine())
    plan = Plan(lists, **{"warmup": 0, **options})
    run_peers(peers, setting, [workload], plan, evidence, output)
    return load_evidence(output)


def answered(folder: Path) -> list[dict[str, Any]]:
    """The journal's lines that are not a head."""
    return [line for _, line in read_lines(folder / "out.jsonl") if "begins" not in line]


def test_plain_engine_writes_the_tokens_of_transformers(setting: Setting, tmp_path: Path) -> None:
    peers = choose_peers(["transformers", "ours-bf16", "ours-bf16-default", "ours-int4"])
    evidence = run(peers, setting, tmp_path / "out.json", warmup=1)
    theirs, plain, default = evidence["entries"]
    assert [e["subject"] for e in evidence["entries"]] == [
        "transformers float32 sdpa greedy", "ours bf16 plain", "ours bf16 default",
    ]  # fmt: skip
    assert plain["quality"]["identical"]["value"] == 1.0
    assert plain["tokens"] == theirs["tokens"]
    assert default["quality"]["order_agreement"]["value"] == 1.0
    assert default["tokens"]["completion"] < plain["tokens"]["completion"]
    assert theirs["work"] == plain["work"] == default["work"]
    for entry in evidence["entries"]:
        assert len(entry["samples_ms"]) == 2 and entry["warmup"] == 1
        assert entry["quality"]["cases"] == 2
        mean = sum(entry["samples_ms"]) / 2
        assert sum(entry["stages_ms"].values()) == pytest.approx(mean)
        assert 0 < entry["ttft_ms"]["p50"]["value"] < entry["latency_ms"]["p50"]["value"]
    assert dict(plain)["ratios"]["p50"]["value"] > 0  # type: ignore[index]
    [skipped] = evidence["skipped"]
    assert skipped["subject"] == "ours int4 plain" and "--engine int4" in skipped["reason"]
    lines = answered(tmp_path)
    assert [line["index"] for line in lines] == [0, 0, 0, 1, 1, 1]
    # The order is drawn for every list.
    subjects = [entry["subject"] for entry in evidence["entries"]]
    drawn = [subjects[turn] for index in range(2) for turn in turns(3, setting.seed, index, 0)]
    assert [line["subject"] for line in lines] == drawn
    assert all("memory" not in entry and "gpu" not in entry for entry in evidence["entries"])


def test_a_contender_that_raises_keeps_what_it_did(setting: Setting, tmp_path: Path) -> None:
    crashing = Altered("bf16", title="crashing", error=MemoryError)
    closed = Altered("bf16", title="closed", opens=False)
    broken = replace(setting, engines={**setting.engines, "int8": tmp_path})
    peers = [*choose_peers(["ours-bf16", "ours-int8"]), crashing, closed]
    evidence = run(peers, broken, tmp_path / "out.json", lists=3)
    counts = {entry["subject"]: len(entry["samples_ms"]) for entry in evidence["entries"]}
    assert counts == {"ours bf16 plain": 3, "crashing": 1}
    reasons = {one["subject"]: one["reason"] for one in evidence["skipped"]}
    assert reasons["closed"] == "cannot be opened: EngineError: no memory"
    assert reasons["crashing"] == "failed at list 2 after 1 lists: MemoryError: out of luck"
    assert "not an engine folder" in reasons["ours int8 plain"]


def test_a_contender_with_another_prompt_is_refused(setting: Setting, tmp_path: Path) -> None:
    asking = Altered("bf16", title="asking", suffix=" Please!")
    evidence = run([OursPeer("bf16"), asking], setting, tmp_path / "out.json")
    assert [entry["subject"] for entry in evidence["entries"]] == ["ours bf16 plain"]
    [skipped] = evidence["skipped"]
    assert skipped["subject"] == "asking"
    assert "refused at list 1 after 0 lists: WorkMismatchError: read a prompt" in skipped["reason"]


def test_another_pixel_budget_is_refused(setting: Setting, tmp_path: Path) -> None:
    folder = tmp_path / "small"
    quick_export("mini", "bf16", folder, max_pixels=8 * 784)
    narrow = replace(setting, engines={"bf16": folder})
    evidence = run([OursPeer("bf16")], narrow, tmp_path / "out.json", lists=1)
    assert evidence["entries"] == []
    assert "same min_pixels and max_pixels" in evidence["skipped"][0]["reason"]


def test_an_interrupted_run_keeps_its_lists(setting: Setting, tmp_path: Path) -> None:
    stopping = Altered("bf16", title="stopping", error=KeyboardInterrupt)
    with pytest.raises(KeyboardInterrupt):
        run([OursPeer("bf16"), stopping], setting, tmp_path / "out.json")
    evidence = load_evidence(tmp_path / "out.json")
    counts = {entry["subject"]: len(entry["samples_ms"]) for entry in evidence["entries"]}
    assert counts["stopping"] == 1 and counts["ours bf16 plain"] in (1, 2)


def test_who_was_not_reached_is_named(setting: Setting, tmp_path: Path) -> None:
    peers = [Altered("bf16", title="stopping", error=KeyboardInterrupt), OursPeer("bf16")]
    with pytest.raises(KeyboardInterrupt):
        run(peers, setting, tmp_path / "out.json", sequential=True)
    [skipped] = load_evidence(tmp_path / "out.json")["skipped"]
    assert skipped["subject"] == "ours bf16 plain" and "before its first list" in skipped["reason"]


def test_who_takes_part_answers_a_list_however_short_the_time(
    setting: Setting, tmp_path: Path
) -> None:
    peers = choose_peers(["ours-bf16", "ours-bf16-default"])
    for sequential in (True, False):
        output = tmp_path / f"{sequential}.json"
        evidence = run(peers, setting, output, seconds=1e-6, sequential=sequential)
        assert [len(entry["samples_ms"]) for entry in evidence["entries"]] == [1, 1]
        assert evidence["skipped"] == []


def test_one_after_the_other(setting: Setting, tmp_path: Path) -> None:
    peers = choose_peers(["ours-bf16", "ours-bf16-default"])
    evidence = run(peers, setting, tmp_path / "out.json", sequential=True)
    assert [len(entry["samples_ms"]) for entry in evidence["entries"]] == [2, 2]
    # Resident memory has what others left; on a CPU there is no other.
    assert all("memory" not in entry for entry in evidence["entries"])
    subjects = [line["subject"] for line in answered(tmp_path)]
    assert subjects == ["ours bf16 plain"] * 2 + ["ours bf16 default"] * 2


def test_memory_and_clocks_are_watched_while_lists_are_answered(
    setting: Setting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    enter = PeakMemory.__enter__
    load = ours._load

    def entered(memory: PeakMemory) -> PeakMemory:
        events.append("watching")
        return enter(memory)

    def loaded(folder: Path, setting: Setting, backend: ours.Backend) -> LoadedEngine:
        events.append("loading")
        return load(folder, setting, backend)

    monkeypatch.setattr(PeakMemory, "__enter__", entered)
    monkeypatch.setattr(PeakMemory, "bytes", lambda _: {"peak_rss_bytes": 1, "peak_gpu_bytes": 7})
    monkeypatch.setattr(GpuSampler, "summary", lambda _: SUMMARY)
    monkeypatch.setattr(ours, "_load", loaded)
    peers = [OursPeer("bf16"), Altered("bf16", title="stopping", error=KeyboardInterrupt)]
    with pytest.raises(KeyboardInterrupt):
        run(peers, setting, tmp_path / "one.json", sequential=True)
    assert events == ["loading", "watching"] * 2
    one = load_evidence(tmp_path / "one.json")
    assert [entry["memory"] for entry in one["entries"]] == [{"peak_gpu_bytes": 7}] * 2
    assert [entry["gpu"] for entry in one["entries"]] == [SUMMARY] * 2

    both = run(choose_peers(["ours-bf16"]), setting, tmp_path / "out.json", lists=1)
    assert "memory" not in both["entries"][0] and "gpu" not in both["entries"][0]
    assert "1400 to 1980 MHz, throttled (power cap)" in both["note"]


def test_a_rerun_adds_to_the_journal_and_replaces_by_entries_only(
    setting: Setting, tmp_path: Path
) -> None:
    output = tmp_path / "out.json"
    run([OursPeer("bf16")], setting, output)
    document, lines = output.read_bytes(), answered(tmp_path)
    evidence = run([OursPeer("int8")], setting, output)  # no engine of that
    assert output.read_bytes() == document and len(evidence["entries"]) == 1
    assert answered(tmp_path) == lines
    run([OursPeer("bf16")], setting, output, lists=1)
    assert answered(tmp_path)[: len(lines)] == lines
    assert len(load_evidence(output)["entries"][0]["samples_ms"]) == 1
    head, rounds = last_run(tmp_path / "out.jsonl")
    [kept] = rounds.values()
    assert head["title"] == "test" and [one.index for one in kept] == [0]


def test_a_static_cache_is_as_long_as_its_list(setting: Setting) -> None:
    assert setting.checkpoint is not None
    reader = PromptReader.from_checkpoint(setting.checkpoint)
    long, short = (
        replace(Workload("mini", n, None, reader).list(0), max_new_tokens=4) for n in (5, 2)
    )
    with dense_model(setting) as model:
        session = TransformersSession(model, setting, "static")
        lengths = []
        for work in (short, long, short):
            session.forget()
            session.answer(work)
            lengths.append(model._previous_max_cache_length)
    assert lengths[0] == lengths[2] < lengths[1]


def test_engines_have_to_be_what_they_are_given_as(setting: Setting, tmp_path: Path) -> None:
    assert setting.checkpoint is not None
    bf16 = setting.engines["bf16"]
    with pytest.raises(ValueError, match=r"int8=.*: the engine there is bf16; write bf16="):
        check_engines({"int8": bf16}, setting.checkpoint)
    wrong = replace(setting, engines={"int8": bf16})
    assert "the engine there is bf16" in (OursPeer("int8").why_not(wrong) or "")
    other = tmp_path / "other"
    shutil.copytree(setting.checkpoint, other)
    check_engines(setting.engines, other)
    weights = other / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x7f")
    with pytest.raises(ValueError, match="made from mini with another model.safetensors"):
        check_engines(setting.engines, other)


def test_engines_of_one_name_are_told_apart(setting: Setting, tmp_path: Path) -> None:
    peer, subjects = OursPeer("int4"), set()
    for method, group in (("rtn", 64), ("rtn", 128), ("rtn-mse", 128)):
        folder = tmp_path / f"{method}-{group}"
        quick_export("mini", "int4", folder, method=method, group_size=group)
        made = replace(setting, engines={"int4": folder})
        axes = peer.axes(made)
        assert (axes["method"], axes["group"]) == (method, str(group))
        subjects.add(peer.subject(made))
    assert subjects == {
        "ours int4 rtn g64 plain", "ours int4 rtn g128 plain", "ours int4 rtn-mse g128 plain",
    }  # fmt: skip


def test_mini_at_another_place_is_still_mini(tmp_path: Path) -> None:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    copied = tmp_path / "MM-R5"
    shutil.copytree(locate("mini").folder, copied)
    (tmp_path / "link").symlink_to(locate("mini").folder)
    for folder in (copied, tmp_path / "link", locate("mini").folder):
        options = parser.parse_args(["--checkpoint", str(folder), "-o", "out.json"])
        chosen = command.setting_of(options)
        workloads = command.workloads_of(options, chosen)
        assert {one.name for one in workloads} == {"mini"}
        title, note = command.describe(options, chosen, workloads)
        assert title == "Runtimes on mini" and "says nothing about MM-R5" in note


def test_only_the_decoder_is_quantized(setting: Setting) -> None:
    with dense_model(setting) as model:
        count = replace_decoder_linears(model, lambda linear: Int4Linear(linear, 64))
        kinds = [name for name, part in model.named_modules() if isinstance(part, Int4Linear)]
    assert count == len(kinds) == 4 * 7
    assert all(name.startswith("model.language_model.layers.") for name in kinds)


def test_random_weights_write_a_forced_length(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    options = "--random tiny --workload small --pages 2 --generated 6 --lists 1 --warmup 0"
    chosen = "--peer transformers --peer transformers-static --peer ours-int4"
    output = tmp_path / "out.json"
    code = command.run(parser.parse_args([*options.split(), *chosen.split(), "-o", str(output)]))
    summary = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert code == 0
    assert "random weights, forced length" in summary["title"]
    assert [entry["tokens"]["completion"] for entry in summary["entries"]] == [6, 6, 6]
    assert len({entry["work"] for entry in summary["entries"]}) == 1
    assert all("identical" not in entry.get("quality", {}) for entry in summary["entries"])


def test_options_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    output = ["-o", str(tmp_path / "out.json")]
    for given, message in (
        ("--engine int4", "write it as int4=FOLDER"),
        ("--engine int3=nowhere", "no contender is int3; use bf16, int8, int4"),
        ("--device cuda:9", "is not there"),
        ("--engine int4=nowhere", "there is no folder nowhere"),
        ("--random tiny --workload mini", "only mini answers"),
        ("--generated 30", "whose answers end by themselves"),
        ("--peer tensorrt", "no contender 'tensorrt'"),
        ("--threads 0", "--threads 0"),
        (f"-o {tmp_path}/x.jsonl", "name the document x.json"),
    ):
        with pytest.raises(ValueError, match=message):
            command.run(parser.parse_args([*output, *given.split()]))
    assert not (tmp_path / "out.json").exists()
