"""The host (this machine) as a target: ONNX Runtime in a separate process.

The training process holds torch's thread pool and gigabytes of memory, which would disturb a graph that
is timed in the same process. Starting another process costs about half a second per call; `compare` and
`measure_many` pay that cost once for all graphs.
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
    RunnerReport,
    Schedule,
    parse_report,
    runner_arguments,
)
from device.sensors import host_sensors
from device.target import RunnerTarget
from device.target_config import TargetConfig
from lightfield.errors import DeviceError
from lightfield.latency import DeviceIdentity

_GRACE_SECONDS = 5  # a hanging runner ends itself first; this is for a runner that cannot


class HostTarget(RunnerTarget):
    """This machine.

    Args:
        config: threads, execution provider and its options.
        timeout_seconds: a measurement that takes longer fails.
    """

    def __init__(
        self,
        config: TargetConfig = TargetConfig(),  # noqa: B008 -- frozen
        *,
        timeout_seconds: int = 600,
    ):
        super().__init__(config, timeout_seconds=timeout_seconds)
        self.sensors = host_sensors()
        self._identity = DeviceIdentity(
            kind="host",
            name=processor_name(),
            system=system_name(),
            runtime=f"onnxruntime {metadata.version('onnxruntime')}",
            provider=PROVIDER_NAMES[config.provider],
            threads=config.threads,
        )

    @property
    def identity(self) -> DeviceIdentity:
        """The processor, system and ONNX Runtime of this machine."""
        return self._identity

    def _run_jobs(
        self, jobs: Sequence[Job], schedule: Schedule
    ) -> tuple[RunnerReport, dict[str, Any]]:
        paths = [
            (str(job.model.resolve()), str(job.inputs), str(job.outputs) if job.outputs else None)
            for job in jobs
        ]
        # -P: never import `device` from the caller's working folder
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
    """Yield an empty pipe as another process's standard input.

    The pipe closes when the block ends, or when this process ends for any reason.
    """
    reading, writing = os.pipe()
    try:
        yield reading
    finally:
        os.close(reading)
        os.close(writing)


def processor_name() -> str:
    """The name of this machine's processor, as the system reports it."""
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
