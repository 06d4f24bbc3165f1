"""What a quantized checkpoint says of itself: from its config to a scheme for each linear.

Four ways of writing it down are understood: compressed-tensors, GPTQ, AutoAWQ and ModelOpt. What
cannot be turned into an engine without changing a number is refused with the reason.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from mmr5_runtime.types import CheckpointError

_REMEDY = "export from the original bf16 checkpoint"
_PLAIN = ("int-quantized", "float-quantized", "naive-quantized")


@dataclass(frozen=True)
class Scheme:
    """How a linear is stored and meant to be multiplied.

    ``layout`` is "pack-quantized", "plain" (codes of their own dtype), "gptq", "gptq_v2", "awq" or
    "modelopt"; ``weights`` is "int4", "int8" or "fp8"; ``group_size`` columns share a scale, or a
    whole row when it is None; ``activations`` are "int8", "fp8" or None.
    """

    layout: str
    weights: str
    group_size: int | None
    symmetric: bool
    activations: str | None = None

    @property
    def bits(self) -> int:
        return 4 if self.weights == "int4" else 8


Schemes = Callable[[str], Scheme | None]
"""The scheme of a linear by canonical name; None when the config does not cover it."""


def read_schemes(config: Mapping[str, Any]) -> Schemes:
    """Understands a ``quantization_config``; raises :class:`CheckpointError` where it cannot."""
    method = str(config.get("quant_method", "")).lower()
    readers = {
        "compressed-tensors": _compressed_tensors,
        "gptq": _gptq,
        "awq": _awq,
        "modelopt": _modelopt,
    }
    if method not in readers:
        raise CheckpointError(
            f"the checkpoint is quantized already, with quant_method {method!r}, which is none of "
            f"{', '.join(readers)}; {_REMEDY}."
        )
    return readers[method](config)


def _gptq(config: Mapping[str, Any]) -> Schemes:
    format = str(config.get("checkpoint_format") or config.get("format") or "gptq").lower()
    _require("GPTQ", "checkpoint_format", format, ("gptq", "gptq_v2"))
    _require("GPTQ", "bits", config.get("bits"), (4, 8))
    _require("GPTQ", "is_marlin_format", bool(config.get("is_marlin_format")), (False,))
    _require("GPTQ", "dynamic", config.get("dynamic") or None, (None,))
    if config.get("desc_act"):
        raise CheckpointError(
            "the checkpoint is GPTQ with desc_act (act-order), whose g_idx reorders the columns, "
            f"which no kernel here does; {_REMEDY} or quantize with static groups."
        )
    weights = f"int{config['bits']}"
    return _everywhere(Scheme(format, weights, _group(config), bool(config.get("sym", True))))


def _awq(config: Mapping[str, Any]) -> Schemes:
    _require("AWQ", "bits", config.get("bits"), (4,))
    _require("AWQ", "version", str(config.get("version", "gemm")).lower(), ("gemm",))
    _require("AWQ", "zero_point", config.get("zero_point", True), (True,))
    return _everywhere(Scheme("awq", "int4", _group(config), symmetric=False))


def _modelopt(config: Mapping[str, Any]) -> Schemes:
    # Newer versions keep a copy in config.json, with the same keys at the top level.
    config = config.get("quantization") or config
    _require("ModelOpt", "quant_algo", config.get("quant_algo"), ("W4A16_AWQ",))
    _require("ModelOpt", "has_zero_point", bool(config.get("has_zero_point")), (False,))
    _require("ModelOpt", "kv_cache_quant_algo", config.get("kv_cache_quant_algo"), (None,))
    return _everywhere(Scheme("modelopt", "int4", _group(config), symmetric=True))


def _compressed_tensors(config: Mapping[str, Any]) -> Schemes:
    what = "compressed-tensors"
    for key in ("kv_cache_scheme", "transform_config"):
        _require(what, key, config.get(key) or None, (None,))
    sparsity = config.get("sparsity_config") or {}
    _require(what, "sparsity", sparsity.get("format", "dense"), ("dense",))
    groups = []
    for name, group in config.get("config_groups", {}).items():
        if not isinstance(group, dict):
            raise CheckpointError(
                f"config group {name} of the checkpoint is a preset name; save it written out."
            )
        groups.append((group.get("targets", []), _group_scheme(config, group)))

    def scheme(linear: str) -> Scheme | None:
        # An expression that fits the name wins over the class of the module, as in the library.
        for fits in (_fits_name, _fits_class):
            for targets, found in groups:
                if any(fits(target, linear) for target in targets):
                    return found
        return None

    return scheme


def _group_scheme(config: Mapping[str, Any], group: Mapping[str, Any]) -> Scheme:
    what, weights = "compressed-tensors", group.get("weights") or {}
    layout = group.get("format") or config.get("format")
    _require(what, "format", layout, ("pack-quantized", *_PLAIN))
    packed = layout == "pack-quantized"
    kind, bits = weights.get("type", "int"), weights.get("num_bits")
    _require(what, "weights.num_bits", bits, (4, 8) if packed else (8,))
    _require(what, "weights.type", kind, ("int",) if packed else ("int", "float"))
    _require(what, "weights.dynamic", bool(weights.get("dynamic")), (False,))
    if weights.get("actorder") in ("group", "dynamic"):
        raise CheckpointError(
            "the checkpoint reorders its columns by activation (actorder group), which no kernel "
            f"here does; {_REMEDY}."
        )
    group_size = _group(weights)
    given = weights.get("strategy") or ("group" if group_size else "channel")
    _require(what, "weights.strategy", given, ("group",) if group_size else ("channel",))
    _require(what, "output_activations", group.get("output_activations"), (None,))
    activations = group.get("input_activations")
    name = "fp8" if kind == "float" else f"int{bits}"
    if activations is not None:
        _require(what, "format", layout, _PLAIN)
        per_token = {"num_bits": 8, "type": kind, "dynamic": True, "strategy": "token"}
        for key, needed in {**per_token, "symmetric": True}.items():
            found = activations.get(key, True if key == "symmetric" else None)
            _require(what, f"input_activations.{key}", found, (needed,))
    return Scheme(
        "pack-quantized" if packed else "plain",
        name,
        group_size,
        bool(weights.get("symmetric", True)),
        None if activations is None else name,
    )


def _fits_name(target: str, linear: str) -> bool:
    names = (linear, f"model.{linear}", linear.replace("model.", "model.language_model.", 1))
    if target.startswith("re:"):
        return any(re.match(target[3:], name) for name in names)
    return target in names


def _fits_class(target: str, linear: str) -> bool:
    return target == "Linear"


def _everywhere(scheme: Scheme) -> Schemes:
    return lambda linear: scheme


def _group(config: Mapping[str, Any]) -> int | None:
    """Columns that share a scale; -1 and nothing mean all of a row."""
    size = config.get("group_size")
    if size in (None, -1):
        return None
    if not isinstance(size, int) or size <= 0:
        raise CheckpointError(f"the checkpoint has groups of {size!r} columns; {_REMEDY}.")
    return size


def _require(what: str, key: str, found: object, supported: tuple[object, ...]) -> None:
    if found not in supported:
        needed = " or ".join(str(value) for value in supported)
        raise CheckpointError(
            f"the checkpoint is {what} with {key} {found}, where an engine needs {needed}; "
            f"{_REMEDY}."
        )
