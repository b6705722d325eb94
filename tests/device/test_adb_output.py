import pytest
from fake_phone import TRANSCRIPTS

from device.adb_output import (
    EMULATION_MARKER,
    Memory,
    fast_cores,
    is_emulated,
    mount_options,
    parse_battery,
    parse_cpu_list,
    parse_free_bytes,
    parse_frequencies,
    parse_getprop,
    parse_meminfo,
    parse_thermal,
    parse_wakefulness,
    phone_identity,
)


def read(name: str) -> str:
    return (TRANSCRIPTS / f"{name}.txt").read_text()


def test_getprop_keeps_empty_values_and_values_that_span_lines():
    properties = parse_getprop(read("getprop_pixel_android15"))
    assert properties["ro.product.model"] == "Pixel 8"
    assert properties["vendor.empty"] == ""
    assert properties["persist.sys.boot.reason.history"].splitlines() == [
        "reboot,userrequested,1731000000",
        "reboot,ota,1730000000",
    ]
    assert properties["ro.board.platform"] == "zuma"  # the property after the one that spans lines
    assert parse_getprop(read("getprop_pixel_android15").replace("\n", "\r\n")) == properties


@pytest.mark.parametrize(
    ("transcript", "name", "system", "emulated"),
    [
        (
            "getprop_pixel_android15",
            "Google Pixel 8 (Google Tensor G3)",
            "Android 15 (API 35) AP3A.241105.007",
            False,
        ),
        (
            "getprop_samsung_android12",
            "Samsung SM-G991B (Samsung s5e9840)",
            "Android 12 (API 31) SP1A.210812.016",
            False,
        ),
        (
            "getprop_xiaomi_android10",
            "Xiaomi Redmi K20 (sm6150)",
            "Android 10 (API 29) QKQ1.190825.002",
            False,
        ),
        (
            "getprop_samsung_mediatek_android14",
            "Samsung SM-A146P (Mediatek MT6833V/NZA)",
            "Android 14 (API 34) UP1A.231005.007",
            False,
        ),
        (
            "getprop_emulator_api34",
            "Google sdk_gphone64_x86_64 (ranchu)",
            "Android 14 (API 34) UE1A.230829.036",
            True,
        ),
    ],
)
def test_a_phone_is_named_by_its_properties(transcript, name, system, emulated):
    identity = phone_identity(parse_getprop(read(transcript)))
    assert (identity.name, identity.system, identity.emulated) == (name, system, emulated)


def test_the_identity_does_not_contain_the_serial_number():
    assert "0123456789ABCD" not in repr(
        phone_identity(parse_getprop(read("getprop_pixel_android15")))
    )


def test_a_phone_without_properties_has_an_identity():
    identity = phone_identity({})
    assert identity.name == "unknown phone"
    assert identity.api is None


@pytest.mark.parametrize(
    "properties",
    [
        {"ro.kernel.qemu": "1"},
        {"ro.boot.qemu": "1"},
        {"ro.hardware": "goldfish"},
        {"ro.boot.hardware": "cutf_cvm"},
        {"ro.hardware": "qcom", EMULATION_MARKER: "1"},
    ],
)
def test_emulators_are_recognized(properties):
    assert is_emulated(properties)


@pytest.mark.parametrize(
    "properties",
    [
        {
            "ro.product.cpu.abilist": "x86_64,arm64-v8a",
            "ro.dalvik.vm.native.bridge": "libhoudini.so",
        },
        {"ro.product.cpu.abi": "x86"},
        {"ro.product.cpu.abi": "arm64-v8a", "ro.product.cpu.abilist64": "x86_64,arm64-v8a"},
        {"ro.product.cpu.abi": "arm64-v8a", "ro.vendor.product.cpu.abilist": "x86_64"},
        {"ro.product.cpu.abi": "arm64-v8a", "ro.dalvik.vm.native.bridge": "libndk_translation.so"},
        {"ro.product.model": "Windows Subsystem for Android"},
        {"ro.product.cpu.abilist": "arm64-v8a,x86_64"},
        {"ro.hardware": "cheets", "ro.product.cpu.abilist": "arm64-v8a"},
        {"ro.boot.hardware": "windows_arm64"},
        {"ro.product.model": "Subsystem for Android(TM)"},
        {"ro.product.device": "waydroid_arm64"},
        {"ro.product.vendor.device": "vbox86p"},
        {"init.svc.ldinit": "stopped", "ro.hardware": "qcom"},
        {"ro.genymotion.version": "3.7"},
        {"ro.build.characteristics": "nosdcard,emulator"},
    ],
)
def test_android_on_a_computer_is_emulated(properties):
    assert is_emulated(properties)


def test_a_hidden_emulator_is_recognized_by_its_processor():
    assert is_emulated({"ro.product.cpu.abilist": "arm64-v8a"}, read("cpuinfo_x86"))
    assert not is_emulated({"ro.product.cpu.abilist": "arm64-v8a"}, read("cpuinfo_arm64_linux5"))


def test_a_zero_flag_is_not_an_emulator():
    assert not is_emulated({"ro.kernel.qemu": "0", "ro.hardware": "qcom"})
    assert not is_emulated({"qemu.hw.mainkeys": "0", "ro.dalvik.vm.native.bridge": "0"})


