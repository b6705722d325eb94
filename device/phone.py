"""A phone as a target: the runner and ONNX Runtime in /data/local/tmp, driven over adb.

Pushed files lie in folders that are named by their content and checked there, so a second measurement
sends no file again. A measurement waits until the phone is cool, keeps the screen on and the clocks
fixed where the phone allows it, runs on the fast cores, and restores all settings. `close` deletes the
files.
"""

from __future__ import annotations

import contextlib
import secrets
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from device.adb import PHONE_FOLDER, AdbClient, AdbPhone, open_phone, read_identity
from device.adb_output import fast_cores, parse_cpu_list
from device.adb_server import connect
from device.onnx_inputs import whole_graph
from device.phone_settings import measurement_settings
from device.processor import parse_cpuinfo
from device.runner.package import RunnerPackage, runner_package
from device.runner_protocol import (
    PROVIDER_NAMES,
    Job,
    RunnerReport,
    Schedule,
    parse_report,
    runner_arguments,
)
from device.sensors import LIST_ZONES, Sensor, clock_sensors, condition_curve, zone_sensors
from device.start_failure import start_remedy
from device.target import RunnerTarget
from device.target_config import TargetConfig
from device.thermal import (
    PhoneState,
    StatePolling,
    read_frequencies,
    read_state,
    require_screen,
    throttling_signs,
    wait_until_cool,
)
from lightfield.errors import AdbError, DeviceError
from lightfield.latency import DeviceIdentity

_HELLO_SECONDS = 30
_GRACE_SECONDS = 10  # a hanging runner ends itself first; after that, the phone does not answer
_ABI = "arm64-v8a"
# $1: file for the process id; $2...: the command of the runner, which keeps that process id
_START = 'echo $$ > "$1"; shift; exec "$@"'
_END = 'read -r process < "$1" && kill -KILL "$process"'
# ONNX Runtime 1.31 writes a telemetry file and would send it
_NO_TELEMETRY = ["env", "ORT_DISABLE_TELEMETRY=1"]


