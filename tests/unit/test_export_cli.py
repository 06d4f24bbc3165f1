"""The mmr5-export command as a user runs it: output, exit status, no traceback, clean stops."""

from __future__ import annotations

import json
import os
import pty
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from mmr5_runtime.artifact import read_manifest
from mmr5_runtime.types import EngineError

COMMAND = [sys.executable, "-m", "mmr5_export.cli"]
QUICK = ("--method", "rtn", "--no-verify")


def run(*arguments: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*COMMAND, *map(str, arguments)],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
    )


def assert_one_error_line(found: subprocess.CompletedProcess[str], *parts: str) -> None:
    assert found.returncode == 1 and found.stdout == ""
    assert found.stderr.startswith("mmr5-export: error: ") and found.stderr.count("\n") == 1
    for part in parts:
        assert part in found.stderr


def test_the_last_line_is_one_json_document(tiny_checkpoint: Path, tmp_path: Path) -> None:
    output = tmp_path / "engine"
    found = run(*QUICK, "--model", tiny_checkpoint, "--output", output, "--json")
    assert found.returncode == 0 and found.stderr == ""
    document = json.loads(found.stdout.splitlines()[-1])
    manifest = read_manifest(output)
    assert document["output"] == str(output) and document["quant"] == "int4"
    assert document["method"] == "rtn" and document["quantized_linears"] == 22
    assert document["bytes"] == manifest.num_bytes and document["files"] == len(manifest.files)
    assert 17 < document["sqnr_db"]["lowest"] <= document["sqnr_db"]["median"] < 22
    assert document["sqnr_db"]["lowest_layer"] in manifest.formats


def test_int4_is_the_default_and_people_get_three_lines(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    found = run(*QUICK, "--model", tiny_checkpoint, "--output", tmp_path / "engine")
    assert found.returncode == 0 and len(found.stdout.splitlines()) == 3
    assert found.stdout.endswith("not verified: --no-verify\n")
    assert "as int4" in found.stdout and "SQNR of 22 quantized linears" in found.stdout
    assert read_manifest(tmp_path / "engine").quant_name == "int4"


def test_a_hub_id_without_network_names_the_alternatives(tmp_path: Path) -> None:
    found = run(
        "--model", "nobody/has-this", "--output", tmp_path / "engine",
        HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path / "cache"),
    )  # fmt: skip
    assert_one_error_line(found, "nobody/has-this is no local folder", "local checkpoint", "mini")
    assert not (tmp_path / "engine").exists()


def test_a_hub_id_in_the_cache_needs_no_network(tiny_checkpoint: Path, tmp_path: Path) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    cached = tmp_path / "cache" / "hub" / "models--somebody--tiny"
    shutil.copytree(tiny_checkpoint, cached / "snapshots" / commit)
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text(commit)
    found = run(
        "--model", "somebody/tiny", "--output", tmp_path / "engine", "--quant", "bf16",
        HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path / "cache"),
    )  # fmt: skip
    assert found.returncode == 0, found.stderr
    source = read_manifest(tmp_path / "engine").source
    assert (source.name, source.revision) == ("somebody/tiny", commit)


def test_an_error_is_one_line(tiny_checkpoint: Path, tmp_path: Path) -> None:
    found = run("--model", tiny_checkpoint, "--output", tmp_path)
    assert_one_error_line(found, f"{tmp_path} exists already", "--force")


@pytest.mark.parametrize("arguments", [(), ("--output", "x", "--quant", "int3"), ("--outptu",)])
def test_a_wrong_usage_is_status_2(arguments: tuple[str, ...]) -> None:
    found = run(*arguments)
    assert found.returncode == 2 and "usage: mmr5-export" in found.stderr
    assert "Traceback" not in found.stderr


def test_help_names_the_default_model() -> None:
    found = run("--help")
    assert found.returncode == 0 and "i2vec/MM-R5" in found.stdout and "mini" in found.stdout


def test_a_bar_is_drawn_on_a_terminal_only(tiny_checkpoint: Path, tmp_path: Path) -> None:
    pytest.importorskip("rich", reason="the bar needs rich")
    ours, theirs = pty.openpty()
    output = str(tmp_path / "engine")
    arguments = [*QUICK, "--model", str(tiny_checkpoint), "--output", output, "--json"]
    process = subprocess.Popen(
        [*COMMAND, *arguments],
        stdout=subprocess.PIPE,
        stderr=theirs,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "TERM": "xterm"},
    )
    os.close(theirs)
    drawn = b""
    try:
        while piece := os.read(ours, 4096):
            drawn += piece
    except OSError:  # how Linux reports that the other side has closed
        pass
    output, _ = process.communicate()
    os.close(ours)
    assert process.returncode == 0 and b"writing tensors" in drawn
    assert json.loads(output.splitlines()[-1])["quant"] == "int4"


# Python reports every opened file to audit hooks, which makes a place to stop at.
STOP_AT_THE_MANIFEST = """
import os, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # background jobs start with it ignored
def stop(event, arguments):
    if event == "open" and str(arguments[0]).endswith("mmr5_engine.json"):
        os.kill(os.getpid(), signal.{name})
sys.addaudithook(stop)
from mmr5_export.cli import main
sys.exit(main(sys.argv[1:]))
"""


def stopped(name: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", STOP_AT_THE_MANIFEST.format(name=name), *map(str, arguments)],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


def test_ctrl_c_leaves_nothing(tiny_checkpoint: Path, tmp_path: Path) -> None:
    found = stopped("SIGINT", *QUICK, "--model", tiny_checkpoint, "--output", tmp_path / "engine")
    assert found.returncode == 130 and "Traceback" not in found.stderr
    assert found.stderr.startswith("mmr5-export: interrupted")
    assert list(tmp_path.iterdir()) == []


def test_a_killed_export_never_looks_finished(tiny_checkpoint: Path, tmp_path: Path) -> None:
    found = stopped("SIGKILL", *QUICK, "--model", tiny_checkpoint, "--output", tmp_path / "engine")
    assert found.returncode == -signal.SIGKILL
    (left,) = tmp_path.iterdir()
    assert left.name.startswith("engine.partial-")
    with pytest.raises(EngineError, match="never finished"):
        read_manifest(left)
    # Also after somebody gives it the name of an engine.
    renamed = left.rename(tmp_path / "engine")
    with pytest.raises(EngineError, match="is not an engine folder"):
        read_manifest(renamed)


def test_an_export_beside_a_dead_one_works(tiny_checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "engine.partial-1").mkdir()
    found = run(*QUICK, "--model", tiny_checkpoint, "--output", tmp_path / "engine")
    assert found.returncode == 0
    assert sorted(os.listdir(tmp_path)) == ["engine", "engine.partial-1"]
