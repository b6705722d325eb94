import pytest
from fake_bench import DENSE, FakeTarget, bench, dense_student, synthetic_ms

from lightfield.errors import BudgetError, ConfigError
from pipeline.baselines import BaselineConfig, largest_within
from prune.architecture import uniform_shapes


@pytest.mark.parametrize("kind", ["width", "depth", "scratch"])
def test_the_largest_shape_within_the_latency_is_taken(kind):
    shape, ratio = largest_within(bench(FakeTarget(noise=0.001)), dense_student(), kind, 0.7)
    assert ratio <= 0.7
    direction = "both" if kind == "scratch" else kind
    shapes = uniform_shapes(DENSE, direction, multiple=4)
    true = [synthetic_ms(s.applied_to(DENSE)) / synthetic_ms(DENSE) for s in shapes]
    assert shape == next(s for s, r in zip(shapes, true, strict=True) if r <= 0.7)
    assert ratio == pytest.approx(true[shapes.index(shape)], rel=0.01)


def test_an_unreachable_latency_is_refused():
    with pytest.raises(BudgetError, match=r"uniform depth .* the fastest takes 0\.\d+") as error:
        largest_within(bench(FakeTarget()), dense_student(), "depth", 0.05)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("setting", [{"latency_ratio": 0.0}, {"latency_ratio": 1.5}, {"steps": 0}])
def test_settings_that_cannot_work_are_refused(setting):
    with pytest.raises(ConfigError):
        BaselineConfig(**setting)
