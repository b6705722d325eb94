"""Fake phone: implements the part of adbutils that `device.adb` uses, in a folder of this machine.

Commands run in a real shell, so wrong quoting has an effect here too. The command line is rewritten so
that the phone's folder and system files are in `root`. `getprop`, `dumpsys`, `settings` and others are
small scripts at the start of the PATH that read and write files in `root/state`.
"""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import adbutils

TRANSCRIPTS = Path(__file__).parent / "transcripts"

# $STATE is the folder of the phone's state; every script also records that it was called.
SCRIPTS = {
    "getprop": 'cat "$STATE/getprop"',
    "dumpsys": 'cat "$STATE/dumpsys_$1"',
    "settings": """
file="$STATE/setting_$2_$3"
case "$1" in
  get) if [ -e "$file" ]; then cat "$file"; else echo null; fi ;;
  put) [ -e "$STATE/settings_are_ignored" ] || echo "$4" > "$file" ;;
  delete) rm -f "$file" ;;
esac""",
    "cmd": """
[ -e "$STATE/no_fixed_performance" ] && { echo 'Failed to set FIXED_PERFORMANCE mode' >&2; exit 255; }
echo "$3" > "$STATE/fixed_performance" """,
    "input": """
case "$2" in
  KEYCODE_WAKEUP) sed -i s/=Dozing/=Awake/ "$STATE/dumpsys_power" ;;
  KEYCODE_SLEEP) sed -i s/=Awake/=Dozing/ "$STATE/dumpsys_power" ;;
esac""",
    "taskset": '[ -e "$STATE/no_taskset" ] && exit 1; shift; exec "$@"',
}

# Both check their arguments, and run the test's script first.
RUNNER_START = """#!/bin/sh
[ "$1" = --library ] && [ -e "$2" ] || exit 9
[ -e "$STATE/runner_script" ] && . "$STATE/runner_script"
shift 2
"""
RUNNER = RUNNER_START + f'exec {sys.executable} -P -m device.host_runner "$@"\n'
CANNED_RUNNER = (
    RUNNER_START
    + """
while [ $# -gt 1 ]; do
  case "$1" in --runs) runs=$2 ;; --model) models="$models x" ;; esac
  shift 2
done
while [ "$runs" -gt 0 ]; do times="$times${times:+, }2500"; runs=$((runs - 1)); done
for model in $models; do
  entry="{\\"load_us\\": 9, \\"at_us\\": [$times], \\"wall_us\\": [$times], \\"cpu_us\\": [$times]"
  entry="$entry, \\"outputs\\": []}"
  entries="$entries${entries:+, }$entry"
done
answer="\\"runtime\\": \\"1.30.0\\", \\"growth_kb\\": 640, \\"providers\\": [], \\"watched\\": []"
echo "{$answer, \\"models\\": [$entries]}"
"""
)


class FakeStream:
    """A connection to one service of the phone."""

    def __init__(self, device: FakeDevice):
        self._device = device
        self._process: subprocess.Popen[bytes] | None = None

    def send_command(self, command: str) -> None:
        service, _, words = command.partition(":")
        assert service == "exec"
        self._process = self._device.start(words)

    def check_okay(self) -> None:
        assert self._process

    def recv(self, size: int) -> bytes:
        assert self._process
        assert self._process.stdout
        return self._process.stdout.read(size)

    def close(self) -> None:
        """End the command's input; unlike the real connection, wait until the command ends."""
        if self._process:
            self._process.communicate()


