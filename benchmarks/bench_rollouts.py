"""Claim: the hf engine writes no slower than 0.8 times ``model.generate`` tuned by hand, with answers of one length and where they end."""

from __future__ import annotations

import pytest

from benchmarks import rollouts


@pytest.mark.parametrize("ends", ["never", "natural"])
def test_hf_engine_beside_generate(request: pytest.FixtureRequest, ends: str) -> None:
    quick = ["--sequences", "16", "--rounds", "3"] if request.config.getoption("quick") else []
    ratios = rollouts.main(["--ends", ends, *quick])
    assert all(ratio >= rollouts.AIM for ratio in ratios.values()), ratios
