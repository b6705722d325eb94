"""Preparation of the emulated phone; these tests need no phone."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from packages import CannotPrepare, prepare, private_apt, replaced_suite

NAMESPACE = Path(__file__).parent / "namespace.py"

DEB822 = """\
Types: deb
# a comment
URIs: http://mirror.example/debian
Suites: bookworm bookworm-updates
Components: main
Signed-By: /usr/share/keyrings/example.gpg

Types: deb
URIs: http://mirror.example/security
Suites: bookworm-security
Components: main

Types: deb
URIs: http://elsewhere.example
Suites: stable
Components: main

Enabled: no
Types: deb
URIs: http://switched-off.example
Suites: bookworm
"""


def test_the_suite_is_replaced_in_deb822_source_lists():
    text = replaced_suite(DEB822, "bookworm")
    suites = [line for line in text.splitlines() if line.startswith("Suites")]
    assert suites == ["Suites: trixie trixie-updates", "Suites: trixie-security"]
    assert "Signed-By: /usr/share/keyrings/example.gpg" in text
    assert "elsewhere" not in text
    assert "switched-off" not in text


def test_the_suite_is_replaced_in_one_line_source_lists():
    text = (
        "# deb http://mirror.example/debian bookworm main\n"
        "deb [arch=amd64 signed-by=/x.gpg] http://mirror.example/debian bookworm main contrib\n"
        "deb http://mirror.example/security bookworm-security main\n"
        "deb-src http://mirror.example/debian bookworm main\n"
        "deb http://vendor.example stable main\n"
    )
    assert replaced_suite(text, "bookworm") == (
        "deb [arch=amd64 signed-by=/x.gpg] http://mirror.example/debian trixie main contrib\n"
        "deb http://mirror.example/security trixie-security main\n"
    )


def test_a_machine_with_the_right_suite_keeps_its_lists():
    assert replaced_suite("deb http://m trixie main\n", "trixie") == "deb http://m trixie main\n"
    assert replaced_suite("", "bookworm") == ""


def test_apt_does_not_change_the_machine(tmp_path, monkeypatch):
    etc = tmp_path / "host"
    (etc / "sources.list.d").mkdir(parents=True)
    (etc / "apt.conf.d").mkdir()
    (etc / "sources.list").write_text("deb http://mirror.example/debian bookworm main\n")
    (etc / "apt.conf.d/proxy").write_text('Acquire::http::Proxy "http://proxy.example";\n')
    (etc / "apt.conf.d/docker-clean").write_text('APT::Update::Post-Invoke { "rm -f /x"; };\n')
    release = {"VERSION_CODENAME": "bookworm"}
    monkeypatch.setattr("packages.APT", etc)
    monkeypatch.setattr("packages.platform.freedesktop_os_release", lambda: release)
    private = tmp_path / "private"
    command = private_apt(private)
    assert command[0] == "env"
    assert (private / "etc/sources/sources.list").read_text() == (
        "deb http://mirror.example/debian trixie main\n"
    )
    conf = (private / "etc/apt.conf").read_text()
    for key in ("Dir::State", "Dir::Cache", "Dir::Log", "Dir::Etc::parts", "Dir::Cache::archives"):
        (line,) = [line for line in conf.splitlines() if line.startswith(f"{key} ")]
        assert str(private) in line
    assert (private / "etc/conf/proxy").exists()
    assert "#clear APT::Update::Post-Invoke;" in (private / "etc/conf/zz-private").read_text()


@pytest.mark.parametrize(
    ("system", "message"),
    [(("Darwin", "arm64"), "needs Linux on x86-64"), (("Linux", "x86_64"), "no `apt-get`")],
)
def test_unsupported_machines_get_a_reason(tmp_path, monkeypatch, system, message):
    monkeypatch.setattr("packages.platform.system", lambda: system[0])
    monkeypatch.setattr("packages.platform.machine", lambda: system[1])
    monkeypatch.setattr("packages.shutil.which", lambda name: None)
    with pytest.raises(CannotPrepare, match=message):
        prepare(tmp_path / "phone")
    assert not (tmp_path / "phone").exists()


def test_a_system_without_debian_packages_gets_a_reason(tmp_path, monkeypatch):
    (tmp_path / "sources.list").write_text("deb http://archive.example/ubuntu noble main\n")
    monkeypatch.setattr("packages.APT", tmp_path)
    monkeypatch.setattr(
        "packages.platform.freedesktop_os_release", lambda: {"VERSION_CODENAME": "jammy"}
    )
    with pytest.raises(CannotPrepare, match=r"no source of Debian's packages .* 'jammy'"):
        private_apt(tmp_path / "private")


@pytest.mark.parametrize("has_unshare", [True, False])
def test_a_machine_without_namespaces_fails_with_one_line(tmp_path, has_unshare):
    if has_unshare:
        unshare = tmp_path / "unshare"
        unshare.write_text("#!/bin/sh\necho 'unshare: unshare failed: Not permitted' >&2; exit 1\n")
        unshare.chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}:/bin:/usr/bin" if has_unshare else ""}
    environment.pop("NELF_PHONE_TREE", None)
    command = [sys.executable, str(NAMESPACE), str(tmp_path), "-c", "print('ran')"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith("test-phone: this machine refuses user namespaces (")
