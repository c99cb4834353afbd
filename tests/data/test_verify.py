import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from vocseg.data.dataset import Dataset
from vocseg.data.images import read_pair
from vocseg.data.verify import verify
from vocseg.errors import DataError

CLASSES = ("background", "cat", "dog")


class Folder:
    """Images and masks on the disk, to be taken apart by a test."""

    def __init__(self, root: Path):
        self.root = root
        self.shade = 0

    def add(self, name: str, size: tuple[int, int] = (6, 4), mask: np.ndarray | None = None) -> None:
        """Writes an image like no other, and a mask that is void in one corner. `size` is (w, h)."""
        self.shade += 1
        Image.new("RGB", size, (self.shade, 0, 0)).save(self.image(name))
        if mask is None:
            mask = np.ones((size[1], size[0]), np.uint8)
            mask[0, 0] = 255
        Image.fromarray(mask).save(self.mask(name))

    def image(self, name: str) -> Path:
        return self.root / f"{name}-image.png"

    def mask(self, name: str) -> Path:
        return self.root / f"{name}-mask.png"

    def split(self, *names: str) -> Dataset:
        files = [(self.image(name), self.mask(name)) for name in names]
        return Dataset(CLASSES, names, lambda index: read_pair(*files[index], len(CLASSES)), files)


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    folder = Folder(tmp_path)
    for name in "abcd":
        folder.add(name)
    return folder


def test_sound_data_have_neither_problems_nor_remarks(folder):
    seen: list[tuple[int, int]] = []
    findings = verify({"train": folder.split("a", "b"), "val": folder.split("c", "d")}, lambda *p: seen.append(p))
    assert findings.problems == findings.remarks == ()
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]


def test_every_missing_file_is_reported_the_mask_of_a_missing_image_too(folder):
    gone = [folder.image("a"), folder.mask("a"), folder.mask("c")]
    for file in gone:
        file.unlink()
    findings = verify({"train": folder.split("a", "b"), "val": folder.split("c", "d")})
    assert [str(p) for p in findings.problems] == [f"{file}: no such file" for file in gone]


