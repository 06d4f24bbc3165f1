"""The ``mmr5-export`` command."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mmr5_export.progress import shown_progress
from mmr5_export.source import DEFAULT_MODEL, MINI
from mmr5_runtime.types import CheckpointError, ExportError, Mmr5Error

# Exit statuses, in the order of the table in docs/export.md.
OK, FAILED, USAGE, INCOMPATIBLE, TOO_SMALL, REJECTED, INTERRUPTED = 0, 1, 2, 3, 4, 5, 130
_EXIT_STATUSES = """\
exit status:
  0    done
  1    another error (the message says what to do)
  2    wrong usage: an option or a recipe that is unknown, out of range or contradicts another
  3    incompatible input: no complete Qwen2.5-VL checkpoint, or a damaged one; calibration data
       that is incomplete, damaged or too little
  4    memory or disk too small
  5    verification failed: the engine is kept aside as OUTPUT.rejected
  130  interrupted; a calibrated export goes on with --resume
"""


def parser() -> argparse.ArgumentParser:
    """The command line as documented by ``--help``."""
    made = argparse.ArgumentParser(
        prog="mmr5-export",
        description="Turn a Qwen2.5-VL checkpoint into an engine folder for mmr5-rerank.",
        epilog=_EXIT_STATUSES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,  # defaults are those of ExportOptions
    )
    made.add_argument(
        "--model",
        default=DEFAULT_MODEL,
        help="checkpoint folder (dense, or quantized with compressed-tensors, GPTQ, AWQ or "
        f"ModelOpt), {MINI} (ships with the package) or hub id (default: {DEFAULT_MODEL})",
    )
    made.add_argument("--revision", help="branch, tag or commit of a hub id")
    made.add_argument("--output", required=True, type=Path, help="engine folder to create")
    made.add_argument(
        "--checkpoint-out", type=Path, help="also write a Hugging Face checkpoint (vLLM, SGLang)"
    )
    made.add_argument(
        "--checkpoint-for",
        choices=("transformers", "vllm", "sglang", "tensorrt-llm"),
        help="who reads --checkpoint-out: what it would misread is refused (default: vllm)",
    )
    made.add_argument("--json", action="store_true", default=False, help="last line is JSON")
    made.add_argument(
        "--dry-run",
        action="store_true",
        default=False,
        help="print plan and needs; nothing is written, and a hub id not downloaded",
    )
    made.add_argument(
        "--force",
        action="store_true",
        help="replace what is at --output, and (without --resume) an export that was cut off",
    )
    made.add_argument("--resume", action="store_true", help="go on with an export cut off")
    _add_storage(made.add_argument_group("what is stored"))
    _add_calibration(made.add_argument_group("calibration"))
    _add_verification(made.add_argument_group("verification"))
    _add_backends(made.add_argument_group("other engines"))
    return made


def _add_storage(group: Any) -> None:
    group.add_argument(
        "--quant",
        type=_recipe,
        default=None,
        metavar="RECIPE",
        help="int4 (default), int4-mixed, int8, int8-weight-only, fp8, bf16, or a recipe file",
    )
    group.add_argument(
        "--method",
        choices=("gptq", "awq", "rtn", "rtn-mse", "smoothquant+gptq"),
        help="default: the recipe's",
    )
    group.add_argument("--group-size", type=int, help="columns per int4 scale: 32, 64 or 128")
    symmetry = group.add_mutually_exclusive_group()
    symmetry.add_argument("--sym", dest="symmetric", action="store_true", help="no zero points")
    symmetry.add_argument("--asym", dest="symmetric", action="store_false", help="zero points")
    group.add_argument("--lm-head", choices=("int8", "int4", "bf16"), help="default: int8")
    group.add_argument(
        "--quantize-vision", choices=("int8", "fp8", "bf16"), help="vision tower (default: bf16)"
    )
    group.add_argument(
        "--profile",
        metavar="NAME",
        help="prompt to rank with: mm-r5 (default), mm-r5-images-first or mmrag",
    )
    group.add_argument("--bits", type=float, help="mean bits per weight of int4-mixed")
    group.add_argument("--damp", type=float, help="GPTQ: added to the Hessian's diagonal")
    group.add_argument("--min-pixels", type=int, help="least pixels of a page")
    group.add_argument("--max-pixels", type=int, help="most pixels of a page")


def _recipe(text: str) -> str:
    from mmr5_export.recipe import RECIPES

    if text not in RECIPES and not Path(text).is_file():
        raise argparse.ArgumentTypeError(
            f"{text!r} is neither a recipe file nor one of {', '.join(RECIPES)}"
        )
    return text


def _add_calibration(group: Any) -> None:
    group.add_argument(
        "--calib-data",
        type=Path,
        help=f"jsonl of query and pages, or a folder with one ({MINI} ships its own)",
    )
    group.add_argument("--calib-samples", type=int, help="samples drawn (default: 128)")
    group.add_argument("--seed", type=int, help="of the draw (default: 0)")
    group.add_argument(
        "--visual-weight", type=float, help="weight of a visual token next to text (default: 1)"
    )
    group.add_argument("--max-new-tokens", type=int, help="longest answer that is written")
    group.add_argument("--response-cache", type=Path, help="file that keeps the model's answers")
    group.add_argument("--device", help="auto, cpu, cuda or cuda:N (default: auto)")
    group.add_argument("--dtype", help="bfloat16 or float32 (default: by device)")


def _add_verification(group: Any) -> None:
    group.add_argument(
        "--verify",
        action=argparse.BooleanOptionalAction,
        help="run the engine and compare it with its original (default), or do not",
    )
    group.add_argument("--held-out", type=int, help="samples to verify on (default: 32)")
    group.add_argument(
        "--min-top1-agreement",
        type=float,
        metavar="SHARE",
        help="fail unless this share of held-out lists keeps its first page",
    )


def _add_backends(group: Any) -> None:
    group.add_argument(
        "--backend",
        action="append",
        choices=("native", "onnxruntime", "tensorrt-llm"),
        help="also write for this engine, may be repeated; native is always there",
    )
    group.add_argument(
        "--trt-target",
        action="append",
        choices=("engine", "llm-api", "onnx"),
        help="what of TensorRT, may be repeated: a TensorRT-LLM engine to build (default), a "
        "checkpoint for its LLM API, or ONNX for TensorRT alone",
    )
    group.add_argument("--trt-version", help="TensorRT-LLM version to write for")
    group.add_argument("--max-batch-size", type=int, help="prompts at a time (default: 1)")
    group.add_argument("--max-input-len", type=int, help="longest prompt in tokens")
    group.add_argument("--max-seq-len", type=int, help="longest prompt with its answer")
    group.add_argument(
        "--max-multimodal-len", type=int, help="tokens of pages in all prompts at a time"
    )
    group.add_argument("--aot", choices=("rtx",), help="compile ONNX files now, with TensorRT-RTX")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status, see ``--help``.

    A wrong usage leaves through argparse with status 2.
    """
    command_line = parser()
    given = vars(command_line.parse_args(arguments))
    if "checkpoint_for" in given and "checkpoint_out" not in given:
        command_line.error("--checkpoint-for says who reads --checkpoint-out, which is missing")
    command = {key: given.pop(key) for key in ("model", "quant", "output", "json", "dry_run")}
    try:
        if command.pop("dry_run"):
            _describe(command, given)
        else:
            _export(command, given)
    except Mmr5Error as error:
        print(f"mmr5-export: error: {error}", file=sys.stderr)
        return _status(error)
    except KeyboardInterrupt:
        print(f"mmr5-export: interrupted; {_left(command['output'])}", file=sys.stderr)
        return INTERRUPTED
    return OK


