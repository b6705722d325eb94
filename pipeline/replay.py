"""A device that is not there: what it measured for an earlier search, served to the same again."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from device.target import RunnerTarget
from lightfield.files import sha256_of
from lightfield.latency import DeviceIdentity
from prune.measurements import (
    MEASUREMENTS,
    Measure,
    TimeSpecs,
    measured_on,
    measurements_in,
    replayed,
)


@dataclass(frozen=True)
class RecordedTarget:
    """A search's record in place of the target that it was measured on."""

    identity: DeviceIdentity
    measure: Measure
    time_specs: TimeSpecs
    folder: Path
    """Where the record is."""
    sha256: str
    """Of the record."""
    width_multiple: int = RunnerTarget.width_multiple

    @classmethod
    def of(cls, folder: Path) -> RecordedTarget:
        """The record in a `prune` artifact.

        Raises:
            CheckpointError: when there is none, or a line of it is no measurement; while it is used,
                when the search asks for something else than was measured.
        """
        identity = measured_on(folder)
        return cls(identity, *replayed(folder), folder, sha256_of(folder / MEASUREMENTS))

    def going_on(self, work: Path) -> RecordedTarget:
        """The record after what an interrupted replay has copied from it into its work folder.

        Raises:
            CheckpointError: when what was copied cannot be read, or is more than the record.
        """
        measure, time_specs = replayed(self.folder, measurements_in(work))
        return replace(self, measure=measure, time_specs=time_specs)
