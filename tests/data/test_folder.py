"""The data set `folder`: pairs by name, split lists, and a split that depends on names and a seed alone."""

import os
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from vocseg.data.bad_images import find_bad
from vocseg.data.folder import _seeded_split, folder
from vocseg.errors import DataError, IncompleteError, UsageError

CLASSES = ("ground", "plane", "cat", "person")


def write(path: Path, value: int = 1) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    shape = (4, 6, 3) if "images" in path.parts else (4, 6)
    Image.fromarray(np.full(shape, value, np.uint8)).save(path)


def test_images_and_masks_pair_by_name_in_subfolders_too(folder_root):
    data = folder(folder_root, "all", classes=CLASSES)
    assert data.names == ("more/photo_8", "more/photo_9", *(f"photo_{i}" for i in range(8)))
    assert data.classes == CLASSES
    for index, (image_path, mask_path) in enumerate(data.files):
        image, mask = data.read(index)
        assert image_path.stem == mask_path.stem == Path(data.names[index]).name
        np.testing.assert_array_equal(image, np.array(Image.open(image_path)))
        np.testing.assert_array_equal(mask, np.array(Image.open(mask_path)))


def test_suffixes_may_be_jpeg_or_png_in_any_case(tmp_path):
    for name in ("a.JPG", "b.jpeg", "c.Png", "d.e.jpg"):
        write(tmp_path / "images" / name)
        write(tmp_path / "masks" / (Path(name).stem + ".PNG"))
    (tmp_path / "images" / "Thumbs.db").write_bytes(b"")
    write(tmp_path / "images" / "._a.jpg")
    write(tmp_path / "images" / ".trash" / "x.jpg")
    assert folder(tmp_path, "all", classes=CLASSES).names == ("a", "b", "c", "d.e")


def test_other_folders_may_be_named_even_one_in_the_other(folder_root):
    (folder_root / "masks").rename(folder_root / "labels")
    data = folder(folder_root, "all", classes=CLASSES, masks="labels")
    assert data.files[0][1].is_relative_to(folder_root / "labels")
    for path in (folder_root / "images").iterdir():
        path.rename(folder_root / path.name)
    (folder_root / "images").rmdir()
    assert folder(folder_root, "all", classes=CLASSES, images=".", masks="labels").names == data.names


def test_train_and_val_part_all_images(folder_root):
    train = folder(folder_root, "train", classes=CLASSES)
    val = folder(folder_root, "val", classes=CLASSES)
    assert (len(train), len(val)) == (8, 2)  # a fifth of ten
    assert sorted([*train.names, *val.names]) == sorted(folder(folder_root, "all", classes=CLASSES).names)
    assert [train.files[0][0].stem, train.files[0][1].stem] == [Path(train.names[0]).name] * 2


def test_the_split_is_the_same_on_every_machine(folder_root):
    # The hash is fixed: were this to change, everyone's validation set would.
    assert folder(folder_root, "val", classes=CLASSES).names == ("photo_2", "photo_5")
    assert folder(folder_root, "val", classes=CLASSES, split_seed=1).names == ("photo_2", "photo_7")


def test_the_order_of_a_listing_changes_nothing(folder_root, monkeypatch):
    def names() -> list:
        return [folder(folder_root, split, classes=CLASSES).names for split in ("train", "val", "all")]

    def backwards(home, walk=os.walk):
        for parent, subfolders, files in reversed(list(walk(home))):
            yield parent, subfolders[::-1], files[::-1]

    before = names()
    monkeypatch.setattr(os, "walk", backwards)
    assert names() == before


NAMES = st.lists(st.text("abcdef/_0123456789", min_size=1, max_size=8), min_size=2, max_size=60, unique=True)


@given(NAMES, st.floats(0.001, 0.999), st.integers(0, 3))
def test_any_split_has_an_image_on_each_side_and_none_on_both(names, fraction, seed):
    train = _seeded_split(sorted(names), "train", fraction, seed, Path("x"))
    val = _seeded_split(sorted(names), "val", fraction, seed, Path("x"))
    assert train
    assert val
    assert sorted(train + val) == sorted(names)
    assert abs(len(val) - len(names) * fraction) <= 1


@given(NAMES, st.text("xyz", min_size=1, max_size=8))
def test_one_image_more_moves_at_most_one_other(names, new):
    before = set(_seeded_split(sorted(names), "val", 0.25, 0, Path("x")))
    after = set(_seeded_split(sorted([*names, new]), "val", 0.25, 0, Path("x")))
    assert len((before ^ after) - {new}) <= 1


def test_names_are_equal_however_their_accents_are_coded(tmp_path):
    composed, decomposed = (unicodedata.normalize(form, "caf\u00e9") for form in ("NFC", "NFD"))
    write(tmp_path / "images" / f"{decomposed}.jpg")
    write(tmp_path / "masks" / f"{composed}.png")
    data = folder(tmp_path, "all", classes=CLASSES)
    assert data.names == (composed,)
    data.read(0)


def test_lists_choose_images_and_excuse_the_rest(folder_root):
    (folder_root / "splits").mkdir()
    (folder_root / "splits" / "test.txt").write_text("photo_3\r\n\r\nmore/photo_9\r\n")
    write(folder_root / "images" / "without_mask.jpg")
    assert folder(folder_root, "test", classes=CLASSES, splits="splits").names == ("photo_3", "more/photo_9")


def test_a_missing_list_names_those_that_are_there(folder_root):
    with pytest.raises(DataError, match=r"train\.txt: no such split; there is no list at all"):
        folder(folder_root, "train", classes=CLASSES, splits="splits")
    (folder_root / "splits").mkdir()
    (folder_root / "splits" / "test.txt").write_text("photo_3\n")
    with pytest.raises(DataError, match=r"train\.txt: no such split; there are test"):
        folder(folder_root, "train", classes=CLASSES, splits="splits")


