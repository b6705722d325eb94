"""Runs Python in new user, network, mount and process namespaces that can run arm64 programs.

    namespace.py FOLDER PYTHON-ARGUMENTS...

`FOLDER` is the folder that `packages.py` made. Inside the namespaces, the only network interface is the
loopback interface, and `binfmt_misc` starts aarch64 programs through qemu. Sockets, mounts and processes
are invisible from outside. When the first process ends, all processes end. adbd has no authentication
and gives a root shell, so it must run only inside these namespaces. adbd also listens on a VM socket,
which network namespaces do not isolate; a system call filter therefore forbids VM sockets to every
process inside. An observer process stays outside, so that a test can check what is visible there.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import json
import os
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

UNSHARE = ["unshare", "-Urnm", "--pid", "--fork", "--mount-proc", "--kill-child"]
BINFMT = Path("/proc/sys/fs/binfmt_misc")
# ELF, 64-bit, little-endian, executable or shared, e_machine 183
MAGIC = (
    r":\x7fELF\x02\x01\x01\x00\x00\x00\x00\x00\x00\x00\x00\x00\x02\x00\xb7\x00"
    r":\xff\xff\xff\xff\xff\xff\xff\x00\xff\xff\xff\xff\xff\xff\xff\xff\xfe\xff\xff\xff"
)
TREE = "NELF_PHONE_TREE"
"""Environment variable inside the namespaces: FOLDER."""
OBSERVER, OUTSIDE_PORT = "NELF_PHONE_OBSERVER", "NELF_PHONE_OUTSIDE_PORT"
"""Environment variables inside the namespaces: the descriptor of a socket to the observer, and a port
on which a process outside listens."""
SERVER_PORT = "ANDROID_ADB_SERVER_PORT"


def enter(folder: Path, arguments: list[str]) -> int:
    """Run `main` in new namespaces and observe from outside; return its exit code."""
    try:
        trial = subprocess.run([*UNSHARE, "true"], capture_output=True, text=True, check=False)
        reason = trial.stderr.strip() if trial.returncode else ""
    except OSError as error:
        reason = str(error)
    if reason:
        sys.exit(f"test-phone: this machine refuses user namespaces ({reason.splitlines()[-1]})")
    here, there = socket.socketpair()
    threading.Thread(target=observe, args=(here,), daemon=True).start()
    listener = socket.create_server(("127.0.0.1", 0))
    inside = {**os.environ, TREE: str(folder), OBSERVER: str(there.fileno())}
    inside[OUTSIDE_PORT] = str(listener.getsockname()[1])
    with socket.create_server(("127.0.0.1", 0)) as free:  # another adb server may use 5037
        inside[SERVER_PORT] = str(free.getsockname()[1])
    command = [*UNSHARE, sys.executable, __file__, *arguments]
    with subprocess.Popen(command, env=inside, pass_fds=[there.fileno()]) as child:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the child is interrupted too, and reports it
        signal.signal(signal.SIGTERM, lambda number, frame: child.kill())  # ends all inside
        return child.wait()


def observe(questions: socket.socket) -> None:
    """Answer, for each requested port, which addresses of this machine accept a connection."""
    while data := questions.recv(64):
        port = int(data)
        accepted = []
        for family, address in (
            (socket.AF_INET, "127.0.0.1"),
            (socket.AF_INET6, "::1"),
            (socket.AF_INET, _own_address()),
        ):
            with socket.socket(family) as probe:
                probe.settimeout(2)
                if probe.connect_ex((address, port)) == 0:
                    accepted.append(address)
        questions.sendall(json.dumps(accepted).encode())


def _own_address() -> str:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # sends nothing: the kernel picks the address
        except OSError:
            return "127.0.0.1"
        return probe.getsockname()[0]


def raise_loopback() -> None:
    """Bring up `lo`."""
    siocsifflags, iff_up = 0x8914, 0x1
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        fcntl.ioctl(any_socket, siocsifflags, struct.pack("16sh14x", b"lo", iff_up))


def register_qemu(qemu: Path) -> None:
    """Let the kernel start aarch64 programs with this qemu, in every root directory (flag F)."""
    try:
        subprocess.run(["mount", "-t", "binfmt_misc", "binfmt_misc", BINFMT], check=True)
        (BINFMT / "register").write_text(f":nelf-aarch64:M:{MAGIC}:{qemu}:F")
    except (OSError, subprocess.CalledProcessError) as reason:
        sys.exit(f"test-phone: binfmt_misc in a user namespace needs Linux 6.7 ({reason})")


def forbid_vm_sockets() -> None:
    """Forbid AF_VSOCK sockets to this process and its children (seccomp, x86-64)."""
    load, equal, at_least, answer = 0x20, 0x15, 0x35, 0x06
    allow, kill, refuse = 0x7FFF0000, 0x80000000, 0x00050000 | errno.EAFNOSUPPORT
    arch_x86_64, x32_bit, nr_socket = 0xC000003E, 0x40000000, 41
    # (code, if true skip, if false skip, operand) over {int nr; u32 arch; u64 ip; u64 args[6]}
    program = [
        (load, 0, 0, 4),
        (equal, 1, 0, arch_x86_64),
        (answer, 0, 0, kill),
        (load, 0, 0, 0),
        (at_least, 3, 0, x32_bit),
        (equal, 0, 3, nr_socket),
        (load, 0, 0, 16),
        (equal, 0, 1, int(socket.AF_VSOCK)),
        (answer, 0, 0, refuse),
        (answer, 0, 0, allow),
    ]
    code = b"".join(struct.pack("HBBI", *instruction) for instruction in program)
    buffer = ctypes.create_string_buffer(code, len(code))
    described = struct.pack("HxxxxxxP", len(program), ctypes.addressof(buffer))
    libc = ctypes.CDLL(None, use_errno=True)
    no_new_privileges, set_seccomp, mode_filter = 38, 22, 2
    if libc.prctl(no_new_privileges, 1, 0, 0, 0) or libc.prctl(set_seccomp, mode_filter, described):
        sys.exit(f"test-phone: no system call filter ({os.strerror(ctypes.get_errno())})")


def main(folder: Path, arguments: list[str]) -> int:
    """Set the namespaces up and run Python in them."""
    raise_loopback()
    register_qemu(folder / "adbd/usr/bin/qemu-aarch64")
    forbid_vm_sockets()
    for name in ("ADB_SERVER_SOCKET", "ANDROID_ADB_SERVER_HOST"):
        os.environ.pop(name, None)
    # adb stores its key and its log in the home folder
    with tempfile.TemporaryDirectory(prefix="nelf-phone-", ignore_cleanup_errors=True) as home:
        here = {"HOME": home, "TMPDIR": home, "XDG_CACHE_HOME": str(folder / "cache")}
        here["ZIG_GLOBAL_CACHE_DIR"] = str(folder / "zig")
        return run_as_init([sys.executable, *arguments], {**os.environ, **here})


def run_as_init(command: list[str], environment: dict[str, str]) -> int:
    """Run a command as process 1, and reap orphaned processes."""
    observer = int(os.environ[OBSERVER])
    with subprocess.Popen(command, env=environment, pass_fds=[observer]) as child:
        while child.returncode is None:
            try:
                pid, status = os.wait()
            except KeyboardInterrupt:
                continue
            if pid == child.pid:
                child.returncode = os.waitstatus_to_exitcode(status)
        return child.returncode


if __name__ == "__main__":
    if TREE in os.environ:
        sys.exit(main(Path(os.environ[TREE]), sys.argv[1:]))
    sys.exit(enter(Path(sys.argv[1]).resolve(), sys.argv[2:]))
