"""What a request may ask for: ranges, contradictions, and the keywords of the facade."""

from __future__ import annotations

from dataclasses import fields
from typing import Any, get_type_hints

import pytest

from mmr5_runtime.options import RerankKeywords, RerankOptions
from mmr5_runtime.types import RequestError


def test_keywords_are_the_options_but_top_k() -> None:
    options, keywords = get_type_hints(RerankOptions), get_type_hints(RerankKeywords)
    assert options.pop("top_k") == int | None
    assert keywords == options
    assert list(keywords) == [field.name for field in fields(RerankOptions)][1:]
    assert not RerankKeywords.__required_keys__


def test_defaults_are_allowed() -> None:
    options = RerankOptions()
    assert options.think_budget is None and options.top_k is None


@pytest.mark.parametrize(
    "given",
    [
        {"think": 1},
        {"think": "auto", "think_margin": 0.0},
        {"think": "auto", "think_margin": 1.0},
        {"recompute": 0.0, "image_kv": "relocate"},
        {"recompute": 1.0, "image_kv": "relocate", "think": 50},
        {"samples": 2, "temperature": 0.3, "plan": "single"},
        {"samples": 2, "temperature": 0.3, "draft": True, "think": "off", "deadline_ms": 1.0},
        {"plan": "cascade", "answer": True, "layout": "images_first"},
        {"stop": "eos", "top_k": 1, "constrain": False},
    ],
)
def test_what_goes_together(given: dict[str, Any]) -> None:
    options = RerankOptions(**given)
    assert {name: getattr(options, name) for name in given} == given


def test_a_budget_is_a_number_of_tokens() -> None:
    assert RerankOptions(think=7).think_budget == 7
    for think in ("full", "off", "auto"):
        assert RerankOptions(think=think).think_budget is None


NAN, INFINITY = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"top_k": 0}, "top_k=0 .*pass 1 or more, or None"),
        ({"top_k": -3}, "top_k=-3"),
        ({"max_new_tokens": 0}, "max_new_tokens=0 .*pass 1 or more"),
        ({"stop": "close"}, "stop='close' is unknown; pass one of eos, tag, determined"),
        ({"stop": None}, "stop=None is unknown"),
        ({"plan": "listwise"}, "plan='listwise' is unknown.*auto, single, .*cascade"),
        ({"layout": "pages_first"}, "layout='pages_first'.*reference, images_first"),
        ({"image_kv": "moved"}, "image_kv='moved'.*exact, relocate"),
        ({"think": "fast"}, "think='fast' is neither full, off, auto nor a number"),
        ({"think": 0}, "think=0 is neither"),
        ({"think": -1}, "think=-1 is neither"),
        ({"think": True}, "think=True is neither"),
        ({"think": 2.0}, r"think=2\.0 is neither"),
        ({"think": None}, "think=None is neither"),
        ({"think_margin": -0.1}, r"think_margin=-0\.1 .*pass 0 to 1"),
        ({"think_margin": 1.1}, r"think_margin=1\.1"),
        ({"think_margin": NAN}, "think_margin=nan"),
        ({"recompute": -0.1}, r"recompute=-0\.1 .*pass 0 to 1"),
        ({"recompute": 15}, "recompute=15"),
        ({"recompute": NAN}, "recompute=nan"),
        ({"deadline_ms": 0}, "deadline_ms=0 .*above 0, or None"),
        ({"deadline_ms": -5.0}, r"deadline_ms=-5\.0"),
        ({"deadline_ms": INFINITY}, "deadline_ms=inf"),
        ({"deadline_ms": NAN}, "deadline_ms=nan"),
        ({"samples": 1, "temperature": 0.3}, "samples=1 .*pass 2 or more, or None"),
        ({"samples": 0, "temperature": 0.3}, "samples=0"),
        ({"samples": True, "temperature": 0.3}, "samples=True"),
    ],
)
def test_out_of_range(given: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        RerankOptions(**given)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"samples": 3}, r"samples=3 at temperature 0 .*temperature=0\.3"),
        *(
            ({"samples": 3, "temperature": 0.3, "plan": plan}, f"plan='{plan}'.*plan='single'")
            for plan in ("sliding", "anchored", "tournament", "cascade")
        ),
        *(
            ({"image_kv": "relocate", "think": think}, f"think='{think}'.*think='full'")
            for think in ("off", "auto")
        ),
        (
            {"image_kv": "relocate", "layout": "images_first"},
            "layout='images_first'.*one of the two",
        ),
        *(
            ({"answer": True, "plan": plan}, f"plan='cascade', not of '{plan}'")
            for plan in ("auto", "single", "sliding")
        ),
    ],
)
def test_contradictions(given: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        RerankOptions(**given)


def test_the_message_is_one_sentence() -> None:
    with pytest.raises(RequestError) as caught:
        RerankOptions(samples=3)
    assert "\n" not in str(caught.value) and str(caught.value).endswith(".")
