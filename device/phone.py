"""A phone as a target: our runner and ONNX Runtime in /data/local/tmp, driven over adb.

What is pushed lies in folders named by its content and is checked there, so a second measurement sends
nothing again. A measurement waits until the phone is cool, keeps the screen on and the clocks fixed
where the phone allows it, runs on the fast cores, and puts everything back; `close` deletes the files.
"""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import Sequence
from typing import Any

from device.adb import PHONE_FOLDER, AdbClient, AdbPhone, open_phone
from device.adb_output import (
    PhoneIdentity,
    fast_cores,
    parse_cpu_list,
    parse_getprop,
    phone_identity,
)
from device.adb_server import connect
from device.phone_settings import steady
from device.processor import parse_cpuinfo
from device.runner.bundle import PhoneRuntime, RunnerBundle, runner_bundle
from device.runner_protocol import (
    Job,
    RunnerReport,
    Schedule,
    parse_report,
    runner_arguments,
)
from device.target import RunnerTarget
from device.thermal import (
    PhoneState,
    ThermalConfig,
    read_frequencies,
    read_state,
    wait_until_cool,
)
from lightfield.errors import AdbError, DeviceError
from lightfield.latency import DeviceIdentity

_HELLO_SECONDS = 30
_GRACE_SECONDS = 10  # the runner ends itself first; then the phone has become silent
_ABI = "arm64-v8a"


