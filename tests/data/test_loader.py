import threading
from itertools import chain

import numpy as np
import pytest
import torch

from vocseg.data.dataset import Dataset
from vocseg.data.loader import TrainingBatches
from vocseg.errors import DataError, UsageError


def numbered(count, sizes=((4, 4),)):
    """A data set whose image i holds the number i everywhere."""

    def read(index):
        size = sizes[index % len(sizes)]
        return np.full((*size, 3), index, np.uint8), np.full(size, index % 2, np.uint8)

    return Dataset(("a", "b"), tuple(str(i) for i in range(count)), read)


def seen(batches, epoch=0, skip=0):
    return [images[:, 0, 0, 0].tolist() for images, _ in batches.epoch(epoch, skip)]


def flat(lists):
    return list(chain.from_iterable(lists))


def noise(sample, rng):
    sample.image = rng.integers(0, 256, sample.image.shape).astype(np.uint8)


def test_an_epoch_shows_every_image_once_in_an_order_of_its_own():
    batches = TrainingBatches(numbered(12), [], batch_size=4, seed=0)
    first, second = seen(batches, 0), seen(batches, 1)
    assert sorted(flat(first)) == sorted(flat(second)) == list(range(12))
    assert first != second
    assert first == seen(batches, 0)


def test_images_that_fill_no_batch_are_left_out_but_never_all_of_them():
    assert [len(b) for b in seen(TrainingBatches(numbered(10), [], batch_size=4, seed=0))] == [4, 4]
    assert [len(b) for b in seen(TrainingBatches(numbered(3), [], batch_size=4, seed=0))] == [3]


def test_repeat_shows_each_image_that_often_each_time_augmented_anew():
    batches = TrainingBatches(numbered(3), [], batch_size=2, seed=0, repeat=4)
    assert len(batches) == 6
    assert sorted(flat(seen(batches))) == [0] * 4 + [1] * 4 + [2] * 4
    noisy = TrainingBatches(numbered(3), [noise], batch_size=12, seed=0, repeat=4)
    shown = [images.numpy().tobytes() for epoch in (0, 1) for images in next(noisy.epoch(epoch))[0]]
    assert len(set(shown)) == 24


def log_of(found):
    """A step that notes the number of each image it sees, and of the partner it draws."""

    def mix(sample, rng):
        found.append((int(sample.image[0, 0, 0]), int(sample.partner(rng).image[0, 0, 0])))

    return mix


def test_partners_are_drawn_from_all_images_equally_often():
    found = []
    list(TrainingBatches(numbered(4), [log_of(found)], batch_size=4, seed=0, repeat=100).epoch(0))
    partners = [partner for _, partner in found]
    assert [abs(partners.count(i) - 100) < 35 for i in range(4)] == [True] * 4  # 4 deviations of 8.7
    assert len(set(found)) == 16


def test_a_partner_has_been_through_the_steps_before_with_draws_of_its_own():
    views = []

    def add(sample, rng):
        sample.image = sample.image + np.uint8(10 * rng.integers(1, 4))

    def mix(sample, rng):
        views.append((int(sample.image[0, 0, 0]), int(sample.partner(rng).image[0, 0, 0])))
        sample.image = sample.image + np.uint8(100)

    list(TrainingBatches(numbered(1), [add, mix, add], batch_size=2, seed=0, repeat=60).epoch(0))
    assert set(views) == {(a, b) for a in (10, 20, 30) for b in (10, 20, 30)}


def test_a_partner_may_be_mixed_itself_where_two_steps_mix():
    depths = []

    def mix(sample, rng):
        partner = sample.partner(rng)
        sample.image = np.maximum(sample.image, partner.image) + np.uint8(1)
        depths.append(int(sample.image[0, 0, 0]))

    batches = TrainingBatches(numbered(1), [mix, mix, mix], batch_size=1, seed=0, workers=1)
    list(batches.epoch(0))
    # Each step makes one more than the step before made, of sample and partner alike; the third has a partner of two
    # steps, which has one of one, and so on: 1 + 2 + 4 mixtures.
    assert sorted(depths) == [1, 1, 1, 1, 2, 2, 3]


def test_without_a_partner_asked_for_no_second_image_is_read():
    reads = []
    plain = numbered(5)
    counting = Dataset(plain.classes, plain.names, lambda i: (reads.append(i), plain.read(i))[1])
    list(TrainingBatches(counting, [noise], batch_size=5, seed=0).epoch(0))
    assert sorted(reads) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("workers", [1, 2, 7])
def test_the_pixels_of_an_epoch_do_not_depend_on_the_number_of_threads(workers):
    def mix(sample, rng):
        sample.image = sample.image // 2 + sample.partner(rng).image // 2

    def epoch(n):
        batches = TrainingBatches(numbered(9), [noise, mix, noise, mix], batch_size=2, seed=5, workers=n)
        return torch.stack([images for images, _ in batches.epoch(3)])

    assert torch.equal(epoch(workers), epoch(3))


def test_skipping_gives_the_rest_of_the_same_epoch():
    batches = TrainingBatches(numbered(12), [noise], batch_size=3, seed=1)
    whole, rest = list(batches.epoch(2)), list(batches.epoch(2, skip=2))
    assert len(rest) == 2
    assert all(
        torch.equal(a, b) for old, new in zip(whole[2:], rest, strict=True) for a, b in zip(old, new, strict=True)
    )


def test_samples_of_different_sizes_are_an_error_that_names_the_remedy():
    batches = TrainingBatches(numbered(4, sizes=((4, 4), (5, 6))), [], batch_size=4, seed=0)
    with pytest.raises(UsageError, match=r"differ in size \(4x4, 5x6\); add a 'crop' or 'resize'"):
        list(batches.epoch(0))


def test_an_image_that_cannot_be_read_ends_the_epoch_with_its_own_error():
    def read(index):
        raise DataError("image 7 is broken")

    batches = TrainingBatches(Dataset(("a", "b"), ("x",), read), [], batch_size=1, seed=0)
    with pytest.raises(DataError, match="image 7 is broken"):
        list(batches.epoch(0))


def test_an_epoch_that_is_left_early_leaves_no_thread_behind():
    epoch = TrainingBatches(numbered(100), [], batch_size=2, seed=0, workers=3).epoch(0)
    next(epoch)
    epoch.close()
    assert not [t for t in threading.enumerate() if t.name.startswith("vocseg-loader")]
