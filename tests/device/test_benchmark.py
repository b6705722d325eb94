import pytest
from fake_phone import FakeClient, FakeDevice
from small_graphs import write_graph

from device import benchmark as module
from device.benchmark import BenchmarkConfig, benchmark, choose_target
from device.host import HostTarget
from lightfield.errors import AdbError, ConfigError


@pytest.fixture(autouse=True)
def ready_made_bundle(bundle, monkeypatch):
    monkeypatch.setattr("device.phone.runner_bundle", lambda runtime: bundle)


def kind(client: FakeClient, **options) -> str:
    return choose_target("auto", client=client, **options).identity.kind


def test_auto_takes_the_only_phone(client):
    assert kind(client) == "phone"
    client.states = {"X": "unauthorized"}
    assert kind(client) == "phone"


def test_auto_stays_here_without_a_phone_to_take(client, fake, tmp_path):
    assert kind(FakeClient()) == "host"
    assert kind(FakeClient(states={"X": "unauthorized"})) == "host"
    assert kind(FakeClient(down=True)) == "host"
    assert kind(FakeClient([fake, FakeDevice(tmp_path / "two", serial="TWO")])) == "host"


def test_auto_never_takes_an_emulator(client, fake):
    fake.show(getprop="getprop_emulator_api34")
    assert kind(client) == "host"


def test_auto_with_a_serial_insists_on_it(client):
    assert kind(client, serial="SERIAL01") == "phone"
    with pytest.raises(AdbError, match="no such phone"):
        kind(client, serial="OTHER")


def test_phone_without_a_phone_is_an_error_with_advice():
    with pytest.raises(AdbError, match="enable USB debugging"):
        choose_target("phone", client=FakeClient())


def test_host_looks_for_no_phone(client, fake):
    target = choose_target("host", threads=2, client=client)
    assert target.identity.kind == "host"
    assert target.identity.threads == 2
    assert fake.commands == []


def test_auto_starts_no_adb_server_without_a_usb_device(monkeypatch):
    monkeypatch.setattr(module, "server_is_running", lambda: False)
    monkeypatch.setattr(module, "usb_debugging_devices", lambda: 0)
    monkeypatch.setattr(module, "connect", lambda: pytest.fail("started a server"))
    assert choose_target("auto").identity.kind == "host"


def test_auto_stops_a_server_that_it_started_in_vain(monkeypatch):
    stopped = []
    monkeypatch.setattr(module, "server_is_running", lambda: False)
    monkeypatch.setattr(module, "usb_debugging_devices", lambda: None)
    monkeypatch.setattr(module, "connect", FakeClient)
    monkeypatch.setattr(module, "_stop_server", lambda: stopped.append(True))
    assert choose_target("auto").identity.kind == "host"
    assert stopped == [True]


def test_a_benchmark_measures_every_graph_and_says_how_far_it_is(tmp_path):
    graphs = {name: write_graph(tmp_path / f"{name}.onnx") for name in ("student", "fused")}
    seen = []
    records = benchmark(
        HostTarget(),
        graphs,
        BenchmarkConfig(target="host", runs=3, warmup=1),
        lambda done, total, **figures: seen.append((done, total, sorted(figures))),
    )
    assert list(records) == ["student", "fused"]
    assert all(len(record.samples_ms) == 3 for record in records.values())
    assert seen == [(0, 2, []), (1, 2, ["p50_ms"]), (2, 2, ["p50_ms"])]


def test_impossible_settings_are_refused():
    with pytest.raises(ConfigError, match="at least 1"):
        BenchmarkConfig(runs=0)
    with pytest.raises(ConfigError, match="not the host"):
        BenchmarkConfig(target="host", serial="X")
