"""How long it takes until an engine has answered: importing, loading, the first list.

Runs in a process of its own, so that nothing is imported, compiled or loaded before::

    python -m mmr5_bench.targets.first_rerank FOLDER --device cuda --kernels triton
    python -m mmr5_bench.targets.first_rerank FOLDER --backend onnxruntime --pages 2 -o FILE

The last line is one JSON object of seconds, and of bytes of main memory where the system tells.
Files that were just written lie in the page cache, so loading is timed from there and not from the
disk.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_MODULE = "mmr5_bench.targets.first_rerank"
_TRITON_CACHE = "TRITON_CACHE_DIR"
_DTYPES = {"native": "bfloat16", "onnxruntime": "float32"}


def measure(
    folder: Path, device: str, kernels: str, compiled: Path, *, pages: int, written: int
) -> dict[str, float]:
    """What it takes in a new process whose compiled kernels are kept in ``compiled``.

    ``import_s``, ``load_s``, ``first_s``, ``second_s``, and ``total_s`` from the call of ``load``
    to the end of the first rerank; the most resident memory until it was loaded and at all,
    ``loaded_peak_bytes`` and ``peak_bytes``, where the system tells. RuntimeError with its last
    line when the process fails.
    """
    command = [sys.executable, "-m", _MODULE, str(folder), "--device", device]
    command += ["--kernels", kernels, "--pages", str(pages), "--written", str(written)]
    environment = {**os.environ, _TRITON_CACHE: str(compiled)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["it said nothing"]
        raise RuntimeError(f"the process of the first rerank failed: {lines[-1]}")
    found: dict[str, float] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def main() -> None:
    """Command line entry."""
    parser = argparse.ArgumentParser(description="Time the way to the first rerank.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--kernels", default="auto")
    parser.add_argument("--backend", choices=tuple(_DTYPES), default="native")
    parser.add_argument("--pages", type=int, default=10)
    parser.add_argument("--written", type=int, default=110)
    parser.add_argument("-o", "--output", type=Path, help="JSON to write, with what was measured")
    options = parser.parse_args()
    start = time.perf_counter()
    import mmr5_runtime

    imported = time.perf_counter() - start
    found = {"import_s": imported, **_reranks(mmr5_runtime, options)}
    if options.output is not None:
        _write(found, options)
    print(json.dumps(found))


def _reranks(mmr5_runtime: Any, options: argparse.Namespace) -> dict[str, float]:
    pages = [_page(number) for number in range(options.pages)]
    start = time.perf_counter()
    reranker = mmr5_runtime.Reranker.load(
        options.folder,
        options.device,
        dtype=_DTYPES[options.backend],
        kernels=options.kernels,
        backend=options.backend,
    )
    loaded = time.perf_counter()
    from mmr5_bench.evidence.memory import peak_resident_bytes  # imports torch, as loading does

    loaded_peak = peak_resident_bytes()
    asking = {"max_new_tokens": options.written, "stop": "eos", "constrain": False}
    times = []
    for number in range(2):
        began = time.perf_counter()
        reranker.rerank(f"Which page shows figure {number}?", pages, plan="single", **asking)
        times.append(time.perf_counter() - began)
    peak = peak_resident_bytes()
    return {
        "load_s": loaded - start,
        "first_s": times[0],
        "second_s": times[1],
        "total_s": loaded - start + times[0],
        **({"loaded_peak_bytes": loaded_peak, "peak_bytes": peak} if peak else {}),
    }


def _write(found: Mapping[str, float], options: argparse.Namespace) -> None:
    from mmr5_bench.evidence.machine import describe_machine
    from mmr5_bench.files import write_json
    from mmr5_bench.provenance import provenance
    from mmr5_runtime.artifact import read_manifest

    manifest = read_manifest(options.folder)
    about = {
        "kind": "first-rerank",
        "machine": describe_machine(options.device),
        "provenance": provenance() | _onnxruntime(options.backend),
        "source": manifest.source.name,
        "quant": manifest.quant.name,
        "layers": manifest.spec.text.num_layers,
        "backend": options.backend,
        "kernels": options.kernels,
        "dtype": _DTYPES[options.backend],
        "pages": options.pages,
        "written": options.written,
    }
    write_json({**about, **found}, options.output)


def _onnxruntime(backend: str) -> dict[str, str]:
    if backend != "onnxruntime":
        return {}
    from mmr5_runtime.onnx.session import runtime

    return {"onnxruntime": str(runtime().__version__)}


def _page(number: int) -> bytes:
    """An image file of 616 visual tokens."""
    import io

    from PIL import Image

    held = io.BytesIO()
    Image.new("RGB", (616, 784), (number, 255 - number, 128)).save(held, format="PNG")
    return held.getvalue()


if __name__ == "__main__":
    main()
