import pytest

from device.target_config import TargetConfig
from lightfield.errors import ConfigError


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"threads": 0}, "threads: 0 is out of range"),
        ({"target": "host", "serial": "X"}, "the target is this machine"),
        ({"provider_options": ("fast",)}, "'fast' is not KEY=VALUE"),
    ],
)
def test_impossible_settings_are_refused(fields, message):
    with pytest.raises(ConfigError, match=message):
        TargetConfig(**fields)


def test_defaults_of_a_provider_can_be_overridden():
    assert TargetConfig().options_by_name() == {}
    assert TargetConfig(provider="xnnpack", threads=3).options_by_name() == {
        "intra_op_num_threads": "3"
    }
    options = ("backend_path=libQnnGpu.so", "flags=a=b")
    assert TargetConfig(provider="qnn", provider_options=options).options_by_name() == {
        "backend_path": "libQnnGpu.so",
        "flags": "a=b",
    }


def test_a_protocol_contains_no_serial_number():
    config = TargetConfig(serial="SECRET", provider_options=("flags=1",))
    assert "SECRET" not in str(config.protocol())
