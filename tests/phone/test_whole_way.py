"""A complete measurement with arm64 code over the real adb, and the isolation of the emulated phone."""

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
from lightfield.clocks import budget_runs, ratio_runs
from lightfield.errors import BudgetError
from lightfield.latency import ComparedLatency, LatencyRecord, evidence

pytestmark = pytest.mark.phone


@pytest.fixture
def graph(tmp_path):
    return write_graph(tmp_path / "small.onnx")


def test_arm64_code_computes_the_same_as_the_host(phone, target, graph):
    before = phone.settings()
    inputs = fixed_inputs(graph, seed=5)
    with target:
        record = target.measure(graph, runs=4, warmup=1)
        output = target.run(graph, inputs)["output"]
    assert np.ptp(output) > 0.5  # the output depends on the input, so the comparison is meaningful
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
    with pytest.raises(BudgetError, match="latency of an emulated device is no evidence"):
        evidence(record)
    for refuses in (ratio_runs, budget_runs):
        with pytest.raises(BudgetError, match="emulated"):
            refuses(ComparedLatency(record, record))


def test_the_phone_runs_arm64_programs(opened):
    assert opened.shell(["uname", "-m"]).strip() == "aarch64"
    assert platform.machine() != "aarch64"  # so it was qemu
    assert parse_cpu_list(opened.shell(["cat", "/sys/devices/system/cpu/possible"])) == [*range(9)]
    assert opened.shell(["getprop", "ro.product.model"]).strip() == "Pixel 8"


def test_files_on_the_phone_are_not_sent_again(phone, opened, tmp_path):
    (tmp_path / "file").write_bytes(os.urandom(100_000))
    sent = []
    phone.cable.to_phone = lambda payload: sent.append(len(payload)) or payload
    folder = opened.push_files({"file": tmp_path / "file"})
    assert sum(sent) > 100_000
    sent.clear()
    assert opened.push_files({"file": tmp_path / "file"}) == folder
    assert sum(sent) < 1_000


def test_a_pulled_file_is_unchanged(phone, opened, tmp_path):
    data = os.urandom(300_000)
    (phone.local_tmp / "output.bin").write_bytes(data)
    opened.pull_file("/data/local/tmp/output.bin", tmp_path / "output.bin")
    assert (tmp_path / "output.bin").read_bytes() == data


def ask_observer(port: int) -> list[str]:
    """Addresses outside the namespaces that accept a connection to this port."""
    with socket.socket(fileno=os.dup(int(os.environ["NELF_PHONE_OBSERVER"]))) as observer:
        observer.sendall(str(port).encode())
        return json.loads(observer.recv(1024))


def test_nothing_listens_outside_the_namespaces(phone, server):
    ports = (phone.port, phone.cable.port, server.port)
    for port in ports:
        with socket.create_connection(("127.0.0.1", port), timeout=5):
            pass  # it listens inside the namespaces
        assert ask_observer(port) == []


def test_the_observer_sees_a_port_outside(request):
    port = int(os.environ["NELF_PHONE_OUTSIDE_PORT"])
    assert "127.0.0.1" in ask_observer(port)
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port), timeout=5)  # but not from inside


def test_a_phone_cannot_listen_on_vsock(phone):
    assert "vsock" in (phone.state / "adbd.log").read_text()  # it tries to
    with pytest.raises(OSError, match="not supported"):
        socket.socket(socket.AF_VSOCK)


def test_there_is_no_network(server):
    assert [name for _, name in socket.if_nameindex()] == ["lo"]
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        assert any_socket.connect_ex(("192.0.2.1", 9)) != 0  # no route


def test_the_adb_server_comes_from_adbutils():
    assert "adbutils" in adb_path()
