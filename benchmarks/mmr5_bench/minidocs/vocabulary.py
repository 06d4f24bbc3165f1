"""The closed world of MiniDocs: topics, page kinds, question wordings, and the held-out pairs.

A page is about one topic and is of one kind. A (topic, kind) pair is *held out* when it never
occurs on a training page nor in a training question, so held-out questions ask for combinations
the model has not seen together.
"""

from __future__ import annotations

TOPICS: tuple[str, ...] = tuple(
    """
    rainfall exports wages tourism traffic energy salmon wheat housing crime cotton coffee
    rubber timber cattle poultry sugar tobacco steel copper cement plastic textiles shipping
    railway airline bicycle hospital vaccine cancer obesity smoking alcohol school library
    college science patents internet mobile radio cinema museum football tennis olympics budget
    taxes pension banking mortgage inflation insurance election migration refugees military
    climate glacier drought wildfire mining fishing forestry
    """.split()
)
KINDS: tuple[str, ...] = ("bar chart", "line chart", "pie chart", "scatter plot", "table", "text")

PAIR_QUESTIONS: tuple[str, ...] = (
    "Which {kind} shows {topic}?",
    "Find the {kind} about {topic}.",
    "Where is the {kind} on {topic}?",
    "Show me the {kind} for {topic}.",
    "What does the {kind} about {topic} say?",
    "Look for {topic} in a {kind}.",
    "I need a {kind} with figures on {topic}.",
    "{topic} {kind}",
)
TOPIC_QUESTIONS: tuple[str, ...] = (
    "Which page is about {topic}?",
    "Find everything on {topic}.",
    "What is known about {topic}?",
    "{topic}",
)

Pair = tuple[int, int]  # (topic index, kind index)


def is_held_out(topic: int, kind: int) -> bool:
    """True for one pair in eight; every topic and every kind keeps pairs on both sides."""
    return (topic + kind) % 8 == 0


def pairs(*, held_out: bool) -> list[Pair]:
    """All (topic, kind) index pairs of one side of the split."""
    return [
        (topic, kind)
        for topic in range(len(TOPICS))
        for kind in range(len(KINDS))
        if is_held_out(topic, kind) == held_out
    ]
