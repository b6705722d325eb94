"""Faults between this machine and a phone, with a real adb and a real adbd.

Every fault raises one clear error, nothing hangs, the phone's settings are restored as soon as the phone
can be reached, and the next measurement works.
"""

import contextlib
import os
import signal
import struct
import subprocess
import sys
import threading
from pathlib import Path

import adbutils
import numpy as np
import onnx
import pytest
from attached import IMPATIENT, attach, attached_phone, scripted_package, state_of
from emulated_phone import wait_until
from onnx import TensorProto, helper
from small_graphs import write_graph

from device.adb import PHONE_FOLDER, AdbPhone, attached_phones, open_phone
from device.onnx_inputs import fixed_inputs
from device.phone import PhoneTarget
from device.runner.compiler import zig_command
from device.runner.package import RunnerPackage
from lightfield.errors import AdbError, DeviceError

pytestmark = pytest.mark.phone

LOST = r"(the connection to the phone was lost|no longer attached|is offline); "
RESTORED = {"fixed_performance": "false\n", "stay_on_while_plugged_in": "3\n"}


@pytest.fixture
def graph(tmp_path):
    return write_graph(tmp_path / "small.onnx")


@pytest.fixture
def file(tmp_path):
    (tmp_path / "file.bin").write_bytes(os.urandom(2_000_000))
    return tmp_path / "file.bin"


@pytest.fixture
def settings(phone, opened):
    """A function that tells whether the phone has its owner's settings again."""
    opened.shell(["settings", "put", "global", "stay_on_while_plugged_in", "3"])
    before = phone.settings()

    def are_restored() -> bool:
        now = phone.settings()
        return now == {**before, **RESTORED} or now == before

    return are_restored


def timed(target, graph):
    """One run, in one pass."""
    return target.measure_many([graph], runs=1, warmup=0)[0]


@contextlib.contextmanager
def once(condition, act):
    """Call a function in another thread as soon as a condition holds."""

    def watch() -> None:
        wait_until(condition)
        act()

    thread = threading.Thread(target=watch)
    thread.start()
    yield
    thread.join()


def running(phone):
    """Whether the script of a test runs while the phone's settings are changed."""
    return lambda: phone.processes("--model")


# The cable ----------------------------------------------------------------------------------------


def test_a_cable_pulled_during_a_push(phone, opened, server, file):
    phone.cable.pull_after(500_000, to_phone=True)
    with pytest.raises(AdbError, match=LOST):
        opened.push_files({"file": file})
    phone.cable.plug()
    attach(server, phone)
    folder = opened.push_files({"file": file})
    sent = phone.local_tmp / Path(folder).relative_to("/data/local/tmp") / "file"
    assert sent.read_bytes() == file.read_bytes()


def test_a_cable_pulled_during_a_run(phone, scripted, settings, server, graph):
    target = scripted('[ -e /phone/slow ] && sleep 60; echo "$answer"')
    earlier = timed(target, graph)
    (phone.state / "slow").touch()
    with once(running(phone), phone.cable.pull), pytest.raises(AdbError, match=LOST):
        timed(target, graph)
    assert earlier.samples_ms == (2.5,)
    wait_until(settings)  # by the phone itself: the cable is still out
    assert state_of(server, phone) != "device"

    phone.cable.plug()
    attach(server, phone)
    (phone.state / "slow").unlink()
    with target:
        assert timed(target, graph).samples_ms == (2.5,)
    assert settings()
    assert phone.files() == []


def test_a_cable_pulled_while_results_are_pulled(phone, opened, file, tmp_path):
    (phone.local_tmp / "output.bin").write_bytes(file.read_bytes())
    phone.cable.pull_after(500_000, to_phone=False)
    with pytest.raises(AdbError, match=LOST):
        opened.pull_file("/data/local/tmp/output.bin", tmp_path / "output.bin")
    assert list(tmp_path.iterdir()) == [file]  # no incomplete file


def test_a_cable_that_stays_out_is_an_error_at_once(phone, opened, server):
    phone.cable.pull()
    wait_until(lambda: state_of(server, phone) != "device")
    with pytest.raises(AdbError, match=LOST):
        opened.shell(["true"])


