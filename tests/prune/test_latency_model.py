import json
from dataclasses import replace
from random import Random

import pytest

from lightfield.errors import BudgetError, ConfigError
from lightfield.student import StudentSpec, mobile_r2l_spec
from prune.architecture import Shape
from prune.latency_model import Choices, LatencyTable, build_latency_table

DENSE = mobile_r2l_spec((2, 2), stream_width=96, blocks=6, tail_widths=(32, 16), norm="none")
CHOICES = Choices.of(DENSE, multiple=16, smallest_share=0.5, streams=5, inners=8, points=4)


def additive_ms(spec: StudentSpec) -> float:
    """A latency to which every part adds its own, and in which aligned widths are faster."""
    total, pixels, before = 0.3, 1, spec.input_channels
    shape = Shape.of(spec)
    for c, (width, inner) in enumerate(zip(shape.widths, shape.blocks, strict=True)):
        pixels *= 1 if c == 0 else 4
        total += 1e-5 * pixels * before * width
        total += sum(
            pixels * (0.02 + 1e-5 * width * i * (1.0 if i % 32 == 0 else 1.3)) for i in inner
        )
        before = width
    return total


def table_of(latency=additive_ms) -> LatencyTable:
    return build_latency_table(DENSE, CHOICES, lambda specs: [latency(spec) for spec in specs])


def random_spec(seed: int) -> StudentSpec:
    random = Random(seed)
    widths = random.choice(CHOICES.width_sets())
    dense = Shape.of(DENSE)
    blocks = tuple(
        tuple(random.choice((0, *CHOICES.inner[c])) for _ in chain)
        for c, chain in enumerate(dense.blocks)
    )
    return Shape(widths, blocks, random.choice(CHOICES.samplings)).applied_to(DENSE)


def test_additive_latencies_are_recovered_exactly():
    table = table_of()
    for seed in range(20):
        spec = random_spec(seed)
        assert table.predict_ms(spec) == pytest.approx(additive_ms(spec), rel=1e-9)


def test_the_least_latency_is_the_narrowest_student_chain_by_chain():
    table = table_of()
    narrowest = Shape((48, 16, 16), ((), (), ()))
    for c, floor_ms in enumerate(table.floor_ms):
        cut = Shape(narrowest.widths[: c + 1], narrowest.blocks[: c + 1]).applied_to(DENSE)
        assert len(cut.tail) == c
        assert floor_ms == pytest.approx(additive_ms(cut))
    assert table.floor_ms[-1] == pytest.approx(table.predict_ms(narrowest.applied_to(DENSE)))


def test_the_part_with_most_of_the_least_latency_is_named():
    table = replace(table_of(), floor_ms=(1.0, 1.5, 4.0))
    assert table.floor_part() == ("tail stage 2", 2.5 / 4)
    assert replace(table, floor_ms=(3.0, 3.5, 4.0)).floor_part() == ("the head", 3 / 4)


def test_noisy_probes_still_predict_within_a_few_percent():
    random = Random(0)
    table = table_of(lambda spec: additive_ms(spec) * random.gauss(1, 0.02))
    errors = sorted(
        abs(table.predict_ms(spec) / additive_ms(spec) - 1) for spec in map(random_spec, range(40))
    )
    assert errors[20] < 0.05
    assert all(ms > 0 for ms in table.block_ms.values())


def test_a_block_is_never_free():
    table = table_of(lambda spec: 1.0)
    assert all(ms > 0 for ms in table.block_ms.values())


def test_measurements_correct_scale_and_offset():
    table = table_of()

    def real_ms(spec):
        return 1.4 * additive_ms(spec) + 0.5

    specs = [DENSE, *map(random_spec, range(12))]
    once = table.corrected(DENSE, real_ms(DENSE))
    assert once.offset_ms == pytest.approx(0, abs=1e-9)
    assert once.predict_ms(DENSE) == pytest.approx(real_ms(DENSE))
    for spec in specs:
        table = table.corrected(spec, real_ms(spec))
    for spec in map(random_spec, range(100, 120)):
        assert table.predict_ms(spec) == pytest.approx(real_ms(spec), rel=0.03)
    assert table.parts_ms_for(table.predict_ms(DENSE)) == pytest.approx(table.parts_ms(DENSE))