def _status(error: Mmr5Error) -> int:
    from mmr5_export.agreement import VerificationFailed
    from mmr5_export.estimate import ResourceError
    from mmr5_export.options import OptionError
    from mmr5_export.samples import DataError

    kinds = {
        OptionError: USAGE,
        DataError: INCOMPATIBLE,
        CheckpointError: INCOMPATIBLE,
        ResourceError: TOO_SMALL,
        VerificationFailed: REJECTED,
    }
    return next((status for kind, status in kinds.items() if isinstance(error, kind)), FAILED)


def _left(output: Path) -> str:
    from mmr5_export.journal import work_folder

    if work_folder(output).is_dir():
        return "repeat the command with --resume to go on."
    return "no unfinished engine was kept."


def _export(command: dict[str, Any], given: dict[str, Any]) -> None:
    # Imported late: they load torch, which --help and a wrong usage need not wait for.
    from mmr5_export.options import ExportOptions
    from mmr5_export.pipeline import export
    from mmr5_export.verify import export_document, summary_lines

    started, output = time.perf_counter(), command["output"]
    with shown_progress() as progress:
        manifest = export(
            command["model"], command["quant"], output, ExportOptions(**given), progress=progress
        )
    seconds = time.perf_counter() - started
    print(
        f"{output}: {manifest.source.name} as {manifest.quant.name}, "
        f"{manifest.num_bytes / 1e6:,.1f} MB in {seconds:.1f} s"
    )
    for line in summary_lines(manifest):
        print(line)
    if command["json"]:
        print(json.dumps(export_document(manifest, output, seconds)))


def _describe(command: dict[str, Any], given: dict[str, Any]) -> None:
    from mmr5_export.job import prepare
    from mmr5_export.options import ExportOptions
    from mmr5_export.places import check_places
    from mmr5_export.workload import check, plan_document, plan_lines, require

    model, quant, output = command["model"], command["quant"], command["output"]
    options = ExportOptions(**given)
    try:
        check_places(model, output, options)
        with shown_progress() as progress:
            job = prepare(model, quant, output, options, progress, download=False)
            required = require(job)
    except OSError as error:
        raise ExportError(f"{model} cannot be read ({error}); check the permissions.") from error
    for line in plan_lines(job, required):
        print(line)
    if command["json"]:
        print(json.dumps(plan_document(job, required)))
    check(job, required)  # last: the plan is worth seeing also where it does not fit


if __name__ == "__main__":
    sys.exit(main())
