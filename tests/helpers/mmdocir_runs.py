"""Runs of ``mmr5-bench mmdocir`` over a small data set, as the tests ask for them."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np

from helpers.mmdocir_files import write_scores
from mmr5_bench.mmdocir import command
from mmr5_bench.mmdocir.annotations import find_annotations, read_annotations
from mmr5_bench.mmdocir.work import Options, Work, open_work


def invoke(*arguments: str | Path) -> int:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return command.run(parser.parse_args([str(argument) for argument in arguments]))


def freeze(data: Path, depth: int = 5) -> Path:
    """Random first-stage scores for every question, frozen; returns the file of candidates."""
    annotations = read_annotations(find_annotations(data))
    rng = np.random.default_rng(2)
    scores = [(q.id, rng.random(annotations.document(q).num_pages)) for q in annotations.questions]
    file = write_scores(data / "first.jsonl", [(q, row.tolist()) for q, row in scores])
    output = data / f"candidates-{depth}.json"
    arguments: list[str | Path] = [
        "--data",
        data,
        "--scores",
        file,
        "--depth",
        str(depth),
        "-o",
        output,
    ]
    assert invoke("freeze", *arguments) == 0
    return output


def run_command(data: Path, engine: Path, output: Path, *options: str | Path) -> int:
    candidates = data / "candidates-5.json"
    return invoke(
        *("run", "--data", data, "--candidates", candidates, "--k", "3", "--engine", engine),
        *("--device", "cpu", "--think", "off", "-o", output, *options),
    )


def open_run(data: Path, engine: Path, **options: Any) -> Work:
    asked = Options(**{"k": 3, "device": "cpu", "think": "off", **options})
    return open_work(data, data / "candidates-5.json", engine, asked)


def load(path: Path) -> dict[str, Any]:
    document: dict[str, Any] = json.loads(path.read_text())
    return document
