"""What may be said of checkpoints for TensorRT-LLM, which nobody here has run."""

from __future__ import annotations

_SMOOTHED = ("W4A16_AWQ", "W8A8_SQ_PER_CHANNEL")


def compared(algorithm: str | None, model: str, configs: str = "config keys") -> str:
    """What was checked of the layout that ``algorithm`` is written in, None for 16 bits.

    ``model`` is the architecture that the comparison was made on, ``configs`` what of the configs
    was compared. See ``tests/golden/modelopt``: no file of an export is compared itself.
    """
    numbers = "bytes of what it does not quantize"
    if algorithm is not None:
        numbers = "bytes for its own codes and scales"
    if algorithm == "FP8":  # rounded here, as it rounds
        numbers = "bytes for its own largest inputs"
    if algorithm in _SMOOTHED:
        numbers += " but for the input factors, which are ones"
    return (
        f"{algorithm or '16 bits'}: layout compared in this project's tests, on a small {model} "
        f"model, with ModelOpt 0.47.0 (names, dtypes, shapes, {configs}, {numbers}); these files "
        "were not executed"
    )