class PhoneTarget(RunnerTarget):
    """A phone on which the runner has been shown to start.

    Args:
        phone: an attached, usable phone.
        bundle: what to push; see `attach_phone`, which builds it.
        threads: threads that one operator may use.
        timeout_seconds: a measurement that takes longer is refused.
        thermal: when the phone is cool enough.

    Raises:
        DeviceError: when the phone is no 64-bit Arm one, or the runner does not start on it.
    """

    def __init__(
        self,
        phone: AdbPhone,
        bundle: RunnerBundle,
        *,
        threads: int = 1,
        timeout_seconds: int = 600,
        thermal: ThermalConfig = ThermalConfig(),  # noqa: B008 -- frozen
    ):
        super().__init__(threads=threads, timeout_seconds=timeout_seconds)
        self._phone, self._bundle, self._thermal = phone, bundle, thermal
        self._about = read_identity(phone)
        if _ABI not in self._about.abis:
            raise DeviceError(
                f"its processor is {', '.join(self._about.abis) or 'unknown'}, not {_ABI}",
                where=phone.serial,
                remedy="measure on a 64-bit Arm phone, or on the host",
            )
        self._cpus = parse_cpu_list(
            phone.attempt(["cat", "/sys/devices/system/cpu/possible"]).stdout
        )
        self._cores = parse_cpuinfo(phone.attempt(["cat", "/proc/cpuinfo"]).stdout)
        self._pinning = self._pinning_words()
        self._folders: set[str] = set()
        self._runtime = self._hello()

    @property
    def identity(self) -> DeviceIdentity:
        """Model, chip, Android and ONNX Runtime; no serial number."""
        return DeviceIdentity(
            kind="phone",
            name=self._about.name,
            system=self._about.system,
            runtime=f"onnxruntime {self._runtime}",
            provider="CPUExecutionProvider",
            threads=self.threads,
            emulated=self._about.emulated,
        )

    def close(self) -> None:
        """Delete everything that was pushed."""
        self._phone.remove(sorted(self._folders))
        self._folders.clear()

    def _hello(self) -> str:
        try:
            schedule = Schedule(1, warmup=0, turns=1, limit_seconds=_HELLO_SECONDS)
            return self._run_on_phone([], schedule, where=self._phone.serial).runtime
        except AdbError:
            raise
        except DeviceError as error:
            with contextlib.suppress(AdbError):
                self.close()
            form = self._bundle.form
            remedy = (
                "give it Android's own library with an onnxruntime-android AAR"
                if form == "glibc"
                else "check that the AAR is for this Android"
            )
            raise DeviceError(
                f"the runner ({form}) does not start: {error.what}",
                where=self._phone.serial,
                remedy=error.remedy or remedy,
            ) from error

    def _run_on_phone(
        self, jobs: Sequence[tuple[str, str, str | None]], schedule: Schedule, *, where: str
    ) -> RunnerReport:
        words = [*self._pinning, *self._bundle.command(self._push(self._bundle.files))]
        done = self._phone.attempt(
            [*words, *runner_arguments(jobs, schedule)],
            timeout_seconds=schedule.limit_seconds + _GRACE_SECONDS,
        )
        return parse_report(
            done.exit_code,
            done.stdout,
            done.stderr,
            where=where,
            turns=schedule.turns,
            models=len(jobs),
        )

    def _push(self, files: dict[str, Any]) -> str:
        folder = self._phone.push_files(files)
        self._folders.add(folder)
        return folder

    def _execute(
        self, jobs: Sequence[Job], schedule: Schedule
    ) -> tuple[RunnerReport, dict[str, Any]]:
        scratch = f"{PHONE_FOLDER}/run-{secrets.token_hex(4)}"
        self._folders.add(scratch)
        remote = []
        for index, job in enumerate(jobs):
            model = self._push({"model.onnx": job.model})
            inputs = self._push({path.name: path for path in sorted(job.inputs.iterdir())})
            outputs = f"{scratch}/{index}" if job.outputs else None
            remote.append((f"{model}/model.onnx", inputs, outputs))
        where = ", ".join(job.model.name for job in jobs)
        before = wait_until_cool(self._read_state, self._thermal)
        try:
            if folders := [outputs for _, _, outputs in remote if outputs]:
                self._phone.shell(["mkdir", "-p", *folders])
            with steady(self._phone, self._about.api) as settings:
                report = self._run_on_phone(remote, schedule, where=where)
                after = self._read_state()
            self._pull_outputs(jobs, remote, report)
        finally:
            # a lost phone is told by the error under way, and `close` tries again
            with contextlib.suppress(AdbError):
                self._phone.attempt(["rm", "-rf", scratch])
        conditions = {
            "before": before.to_json(),
            "after": after.to_json(),
            "throttled": bool(after.thermal.status),
            "settings": settings,
            "cores": str(self._cores),
            "pinned_to": self._pinning[1] if self._pinning else None,
            "runner": self._bundle.form,
            "phone": self._phone.pseudonym,
            "graph_optimisation": "all",
            "spinning": False,
        }
        return report, conditions

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

    def _pinning_words(self) -> list[str]:
        """`taskset` with the mask of the fast cores, nothing where the phone does not allow it."""
        fastest = fast_cores(
            read_frequencies(self._phone, self._cpus, "cpuinfo_max_freq"), self.threads
        )
        if not fastest:
            return []
        words = ["taskset", f"{sum(1 << cpu for cpu in fastest):x}"]
        return words if self._phone.attempt([*words, "true"]).exit_code == 0 else []


def read_identity(phone: AdbPhone) -> PhoneIdentity:
    """Who the phone is, from its properties."""
    return phone_identity(parse_getprop(phone.shell(["getprop"])))


def attach_phone(
    serial: str | None = None,
    *,
    threads: int = 1,
    timeout_seconds: int = 600,
    runtime: PhoneRuntime = PhoneRuntime(),  # noqa: B008 -- frozen
    thermal: ThermalConfig = ThermalConfig(),  # noqa: B008 -- frozen
    client: AdbClient | None = None,
) -> PhoneTarget:
    """The phone with this serial, or the only one, ready to measure: the runner is built when needed,
    pushed, and started once.

    Raises:
        AdbError: when no such phone can be used.
        DeviceError: when the runner cannot be built or does not start, saying what is missing.
    """
    phone = open_phone(client or connect(), serial)
    return PhoneTarget(
        phone,
        runner_bundle(runtime),
        threads=threads,
        timeout_seconds=timeout_seconds,
        thermal=thermal,
    )
