"""Ten seconds of what ``make soak`` does for ten minutes."""

from __future__ import annotations

import pytest

from tests.soak import check_outcome, soak


@pytest.mark.slow
@pytest.mark.soak
@pytest.mark.timeout(600)
async def test_every_rollout_is_accounted_for_whatever_happens():
    outcome = await soak(10.0)
    print("\n".join(outcome.lines()))
    check_outcome(outcome)
