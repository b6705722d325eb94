import time

import pytest

from device.adb_output import Battery, Thermal
from device.thermal import (
    PhoneState,
    StatePolling,
    ThermalConfig,
    require_fit,
    require_screen,
    throttling_signs,
    wait_until_cool,
)
from lightfield.errors import AdbError, ConfigError, DeviceError
from lightfield.latency import slowdown


def state(status: int | None = 0, **battery) -> PhoneState:
    return PhoneState(Thermal(status), Battery(**battery), {})


@pytest.mark.parametrize(
    ("unfit", "config", "message"),
    [
        (state(level_percent=12.0), ThermalConfig(), "battery level is 12%, below 20%"),
        (PhoneState(Thermal(0), Battery(), {}, battery_saver=True), ThermalConfig(), "saver is on"),
        (state(is_charging=True), ThermalConfig(allow_charging=False), "the phone is charging"),
    ],
)
def test_conditions_that_waiting_does_not_change_are_refused_at_once(unfit, config, message):
    with pytest.raises(DeviceError, match=message):
        require_fit(unfit, config)
    with pytest.raises(DeviceError, match=message):
        wait_until_cool(lambda: unfit, config, sleep=lambda s: pytest.fail("waited"))


def test_unknown_values_pass():
    silent = PhoneState(Thermal(None), Battery(), {})
    require_fit(silent, ThermalConfig(allow_charging=False))
    require_screen(silent, ThermalConfig())
    require_fit(state(is_charging=True, level_percent=90.0), ThermalConfig())


def test_a_dark_screen_is_refused_unless_allowed():
    dark = PhoneState(Thermal(0), Battery(), {}, is_awake=False)
    with pytest.raises(DeviceError, match="screen stays off"):
        require_screen(dark, ThermalConfig())
    require_screen(dark, ThermalConfig(allow_dark_screen=True))


def test_a_warm_phone_with_an_empty_battery_is_refused_at_once():
    states = iter([state(1, level_percent=5.0)])
    with pytest.raises(DeviceError, match="battery level is 5%"):
        wait_until_cool(lambda: next(states), ThermalConfig(), sleep=lambda s: None)


def test_impossible_conditions_are_refused():
    for fields in (
        {"wait_seconds": -1.0},
        {"poll_seconds": 0.0},
        {"lowest_battery_percent": 101.0},
    ):
        with pytest.raises(ConfigError):
            ThermalConfig(**fields)


def test_every_sign_of_throttling_is_named():
    steady, slower = [2.0] * 40, [2.0] * 20 + [2.6] * 20
    clocks = {"cpu8": [2900.0] * 6 + [None] + [1800.0] * 6, "cpu0": [1700.0] * 12}
    assert throttling_signs([state()], [steady], {"cpu0": [1700.0] * 12}) == []
    assert throttling_signs([state(0), state(3), state(1)], [steady], {}) == [
        "the thermal status rose to 3"
    ]
    assert throttling_signs([], [steady, slower], clocks) == [
        "the last quarter of the runs took 1.30 times as long as the first",
        "the clock of cpu8 fell from 2900 to 1800 MHz",
    ]


def test_too_few_runs_show_no_slowdown():
    assert slowdown([1.0] * 19) is None
    assert slowdown([1.0] * 10 + [1.5] * 10) == 1.5
    assert throttling_signs([], [[1.0] * 5 + [9.0] * 5], {"cpu0": [2000.0, 1000.0]}) == []


def test_only_long_runs_are_polled(monkeypatch):
    monkeypatch.setattr("device.thermal._POLL_SECONDS", 0.01)
    with StatePolling(state, seconds=0.005) as short:
        time.sleep(0.05)
    with StatePolling(state, seconds=60) as long:
        while len(long.states) < 3:
            time.sleep(0.005)
    assert short.states == []
    times = [at for at, _ in long.states]
    assert times == sorted(times)


def test_polling_stops_when_the_phone_is_lost(monkeypatch):
    monkeypatch.setattr("device.thermal._POLL_SECONDS", 0.001)

    def lost() -> PhoneState:
        raise AdbError("gone")

    with StatePolling(lost, seconds=60) as polling:
        polling._thread.join(5)
        assert not polling._thread.is_alive()
    assert polling.states == []
