from dataclasses import replace

import pytest
import torch
from fake_bench import DENSE, FakeTarget

from lightfield.errors import CheckpointError
from lightfield.student import Student
from prune.measurements import MEASUREMENTS, MeasurementRecord, replayed

SMALL = replace(DENSE, inner_widths=(8,))


@pytest.fixture
def students():
    torch.manual_seed(0)
    return Student(DENSE), Student(SMALL)


def one(measure, student):
    (measured,) = measure([student])
    return measured


def recording(folder, target, position=0):
    return MeasurementRecord(folder / MEASUREMENTS, position, target.measure, target.time_specs)


def test_what_was_measured_is_served_again_with_every_sample(tmp_path, students):
    record = recording(tmp_path, FakeTarget())
    measured = [
        one(record.measure, students[0]),
        one(record.measure, students[1]),
        one(record.measure, students[0]),
    ]
    table = record.time_specs([DENSE, SMALL])
    measure, time_specs = replayed(tmp_path)
    again = [one(measure, students[0]), one(measure, students[1]), one(measure, students[0])]
    assert again == measured
    assert measured[0] != measured[2]
    assert time_specs([DENSE, SMALL]) == table


def test_the_target_cleans_up_before_the_search_goes_on(tmp_path, students):
    """Not when it is collected as garbage, where an interruption is ignored."""
    ends = []

    def measure(asked):
        yield from FakeTarget().measure(asked)
        ends.append(len(asked))

    record = MeasurementRecord(tmp_path / MEASUREMENTS, 0, measure, FakeTarget().time_specs)
    one(record.measure, students[0])
    assert ends == [1]
    assert len(list(zip(students, record.measure(students), strict=True))) == 2
    assert ends == [1, 2]


def test_a_replay_that_asks_for_something_else_is_refused(tmp_path, students):
    one(recording(tmp_path, FakeTarget()).measure, students[0])
    measure, time_specs = replayed(tmp_path)
    with pytest.raises(CheckpointError, match=r"measurement 0 .* another one"):
        one(measure, students[1])
    with pytest.raises(CheckpointError, match="another one"):
        time_specs([DENSE])
    one(measure, students[0])
    with pytest.raises(CheckpointError, match="ends after 1"):
        one(measure, students[0])


def test_a_resumed_record_serves_before_it_measures(tmp_path, students):
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


def test_a_resumed_record_forgets_what_is_no_longer_asked_for(tmp_path, students):
    first = recording(tmp_path, FakeTarget())
    for student in (students[0], students[1], students[0]):
        one(first.measure, student)
    target = FakeTarget(draws=77)
    second = recording(tmp_path, target, position=1)
    one(second.measure, students[0])
    assert target.asked == ["measure"]
    assert second.position == 2
    assert len((tmp_path / MEASUREMENTS).read_text().splitlines()) == 2


def test_a_line_that_was_cut_never_happened(tmp_path, students):
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
    measure, _ = replayed(tmp_path)
    assert (one(measure, students[0]), one(measure, students[1])) == (kept, new)


@pytest.mark.parametrize("text", ["no json\n", "[1]\n", b"\xff\xfe\n"])
def test_a_foreign_record_is_refused(tmp_path, text):
    path = tmp_path / MEASUREMENTS
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(CheckpointError, match="not a record"):
        replayed(tmp_path)


def test_a_damaged_measurement_is_refused(tmp_path, students, unchecked):
    one(recording(tmp_path, FakeTarget()).measure, students[0])
    path = tmp_path / MEASUREMENTS
    path.write_text(path.read_text().replace('"samples_ms": [', '"samples_ms": [-'))
    with pytest.raises(CheckpointError, match="measurement 0 cannot be read"):
        one(replayed(tmp_path)[0], students[0])


def test_a_missing_or_too_short_record_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="no measurements"):
        replayed(tmp_path)
    with pytest.raises(CheckpointError, match="holds 0 measurements where the search has seen 3"):
        recording(tmp_path, FakeTarget(), position=3)
