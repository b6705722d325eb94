import numpy as np
import pytest

from device.fidelity import compare_images
from lightfield.errors import DeviceError


def image(value: float, spot: float | None = None) -> dict[str, np.ndarray]:
    pixels = np.full((1, 3, 4, 4), value, np.float32)
    if spot is not None:
        pixels[0, 0, 0, 0] = spot
    return {"rgb": pixels}


def test_equal_images_have_no_error():
    near = compare_images([image(0.5)], [image(0.5)], 60)
    assert (near.psnr_db, near.max_error, near.holds) == (None, 0, True)


def test_the_worst_image_counts():
    found = [image(0.5), image(0.5 + 1e-2)]
    near = compare_images(found, [image(0.5), image(0.5)], 45)
    assert near.psnr_db == pytest.approx(40, abs=0.01)  # -20 log10(0.01)
    assert near.images == 2
    assert not near.holds
    assert compare_images(found, [image(0.5), image(0.5)], 40 - 1e-3).holds


def test_the_largest_error_is_that_of_one_color():
    assert compare_images([image(0, spot=0.7)], [image(0)], 20).max_error == pytest.approx(0.7)


@pytest.mark.parametrize("wrong", [{"rgb": np.zeros((1, 3, 4, 5))}, image(np.nan), image(np.inf)])
def test_invalid_images_are_refused(wrong):
    with pytest.raises(DeviceError, match=r"the output (has shape|contains)"):
        compare_images([wrong], [image(0.5)], 60)