def test_a_corrupted_push_is_found_and_removed(phone, opened, file):
    content = file.read_bytes()
    marks = [content[at:][:32] for at in (500_000, 1_000_000)]  # two, as messages may split one

    def flip(payload: bytes) -> bytes:
        for mark in marks:
            payload = payload.replace(mark, bytes(32))
        return payload

    phone.cable.to_phone = flip
    with pytest.raises(AdbError, match=r"file arrived damaged on the phone; check the cable"):
        opened.push_files({"file": file})
    assert phone.files() == ["nelf"]
    phone.cable.to_phone = bytes
    opened.push_files({"file": file})


def test_a_truncated_push_is_found_and_removed(phone, opened, file, monkeypatch):
    push = adbutils.sync.Sync.push

    def loses_the_end(self, source, target, mode):
        push(self, source, target, mode)
        os.truncate(phone.local_tmp / Path(target).relative_to("/data/local/tmp"), 1_999_999)

    monkeypatch.setattr(adbutils.sync.Sync, "push", loses_the_end)
    with pytest.raises(AdbError, match="file arrived damaged on the phone"):
        opened.push_files({"file": file})
    assert phone.files() == ["nelf"]


def test_a_file_damaged_on_the_phone_is_sent_again(phone, opened, file):
    folder = opened.push_files({"file": file})
    sent = phone.local_tmp / Path(folder).relative_to("/data/local/tmp") / "file"
    with sent.open("r+b") as damaged:
        damaged.write(b"damaged")
    opened.push_files({"file": file})
    assert sent.read_bytes() == file.read_bytes()


# The adb server and the phone's state -------------------------------------------------------------


def test_an_adb_server_killed_during_a_run(phone, scripted, settings, server, graph, capfd):
    target = scripted('[ -e /phone/slow ] && sleep 60; echo "$answer"')
    (phone.state / "slow").touch()
    with once(running(phone), server.server_kill), pytest.raises(AdbError, match=LOST):
        timed(target, graph)
    wait_until(settings)
    (phone.state / "slow").unlink()
    attach(server, phone)  # starts a server
    assert timed(target, graph).samples_ms == (2.5,)
    assert "daemon" not in "".join(capfd.readouterr())


def test_the_error_of_an_unauthorized_phone_says_what_to_accept(phone, server):
    phone.cable.unauthorized = True
    server.disconnect(phone.serial)
    attach(server, phone)
    with pytest.raises(
        AdbError, match=r"(un)?authoriz(ed|ing); unlock the phone and accept 'Allow"
    ):
        open_phone(server)


def test_a_phone_that_goes_unauthorized_while_it_is_used(phone, opened, server):
    phone.cable.unauthorized = True
    phone.cable.pull()
    phone.cable.plug()
    wait_until(lambda: state_of(server, phone) == "unauthorized", seconds=60)
    with pytest.raises(
        AdbError, match=r"the phone is (unauthorized|authorizing); unlock the phone"
    ):
        opened.shell(["true"])


def test_the_error_of_an_offline_phone_says_what_to_do(phone, opened, server):
    phone.power_off()
    wait_until(lambda: state_of(server, phone) == "offline")
    for use in (lambda: open_phone(server), lambda: opened.shell(["true"])):
        with pytest.raises(AdbError, match=r"the phone is offline; plug the phone in again"):
            use()


def test_a_phone_that_reboots_during_a_run(phone, scripted, settings, server, graph):
    target = scripted('[ -e /phone/slow ] && sleep 60; echo "$answer"')
    (phone.state / "slow").touch()
    with once(running(phone), phone.reboot), pytest.raises(AdbError, match=LOST):
        timed(target, graph)
    assert (
        phone.settings()["stay_on_while_plugged_in"] == "7\n"
    )  # no process was left to restore it
    (phone.state / "slow").unlink()
    attach(server, phone)
    with target:
        assert timed(target, graph).samples_ms == (2.5,)
    assert phone.settings()["stay_on_while_plugged_in"] == "3\n"
    assert phone.files() == []


