import contextlib
import itertools
from pathlib import Path

import numpy as np
import pytest
from small_graphs import reference_output, write_graph

from device.adb import AdbPhone
from device.onnx_inputs import fixed_inputs
from device.phone import PhoneTarget, attach_phone
from device.phone_settings import measurement_settings
from device.runner.package import RunnerPackage
from device.start_failure import start_remedy
from device.target import Target
from device.target_config import TargetConfig
from device.thermal import PhoneState, ThermalConfig, wait_until_cool
from lightfield.errors import AdbError, BudgetError, DeviceError
from lightfield.files import sha256_of
from lightfield.latency import LatencyRecord, evidence


def settings(fake) -> dict[str, str]:
    """All settings of the phone that a measurement changes."""
    names = ("setting_global_stay_on_while_plugged_in", "fixed_performance", "dumpsys_power")
    paths = {name: fake.state / name for name in names}
    return {name: path.read_text() for name, path in paths.items() if path.exists()}


def script(fake, text: str) -> None:
    """Let the phone's runner execute this script first."""
    (fake.state / "runner_script").write_text(text)


def test_the_whole_way(attach, running_package, fake, graph):
    target = attach(running_package)
    assert isinstance(target, Target)
    before = settings(fake)
    with target:
        record = target.measure(graph, runs=4, warmup=1)
        outputs = target.run(graph, fixed_inputs(graph, seed=5))
    expected = reference_output(8, 2, fixed_inputs(graph, seed=5)["input"])
    np.testing.assert_allclose(outputs["output"], expected, atol=1e-5)
    assert len(record.samples_ms) == len(record.conditions["cpu_ms"]) == 4
    assert (record.model, record.model_sha256) == ("small.onnx", sha256_of(graph))
    assert record.device.kind == "phone"
    assert record.device.name == "Google Pixel 8 (Google Tensor G3)"
    assert not record.device.emulated
    assert LatencyRecord.from_json(record.to_json()) == record
    assert settings(fake) == {**before, "fixed_performance": "false\n"}
    assert fake.files() == []


def test_a_record_contains_the_state_of_the_phone(attach, graph):
    conditions = attach().measure(graph, runs=1, warmup=0).conditions
    assert conditions["before"]["thermal_status"] == 0
    assert conditions["before"]["battery_celsius"] == 28.5
    assert conditions["after"]["temperatures_celsius"]["VIRTUAL-SKIN"] == pytest.approx(
        31.8, abs=0.1
    )
    assert conditions["before"]["frequencies_khz"]["0"] == 500000
    assert conditions["throttled"] is False
    assert conditions["settings"] == {
        "stays_on": True,
        "screen_on": True,
        "fixed_performance": True,
    }
    assert conditions["cores"] == "4x Cortex-A510 + 4x Cortex-A715 + 1x Cortex-X3"
    assert conditions["cpu_affinity"] == "8"  # the one fastest of four cores


def test_no_record_contains_the_serial_number(attach, fake, graph):
    record = attach().measure(graph, runs=1, warmup=0)
    assert fake.serial not in str(record.to_json())


def test_no_file_is_sent_twice(attach, fake, graph):
    target = attach()
    target.measure(graph, runs=1, warmup=0)
    sent = len(fake.pushed)
    target.measure(graph, runs=1, warmup=0)
    assert len(fake.pushed) == sent


def test_two_graphs_run_interleaved(attach, running_package, tmp_path):
    one = write_graph(tmp_path / "one.onnx", layers=1)
    two = write_graph(tmp_path / "two.onnx", layers=2)
    compared = attach(running_package).compare(one, two, runs=5, warmup=1)
    assert (compared.candidate.model, compared.reference.model) == ("one.onnx", "two.onnx")
    assert len(compared.ratios) == 5


def test_settings_are_changed_only_during_the_run(attach, fake, graph):
    target = attach()
    script(fake, 'cat "$STATE"/setting_* "$STATE/fixed_performance" > "$STATE/seen"')
    (fake.state / "setting_global_stay_on_while_plugged_in").write_text("3\n")
    target.measure(graph, runs=1, warmup=0)
    assert (fake.state / "seen").read_text() == "7\ntrue\n"
    assert (fake.state / "setting_global_stay_on_while_plugged_in").read_text() == "3\n"


@pytest.mark.parametrize(
    ("runner", "message"),
    [
        ("kill -SEGV $$", "killed by SIGSEGV"),
        ("kill -ALRM $$", "time limit"),
        ("echo hello; exit 0", "report is invalid"),
        ("""echo '{"error": "no such op", "at": "load the graph"}'; exit 3""", "no such op"),
        ("echo 'CANNOT LINK EXECUTABLE' >&2; exit 1", "CANNOT LINK EXECUTABLE"),
    ],
)
def test_a_failing_runner_is_reported_and_settings_restored(attach, fake, graph, runner, message):
    target = attach()
    before = settings(fake)
    script(fake, runner)
    with target, pytest.raises(DeviceError, match=rf"small\.onnx: .*{message}"):
        target.measure(graph, runs=1)
    assert settings(fake) == {**before, "fixed_performance": "false\n"}
    assert fake.files() == []


