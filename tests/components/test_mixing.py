"""What mixing two samples holds: every pixel comes, with its label, from the same place of one of the two."""

from collections.abc import Callable

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from vocseg.components.augmentations import Augment, crop, horizontal_flip, random_scale
from vocseg.components.mixing import copy_paste, cutmix
from vocseg.data.dataset import VOID, Dataset
from vocseg.data.loader import TrainingBatches
from vocseg.data.sample import Sample
from vocseg.errors import UsageError

quick = settings(max_examples=25, deadline=None)
seeds = st.integers(0, 2**32 - 1)
Pair = tuple[NDArray[np.uint8], NDArray[np.uint8]]
MIXING = [pytest.param(cutmix(p=1.0), id="cutmix"), pytest.param(copy_paste(p=1.0, min_pixels=4), id="copy_paste")]


def scene(seed: int, size: tuple[int, int] = (40, 50)) -> Pair:
    """An image in which no two pixels are alike, nor those of two seeds that differ by 1, with blobs of labels."""
    rng = np.random.default_rng(seed)
    image = np.dstack([np.full(size, seed % 256), *np.indices(size)]).astype(np.uint8)
    labels = rng.choice(np.array([0, 0, 0, 1, 7, 20, VOID], np.uint8), (5, 6))
    return image, cv2.resize(labels, size[::-1], interpolation=cv2.INTER_NEAREST).astype(np.uint8)


def boxes(*placed: tuple[int, tuple[slice, slice]], size: tuple[int, int] = (60, 60)) -> Pair:
    """A white image whose mask holds labels in boxes."""
    mask = np.zeros(size, np.uint8)
    for label, box in placed:
        mask[box] = label
    return np.full((*size, 3), 255, np.uint8), mask


def empty(size: tuple[int, int] = (60, 60)) -> Pair:
    return np.zeros((*size, 3), np.uint8), np.zeros(size, np.uint8)


def mix(augment: Augment, base: Pair, other: Pair, seed: int = 0) -> Pair:
    sample = Sample(*base, draw_partner=lambda rng: Sample(*other))
    augment(sample, np.random.default_rng(seed))
    return sample.image, sample.mask


@pytest.mark.parametrize("augment", MIXING)
@quick
@given(seed=seeds, height=st.integers(1, 40), width=st.integers(1, 40))
def test_every_pixel_comes_with_its_label_from_the_same_place_of_one_of_the_two(augment, seed, height, width):
    base, other = scene(seed, (height, width)), scene(seed + 1, (height, width))
    image, mask = mix(augment, base, other, seed)
    theirs = image[..., 0] == other[0][..., 0]
    assert np.array_equal(image, np.where(theirs[..., None], other[0], base[0]))
    assert np.array_equal(mask, np.where(theirs, other[1], base[1]))


@pytest.mark.parametrize("augment", MIXING)
def test_the_seed_decides_and_neither_source_is_written_to(augment: Augment):
    base, other = scene(1), scene(2)
    for array in (*base, *other):
        array.flags.writeable = False  # as cached images are
    first, _, again = (mix(augment, base, other, seed) for seed in (5, 6, 5))
    assert np.array_equal(first[0], again[0])
    assert np.array_equal(first[1], again[1])
    assert not np.array_equal(first[0], base[0])


@pytest.mark.parametrize("make", [cutmix, copy_paste])
def test_it_happens_as_often_as_asked_and_draws_a_partner_only_then(make: Callable):
    drawn = 0

    def draw(rng: np.random.Generator) -> Sample:
        nonlocal drawn
        drawn += 1
        return Sample(*boxes((3, np.s_[:, :])))

    for p, low, high in ((0.0, 0, 0), (0.3, 60, 120), (1.0, 300, 300)):  # 90 ± 3.8 deviations of 7.9
        drawn = changed = 0
        for seed in range(300):
            sample = Sample(*empty(), draw_partner=draw)
            make(p=p)(sample, np.random.default_rng(seed))
            changed += bool(sample.image.any())
        assert low <= drawn <= high
        assert changed == drawn


@pytest.mark.parametrize("augment", MIXING)
def test_two_samples_of_different_size_are_an_error_that_names_the_remedy(augment: Augment):
    with pytest.raises(UsageError, match="of one size, found 40x50 and 30x50; put a 'crop' before it"):
        mix(augment, scene(0), scene(1, (30, 50)))


@pytest.mark.parametrize("augment", MIXING)
def test_a_sample_without_partners_says_what_is_needed(augment: Augment):
    with pytest.raises(UsageError, match=r"needs a second training sample .* pass Sample\(image, mask, draw_partner="):
        augment(Sample(*scene(0)), np.random.default_rng(0))


def test_cutmix_replaces_one_rectangle_of_the_share_it_is_given():
    shares, heights, tops, lefts = [], [], [], []
    for seed in range(400):
        _, mask = mix(cutmix(p=1.0, share=(0.2, 0.4)), empty((60, 100)), boxes((3, np.s_[:, :]), size=(60, 100)), seed)
        y, x = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        assert np.count_nonzero(mask) == len(y) * len(x) == (np.ptp(y) + 1) * (np.ptp(x) + 1)
        shares.append(np.mean(mask == 3))
        heights.append(len(y))
        tops.append(y[0] / max(1, 60 - len(y)))
        lefts.append(x[0] / max(1, 100 - len(x)))
    # Rounded to whole pixels, a side of at least 0.2 · 60 = 12 is out by 1/24 at most, one of 20 by 1/40.
    assert 0.2 * 0.93 < min(shares) < 0.22
    assert 0.38 < max(shares) < 0.4 * 1.07
    assert np.mean(shares) == pytest.approx(0.3, abs=0.015)
    assert min(heights) < 17  # from flat
    assert max(heights) > 57  # to upright
    for starts in (tops, lefts):
        assert min(starts) < 0.05
        assert max(starts) > 0.95


