import pytest
from fake_bench import config

from lightfield.errors import ConfigError
from prune.config import Budget


@pytest.mark.parametrize("text", ["p90", "90", 90.0])
def test_a_percentile_may_be_written_either_way(text):
    budget = Budget(percentile=text)
    assert budget.percentile == budget.percent == 90.0


@pytest.mark.parametrize("text", ["p0", "100", "median", "pp90", ""])
def test_other_percentiles_are_refused(text):
    with pytest.raises(ConfigError, match="percentile"):
        Budget(percentile=text)


def test_a_budget_is_a_latency_a_frame_rate_or_a_ratio():
    assert Budget().budgets_ms(40.0) == [20.0]
    assert Budget(budget_ms=33.0).budgets_ms(40.0) == [33.0]
    assert Budget(budget_fps=50.0).budgets_ms(40.0) == [20.0]
    assert Budget(budget_ratio=(0.75, 0.5)).budgets_ms(40.0) == [30.0, 20.0]


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
        Budget(**budgets)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "setting",
    [
        {"budget_fps": 0.0},
        {"budget_fps": float("inf")},
        {"budget_ratio": (0.5, 0.5)},
        {"budget_ratio": (0.25, 0.5)},
        {"budget_ratio": (1.1,)},
        {"runs": 0},
        {"table_runs": 0},
        {"calibration_images": 0},
        {"max_loss_db": float("nan")},
    ],
)
def test_impossible_budgets_and_counts_are_refused(setting):
    with pytest.raises(ConfigError):
        config(**setting)
