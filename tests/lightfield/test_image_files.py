"""Lookup of image files by name, symbolic links, and decoding of image formats."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from noise_scenes import edit, noise_image, write_scene
from PIL import Image

from lightfield.errors import SceneError
from lightfield.scenes.assembly import SceneChoice
from lightfield.scenes.decoding import decode, decode_mask, read_header
from lightfield.scenes.formats import load_scene_folder, read_capture
from lightfield.scenes.image_files import ImageFinder, MissingImageError
from lightfield.scenes.images import read_image_format, read_images


def save(path: Path, pixels: np.ndarray | Image.Image, **options: Any) -> Path:
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, **options)
    return path


def noise(height: int = 6, width: int = 8) -> np.ndarray:
    return noise_image(3, width, height)[..., :3]


def decoded(path: Path) -> np.ndarray:
    """The pixels of a file, decoded in the way that a scene's images are decoded."""
    common = read_image_format([path])
    pixels, _ = decode(
        path, (common.width, common.height), with_alpha=common.has_alpha, upright=common.upright
    )
    return pixels


@pytest.mark.parametrize(
    ("existing", "name"),
    [
        ("train/a b%20.png", "train/a b%20"),
        ("train/a.png", "./train/a.png"),
        ("train/a.png", ".\\train\\a.png"),
        ("train/a.PNG", "train/a.png"),
        ("train/A.JPG", "train/a"),
        ("train/a.tif", "train/a"),
        ("train/a.v2.webp", "train/a.v2"),
        ("train/a.png", "{root}/train/a.png"),
    ],
)
def test_names_may_differ_in_suffix_case_and_separators(tmp_path, existing, name):
    path = save(tmp_path / existing, noise())
    finder = ImageFinder(tmp_path)
    assert finder.find(name.replace("{root}", str(tmp_path)), where="json") == path
    assert finder.notes() == []


@pytest.mark.parametrize("name", ["1.png", "1.heic"])
def test_a_note_mentions_files_with_another_suffix(tmp_path, name):
    path = save(tmp_path / "images" / "1.jpg", noise())
    (tmp_path / "images" / "1.HEIC").write_bytes(b"")
    finder = ImageFinder(tmp_path)
    assert finder.find(f"images/{name}", where="json") == path
    assert finder.notes() == [
        "1 image files have another suffix than the scene states, for example 1.jpg instead of "
        f"{name}"
    ]


def test_a_note_mentions_names_that_match_several_files(tmp_path):
    for suffix in (".jpg", ".png", ".bmp"):
        save(tmp_path / f"1{suffix}", noise())
    finder = ImageFinder(tmp_path)
    assert finder.find("1", where="json").name == "1.png"
    assert "for example 1, for which 1.png is read" in finder.notes()[0]
    assert finder.find("1.jpg", where="json").name == "1.jpg"


@pytest.mark.parametrize("name", ["images/1.png", "images/1"])
def test_the_error_for_a_missing_image_names_a_file_of_an_unread_format(tmp_path, name):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "1.HEIC").write_bytes(b"")
    with pytest.raises(MissingImageError, match=r"1.HEIC exists, but HEIC files are not read"):
        ImageFinder(tmp_path).find(name, where="json")


def test_links_within_the_users_own_folders_are_followed(tmp_path):
    folder = write_scene(tmp_path / "cache" / "snapshots" / "scene", train=3, test=2)
    store = tmp_path / "cache" / "blobs"
    store.mkdir()
    for image in folder.glob("*/*.png"):
        blob = store / f"{image.parent.name}{image.stem}"
        image.rename(blob)
        image.symlink_to(os.path.relpath(blob, image.parent))
    capture = read_capture(folder)
    assert len(capture.splits["train"]) == 3
    assert any(
        "5 image files are links to files outside the scene folder" in n for n in capture.notes
    )
    views = load_scene_folder(folder, SceneChoice()).train
    assert views.names == ("train/r_0.png", "train/r_1.png", "train/r_2.png")
    np.testing.assert_array_equal(views.alpha[1], noise_image(1, 8, 8)[..., 3])  # type: ignore


