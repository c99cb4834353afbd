"""The data set `synthetic`: the same scenes everywhere, no class without a shape, and nothing but shape tells."""

from hashlib import sha256

import numpy as np
import pytest

from vocseg.data.synthetic import SYNTHETIC_CLASSES, synthetic
from vocseg.errors import DataError


def test_there_are_at_least_six_classes_beside_the_background():
    data = synthetic("train")
    assert data.classes == SYNTHETIC_CLASSES
    assert data.classes[0] == "background"
    assert len(set(data.classes)) == len(data.classes) >= 7
    assert len(data.files) == 0


def test_a_scene_is_an_image_and_a_mask_of_known_ids():
    data = synthetic("train")
    for index in range(50):
        image, mask = data.read(index)
        assert (image.dtype, mask.dtype) == (np.uint8, np.uint8)
        assert image.shape == (*mask.shape, 3)
        assert set(np.unique(mask)) <= {*range(len(data.classes)), 255}
        assert 255 in mask


def test_every_machine_draws_the_same_scenes():
    # Measured to be the same under OpenCV 4.10 and 5.0, numpy 2.0 and 2.4.
    digest = sha256()
    for split in ("train", "val"):
        data = synthetic(split)
        for index in range(20):
            for pixels in data.read(index):
                digest.update(pixels.tobytes())
    assert digest.hexdigest()[:16] == "f6682ceacd1c8194"


def test_a_scene_depends_on_neither_order_nor_length():
    long, short = synthetic("train", images=1000), synthetic("train", images=5)
    late = long.read(4)
    long.read(2)
    for a, b in zip(late, short.read(4), strict=True):
        np.testing.assert_array_equal(a, b)
    assert long.names[:5] == short.names


def test_names_are_unique_and_tell_the_split():
    train, val = synthetic("train", images=30), synthetic("val", val_images=20)
    assert (len(train), len(val)) == (30, 20)
    assert len({*train.names, *val.names}) == 50
    assert train.names[7] == "train_000007"


def test_no_two_scenes_of_any_split_or_seed_are_equal():
    seen = {
        data.read(index)[0].tobytes()
        for data in (synthetic("train"), synthetic("val"), synthetic("train", seed=1), synthetic("val", seed=1))
        for index in range(25)
    }
    assert len(seen) == 100


@pytest.mark.parametrize("size", [32, 96, 250])
def test_sizes_differ_by_up_to_an_eighth(size):
    shapes = [synthetic("val", size=size).read(index)[1].shape for index in range(60)]
    sides = [side for shape in shapes for side in shape]
    assert size - size // 8 <= min(sides) < size < max(sides) <= size + size // 8
    assert len(set(shapes)) > 20


def test_two_pixels_of_void_run_along_every_border_between_labels():
    for index in range(20):
        mask = synthetic("train").read(index)[1].astype(int)
        for a, b in ((mask[1:], mask[:-1]), (mask[:, 1:], mask[:, :-1])):
            differs = (a != b) & (a != 255) & (b != 255)
            assert not differs.any()
        for a, b, c in ((mask[2:], mask[1:-1], mask[:-2]), (mask[:, 2:], mask[:, 1:-1], mask[:, :-2])):
            assert not ((b == 255) & (a != 255) & (c != 255) & (a != c)).any()


def test_constant_predictions_score_little():
    counts = np.zeros(256, np.int64)
    for index in range(150):
        counts += np.bincount(synthetic("val", val_images=150).read(index)[1].ravel(), minlength=256)
    known = len(SYNTHETIC_CLASSES)
    share = counts[:known] / counts[:known].sum()
    # All background: its IoU is its share of the labelled pixels and that of the other classes is zero.
    assert 0.08 < share[0] / known < 0.12
    assert share[1:].min() > 0.02
    assert 0.05 < counts[255] / counts.sum() < 0.16


def test_no_colour_gives_a_class_away():
    # Mean colours of the classes lie closer together than the pixels of any one of them are spread.
    pixels: dict[int, list] = {label: [] for label in range(1, len(SYNTHETIC_CLASSES))}
    for index in range(150):
        image, mask = synthetic("train").read(index)
        for label in pixels:
            pixels[label].append(image[mask == label])
    colours = [np.concatenate(found).astype(float) for found in pixels.values()]
    means = np.array([c.mean(axis=0) for c in colours])
    assert np.ptp(means, axis=0).max() < 0.5 * min(c.std(axis=0).min() for c in colours)


def test_a_split_that_is_not_there_is_an_error():
    with pytest.raises(DataError, match="synthetic has no split 'test'; there are train and val"):
        synthetic("test")
