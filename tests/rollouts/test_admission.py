import asyncio

import pytest

from rollouts.admission import Admission, need_of
from search.beam import Beam
from search.sample import Sample


def most_at_once(room, needs, broken=()):
    """The largest sum of needs that were in at one time, and the order in which they came in."""
    inside, order, peaks = {}, [], [0]

    async def one(number, need, gate):
        async with gate.held(need):
            inside[number] = need
            order.append(number)
            peaks.append(sum(inside.values()))
            await asyncio.sleep(0)
            del inside[number]
            if number in broken:
                raise RuntimeError(f"task {number} broke")

    async def all_of_them():
        gate = Admission(room)
        work = (one(number, need, gate) for number, need in enumerate(needs))
        return await asyncio.wait_for(asyncio.gather(*work, return_exceptions=True), 5)

    asyncio.run(all_of_them())
    return max(peaks), order


def test_tasks_never_hold_more_than_there_is_and_keep_their_order():
    peak, order = most_at_once(10, [4, 4, 4, 1, 8, 2, 2])
    assert peak <= 10 and order == list(range(7))


def test_a_task_larger_than_the_room_runs_alone():
    peak, order = most_at_once(10, [3, 25, 3])
    assert peak == 25 and order == [0, 1, 2]


def test_a_task_that_breaks_gives_its_room_back():
    assert most_at_once(5, [5, 5, 5], broken={0, 1}) == (5, [0, 1, 2])


def test_without_a_limit_all_are_in_at_once():
    assert most_at_once(None, [9] * 20) == (180, list(range(20)))


@pytest.mark.parametrize("which", [0, 1])
def test_a_cancelled_task_frees_what_it_held_or_its_place_in_the_queue(which):
    async def scene():
        gate = Admission(5)

        async def hold():
            async with gate.held(5):
                await asyncio.Event().wait()

        holders = [asyncio.create_task(hold()) for _ in range(2)]
        await asyncio.sleep(0)
        holders[which].cancel()
        await asyncio.sleep(0)
        holders[1 - which].cancel()
        async with asyncio.timeout(1), gate.held(5):
            pass

    asyncio.run(scene())


def test_the_need_counts_every_path_that_a_search_keeps_alive_in_whole_blocks():
    assert need_of(Sample(n=16), prompt=30, response=100) == 30 + 16 * 5 * 32
    assert need_of(Beam(width=4, branch=2), prompt=30, response=32) == 30 + 8 * 2 * 32