def test_settings_are_restored_after_the_program_is_killed(phone, settings, server, tmp_path):
    program = (
        "import sys\n"
        "from device.adb import open_phone\n"
        "from device.adb_server import connect\n"
        "from device.phone_settings import measurement_settings\n"
        "phone = open_phone(connect(), sys.argv[1])\n"
        "with measurement_settings(phone, api=34):\n"
        "    phone.attempt(['sleep', '317'], timeout_seconds=320)\n"
    )
    with subprocess.Popen([sys.executable, "-c", program, phone.serial]) as child:
        wait_until(lambda: phone.processes("sleep 317"), seconds=60)
        assert phone.settings()["fixed_performance"] == "true\n"
        child.send_signal(signal.SIGKILL)
    wait_until(settings)
    wait_until(lambda: phone.processes("sleep 317") == [])  # the command on the phone ends too
    wait_until(lambda: phone.files() == [])


def test_two_phones_need_a_serial(new_phone, server):
    one, two = new_phone(), new_phone()
    # at first both have the same serial number, as one phone that is attached twice
    assert open_phone(server).serial in (one.serial, two.serial)
    (two.state / "getprop").write_text("[ro.serialno]: [R3NX20]\n[ro.product.model]: [The other]\n")
    with pytest.raises(AdbError, match=r"2 phones are attached; choose one by --serial") as error:
        open_phone(server)
    assert one.serial in str(error.value)
    assert two.serial in str(error.value)
    model = open_phone(server, two.serial).shell(["getprop", "ro.product.model"])
    assert model.strip() == "The other"


def test_no_phone_at_all(server):
    assert attached_phones(server) == []
    with pytest.raises(AdbError, match="no phone is attached; enable USB debugging"):
        open_phone(server)


# The phone's storage and processor ----------------------------------------------------------------


def test_a_full_storage_is_an_error_before_the_push(phone, opened, file):
    phone.fill(spare_bytes=1_000_000)
    with pytest.raises(
        AdbError, match=r"1\.0 MB of free storage, 2\.0 MB are needed; free storage"
    ):
        opened.push_files({"file": file})
    assert [name for name in phone.files() if name.endswith("file")] == []


def test_a_storage_that_fills_up_during_a_push(phone, opened, file, monkeypatch):
    monkeypatch.setattr(AdbPhone, "_require_room", lambda self, size_bytes: None)
    phone.fill(spare_bytes=1_000_000)
    with pytest.raises(
        AdbError, match=r"did not accept file\.bin; check whether its storage is full"
    ):
        opened.push_files({"file": file})


def test_a_read_only_storage(phone, opened, file):
    phone.make_read_only()
    with pytest.raises(AdbError, match=r"`mkdir` failed .*Read-only file system"):
        opened.push_files({"file": file})


def test_no_setting_is_changed_without_storage_for_the_note(phone, opened, scripted, graph):
    target = scripted('echo "$answer"')
    timed(target, graph)
    phone.fill(spare_bytes=0)
    before = phone.settings()
    with contextlib.suppress(DeviceError):
        timed(target, graph)
    assert phone.settings() == before


def test_a_phone_of_another_processor(phone, opened, package):
    (phone.state / "getprop").write_text("[ro.product.cpu.abilist]: [armeabi-v7a,armeabi]\n")
    with pytest.raises(DeviceError, match="armeabi-v7a, armeabi, not arm64-v8a"):
        PhoneTarget(opened, package)
    assert phone.files() == []


def test_a_runner_for_another_processor(phone, opened, tmp_path):
    header = b"\x7fELF\x02\x01\x01" + bytes(9) + struct.pack("<HHI", 3, 243, 1)  # RISC-V
    (tmp_path / "nelf_runner").write_bytes(header + bytes(200))
    (tmp_path / "libonnxruntime.so").touch()
    files = {name: tmp_path / name for name in ("nelf_runner", "libonnxruntime.so")}
    with pytest.raises(DeviceError, match=r"the runner \(bionic\) does not start") as error:
        PhoneTarget(opened, RunnerPackage("bionic", files))
    assert "\n" not in str(error.value)
    assert phone.files() == []


