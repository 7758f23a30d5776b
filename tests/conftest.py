"""What tests of several rooms ask of an engine."""

import asyncio

import pytest

from search.base import Trajectory
from search.sample import Sample
from search.tree import explore


@pytest.fixture
def drawn_after_cancelling():
    """Cancels a search of 8 paths beside one of a single path: (tokens drawn from then on, length of that path)."""

    async def cancel_one(engine, prompt) -> tuple[int, int]:
        doomed = asyncio.ensure_future(explore(Sample(n=8), Trajectory(prompt, seed=1), engine))
        kept = asyncio.ensure_future(explore(Sample(n=1), Trajectory(prompt, seed=2), engine))
        while engine.ledger.generated < 18:
            await asyncio.sleep(0)
        doomed.cancel()
        before = engine.ledger.generated
        (path,) = (await kept).paths
        return engine.ledger.generated - before, path.length

    return lambda engine, prompt: asyncio.run(cancel_one(engine, prompt))
