"""The data set `voc`: the development kit's layout, its lists, and what is said where something is missing."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vocseg.data.voc import VOC_CLASSES, voc
from vocseg.errors import DataError


def kit(root: Path, year: int = 2012) -> Path:
    return root / "VOCdevkit" / f"VOC{year}"


def write_list(root: Path, split: str, text: str) -> Path:
    path = kit(root) / "ImageSets" / "Segmentation" / f"{split}.txt"
    path.write_text(text)
    return path


def add_sbd(root: Path, ids: list[str]) -> None:
    """SBD's masks: the kit's own with every label turned into person, so that a test can tell them apart."""
    (kit(root) / "SegmentationClassAug").mkdir()
    for name in ids:
        mask = np.array(Image.open(kit(root) / f"SegmentationClass/{name}.png"))
        mask[(mask > 0) & (mask < 255)] = 15
        Image.fromarray(mask).save(kit(root) / f"SegmentationClassAug/{name}.png")


def test_there_are_twenty_one_classes_in_vocs_order():
    assert len(VOC_CLASSES) == len(set(VOC_CLASSES)) == 21
    # Fixed by the challenge: alphabetical after the background.
    assert list(VOC_CLASSES[1:]) == sorted(VOC_CLASSES[1:])
    assert (VOC_CLASSES[0], VOC_CLASSES[15]) == ("background", "person")


@pytest.mark.parametrize("year", [2007, 2012])
def test_a_split_is_its_list(voc_root, year):
    train, val = voc(voc_root, "train", year=year), voc(voc_root, "val", year=year)
    assert train.names == tuple(f"{year}_{i:06d}" for i in range(1, 7))
    assert val.names == tuple(f"{year}_{i:06d}" for i in range(7, 11))
    assert (len(train), len(val), len(voc(voc_root, "trainval", year=year))) == (6, 4, 10)
    assert train.classes == VOC_CLASSES


def test_images_and_masks_are_read_as_stored(voc_root):
    data = voc(voc_root, "train")
    sizes = set()
    for index, (image_path, mask_path) in enumerate(data.files):
        image, mask = data.read(index)
        np.testing.assert_array_equal(image, np.array(Image.open(image_path)))
        np.testing.assert_array_equal(mask, np.array(Image.open(mask_path)))
        assert image.shape == (*mask.shape, 3)
        assert set(np.unique(mask)) - {0, 1, 8, 15, 255} == set()
        assert (mask == 255).any()
        sizes.add(mask.shape)
    assert len(sizes) == len(data)


def test_2012_is_the_year_where_none_is_given(voc_root):
    assert voc(voc_root, "train").files[0][0].is_relative_to(kit(voc_root, 2012))


def test_the_root_may_be_vocdevkit_itself(voc_root):
    assert voc(voc_root / "VOCdevkit", "val").names == voc(voc_root, "val").names


def test_any_list_is_a_split_whatever_its_line_ends(voc_root):
    write_list(voc_root, "few", "\ufeff2012_000003\r\n\r\n  2012_000001 \r\n")
    assert voc(voc_root, "few").names == ("2012_000003", "2012_000001")


@pytest.mark.parametrize("split", ["trainaug", "train_aug", "aug"])
def test_plain_ids_of_an_augmented_list_have_sbds_masks(voc_root, split):
    add_sbd(voc_root, ["2012_000001", "2012_000002"])
    write_list(voc_root, split, "2012_000001\n2012_000002\n")
    data = voc(voc_root, split)
    assert [mask.parent.name for _, mask in data.files] == ["SegmentationClassAug"] * 2
    assert set(np.unique(data.read(0)[1])) == {0, 15, 255}


def test_a_list_of_pairs_says_where_image_and_mask_are(voc_root):
    add_sbd(voc_root, ["2012_000001"])
    write_list(
        voc_root,
        "trainaug",
        "/JPEGImages/2012_000001.jpg /SegmentationClassAug/2012_000001.png\n"
        "JPEGImages/2012_000002.jpg SegmentationClass/2012_000002.png\n",
    )
    data = voc(voc_root, "trainaug")
    assert data.names == ("2012_000001", "2012_000002")
    assert list(data.files) == [
        (kit(voc_root) / "JPEGImages/2012_000001.jpg", kit(voc_root) / "SegmentationClassAug/2012_000001.png"),
        (kit(voc_root) / "JPEGImages/2012_000002.jpg", kit(voc_root) / "SegmentationClass/2012_000002.png"),
    ]


def test_no_file_but_the_list_is_opened(voc_root):
    for folder in ("JPEGImages", "SegmentationClass"):
        for path in (kit(voc_root) / folder).iterdir():
            path.write_bytes(b"")
    data = voc(voc_root, "train")
    with pytest.raises(DataError, match=r"2012_000001\.jpg"):
        data.read(0)


def test_a_missing_root_gives_one_line_with_the_command_and_the_flag(tmp_path):
    with pytest.raises(DataError) as caught:
        voc(tmp_path / "my data", "train")
    text = str(caught.value)
    assert "\n" not in text
    assert text.startswith(f"{tmp_path}/my data/VOCdevkit/VOC2012: no such folder; ")
    assert f"`vocseg data fetch voc2012 --data '{tmp_path}/my data'` fetches it" in text
    assert "--data DIR or VOCSEG_DATA" in text


def test_a_missing_year_names_those_that_are_there(voc_root):
    with pytest.raises(DataError, match=r"VOC2010: no such folder, only VOC2007, VOC2012 \(data\.year chooses\)") as it:
        voc(voc_root, "train", year=2010)
    assert "data fetch" not in str(it.value)  # 2010 cannot be fetched
    shutil.rmtree(kit(voc_root, 2007))
    with pytest.raises(DataError, match=r"only VOC2012 .*data fetch voc2007 --data \S+data` fetches it"):
        voc(voc_root / "VOCdevkit", "train", year=2007)


def test_a_missing_split_names_those_that_are_there(voc_root):
    with pytest.raises(DataError, match=r"test\.txt: no such split; VOC2012 has train, trainval, val$"):
        voc(voc_root, "test")
    with pytest.raises(DataError, match=r"trainaug\.txt: no such split; .*`vocseg data fetch sbd --data \S+data`"):
        voc(voc_root, "trainaug")
    with pytest.raises(DataError, match="no such split"):
        voc(voc_root, "../Segmentation/train")
    shutil.rmtree(kit(voc_root) / "ImageSets")
    with pytest.raises(DataError, match="there is no list at all; `vocseg data fetch voc2012"):
        voc(voc_root, "train")


def test_missing_files_are_named_all_at_once(voc_root):
    ids = [f"2012_1{i:05d}" for i in range(12)]
    write_list(voc_root, "train", "\n".join([*ids, "2012_000001"]))
    (kit(voc_root) / "SegmentationClass/2012_000001.png").unlink()
    with pytest.raises(DataError) as caught:
        voc(voc_root, "train")
    images, masks = caught.value.problems
    assert images.where == str(kit(voc_root) / "JPEGImages")
    first = ", ".join(f"{name}.jpg" for name in ids[:10])
    assert images.message.startswith(f"12 of 13 files that train.txt names are missing: {first} and 2 more; ")
    assert masks.where == str(kit(voc_root) / "SegmentationClass")
    assert masks.message.startswith("13 of 13 files")
    assert "vocseg data fetch voc2012" in masks.message


def test_missing_sbd_masks_are_fetched_by_sbd(voc_root):
    write_list(voc_root, "trainaug", "2012_000001\n")
    with pytest.raises(DataError, match=r"SegmentationClassAug: 1 of 1 files .* `vocseg data fetch sbd"):
        voc(voc_root, "trainaug")


def test_everything_wrong_with_a_list_is_said_at_once(voc_root):
    path = write_list(voc_root, "train", "2012_000001\na b c\n2012_000001\n2012_000002 1\n2012_999999\n")
    with pytest.raises(DataError) as caught:
        voc(voc_root, "train")
    assert [p.message.split(": ")[0] for p in caught.value.problems] == [
        "expected one id, or an image and a mask path, in line 2, 4",
        "named more than once",
        "1 of 2 files that train.txt names are missing",
        "1 of 2 files that train.txt names are missing",
    ]
    assert caught.value.problems[0].where == str(path)


def test_an_empty_or_unreadable_list_is_an_error(voc_root):
    path = write_list(voc_root, "train", "\n \n")
    with pytest.raises(DataError, match="the list is empty"):
        voc(voc_root, "train")
    path.write_bytes(b"\xff\xfe\x00\x80")
    with pytest.raises(DataError, match=r"train\.txt: the list cannot be read"):
        voc(voc_root, "train")


def test_an_unknown_id_in_a_mask_is_an_error_when_it_is_read(voc_root):
    data = voc(voc_root, "train")
    path = data.files[2][1]
    mask = np.array(Image.open(path))
    mask[0, :3] = (21, 254, 20)
    Image.fromarray(mask).save(path)
    with pytest.raises(DataError, match=r"2012_000003\.png: unknown ids 21, 254; 21 classes have ids 0 to 20"):
        data.read(2)