def test_cutmix_can_take_everything():
    image, mask = mix(cutmix(p=1.0, share=(1.0, 1.0)), scene(0), scene(1))
    assert np.array_equal(image, scene(1)[0])
    assert np.array_equal(mask, scene(1)[1])


def test_cutmix_computes_only_the_rectangle_and_as_the_whole_would_be():
    def view() -> Sample:
        sample = Sample(*scene(1, (90, 110)))
        sample.transform(np.array([[0.5, 0.1, 3], [-0.1, 0.45, 5], [0, 0, 1]]), (40, 50))
        return sample

    partners: list[Sample] = []
    for seed in range(20):
        partners.append(view())
        sample = Sample(*empty((40, 50)), draw_partner=lambda rng: partners[-1])
        cutmix(p=1.0)(sample, np.random.default_rng(seed))
        theirs = sample.image.any(2)
        assert np.count_nonzero(theirs) == np.prod(partners[-1].size) < 40 * 50 * 0.6
        assert np.abs(sample.image[theirs].astype(int) - view().image[theirs]).max() <= 1
        # OpenCV rounds positions to 1/1024 of a pixel, from the corner of what it computes.
        assert np.mean(sample.mask[theirs] == view().mask[theirs]) > 0.99


def test_objects_are_pasted_whole_and_any_number_of_them_equally_often():
    # Two of class 3, one of class 5 that touches one of them, and one too small.
    other = boxes((3, np.s_[5:15, 5:15]), (5, np.s_[5:15, 15:25]), (3, np.s_[40:50, 40:50]), (3, np.s_[30:37, 5:14]))
    places = ((10, 10), (10, 20), (45, 45))
    counts = []
    for seed in range(300):
        image, mask = mix(copy_paste(p=1.0), empty(), other, seed)
        chosen = [bool(mask[place]) for place in places]
        assert np.count_nonzero(mask) == 100 * sum(chosen)
        assert np.array_equal(image.any(2), mask > 0)
        counts.append(sum(chosen))
    assert {n: abs(counts.count(n) - 100) < 33 for n in set(counts)} == dict.fromkeys((1, 2, 3), True)  # 4 deviations
    assert all(np.count_nonzero(mix(copy_paste(p=1.0, max_objects=1), empty(), other, s)[1]) == 100 for s in range(20))
    found = {np.count_nonzero(mix(copy_paste(p=1.0, min_pixels=63), empty(), other, s)[1]) for s in range(40)}
    assert found == {63, 100, 163, 200, 263, 300, 363}


def test_an_object_brings_its_own_rim_of_void_and_no_other_void():
    other = boxes((VOID, np.s_[5:25, 5:25]), (3, np.s_[10:20, 10:20]), (VOID, np.s_[40:50, 40:50]))
    base = empty()
    base[1][:] = 8
    image, mask = mix(copy_paste(p=1.0), base, other)
    expected = base[1].copy()
    expected[5:25, 5:25] = VOID
    expected[10:20, 10:20] = 3
    assert np.array_equal(mask, expected)
    assert np.array_equal(image.any(2), mask != 8)


def test_of_wide_void_only_what_is_near_the_object_is_pasted():
    other = boxes((VOID, np.s_[:, :]), (3, np.s_[25:35, 25:35]))
    _, mask = mix(copy_paste(p=1.0), empty(), other)
    rows = np.flatnonzero((mask == VOID).any(1))
    assert (rows[0], rows[-1]) == (15, 44)  # ten pixels on either side
    assert mask[30, 15] == VOID
    assert mask[16, 16] == 0  # nine rows and nine columns away, which is 12.7 pixels


def test_without_objects_nothing_is_pasted():
    base = scene(3)
    image, mask = mix(copy_paste(p=1.0), base, (scene(4)[0], np.where(scene(4)[1] == VOID, VOID, 0).astype(np.uint8)))
    assert np.array_equal(image, base[0])
    assert np.array_equal(mask, base[1])


def test_a_range_upside_down_is_refused():
    with pytest.raises(UsageError, match=r"cutmix\.share: expected \[least, largest\], found \[0\.5, 0\.1\]; swap"):
        cutmix(share=(0.5, 0.1))


def test_in_a_loader_partners_are_scaled_and_cropped_as_the_sample_is():
    def read(index: int) -> Pair:
        size = (30 + 5 * index, 70 - 5 * index)
        return np.full((*size, 3), index + 1, np.uint8), np.full(size, index + 1, np.uint8)

    steps = [random_scale(), horizontal_flip(), crop(size=24), cutmix(p=1.0), copy_paste(p=0.5), cutmix(p=0.5)]
    data = Dataset(tuple("abcdefg"), tuple("012345"), read)
    one, three = (
        list(TrainingBatches(data, steps, batch_size=3, seed=1, workers=n, fill=(0, 0, 0)).epoch(0)) for n in (1, 3)
    )
    labels = set()
    for (images, masks), (same_images, same_masks) in zip(one, three, strict=True):
        assert images.equal(same_images)
        assert masks.equal(same_masks)
        assert masks.shape == (3, 24, 24)
        inside = images[..., 0] == masks
        assert inside[masks != VOID].float().mean() > 0.9  # all but the mixture at the edges of images
        labels |= {frozenset(mask.unique().tolist()) - {VOID} for mask in masks}
    assert max(len(found) for found in labels) >= 2
