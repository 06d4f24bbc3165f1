"""The text of a recipe file: TOML to checked values. What they mean is in ``recipe``."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from typing import Any

from mmr5_export.options import OptionError

_Keys = Mapping[str, type]
_QUANT: _Keys = {
    "name": str,
    "format": str,
    "method": str,
    "group_size": int,
    "symmetric": bool,
    "lm_head": str,
    "vision": str,
    "damp": float,
}
_LAYER: _Keys = {
    "match": str,
    "format": str,
    "group_size": int,
    "symmetric": bool,
    "method": str,
}
_MIXED: _Keys = {"format": str, "bits_per_weight": float}
_TYPES = {str: "text", int: "a whole number", bool: "true or false", float: "a number"}


def parse_toml(data: bytes, origin: str) -> dict[str, Any]:
    """The document in ``data``; raises :class:`OptionError` beginning with ``origin``."""
    try:
        return tomllib.loads(data.decode())
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise OptionError(f"{origin} is not TOML ({error}); correct it there.") from error


def read_document(
    document: Mapping[str, Any], origin: str
) -> tuple[dict[str, Any], list[dict[str, Any]], dict[str, Any] | None]:
    """The tables [quant], [[layers]] and [mixed] (None when it is not there), keys as in the file.

    Raises :class:`OptionError` beginning with ``origin`` and naming a key that is missing, unknown
    or of another type.
    """
    if unknown := sorted(set(document) - {"quant", "layers", "mixed"}):
        raise OptionError(
            f"{origin}: [{unknown[0]}] is unknown; a recipe has [quant], [[layers]] and [mixed]."
        )
    quant = _table(document.get("quant"), _QUANT, ("name", "format"), f"{origin}: [quant]")
    layers = document.get("layers", [])
    if not isinstance(layers, list):
        raise OptionError(f"{origin}: layers is no list of tables; write [[layers]], not [layers].")
    rules = [
        _table(rule, _LAYER, ("match", "format"), f"{origin}: [[layers]] number {number}")
        for number, rule in enumerate(layers, start=1)
    ]
    mixed = document.get("mixed")
    if mixed is not None:
        mixed = _table(mixed, _MIXED, ("format", "bits_per_weight"), f"{origin}: [mixed]")
    return quant, rules, mixed


def _table(value: Any, keys: _Keys, required: tuple[str, ...], where: str) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise OptionError(f"{where} is missing or no table; it needs {' and '.join(required)}.")
    if unknown := sorted(set(value) - set(keys)):
        raise OptionError(f"{where} has no key {unknown[0]!r}; it takes {', '.join(keys)}.")
    if missing := [key for key in required if key not in value]:
        raise OptionError(f"{where} lacks {missing[0]!r}; add it.")
    return {key: _value(item, keys[key], f"{where}: {key}") for key, item in value.items()}


def _value(value: Any, kind: type, what: str) -> Any:
    # In Python true is also 1, and a whole number is good for a number.
    accepted = (int, float) if kind is float else kind
    if not isinstance(value, accepted) or (isinstance(value, bool) and kind is not bool):
        raise OptionError(f"{what} is {value!r}; write {_TYPES[kind]}.")
    return value
