"""Emulated phone: adbd in its own root directory, arm64 programs run by qemu, attached by a `Cable`."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from cable import Cable

from device.adb_output import EMULATION_MARKER

START = Path(__file__).parent / "root/start.sh"
TRANSCRIPTS = Path(__file__).parent.parent / "device/transcripts"
CLUSTERS_KHZ = (1704000,) * 4 + (2367000,) * 4 + (2914000,)


def wait_until(condition: Callable[[], object], seconds: float = 60.0) -> None:
    """Wait until the condition holds."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "what was waited for did not come"
        time.sleep(0.02)


class EmulatedPhone:
    """One phone. Its commands keep their state in `state` and print copies of transcripts."""

    def __init__(self, folder: Path, tree: Path, *, data_size: str = "128m"):
        self.state, self._data = folder / "state", folder / "data"
        self._root, self._tree = folder / "root", tree
        for path in (self.state, self._data, self._root):
            path.mkdir(parents=True)
        _mount("-t", "tmpfs", "-o", f"size={data_size},mode=771", "tmpfs", self._data)
        self.local_tmp.mkdir(parents=True, mode=0o771)
        self.show(getprop="getprop_pixel_android15", cpuinfo="cpuinfo_arm64_linux5")
        self.show(dumpsys_battery="battery_android7", dumpsys_power="power_asleep")
        self.show(dumpsys_thermalservice="thermal_pixel_android15")
        with (self.state / "getprop").open("a") as properties:
            properties.write(f"[{EMULATION_MARKER}]: [1]\n")
        self._write_processors()
        self.port = _free_port()
        """The port of adbd."""
        self._start()
        self.cable = Cable(self.port)

    @property
    def serial(self) -> str:
        return self.cable.serial

    @property
    def local_tmp(self) -> Path:
        """The phone's /data/local/tmp on this machine."""
        return self._data / "local/tmp"

    def show(self, **transcripts: str) -> None:
        """Let a command print a transcript."""
        for name, transcript in transcripts.items():
            shutil.copy(TRANSCRIPTS / f"{transcript}.txt", self.state / name)

    def settings(self) -> dict[str, str]:
        """All settings of the phone that a measurement may change."""
        paths = [self.state / "dumpsys_power", self.state / "fixed_performance"]
        paths += list(self.state.glob("settings/*/*"))
        return {path.name: path.read_text() for path in paths if path.exists()}

    def files(self) -> list[str]:
        """All files in /data/local/tmp."""
        return sorted(str(p.relative_to(self.local_tmp)) for p in self.local_tmp.rglob("*"))

    def processes(self, containing: str) -> list[int]:
        """Processes of the phone whose command line contains this text."""
        found = []
        root = Path(f"/proc/{self._adbd.pid}/root").stat()
        if os.path.samestat(root, Path("/").stat()):  # the phone has not changed its root yet
            return []
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                command = (folder / "cmdline").read_bytes().replace(b"\0", b" ")
                if os.path.samestat((folder / "root").stat(), root) and (
                    containing.encode() in command
                ):
                    found.append(int(folder.name))
        return found

    def power_off(self) -> None:
        """End all processes of the phone; /data is kept."""
        if self._adbd.poll() is not None:
            return
        for pid in self.processes(""):
            if pid != self._adbd.pid:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        self._adbd.kill()
        self._adbd.wait()

    def reboot(self) -> None:
        """Restart the phone. Files and settings stay; the clocks are no longer fixed."""
        self.power_off()
        (self.state / "fixed_performance").unlink(missing_ok=True)
        self._start()

    def make_read_only(self) -> None:
        """Make the phone's storage read-only."""
        _mount("-o", "remount,ro", self._data)

    def fill(self, spare_bytes: int) -> None:
        """Fill the phone's storage except for this many bytes."""
        free = shutil.disk_usage(self._data).free
        with (self._data / "photos").open("wb") as photos:
            os.posix_fallocate(photos.fileno(), 0, free - spare_bytes)

    def close(self) -> None:
        self.cable.close()
        self.power_off()
        subprocess.run(["umount", "--lazy", self._data], check=True)

    def _start(self) -> None:
        words = [self._root, self._tree, self.state, self._data, str(self.port)]
        with (self.state / "adbd.log").open("ab") as log:
            command = ["unshare", "--mount", "sh", START, *words]
            self._adbd = subprocess.Popen(command, stdout=log, stderr=log)
        wait_until(lambda: _answers(self.port), seconds=120)

    def _write_processors(self) -> None:
        cpu = self.state / "cpu"
        for index, khz in enumerate(CLUSTERS_KHZ):
            files = {
                "cpufreq/cpuinfo_max_freq": khz,
                "cpufreq/cpuinfo_min_freq": 300000,
                "cpufreq/scaling_cur_freq": 500000,
                "topology/physical_package_id": 0,
                "topology/core_id": index,
                "topology/core_siblings_list": f"0-{len(CLUSTERS_KHZ) - 1}",
            }
            for name, value in files.items():
                path = cpu / f"cpu{index}" / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(f"{value}\n")
        for name in ("online", "possible", "present"):
            (cpu / name).write_text(f"0-{len(CLUSTERS_KHZ) - 1}\n")
        (cpu / "kernel_max").write_text("31\n")


def _mount(*words: str | Path) -> None:
    subprocess.run(["mount", *words], check=True)


def _free_port() -> int:
    # below 5555, because adb lists odd ports up to 5585 as emulators too
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def _answers(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
        return True
    return False
