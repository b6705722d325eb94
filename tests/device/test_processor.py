import pytest
from fake_phone import TRANSCRIPTS

from device.processor import parse_cpuinfo


@pytest.mark.parametrize(
    ("transcript", "name", "cores", "chip"),
    [
        ("cpuinfo_arm64_linux5", "4x Cortex-A510 + 4x Cortex-A715 + 1x Cortex-X3", 9, None),
        (
            "cpuinfo_arm64_linux4",
            "2x core 0x51/0x805 + 1x core 0x51/0x804",
            3,
            "Qualcomm Technologies, Inc SM7150",
        ),
        ("cpuinfo_x86", "Intel(R) Core(TM) i5-8250U CPU @ 1.60GHz", 2, None),
    ],
)
def test_processors_call_themselves(transcript, name, cores, chip):
    processor = parse_cpuinfo((TRANSCRIPTS / f"{transcript}.txt").read_text())
    assert (str(processor), len(processor.cores), processor.chip) == (name, cores, chip)


def test_an_empty_cpuinfo_is_an_unknown_processor():
    assert str(parse_cpuinfo("")) == "unknown processor"