def test_what_is_wrong_with_a_list_is_said(folder_root):
    (folder_root / "splits").mkdir()
    path = folder_root / "splits" / "train.txt"
    path.write_text("photo_1\nphoto_1\n")
    with pytest.raises(DataError, match=r"train\.txt: named more than once: photo_1"):
        folder(folder_root, "train", classes=CLASSES, splits="splits")
    path.write_text("\n")
    with pytest.raises(DataError, match=r"train\.txt: the list is empty"):
        folder(folder_root, "train", classes=CLASSES, splits="splits")
    path.write_text("photo_1\nphoto_77\n")
    with pytest.raises(DataError) as caught:
        folder(folder_root, "train", classes=CLASSES, splits="splits")
    images, masks = caught.value.problems
    assert images.message == f"no image (.jpg, .jpeg, .png) for 1 of 2 names named by {path}: photo_77"
    assert masks.message == f"no mask (.png) for 1 of 2 names named by {path}: photo_77"


def test_unpaired_files_are_named_all_at_once(folder_root):
    for i in range(12):
        write(folder_root / "images" / f"lonely_{i:02d}.jpg")
    write(folder_root / "masks" / "widow.png")
    with pytest.raises(DataError) as caught:
        folder(folder_root, "train", classes=CLASSES)
    images, masks = caught.value.problems
    assert (images.where, masks.where) == (str(folder_root / "images"), str(folder_root / "masks"))
    assert images.message.endswith(": widow")
    assert masks.message.startswith("no mask (.png) for 12 of 23 names")
    assert masks.message.endswith("lonely_08, lonely_09 and 2 more")


def test_two_files_of_one_name_are_an_error(folder_root):
    write(folder_root / "images" / "photo_1.png")
    write(folder_root / "images" / "more" / "photo_8.jpeg")
    with pytest.raises(DataError, match="more than one image is named more/photo_8, photo_1; keep one of each"):
        folder(folder_root, "train", classes=CLASSES)


def test_images_of_one_name_can_be_left_out_as_others_that_cannot_be_read(folder_root):
    write(folder_root / "images" / "photo_1.png")
    (folder_root / "masks" / "photo_3.png").unlink()
    with pytest.raises(IncompleteError) as error:
        folder(folder_root, "all", classes=CLASSES)
    assert len(error.value.problems) == 2
    assert set(find_bad(error.value.rest)) == {"photo_1", "photo_3"}


def test_missing_folders_are_named_both(tmp_path):
    with pytest.raises(DataError) as caught:
        folder(tmp_path / "nowhere", "train", classes=CLASSES)
    assert [p.where for p in caught.value.problems] == [str(tmp_path / "nowhere" / d) for d in ("images", "masks")]
    assert "--data DIR or VOCSEG_DATA" in caught.value.problems[0].message


def test_too_few_pairs_to_split_are_an_error(tmp_path):
    write(tmp_path / "images" / "a.jpg")
    write(tmp_path / "masks" / "a.png")
    with pytest.raises(DataError, match="split 'val' takes at least 2 pairs, found 1"):
        folder(tmp_path, "val", classes=CLASSES)
    assert folder(tmp_path, "all", classes=CLASSES).names == ("a",)
    for path in (tmp_path / "images" / "a.jpg", tmp_path / "masks" / "a.png"):
        path.unlink()
    with pytest.raises(DataError, match="split 'all' takes at least 1 pair, found 0"):
        folder(tmp_path, "all", classes=CLASSES)


def test_an_unknown_split_is_an_error(folder_root):
    with pytest.raises(DataError, match=r"no split 'test'; without data\.splits there are train, val and all"):
        folder(folder_root, "test", classes=CLASSES)


def test_a_class_named_twice_is_an_error_of_the_recipe(folder_root):
    with pytest.raises(UsageError, match=r"data\.classes: a class is named twice in ground, cat, cat"):
        folder(folder_root, "all", classes=("ground", "cat", "cat"))


def test_an_id_without_a_class_is_an_error_when_it_is_read(folder_root):
    data = folder(folder_root, "all", classes=CLASSES[:2])
    with pytest.raises(DataError, match=r"photo_0\.png: unknown ids 2; 2 classes have ids 0 to 1, void is 255"):
        data.read(data.names.index("photo_0"))


def test_a_root_from_the_working_directory_is_read_like_any_other(folder_root, monkeypatch):
    monkeypatch.chdir(folder_root.parent)
    data = folder(Path(folder_root.name), "all", classes=CLASSES)
    assert [image.is_file() and mask.is_file() for image, mask in data.files] == [True] * 10
    assert data.files[1:3][0] == data.files[1]
    assert data.read(9)[1].shape == data.read(9)[0].shape[:2]


def test_a_name_that_leads_out_of_the_folder_is_never_read_though_a_file_is_there(tmp_path):
    root = tmp_path / "own"
    for name in ("a", "b"):
        write(root / f"images/{name}.png"), write(root / f"masks/{name}.png")
    write(tmp_path / "secret.jpg"), write(tmp_path / "secret.png")
    (root / "lists").mkdir()
    (root / "lists/train.txt").write_text("a\n../../secret\nb\n")
    with pytest.raises(IncompleteError) as caught:
        folder(root, "train", classes=("x", "y"), splits="lists")
    opened = caught.value.rest
    assert opened.names == ("a", "../../secret", "b")
    assert opened.read(2)[1].shape == opened.read(0)[1].shape
    with pytest.raises(DataError, match=r"secret.jpg: no such file"):
        opened.read(1)
