import inspect
from pathlib import Path

import adbutils
import pytest
from adbutils.sync import Sync
from fake_phone import FakeClient, FakeDevice

from device.adb import (
    PHONE_FOLDER,
    AdbPhone,
    attached_phones,
    open_phone,
    phone_names,
    read_identity,
)
from lightfield.errors import AdbError


@pytest.fixture(autouse=True)
def no_phone_is_chosen_outside(monkeypatch) -> None:
    monkeypatch.delenv("ANDROID_SERIAL", raising=False)


@pytest.fixture
def phone(fake: FakeDevice) -> AdbPhone:
    return AdbPhone(fake, fake.serial)


@pytest.mark.parametrize(
    "words",
    [
        ["a b", "c"],
        ["; touch pwned"],
        ["$(touch pwned)"],
        ["`touch pwned`"],
        ["it's", '"quoted"', "a\\b", "*", "", "a\nb"],
        ["&& reboot", "|", ">out"],
    ],
)
def test_words_are_quoted_for_the_shell(phone, fake, words):
    printed = phone.shell(["printf", "<%s>", *words])
    assert printed == "".join(f"<{word}>" for word in words)
    assert not (fake.root / "pwned").exists()
    assert not (fake.root / "out").exists()


def test_a_failing_command_raises_its_message(phone):
    with pytest.raises(AdbError, match=r"SERIAL01: `ls` failed with exit code \d+ \(.*/nowhere"):
        phone.shell(["ls", "/nowhere"])
    with pytest.raises(AdbError, match="`no-such-tool` is not on this phone"):
        phone.shell(["no-such-tool"])


def test_silent_and_lost_phones_have_different_errors(phone, fake):
    fake.hangs_at = "sleep"
    with pytest.raises(AdbError, match="does not answer"):
        phone.shell(["sleep", "9"])
    fake.lost_after = 0
    with pytest.raises(
        AdbError, match="SERIAL01: the phone is no longer attached; check the cable"
    ):
        phone.shell(["true"])


