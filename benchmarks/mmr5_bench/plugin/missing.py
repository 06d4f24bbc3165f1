"""What stands in for ``mmr5_benchmark`` in an environment without pytest-benchmark."""

from __future__ import annotations

import pytest


@pytest.fixture
def mmr5_benchmark() -> None:
    """Fails, and says what to install."""
    pytest.fail(
        "mmr5_benchmark needs pytest-benchmark, which is not installed or was switched off: "
        "pip install 'mmr5-runtime[bench]', and no -p no:benchmark.",
        pytrace=False,
    )