def test_a_hanging_runner_is_stopped(attach, fake, graph):
    target = attach()
    fake.hangs_at = "--model"
    with pytest.raises(AdbError, match="does not answer"):
        target.measure(graph, runs=1)
    assert (fake.state / "fixed_performance").read_text() == "false\n"


def test_ctrl_c_restores_the_settings(attach, fake, graph, monkeypatch):
    target = attach()
    before = settings(fake)
    attempt = AdbPhone.attempt

    def interrupted(self, words, **options):
        if "--model" in words:
            raise KeyboardInterrupt
        return attempt(self, words, **options)

    monkeypatch.setattr(AdbPhone, "attempt", interrupted)
    with pytest.raises(KeyboardInterrupt), target:
        target.measure(graph, runs=1)
    assert settings(fake) == {**before, "fixed_performance": "false\n"}
    assert fake.files() == []


def test_a_pulled_cable_is_one_error_at_any_command(attach, fake, graph):
    target = attach()
    for commands in itertools.count():
        fake.lost_after = len(fake.commands) + commands
        with contextlib.suppress(AdbError):  # and nothing else
            target.measure(graph, runs=1, warmup=0)
            break
    assert commands > 20


def test_a_setting_that_cannot_be_restored_is_named(fake):
    changed = measurement_settings(AdbPhone(fake, fake.serial), api=34)
    with (
        pytest.raises(AdbError, match="could not restore these settings: fixed performance"),
        changed,
    ):
        (fake.state / "no_fixed_performance").touch()


def test_refused_settings_are_recorded(attach, fake, graph):
    for refusal in ("no_fixed_performance", "no_taskset"):
        (fake.state / refusal).touch()
    fake.show(dumpsys_thermalservice="thermal_android9", dumpsys_power="power_awake")
    record = attach().measure(graph, runs=1, warmup=0)
    assert record.conditions["settings"]["fixed_performance"] is False
    assert record.conditions["cpu_affinity"] is None
    assert record.conditions["before"]["thermal_status"] is None
    assert not any("KEYCODE" in command for command in fake.commands)


def test_old_androids_have_no_fixed_performance_mode(attach, fake, graph):
    fake.show(getprop="getprop_xiaomi_android10")
    record = attach().measure(graph, runs=1, warmup=0)
    assert "fixed_performance" not in record.conditions["settings"]


@pytest.mark.parametrize(
    "transcripts",
    [
        {"dumpsys_battery": "battery_android14"},  # 40.1 degrees
        {"dumpsys_thermalservice": "thermal_throttled_android12"},
    ],
)
def test_a_warm_phone_is_not_measured(attach, fake, graph, transcripts):
    target = attach()
    fake.show(**transcripts)
    with pytest.raises(DeviceError, match="stays warm"):
        target.measure(graph, runs=1)
    assert not (fake.state / "fixed_performance").exists()


def test_a_phone_that_warms_up_is_marked_throttled(attach, fake, graph):
    target = attach()
    transcript = Path(__file__).parent / "transcripts/thermal_throttled_android12.txt"
    script(
        fake,
        f'case "$*" in *--warmup\\ 7*) cp {transcript} "$STATE/dumpsys_thermalservice";; esac',
    )
    record = target.measure(graph, runs=1, warmup=7)
    assert record.conditions["throttled"] is True


def test_waiting_ends_when_the_phone_is_cool():
    from device.adb_output import Battery, Thermal

    states = [PhoneState(Thermal(s), Battery(c), {}) for s, c in ((1, 30.0), (0, 38.0), (0, 36.0))]
    waits: list[float] = []
    reads = iter(states)
    config = ThermalConfig(poll_seconds=7)
    cool = wait_until_cool(lambda: next(reads), config, sleep=waits.append, clock=lambda: 0.0)
    assert cool is states[2]
    assert waits == [7, 7]


@pytest.mark.parametrize("marker", ["[ro.kernel.qemu]: [1]", "[debug.nelf.emulated]: [1]"])
def test_an_emulated_phone_is_marked_and_is_no_evidence(attach, fake, graph, marker):
    properties = fake.state / "getprop"
    properties.write_text(properties.read_text() + marker + "\n")
    record = attach().measure(graph, runs=1, warmup=0)
    assert record.device.emulated
    with pytest.raises(BudgetError, match="emulated"):
        evidence(record)


