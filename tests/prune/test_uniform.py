import pytest

from lightfield.student import mac_count, mobile_r2l_spec
from prune.architecture import Shape, uniform_shapes

PAPER = mobile_r2l_spec(norm="none")


@pytest.mark.parametrize("kind", ["width", "depth", "both"])
def test_shapes_decrease_from_the_student_itself(kind):
    shapes = uniform_shapes(PAPER, kind, multiple=16)
    assert shapes[0] == Shape.of(PAPER)
    macs = [mac_count(shape.applied_to(PAPER), 10, 10) for shape in shapes]
    assert macs == sorted(macs, reverse=True)
    assert len(set(shapes)) == len(shapes)
    for shape in shapes:
        for width in (*shape.widths, *(inner for chain in shape.blocks for inner in chain)):
            assert width % 16 == 0


def test_width_narrows_all_alike_and_depth_keeps_evenly_spaced_blocks():
    half = uniform_shapes(PAPER, "width", multiple=16)[8]
    assert half.widths == (128, 32, 32, 16)
    assert half.blocks[0] == (128,) * 29
    assert half.blocks[1:] == ((32, 32), (32, 32), (16, 16))
    few = uniform_shapes(PAPER, "depth", multiple=16)[26]
    assert few.widths == Shape.of(PAPER).widths
    assert [i for i, inner in enumerate(few.blocks[0]) if inner] == [0, 14, 28]


def test_both_narrows_and_shortens_by_the_same_factor():
    shape = uniform_shapes(PAPER, "both", multiple=16)[15]
    assert sum(map(bool, shape.blocks[0])) == 14
    assert shape.widths[0] == 128
