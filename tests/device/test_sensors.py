import pytest

from device.sensors import Sensor, clock_sensors, condition_curve, host_sensors, zone_sensors

ZONES = """\
/sys/class/thermal/thermal_zone0/type:aoss-0
/sys/class/thermal/thermal_zone1/type:cpu-0-0
/sys/class/thermal/thermal_zone2/type:cpu-0-1
/sys/class/thermal/thermal_zone3/type:cpu-0-2
/sys/class/thermal/thermal_zone4/type:battery
/sys/class/thermal/thermal_zone5/type:skin-therm
/sys/class/thermal/thermal_zone6/type:gpu0
/sys/class/thermal/thermal_zone7/type:cpu-hidden
/sys/class/thermal/thermal_zone8/type:soc_off
/sys/class/thermal/thermal_zone0/temp:33000
/sys/class/thermal/thermal_zone1/temp:41500
/sys/class/thermal/thermal_zone2/temp:42500
/sys/class/thermal/thermal_zone3/temp:43500
/sys/class/thermal/thermal_zone4/temp:295
/sys/class/thermal/thermal_zone5/temp:36
/sys/class/thermal/thermal_zone6/temp:40200
/sys/class/thermal/thermal_zone8/temp:-40000
"""


def test_recorded_zones_are_few_and_have_units():
    factors = {sensor.name: sensor.factor for sensor in zone_sensors(ZONES)}
    assert factors == {
        "skin-therm": 1.0,
        "battery": 0.1,
        "cpu-0-0": 1e-3,
        "cpu-0-1": 1e-3,
        "gpu0": 1e-3,
    }


@pytest.mark.parametrize("text", ["", "grep: /sys/class/thermal: Permission denied\n", "a:b\n"])
def test_phones_with_hidden_zones_have_no_sensors(text):
    assert zone_sensors(text) == []


def test_rows_become_a_curve_in_units():
    sensors = [
        *clock_sensors([7]),
        *zone_sensors(ZONES)[:1],
        Sensor("gone", "/x", "frequency_mhz", 1),
    ]
    rows = [(0.0, 2_914_000.0, 36.0, -1.0), (500.0, 1_200_000.0, -1.0, -1.0)]
    curve = condition_curve(sensors, rows)
    assert curve is not None
    assert curve.at_seconds == (0.0, 0.5)
    assert curve.frequencies_mhz == {"cpu7": (2914.0, 1200.0)}
    assert curve.temperatures_celsius == {"skin-therm": (36.0, None)}


def test_implausible_values_are_left_out_of_a_curve():
    sensors = [
        Sensor("skin", "/a", "temperature_celsius", 1e-3),
        Sensor("battery", "/b", "temperature_celsius", 0.1),
        Sensor("absent", "/c", "temperature_celsius", 1.0),
        Sensor("cpu0", "/d", "frequency_mhz", 1e-3),
    ]
    rows = [
        (0.0, 36_500.0, 301.0, 0.0, 0.0),
        (500.0, -274_000.0, 999_999.0, -274.0, 1_800_000.0),
        (1000.0, 0.0, 40.0, 999.0, 2e9),
        (1500.0, 999_999.0, 302.0, 0.0, 1_900_000.0),
    ]
    curve = condition_curve(sensors, rows)
    assert curve is not None
    assert curve.temperatures_celsius == {
        "skin": (36.5, None, None, None),
        "battery": (30.1, None, 4.0, 30.2),
    }
    assert curve.frequencies_mhz == {"cpu0": (None, 1800.0, None, 1900.0)}


@pytest.mark.parametrize(
    ("number", "celsius"),
    [(45, 45), (150, 15), (295, 29.5), (15_000, 15), (98_500, 98.5)],
)
def test_the_unit_of_a_zone_follows_from_plausibility(number, celsius):
    (sensor,) = zone_sensors(f"/z/type:battery\n/z/temp:{number}\n")
    assert number * sensor.factor == pytest.approx(celsius)


@pytest.mark.parametrize("number", [-274_000, -274, 0, 1, 3_000, 999_999])
def test_a_zone_without_a_temperature_is_not_recorded(number):
    assert zone_sensors(f"/z/type:battery\n/z/temp:{number}\n") == []


def test_without_watched_files_there_is_no_curve():
    assert condition_curve([], []) is None
    assert condition_curve(clock_sensors([0]), []) is None


def test_host_sensors_are_readable():
    for sensor in host_sensors():
        assert sensor.path.startswith("/sys/")
