"""The commands that build TensorRT engines from exported graphs, as data and as a shell script.

``build.json`` holds one argument list per graph, for trtexec of TensorRT 10.15 and later; with
every optimisation profile after its ``--profile``. ``--stronglyTyped`` is what TensorRT 10 needs;
NVIDIA's guide for moving to 11 says that 11 does without it, since nothing else is left there.
``build.sh`` runs the same, and ``build.py`` builds through the Python bindings instead.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from mmr5_export.onnx.profiles import Profile, Shape

Profiles = Mapping[str, Sequence[Profile]]


def trtexec_arguments(graph: str, profiles: Sequence[Profile]) -> list[str]:
    """The command for ``graph``.onnx, run in its folder; it writes ``graph``.plan."""
    command = ["trtexec", f"--onnx={graph}.onnx", f"--saveEngine={graph}.plan", "--stronglyTyped"]
    for index, profile in enumerate(profiles):
        command += [f"--profile={index}"] if len(profiles) > 1 else []
        for bound in ("min", "opt", "max"):
            shapes = ",".join(
                f"{name}:{_dimensions(getattr(shape, bound))}"
                for name, shape in profile.shapes.items()
            )
            command.append(f"--{bound}Shapes={shapes}")
    return [*command, "--skipInference"]


def build_json(profiles: Profiles) -> dict[str, Any]:
    """The contents of ``build.json``."""
    return {
        "needs": "tensorrt>=10.15",
        "trtexec": {graph: trtexec_arguments(graph, given) for graph, given in profiles.items()},
        "python": [["python", "build.py"]],
    }


def build_sh(profiles: Profiles) -> str:
    """The contents of ``build.sh``."""
    lines = [
        "#!/bin/sh",
        "# Builds the engines with trtexec of TensorRT 10.15 or later, on the GPU they are for.",
        "set -eu",
        'cd "$(dirname "$0")"',
    ]
    for graph, given in profiles.items():
        lines.append(" \\\n  ".join(shlex.quote(word) for word in trtexec_arguments(graph, given)))
    return "\n".join(lines) + "\n"


def _dimensions(shape: Shape) -> str:
    return "x".join(map(str, shape))