def test_unreadable_files_are_reported_each_once(folder):
    folder.image("a").write_bytes(b"no image")
    folder.mask("a").write_bytes(b"no mask")
    whole = folder.mask("b").read_bytes()
    folder.mask("b").write_bytes(whole[: len(whole) // 2])
    findings = verify({"train": folder.split("a", "b")})
    assert [p.where for p in findings.problems] == [
        str(folder.image("a")),
        str(folder.mask("a")),
        str(folder.mask("b")),
    ]


def test_a_mask_of_another_size_is_reported_with_both_sizes(folder):
    folder.add("a", mask=np.ones((5, 6), np.uint8))
    (problem,) = verify({"train": folder.split("a", "b")}).problems
    assert problem.where == str(folder.mask("a"))
    assert "6 x 5" in problem.message
    assert "6 x 4" in problem.message


def test_unknown_ids_are_reported_by_number(folder):
    mask = np.array([[0, 1, 2, 255], [3, 7, 0, 0]], np.uint8)
    folder.add("a", (4, 2), mask)
    (problem,) = verify({"train": folder.split("a")}).problems
    assert problem.where == str(folder.mask("a"))
    assert "unknown ids 3, 7;" in problem.message


def test_a_reader_that_checks_nothing_is_checked_all_the_same():
    def read(index: int) -> tuple[np.ndarray, np.ndarray]:
        return np.full((2, 3, 3), index, np.uint8), np.array([[[0, 1], [2, 9]], [[0, 0], [255, 255]]], np.uint8)[index]

    findings = verify({"train": Dataset(CLASSES, ["x", "y"], read)})
    assert [str(p) for p in findings.problems] == [
        "train: x: the mask is (2, 2) (h, w), its image train: x (2, 3)",
        "train: x: unknown ids 9; ids go up to 2, void is 255",
        "train: y: the mask is (2, 2) (h, w), its image train: y (2, 3)",
    ]


def test_a_mask_that_is_void_all_over_is_a_remark(folder):
    folder.add("a", mask=np.full((4, 6), 255, np.uint8))
    findings = verify({"train": folder.split("a", "b")})
    assert findings.problems == ()
    assert [str(r) for r in findings.remarks] == [f"{folder.mask('a')}: has no labelled pixel: all is void"]


def test_masks_of_nothing_but_background_and_void_are_one_remark(folder):
    for name in "ef":
        folder.add(name, mask=np.array([[0, 255]] * 4, np.uint8), size=(2, 4))
    findings = verify({"train": folder.split("a", "b", "e", "f"), "val": folder.split("c")})
    assert findings.problems == ()
    (remark,) = findings.remarks
    assert str(remark).startswith("train: 2 of 4 masks hold 0 and 255 alone, and 255 is void; where it was meant as a")
    assert str(remark).endswith(": e, f")


def test_an_image_that_is_in_two_splits_is_reported_once(folder):
    findings = verify({"train": folder.split("a", "b"), "val": folder.split("b", "c")})
    assert [str(p) for p in findings.problems] == [f"{folder.image('b')}: is in 'train' and in 'val'"]
    assert findings.remarks == ()


def test_an_unreadable_image_that_is_in_two_splits_is_still_found(folder):
    folder.image("b").write_bytes(b"no image")
    findings = verify({"train": folder.split("a", "b"), "val": folder.split("b", "c")})
    assert [str(p) for p in findings.problems] == [
        f"{folder.image('b')}: expected a JPEG or PNG file, found something else",
        f"{folder.image('b')}: is in 'train' and in 'val'",
    ]


def test_the_same_pixels_under_two_names_are_found_across_file_formats(folder):
    # PNG keeps pixels: the copy is another file of other bytes with the same pixels.
    with Image.open(folder.image("b")) as image:
        image.save(folder.image("d"), compress_level=0)
    assert folder.image("b").read_bytes() != folder.image("d").read_bytes()
    findings = verify({"train": folder.split("a", "b"), "val": folder.split("c", "d")})
    assert [str(p) for p in findings.problems] == [
        f"{folder.image('d')}: in 'val', has the same pixels as {folder.image('b')} in 'train'"
    ]


def test_images_of_one_colour_and_other_shapes_are_not_the_same(folder):
    for name, size in (("a", (6, 4)), ("b", (4, 6))):
        Image.new("RGB", size, (9, 9, 9)).save(folder.image(name))
        Image.new("L", size, 1).save(folder.mask(name))
    assert verify({"train": folder.split("a"), "val": folder.split("b")}).problems == ()


def test_the_same_pixels_twice_in_one_split_are_a_remark(folder):
    folder.image("b").write_bytes(folder.image("a").read_bytes())
    findings = verify({"train": folder.split("a", "b")})
    assert findings.problems == ()
    assert [str(r) for r in findings.remarks] == [
        f"{folder.image('b')}: has the same pixels as {folder.image('a')}; both are in 'train'"
    ]


def test_a_name_that_is_twice_in_a_split_is_a_problem(folder):
    findings = verify({"train": folder.split("a", "a")})
    assert [str(p) for p in findings.problems] == [f"{folder.image('a')}: the name 'a' is twice in 'train'"]


def test_one_name_for_two_images_is_a_remark_and_no_overlap(folder, tmp_path):
    (tmp_path / "other").mkdir()
    other = Folder(tmp_path / "other")
    other.shade = 100
    other.add("a")
    findings = verify({"train": folder.split("a"), "val": other.split("a")})
    assert findings.problems == ()
    assert [r.where for r in findings.remarks] == [str(other.image("a"))]


def test_three_splits_are_held_against_each_other(folder):
    findings = verify({"train": folder.split("a"), "val": folder.split("b"), "test": folder.split("a", "b")})
    assert [str(p) for p in findings.problems] == [
        f"{folder.image('a')}: is in 'train' and in 'test'",
        f"{folder.image('b')}: is in 'val' and in 'test'",
    ]


@pytest.fixture
def voc2007(tmp_path: Path) -> Path:
    """A VOC 2007 of two training images and one for validation."""
    year = tmp_path / "VOCdevkit/VOC2007"
    for name in ("ImageSets/Segmentation", "JPEGImages", "SegmentationClass"):
        (year / name).mkdir(parents=True)
    for shade, name in enumerate(("000032", "000033", "000042")):
        Image.new("RGB", (6, 4), (shade, 0, 0)).save(year / f"JPEGImages/{name}.jpg", format="PNG")
        Image.new("L", (6, 4), 20).save(year / f"SegmentationClass/{name}.png")
    (year / "ImageSets/Segmentation/train.txt").write_text("000032\n000033\n")
    (year / "ImageSets/Segmentation/val.txt").write_text("000042\n")
    return tmp_path


def test_the_command_ends_with_a_line_or_with_all_problems_and_code_3(voc2007):
    from vocseg.cli.data import command

    arguments = ["verify", "voc2007", "--data", str(voc2007)]
    sound = CliRunner().invoke(command, arguments, catch_exceptions=False)
    assert sound.stdout == "no problems in 3 images (train 2, val 1)\n"
    assert sound.exit_code == 0

    mask = voc2007 / "VOCdevkit/VOC2007/SegmentationClass/000033.png"
    Image.new("L", (6, 4), 21).save(mask)
    with pytest.raises(DataError, match="unknown ids 21") as caught:
        CliRunner().invoke(command, arguments, catch_exceptions=False)
    assert caught.value.exit_code == 3

    told = CliRunner().invoke(command, [*arguments, "--json"], catch_exceptions=False)
    assert told.exit_code == 3
    findings = json.loads(told.stdout)
    assert findings["images"] == {"train": 2, "val": 1}
    assert [problem["where"] for problem in findings["problems"]] == [str(mask)]
    assert findings["remarks"] == []
