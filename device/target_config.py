"""Options that choose the device to measure on and say how graphs run there.

The command line makes one `TargetConfig`; every function below takes the same object.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Annotated, Any, Literal

from device.runner.package import PhoneRuntime
from device.runner_protocol import Provider
from device.thermal import ThermalConfig
from lightfield.errors import ConfigError
from lightfield.ranges import THREADS, check_ranges

TargetKind = Literal["auto", "phone", "host"]


@dataclass(frozen=True)
class TargetConfig:
    """The device that measures the graphs, and how it runs them."""

    target: TargetKind = "auto"
    """Device to measure on: `phone`, `host` (this machine), or `auto`, which takes the phone if exactly
    one is attached and this machine otherwise."""
    serial: str | None = None
    """Serial number of the phone to use if several are attached."""
    threads: Annotated[int, THREADS] = 1
    """Number of threads that one operator may use."""
    phone: PhoneRuntime = field(default_factory=PhoneRuntime)
    """Source of the ONNX Runtime library that runs on the phone."""
    provider: Provider = "cpu"
    """Execution provider of ONNX Runtime that runs the graphs. The CPU runs the nodes that the provider
    does not support."""
    provider_options: tuple[str, ...] = ()
    """Options of the execution provider, each as KEY=VALUE, with the names that ONNX Runtime uses."""
    thermal: ThermalConfig = field(default_factory=ThermalConfig)
    """Conditions that a phone must meet before a measurement starts."""

    def __post_init__(self) -> None:
        check_ranges(self, "target")
        if self.serial is not None and self.target == "host":
            raise ConfigError(
                "a serial number selects a phone, but the target is this machine",
                where="serial",
                remedy="leave out --serial, or pass --target phone",
            )
        if wrong := [pair for pair in self.provider_options if "=" not in pair]:
            raise ConfigError(f"'{wrong[0]}' is not KEY=VALUE", where="provider_options")

    def options_by_name(self) -> dict[str, str]:
        """The execution provider's options by name; defaults that the provider needs are filled in."""
        given = dict(pair.split("=", 1) for pair in self.provider_options)
        return {**_provider_defaults(self.provider, self.threads), **given}

    def protocol(self) -> dict[str, Any]:
        """The settings that belong in a benchmark record; serial numbers and paths do not."""
        names = ("threads", "provider", "provider_options")
        return {**{name: getattr(self, name) for name in names}, "thermal": asdict(self.thermal)}


def _provider_defaults(provider: Provider, threads: int) -> dict[str, str]:
    """Options that a provider needs; XNNPACK has its own thread pool."""
    if provider == "xnnpack":
        return {"intra_op_num_threads": str(threads)}
    return {"backend_path": "libQnnHtp.so"} if provider == "qnn" else {}
