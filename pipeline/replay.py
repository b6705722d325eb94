"""Replay target: serves the recorded measurements of an earlier search in place of a device."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from device.target import RunnerTarget
from lightfield.files import sha256_of
from lightfield.latency import ComparedLatency, DeviceIdentity
from lightfield.student import Student, StudentSpec
from prune.record import MEASUREMENTS, measured_on, measurements_in, replayed
from prune.workbench import Measurer


@dataclass(frozen=True)
class RecordedTarget:
    """The record of a search in place of the target on which it was measured; a `Measurer`."""

    identity: DeviceIdentity
    measurer: Measurer
    folder: Path
    """Folder of the record."""
    sha256: str
    """Hash of the record."""
    width_multiple: int = RunnerTarget.width_multiple

    @classmethod
    def of(cls, folder: Path) -> RecordedTarget:
        """The record in a `prune` artifact.

        Raises:
            CheckpointError: when there is none, or a line of it is not a measurement; during the
                search, when the search asks for another measurement than the recorded one.
        """
        identity = measured_on(folder)
        return cls(identity, replayed(folder), folder, sha256_of(folder / MEASUREMENTS))

    def continued(self, work: Path) -> RecordedTarget:
        """The rest of the record after the measurements that an interrupted replay has already
        copied into its work folder.

        Raises:
            CheckpointError: when the copied measurements cannot be read, or are more than the
            record.
        """
        return replace(self, measurer=replayed(self.folder, measurements_in(work)))

    def measure(self, students: Sequence[Student]) -> Iterable[ComparedLatency]:
        """The recorded interleaved runs."""
        return self.measurer.measure(students)

    def time_specs(self, specs: Sequence[StudentSpec], *, fresh: bool = False) -> list[float]:
        """The recorded median latencies in ms."""
        return self.measurer.time_specs(specs, fresh=fresh)
