"""From finding the phone to leaving it as it was, with arm64 code, over the real adb."""

import json
import os
import platform
import socket

import numpy as np
import pytest
from adbutils import adb_path
from small_graphs import reference_output, write_graph

from device.adb_output import parse_cpu_list
from device.host import HostTarget
from device.onnx_inputs import fixed_inputs
from lightfield.errors import BudgetError
from lightfield.latency import ComparedLatency, LatencyRecord, evidence
from prune.measurement import budget_runs, ratio_runs

pytestmark = pytest.mark.phone


@pytest.fixture
def graph(tmp_path):
    return write_graph(tmp_path / "small.onnx")


def test_what_arm64_code_computes_on_the_phone_is_what_the_host_computes(phone, target, graph):
    before = phone.settings()
    inputs = fixed_inputs(graph, seed=5)
    with target:
        record = target.measure(graph, runs=4, warmup=1)
        output = target.run(graph, inputs)["output"]
    assert np.ptp(output) > 0.5  # it depends on its input, so agreeing says something
    np.testing.assert_allclose(output, HostTarget().run(graph, inputs)["output"], atol=1e-5)
    np.testing.assert_allclose(output, reference_output(8, 2, inputs["input"]), atol=1e-5)

    assert len(record.samples_ms) == 4
    assert record.peak_memory_bytes
    assert record.device.name == "Google Pixel 8 (Google Tensor G3)"
    assert record.conditions["before"]["battery_celsius"] == 28.5
    assert record.conditions["settings"] == dict.fromkeys(
        ("stays_on", "screen_on", "fixed_performance"), True
    )
    assert phone.serial not in json.dumps(record.to_json())

    assert phone.settings() == {**before, "fixed_performance": "false\n"}
    assert phone.files() == []

    assert record.device.emulated
    record = LatencyRecord.from_json(json.loads(json.dumps(record.to_json())))
    with pytest.raises(BudgetError, match="emulated device's latency is no evidence"):
        evidence(record)
    for refuses in (ratio_runs, budget_runs):
        with pytest.raises(BudgetError, match="emulated"):
            refuses(ComparedLatency(record, record))


def test_what_the_phone_prints_is_arm64s_own(opened):
    assert opened.shell(["uname", "-m"]).strip() == "aarch64"
    assert platform.machine() != "aarch64"  # so it was qemu
    assert parse_cpu_list(opened.shell(["cat", "/sys/devices/system/cpu/possible"])) == [*range(9)]
    assert opened.shell(["getprop", "ro.product.model"]).strip() == "Pixel 8"


def test_files_that_are_there_are_not_sent_again(phone, opened, tmp_path):
    (tmp_path / "file").write_bytes(os.urandom(100_000))
    sent = []
    phone.cable.to_phone = lambda payload: sent.append(len(payload)) or payload
    folder = opened.push_files({"file": tmp_path / "file"})
    assert sum(sent) > 100_000
    sent.clear()
    assert opened.push_files({"file": tmp_path / "file"}) == folder
    assert sum(sent) < 1_000


def test_a_file_comes_back_as_it_is(phone, opened, tmp_path):
    data = os.urandom(300_000)
    (phone.local_tmp / "output.bin").write_bytes(data)
    opened.pull_file("/data/local/tmp/output.bin", tmp_path / "output.bin")
    assert (tmp_path / "output.bin").read_bytes() == data


def ask_observer(port: int) -> list[str]:
    """At which addresses a connection to this port is accepted, seen from outside the namespaces."""
    with socket.socket(fileno=os.dup(int(os.environ["NELF_PHONE_OBSERVER"]))) as observer:
        observer.sendall(str(port).encode())
        return json.loads(observer.recv(1024))


def test_nothing_listens_outside_the_namespaces(phone, server):
    ports = (phone.port, phone.cable.port, server.port)
    for port in ports:
        with socket.create_connection(("127.0.0.1", port), timeout=5):
            pass  # it listens in here
        assert ask_observer(port) == []


def test_the_observer_sees_what_does_listen_outside(request):
    port = int(os.environ["NELF_PHONE_OUTSIDE_PORT"])
    assert "127.0.0.1" in ask_observer(port)
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port), timeout=5)  # and from in here it is not there


def test_a_phone_cannot_listen_where_namespaces_do_not_reach(phone):
    assert "vsock" in (phone.state / "adbd.log").read_text()  # it wants to
    with pytest.raises(OSError, match="not supported"):
        socket.socket(socket.AF_VSOCK)


def test_there_is_no_network(server):
    assert [name for _, name in socket.if_nameindex()] == ["lo"]
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        assert any_socket.connect_ex(("192.0.2.1", 9)) != 0  # no route


def test_the_adb_server_is_the_one_that_adbutils_brings():
    assert "adbutils" in adb_path()
