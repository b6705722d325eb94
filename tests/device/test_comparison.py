import numpy as np
import pytest
from small_graphs import write_graph

from device.comparison import compare
from device.host import HostTarget
from device.reference_model import write_reference_model
from lightfield.errors import ConfigError
from lightfield.latency import block_bootstrap_interval


def test_the_interval_has_its_coverage():
    draws = np.random.default_rng(0)
    truth, covered, trials = 0.8, 0, 200
    for trial in range(trials):
        slow = np.repeat(draws.normal(0, 0.03, 15), 4)  # neighbors resemble each other
        ratios = truth + slow + draws.normal(0, 0.02, 60)
        found = block_bootstrap_interval(ratios, seed=trial)
        covered += found.low <= truth <= found.high
    # independent resampling would cover about 75%; the binomial's spread over 200 trials is 2%
    assert covered / trials > 0.84


def test_the_interval_is_deterministic_and_contains_the_ratio():
    ratios = np.random.default_rng(1).normal(1.2, 0.05, 41)
    found = block_bootstrap_interval(ratios)
    assert found == block_bootstrap_interval(ratios)
    assert found.low < found.ratio == np.median(ratios) < found.high
    assert (found.rounds, found.confidence) == (41, 0.95)
    wider = block_bootstrap_interval(ratios, confidence=0.999)
    assert wider.low <= found.low
    assert wider.high >= found.high


@pytest.mark.parametrize(
    ("center", "verdict"), [(0.9, "faster"), (1.1, "slower"), (1.0, "not measurably")]
)
def test_the_verdict_follows_from_the_interval(center, verdict):
    ratios = center + 0.02 * np.sin(np.arange(40))
    assert block_bootstrap_interval(ratios).verdict.startswith(verdict)


def test_one_round_has_no_interval():
    with pytest.raises(ConfigError, match="at least 2 rounds"):
        block_bootstrap_interval([1.0])


def test_two_graphs_are_compared_on_the_host(tmp_path):
    one = write_graph(tmp_path / "one.onnx", width=64, layers=2, pixels=24)
    six = write_graph(tmp_path / "six.onnx", width=64, layers=12, pixels=24)
    found = compare(HostTarget(), six, one, rounds=20, warmup=1)
    assert found.interval.verdict == "slower"
    assert found.interval.rounds == 20
    assert found.to_json()["candidate"]["model"] == "six.onnx"


def test_the_reference_model_never_changes(tmp_path):
    first, second = (write_reference_model(tmp_path / f"{n}.onnx").read_bytes() for n in (1, 2))
    assert first == second
