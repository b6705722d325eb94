import os

import pytest

from device.adb import AdbPhone
from device.phone_settings import NOTE_PREFIX, measurement_settings, restore_leftovers
from lightfield.errors import AdbError


@pytest.fixture
def phone(fake):
    return AdbPhone(fake, fake.serial)


def stays_on(fake) -> str | None:
    path = fake.state / "setting_global_stay_on_while_plugged_in"
    return path.read_text().strip() if path.exists() else None


def note_of(fake, pid: int) -> None:
    path = fake.root / f"{NOTE_PREFIX}old".lstrip("/")
    path.write_text(f"# {pid}\nsettings put global stay_on_while_plugged_in 3\n")


def test_a_note_lies_on_the_phone_while_its_settings_are_changed(phone, fake):
    with measurement_settings(phone, api=34):
        assert stays_on(fake) == "7"
        (note,) = fake.files()
        text = (fake.root / "data/local/tmp" / note).read_text()
        assert text.splitlines()[1:] == [
            "cmd power set-fixed-performance-mode-enabled false",
            "input keyevent KEYCODE_SLEEP",
            "settings delete global stay_on_while_plugged_in",
        ]
    assert stays_on(fake) is None
    assert fake.files() == []


def test_the_phone_puts_back_what_we_cannot(phone, fake):
    def lose() -> None:
        fake.lost_after = len(fake.commands)
        phone.shell(["true"])

    with pytest.raises(AdbError, match="no longer attached"), measurement_settings(phone, api=34):
        lose()
    assert stays_on(fake) is None
    assert (fake.state / "fixed_performance").read_text() == "false\n"
    assert fake.files() == []


def test_a_note_that_lost_its_guard_is_carried_out_first(phone, fake):
    note_of(fake, pid=2**22 + 1)  # above any process's number
    with measurement_settings(phone, api=34):
        assert stays_on(fake) == "7"
    assert stays_on(fake) == "3"
    assert fake.files() == []


def test_a_note_whose_guard_still_waits_is_left_to_it(phone, fake):
    note_of(fake, pid=os.getpid())
    assert restore_leftovers(phone) == 0
    assert stays_on(fake) is None
    assert fake.files() == ["nelf-restore-old"]


def test_a_setting_that_the_phone_takes_and_ignores_is_told(phone, fake):
    (fake.state / "settings_are_ignored").touch()
    with measurement_settings(phone, api=34) as applied:
        assert applied == {"stays_on": False, "screen_on": True, "fixed_performance": True}
    assert fake.files() == []


def test_an_old_value_that_does_not_come_back_is_told(phone, fake):
    (fake.state / "setting_global_stay_on_while_plugged_in").write_text("3\n")
    changed = measurement_settings(phone, api=34)
    with pytest.raises(AdbError, match="restore these settings: stay on while"), changed:
        (fake.state / "settings_are_ignored").touch()


def test_a_phone_that_takes_no_note_is_not_changed(phone, fake):
    folder = fake.root / "data/local/tmp"
    folder.rmdir()
    with measurement_settings(phone, api=34) as applied:
        assert not any(applied.values())
    calls = (fake.state / "calls").read_text()
    assert " put " not in calls
    assert "KEYCODE" not in calls
