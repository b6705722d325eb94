"""A device that is not there: what it measured for an earlier search, served to the same again."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from device.target import RunnerTarget
from lightfield.files import sha256_of
from lightfield.latency import DeviceIdentity
from prune.measurements import MEASUREMENTS, Measure, TimeSpecs, measured_on, replayed


@dataclass(frozen=True)
class RecordedTarget:
    """A search's record in place of the target that it was measured on."""

    identity: DeviceIdentity
    measure: Measure
    time_specs: TimeSpecs
    sha256: str
    """Of the record."""
    width_multiple: int = RunnerTarget.width_multiple

    @classmethod
    def of(cls, folder: Path) -> RecordedTarget:
        """The record in a `prune` artifact.

        Raises:
            CheckpointError: when there is none; while it is used, when the search asks for something
                else than was measured.
        """
        identity = measured_on(folder)
        return cls(identity, *replayed(folder), sha256_of(folder / MEASUREMENTS))
