"""Compiles Triton kernels for GPUs that are not there, and says what ptxas made of them.

The test process interprets kernels, which is decided when they are defined, so that this happens
in a process of its own. A module of kernels has a function ``variants()`` that yields
:class:`Variant`-like tuples ``(name, kernel, signature, constexprs, options)``:

* ``signature``: argument name -> Triton type, such as ``"*bf16"``, ``"i32"`` or ``"fp32"``;
  pointers are taken to be multiples of 16 bytes, as torch allocates, and so are integers whose
  type ends in ``:16``. Arguments that are constexpr are left out.
* ``constexprs``: argument name -> value; ``options``: ``num_warps`` and ``num_stages`` and so on.

A variant whose name ends in ``@sm_90`` is compiled for that architecture alone.

Run as a program: ``aot.py [--keep FOLDER] 80,90 module [name part ...]`` prints one JSON list; with
a folder the PTX and the cubin of every variant are written there, for cuobjdump.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Compiled:
    """One kernel for one architecture; bytes are per thread, ``shared`` per block."""

    name: str
    sm: int
    registers: int
    stack: int
    spill_stores: int
    spill_loads: int
    shared: int
    ptx: dict[str, int]  # how often each PTX instruction is written


def compile_variants(
    module: str,
    sms: Sequence[int] = (80, 90),
    only: Sequence[str] = (),
    keep: Path | None = None,
) -> list[Compiled]:
    """Every variant of ``module`` whose name contains one of ``only`` (or all), for each SM.

    With ``keep`` PTX and cubin of each are left in that folder.
    """
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    folder = ["--keep", str(keep)] if keep else []
    command = [sys.executable, __file__, *folder, ",".join(map(str, sms)), module, *only]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        raise AssertionError(f"{module} does not compile:\n{done.stderr[-4000:]}")
    return [Compiled(**row) for row in json.loads(done.stdout.splitlines()[-1])]


def _compile(variant: tuple[Any, ...], sm: int, keep: Path | None) -> Compiled:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    name, kernel, signature, constexprs, options = variant
    types, divisible = {}, {}
    for i, argument in enumerate(kernel.arg_names):
        if argument in constexprs:
            types[argument] = "constexpr"
            continue
        types[argument], _, multiple = signature[argument].partition(":")
        if types[argument].startswith("*") or multiple == "16":
            divisible[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, types, constexprs, divisible)
    made = triton.compile(source, target=GPUTarget("cuda", sm, 32), options=dict(options))
    if keep is not None:
        stem = re.sub(r"\W+", "_", f"{name}_{sm}")
        (keep / f"{stem}.ptx").write_text(made.asm["ptx"])
        (keep / f"{stem}.ttgir").write_text(made.asm["ttgir"])
        (keep / f"{stem}.cubin").write_bytes(made.asm["cubin"])
    return _assemble(name, sm, made.asm["ptx"], made.metadata.shared)


def _assemble(name: str, sm: int, ptx: str, shared: int) -> Compiled:
    """Lets the ptxas that Triton uses report on the PTX."""
    import triton

    architecture = re.search(r"^\.target (sm_\w+)", ptx, re.MULTILINE)
    assert architecture
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.ptx"
        path.write_text(ptx)
        done = subprocess.run(
            [triton.knobs.nvidia.ptxas.path, "-v", f"-arch={architecture[1]}", str(path)]
            + ["-o", str(path.with_suffix(".cubin"))],
            capture_output=True,
            text=True,
            check=True,
        )

    def number(pattern: str) -> int:
        found = re.search(pattern, done.stderr)
        assert found, done.stderr
        return int(found[1])

    return Compiled(
        name=name,
        sm=sm,
        registers=number(r"Used (\d+) registers"),
        stack=number(r"(\d+) bytes stack frame"),
        spill_stores=number(r"(\d+) bytes spill stores"),
        spill_loads=number(r"(\d+) bytes spill loads"),
        shared=shared,
        ptx=dict(Counter(re.findall(r"^\s+(?:@!?%p\d+ )?([a-z][\w.:]*)\s", ptx, re.MULTILINE))),
    )


def _main(arguments: list[str]) -> None:
    keep = None
    if arguments[0] == "--keep":
        keep, arguments = Path(arguments[1]), arguments[2:]
        keep.mkdir(parents=True, exist_ok=True)
    sms, module, *only = arguments
    sys.path.insert(0, str(Path(__file__).parents[1]))  # for modules of the tests' helpers
    rows = []
    for variant in import_module(module).variants():
        name, _, single = variant[0].partition("@sm_")
        if only and not any(part in name for part in only):
            continue
        for sm in map(int, sms.split(",")):
            if not single or int(single) == sm:
                rows.append(asdict(_compile((name, *variant[1:]), sm, keep)))
    print(json.dumps(rows))


if __name__ == "__main__":
    _main(sys.argv[1:])
