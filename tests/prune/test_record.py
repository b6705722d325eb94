import json
import math
from dataclasses import replace

import pytest
import torch
from fake_bench import DENSE, FakeTarget

from lightfield.errors import CheckpointError
from lightfield.student import Student
from prune.record import MEASUREMENTS, MeasurementRecord, measured_on, measurements_in, replayed

SMALL = replace(DENSE, inner_widths=(8,))


@pytest.fixture
def students():
    torch.manual_seed(0)
    return Student(DENSE), Student(SMALL)


def one(measure, student):
    (measured,) = measure([student])
    return measured


def recording(folder, target, position=0):
    return MeasurementRecord(folder / MEASUREMENTS, position, target)


def test_a_replay_serves_every_sample_again(tmp_path, students):
    record = recording(tmp_path, FakeTarget())
    measured = [
        one(record.measure, students[0]),
        one(record.measure, students[1]),
        one(record.measure, students[0]),
    ]
    table = record.time_specs([DENSE, SMALL])
    replay = replayed(tmp_path)
    again = [one(replay.measure, students[i]) for i in (0, 1, 0)]
    assert again == measured
    assert measured[0] != measured[2]
    assert replay.time_specs([DENSE, SMALL]) == table


def test_the_target_cleans_up_before_the_search_continues(tmp_path, students):
    """Its cleanup must not wait for garbage collection, which swallows an interruption."""
    ends = []

    class Target(FakeTarget):
        def measure(self, students):
            yield from super().measure(students)
            ends.append(len(students))

    record = recording(tmp_path, Target())
    one(record.measure, students[0])
    assert ends == [1]
    assert len(list(zip(students, record.measure(students), strict=True))) == 2
    assert ends == [1, 2]


def test_a_replay_that_asks_for_another_measurement_is_refused(tmp_path, students):
    one(recording(tmp_path, FakeTarget()).measure, students[0])
    replay = replayed(tmp_path)
    measure = replay.measure
    with pytest.raises(CheckpointError, match="recorded measurement 0 differs from the one"):
        one(measure, students[1])
    with pytest.raises(CheckpointError, match="differs from the one"):
        replay.time_specs([DENSE])
    one(measure, students[0])
    with pytest.raises(CheckpointError, match="ends after 1"):
        one(measure, students[0])


def test_a_resumed_record_serves_recorded_measurements_first(tmp_path, students):
    first = recording(tmp_path, FakeTarget())
    measured = [one(first.measure, students[0]), one(first.measure, students[1])]
    target = FakeTarget(draws=77)
    second = recording(tmp_path, target, position=1)
    assert one(second.measure, students[1]) == measured[1]
    assert target.asked == []
    new = one(second.measure, students[1])
    assert target.asked == ["measure"]
    assert one(recording(tmp_path, target, position=2).measure, students[1]) == new
    assert second.position == 3


def test_a_resumed_record_drops_measurements_that_are_not_asked_for(tmp_path, students):
    first = recording(tmp_path, FakeTarget())
    for student in (students[0], students[1], students[0]):
        one(first.measure, student)
    target = FakeTarget(draws=77)
    second = recording(tmp_path, target, position=1)
    one(second.measure, students[0])
    assert target.asked == ["measure"]
    assert second.position == 2
    assert len((tmp_path / MEASUREMENTS).read_text().splitlines()) == 2


def test_a_line_that_was_cut_off_is_ignored(tmp_path, students):
    first = recording(tmp_path, FakeTarget())
    kept = one(first.measure, students[0])
    one(first.measure, students[1])
    path = tmp_path / MEASUREMENTS
    path.write_bytes(path.read_bytes()[:-40])
    target = FakeTarget(draws=5)
    record = recording(tmp_path, target)
    assert one(record.measure, students[0]) == kept
    new = one(record.measure, students[1])
    assert target.asked == ["measure"]
    measure = replayed(tmp_path).measure
    assert (one(measure, students[0]), one(measure, students[1])) == (kept, new)


