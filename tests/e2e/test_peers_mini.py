"""Runs of several contenders over mini's lists: same tokens, same prompts, nothing lost."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from helpers.exporting import quick_export
from mmr5_bench.evidence.document import Evidence, load_evidence, new_evidence
from mmr5_bench.evidence.machine import describe_machine
from mmr5_bench.peers import command
from mmr5_bench.peers.base import Answer, ListWork, Peer, Reading, Session, Setting
from mmr5_bench.peers.contenders import choose_peers
from mmr5_bench.peers.huggingface import dense_model, replace_decoder_linears
from mmr5_bench.peers.ours import OursPeer
from mmr5_bench.peers.prompts import PromptReader
from mmr5_bench.peers.run import Plan, run_peers
from mmr5_bench.peers.tinygemm import Int4Linear
from mmr5_bench.peers.workloads import Workload
from mmr5_export.source import locate
from mmr5_runtime.types import EngineError

PAGES = 2


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

    @property
    def name(self) -> str:
        return self.title

    def subject(self, setting: Setting) -> str:
        return self.title

    @contextmanager
    def open(self, setting: Setting) -> Iterator[Session]:
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


def test_plain_engine_writes_the_tokens_of_transformers(setting: Setting, tmp_path: Path) -> None:
    peers = choose_peers(["transformers", "ours-bf16", "ours-bf16-default", "ours-int4"])
    evidence = run(peers, setting, tmp_path / "out.json", warmup=1)
    theirs, ours, default = evidence["entries"]
    assert [e["subject"] for e in evidence["entries"]] == [
        "transformers float32 sdpa greedy", "ours bf16 plain", "ours bf16 default",
    ]  # fmt: skip
    assert ours["quality"]["identical"]["value"] == 1.0
    assert ours["tokens"] == theirs["tokens"]
    assert default["quality"]["order_agreement"]["value"] == 1.0
    assert default["tokens"]["completion"] < ours["tokens"]["completion"]
    assert theirs["work"] == ours["work"] == default["work"]
    for entry in evidence["entries"]:
        assert len(entry["samples_ms"]) == 2 and entry["warmup"] == 1
        assert entry["quality"]["cases"] == 2
        mean = sum(entry["samples_ms"]) / 2
        assert sum(entry["stages_ms"].values()) == pytest.approx(mean)
        assert 0 < entry["ttft_ms"]["p50"]["value"] < entry["latency_ms"]["p50"]["value"]
    assert dict(ours)["ratios"]["p50"]["value"] > 0  # type: ignore[index]
    [skipped] = evidence["skipped"]
    assert skipped["subject"] == "ours int4 plain" and "--engine int4" in skipped["reason"]
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [line["index"] for line in lines] == [0, 0, 0, 1, 1, 1]
    # The order rotates: who is first at the one list is last at the other.
    assert lines[0]["subject"] == theirs["subject"] == lines[5]["subject"]


def test_a_contender_that_raises_keeps_what_it_did(setting: Setting, tmp_path: Path) -> None:
    crashing = Altered("bf16", title="crashing", error=MemoryError)
    broken = replace(setting, engines={**setting.engines, "int8": tmp_path})
    peers = [*choose_peers(["ours-bf16", "ours-int8"]), crashing]
    evidence = run(peers, broken, tmp_path / "out.json", lists=3)
    counts = {entry["subject"]: len(entry["samples_ms"]) for entry in evidence["entries"]}
    assert counts == {"ours bf16 plain": 3, "crashing": 1}
    reasons = {one["subject"]: one["reason"] for one in evidence["skipped"]}
    assert reasons["crashing"] == "failed at list 2 after 1 lists: MemoryError: out of luck"
    assert "cannot be opened: EngineError" in reasons["ours int8 plain"]
    assert EngineError.__name__ in reasons["ours int8 plain"]


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


def test_one_after_the_other(setting: Setting, tmp_path: Path) -> None:
    peers = choose_peers(["ours-bf16", "ours-bf16-default"])
    evidence = run(peers, setting, tmp_path / "out.json", sequential=True)
    assert [len(entry["samples_ms"]) for entry in evidence["entries"]] == [2, 2]
    assert all(entry["memory"]["peak_rss_bytes"] > 0 for entry in evidence["entries"])
    lines = (tmp_path / "out.jsonl").read_text().splitlines()
    subjects = [json.loads(line)["subject"] for line in lines]
    assert subjects == ["ours bf16 plain"] * 2 + ["ours bf16 default"] * 2


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
    ):
        with pytest.raises(ValueError, match=message):
            command.run(parser.parse_args([*given.split(), *output]))
    assert not (tmp_path / "out.json").exists()
