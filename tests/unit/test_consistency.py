"""Reports on two ways of ranking the same lists, against values worked out by hand."""

from __future__ import annotations

import json
import random

import pytest

from mmr5_runtime.consistency import CaseOrders, SlotAgreement, compare_orders
from mmr5_runtime.types import RequestError

CASES = [
    CaseOrders((0, 1, 2), (0, 1, 2), (0,)),
    CaseOrders((0, 1, 2), (0, 2, 1), (2,)),
    CaseOrders((1, 0, 2), (0, 1, 2), (0, 1)),
    CaseOrders((1, 0), (1, 0)),
]


def test_a_report_by_hand() -> None:
    report = compare_orders(CASES, ks=(1, 2))
    assert (report.lists, report.top1.value, report.order.value) == (4, 0.75, 0.5)
    assert report.kendall_tau.value == pytest.approx((1 + 1 / 3 + 1 / 3 + 1) / 4)
    assert report.overlap[1].value == 0.75 and report.overlap[1].lists == 4
    # The list of two is left out: its first two are the same pages whatever happens.
    assert report.overlap[2].value == pytest.approx((1 + 0.5 + 1) / 3)
    assert report.overlap[2].lists == 3
    assert report.slots[:2] == (SlotAgreement(0.75, 4), SlotAgreement(0.5, 4))
    assert report.slots[2].share == pytest.approx(2 / 3) and report.slots[2].lists == 3
    one, two = report.recall[1], report.recall[2]
    assert one.a == one.b == pytest.approx(0.5)
    assert two.a == pytest.approx(2 / 3) and two.b == pytest.approx(1.0)
    assert two.difference.value == pytest.approx(1 / 3) and two.difference.lists == 3
    assert two.difference.low == 0.0 and two.difference.high == 1.0  # one of three changed


def test_slots_show_where_orders_differ() -> None:
    """Candidates that swap their places only where they came late, as approximations do it."""
    generator = random.Random(0)
    cases = []
    for _ in range(100):
        late = generator.sample((2, 3), 2)
        cases.append(CaseOrders((0, 1, 2, 3), (0, 1, *late)))
    shares = [slot.share for slot in compare_orders(cases).slots]
    assert shares[:2] == [1.0, 1.0] and shares[2] == shares[3] < 0.7


def test_the_same_orders_agree_in_everything() -> None:
    cases = [CaseOrders((2, 0, 1, 3), (2, 0, 1, 3), (1,))] * 30
    report = compare_orders(cases)
    for estimate in (report.top1, report.order, report.kendall_tau, *report.overlap.values()):
        assert estimate.value == estimate.high == 1.0
    assert 0.85 < report.top1.low < 0.9  # thirty lists do not show more than that
    assert set(report.overlap) == {1, 3} and set(report.recall) == {1, 3, 5}
    assert report.recall[1].difference.low == report.recall[1].difference.high == 0.0


def test_without_labels_there_is_no_recall() -> None:
    report = compare_orders([CaseOrders((1, 0), (0, 1)), CaseOrders((0,), (0,), ())])
    assert report.recall == {} and "0 labelled" in str(report)


def test_the_report_is_json_and_a_table() -> None:
    report = compare_orders(CASES, ks=(1, 2))
    document = json.loads(json.dumps(report.to_json()))
    assert document["overlap"]["2"]["lists"] == 3
    assert document["recall"]["2"]["difference"]["value"] == pytest.approx(1 / 3)
    assert document["slots"][0] == {"share": 0.75, "lists": 4}
    lines = str(report).splitlines()
    assert lines[0] == "4 lists, 3 labelled"
    assert any(line.split() == "Recall@2 66.7 % to 100.0 %, +33.3 [+0.0, +100.0] pt".split()
               for line in lines)  # fmt: skip
    assert lines[1].startswith("same first candidate       75.0 % [")
    assert lines[-1] == "same place of candidate 3  66.7 % of 3"


@pytest.mark.parametrize(
    ("a", "b"), [((), ()), ((0, 1), (0, 2)), ((0, 1), (0,)), ((0, 0), (0, 0)), ((1, 2), (1, 2))]
)
def test_orders_of_different_candidates(a: tuple[int, ...], b: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="not two orders"):
        CaseOrders(a, b)


def test_bad_requests() -> None:
    with pytest.raises(RequestError, match="no lists"):
        compare_orders([])
    with pytest.raises(RequestError, match="below 1"):
        compare_orders(CASES, ks=(1, 0))
    with pytest.raises(RequestError, match=r"names 2, but the list has 2 candidates"):
        CaseOrders((0, 1), (1, 0), (2,))