# The runner ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def talking(tree, server, tmp_path_factory):
    """One phone for many tests; its runner is the phone's file `script`."""
    folder = tmp_path_factory.mktemp("talking")
    with attached_phone(folder, tree, server) as phone:
        opened = open_phone(server, phone.serial)
        runner = scripted_package(folder, ". /phone/script")
        with PhoneTarget(opened, runner, IMPATIENT) as target:
            yield phone, target


@pytest.mark.parametrize(
    ("script", "message"),
    [
        ("kill -SYS $$", "killed by SIGSYS"),
        ("kill -KILL $$", "killed by SIGKILL"),
        ("kill -SEGV $$", "killed by SIGSEGV"),
        ("exit 1", "ended with exit code 1"),
        ("echo 'CANNOT LINK EXECUTABLE' >&2; exit 1", "CANNOT LINK EXECUTABLE"),
        ("head -c 100000 /dev/urandom", "report is invalid"),
        ("printf '\\377\\376{\\n{\\000}\\n'", "report is invalid"),
        ("echo '[1, 2, 3]'", "report is invalid"),
        ('echo "${answer%?}"', "report is invalid"),
        ('echo "$answer" | sed s/2500/NaN/', "report is invalid"),
        ('echo "$answer" | sed s/2500/-86400000000/', "report is invalid"),
        ('echo "$answer" | sed s/2500/1e999/', "report is invalid"),
        ('echo "$answer" | sed "s/2500/2500, 2500/"', "samples"),
        ('echo "$answer" | sed s/2500/\'"2500; reboot"\'/', "report is invalid"),
        ("true", "report is invalid"),
    ],
)
def test_a_runner_that_fails_or_prints_an_invalid_report(talking, graph, script, message):
    phone, target = talking
    before = phone.settings()
    (phone.state / "script").write_text(script)
    with pytest.raises(DeviceError, match=message) as error:
        timed(target, graph)
    assert str(error.value).startswith("small.onnx: ")
    assert str(error.value).isprintable()
    assert len(str(error.value)) < 500
    assert phone.settings() == {**before, "fixed_performance": "false\n"}


def test_noise_around_the_report_is_ignored(scripted, graph):
    script = 'echo "WARNING: linker: unused DT entry"; echo noise >&2; echo "$answer"; echo bye'
    assert timed(scripted(script), graph).samples_ms == (2.5,)


def test_a_hanging_runner_is_killed(phone, scripted, settings, graph, monkeypatch):
    monkeypatch.setattr("device.phone._GRACE_SECONDS", 2)
    target = scripted("trap '' ALRM; sleep 60", timeout_seconds=1)
    with target, pytest.raises(AdbError, match="the phone does not answer"):
        timed(target, graph)
    assert settings()
    wait_until(lambda: phone.processes("--model") == [])


def test_the_real_runner_under_faults(phone, target, settings, graph, tmp_path):
    """One phone for several faults, because pushing ONNX Runtime takes long."""
    killed = pytest.raises(DeviceError, match=r"small\.onnx: the runner was killed by SIGKILL")
    with once(running(phone), lambda: kill_runner(phone, signal.SIGKILL)), killed:
        target.measure_many([graph], runs=1_000_000)
    assert settings()

    target.timeout_seconds = 2
    with pytest.raises(DeviceError, match="did not finish within its time limit"):
        target.measure_many([graph], runs=1_000_000)
    target.timeout_seconds = 60
    assert settings()

    unsupported = write_unsupported(tmp_path / "unsupported.onnx")
    with pytest.raises(DeviceError, match=r"failed to load the graph \(.*HolographicConv"):
        target.run(unsupported, {"x": np.zeros((2, 2), np.float32)})

    (tmp_path / "broken.onnx").write_bytes(graph.read_bytes()[:-100])
    with pytest.raises(DeviceError):
        target.run(tmp_path / "broken.onnx", fixed_inputs(graph))

    hostile = write_graph(tmp_path / "a b;$(touch pwned)`touch pwned`'\".onnx")
    assert target.run(hostile, fixed_inputs(hostile))["output"].size
    assert not [name for name in phone.files() if "pwned" in name]
    assert not list(Path.cwd().glob("pwned*"))

    target.close()
    assert phone.files() == []
    assert phone.processes("nelf_runner") == []


