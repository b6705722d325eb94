import pytest
from fake_phone import TRANSCRIPTS

from device.processor import parse_cpuinfo


@pytest.mark.parametrize(
    ("transcript", "name", "cores", "chip"),
    [
        ("cpuinfo_arm64_linux5", "4x Cortex-A510 + 4x Cortex-A715 + 1x Cortex-X3", 9, None),
        (
            "cpuinfo_arm64_linux4",
            "2x Kryo 4xx Silver + 1x Kryo 4xx Gold",
            3,
            "Qualcomm Technologies, Inc SM7150",
        ),
        ("cpuinfo_x86", "Intel(R) Core(TM) i5-8250U CPU @ 1.60GHz", 2, None),
    ],
)
def test_processors_have_names(transcript, name, cores, chip):
    processor = parse_cpuinfo((TRANSCRIPTS / f"{transcript}.txt").read_text())
    assert (str(processor), len(processor.cores), processor.chip) == (name, cores, chip)


def test_an_unknown_core_is_named_by_its_numbers():
    assert str(parse_cpuinfo("processor\t: 0\nCPU implementer\t: 0x53\nCPU part\t: 0x005\n")) == (
        "core 0x53/0x005"
    )


def test_the_part_number_has_priority_over_the_model_name():
    text = "processor\t: 0\nmodel name\t: ARMv8 Processor rev 0 (v8l)\n"
    assert str(parse_cpuinfo(text)) == "ARMv8 Processor rev 0 (v8l)"
    numbered = f"{text}CPU implementer\t: 0x41\nCPU part\t: 0xd4e\n"
    assert str(parse_cpuinfo(numbered)) == "Cortex-X3"


def test_an_empty_cpuinfo_is_an_unknown_processor():
    assert str(parse_cpuinfo("")) == "unknown processor"