class PhoneTarget(RunnerTarget):
    """A phone on which the runner starts.

    Args:
        phone: an attached, usable phone.
        package: files of the runner; `attach_phone` builds them.
        config: threads, execution provider and its options, thermal conditions.
        timeout_seconds: a measurement that takes longer fails.

    Raises:
        DeviceError: when the phone does not have a 64-bit Arm processor, or the runner does not start.
    """

    def __init__(
        self,
        phone: AdbPhone,
        package: RunnerPackage,
        config: TargetConfig = TargetConfig(),  # noqa: B008 -- frozen
        *,
        timeout_seconds: int = 600,
    ):
        super().__init__(config, timeout_seconds=timeout_seconds)
        self._phone, self._package = phone, package
        self._about = read_identity(phone)
        if _ABI not in self._about.abis:
            raise DeviceError(
                f"the processor is {', '.join(self._about.abis) or 'unknown'}, not {_ABI}",
                where=phone.serial,
                remedy="measure on a 64-bit Arm phone, or on the host",
            )
        self._cpus = parse_cpu_list(
            phone.attempt(["cat", "/sys/devices/system/cpu/possible"]).stdout
        )
        self._cores = parse_cpuinfo(phone.attempt(["cat", "/proc/cpuinfo"]).stdout)
        self._fast_cores = self._usable_fast_cores()
        self._pinning = (
            ["taskset", f"{sum(1 << cpu for cpu in self._fast_cores):x}"]
            if self._fast_cores
            else []
        )
        self.sensors = self._readable_sensors()
        self._process = f"{PHONE_FOLDER}/runner-{secrets.token_hex(4)}.pid"
        self._folders: set[str] = {self._process}
        self._aborted = False
        self._runtime = self._hello()

    @property
    def identity(self) -> DeviceIdentity:
        """Model, chip, Android and ONNX Runtime of the phone, without its serial number."""
        return DeviceIdentity(
            kind="phone",
            name=self._about.name,
            system=self._about.system,
            runtime=f"onnxruntime {self._runtime}",
            provider=PROVIDER_NAMES[self.config.provider],
            threads=self.config.threads,
            emulated=self._about.emulated,
            unit=self._about.unit,
        )

    def close(self) -> None:
        """Delete all pushed files from the phone."""
        self._phone.remove(sorted(self._folders))
        self._folders.clear()

    def abort(self) -> None:
        """Stop the current run from another thread; later measurements are refused."""
        self._aborted = True
        with contextlib.suppress(AdbError):
            self._phone.attempt(["sh", "-c", _END, "nelf", self._process])

    def _hello(self) -> str:
        """Start the runner without a graph; return the version of ONNX Runtime."""
        try:
            schedule = Schedule(1, warmup=0, runs=1, limit_seconds=_HELLO_SECONDS)
            return self._run_on_phone([], schedule, where=self._phone.serial).runtime
        except AdbError:
            raise
        except DeviceError as error:
            build, mounts = self._package.build, ""
            with contextlib.suppress(AdbError):
                mounts = self._phone.attempt(["cat", "/proc/mounts"]).stdout
                self.close()
            raise DeviceError(
                f"the runner ({build}) does not start: {error.what}",
                where=self._phone.serial,
                remedy=error.remedy or start_remedy(error.what, build, mounts),
            ) from error

    def _run_on_phone(
        self,
        jobs: Sequence[tuple[str, str, str | None]],
        schedule: Schedule,
        *,
        where: str,
        profile_prefix: str | None = None,
    ) -> RunnerReport:
        folder = self._push(self._package.files)
        words = ["sh", "-c", _START, "nelf", self._process]
        words += [*_NO_TELEMETRY, *self._pinning, *self._package.command(folder)]
        if self._aborted:
            raise AdbError("the measurement was aborted", where=self._phone.serial)
        done = self._phone.attempt(
            [*words, *runner_arguments(jobs, schedule, profile_prefix=profile_prefix)],
            timeout_seconds=schedule.limit_seconds + _GRACE_SECONDS,
        )
        if self._aborted:
            raise AdbError("the measurement was aborted", where=self._phone.serial)
        return parse_report(
            done.exit_code,
            done.stdout,
            done.stderr,
            where=where,
            schedule=schedule,
            models=len(jobs),
        )

    def _push(self, files: dict[str, Any]) -> str:
        folder = self._phone.push_files(files)
        self._folders.add(folder)
        return folder

    def _run_jobs(
        self, jobs: Sequence[Job], schedule: Schedule
    ) -> tuple[RunnerReport, dict[str, Any]]:
        scratch = f"{PHONE_FOLDER}/run-{secrets.token_hex(4)}"
        self._folders.add(scratch)
        remote = []
        for index, job in enumerate(jobs):
            with tempfile.TemporaryDirectory(prefix="nelf-graph-") as name:
                model = self._push({"model.onnx": whole_graph(job.model, Path(name))})
            inputs = self._push({path.name: path for path in sorted(job.inputs.iterdir())})
            outputs = f"{scratch}/{index}" if job.outputs else None
            remote.append((f"{model}/model.onnx", inputs, outputs))
        where = ", ".join(job.model.name for job in jobs)
        before = wait_until_cool(self._read_state, self.config.thermal)
        try:
            self._phone.shell(["mkdir", "-p", scratch, *(o for _, _, o in remote if o)])
            with measurement_settings(self._phone, self._about.api) as settings:
                require_screen(self._read_state(), self.config.thermal)
                prefix = f"{scratch}/trace" if schedule.profile else None
                with StatePolling(self._read_state, schedule.seconds) as polling:
                    report = self._run_on_phone(
                        remote, schedule, where=where, profile_prefix=prefix
                    )
                after = self._read_state()
            self._pull_outputs(jobs, remote, report)
            if schedule.profile and report.profile:
                self._phone.pull_file(report.profile, schedule.profile)
        finally:
            # if the phone is lost, another error is already on its way, and `close` tries again
            with contextlib.suppress(AdbError):
                self._phone.attempt(["rm", "-rf", scratch])
        states = [*(state for _, state in polling.states), after]
        signs = throttling_signs(
            states, [times.wall_ms for times in report.models], self._clocks_of_fast_cores(report)
        )
        conditions = {
            "before": before.to_json(),
            "during": [{"at_seconds": at, **state.to_json()} for at, state in polling.states],
            "after": after.to_json(),
            "throttled": bool(signs),
            "throttling": signs,
            "settings": settings,
            "cores": str(self._cores),
            "cpu_affinity": self._pinning[1] if self._pinning else None,
            "runner": self._package.build,
            "runner_sha256": self._package.hashes(),
            "phone": self._about.unit,
            "graph_optimization": "all",
            "spinning": False,
        }
        return report, conditions

    def _clocks_of_fast_cores(self, report: RunnerReport) -> dict[str, tuple[float | None, ...]]:
        curve = condition_curve(self.sensors, report.watched)
        if curve is None:
            return {}
        wanted = {f"cpu{cpu}" for cpu in self._fast_cores}
        return {name: mhz for name, mhz in curve.frequencies_mhz.items() if name in wanted}

    def _pull_outputs(
        self,
        jobs: Sequence[Job],
        remote: Sequence[tuple[str, str, str | None]],
        report: RunnerReport,
    ) -> None:
        for job, (_, _, folder), times in zip(jobs, remote, report.models, strict=True):
            if job.outputs is None:
                continue
            job.outputs.mkdir(parents=True, exist_ok=True)
            for index in range(len(times.outputs)):
                self._phone.pull_file(f"{folder}/{index}.bin", job.outputs / f"{index}.bin")

    def _read_state(self) -> PhoneState:
        return read_state(self._phone, self._cpus)

    def _usable_fast_cores(self) -> list[int]:
        """The fast cores; none if the phone does not allow `taskset` to pin the runner to them."""
        fastest = fast_cores(
            read_frequencies(self._phone, self._cpus, "cpuinfo_max_freq"), self.config.threads
        )
        if not fastest:
            return []
        words = ["taskset", f"{sum(1 << cpu for cpu in fastest):x}", "true"]
        return fastest if self._phone.attempt(words).exit_code == 0 else []

    def _readable_sensors(self) -> list[Sensor]:
        """Sensors for clocks and temperatures that the phone allows to read; many makers hide some."""
        readable = read_frequencies(self._phone, self._cpus, "scaling_cur_freq")
        zones = self._phone.attempt(["sh", "-c", LIST_ZONES]).stdout
        return clock_sensors(sorted(readable)) + zone_sensors(zones)


def attach_phone(config: TargetConfig, client: AdbClient | None = None) -> PhoneTarget:
    """Open the phone with the configured serial number, or the only phone, ready to measure.

    The runner is built if needed, pushed to the phone, and started once.

    Raises:
        AdbError: when no such phone can be used.
        DeviceError: when the runner cannot be built (the error says what is missing) or does not start.
    """
    phone = open_phone(client or connect(), config.serial)
    return PhoneTarget(phone, runner_package(config.phone, provider=config.provider), config)
