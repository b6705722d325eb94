import itertools
from random import Random

import pytest

from prune.proposals import Option, choose_options

BINS = 2000


def brute_force(blocks, capacity_ms):
    fitting = [
        sum(o.loss for o in choice)
        for choice in itertools.product(*blocks)
        if sum(o.cost_ms for o in choice) <= capacity_ms + 1e-9
    ]
    return min(fitting, default=None)


@pytest.mark.parametrize("seed", range(40))
def test_the_choice_is_optimal(seed):
    random = Random(seed)
    # costs on the grid of bins, for which the choice is exact
    budget = random.uniform(1, 10)
    unit = budget / BINS

    def option(width):
        return Option(width, unit * random.randint(0, 900), random.random())

    blocks = [[option(w) for w in range(random.randint(1, 4))] for _ in range(random.randint(1, 5))]
    chosen, best = choose_options(blocks, budget, bins=BINS), brute_force(blocks, budget)
    if best is None:
        assert chosen is None
        return
    assert chosen is not None
    picked = [options[i] for options, i in zip(blocks, chosen, strict=True)]
    assert sum(o.cost_ms for o in picked) <= budget * (1 + 1e-9)
    assert sum(o.loss for o in picked) == pytest.approx(best)


@pytest.mark.parametrize("seed", range(20))
def test_off_the_grid_the_capacity_holds_and_little_is_lost(seed):
    random = Random(100 + seed)
    blocks = [[Option(w, 2 * random.random(), random.random()) for w in range(4)] for _ in range(5)]
    budget = 5.0
    chosen = choose_options(blocks, budget, bins=BINS)
    assert chosen is not None
    picked = [options[i] for options, i in zip(blocks, chosen, strict=True)]
    assert sum(o.cost_ms for o in picked) <= budget
    tighter = brute_force(blocks, budget * (1 - len(blocks) / BINS))
    assert tighter is not None
    assert sum(o.loss for o in picked) <= tighter + 1e-12


def test_edge_cases():
    free, dear = Option(0, 0.0, 1.0), Option(16, 2.0, 0.0)
    assert choose_options([], 1.0) == []
    assert choose_options([], -0.1) is None
    assert choose_options([[free, dear]], 0.0) == [0]
    assert choose_options([[free, dear]], 2.0) == [1]
    assert choose_options([[dear]], 1.9) is None
