import pytest

from lightfield.errors import ConfigError
from prune.config import PruneConfig


@pytest.mark.parametrize("text", ["p90", "90", 90.0])
def test_a_percentile_may_be_written_either_way(text):
    config = PruneConfig(percentile=text)
    assert config.percentile == config.percent == 90.0


@pytest.mark.parametrize("text", ["p0", "100", "median", "pp90", ""])
def test_other_percentiles_are_refused(text):
    with pytest.raises(ConfigError, match="percentile"):
        PruneConfig(percentile=text)


def test_a_budget_is_latency_rate_or_share():
    assert PruneConfig().budgets_ms(40.0) == [20.0]
    assert PruneConfig(budget_ms=33.0).budgets_ms(40.0) == [33.0]
    assert PruneConfig(budget_fps=50.0).budgets_ms(40.0) == [20.0]
    assert PruneConfig(budget_ratio=(0.75, 0.5)).budgets_ms(40.0) == [30.0, 20.0]


@pytest.mark.parametrize(
    "budgets",
    [
        {"budget_ms": 3.0, "budget_fps": 30.0},
        {"budget_fps": 30.0, "budget_ratio": (0.5,)},
        {"budget_ms": 3.0, "budget_ratio": (0.5,)},
    ],
)
def test_two_budgets_are_refused_by_name(budgets):
    with pytest.raises(ConfigError, match=" and ".join(budgets)) as error:
        PruneConfig(**budgets)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "setting",
    [
        {"budget_fps": 0.0},
        {"budget_fps": float("inf")},
        {"budget_ratio": (0.5, 0.5)},
        {"budget_ratio": (0.25, 0.5)},
        {"budget_ratio": (1.1,)},
        {"turns": 0},
        {"table_turns": 0},
        {"images": 0},
        {"max_loss_db": float("nan")},
    ],
)
def test_budgets_and_counts_that_cannot_be_are_refused(setting):
    with pytest.raises(ConfigError):
        PruneConfig(**setting)
