"""The results of a sweep: trials averaged over their seeds, and the best settings."""

import numpy as np
import pytest

from scripts.sweeping import results


def test_trials_of_several_seeds_are_one():
    """Mean and standard error equal those of numpy; unfinished trials are left out."""
    losses = {(0, 4): 0.7, (1, 4): 0.8, (2, 4): 0.9, (0, 8): 0.6, (1, 8): 0.65, (2, 8): 0.1}
    rows = [
        {
            "trial": i, "state": "pruned" if key == (2, 8) else "complete", results.METRIC: loss, "seed": key[0],
            "rank": key[1],
        }
        for i, (key, loss) in enumerate(losses.items())
    ]  # fmt: skip
    large, small = results.over_seeds(rows, ["seed", "rank"])  # a trial without a seed comes last
    assert (small["rank"], small["seeds"], large["rank"], large["seeds"]) == (8, 2, 4, 3)
    assert small[results.METRIC] == pytest.approx(0.625)
    assert large["standard_error"] == pytest.approx(np.std([0.7, 0.8, 0.9], ddof=1) / 3**0.5)
    assert large["above_best"] is None
    # Only the two seeds that both have count.
    assert (small["above_best"], small["its_error"]) == pytest.approx((-0.125, 0.025))


def test_lists_are_values_over_seeds_too():
    rows = [
        {"state": "complete", results.METRIC: loss, "seed": seed, "target_modules": modules}
        for seed, modules, loss in ((0, ["to_q"], 0.6), (1, ["to_q"], 0.8), (0, ["to_q", "to_k"], 0.5))
    ]
    first, second = results.over_seeds(rows, ["seed", "target_modules"])
    assert (first["target_modules"], first["seeds"]) == (["to_q"], 2)  # the other trial may have had an easier seed
    assert (second["above_best"], second["its_error"]) == (pytest.approx(-0.1), None)


def test_a_lucky_seed_is_not_the_best(tmp_path):
    """Rank 4 has the lowest loss of all trials, but rank 8 the lower mean, so the best trial of rank 8 is recommended."""
    losses = {(0, 4): 0.5, (1, 4): 0.9, (0, 8): 0.6, (1, 8): 0.55}
    rows = [
        {"trial": i, "state": "complete", results.METRIC: loss, "seed": seed, "rank": rank}
        for i, ((seed, rank), loss) in enumerate(losses.items())
    ]
    rows.sort(key=lambda row: row[results.METRIC])
    assert results.best_of(rows, ["seed", "rank"])["trial"] == 3
    assert results.best_of(rows, ["rank"])["trial"] == 0
    assert results.best_of([row | {"state": "fail"} for row in rows], ["rank"]) is None
