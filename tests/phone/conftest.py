"""The emulated phone of `make test-phone`: a real adbd and a real adb server, arm64 code run by qemu.

Everything runs in namespaces that `namespace.py` creates (the reason is stated there), from packages
that `packages.py` downloads. `phone` is a phone at the adb server; `phone.cable` can be pulled. Its
latencies are meaningless, and every record says so.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from adbutils import AdbClient
from attached import IMPATIENT, attached_phone, scripted_package
from emulated_phone import EmulatedPhone

from device.adb import AdbPhone, open_phone
from device.adb_server import connect
from device.phone import PhoneTarget
from device.runner.package import PhoneRuntime, RunnerPackage, runner_package

INSIDE = "NELF_PHONE_TREE"


def pytest_configure(config: pytest.Config) -> None:
    for folder in ("device", "pipeline"):  # small_graphs.py and miniature.py
        sys.path.insert(0, str(Path(__file__).resolve().parent.parent / folder))
    if INSIDE in os.environ:
        # adbutils leaves the sockets of a lost phone to the garbage collector
        config.addinivalue_line("filterwarnings", "ignore:unclosed <socket:ResourceWarning")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("phone") and INSIDE not in os.environ:
            item.add_marker(pytest.mark.skip(reason="needs the phone of `make test-phone`"))


@pytest.fixture(scope="session")
def tree() -> Path:
    """The folder of the emulated phone's packages."""
    return Path(os.environ[INSIDE])


@pytest.fixture(scope="session")
def server() -> AdbClient:
    """The real adb server."""
    client = connect()
    assert isinstance(client, AdbClient)
    return client


@pytest.fixture
def new_phone(
    tree: Path, tmp_path_factory: pytest.TempPathFactory, server: AdbClient
) -> Iterator[Callable[[], EmulatedPhone]]:
    """A function that creates phones attached to the adb server."""
    with contextlib.ExitStack() as stack:

        def new() -> EmulatedPhone:
            folder = tmp_path_factory.mktemp("phone")
            return stack.enter_context(attached_phone(folder, tree, server))

        yield new


@pytest.fixture
def phone(new_phone: Callable[[], EmulatedPhone]) -> EmulatedPhone:
    """A phone attached to the adb server."""
    return new_phone()


@pytest.fixture
def opened(phone: EmulatedPhone, server: AdbClient) -> AdbPhone:
    """The same phone, opened over adb."""
    return open_phone(server, phone.serial)


@pytest.fixture(scope="session")
def package(tree: Path) -> RunnerPackage:
    """The runner and ONNX Runtime for arm64, with the C library that is pushed with them."""
    return runner_package(PhoneRuntime(glibc=tree / "arm64/usr/lib/aarch64-linux-gnu"))


@pytest.fixture
def target(opened: AdbPhone, package: RunnerPackage) -> Iterator[PhoneTarget]:
    """The phone, ready to measure."""
    with PhoneTarget(opened, package, IMPATIENT, timeout_seconds=60) as target:
        yield target


@pytest.fixture
def scripted(opened: AdbPhone, tmp_path: Path) -> Callable[..., PhoneTarget]:
    """A target whose runner is a shell script of the test; the phone's shell runs it."""

    def target(script: str, **options: int) -> PhoneTarget:
        runner = scripted_package(tmp_path, script)
        return PhoneTarget(opened, runner, IMPATIENT, **options)

    return target