def test_another_processor_is_refused(attach, fake):
    properties = fake.state / "getprop"
    properties.write_text("[ro.product.cpu.abilist]: [armeabi-v7a,armeabi]\n")
    with pytest.raises(DeviceError, match="armeabi-v7a, armeabi, not arm64-v8a"):
        attach()


def test_a_runner_that_does_not_start_is_an_error_before_measuring(
    attach, fake, package, monkeypatch
):
    script(fake, "kill -SYS $$")
    with pytest.raises(DeviceError, match=r"the runner \(bionic\) does not start: .*SIGSYS"):
        attach()
    assert fake.files() == []
    glibc = {"ld-linux-aarch64.so.1": Path("/bin/sh"), **package.files}
    with pytest.raises(DeviceError, match=r"\(glibc\).*onnxruntime-android AAR"):
        PhoneTarget(AdbPhone(fake, fake.serial), RunnerPackage("glibc", glibc))


DENIED = "/data/local/tmp/nelf/0a/nelf_runner: can't execute: Permission denied"


@pytest.mark.parametrize(
    ("said", "code", "mounts", "remedy"),
    [
        (DENIED, 126, "/dev/dm-9 /data f2fs rw,noexec 0 0", "/data/local/tmp is mounted noexec"),
        (DENIED, 126, "/dev/dm-9 /data f2fs rw 0 0", "does not allow programs"),
        (f"taskset: exec {DENIED}", 126, "", "does not allow programs"),
        ("", 126, "", "does not allow programs"),
        ("taskset: failed to set 71's affinity: Invalid argument", 1, "", "missing or not allowed"),
        ("env: taskset: No such file or directory", 127, "", "missing or not allowed"),
        ('CANNOT LINK EXECUTABLE: cannot locate symbol "x"', 1, "", "for a newer Android"),
        ('CANNOT LINK EXECUTABLE: library "libx.so" not found', 1, "", "with --phone.libraries"),
        ('program alignment (4096) cannot be smaller than system page size', 1, "", "pages of 16 KB"),
        ("libx.so: ELF load command address/offset not page-aligned", 1, "", "16 KB: .* AAR"),
        ("sh: nelf_runner: Text file busy", 126, "", "the phone is busy"),
        ("not executable: 64-bit ELF file", 126, "", "does not run programs for 64-bit Arm"),
        ("what nobody foresaw", 1, "", "check that the AAR supports this version"),
    ],
)  # fmt: skip
def test_a_runner_that_does_not_start_has_a_remedy(attach, fake, said, code, mounts, remedy):
    (fake.root / "proc/mounts").write_text(f"{mounts}\n")
    script(fake, f"cat >&2 <<'END'\n{said}\nEND\nexit {code}")
    with pytest.raises(DeviceError, match=rf"does not start: .*; .*{remedy}") as told:
        attach()
    assert ("AAR" in str(told.value)) == ("AAR" in remedy or (code == 1 and "taskset" not in said))
    assert fake.files() == []


def test_the_remedy_for_a_blocked_system_call_depends_on_the_build():
    said = "the runner was killed by SIGSYS"
    assert "Android's own library" in start_remedy(said, "glibc", "")
    assert "of another version" in start_remedy(said, "bionic", "")


def test_external_weights_are_pushed_with_the_graph(attach, running_package, tmp_path):
    target = attach(running_package)
    graph = write_graph(tmp_path / "heavy.onnx", outside="heavy.bin")
    inputs = fixed_inputs(graph)
    outputs = target.run(graph, inputs)
    np.testing.assert_allclose(
        outputs["output"], reference_output(8, 2, inputs["input"]), atol=1e-5
    )


def test_missing_weights_are_an_error_before_the_push(attach, fake, tmp_path):
    target, graph = attach(), write_graph(tmp_path / "heavy.onnx", outside="heavy.bin")
    (tmp_path / "heavy.bin").unlink()
    sent = len(fake.pushed)
    with pytest.raises(
        DeviceError, match=r"heavy\.onnx: the external weights cannot be read"
    ) as told:
        target.measure(graph, runs=1)
    assert "/data/local/tmp" not in str(told.value)
    assert len(fake.pushed) == sent


def test_a_hostile_file_name_does_not_reach_the_phone(attach, fake, tmp_path):
    graph = write_graph(tmp_path / "a b;$(touch pwned)'.onnx")
    record = attach().measure(graph, runs=1, warmup=0)
    assert record.model == graph.name
    assert not any("pwned" in command for command in fake.commands)


def test_attach_phone_builds_and_starts_the_runner(client, package, monkeypatch):
    monkeypatch.setattr("device.phone.runner_package", lambda runtime, provider="cpu": package)
    target = attach_phone(TargetConfig(serial="SERIAL01", threads=2), client)
    assert target.identity.threads == 2
    assert target.identity.runtime == "onnxruntime 1.30.0"