@pytest.mark.parametrize("name", ["link.png", "away/outside.png"])
def test_links_out_of_the_users_own_folders_are_refused(tmp_path, name):
    save(tmp_path / "outside.png", noise(8, 8))
    folder = write_scene(tmp_path / "toy", train=2, test=1)
    (folder / "link.png").symlink_to(tmp_path / "outside.png")
    (folder / "away").symlink_to(tmp_path)
    edit(folder, lambda d: d["frames"][1].update(file_path=name))
    read_capture(folder)
    tmp_path.chmod(0o777)  # the common folder is now writable by everybody, as /tmp is
    with pytest.raises(SceneError, match=r"frame 1: .* is a link to .*outside your own folders"):
        read_capture(folder)


def test_a_dangling_link_is_a_missing_image(tmp_path):
    (tmp_path / "1.png").symlink_to(tmp_path / "gone.png")
    (tmp_path / "2.png").symlink_to(tmp_path / "2.png")
    with pytest.raises(MissingImageError):
        ImageFinder(tmp_path).find("1", where="json")
    with pytest.raises(SceneError):
        ImageFinder(tmp_path).find("2.png", where="json")


def test_pipes_and_folders_are_refused_without_blocking(tmp_path):
    folder = write_scene(tmp_path, train=2, test=1)
    (folder / "train" / "r_1.png").unlink()
    os.mkfifo(folder / "train" / "r_1.png")
    with pytest.raises(SceneError, match=r"r_1.png: the image is not a regular file"):
        read_capture(folder)
    with pytest.raises(SceneError, match=r"not a regular file"):
        read_header(folder / "train" / "r_1.png")
    (folder / "train" / "r_1.png").unlink()
    (folder / "train" / "r_1.png").mkdir()
    with pytest.raises(SceneError, match=r"r_1.png: the image is not a regular file"):
        read_capture(folder)


def test_16_bit_gray_is_scaled(tmp_path):
    deep = np.array([[0, 128, 257, 32768], [65535, 65407, 1, 256]], np.uint16)
    for suffix in (".png", ".tif"):
        pixels = decoded(save(tmp_path / f"deep{suffix}", deep))
        np.testing.assert_array_equal(pixels[..., 0], [[0, 0, 1, 128], [255, 255, 0, 1]])
        np.testing.assert_array_equal(pixels[..., 0], pixels[..., 2])


def test_bilevel_gray_and_palette_images_are_read(tmp_path):
    bits = np.indices((4, 4)).sum(0) % 2 == 0
    np.testing.assert_array_equal(
        decoded(save(tmp_path / "bits.png", bits))[..., 1], np.where(bits, 255, 0)
    )
    gray = noise()[..., 0]
    np.testing.assert_array_equal(decoded(save(tmp_path / "gray.png", gray))[..., 2], gray)
    palette = Image.fromarray(noise()).quantize(256)
    expected = np.asarray(palette.convert("RGB"))
    for suffix in (".png", ".gif", ".bmp"):
        path = save(tmp_path / f"palette{suffix}", palette)
        np.testing.assert_array_equal(decoded(path), expected)


def test_cmyk_is_read(tmp_path):
    red = Image.new("CMYK", (8, 8), (0, 255, 255, 0))
    for suffix in (".jpg", ".tif"):
        pixels = decoded(save(tmp_path / f"red{suffix}", red))
        assert np.abs(pixels.astype(int) - (254, 0, 0)).max() < 4


def test_all_kinds_of_transparency_are_read(tmp_path):
    gray_alpha = noise_image(2, 8, 6)[..., :2]
    pixels = decoded(save(tmp_path / "la.png", Image.fromarray(gray_alpha)))
    np.testing.assert_array_equal(pixels[..., [0, 3]], gray_alpha)
    keyed = Image.fromarray(np.array([[7, 9]], np.uint8))
    pixels = decoded(save(tmp_path / "key.png", keyed, transparency=9))
    np.testing.assert_array_equal(pixels[..., 3], [[255, 0]])
    deep = Image.fromarray(np.array([[700, 900]], np.uint16))
    pixels = decoded(save(tmp_path / "deep.png", deep, transparency=900))
    np.testing.assert_array_equal(pixels[0, :, 3], [255, 0] if pixels.shape[2] == 4 else [])


def test_pixel_formats_without_a_range_are_refused(tmp_path):
    path = save(tmp_path / "float.tif", np.ones((4, 4), np.float32))
    with pytest.raises(SceneError, match=r"float.tif: the pixel format F is not supported"):
        read_header(path)


