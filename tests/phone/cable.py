"""Simulated cable between the adb server and an emulated phone: it can be pulled and change data.

A relay of TCP connections that parses adb's messages: a header of 24 bytes (command, two arguments,
length, checksum, the command's complement; little-endian words), then the payload. Since protocol
version 0x01000001, the checksum is ignored, as over USB.
"""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
from collections.abc import Callable

HEADER = struct.Struct("<4s5I")
_AUTH_TOKEN, _TOKEN_BYTES = 1, 20


class Cable:
    """Relays connections from `port` on the loopback interface to the phone's `phone_port`.

    `to_phone` and `to_host` get every payload of stream data (WRTE messages) and may return another
    payload of the same length.
    """

    def __init__(self, phone_port: int):
        self.phone_port = phone_port
        self.to_phone: Callable[[bytes], bytes] = bytes
        self.to_host: Callable[[bytes], bytes] = bytes
        self.unauthorized = False
        """If True, the phone asks for a signature and accepts none."""
        self._plugged = threading.Event()
        self._plugged.set()
        self._ends: list[socket.socket] = []
        self._server = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._server.getsockname()[1]
        self._in_background(self._accept)

    @property
    def serial(self) -> str:
        """The phone's serial number at the adb server."""
        return f"127.0.0.1:{self.port}"

    def pull(self) -> None:
        """Close all connections, and refuse new ones until `plug` is called."""
        self._plugged.clear()
        ends, self._ends = self._ends, []
        for end in ends:
            _end(end)

    def plug(self) -> None:
        """Accept connections again."""
        self._plugged.set()

    def pull_after(self, size_bytes: int, *, to_phone: bool) -> None:
        """Pull the cable after this many bytes in one direction."""
        left = size_bytes

        def count(payload: bytes) -> bytes:
            nonlocal left
            left -= len(payload)
            if left <= 0 < left + len(payload):
                self.pull()
            return payload

        if to_phone:
            self.to_phone = count
        else:
            self.to_host = count

    def close(self) -> None:
        """Remove the cable."""
        self.pull()
        _end(self._server)

    def _in_background(self, work: Callable[..., None], *arguments: object) -> None:
        threading.Thread(target=work, args=arguments, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                host, _ = self._server.accept()
            except OSError:
                return
            if not self._plugged.is_set():
                _end(host)
            elif self.unauthorized:
                self._ends.append(host)
                self._in_background(_refuse, host)
            else:
                self._connect(host)

    def _connect(self, host: socket.socket) -> None:
        try:
            phone = socket.create_connection(("127.0.0.1", self.phone_port), timeout=5)
        except OSError:
            _end(host)
            return
        phone.settimeout(None)
        self._ends += [host, phone]
        self._in_background(self._relay, host, phone, lambda data: self.to_phone(data))
        self._in_background(self._relay, phone, host, lambda data: self.to_host(data))

    def _relay(
        self, source: socket.socket, target: socket.socket, seen: Callable[[bytes], bytes]
    ) -> None:
        try:
            while True:
                header, payload = _message(source)
                if header.startswith(b"WRTE"):
                    payload = seen(payload)
                target.sendall(header + payload)
        except OSError:
            _end(source)
            _end(target)


def _message(source: socket.socket) -> tuple[bytes, bytes]:
    header = _exactly(source, HEADER.size)
    return header, _exactly(source, HEADER.unpack(header)[3])


def _exactly(source: socket.socket, size: int) -> bytes:
    parts = bytearray()
    while len(parts) < size:
        part = source.recv(min(size - len(parts), 1 << 20))
        if not part:
            raise ConnectionResetError
        parts += part
    return bytes(parts)


def _refuse(host: socket.socket) -> None:
    """Answer the server like a phone whose owner has not accepted the prompt."""
    payload = bytes(range(_TOKEN_BYTES))
    complement = int.from_bytes(b"AUTH", "little") ^ 0xFFFFFFFF
    header = HEADER.pack(b"AUTH", _AUTH_TOKEN, 0, len(payload), sum(payload), complement)
    try:
        while True:
            _message(host)
            host.sendall(header + payload)
    except OSError:
        _end(host)


def _end(end: socket.socket) -> None:
    with contextlib.suppress(OSError):
        end.shutdown(socket.SHUT_RDWR)
    end.close()
