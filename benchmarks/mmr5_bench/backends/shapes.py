"""The models that backends are timed on, and what each is asked.

``mini`` is the trained checkpoint that ships with the package. The others have random weights:
``0.5b`` is the decoder of Qwen2.5-0.5B, ``7b-layers`` two layers as wide as those of the 7B with a
small vocabulary (a head of 152,064 rows would be most of what two layers are timed for), ``tiny``
tries a run. All have a tower of their architecture, made small: only the decoder is timed here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from mmr5_bench.backends.names import SHAPE_NAMES
from mmr5_bench.random_weights.shapes import FIRST_SPECIAL_ID, config_7b, config_tiny

Kind = Literal["prefill", "step"]


@dataclass(frozen=True)
class Case:
    """``tokens`` read at once behind ``behind`` others: a prompt or part of one, or a decode step.

    A prompt gives the logits of its last token, a step those of all of its at most 8 tokens.
    """

    kind: Kind
    tokens: int
    behind: int

    @property
    def label(self) -> str:
        """As it stands in tables."""
        what = "prompt" if self.kind == "prefill" else "step"
        where = f" behind {self.behind:,}" if self.behind else ""
        return f"{what} of {self.tokens:,}{where}"

    @property
    def calls(self) -> int:
        """Timed calls per round, of which the mean counts; steps are too short to be timed once."""
        return 1 if self.kind == "prefill" else 3


def _cases(short: int, long: int) -> tuple[Case, ...]:
    return (
        Case("prefill", short, 0),
        Case("prefill", long, 0),
        Case("prefill", short, long),
        Case("step", 1, long),
        Case("step", 8, long),
    )


@dataclass(frozen=True)
class Shape:
    """A model by the name it has on the command line; ``config`` makes its ``config.json``.

    ``config`` None stands for the checkpoint called ``name``.
    """

    name: str
    cases: tuple[Case, ...]
    config: Callable[[], dict[str, Any]] | None


def _random(
    sizes: Mapping[str, int], sections: tuple[int, int, int], first_special: int
) -> dict[str, Any]:
    """The 7B's config with other ``sizes`` and rotary ``sections``, and the tower of ``tiny``.

    ``first_special`` is the id of the first special token, which the others follow as in the 7B.
    """
    config = {**config_7b(), **sizes, "rope_scaling": {"type": "mrope"}}
    config["rope_scaling"]["mrope_section"] = list(sections)
    for name, value in config.items():
        if name.endswith("_token_id"):
            config[name] = value - FIRST_SPECIAL_ID + first_special
    config["vision_config"] = {
        **config_tiny()["vision_config"],
        "out_hidden_size": sizes["hidden_size"],
    }
    return config


def _half_billion() -> dict[str, Any]:
    sizes = {"hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24}
    sizes |= {"num_attention_heads": 14, "num_key_value_heads": 2, "vocab_size": 151936}
    return _random(sizes, (8, 12, 12), FIRST_SPECIAL_ID)


def _wide_layers() -> dict[str, Any]:
    sizes = {"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 28, "num_key_value_heads": 4, "vocab_size": 4096}
    return _random(sizes, (16, 24, 24), 4000)


_CONFIGS = (None, _half_billion, _wide_layers, config_tiny)
SHAPES: Mapping[str, Shape] = {
    name: Shape(name, _cases(24, 40) if name == "tiny" else _cases(256, 1024), config)
    for name, config in zip(SHAPE_NAMES, _CONFIGS, strict=True)
}


def shapes_of(names: str) -> tuple[Shape, ...]:
    """The shapes of a comma-separated list; ValueError for an unknown or repeated name."""
    asked = names.split(",")
    if unknown := [name for name in asked if name not in SHAPES]:
        raise ValueError(f"shape {unknown[0]!r} is unknown; pass some of {','.join(SHAPES)}")
    if len(set(asked)) < len(asked):
        raise ValueError(f"--shapes {names} names a shape twice; pass each once")
    return tuple(SHAPES[name] for name in asked)
