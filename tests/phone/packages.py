"""Downloads the parts of the emulated phone, without installing them; `make test-phone` runs this.

    packages.py FOLDER

`FOLDER/adbd` gets AOSP's adb daemon with its C library, and qemu for arm64. `FOLDER/arm64` gets a
phone's shell (mksh), its tools (toybox) and the C library that is pushed with the runner.
`FOLDER/cache/nelf` gets the runner and ONNX Runtime for arm64. The first two are packages of Debian 13,
from the sources that this machine uses: apt runs with a copy of the configuration in which the suite is
replaced, and with its own state, cache and hooks, so this machine's lists, archives and packages do not
change.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

SUITE = "trixie"
PACKAGES = ("adbd", "qemu-user", "toybox:arm64", "mksh:arm64", "libstdc++6:arm64")
QEMU = "./usr/bin/qemu-aarch64"
APT = Path("/etc/apt")


class CannotPrepare(Exception):
    """Reason, in one line, why this machine cannot emulate a phone."""


def replaced_suite(text: str, codename: str, suite: str = SUITE) -> str:
    """Replace every suite of `codename` (`bookworm`, `bookworm-security`) in a source list by `suite`.

    Both of apt's formats are supported; entries of other suites, and disabled entries, are left out.
    """
    if re.search(r"^Suites:", text, re.MULTILINE):
        kept = []
        for stanza in re.split(r"\n\s*\n", text):
            named = re.search(r"^Suites:(.*)$", stanza, re.MULTILINE)
            if not named or re.search(r"^Enabled:\s*no", stanza, re.MULTILINE | re.IGNORECASE):
                continue
            if suites := _suites(named[1].split(), codename, suite):
                kept.append(stanza.replace(named[0], f"Suites: {' '.join(suites)}").strip())
        return "\n\n".join(kept) + "\n" if kept else ""
    lines = []
    for line in text.splitlines():
        entry = re.match(r"(deb\s+(?:\[[^]]*\]\s+)?\S+\s+)(\S+)(\s.*)$", line.strip())
        if entry and (suites := _suites([entry[2]], codename, suite)):
            lines.append(f"{entry[1]}{suites[0]}{entry[3]}\n")
    return "".join(lines)


def _suites(names: list[str], codename: str, suite: str) -> list[str]:
    return [
        suite + name[len(codename) :] for name in names if re.fullmatch(rf"{codename}(-\w+)*", name)
    ]


def private_apt(folder: Path) -> list[str]:
    """The apt-get command with state, cache, sources and hooks in `folder`, else configured as usual."""
    codename = platform.freedesktop_os_release().get("VERSION_CODENAME", "")
    etc, state = folder / "etc", folder / "state"
    for path in (
        etc / "sources",
        etc / "conf",
        state / "lists/partial",
        folder / "archives/partial",
    ):
        path.mkdir(parents=True)
    sources = [APT / "sources.list", *sorted((APT / "sources.list.d").glob("*"))]
    for source in sources:
        if source.suffix in (".list", ".sources") and source.is_file():
            text = replaced_suite(source.read_text(), codename) if codename else ""
            if text:
                (etc / "sources" / source.name).write_text(text)
    if not any((etc / "sources").iterdir()):
        raise CannotPrepare(
            f"no source of Debian's packages in {APT} whose suite could be {SUITE} "
            f"(this system is '{codename or 'unknown'}')"
        )
    for conf in (APT / "apt.conf.d").glob("*"):
        if conf.is_file():
            shutil.copy(conf, etc / "conf")
    # images for containers let apt empty the system's caches after every call
    hooks = ("APT::Update", "DPkg")
    cleared = [f"#clear {hook}::{when}-Invoke{end};" for hook in hooks
               for when in ("Pre", "Post") for end in ("", "-Success")]  # fmt: skip
    (etc / "conf/zz-private").write_text("\n".join([*cleared, "#clear DPkg::Pre-Install-Pkgs;"]))
    (state / "status").touch()
    settings = {
        "Dir::Etc::sourcelist": "/dev/null",
        "Dir::Etc::sourceparts": etc / "sources",
        "Dir::Etc::parts": etc / "conf",
        "Dir::State": state,
        "Dir::State::status": state / "status",
        "Dir::Cache": folder,
        "Dir::Cache::archives": folder / "archives",
        "Dir::Log": folder,
        "APT::Architecture": "amd64",
        "APT::Sandbox::User": "",
        "Acquire::Languages": "none",
    }
    lines = [f'{key} "{value}";' for key, value in settings.items()]
    lines.append('APT::Architectures { "amd64"; "arm64"; };')
    # this file is read first, so that it can set the paths of the other files
    (etc / "apt.conf").write_text("\n".join(lines) + "\n")
    return ["env", f"APT_CONFIG={etc / 'apt.conf'}", "apt-get", "--quiet=2"]


def fetch_packages(scratch: Path) -> list[Path]:
    """Download the packages and their dependencies."""
    apt = private_apt(scratch)
    _call([*apt, "update"])
    _call([*apt, "install", "--yes", "--download-only", "--no-install-recommends", *PACKAGES])
    return sorted((scratch / "archives").glob("*.deb"))


def unpack(package: Path, folder: Path) -> None:
    """Unpack one package below `folder/adbd` or `folder/arm64`, by its architecture."""
    target = folder / ("arm64" if package.stem.endswith("_arm64") else "adbd")
    target.mkdir(parents=True, exist_ok=True)
    if not package.name.startswith("qemu-user_"):
        _call(["dpkg-deb", "-x", str(package), str(target)])
        return
    # this package contains forty emulators; only one is needed
    with subprocess.Popen(["dpkg-deb", "--fsys-tarfile", package], stdout=subprocess.PIPE) as tar:
        subprocess.run(["tar", "-x", "-C", target, QEMU], stdin=tar.stdout, check=True)


def build_runner(folder: Path) -> None:
    """Compile the runner and download ONNX Runtime for arm64 into the phone's cache folder."""
    os.environ["XDG_CACHE_HOME"] = str(folder / "cache")
    os.environ["ZIG_GLOBAL_CACHE_DIR"] = str(folder / "zig")
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    from device.runner.package import PhoneRuntime, runner_package
    from lightfield.errors import DeviceError

    try:
        runner_package(PhoneRuntime(glibc=folder / "arm64/usr/lib/aarch64-linux-gnu"))
    except DeviceError as error:
        raise CannotPrepare(str(error)) from error


def _call(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    if done.returncode != 0:
        said = [line for line in done.stderr.splitlines() if line.strip()] or ["no message"]
        raise CannotPrepare(f"`{' '.join(command[:4])} ...` failed: {said[-1].strip()}")


def prepare(folder: Path) -> None:
    """Download, unpack and build into `folder`; existing parts are kept."""
    if (platform.system(), platform.machine()) != ("Linux", "x86_64"):
        raise CannotPrepare("the emulated phone needs Linux on x86-64")
    for tool in ("apt-get", "dpkg-deb", "tar"):
        if shutil.which(tool) is None:
            raise CannotPrepare(f"no `{tool}`: the emulated phone is made of Debian's packages")
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "adbd").exists():
        with tempfile.TemporaryDirectory(dir=folder) as name:
            scratch = Path(name)
            for package in fetch_packages(scratch / "apt"):
                unpack(package, scratch)
            (scratch / "arm64").rename(folder / "arm64")
            (scratch / "adbd").rename(
                folder / "adbd"
            )  # last, because it marks that all parts exist
    build_runner(folder)


if __name__ == "__main__":
    try:
        prepare(Path(sys.argv[1]).resolve())
    except CannotPrepare as reason:
        sys.exit(f"test-phone: {reason}")
