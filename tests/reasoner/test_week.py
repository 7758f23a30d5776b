"""The short form of benchmarks/week.py: nothing grows with the number of steps but the journal, and that evenly."""

import pytest

from benchmarks.week import judge, simulate


@pytest.mark.parametrize("max_lag", [0, 2])
def test_nothing_grows_with_the_steps_but_the_journal(tmp_path, max_lag):
    found = judge(simulate(tmp_path, 200, max_lag, 20))
    assert found["files"][0] == found["files"][1] and found["threads"][0] == found["threads"][1], found
    assert found["processes"][0] == found["processes"][1], found
    assert max(found["memory_growth"]) < 0.05, found
    assert found["journal_unevenness"] < (0.01 if max_lag == 0 else 0.5), found
    assert found["driver_ms_per_step"] < 25, "five on a quiet machine: benchmarks/results/week.json"
