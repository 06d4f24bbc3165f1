"""Intervals for averages over questions of whole documents: a bootstrap clustered by document.

Questions about one document are not independent, so documents are redrawn and bring all of their
questions along. An average is a sum over documents of weights times sums, which makes 10,000
resamples of 313 documents one matrix product.

For two engines on the same lists pass the differences, question by question: both averages are
linear in the values, so that this is the paired interval, in which hard questions cancel.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import numpy as np
import numpy.typing as npt

from mmr5_bench.evidence.statistics import Interval
from mmr5_bench.mmdocir import metrics
from mmr5_bench.mmdocir.annotations import DOMAINS

RESAMPLES = 10_000
Floats = npt.NDArray[np.float64]
Counts = npt.NDArray[np.int64]


class Clusters:
    """Which document and domain every question belongs to, and the resamples of the documents.

    Raises ValueError for no questions, sequences of different lengths, a domain that is none of
    the ten, or a document in two domains.
    """

    def __init__(
        self,
        documents: Sequence[int],
        domains: Sequence[str],
        *,
        resamples: int = RESAMPLES,
        level: float = 0.95,
        seed: int = 0,
    ) -> None:
        if not documents or len(documents) != len(domains):
            raise ValueError("a bootstrap needs a document and a domain for every question")
        self._domains, self._resamples, self._seed = tuple(domains), resamples, seed
        self._tails = [(1 - level) / 2, (1 + level) / 2]
        pairs = set(zip(documents, domains, strict=True))
        names = dict(pairs)
        if len(names) != len(pairs):
            raise ValueError("a document has one domain; these have several")
        if unknown := set(domains) - set(DOMAINS):
            raise ValueError(f"{min(unknown)!r} is no domain of MMDocIR; the ten are in DOMAINS")
        unique, self._index = np.unique(np.asarray(documents), return_inverse=True)
        self._domain_of = np.asarray(
            [DOMAINS.index(names[document]) for document in unique.tolist()]
        )
        self._questions = np.bincount(self._index, minlength=unique.size).astype(np.float64)

    @cached_property
    def _free(self) -> Floats:
        """How often every document was drawn, [resamples, documents]: from all documents."""
        return self._draw(np.zeros_like(self._domain_of))

    @cached_property
    def _by_domain(self) -> Floats:
        """The same, drawn from the documents of each domain by itself."""
        return self._draw(self._domain_of)

    def _draw(self, strata: Counts) -> Floats:
        rng = np.random.default_rng(self._seed)
        drawn = np.zeros((self._resamples, strata.size))
        for stratum in np.unique(strata):
            (members,) = np.nonzero(strata == stratum)
            even = np.full(members.size, 1 / members.size)
            drawn[:, members] = rng.multinomial(members.size, even, self._resamples)
        return drawn

    def micro(self, values: Sequence[float]) -> Interval:
        """Mean over questions; documents are redrawn from all of them."""
        sums = self._sums(values)
        drawn = (self._free @ sums) / (self._free @ self._questions)
        return self._interval(metrics.micro(values), drawn)

    def macro(self, values: Sequence[float], *, without: Sequence[str] = ()) -> Interval:
        """Mean over the ten domains; documents are redrawn inside their domain.

        Drawn from all, a third of the resamples would have no News at all and count it 0, which
        says nothing of the engine. A domain of a single document does not vary here: that is why
        macro is reported ``without`` News too.
        """
        sums = self._sums(values)
        kept = [index for index, name in enumerate(DOMAINS) if name not in without]
        total = np.zeros(self._resamples)
        for index in kept:
            members = self._domain_of == index
            if members.any():
                drawn = self._by_domain[:, members]
                total += (drawn @ sums[members]) / (drawn @ self._questions[members])
        value = metrics.macro(values, self._domains, without=without)
        return self._interval(value, total / len(kept))

    def _sums(self, values: Sequence[float]) -> Floats:
        found = np.asarray(values, dtype=np.float64)
        if found.shape != self._index.shape or not np.isfinite(found).all():
            raise ValueError("a bootstrap needs one finite value for every question")
        sums = np.bincount(self._index, weights=found, minlength=self._questions.size)
        return sums.astype(np.float64)

    def _interval(self, value: float, drawn: Floats) -> Interval:
        low, high = np.quantile(drawn, self._tails)
        return {"value": value, "low": float(low), "high": float(high)}