def test_only_the_first_frame_of_an_animation_is_read(tmp_path):
    first, second = (Image.fromarray(noise_image(i, 8, 8)) for i in (1, 2))
    options = {"save_all": True, "append_images": [second], "lossless": True, "exact": True}
    path = save(tmp_path / "moving.webp", first, **options)
    notes = read_image_format([path]).notes
    assert notes == ("1 of 1 images are animations; only the first frame of each is read",)
    np.testing.assert_array_equal(decoded(path), np.asarray(first))


def test_errors_state_the_real_type_of_a_misnamed_file(tmp_path):
    (tmp_path / "a.jpg").write_bytes(b"\0\0\0\x18ftypheic" + bytes(80))
    (tmp_path / "b.png").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    with pytest.raises(SceneError, match=r"a.jpg: .*the type HEIC"):
        read_header(tmp_path / "a.jpg")
    with pytest.raises(SceneError, match=r"b.png: .*Git LFS pointer"):
        read_header(tmp_path / "b.png")


def rotated_jpeg(path: Path, orientation: int, height: int = 6, width: int = 8) -> Path:
    exif = Image.Exif()
    exif[0x0112] = orientation
    ramp = np.broadcast_to(np.linspace(0, 255, width), (height, width)).astype(np.uint8)
    return save(path, Image.fromarray(ramp), exif=exif, quality=100)


@pytest.mark.parametrize(
    ("described", "upright", "verb"),
    [
        (None, False, "not applied"),
        ((80, 60), False, "not applied, because the poses describe"),
        ((60, 80), True, "applied, because the poses describe images of the rotated size"),
    ],
)
def test_an_exif_rotation_is_applied_when_the_poses_describe_it(tmp_path, described, upright, verb):
    path = rotated_jpeg(tmp_path / "a.jpg", 6)
    common = read_image_format([path, path], described)
    assert (common.upright, (common.width, common.height)) == (
        upright,
        (6, 8) if upright else (8, 6),
    )
    assert f"2 of 2 images have an EXIF rotation, which is {verb}" in common.notes[0]
    size = (common.width, common.height)
    images, _, _ = read_images([path], common, size, (0.0, 0.0, 0.0))
    rising = images[0, :, 3, 0] if upright else images[0, 3, :, 0]
    assert rising[0] < 20
    assert rising[-1] > 235


def test_images_with_different_rotations_must_have_one_size(tmp_path):
    files = [rotated_jpeg(tmp_path / "a.jpg", 6), rotated_jpeg(tmp_path / "b.jpg", 1, 8, 6)]
    common = read_image_format(files)
    assert (common.upright, common.width, common.height) == (True, 6, 8)
    assert (
        "1 of 2 images have an EXIF rotation, which is applied, because all images have the same"
        in common.notes[0]
    )
    with pytest.raises(SceneError, match=r"b.jpg: the image has 6 x 8 pixels, but a.jpg has 8 x 6"):
        read_image_format([*files, rotated_jpeg(tmp_path / "c.jpg", 1, 5, 7)])


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_exif_orientation_is_applied_as_by_pillow(tmp_path, orientation):
    from PIL import ImageOps

    path = rotated_jpeg(tmp_path / "a.jpg", orientation)
    with Image.open(path) as image:
        expected = np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    size = expected.shape[1::-1]
    pixels, _ = decode(path, size, with_alpha=False, upright=True)
    assert read_header(path).upright_size == size
    np.testing.assert_array_equal(pixels, expected)


def test_masks_of_all_pixel_formats_are_read_as_coverage(tmp_path):
    shape = np.indices((6, 8)).sum(0) % 3 == 0
    expected = np.where(shape, 255, 0)
    kinds = {
        "bits": Image.fromarray(shape),
        "labels": Image.fromarray(shape.astype(np.uint8)),
        "gray": Image.fromarray(expected.astype(np.uint8)),
        "color": Image.fromarray(expected.astype(np.uint8)).convert("RGB"),
    }
    for name, image in kinds.items():
        coverage, _ = decode_mask(save(tmp_path / f"{name}.png", image), (8, 6))
        np.testing.assert_array_equal(coverage, expected)