@dataclass
class FakeDevice:
    """One phone; also implements adbutils' `sync`."""

    root: Path
    serial: str = "SERIAL01"
    lost_after: int | None = None
    """Number of commands after which the cable is pulled."""
    hangs_at: str | None = None
    """A command that contains this text never answers."""
    truncate_pushes: bool = False
    tags: dict[str, str] = field(default_factory=dict)
    """Tags in the adb server's list, in addition to the model and the number of the connection."""
    commands: list[str] = field(default_factory=list)
    pushed: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.state.mkdir(parents=True)
        (self.root / "bin").mkdir()
        for name, body in SCRIPTS.items():
            script = self.root / "bin" / name
            script.write_text(f'#!/bin/sh\necho "{name} $*" >> "$STATE/calls"\n{body}\n')
            script.chmod(0o755)
        self.show(getprop="getprop_pixel_android15", dumpsys_battery="battery_android7")
        self.show(dumpsys_thermalservice="thermal_pixel_android15", dumpsys_power="power_asleep")
        cpu = self.root / "sys/devices/system/cpu"
        for index, khz in enumerate([1704000, 1704000, 2367000, 2914000]):
            folder = cpu / f"cpu{index}" / "cpufreq"
            folder.mkdir(parents=True)
            (folder / "cpuinfo_max_freq").write_text(f"{khz}\n")
            (folder / "scaling_cur_freq").write_text("500000\n")
        (cpu / "possible").write_text("0-3\n")
        (self.root / "data/local/tmp").mkdir(parents=True)
        (self.root / "proc").mkdir()
        shutil.copy(TRANSCRIPTS / "cpuinfo_arm64_linux5.txt", self.root / "proc/cpuinfo")

    @property
    def state(self) -> Path:
        return self.root / "state"

    @property
    def sync(self) -> FakeDevice:
        return self

    def show(self, **transcripts: str) -> None:
        """Let a command print a transcript."""
        for name, transcript in transcripts.items():
            shutil.copy(TRANSCRIPTS / f"{transcript}.txt", self.state / name)

    def set_properties(self, **properties: str) -> None:
        """Let `getprop` print these properties; `__` in a name stands for a dot."""
        lines = [f"[{name.replace('__', '.')}]: [{value}]" for name, value in properties.items()]
        with (self.state / "getprop").open(
            "a"
        ) as file:  # the last value of a repeated property counts
            file.write("\n".join(lines) + "\n")

    def files(self) -> list[str]:
        """All files in /data/local/tmp."""
        folder = self.root / "data/local/tmp"
        return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))

    def open_transport(self) -> FakeStream:
        return FakeStream(self)

    def start(self, command: str) -> subprocess.Popen[bytes]:
        """Run a command in the background that reads from its caller."""
        self.commands.append(command)
        self._fail_if_lost()
        words, pipe = ["sh", "-c", self._moved(command)], subprocess.PIPE
        return subprocess.Popen(words, stdin=pipe, stdout=pipe, **self._surroundings())

    def _surroundings(self) -> dict[str, Any]:
        path = f"{self.root}/bin:{os.environ['PATH']}"
        return {"cwd": self.root, "env": {**os.environ, "STATE": str(self.state), "PATH": path}}

    def shell2(self, command: str, timeout: float, v2: bool) -> SimpleNamespace:
        assert v2
        self.commands.append(command)
        self._fail_if_lost()
        if self.hangs_at is not None and self.hangs_at in command:
            raise adbutils.AdbTimeout("adb read timeout")
        done = subprocess.run(
            ["sh", "-c", self._moved(command)],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
            **self._surroundings(),
        )
        code = done.returncode if done.returncode >= 0 else 128 - done.returncode
        stdout = done.stdout.replace(str(self.root), "")
        output = stdout + done.stderr
        return SimpleNamespace(returncode=code, stdout=stdout, stderr=done.stderr, output=output)

    def _moved(self, command: str) -> str:
        for prefix in (
            "/data/local/tmp",
            "/sys/devices/system/cpu",
            "/proc/cpuinfo",
            "/proc/mounts",
        ):
            command = command.replace(prefix, f"{self.root}{prefix}")
        return command

    def _fail_if_lost(self) -> None:
        if self.lost_after is not None and len(self.commands) > self.lost_after:
            raise adbutils.AdbError(f"device '{self.serial}' not found")

    def stat(self, path: str) -> SimpleNamespace:
        local = Path(self._moved(path))
        return SimpleNamespace(mode=local.stat().st_mode if local.exists() else 0)

    def push(self, source: Path, target: str, mode: int) -> None:
        self._fail_if_lost()
        self.pushed.append(target)
        local = Path(self._moved(target))
        data = Path(source).read_bytes()
        local.write_bytes(data[: len(data) // 2] if self.truncate_pushes else data)
        local.chmod(stat.S_IMODE(mode))

    def pull(self, source: str, target: str) -> None:
        self._fail_if_lost()
        shutil.copy(self._moved(source), target)


@dataclass
class FakeClient:
    """An adb server's list of devices; `states` are the states of additional, unusable devices."""

    devices: list[FakeDevice] = field(default_factory=list)
    states: dict[str, str] = field(default_factory=dict)
    down: bool = False

    def list(self, extended: bool = False) -> list[adbutils.AdbDeviceInfo]:
        if self.down:
            raise adbutils.AdbError("connection closed")
        ready = [
            adbutils.AdbDeviceInfo(
                device.serial,
                "device",
                {"model": "Pixel_8", **device.tags, "transport_id": str(number)},
            )
            for number, device in enumerate(self.devices, 1)
        ]
        others = [adbutils.AdbDeviceInfo(serial, state) for serial, state in self.states.items()]
        return ready + others

    def device(self, serial: str | None = None, transport_id: int | None = None) -> FakeDevice:
        if transport_id is not None:
            return self.devices[transport_id - 1]
        (device,) = (device for device in self.devices if device.serial == serial)
        return device