def test_files_are_pushed_once_and_verified(phone, fake, tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    first.write_bytes(b"1" * 5000)
    second.write_bytes(b"2")
    folder = phone.push_files({"a": first, "b": second})
    assert folder.startswith(f"{PHONE_FOLDER}/")
    assert sorted(fake.pushed) == [f"{folder}/a", f"{folder}/b"]
    assert phone.push_files({"a": first, "b": second}) == folder
    assert len(fake.pushed) == 2

    on_phone = fake.root / f"{folder}/a".lstrip("/")
    on_phone.write_bytes(b"damaged since")
    phone.push_files({"a": first, "b": second})
    assert fake.pushed[2:] == [f"{folder}/a"]
    assert on_phone.read_bytes() == first.read_bytes()

    second.write_bytes(b"3")
    assert phone.push_files({"a": first, "b": second}) != folder


def test_a_truncated_push_is_refused_and_leaves_nothing(phone, fake, tmp_path):
    (tmp_path / "file").write_bytes(b"1234")
    fake.truncate_pushes = True
    with pytest.raises(AdbError, match="file arrived damaged on the phone"):
        phone.push_files({"file": tmp_path / "file"})
    phone.remove([])
    assert fake.files() == []


def test_a_cable_pulled_during_a_push_is_an_adb_error(phone, fake, tmp_path):
    (tmp_path / "file").write_bytes(b"1234")
    fake.lost_after = 1
    with pytest.raises(AdbError, match="no longer attached"):
        phone.push_files({"file": tmp_path / "file"})


def test_pulling_a_missing_file_is_an_error(phone, tmp_path):
    with pytest.raises(AdbError, match=r"nothing\.bin is missing"):
        phone.pull_file(f"{PHONE_FOLDER}/nothing.bin", tmp_path / "local")


def test_remove_keeps_files_of_other_programs(phone, fake, tmp_path):
    (tmp_path / "file").write_bytes(b"1234")
    folder = phone.push_files({"file": tmp_path / "file"})
    (fake.root / f"{PHONE_FOLDER}/other".lstrip("/")).mkdir()
    phone.remove([folder])
    assert fake.files() == ["nelf", "nelf/other"]


def reached(tmp_path: Path, serial: str, **properties: str) -> FakeDevice:
    """A phone with these properties and this serial number in adb."""
    device = FakeDevice(tmp_path / f"{len(list(tmp_path.iterdir()))}", serial=serial)
    device.set_properties(**properties)
    return device


def unit(device: FakeDevice) -> str:
    return read_identity(AdbPhone(device, device.serial)).unit


def test_the_unit_does_not_depend_on_the_connection(tmp_path):
    ways = ("HT4A1", "10.0.0.7:40001", "10.0.0.7:40003", "adb-HT4A1-x (2)._adb-tls-connect._tcp")
    same = {unit(reached(tmp_path, way, ro__serialno="HT4A1")) for way in ways}
    assert len(same) == 1
    assert "HT4A1" not in same.pop()
    assert unit(reached(tmp_path, "HT4A1", ro__serialno="HT4A2")) not in same


@pytest.mark.parametrize(
    "number", ["", "unknown", "0123456789ABCDEF", "0000000000", "FFFFFFFF", "20080411"]
)
def test_phones_without_a_serial_number_have_distinct_units(tmp_path, number):
    one, two, three = (reached(tmp_path, name, ro__serialno=number) for name in "ABC")
    assert unit(one) == unit(two)
    for device, android_id in ((one, "9a31bc0ff0e1d2c3"), (two, "77c1aa00b2d3e4f5")):
        (device.state / "setting_secure_android_id").write_text(f"{android_id}\n")
    assert len({unit(one), unit(two), unit(three)}) == 3
    three.set_properties(ro__boot__serialno="HT4A3")
    assert unit(three) == unit(reached(tmp_path, "D", ro__serialno="HT4A3"))


def two(tmp_path: Path) -> list[FakeDevice]:
    return [reached(tmp_path, name, ro__serialno=name) for name in ("ONE", "TWO")]


def test_phones_are_listed_with_their_states(fake):
    phones = attached_phones(FakeClient([fake], {"X": "unauthorized"}))
    assert [(p.serial, p.is_ready) for p in phones] == [("SERIAL01", True), ("X", False)]


def test_the_only_usable_phone_is_taken(fake):
    assert open_phone(FakeClient([fake], {"X": "offline"})).serial == "SERIAL01"


def test_several_phones_need_a_serial(tmp_path):
    client = FakeClient(two(tmp_path))
    assert open_phone(client, "TWO").serial == "TWO"
    with pytest.raises(AdbError, match=r"ONE \(device\), TWO \(device\): 2 phones.*by --serial"):
        open_phone(client)


def test_a_phone_that_is_attached_twice_is_one_phone(tmp_path):
    ways = [reached(tmp_path, name, ro__serialno="HT4A1") for name in ("10.0.0.7:40001", "HT4A1")]
    assert open_phone(FakeClient(ways)).serial == "10.0.0.7:40001"
    ways[1].tags["usb"] = "1-4"
    assert open_phone(FakeClient(ways)).serial == "HT4A1"  # the faster way
    assert open_phone(FakeClient(ways), "model:Pixel_8").serial == "HT4A1"
    other = reached(tmp_path, "HT4A2", ro__serialno="HT4A2")
    assert phone_names(FakeClient([*ways, other])) == ["HT4A1", "HT4A2"]


def test_two_usb_connections_are_two_phones(tmp_path):
    phones = [reached(tmp_path, name) for name in ("ONE", "TWO", "10.0.0.7:40001")]
    phones[0].tags["usb"], phones[1].tags["usb"] = "1-4", "1-5"
    assert phone_names(FakeClient(phones)) == ["ONE", "TWO"]


def test_a_name_of_two_connections_means_the_usable_one(tmp_path):
    client = FakeClient([reached(tmp_path, "10.0.0.7:40001")], {"10.0.0.7:39000": "offline"})
    assert open_phone(client, "10.0.0.7").serial == "10.0.0.7:40001"


def test_a_phone_is_chosen_by_any_name_that_adb_accepts(tmp_path):
    phones = [reached(tmp_path, "10.0.0.7:40001"), reached(tmp_path, "HT4A2", ro__serialno="HT4A2")]
    phones[1].tags |= {"usb": "1-4", "device": "shiba"}
    client = FakeClient(phones)
    for name in ("usb:1-4", "device:shiba", "transport_id:2", "HT4A2"):
        assert open_phone(client, name).serial == "HT4A2"
    for name in ("10.0.0.7", "tcp:10.0.0.7:40001"):
        assert open_phone(client, name).serial == "10.0.0.7:40001"
    with pytest.raises(AdbError, match="2 phones are attached"):
        open_phone(client, "model:Pixel_8")


def test_phones_with_one_serial_number_are_chosen_by_connection(tmp_path):
    phones = [reached(tmp_path, "SAME", ro__serialno=name) for name in ("HT4A1", "HT4A2")]
    client = FakeClient(phones)
    listed = r"transport_id:1 \(device\), transport_id:2 \(device\): 2 phones.*number SAME; choose"
    for serial in (None, "SAME"):
        with pytest.raises(AdbError, match=listed):
            open_phone(client, serial)
    chosen = open_phone(client, "transport_id:2")
    assert chosen.shell(["getprop"]) == AdbPhone(phones[1], "").shell(["getprop"])
    assert phone_names(client) == ["transport_id:1", "transport_id:2"]


def test_a_phone_without_a_serial_number_is_opened_by_its_connection(tmp_path):
    client = FakeClient([reached(tmp_path, "(no serial number)")])
    assert open_phone(client).serial == "transport_id:1"


def test_android_serial_is_the_default(tmp_path, monkeypatch):
    client = FakeClient(two(tmp_path))
    monkeypatch.setenv("ANDROID_SERIAL", "TWO")
    assert open_phone(client).serial == "TWO"
    assert open_phone(client, "ONE").serial == "ONE"
    monkeypatch.setenv("ANDROID_SERIAL", "THREE")
    with pytest.raises(AdbError, match=r"ANDROID_SERIAL=THREE: no such phone.*phones: ONE, TWO"):
        open_phone(client)
    monkeypatch.setenv("ANDROID_SERIAL", "")
    with pytest.raises(AdbError, match="2 phones are attached"):
        open_phone(client)


@pytest.mark.parametrize(
    ("states", "serial", "message"),
    [
        ({}, None, "no phone is attached; enable USB debugging"),
        ({}, "A; reboot", "A; reboot: no such phone is attached; attached phones: none"),
        ({"X": "unauthorized"}, None, "X: the phone is unauthorized; unlock the phone and accept"),
        ({"X": "offline"}, "X", "X: the phone is offline; plug the phone in again"),
        ({"X": "no permissions"}, None, "X: the phone cannot be opened by this user.*udev"),
        ({"X": "rescue"}, None, "X: the phone is in rescue mode; restart the phone into Android"),
        ({"X": "connecting"}, None, "X: the phone is connecting; wait"),
        ({"X": "host"}, None, "see `adb devices -l`"),
        ({"X": "offline", "Y": "unauthorized"}, None, "2 phones are attached"),
    ],
)
def test_an_unusable_phone_has_a_remedy(states, serial, message):
    with pytest.raises(AdbError, match=message):
        open_phone(FakeClient(states=states), serial)


def test_a_dead_server_is_an_adb_error():
    with pytest.raises(AdbError, match=r"adb: the connection to the adb server was lost"):
        attached_phones(FakeClient(down=True))


@pytest.mark.parametrize(
    ("fake_method", "method", "arguments", "options"),
    [
        (FakeDevice.shell2, adbutils.AdbDevice.shell2, ["true"], {"timeout": 1.0, "v2": True}),
        (FakeDevice.push, Sync.push, [Path("here"), "/there", 0o755], {}),
        (FakeDevice.pull, Sync.pull, ["/there", "here"], {}),
        (FakeDevice.stat, Sync.stat, ["/there"], {}),
        (FakeClient.list, adbutils.AdbClient.list, [], {"extended": True}),
        (FakeClient.device, adbutils.AdbClient.device, ["SERIAL01"], {}),
        (FakeClient.device, adbutils.AdbClient.device, [], {"transport_id": 1}),
    ],
)
def test_the_fake_has_the_signatures_of_adbutils(fake_method, method, arguments, options):
    for callee in (fake_method, method):
        inspect.signature(callee).bind(None, *arguments, **options)
