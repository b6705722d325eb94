import socket
import threading
import time

import pytest

from device.adb_server import connect, probe_adb, server_address, usb_debugging_devices
from lightfield.errors import AdbError


@pytest.fixture
def listener(monkeypatch):
    """A server at the adb server's address that gives the test's answers."""
    server = socket.create_server(("127.0.0.1", 0))
    monkeypatch.setenv("ANDROID_ADB_SERVER_HOST", "127.0.0.1")
    monkeypatch.setenv("ANDROID_ADB_SERVER_PORT", str(server.getsockname()[1]))
    yield server
    server.close()


def answer(server: socket.socket, payload: bytes) -> None:
    """Answer every request with `payload`, in the background."""

    def serve() -> None:
        while True:
            try:
                connection, _ = server.accept()
            except OSError:
                return
            with connection:
                connection.settimeout(2)
                try:
                    if connection.recv(1024):
                        connection.sendall(payload)
                except OSError:
                    continue

    threading.Thread(target=serve, daemon=True).start()


def nobody_listens(monkeypatch) -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    monkeypatch.setenv("ANDROID_ADB_SERVER_PORT", str(port))
    return port


def test_a_probe_starts_no_server_and_is_fast(monkeypatch):
    port = nobody_listens(monkeypatch)
    start = time.monotonic()
    probe = probe_adb()
    assert time.monotonic() - start < 5  # 0.1 s on an idle machine
    assert not probe.server_running
    assert probe.phones == ()
    assert probe.problem
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port), timeout=1)


def test_a_probe_lists_what_a_running_server_lists(listener):
    lines = b"SERIAL01               device usb:1-1 product:shiba model:Pixel_8 transport_id:1\n"
    lines += b"X                      unauthorized usb:1-2 transport_id:2\n"
    answer(listener, b"OKAY%04x%s" % (len(lines), lines))
    probe = probe_adb()
    assert probe.server_running
    assert [(p.serial, p.state, p.model) for p in probe.phones] == [
        ("SERIAL01", "device", "Pixel_8"),
        ("X", "unauthorized", ""),
    ]
    assert probe.problem is None


def test_serials_and_states_may_contain_blanks(listener):
    udev = (
        "no permissions (user in plugdev group; are your udev rules wrong?); see [http://x/y.html]"
    )
    lines = "".join(
        f"{serial:22} {state} {tags}\n"
        for serial, state, tags in (
            ("HT4A1", udev, "usb:1-4 transport_id:1"),
            (
                "adb-HT4A1-x (2)._adb-tls-connect._tcp",
                "device",
                "product:p model:M_1 transport_id:2",
            ),
            ("(no serial number)", "offline", "usb:1-5 transport_id:3"),
            ("HT4A2", "rescue", "usb:2-1 transport_id:4"),
            ("10.0.0.7:5555", "connecting", "transport_id:5"),
        )
    ).encode()
    answer(listener, b"OKAY%04x%s" % (len(lines), lines))
    assert [(p.serial, p.state, p.tags["transport_id"]) for p in probe_adb().phones] == [
        ("HT4A1", "no permissions", "1"),
        ("adb-HT4A1-x (2)._adb-tls-connect._tcp", "device", "2"),
        ("(no serial number)", "offline", "3"),
        ("HT4A2", "rescue", "4"),
        ("10.0.0.7:5555", "connecting", "5"),
    ]


def test_a_probe_names_the_state_of_an_unusable_phone(listener):
    lines = b"X                      unauthorized usb:1-2 transport_id:2\n"
    answer(listener, b"OKAY%04x%s" % (len(lines), lines))
    assert probe_adb().problem == "no phone is usable: X is unauthorized"


def test_a_probe_survives_another_program_on_the_port(listener):
    answer(listener, b"HTTP/1.1 400 Bad Request\r\n\r\n")
    probe = probe_adb()
    assert not probe.server_running
    assert "adb failed" in (probe.problem or "")


def test_a_probe_survives_an_invalid_port(monkeypatch):
    monkeypatch.setenv("ANDROID_ADB_SERVER_PORT", "usb")
    assert "'usb' is not a port number" in (probe_adb().problem or "")


@pytest.mark.parametrize(
    ("socket_name", "address"),
    [("tcp:phones.example:5039", ("phones.example", 5039)), ("tcp:5038", ("127.0.0.1", 5038))],
)
def test_the_server_address_is_adbs_own(monkeypatch, socket_name, address):
    monkeypatch.setenv("ANDROID_ADB_SERVER_PORT", "1")
    monkeypatch.setenv("ADB_SERVER_SOCKET", socket_name)
    assert server_address() == address


def test_an_invalid_server_address_is_an_error(monkeypatch):
    monkeypatch.setenv("ADB_SERVER_SOCKET", "localfilesystem:x; touch pwned")
    with pytest.raises(AdbError, match="is not tcp:HOST:PORT"):
        connect()


def test_no_local_server_replaces_a_remote_one(monkeypatch):
    port = nobody_listens(monkeypatch)
    monkeypatch.setenv("ANDROID_ADB_SERVER_HOST", "127.0.0.2")
    monkeypatch.setattr("device.adb_server._start_server", lambda: pytest.fail("started"))
    with pytest.raises(
        AdbError, match=rf"127\.0\.0\.2:{port}: no adb server answers; start the server"
    ):
        connect()


def test_connecting_without_starting_needs_a_server(monkeypatch):
    nobody_listens(monkeypatch)
    with pytest.raises(AdbError, match="no adb server is running"):
        connect(start=False)


def test_an_adb_that_cannot_start_is_an_error(monkeypatch, tmp_path):
    nobody_listens(monkeypatch)
    adb = tmp_path / "adb"
    adb.write_text("#!/bin/sh\necho 'could not install *smartsocket* listener' >&2\nexit 1\n")
    adb.chmod(0o755)
    monkeypatch.setenv("ADBUTILS_ADB_PATH", str(adb))
    with pytest.raises(AdbError, match=r"does not start \(could not install"):
        connect()


def test_usb_devices_that_offer_debugging_are_counted(tmp_path):
    for name, codes in {"1-1:1.0": "060101", "1-1:1.1": "ff4201", "2-1:1.0": "ff4203"}.items():
        (tmp_path / name).mkdir()
        for file, i in (("Class", 0), ("SubClass", 2), ("Protocol", 4)):
            (tmp_path / name / f"bInterface{file}").write_text(codes[i : i + 2] + "\n")
    assert usb_debugging_devices(tmp_path) == 1
    assert usb_debugging_devices(tmp_path / "a" / "b" / "c") is None