def test_noise_of_equal_students_leaves_the_offset_at_zero():
    table = table_of()
    for ms in (5.0, 5.5, 4.5, 5.2):
        table = table.corrected(DENSE, ms)
    assert abs(table.offset_ms) < 0.1 * 5
    assert table.predict_ms(DENSE) == pytest.approx(5.0, rel=0.05)


def test_contradictory_measurements_never_give_a_negative_scale():
    table, small = table_of(), random_spec(3)
    for _ in range(5):
        table = table.corrected(DENSE, 1.0).corrected(small, 30.0)
    assert table.scale > 0
    assert table.predict_ms(DENSE) > table.predict_ms(small)


@pytest.mark.parametrize(
    "spec",
    [
        replace(DENSE, stream_width=100),
        replace(DENSE, inner_widths=(96, 17)),
        replace(DENSE, tail=DENSE.tail[:1]),
    ],
)
def test_a_part_that_was_not_measured_is_refused(spec):
    with pytest.raises(BudgetError, match="no entry"):
        table_of().predict_ms(spec)


def test_json_and_back():
    table = table_of().corrected(DENSE, 9.0).corrected(random_spec(1), 4.0)
    assert LatencyTable.from_json(json.loads(json.dumps(table.to_json()))) == table


def test_every_choice_is_dense_or_a_multiple():
    for multiple, streams, inners in ((16, 5, 8), (32, 3, 4), (8, 9, 2)):
        spec = replace(DENSE, stream_width=100, inner_widths=(100, 60))
        choices = Choices.of(
            spec, multiple=multiple, smallest_share=0.4, streams=streams, inners=inners, points=4
        )
        for dense, widths in zip(Shape.of(spec).widths, choices.widths, strict=True):
            assert widths[0] == dense
            assert all(w == dense or (w % multiple == 0 and w >= multiple) for w in widths)
            assert len(widths) <= streams
            assert widths[-1] >= min(dense, 0.4 * dense)
        assert {100, 60} <= set(choices.inner[0])
        assert all(w in (100, 60) or w % multiple == 0 for w in choices.inner[0])
        assert list(choices.inner[0]) == sorted(choices.inner[0], reverse=True)


def test_few_choices_still_span_the_range():
    choices = Choices.of(
        mobile_r2l_spec(), multiple=16, smallest_share=0.5, streams=5, inners=8, points=4
    )
    assert choices.widths[0] == (256, 240, 208, 160, 128)
    assert choices.widths[1:] == ((64, 48, 32), (64, 48, 32), (16,))
    assert choices.inner[0][0] == 256
    assert choices.inner[0][-1] == 16
    assert len(choices.inner[0]) == 8
    assert len(choices.width_sets()) == 15


def test_widths_below_the_multiple_stay():
    spec = mobile_r2l_spec((2,), stream_width=24, blocks=1, tail_widths=(8,))
    choices = Choices.of(spec, multiple=16, smallest_share=0.5, streams=5, inners=8, points=4)
    assert choices.widths == ((24, 16), (8,))
    assert choices.inner == ((24, 16), (8,))


def test_the_number_of_probes_of_the_tiny_and_the_paper_network():
    asked = []
    build_latency_table(
        DENSE, CHOICES, lambda specs: asked.append(len(specs)) or [1.0] * len(specs)
    )
    paper = mobile_r2l_spec()
    choices = Choices.of(paper, multiple=16, smallest_share=0.5, streams=5, inners=8, points=4)
    build_latency_table(
        paper, choices, lambda specs: asked.append(len(specs)) or [1.0] * len(specs)
    )
    assert asked == [48, 97]


def test_a_shape_with_more_chains_than_the_student_is_refused():
    with pytest.raises(ConfigError, match="chains"):
        Shape((1, 2, 3, 4), ((), (), (), ())).applied_to(DENSE)
