import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
from fake_bench import DENSE, PHONE, synthetic_ms

from lightfield.camera import Intrinsics
from lightfield.run import Run
from lightfield.student import StudentSpec
from pipeline.latency_store import DRIFT_PROBES, LatencyStore

RAYS = Intrinsics(8, 6, 10.0, 10.0, 4.0, 3.0)
SPECS = [replace(DENSE, inner_widths=(width,)) for width in (4, 8, 12, 16, 20)]


class Device:
    """Records the students that it is asked to measure."""

    def __init__(self, slower: float = 1.0):
        self.slower, self.asked = slower, list[StudentSpec]()

    def __call__(self, specs):
        self.asked += specs
        return [self.slower * synthetic_ms(spec) for spec in specs]


def store(folder: Path, device: Device, identity=PHONE, rays=RAYS) -> LatencyStore:
    return LatencyStore.for_run(Run(folder / "runs" / "lego"), identity, rays, device)


def test_stored_students_are_not_measured_again_except_for_drift_probes(tmp_path):
    first, second = Device(), Device()
    times = store(tmp_path, first)(SPECS[:4])
    assert times == [synthetic_ms(spec) for spec in SPECS[:4]]
    assert first.asked == SPECS[:4]
    assert store(tmp_path, second)(SPECS) == [synthetic_ms(spec) for spec in SPECS]
    assert second.asked[0] == SPECS[4]
    assert len(second.asked) == 1 + DRIFT_PROBES


def test_runs_in_one_folder_share_the_store(tmp_path):
    store(tmp_path, Device())(SPECS)
    device = Device()
    LatencyStore.for_run(Run(tmp_path / "runs" / "chair"), PHONE, RAYS, device)(SPECS)
    assert len(device.asked) == DRIFT_PROBES


@pytest.mark.parametrize(("slower", "times"), [(1.05, 1.0), (1.3, 1.3), (0.8, 0.8)])
def test_a_device_that_drifted_by_a_tenth_is_measured_again(tmp_path, slower, times):
    store(tmp_path, Device())(SPECS)
    found = store(tmp_path, Device(slower))(SPECS)
    chosen = [0, 2, 4]  # the new times of drift probes are always used
    for i, (ms, spec) in enumerate(zip(found, SPECS, strict=True)):
        assert ms == pytest.approx((slower if i in chosen else times) * synthetic_ms(spec))


def test_fresh_measures_and_stores_all_students(tmp_path):
    store(tmp_path, Device())(SPECS)
    device = Device(1.05)
    assert store(tmp_path, device)(SPECS, fresh=True) == [1.05 * synthetic_ms(s) for s in SPECS]
    assert device.asked == SPECS
    assert store(tmp_path, Device(1.05))(SPECS)[1] == 1.05 * synthetic_ms(SPECS[1])


@pytest.mark.parametrize(
    "other",
    [
        {"identity": replace(PHONE, runtime="toy 1.1")},
        {"identity": replace(PHONE, threads=2)},
        {"rays": replace(RAYS, width=16)},
    ],
)
def test_another_device_runtime_or_ray_grid_has_its_own_store(tmp_path, other):
    store(tmp_path, Device())(SPECS)
    device = Device()
    store(tmp_path, device, **other)(SPECS)
    assert device.asked == SPECS


@pytest.mark.parametrize("damage", ["", "nonsense", "[]", '{"device": 1}'])
def test_a_damaged_file_is_ignored(tmp_path, damage):
    whole = store(tmp_path, Device())
    whole(SPECS)
    whole.path.write_text(damage)
    device = Device()
    store(tmp_path, device)(SPECS)
    assert device.asked == SPECS


@pytest.mark.parametrize("median_ms", [math.inf, math.nan, 0, "fast"])
def test_a_file_with_an_invalid_latency_is_ignored(tmp_path, median_ms):
    whole = store(tmp_path, Device())
    whole(SPECS)
    data = json.loads(whole.path.read_text())
    list(data["latencies"].values())[1]["median_ms"] = median_ms  # not a drift probe
    whole.path.write_text(json.dumps(data))
    device = Device()
    store(tmp_path, device)(SPECS)
    assert device.asked == SPECS


def test_batch_norms_do_not_change_the_key(tmp_path):
    store(tmp_path, Device())(SPECS)
    device = Device()
    store(tmp_path, device)([replace(spec, norm="batch") for spec in SPECS])
    assert len(device.asked) == DRIFT_PROBES
