"""Measurements on a phone: conditions, sensors, traces, aborting."""

import dataclasses
import threading
import time
from pathlib import Path

import pytest
from small_graphs import write_graph

from device.adb import AdbPhone
from device.benchmark import BenchGraph, BenchmarkConfig, benchmark
from device.onnx_inputs import fixed_inputs
from device.phone import PhoneTarget
from device.runner.package import RunnerPackage
from device.target_config import TargetConfig
from device.thermal import ThermalConfig
from lightfield.errors import AdbError, DeviceError

TRANSCRIPTS = Path(__file__).parent / "transcripts"


def test_a_screen_that_stays_dark_is_refused(attach, fake, graph):
    wakes = fake.root / "bin" / "input"
    wakes.write_text("#!/bin/sh\nexit 1\n")
    with pytest.raises(DeviceError, match="screen stays off"):
        attach().measure(graph, runs=1)


def test_battery_saver_is_refused_before_settings_change(attach, fake, graph):
    target = attach()
    (fake.state / "setting_global_low_power").write_text("1\n")
    with pytest.raises(DeviceError, match="battery saver is on"):
        target.measure(graph, runs=1)
    assert not (fake.state / "fixed_performance").exists()


def test_charging_is_recorded_or_refused(fake, package, graph):
    battery = (TRANSCRIPTS / "battery_android7.txt").read_text()
    (fake.state / "dumpsys_battery").write_text(battery.replace("status: 3", "status: 2"))
    phone = AdbPhone(fake, fake.serial)
    record = PhoneTarget(phone, package).measure(graph, runs=1, warmup=0)
    assert record.conditions["before"]["is_charging"] is True
    strict = PhoneTarget(phone, package, TargetConfig(thermal=ThermalConfig(allow_charging=False)))
    with pytest.raises(DeviceError, match="the phone is charging"):
        strict.measure(graph, runs=1)


def test_clocks_are_read_during_the_runs(attach, running_package, fake, graph):
    record = attach(running_package).measure(graph, runs=2)
    clocks = record.conditions["curve"]["frequencies_mhz"]
    assert clocks["cpu0"] == [500.0, 500.0]  # read at the beginning and at the end
    assert record.conditions["throttled"] is False
    assert record.conditions["during"] == []


def test_a_slower_clock_of_a_fast_core_is_throttling(attach, running_package, fake, graph):
    # the fast one of four cores, whose clock falls during the runs
    clock = fake.root / "sys/devices/system/cpu/cpu3/cpufreq/scaling_cur_freq"
    clock.write_text("2914000\n")
    (fake.state / "runner_script").write_text(
        f'case "$*" in *--seconds*) (sleep 2; echo 1200000 > {clock}) & ;; esac\n'
    )
    record = attach(running_package).measure(graph, runs=1, seconds=5)
    assert "the clock of cpu3 fell from 2914 to 1200 MHz" in record.conditions["throttling"]
    assert record.conditions["throttled"] is True


def test_a_trace_is_pulled_from_the_phone(attach, running_package, fake, graph):
    with attach(running_package) as target:
        nodes = target.profile(graph, runs=2)
    assert "Conv" in {node.operator for node in nodes}
    assert fake.files() == []


def test_a_whole_benchmark_runs_on_a_phone(attach, running_package, fake, graph):
    config = BenchmarkConfig(runs=2, warmup=1, reference_model_runs=2, sustained_seconds=1)
    inputs = [fixed_inputs(graph, seed) for seed in (1, 2)]
    with attach(running_package) as target:
        bench = benchmark(
            target, [BenchGraph("student", graph, inputs=inputs, sustained=True)], config
        )
    (found,) = bench.graphs
    assert found.refused == ""
    assert found.fidelity is not None
    assert found.fidelity.images == 2
    assert found.sustained is not None
    assert found.sustained_fps is not None
    assert found.latency is not None
    assert found.latency.conditions["runner_sha256"].keys() == {"nelf_runner", "libonnxruntime.so"}
    assert bench.device.unit
    assert fake.serial not in str(bench.to_json())
    assert fake.files() == []


def test_a_phone_with_wrong_images_has_no_latency(attach, running_package, fake, tmp_path):
    graph = write_graph(tmp_path / "g.onnx")
    target = attach(running_package)
    run_many = target.run_many

    def wrong(model, inputs):
        return [
            {name: 0.9 * value for name, value in each.items()} for each in run_many(model, inputs)
        ]

    target.run_many = wrong
    (found,) = benchmark(
        target,
        [BenchGraph("student", graph, inputs=[fixed_inputs(graph)])],
        BenchmarkConfig(runs=1),
    ).graphs
    assert found.latency is None
    assert "dB, below 60 dB" in found.refused


def test_a_run_can_be_aborted_from_another_thread(attach, fake, graph, package):
    target = attach()
    (fake.state / "runner_script").write_text(
        'case "$*" in *--model*) touch "$STATE/runs"; exec sleep 60 ;; esac\n'
    )
    errors: list[Exception] = []

    def measure() -> None:
        try:
            target.measure(graph, runs=1)
        except DeviceError as error:
            errors.append(error)

    thread = threading.Thread(target=measure)
    thread.start()
    while not (fake.state / "runs").exists():
        time.sleep(0.02)
    target.abort()
    thread.join(20)
    assert not thread.is_alive()
    assert isinstance(errors[0], AdbError)
    assert "was aborted" in str(errors[0])
    assert (fake.state / "fixed_performance").read_text() == "false\n"
    with pytest.raises(AdbError, match="was aborted"):
        target.measure(graph, runs=1)
    target.close()
    assert fake.files() == []


def test_the_runner_gets_the_provider(fake, package, graph):
    config = TargetConfig(provider="xnnpack", threads=2)
    target = PhoneTarget(AdbPhone(fake, fake.serial), package, config)
    target.measure(graph, runs=1)
    assert target.identity.provider == "XnnpackExecutionProvider"
    (words,) = [c for c in fake.commands if "--model" in c and "--warmup 5" in c]
    assert "--provider xnnpack --option intra_op_num_threads=2" in words


def test_options_of_a_provider_reach_the_runner(fake, package, graph):
    options = ("backend_path=libQnnGpu.so; touch pwned", "htp_performance_mode=burst")
    config = TargetConfig(provider="qnn", provider_options=options)
    target = PhoneTarget(AdbPhone(fake, fake.serial), package, config)
    target.measure(graph, runs=1)
    assert any("htp_performance_mode=burst" in command for command in fake.commands)
    assert not list(fake.root.rglob("pwned"))


def test_the_runner_finds_a_providers_libraries(fake, package, graph):
    with_libraries = dataclasses.replace(package, opens_libraries=True)
    assert isinstance(with_libraries, RunnerPackage)
    target = PhoneTarget(AdbPhone(fake, fake.serial), with_libraries)
    target.measure(graph, runs=1)
    assert any("ADSP_LIBRARY_PATH" in command for command in fake.commands)
