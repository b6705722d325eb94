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


def test_a_note_is_on_the_phone_while_settings_are_changed(phone, fake):
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


def test_the_guard_restores_settings_after_a_lost_connection(phone, fake):
    def lose() -> None:
        fake.lost_after = len(fake.commands)
        phone.shell(["true"])

    with pytest.raises(AdbError, match="no longer attached"), measurement_settings(phone, api=34):
        lose()
    assert stays_on(fake) is None
    assert (fake.state / "fixed_performance").read_text() == "false\n"
    assert fake.files() == []


def test_a_note_without_a_guard_is_executed_first(phone, fake):
    note_of(fake, pid=2**22 + 1)  # larger than any process id
    with measurement_settings(phone, api=34):
        assert stays_on(fake) == "7"
    assert stays_on(fake) == "3"
    assert fake.files() == []


def test_a_note_with_a_guard_is_left_alone(phone, fake):
    note_of(fake, pid=os.getpid())
    assert restore_leftovers(phone) == 0
    assert stays_on(fake) is None
    assert fake.files() == ["nelf-restore-old"]


def test_an_ignored_setting_is_recorded_as_not_applied(phone, fake):
    (fake.state / "settings_are_ignored").touch()
    with measurement_settings(phone, api=34) as applied:
        assert applied == {"stays_on": False, "screen_on": True, "fixed_performance": True}
    assert fake.files() == []


def test_a_setting_that_is_not_restored_is_an_error(phone, fake):
    (fake.state / "setting_global_stay_on_while_plugged_in").write_text("3\n")
    changed = measurement_settings(phone, api=34)
    with pytest.raises(AdbError, match="restore these settings: stay on while"), changed:
        (fake.state / "settings_are_ignored").touch()


def test_no_setting_is_changed_without_a_note(phone, fake):
    folder = fake.root / "data/local/tmp"
    folder.rmdir()
    with measurement_settings(phone, api=34) as applied:
        assert not any(applied.values())
    calls = (fake.state / "calls").read_text()
    assert " put " not in calls
    assert "KEYCODE" not in calls
