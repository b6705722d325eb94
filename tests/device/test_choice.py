import threading

import pytest
from fake_phone import FakeClient, FakeDevice

from device import choice as module
from device.choice import all_phones, choose_target, opened_phones, run_concurrently
from device.target_config import TargetConfig
from lightfield.errors import AdbError


@pytest.fixture(autouse=True)
def ready_made_package(package, monkeypatch):
    monkeypatch.delenv("ANDROID_SERIAL", raising=False)
    monkeypatch.setattr("device.phone.runner_package", lambda runtime, provider="cpu": package)


def kind(client: FakeClient, **options) -> str:
    return choose_target(TargetConfig(**options), client).identity.kind


def test_auto_takes_the_only_phone(client):
    assert kind(client) == "phone"
    client.states = {"X": "unauthorized"}
    assert kind(client) == "phone"


def another(tmp_path) -> FakeDevice:
    device = FakeDevice(tmp_path / "two", serial="TWO")
    device.set_properties(ro__serialno="TWO")
    return device


def test_auto_takes_a_phone_that_is_attached_twice(client, tmp_path):
    client.devices.append(FakeDevice(tmp_path / "wireless", serial="10.0.0.7:40001"))
    assert kind(client) == "phone"


def test_auto_takes_the_phone_in_android_serial(client, tmp_path, monkeypatch):
    client.devices.append(another(tmp_path))
    monkeypatch.setenv("ANDROID_SERIAL", "TWO")
    assert kind(client) == "phone"
    monkeypatch.setenv("ANDROID_SERIAL", "THREE")
    assert kind(client) == "host"


def test_all_phones_lists_a_phone_attached_twice_once(client, tmp_path, monkeypatch):
    client.devices.append(FakeDevice(tmp_path / "wireless", serial="10.0.0.7:40001"))
    monkeypatch.setenv("ANDROID_SERIAL", "nobody's")
    assert all_phones(client) == ["SERIAL01"]


def test_auto_is_the_host_without_a_usable_phone(client, fake, tmp_path):
    assert kind(FakeClient()) == "host"
    assert kind(FakeClient(states={"X": "unauthorized"})) == "host"
    assert kind(FakeClient(down=True)) == "host"
    assert kind(FakeClient([fake, another(tmp_path)])) == "host"


def test_auto_never_takes_an_emulator(client, fake):
    fake.show(getprop="getprop_emulator_api34")
    assert kind(client) == "host"


def test_auto_with_a_serial_needs_that_phone(client):
    assert kind(client, serial="SERIAL01") == "phone"
    with pytest.raises(AdbError, match="no such phone"):
        kind(client, serial="OTHER")


def test_target_phone_without_a_phone_is_an_error():
    with pytest.raises(AdbError, match="enable USB debugging"):
        choose_target(TargetConfig(target="phone"), FakeClient())


def test_target_host_sends_no_command_to_a_phone(client, fake):
    target = choose_target(TargetConfig(target="host", threads=2), client)
    assert target.identity.kind == "host"
    assert target.identity.threads == 2
    assert fake.commands == []


def test_auto_starts_no_adb_server_without_a_usb_device(monkeypatch):
    monkeypatch.setattr(module, "server_is_running", lambda: False)
    monkeypatch.setattr(module, "usb_debugging_devices", lambda: 0)
    monkeypatch.setattr(module, "connect", lambda: pytest.fail("started a server"))
    assert choose_target(TargetConfig()).identity.kind == "host"


def test_auto_stops_the_server_that_it_started(monkeypatch):
    stopped = []
    monkeypatch.setattr(module, "server_is_running", lambda: False)
    monkeypatch.setattr(module, "usb_debugging_devices", lambda: None)
    monkeypatch.setattr(module, "connect", FakeClient)
    monkeypatch.setattr(module, "_stop_server", lambda: stopped.append(True))
    assert choose_target(TargetConfig()).identity.kind == "host"
    assert stopped == [True]


def test_all_phones_are_opened_and_restored(client, fake, tmp_path):
    second = another(tmp_path)
    client.devices.append(second)
    client.states = {"X": "unauthorized"}
    with opened_phones(TargetConfig(), client) as (found, lost):
        assert len({target.identity.unit for target in found}) == 2
        assert lost == []
    assert fake.files() == second.files() == []


def test_an_unusable_phone_does_not_affect_the_others(client, tmp_path):
    second = FakeDevice(tmp_path / "two", serial="TWO")
    (second.state / "getprop").write_text("[ro.product.cpu.abilist]: [armeabi-v7a]\n")
    client.devices.append(second)
    with opened_phones(TargetConfig(), client) as (found, lost):
        assert len(found) == 1
        assert "TWO: the processor is armeabi-v7a" in lost[0]
    client.devices = [second]
    with (
        pytest.raises(AdbError, match="armeabi-v7a"),
        opened_phones(TargetConfig(), client),
    ):
        pytest.fail("nothing to measure on")
    with pytest.raises(AdbError, match="no phone is attached"):
        all_phones(FakeClient())


def test_devices_are_worked_on_concurrently():
    barrier = threading.Barrier(3, timeout=20)

    def work(number: int) -> int:
        barrier.wait()
        return number * number

    assert run_concurrently(work, [1, 2, 3]) == [1, 4, 9]
    assert run_concurrently(lambda number: number, [7]) == [7]


def test_an_interrupt_aborts_and_awaits_all_devices():
    released, ended = threading.Event(), []

    def work(number: int) -> None:
        if number == 0:
            raise KeyboardInterrupt
        assert released.wait(20)
        ended.append(number)

    with pytest.raises(KeyboardInterrupt):
        run_concurrently(work, [0, 1, 2], abort=lambda number: released.set())
    assert sorted(ended) == [1, 2]
