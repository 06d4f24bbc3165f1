"""What the runbook measures, the most important first.

A step is one command in a process of its own. It is told how many seconds it may take and ends by
itself then, with what it has; its hard bound lies a little further out.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path

Command = Callable[[float], list[str]]
"""From the seconds a step may take to its command line."""

PEERS = (
    "transformers",
    "transformers-static",
    "ours-int4",
    "ours-bf16",
    "tinygemm-g128",
    "bitsandbytes-nf4",
    "bitsandbytes-int8",
)
PEERS_LISTS = "--workload mmdocir --pages 10 --generated 110 --lists 8".split()
PEERS_DRY = "--workload small --pages 2 --generated 3 --lists 1".split()
KERNELS_DRY = "--interpret --dtype bfloat16 --format int4 int8 --m 1 65".split()
KERNELS_DRY += ["--op", "decoder.qkv", "attention", "rope_append", "greedy", "vision.window"]
VLLM_LIBRARY = Path(".kit") / "_C_stable_libtorch.abi3.so"
PROOF, PROVEN = "proof.json", "proven.json"
GPU_LIBRARIES = ("llmcompressor", "compressed_tensors")
_CALL = ("-m", "mmr5_bench.runbook.call")
ENVIRONMENT = "environment.json"
INTERPRETED_SECONDS = 400.0
EARLY = 75  # EX_TEMPFAIL: no exit status of a crash
SCRATCH = "export-scratch-"  # how folders begin that hold whole weights for a while
MARGIN_SECONDS, CUDA_MARGIN_SECONDS = 5.0, 25.0  # a device takes long to be left
EXPORT_BYTES = 30_000_000_000  # the checkpoint of 16.6 GB, the engine, and some room


@dataclass(frozen=True)
class Step:
    """One step. ``group`` selects several at once; ``files`` are those it writes, in the folder of
    results; ``seconds`` is its bound, and it is not started with less than ``least`` left;
    ``needs`` are modules, and ``disk_bytes`` free disk, without which it cannot run; ``early`` is
    the exit status by which it says that its time was over before its last part. Of its bound it
    is told all but ``margin`` seconds, in which it writes what it has and ends. Folders beginning
    with ``scratch`` are its own and are removed before and after it."""

    name: str
    group: str
    about: str
    command: Command
    seconds: float
    least: float
    files: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()
    disk_bytes: int = 0
    early: int | None = None
    margin: float = MARGIN_SECONDS
    scratch: str = ""

    def missing(self) -> str | None:
        """Why it cannot run here; None when it can."""
        absent = [name for name in self.needs if not is_installed(name)]
        return f"needs {', '.join(absent)}, not installed here" if absent else None


def is_installed(module: str) -> bool:
    """Whether ``module`` can be imported, without importing it (its packages are)."""
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # the package around it
        return False


def plan_steps(checkout: Path, out: Path, *, dry_run: bool) -> list[Step]:
    """Every step in order, for the 7B shape on a GPU, or for a tiny one on the CPU."""
    plan = _Plan(checkout, out, dry_run)
    steps = [
        plan.module_step(
            "environment",
            "machine, versions, ceilings of memory and matrix products",
            "environment",
            (60, 15),
            (ENVIRONMENT,),
        ),
        plan.gpu_tests(),
        plan.prove(),
        plan.targets(),
        plan.kernels(),
    ]
    usual, both = ("10", "5"), ("int4", "bf16")

    def reranks(
        group: str, workload: str, pages: Sequence[str], generated: Sequence[str], *quants: str
    ) -> None:
        for quant in quants:
            name = f"{group}-{quant}"
            steps.append(plan.reranks(name, quant, workload, pages, generated, (150, 45)))

    reranks("reranks", "mmdocir", usual, ("110",), *both)
    steps += [plan.peers(), plan.reuse()]
    reranks("reranks", "mmdocir", usual, ("110",), "int8")
    reranks("lengths", "mmdocir", ("10",), ("30", "300"), *both)
    reranks("lists20", "mmdocir", ("20",), ("110",), *both)
    reranks("dense", "dense", usual, ("110",), *both)
    reranks("vidore", "vidore", usual, ("110",), *both)
    export = plan.module_step(
        "export",
        "a whole checkpoint to int4, rounded to nearest",
        "export",
        (600, 240),
        ("export.json",),
    )
    needed = 0 if dry_run else EXPORT_BYTES
    return [*steps, replace(export, disk_bytes=needed, scratch=SCRATCH)]


@dataclass(frozen=True)
class _Plan:
    checkout: Path
    out: Path
    dry_run: bool

    @property
    def shape(self) -> str:
        return "tiny" if self.dry_run else "7b"

    @property
    def device(self) -> str:
        return "cpu" if self.dry_run else "cuda"

    def file(self, name: str) -> str:
        return str(self.out / name)

    def command(self, module: str, *options: str) -> list[str]:
        return [sys.executable, *_CALL, module, *options]

    def module_step(
        self,
        name: str,
        about: str,
        module: str,
        seconds: tuple[float, float],
        files: tuple[str, ...],
    ) -> Step:
        """A step of this package: ``runbook/<module>.py``."""
        options = ("--shape", self.shape, "--device", self.device, "-o", self.file(files[0]))

        def command(bound: float) -> list[str]:
            return self.command(f"mmr5_bench.runbook.{module}", *options, "--seconds", f"{bound:g}")

        return self.step(name, name, about, command, seconds, files)

    def gpu_tests(self) -> Step:
        ignored = []
        if not all(is_installed(module) for module in GPU_LIBRARIES):
            ignored = ["--ignore", "tests/gpu/test_quantize_cuda.py"]
        command = [sys.executable, "-m", "pytest", "-m", "gpu", "tests/gpu", *ignored]
        without = f", without {', '.join(GPU_LIBRARIES)}" if ignored else ""
        return self.step(
            "gpu-tests",
            "gpu-tests",
            f"the tests of the CUDA path{without}",
            lambda bound: [*command, "-q", "-p", "no:cacheprovider"],
            (150, 20),
            needs=("pytest", "hypothesis", "transformers"),
        )

    def reranks(
        self,
        name: str,
        quant: str,
        workload: str,
        pages: Sequence[str],
        generated: Sequence[str],
        seconds: tuple[float, float],
    ) -> Step:
        # The lists of a dry run are as short as lists can be.
        shown, written = (["2"], ["3"]) if self.dry_run else (pages, generated)
        workload = "small" if self.dry_run else workload
        rounds = "1" if self.dry_run else "10"
        options = ["--shape", self.shape, "--device", self.device, "--quant", quant]
        options += ["--workload", workload, "--pages", *shown, "--generated", *written]
        options += ["--cache", "cold", "warm", "--rounds", rounds]
        options += ["--ceilings", self.file(ENVIRONMENT), "-o", self.file(f"{name}.json")]

        def command(bound: float) -> list[str]:
            given = options if (self.out / ENVIRONMENT).is_file() else _without_ceilings(options)
            return self.command("mmr5_bench.random_command", *given, "--seconds", f"{bound:g}")

        about = (
            f"{quant}, lists of {', '.join(pages)} {workload} pages, {', '.join(generated)} tokens"
        )
        group = name.partition("-")[0]
        return self.step(name, group, about, command, seconds, (f"{name}.json",))

    def peers(self) -> Step:
        options = ["--random", self.shape, "--device", self.device, "--sequential"]
        lists = PEERS_DRY if self.dry_run else PEERS_LISTS
        options += [*lists, "-o", self.file("peers.json")]
        for peer in PEERS:
            options += ["--peer", peer]

        def command(bound: float) -> list[str]:
            return self.command("mmr5_bench.peers.command", *options, "--seconds", f"{bound:g}")

        about = "the same lists by transformers and others"
        needs = ("mmr5_bench.peers.command", "transformers")
        return self.step("peers", "peers", about, command, (300, 60), ("peers.json",), needs)

    def prove(self) -> Step:
        options = ["--out", str(self.out), *(["--dry-run"] if self.dry_run else [])]

        def command(bound: float) -> list[str]:
            return self.command("mmr5_bench.prove_command", *options, "--seconds", f"{bound:g}")

        about = "every kernel of ours against its reference; which are right on this GPU"
        files = (PROOF,) if self.dry_run else (PROOF, PROVEN)
        needs = ("mmr5_bench.prove_command", "triton")
        return self.long(self.step("prove", "prove", about, command, (300, 60), files, needs))

    def targets(self) -> Step:
        options = ["-o", self.file("targets.json"), *(["--dry-run"] if self.dry_run else [])]

        def command(bound: float) -> list[str]:
            given = [*options, *self.vllm_options(), "--seconds", f"{bound:g}"]
            return self.command("mmr5_bench.targets_command", *given)

        about = "every target of the GPU engine, by several configurations"
        needs = ("mmr5_bench.targets_command",)
        files = ("targets.json", "targets.md")
        # In a call of ten minutes it is left to the next one, rather than cut in half.
        step = self.step("targets", "targets", about, command, (480, 300), files, needs)
        return replace(self.long(step), scratch=SCRATCH)

    def kernels(self) -> Step:
        options = ["--shapes", self.shape, "--device", self.device, "-o", self.file("kernels.json")]
        if self.dry_run:
            options += KERNELS_DRY

        def command(bound: float) -> list[str]:
            given = [*options, *self.vllm_options(), "--seconds", f"{bound:g}"]
            return self.command("mmr5_bench.kernels_command", *given)

        about = "every kernel of ours and of other libraries, each against its reference and floor"
        needs = ("mmr5_bench.kernels_command",)
        files = ("kernels.json",)
        return self.long(self.step("kernels", "kernels", about, command, (300, 60), files, needs))

    def long(self, step: Step) -> Step:
        """A step whose dry run interprets Triton kernels, which takes minutes."""
        return replace(step, seconds=INTERPRETED_SECONDS) if self.dry_run else step

    def vllm_options(self) -> list[str]:
        """vLLM's operators where they were put into the checkout (see docs/gpu.md)."""
        path = self.checkout / VLLM_LIBRARY
        return ["--vllm-library", str(path)] if path.is_file() else []

    def reuse(self) -> Step:
        script = str(self.checkout / "benchmarks" / "gpu" / "reuse_7b.py")
        options = ["--out", str(self.out), *(["--dry-run"] if self.dry_run else [])]
        step = self.step(
            "reuse",
            "reuse",
            "reading cold, from memory, in segments and relocated; steps of 1 to 8 tokens",
            lambda bound: [sys.executable, script, *options, "--seconds", f"{bound:g}"],
            (300, 60),
            ("reuse-7b.json",),
        )
        return replace(step, early=EARLY)

    def step(
        self,
        name: str,
        group: str,
        about: str,
        command: Command,
        seconds: tuple[float, float],
        files: tuple[str, ...] = (),
        needs: tuple[str, ...] = (),
    ) -> Step:
        bound, least = (60.0, 1.0) if self.dry_run else seconds
        margin = MARGIN_SECONDS if self.dry_run else CUDA_MARGIN_SECONDS
        return Step(name, group, about, command, bound, least, files, needs, margin=margin)


def _without_ceilings(options: Sequence[str]) -> list[str]:
    at = list(options).index("--ceilings")
    return [*options[:at], *options[at + 2 :]]