@pytest.mark.parametrize(
    ("maker", "model", "name"),
    [
        ("vivo", "V2227A", "vivo V2227A"),
        ("HUAWEI", "ELS-NX9", "HUAWEI ELS-NX9"),
        ("iQOO", "I2012", "iQOO I2012"),
        ("motorola", "moto g84", "Motorola moto g84"),
        ("OPPO", "OPPO A5", "OPPO A5"),
    ],
)
def test_makers_have_their_proper_spelling(maker, model, name):
    found = phone_identity({"ro.product.manufacturer": maker, "ro.product.model": model})
    assert found.name == name


def test_mount_options_come_from_the_nearest_mount():
    mounts = (
        "/dev/root / ext4 ro,seclabel 0 0\n"
        "/dev/block/dm-9 /data f2fs rw,nosuid,noexec 0 0\n"
        "tmpfs /data/local/tmpfs tmpfs rw 0 0\n"
    )
    assert mount_options(mounts, "/data/local/tmp") == {"rw", "nosuid", "noexec"}
    assert mount_options(mounts, "/system/bin") == {"ro", "seclabel"}
    assert mount_options("cat: /proc/mounts: Permission denied\n", "/data") == set()


@pytest.mark.parametrize(
    ("transcript", "celsius", "percent", "charging", "plugged"),
    [
        ("battery_android7", 28.5, 88, True, True),
        ("battery_android14", 40.1, 93, False, False),
        ("battery_samsung", 31.2, 100, True, True),  # not the 45.5 of its log
        ("battery_honor_android14", 26.3, 61, True, True),
        ("battery_emulator_android6", None, 50, True, True),
        ("battery_absent_tv_android11", None, None, None, None),
        ("battery_updates_stopped", None, None, None, None),  # its 25.0 may be hours old
    ],
)
def test_battery(transcript, celsius, percent, charging, plugged):
    battery = parse_battery(read(transcript))
    assert battery.temperature_celsius == (celsius and pytest.approx(celsius))
    assert battery.level_percent == percent
    assert (battery.is_charging, battery.is_plugged) == (charging, plugged)


@pytest.mark.parametrize("tenths", ["-2740", "0", "9999", "2147483647"])
def test_a_battery_without_a_thermometer_has_no_temperature(tenths):
    assert parse_battery(f"  temperature: {tenths}\n  level: 50\n").temperature_celsius is None


def test_an_unreadable_battery_has_no_values():
    battery = parse_battery("Can't find service: battery\n")
    assert (battery.temperature_celsius, battery.is_charging, battery.is_plugged) == (None,) * 3


def test_thermal_leaves_out_limits_and_absent_sensors():
    thermal = parse_thermal(read("thermal_pixel_android15"))
    assert thermal.status == 0
    assert thermal.temperatures_celsius == {
        "BIG": 41.0,
        "LITTLE": 39.0,
        "G3D": 38.0,
        "battery": 30.600002,
        "VIRTUAL-SKIN": 31.793081,
        "TPU": 37.5,
    }


@pytest.mark.parametrize(
    ("transcript", "status", "readings"),
    [
        ("thermal_throttled_android12", 2, {"AP": 71.2, "BAT": 39.8, "SKIN": 44.6}),
        ("thermal_samsung_android16", 1, {"AP": 34.1, "BAT": 29.3, "SKIN": 32.6}),
        ("thermal_shield_android11", 0, {"GPU": 64.0, "CPU0": 66.5, "CPU1": 66.0}),
        ("thermal_hal_missing_android10", 0, {"battery": 29.4}),
        ("thermal_android9", None, {}),
    ],
)
def test_thermal_of_other_phones(transcript, status, readings):
    thermal = parse_thermal(read(transcript))
    assert (thermal.status, thermal.temperatures_celsius) == (status, readings)


def test_memory():
    assert parse_meminfo(read("meminfo_linux5")) == Memory(7795268 * 1024, 3120444 * 1024)
    assert parse_meminfo(read("meminfo_linux3")) == Memory(1891176 * 1024, None)
    assert parse_meminfo("cat: /proc/meminfo: Permission denied\n") == Memory()


def test_free_space():
    assert parse_free_bytes("29184 4096\n") == 29184 * 4096
    assert parse_free_bytes("stat: Unknown option 'f'\n") is None


def test_wakefulness():
    assert parse_wakefulness(read("power_awake")) is True
    assert parse_wakefulness(read("power_asleep")) is False
    assert parse_wakefulness("") is None


def test_cpu_lists():
    assert parse_cpu_list("0-3,6\n") == [0, 1, 2, 3, 6]
    assert parse_cpu_list("0\n") == [0]
    assert parse_cpu_list("cat: no such file") == []


def test_frequencies_leave_out_unreadable_files():
    text = (
        "/sys/devices/system/cpu/cpu0/cpufreq/scaling_cur_freq:1704000\n"
        "grep: /sys/devices/system/cpu/cpu1/cpufreq/scaling_cur_freq: No such file or directory\n"
        "/sys/devices/system/cpu/cpu10/cpufreq/scaling_cur_freq:2914000\n"
    )
    assert parse_frequencies(text) == {0: 1704000, 10: 2914000}


def test_fast_cores_are_enough_for_the_threads():
    three_kinds = {0: 1700, 1: 1700, 2: 2300, 3: 2300, 4: 2900}
    assert fast_cores(three_kinds, threads=1) == [4]
    assert fast_cores(three_kinds, threads=2) == [2, 3, 4]
    assert fast_cores(three_kinds, threads=4) == []  # all of them: nothing to choose
    assert fast_cores(dict.fromkeys(range(4), 2000), threads=1) == []
    assert fast_cores({}, threads=1) == []