def kill_runner(phone, number):
    for pid in phone.processes("--model"):
        os.kill(pid, number)


def write_unsupported(path: Path) -> Path:
    """A graph with an operator that ONNX Runtime does not support."""
    value = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [2, 2]) for n in "xy"]
    node = helper.make_node("HolographicConv", ["x"], ["y"], domain="com.example")
    graph = helper.make_graph([node], "unsupported", value[:1], value[1:])
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.example", 1)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=8), str(path))
    return path


# Clocks -------------------------------------------------------------------------------------------

# A library with one function, preloaded before the C library: one clock jumps whenever it is read.
JUMPING = r"""
struct timespec { long seconds, nanoseconds; };
int clock_gettime(int clock, struct timespec *now) {
  static long looks;
  register long number __asm__("x8") = 113;
  register long first __asm__("x0") = clock;
  register struct timespec *second __asm__("x1") = now;
  __asm__ volatile("svc 0" : "+r"(first) : "r"(second), "r"(number) : "memory");
  if (clock == JUMPS) now->seconds += (looks++ % 2 ? 86400 : -86400);
  return (int)first;
}
"""


class Preloading(RunnerPackage):
    """A package that preloads that library."""

    def command(self, folder: str) -> list[str]:
        loader, *rest = super().command(folder)
        return [loader, "--preload", f"{folder}/libjumping.so", *rest]


@pytest.mark.parametrize("clock", [0, 1], ids=["realtime", "monotonic"])
def test_a_clock_that_is_set_while_a_graph_runs(opened, package, graph, tmp_path, clock):
    (tmp_path / "jumping.c").write_text(JUMPING)
    library, zig = tmp_path / "libjumping.so", zig_command()
    assert zig
    build = ["-target", "aarch64-linux-gnu.2.28", "-shared", "-fPIC", "-nostdlib", "-O1"]
    source = [f"-DJUMPS={clock}", str(tmp_path / "jumping.c"), "-o", str(library)]
    subprocess.run([*zig, *build, *source], check=True)
    files = {**package.files, "libjumping.so": library}
    with PhoneTarget(opened, Preloading("glibc", files), IMPATIENT) as target:
        if clock == 0:  # the wall clock: automatic time, a time zone, the user
            record = target.measure_many([graph], runs=8, warmup=0)[0]
            assert max(record.samples_ms) < 60_000
        else:  # a negative control: no real monotonic clock jumps
            with pytest.raises(DeviceError):
                target.measure_many([graph], runs=8, warmup=0)


# Hostile arguments --------------------------------------------------------------------------------

HOSTILE = [
    "a b",
    "; touch pwned",
    "$(touch pwned)",
    "`touch pwned`",
    "it's",
    '"',
    "*",
    "",
    "a\nb",
    "&& id",
]


def test_words_are_quoted_for_the_phones_shell(phone, opened):
    printed = opened.shell(["printf", "<%s>", *HOSTILE])
    assert printed == "".join(f"<{word}>" for word in HOSTILE)
    with opened.in_background(["echo", "$(touch /data/local/tmp/pwned); `id`"]) as said:
        assert said == "$(touch /data/local/tmp/pwned); `id`"
    assert phone.files() == []


@pytest.mark.parametrize(
    "serial", ["x; touch pwned", "$(touch pwned)", "a b", "", "x\n0012host:kill"]
)
def test_a_hostile_serial_is_only_an_unknown_phone(phone, server, serial):
    with pytest.raises(AdbError, match="no such phone is attached; attached phones: "):
        open_phone(server, serial)
    assert phone.files() == []
    assert state_of(server, phone) == "device"


def test_names_of_files_do_not_reach_the_shell(phone, opened, tmp_path):
    names = ["a b", "$(touch pwned)", "; touch pwned;", "it's"]
    for name in names:
        (tmp_path / name).write_text(name)
    folder = opened.push_files({name: tmp_path / name for name in names})
    opened.pull_file(f"{folder}/{names[1]}", tmp_path / "back")
    assert (tmp_path / "back").read_text() == names[1]
    opened.remove([folder])
    assert folder.startswith(PHONE_FOLDER)
    assert phone.files() == []
