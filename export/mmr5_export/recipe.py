"""Recipes: which linear is stored how, and made by which method. Read from TOML files::

[quant]                       # every key but name and format has a default
name = "mine"
format = "int4"               # bf16, int8, int8-weight-only, fp8 or int4: the decoder layers
method = "gptq"               # rtn, rtn-mse (clipped scales), gptq, awq or smoothquant+gptq
group_size = 128              # columns to a scale: 32, 64 or 128
symmetric = true
lm_head = "int8"              # bf16, int4, or int8, which is weight-only here
vision = "bf16"               # bf16, int8 or fp8
damp = 0.01                   # GPTQ: added to the diagonal of the Hessian, of its mean

[[layers]]                    # any number; the last one that matches a linear wins
match = "model.layers.*.mlp.down_proj"
format = "int8-weight-only"
method = "gptq"               # and group_size, symmetric: as above where left out

[mixed]                       # groups of linears that get a better format, by measured error
format = "int8-weight-only"
bits_per_weight = 5.0         # of the decoder layers, scales included
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from importlib import resources
from math import ceil, prod
from pathlib import Path
from typing import Any

from mmr5_export.mixed import group_bytes, layer_groups
from mmr5_export.options import OptionError
from mmr5_export.plan import check_groups
from mmr5_export.recipe_file import parse_toml, read_document
from mmr5_kernels.layout import FP8, GROUP_SIZE, INT8, Format
from mmr5_runtime.spec import (
    ModelSpec,
    decoder_linear_shapes,
    linear_shapes,
)
from mmr5_runtime.types import EngineError

RECIPES = ("bf16", "int8", "int8-weight-only", "fp8", "int4", "int4-mixed")
# Methods that make a format; the first is used unless another is asked for.
METHODS: Mapping[str, tuple[str, ...]] = {
    "bf16": ("rtn",),
    "int8": ("smoothquant+gptq", "gptq", "rtn"),
    "int8-weight-only": ("rtn", "gptq", "awq"),
    "fp8": ("rtn",),
    "int4": ("gptq", "awq", "rtn", "rtn-mse"),
}
ROUNDING = ("rtn", "rtn-mse")  # need no calibration
_LM_HEAD = {"bf16": "bf16", "int8": "int8-weight-only", "int4": "int4"}
_VISION = ("bf16", "int8", "fp8")
_GROUPED = ("int4", "int8-weight-only")


@dataclass(frozen=True)
class LayerRule:
    """Linears whose name matches the glob ``match`` are stored as ``format``; see :class:`Recipe`.

    What is None is taken from the recipe where it makes sense for ``format``.
    """

    match: str
    format: str
    group_size: int | None = None
    symmetric: bool | None = None
    method: str | None = None


@dataclass(frozen=True)
class Mixed:
    """Groups of linears are raised to ``format`` while the decoder takes ``bits_per_weight``."""

    format: str
    bits_per_weight: float

    def budget_bytes(self, spec: ModelSpec) -> int:
        """Bytes that the linears of the decoder layers may take, scales included."""
        weights = sum(prod(shape) for shape in decoder_linear_shapes(spec).values())
        return int(weights * self.bits_per_weight / 8)


@dataclass(frozen=True)
class Recipe:
    """How every linear is stored and made; the keys of a recipe file, see the module.

    ``group_size`` None is 128 for int4 and a whole row for int8. Raises :class:`OptionError` for
    names, methods and numbers that are unknown or do not go together.
    """

    name: str
    format: str
    default_method: str | None = None
    group_size: int | None = None
    symmetric: bool = True
    lm_head: str = "int8"
    vision: str = "bf16"
    damp: float = 0.01
    layers: tuple[LayerRule, ...] = ()
    mixed: Mixed | None = None

    def __post_init__(self) -> None:
        self._choose("lm_head", self.lm_head, _LM_HEAD)
        self._choose("vision", self.vision, _VISION)
        for rule in (self._base, *self.layers):
            self._check(rule)
        if not 0 < self.damp <= 1:
            raise self._error(f"damp is a fraction above 0 and up to 1, not {self.damp}")
        if not self.symmetric and "int4" not in self._formats_named():
            raise self._error("only int4 can be asymmetric; leave symmetric out")
        if self.group_size and self.format not in _GROUPED and "int4" not in self._formats_named():
            raise self._error(f"group_size has no meaning for {self.format}; leave it out")
        if self.mixed is not None:
            self._choose("format of [mixed]", self.mixed.format, METHODS)
            if self.mixed.format == self.format:
                raise self._error("[mixed] needs another format than [quant]")
            if not 0 < self.mixed.bits_per_weight <= 16:
                raise self._error("bits_per_weight of [mixed] lies between 0 and 16")

    def formats(self, spec: ModelSpec) -> dict[str, Format]:
        """Storage format of every linear that is not dense, before any mixed choice.

        Raises :class:`OptionError` for a rule that matches nothing, linears that run as one but
        differ, a format that lm_head or the vision tower cannot have, and a budget of bits that
        no choice keeps; and :class:`CheckpointError` naming a linear that groups do not fit.
        """
        rules = {name: self._rule(name) for name in _linears(spec)}
        for rule in self.layers:
            if not any(fnmatchcase(name, rule.match) for name in rules):
                raise self._error(
                    f"{rule.match!r} matches no linear of this model; linears are called like "
                    "model.layers.0.mlp.down_proj, visual.blocks.0.attn.qkv and lm_head"
                )
        self._check_places(rules)
        formats = {name: self._make(rule) for name, rule in rules.items()}
        for fused in _fused(spec):
            first, *others = ((formats[name], self.method(name)) for name in fused)
            if any(other != first for other in others):
                kinds = ", ".join(f"{name} {rules[name].format}" for name in fused)
                raise self._error(
                    f"linears that run as one differ in format or method ({kinds}); match all of "
                    "them with one rule"
                )
        stored = {name: format for name, format in formats.items() if format is not None}
        try:
            check_groups(spec, stored)
        except EngineError as error:
            raise self._error(str(error).rstrip(".")) from error
        self._check_budget(spec)
        return stored

    def method(self, linear: str) -> str:
        """How the codes of a linear are found: rtn, rtn-mse, gptq, awq or smoothquant+gptq.

        lm_head and the vision tower are rounded to nearest, whatever the decoder layers get.
        """
        if linear.startswith("model.layers."):
            return self._method(self._rule(linear))
        return "rtn-mse" if linear == "lm_head" and self.lm_head == "int4" else "rtn"

    def candidates(self, spec: ModelSpec) -> dict[str, dict[str, Format | None]]:
        """What a mixed choice is made of: formats by name for every group of linears.

        A group has one format where a rule of ``layers`` says so, and otherwise two: that of the
        recipe and that of ``mixed`` (one as well without ``mixed``). Raises as :meth:`formats`.
        """
        self.formats(spec)
        return self._candidates(spec)

    def _candidates(self, spec: ModelSpec) -> dict[str, dict[str, Format | None]]:
        found: dict[str, dict[str, Format | None]] = {}
        for group, linears in layer_groups(spec).items():
            rule = self._rule(linears[0])
            found[group] = {rule.format: self._make(rule)}
            if self.mixed is not None and rule == self._base:
                found[group][self.mixed.format] = self._make(LayerRule("", self.mixed.format))
        return found

    def with_choice(self, spec: ModelSpec, chosen: Mapping[str, str]) -> Recipe:
        """The recipe with a choice of format by group written out as rules, and nothing open.

        Rules that the recipe has already keep the last word.
        """
        groups = layer_groups(spec)
        rules = [
            LayerRule(linear, format)
            for group, format in chosen.items()
            if format != self.format
            for linear in groups[group]
        ]
        return replace(self, layers=(*rules, *self.layers), mixed=None)

    def to_json(self) -> dict[str, Any]:
        """The document that a recipe file holds, with every default spelled out."""
        quant = {
            "name": self.name,
            "format": self.format,
            "method": self._method(self._base),
            "group_size": self.group_size,
            "symmetric": self.symmetric,
            "lm_head": self.lm_head,
            "vision": self.vision,
            "damp": self.damp,
        }
        document: dict[str, Any] = {"quant": _given(quant)}
        if self.layers:
            document["layers"] = [_given(vars(rule)) for rule in self.layers]
        if self.mixed is not None:
            document["mixed"] = dict(vars(self.mixed))
        return document

    @classmethod
    def from_json(cls, document: Mapping[str, Any], origin: str = "the recipe") -> Recipe:
        """The inverse of :meth:`to_json`. Raises :class:`OptionError` beginning with ``origin``."""
        quant, layers, mixed = read_document(document, origin)
        method = quant.pop("method", None)
        return cls(
            **quant,
            default_method=method,
            layers=tuple(LayerRule(**rule) for rule in layers),
            mixed=None if mixed is None else Mixed(**mixed),
        )

    @property
    def _base(self) -> LayerRule:
        """What the decoder layers get where no rule matches; no rule has an empty glob."""
        grouped = self.format in _GROUPED
        return LayerRule("", self.format, self.group_size if grouped else None)

    def _rule(self, linear: str) -> LayerRule:
        matching = [rule for rule in self.layers if fnmatchcase(linear, rule.match)]
        if matching:
            return matching[-1]
        if linear == "lm_head":
            return LayerRule("", _LM_HEAD[self.lm_head])
        return LayerRule("", self.vision) if linear.startswith("visual.") else self._base

    def _make(self, rule: LayerRule) -> Format | None:
        """The format of a rule; ``ValueError`` for a group size that is none."""
        if rule.format == "int4":
            symmetric = self.symmetric if rule.symmetric is None else rule.symmetric
            return Format("int4", rule.group_size or self.group_size or GROUP_SIZE, symmetric)
        if rule.format == "int8-weight-only":
            return Format("int8", rule.group_size)
        return {"bf16": None, "int8": INT8, "fp8": FP8}[rule.format]

    def _method(self, rule: LayerRule) -> str:
        known = METHODS[rule.format]
        if rule.method is not None:
            return rule.method
        base = self.default_method or METHODS[self.format][0]
        return base if base in known else known[0]

    def _check(self, rule: LayerRule) -> None:
        where = f"of {rule.match!r}" if rule.match else "of [quant]"
        self._choose(f"format {where}", rule.format, METHODS)
        method = rule.method if rule.match else self.default_method
        if method is not None:
            self._choose(f"method {where} for {rule.format}", method, METHODS[rule.format])
        if rule.group_size is not None and rule.format not in _GROUPED:
            raise self._error(f"group_size {where} has no meaning for {rule.format}; leave it out")
        if rule.symmetric is not None and rule.format != "int4":
            raise self._error(f"symmetric {where} has no meaning for {rule.format}; leave it out")
        try:
            self._make(rule)
        except ValueError as error:
            raise self._error(
                f"the format {where} cannot be stored: {error}".rstrip(".")
            ) from error

    def _check_places(self, rules: Mapping[str, LayerRule]) -> None:
        """lm_head is weight-only, and the vision tower knows no groups and one method."""
        for name, rule in rules.items():
            head = name == "lm_head"
            if not rule.match or name.startswith("model.layers."):
                continue
            self._choose(f"format of {name}", rule.format, _LM_HEAD.values() if head else _VISION)
            if rule.method not in (None, "rtn", "rtn-mse"):
                raise self._error(f"{name} is always rounded to nearest; leave its method out")

    def _check_budget(self, spec: ModelSpec) -> None:
        if self.mixed is None:
            return
        sizes = group_bytes(spec, self._candidates(spec))
        least = sum(min(formats.values()) for formats in sizes.values())
        if least > self.mixed.budget_bytes(spec):
            weights = sum(prod(shape) for shape in decoder_linear_shapes(spec).values())
            raise self._error(
                f"{self.mixed.bits_per_weight:g} bits per weight are fewer than the smallest "
                f"formats take; allow {ceil(80 * least / weights) / 10:g} or more"
            )

    def _formats_named(self) -> set[str]:
        mixed = {self.mixed.format} if self.mixed else set()
        return {self.format, _LM_HEAD[self.lm_head], *(rule.format for rule in self.layers)} | mixed

    def _choose(self, what: str, name: str, known: Iterable[str]) -> None:
        choices = list(known)
        if name not in choices:
            raise self._error(f"{what} is {name!r}; choose one of {', '.join(choices)}")

    def _error(self, text: str) -> OptionError:
        return OptionError(f"recipe {self.name}: {text}.")


def load_recipe(name_or_path: str) -> Recipe:
    """A recipe that ships with the package, by name (see ``RECIPES``), or from a TOML file.

    Raises :class:`OptionError` for an unknown name and for a file that is no recipe.
    """
    if name_or_path in RECIPES:
        shipped = resources.files("mmr5_export") / "recipes" / f"{name_or_path}.toml"
        return Recipe.from_json(parse_toml(shipped.read_bytes(), name_or_path), name_or_path)
    path = Path(name_or_path)
    if path.suffix != ".toml" and not path.is_file():
        raise OptionError(
            f"there is no recipe {name_or_path!r}; choose one of {', '.join(RECIPES)}, or give the "
            "path of a .toml file."
        )
    try:
        data = path.read_bytes()
    except OSError as error:
        raise OptionError(f"the recipe {path} cannot be read ({error}); check the path.") from error
    return Recipe.from_json(parse_toml(data, str(path)), str(path))


def _linears(spec: ModelSpec) -> list[str]:
    """Every linear a rule can name; a tied lm_head becomes one of its own when it is quantized."""
    return [*linear_shapes(spec), *(["lm_head"] if spec.text.tie_word_embeddings else [])]


def _fused(spec: ModelSpec) -> list[tuple[str, ...]]:
    """Linears that run as one product."""
    vision = [
        (f"visual.blocks.{i}.mlp.gate_proj", f"visual.blocks.{i}.mlp.up_proj")
        for i in range(spec.vision.depth)
    ]
    return [*layer_groups(spec).values(), *vision]


def _given(values: Mapping[str, Any]) -> dict[str, Any]:
    """Without what is None, which TOML cannot say."""
    return {key: value for key, value in values.items() if value is not None}
