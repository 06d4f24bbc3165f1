"""Page recall of MMDocIR a second time: exact fractions and plain loops, from the written rules.

Shares no code and no way of going about it with what it is compared with.
"""

from __future__ import annotations

from fractions import Fraction

TEN = (
    "Research report / Introduction|Administration/Industry file|Tutorial/Workshop|Academic paper|"
    "Brochure|Financial report|Guidebook|Government|Laws|News"
).split("|")


def pick(scores: list[float], how_many: int) -> list[int]:
    """Highest score first, the lower page first among equals; selected one by one."""
    left = list(range(len(scores)))
    picked: list[int] = []
    while left and len(picked) < how_many:
        best = left[0]
        for page in left:
            if scores[page] > scores[best]:
                best = page
        left.remove(best)
        picked.append(best)
    return picked


def recall(order: list[int], gold: list[int], k: int) -> Fraction:
    """Different gold pages found in the first k places, over the length of the gold list."""
    if len(gold) == 0:
        return Fraction(0)
    seen: list[int] = []
    place = 0
    for page in order:
        place += 1
        if place > k:
            break
        for wanted in gold:
            if wanted == page and page not in seen:
                seen.append(page)
    return Fraction(len(seen), len(gold))


def averages(
    answered: list[tuple[str, list[int], list[int]]], k: int
) -> tuple[Fraction, Fraction, list[Fraction]]:
    """Micro, macro and the ten domains of (domain, order, gold)."""
    total = Fraction(0)
    for _, order, gold in answered:
        total += recall(order, gold, k)
    per_domain: list[Fraction] = []
    for domain in TEN:
        share, count = Fraction(0), 0
        for name, order, gold in answered:
            if name == domain:
                share += recall(order, gold, k)
                count += 1
        per_domain.append(share / count if count else Fraction(0))
    over_ten = Fraction(0)
    for value in per_domain:
        over_ten += value / 10
    return total / len(answered), over_ten, per_domain
