"""This machine as a target: ONNX Runtime's CPU provider in a process of its own.

The process that trains holds torch's thread pool and gigabytes; a graph timed inside it would share
both. Starting another one costs about half a second per call, which compare and measure_many pay
once for all their graphs.
"""

from __future__ import annotations

import contextlib
import os
import platform
import subprocess
import sys
from collections.abc import Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from device.processor import parse_cpuinfo
from device.runner_protocol import (
    PROVIDER_NAMES,
    Job,
    Provider,
    RunnerReport,
    Schedule,
    parse_report,
    runner_arguments,
)
from device.sensors import host_sensors
from device.target import RunnerTarget
from lightfield.errors import DeviceError
from lightfield.latency import DeviceIdentity

_GRACE_SECONDS = 5  # the runner ends itself first; this is for one that cannot


class HostTarget(RunnerTarget):
    """This machine.

    Args:
        threads: threads that one operator may use.
        timeout_seconds: a measurement that takes longer is refused.
        provider: what runs the graphs, where this machine's ONNX Runtime has it.
    """

    def __init__(self, *, threads: int = 1, timeout_seconds: int = 600, provider: Provider = "cpu"):
        super().__init__(threads=threads, timeout_seconds=timeout_seconds, provider=provider)
        self.sensors = host_sensors()
        self._identity = DeviceIdentity(
            kind="host",
            name=processor_name(),
            system=system_name(),
            runtime=f"onnxruntime {metadata.version('onnxruntime')}",
            provider=PROVIDER_NAMES[provider],
            threads=threads,
        )

    @property
    def identity(self) -> DeviceIdentity:
        """This processor, system and ONNX Runtime."""
        return self._identity

    def _execute(
        self, jobs: Sequence[Job], schedule: Schedule
    ) -> tuple[RunnerReport, dict[str, Any]]:
        paths = [
            (str(job.model.resolve()), str(job.inputs), str(job.outputs) if job.outputs else None)
            for job in jobs
        ]
        # -P: the caller's working folder must not decide what `device` is
        command = [sys.executable, "-P", "-m", "device.host_runner", "--tied"]
        prefix = str(schedule.profile.with_suffix("")) if schedule.profile else None
        command += runner_arguments(paths, schedule, profile_prefix=prefix)
        load_before = os.getloadavg()[0]
        where = ", ".join(job.model.name for job in jobs)
        with _open_input() as stdin:
            try:
                done = subprocess.run(
                    command,
                    capture_output=True,
                    text=True,
                    errors="replace",
                    stdin=stdin,
                    env={**os.environ, "ORT_DISABLE_TELEMETRY": "1"},
                    timeout=schedule.limit_seconds + _GRACE_SECONDS,
                    check=False,
                )
            except subprocess.TimeoutExpired as reason:
                raise DeviceError(
                    "the runner did not finish within its time limit", where=where
                ) from reason
        report = parse_report(
            done.returncode,
            done.stdout,
            done.stderr,
            where=where,
            schedule=schedule,
            models=len(jobs),
        )
        if schedule.profile and report.profile:
            Path(report.profile).replace(schedule.profile)
        conditions = {
            "load_average_before": load_before,
            "load_average_after": os.getloadavg()[0],
            "processors": os.cpu_count(),
            "graph_optimization": "all",
            "spinning": False,
        }
        return report, conditions


@contextlib.contextmanager
def _open_input() -> Iterator[int]:
    """An input for another process in which nothing comes, and which ends with the block or with this
    process, in whatever way."""
    reading, writing = os.pipe()
    try:
        yield reading
    finally:
        os.close(reading)
        os.close(writing)


def processor_name() -> str:
    """This machine's processor as the system calls it."""
    try:
        processor = parse_cpuinfo(Path("/proc/cpuinfo").read_text(errors="replace"))
    except OSError:
        return platform.processor() or platform.machine()
    return str(processor) if processor.cores else platform.machine()


def system_name() -> str:
    """Operating system, kernel and architecture."""
    kernel = f"{platform.system()} {platform.release()} {platform.machine()}"
    try:
        return f"{platform.freedesktop_os_release()['PRETTY_NAME']} ({kernel})"
    except (OSError, KeyError):
        return kernel