def test_a_replay_continues_after_the_first_measurements(tmp_path, students):
    record = recording(tmp_path, FakeTarget())
    _, second = (one(record.measure, student) for student in students)
    measure = replayed(tmp_path, measurements_in(tmp_path) - 1).measure
    assert one(measure, students[1]) == second


@pytest.fixture
def lines(tmp_path, students) -> list[str]:
    """A record of two measurements: a comparison, and a table of two students."""
    record = recording(tmp_path, FakeTarget())
    one(record.measure, students[0])
    record.time_specs([DENSE, SMALL])
    return (tmp_path / MEASUREMENTS).read_text().splitlines()


def spoilt(line: str, *path: str | int, value: object) -> str:
    """A line with another value at one place."""
    entry = place = json.loads(line)
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    return json.dumps(entry)


ODD = [math.nan, math.inf, -math.inf, 0.0, -1.0, "1", None, True, [1.0], {}]
TABLE = [[], [1.0], [1.0] * 3, "11", 1.0, None, {"0": 1.0, "1": 1.0}, [10**400, 1.0]]
TABLE += [[1.0, odd] for odd in ODD]
MALFORMED = [
    "no json",
    "[1]",
    "",
    "null",
    "NaN",
    "[" * 100_000,
    "1" * 5000,
    "{}",
    '{"kind": "table"}',
]


def refused(folder, lines: list[str]) -> str:
    (folder / MEASUREMENTS).write_text("".join(f"{line}\n" for line in lines))
    with pytest.raises(CheckpointError) as error:
        replayed(folder)
    with pytest.raises(CheckpointError):
        measured_on(folder)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("median_ms", TABLE, ids=lambda value: repr(value)[:20])
def test_a_malformed_table_is_refused_with_its_line(tmp_path, lines, median_ms, unchecked):
    text = refused(tmp_path, [lines[0], spoilt(lines[1], "median_ms", value=median_ms)])
    assert f"{MEASUREMENTS}, line 2: not a measurement (" in text


@pytest.mark.parametrize("sample", ODD, ids=repr)
@pytest.mark.parametrize("side", ["candidate", "reference"])
def test_a_malformed_comparison_is_refused_with_its_line(tmp_path, lines, side, sample, unchecked):
    text = refused(tmp_path, [spoilt(lines[0], side, "samples_ms", 0, value=sample), lines[1]])
    assert f"{MEASUREMENTS}, line 1: not a measurement (" in text


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("kind",), "other"),
        (("specs",), []),
        (("specs",), 1),
        (("candidate",), {}),
        (("candidate",), None),
        (("candidate", "device"), "phone"),
        (("candidate", "device", "kind"), 1),
        (("candidate", "device", "threads"), "1"),
        (("candidate", "device", "color"), "red"),
        (("candidate", "samples_ms"), []),
        (("candidate", "samples_ms"), [1.0]),
    ],
)
def test_other_malformed_measurements_are_refused(tmp_path, lines, path, value, unchecked):
    assert "line 1: not a measurement (" in refused(
        tmp_path, [spoilt(lines[0], *path, value=value)]
    )


@pytest.mark.parametrize("line", MALFORMED, ids=lambda line: line[:20])
def test_a_line_that_is_not_a_measurement_is_refused(tmp_path, lines, line, unchecked):
    assert "line 3: not a measurement (" in refused(tmp_path, [*lines, line])


def test_a_binary_record_is_refused(tmp_path):
    (tmp_path / MEASUREMENTS).write_bytes(b"\xff\xfe\n")
    with pytest.raises(CheckpointError, match="cannot be read as"):
        replayed(tmp_path)


def test_a_missing_or_too_short_record_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="no recorded measurements"):
        replayed(tmp_path)
    with pytest.raises(CheckpointError, match="has 0 measurements, but the search has used 3"):
        recording(tmp_path, FakeTarget(), position=3)
