"""Comparisons of logits and rankings against values worked out by hand and by torch."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mmr5_export import agreement
from mmr5_export.agreement import (
    RankedSample,
    Ranking,
    RankMetrics,
    TokenMetrics,
    TokenSums,
    VerificationFailed,
    compare,
)


def _logits(*probabilities: list[float]) -> Tensor:
    return torch.tensor(probabilities, dtype=torch.float64).log().float()


def test_compare_by_hand() -> None:
    reference = _logits([0.5, 0.25, 0.25], [0.1, 0.8, 0.1])
    other = _logits([0.25, 0.5, 0.25], [0.1, 0.8, 0.1])
    sums = compare(reference, other, torch.tensor([0, 1]))
    kl = 0.5 * math.log(2) - 0.25 * math.log(2)
    assert sums.tokens == 2 and sums.agreeing == 1
    assert sums.kl == pytest.approx(kl, abs=1e-7)
    assert sums.reference_nll == pytest.approx(-math.log(0.5) - math.log(0.8), abs=1e-6)
    assert sums.nll == pytest.approx(-math.log(0.25) - math.log(0.8), abs=1e-6)


def test_the_direction_of_kl() -> None:
    sharp, flat = _logits([0.98, 0.01, 0.01]), _logits([1 / 3, 1 / 3, 1 / 3])
    forward = compare(sharp, flat, torch.tensor([0])).kl
    assert forward == pytest.approx(0.98 * math.log(0.98 * 3) + 0.02 * math.log(0.01 * 3), abs=1e-6)
    assert forward != pytest.approx(compare(flat, sharp, torch.tensor([0])).kl, abs=0.1)


@given(seed=st.integers(0, 10_000), rows=st.integers(1, 6), spread=st.floats(0.1, 60.0))
@settings(max_examples=40)
def test_compare_agrees_with_torch(seed: int, rows: int, spread: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    a, b = spread * torch.randn(2, rows, 37, generator=generator)
    targets = torch.randint(37, (rows,), generator=generator)
    sums = compare(a, b, targets)
    logp, logq = a.double().log_softmax(-1), b.double().log_softmax(-1)
    kl = torch.nn.functional.kl_div(logq, logp, reduction="sum", log_target=True)
    nll = torch.nn.functional.cross_entropy(b.double(), targets, reduction="sum")
    assert sums.kl == pytest.approx(float(kl), rel=1e-9, abs=1e-9)
    assert sums.nll == pytest.approx(float(nll), rel=1e-9)


def test_shifted_logits_are_the_same_distribution() -> None:
    logits = torch.randn(4, 50, generator=torch.Generator().manual_seed(0))
    sums = compare(logits, logits + 1000.0, torch.zeros(4, dtype=torch.long))
    assert 0.0 <= sums.kl < 1e-6  # what adding 1000 in float32 loses
    assert compare(logits, logits, torch.zeros(4, dtype=torch.long)).kl == 0.0


def test_blocks_of_rows_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(1)
    a, b = torch.randn(2, 11, 20, generator=generator)
    targets = torch.randint(20, (11,), generator=generator)
    whole = compare(a, b, targets)
    monkeypatch.setattr(agreement, "_BLOCK_ELEMENTS", 3 * 20)
    pieces = compare(a, b, targets)
    assert (pieces.tokens, pieces.agreeing) == (whole.tokens, whole.agreeing)
    assert pieces.kl == pytest.approx(whole.kl, rel=1e-12)
    parts = [compare(a[i : i + 1], b[i : i + 1], targets[i : i + 1]) for i in range(11)]
    assert TokenMetrics(tuple(parts)).kl == pytest.approx(whole.kl / 11, rel=1e-12)


def test_half_precision_is_taken() -> None:
    a, b = torch.randn(2, 3, 20, generator=torch.Generator().manual_seed(2)).bfloat16()
    assert compare(a, b, torch.zeros(3, dtype=torch.long)) == compare(
        a.float(), b.float(), torch.zeros(3, dtype=torch.long)
    )


def test_logits_that_are_not_finite_name_the_sample() -> None:
    bad = torch.tensor([[0.0, float("nan")]])
    with pytest.raises(VerificationFailed, match="on list 7 are not finite"):
        compare(torch.zeros(1, 2), bad, torch.tensor([0]), "list 7")


@pytest.mark.parametrize("shape", [(2, 4), (3, 5), (0, 4)])
def test_shapes_that_do_not_agree(shape: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="cannot be compared"):
        compare(torch.zeros(shape), torch.zeros(3, 4), torch.zeros(shape[0], dtype=torch.long))


def test_token_metrics_weigh_by_tokens() -> None:
    metrics = TokenMetrics((TokenSums(1, 0.5, 1.0, 2.0, 0), TokenSums(3, 0.1, 1.0, 2.0, 3)))
    assert metrics.kl == pytest.approx(0.15)
    assert metrics.agreement == 0.75
    assert metrics.perplexity == pytest.approx(math.e)
    assert metrics.reference_perplexity == pytest.approx(math.exp(0.5))
    assert metrics.to_json()["samples"][1]["agreeing"] == 3
    with pytest.raises(ValueError, match="at least one"):
        TokenMetrics((TokenSums(),))


def _sample(
    reference: tuple[int, ...],
    engine: tuple[int, ...],
    relevant: tuple[int, ...] | None = None,
    status: str = "ok",
) -> RankedSample:
    return RankedSample(
        Ranking(reference, "ok"),
        Ranking(engine, status),  # type: ignore[arg-type]
        relevant,
    )


def test_rank_metrics_by_hand() -> None:
    metrics = RankMetrics(
        (
            _sample((0, 1, 2), (0, 1, 2), (0,)),
            _sample((0, 1, 2), (0, 2, 1), (2,)),
            _sample((1, 0, 2), (0, 1, 2), (0, 1), "repaired"),
            _sample((1, 0), (1, 0)),
        )
    )
    assert metrics.first_choice_agreement == 0.75
    assert metrics.order_agreement == 0.5
    assert metrics.tau == pytest.approx((1 + 1 / 3 + 1 / 3 + 1) / 4)
    assert metrics.well_formed == (1.0, 0.75)
    assert metrics.recall(1) == ((1 + 0 + 0.5) / 3, (1 + 0 + 0.5) / 3)
    document = metrics.to_json()
    assert (document["lists"], document["labelled_lists"]) == (4, 3)
    assert document["recall"]["3"] == {"reference": 1.0, "engine": 1.0}


def test_rank_metrics_without_labels_have_no_recall() -> None:
    metrics = RankMetrics((_sample((0, 1), (0, 1)),))
    assert metrics.recall(1) is None and metrics.to_json()["recall"] == {}


@pytest.mark.parametrize("engine", [(0, 1), (0, 1, 3), (0, 1, 1)])
def test_orders_of_different_pages_are_an_error(engine: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="not of the same pages"):
        _sample((0, 1, 2), engine)


def test_empty_input_is_an_error() -> None:
    with pytest.raises(ValueError, match="at least one list"):
        RankMetrics(())
