"""What every augmentation holds about image and mask, and what each one does."""

from typing import Any

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from vocseg.components.augmentations import (
    affine,
    blur,
    class_balanced_crop,
    color_jitter,
    crop,
    horizontal_flip,
    pad,
    random_scale,
    resize,
    rotation,
    vertical_flip,
)
from vocseg.data.dataset import VOID
from vocseg.data.sample import Sample
from vocseg.errors import UsageError
from vocseg.plugins import discover

MOVING = {
    "affine", "class_balanced_crop", "crop", "horizontal_flip", "pad", "random_scale", "resize", "rotation",
    "vertical_flip",
}  # fmt: skip
COLOURING = {"blur", "color_jitter"}
MIXING = {"copy_paste", "cutmix"}  # tested in test_mixing.py
CELL = 12
quick = settings(max_examples=20, deadline=None)

Augmented = tuple[NDArray[np.uint8], NDArray[np.uint8]]


def components() -> list:
    found = [c for c in discover() if c.kind == "augmentation" and c.origin == "vocseg"]
    assert {c.name for c in found} == MOVING | COLOURING | MIXING
    return found


def build(component: Any) -> Any:
    """With its defaults, and so that it acts every time."""
    given_ = {"p": 1.0, "size": (50, 70), "foreground": 0.5}
    return component.build({}, {p.name: given_[p.name] for p in component.parameters if p.name in given_})


def every(names: set[str]) -> list:
    chosen = [pytest.param(build(c), id=c.name) for c in components() if c.name in names]
    assert len(chosen) == len(names)
    return chosen


def coordinates(height: int, width: int) -> Augmented:
    """An image that holds 2x + 1 in red, 2y + 1 in green and 255 in blue, and cells of 12 pixels as its mask."""
    y, x = np.mgrid[:height, :width]
    image = np.stack([2 * x + 1, 2 * y + 1, np.full_like(x, 255)], axis=-1).astype(np.uint8)
    return image, (x // CELL + 11 * (y // CELL)).astype(np.uint8)


def scene(seed: int = 0, size: tuple[int, int] = (60, 80)) -> Augmented:
    """Smooth noise, with labels 0 to 20 and some void."""
    rng = np.random.default_rng(seed)
    image = cv2.resize(rng.integers(0, 256, (6, 8, 3), np.uint8), size[::-1], interpolation=cv2.INTER_CUBIC)
    mask = cv2.resize(rng.integers(0, 21, (6, 8), np.uint8), size[::-1], interpolation=cv2.INTER_NEAREST)
    mask[:5] = VOID
    return image.astype(np.uint8), mask.astype(np.uint8)


def apply(augment: Any, pixels: Augmented, seed: int = 0, fill: tuple[int, int, int] = (0, 0, 0)) -> Augmented:
    sample = Sample(*pixels, fill=fill)
    augment(sample, np.random.default_rng(seed))
    size = sample.size
    assert sample.image.shape == (*size, 3)
    assert sample.mask.shape == size
    assert sample.image.dtype == sample.mask.dtype == np.uint8
    return sample.image, sample.mask


def assert_aligned(image: NDArray[np.uint8], mask: NDArray[np.uint8]) -> None:
    """The coordinates in the image lead to the cells in the mask, and the mask is void where there are none."""
    inside = mask != VOID
    assert not inside[image[..., 2] == 0].any()
    # Pixels at the image's edge are mixed with the fill; bilinear mixing gives the others' coordinates to 1/2 pixel.
    sure = image[..., 2] == 255
    assert inside[sure].all()
    x, y = (np.asarray(image[..., i], float) / 2 for i in (0, 1))
    for dx in (-1, 1):
        for dy in (-1, 1):
            cell = (x + dx) // CELL + 11 * ((y + dy) // CELL)
            near = (x + 1) // CELL + 11 * ((y + 1) // CELL)
            sure &= cell == near  # leave out pixels on the border of two cells
    expected = x // CELL + 11 * (y // CELL)
    assert np.array_equal(mask[sure], expected[sure])


@pytest.mark.parametrize("augment", every(MOVING))
@quick
@given(seed=st.integers(0, 2**32 - 1), height=st.integers(8, 120), width=st.integers(8, 120))
def test_image_and_mask_go_together_and_void_is_where_the_image_is_invented(augment, seed, height, width):
    assert_aligned(*apply(augment, coordinates(height, width), seed))


@quick
@given(seed=st.integers(0, 2**32 - 1), order=st.permutations(sorted(MOVING)))
def test_any_sequence_of_moves_keeps_them_together(seed: int, order: list[str]):
    built = {c.name: build(c) for c in components()}
    sample = Sample(*coordinates(90, 120), fill=(0, 0, 0))
    rng = np.random.default_rng(seed)
    for name in order:
        built[name](sample, rng)
    assert_aligned(sample.image, sample.mask)


@pytest.mark.parametrize("augment", every(COLOURING))
@pytest.mark.parametrize("seed", range(5))
def test_colour_leaves_the_mask_and_the_place_of_things_alone(augment, seed: int):
    image, mask = scene(seed)
    changed, same = apply(augment, (image, mask), seed)
    assert np.array_equal(same, mask)
    assert not np.array_equal(changed, image)
    assert np.corrcoef(changed.ravel(), image.ravel())[0, 1] > 0.9


@pytest.mark.parametrize("augment", every(MOVING | COLOURING))
@quick
@given(seed=st.integers(0, 2**32 - 1))
def test_no_label_is_added_but_void(augment, seed: int):
    pixels = scene(seed)
    _, mask = apply(augment, pixels, seed)
    assert set(np.unique(mask)) <= set(np.unique(pixels[1])) | {VOID}


@pytest.mark.parametrize("augment", every(MOVING | COLOURING))
def test_the_seed_decides_and_no_call_remembers_another(augment):
    pixels = scene()
    first = apply(augment, pixels, 1)
    apply(augment, pixels, 2)
    np.random.seed(5)  # numpy's global generator must not matter
    again = apply(augment, pixels, 1)
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize("augment", every(MOVING | COLOURING))
def test_the_source_is_never_written_to(augment):
    image, mask = scene()
    image.flags.writeable = mask.flags.writeable = False  # as a cached image is
    apply(augment, (image, mask))


@pytest.mark.parametrize("make", [affine, blur, color_jitter, horizontal_flip, rotation, vertical_flip])
def test_a_probability_of_zero_does_nothing(make):
    pixels = scene()
    result = apply(make(p=0.0), pixels)
    assert all(np.array_equal(a, b) for a, b in zip(result, pixels, strict=True))


@pytest.mark.parametrize("augment", every(MOVING))
def test_moves_compute_no_pixel_of_their_own(augment):
    sample = Sample(*coordinates(90, 120))
    sample.transform(np.diag([0.5, 0.5, 1.0]), (45, 60))
    augment(sample, np.random.default_rng(0))
    assert sample._matrix is not None


def test_random_scale_keeps_to_its_range_and_shape():
    sizes = []
    for seed in range(200):
        sample = Sample(*coordinates(100, 120))
        random_scale(scale=(0.5, 1.3))(sample, np.random.default_rng(seed))
        sizes.append(sample.size)
    heights = np.array([h for h, _ in sizes])
    assert 50 <= heights.min() < 54
    assert 126 < heights.max() <= 130
    assert all(abs(w - 1.2 * h) <= 1.2 for h, w in sizes)


def test_the_aspect_changes_at_the_same_area():
    ratios = []
    for seed in range(200):
        sample = Sample(*coordinates(120, 120))
        random_scale(scale=(1.0, 1.0), aspect=1.5)(sample, np.random.default_rng(seed))
        height, width = sample.size
        assert height * width == pytest.approx(14400, rel=0.02)
        ratios.append(width / height)
    assert 0.65 < min(ratios) < 0.7
    assert 1.45 < max(ratios) < 1.53


@quick
@given(seed=st.integers(0, 2**32 - 1), height=st.integers(1, 60), width=st.integers(1, 60))
def test_scaled_images_fill_their_view(seed: int, height: int, width: int):
    _, mask = apply(random_scale(aspect=2.0), coordinates(height, width), seed)
    assert not (mask == VOID).any()


def test_resize_fills_the_size_it_is_given():
    _, mask = apply(resize(size=(30, 100)), coordinates(60, 80))
    assert mask.shape == (30, 100)
    assert not (mask == VOID).any()
    assert apply(resize(size=32), coordinates(60, 80))[1].shape == (32, 32)


def test_a_crop_is_a_window_of_the_image():
    image, mask = coordinates(60, 80)
    corners = set()
    for seed in range(300):
        window, labels = apply(crop(size=(50, 70)), (image, mask), seed)
        x, y = (int(v) // 2 for v in window[0, 0, :2])
        assert np.array_equal(window, image[y : y + 50, x : x + 70])
        assert np.array_equal(labels, mask[y : y + 50, x : x + 70])
        corners.add((y, x))
    assert {y for y, _ in corners} == set(range(11))
    assert {x for _, x in corners} == set(range(11))


def test_a_crop_larger_than_the_image_holds_all_of_it_and_void_around_it():
    image, mask = coordinates(20, 80)
    tops = set()
    for seed in range(50):
        window, labels = apply(crop(size=40), (image, mask), seed)
        rows = np.flatnonzero((labels != VOID).any(1))
        assert len(rows) == 20
        assert not window[labels == VOID].any()  # the fill is 0 here
        x = int(window[rows[0], 0, 0]) // 2
        assert np.array_equal(window[rows], image[:, x : x + 40])
        tops.add(int(rows[0]))
    assert min(tops) < 3
    assert max(tops) > 17


def test_a_crop_seeks_the_foreground():
    image, mask = coordinates(400, 400)
    mask[:] = 0
    mask[:200] = VOID
    # A window of 100² meets these 40² with probability (139/301)² = 0.21, one of ten windows with 0.91.
    mask[230:270, 180:220] = 7
    plain, sought = (
        [np.mean(apply(crop(size=100, foreground=f), (image, mask), seed)[1] == 7) for seed in range(60)]
        for f in (0.0, 1.0)
    )
    assert np.mean(np.array(plain) > 0) < 0.4
    assert np.mean(np.array(sought) > 0) > 0.75


@pytest.mark.parametrize("size", [5, 40, 200])
def test_a_crop_that_finds_no_foreground_still_crops(size: int):
    image, mask = coordinates(60, 80)
    for labels in (np.zeros_like(mask), np.full_like(mask, VOID)):
        assert apply(crop(size=size, foreground=1.0), (image, labels))[1].shape == (size, size)


def test_a_class_balanced_crop_sees_small_classes_as_often_as_large_ones():
    image, mask = coordinates(60, 80)
    mask[:] = 0  # 4,800 pixels, of which 1, 12 and 600 are other classes and 200 are void
    mask[40, 70] = 4
    mask[5:8, 5:9] = 9
    mask[20:40, :30] = 20
    mask[:20, 70:] = VOID
    # A window of one pixel is the pixel that was drawn: a quarter of 2,000 each, ± 4 deviations of 19.4.
    drawn = [int(apply(class_balanced_crop(size=1), (image, mask), seed)[1][0, 0]) for seed in range(2000)]
    counts = {label: drawn.count(label) for label in set(drawn)}
    assert counts.keys() == {0, 4, 9, 20}
    assert all(422 < count < 578 for count in counts.values())


@quick
@given(
    seed=st.integers(0, 2**32 - 1),
    size=st.tuples(st.integers(1, 150), st.integers(1, 150)),
    window=st.tuples(st.integers(1, 200), st.integers(1, 200)),
)
def test_a_class_balanced_crop_holds_a_labelled_pixel_and_lies_where_a_crop_may(seed, size, window):
    image, mask = coordinates(*size)
    mask[:] = VOID
    rng = np.random.default_rng(seed)
    y, x = rng.integers(size[0]), rng.integers(size[1])
    mask[max(0, y - 2) : y + 3, max(0, x - 2) : x + 3] = 7  # of a pixel's size at least where every third is looked at
    sample = Sample(image, mask, fill=(0, 0, 0))
    class_balanced_crop(size=window)(sample, rng)
    assert sample._matrix is not None
    left, top = -sample._matrix[:2, 2]
    assert (sample.mask == 7).any()
    for start, s, w in ((top, size[0], window[0]), (left, size[1], window[1])):
        assert min(0, s - w) <= start <= max(0, s - w)


def test_a_class_balanced_crop_finds_what_is_turned_scaled_and_only_partly_in_view():
    image, mask = coordinates(100, 100)
    mask[:] = 0
    mask[:50] = 3
    mask[90:, 90:] = 5  # out of view once its corner is cut off
    seen = set()
    for seed in range(30):
        sample = Sample(image, mask)
        sample.transform(np.array([[0.0, 2, 0], [2.0, 0, 0], [0, 0, 1]]), (170, 170))
        class_balanced_crop(size=1)(sample, np.random.default_rng(seed))
        seen.add(int(sample.mask[0, 0]))
    assert seen == {0, 3}


@pytest.mark.parametrize("pixel", [(4, 7), (7, 4), (100, 127)])
def test_a_class_balanced_crop_that_looks_at_every_third_pixel_knows_which(pixel: tuple[int, int]):
    # The smaller side of a window of 128 is looked at every 3 pixels, at 1, 4, 7, …
    mask = np.full((200, 200), VOID, np.uint8)
    mask[pixel] = 1
    for seed in range(50):
        sample = Sample(np.zeros((200, 200, 3), np.uint8), mask)
        class_balanced_crop(size=128)(sample, np.random.default_rng(seed))
        assert np.count_nonzero(sample.mask == 1) == 1


def test_a_class_balanced_crop_takes_each_window_around_its_pixel_equally_often():
    image, mask = coordinates(9, 12)
    mask[:] = VOID
    mask[1, 6] = 2
    tops, lefts = [], []
    for seed in range(600):
        window, _ = apply(class_balanced_crop(size=4), (image, mask), seed)
        lefts.append(int(window[0, 0, 0]) // 2)
        tops.append(int(window[0, 0, 1]) // 2)
    # Row 1 is in the windows from rows 0 and 1, column 6 in those from columns 3 to 6. ± 4 deviations of 12.2 and 10.6.
    assert {y: abs(tops.count(y) - 300) < 49 for y in set(tops)} == {0: True, 1: True}
    assert {x: abs(lefts.count(x) - 150) < 43 for x in set(lefts)} == dict.fromkeys(range(3, 7), True)


@pytest.mark.parametrize("size", [5, 40, 200])
def test_a_class_balanced_crop_of_nothing_but_void_is_a_crop(size: int):
    image, mask = coordinates(60, 80)
    _, labels = apply(class_balanced_crop(size=size), (image, np.full_like(mask, VOID)))
    assert labels.shape == (size, size)
    assert (labels == VOID).all()
    for seed in range(5):
        plain, never = (apply(a, (image, mask), seed) for a in (crop(size=size), class_balanced_crop(size=size, p=0.0)))
        assert np.array_equal(plain[0], never[0])


def test_pad_adds_void_right_and_below_and_cuts_nothing():
    image, mask = coordinates(20, 80)
    padded, labels = apply(pad(size=(30, 50)), (image, mask))
    assert labels.shape == (30, 80)
    assert np.array_equal(padded[:20], image)
    assert np.array_equal(labels[:20], mask)
    assert (labels[20:] == VOID).all()


def test_flips_mirror_exactly():
    image, mask = scene()
    flipped, labels = apply(horizontal_flip(p=1.0), (image, mask))
    assert np.array_equal(flipped, image[:, ::-1])
    assert np.array_equal(labels, mask[:, ::-1])
    flipped, labels = apply(vertical_flip(p=1.0), (image, mask))
    assert np.array_equal(flipped, image[::-1])
    assert np.array_equal(labels, mask[::-1])


def test_flips_happen_as_often_as_asked():
    image, mask = scene()
    flips = sum(not np.array_equal(apply(horizontal_flip(p=0.3), (image, mask), s)[1], mask) for s in range(300))
    assert 65 < flips < 115  # 90 ± 3 deviations of 7.9


def test_a_rotation_turns_about_the_centre_and_voids_the_corners():
    image, mask = coordinates(101, 101)
    for seed in range(10):
        turned, labels = apply(rotation(degrees=180.0), (image, mask), seed)
        assert np.abs(turned[50, 50].astype(int) - image[50, 50]).max() <= 1
        # Of a square turned by an angle a, what stays inside is at least that at 45°: 2(sqrt 2 - 1) = 0.828.
        assert 0.82 < np.mean(labels != VOID) <= 1


def test_an_affine_without_ranges_changes_nothing():
    pixels = scene()
    result = apply(affine(degrees=0.0, translate=0.0, scale=(1.0, 1.0), shear=0.0), pixels)
    assert all(np.array_equal(a, b) for a, b in zip(result, pixels, strict=True))


def test_an_affine_moves_by_a_share_of_the_image():
    image, mask = coordinates(100, 120)
    moves = []
    for seed in range(100):
        sample = Sample(image, mask)
        affine(degrees=0.0, translate=0.25, scale=(1.0, 1.0), shear=0.0)(sample, np.random.default_rng(seed))
        assert sample._matrix is not None
        moves.append(sample._matrix[:2, 2])
    x, y = np.abs(moves).max(0)
    assert 28 < x <= 30
    assert 23 < y <= 25


def test_colour_jitter_by_nothing_changes_nothing():
    pixels = scene()
    jitter = color_jitter(brightness=0.0, contrast=0.0, saturation=0.0, hue=0.0)
    assert np.array_equal(apply(jitter, pixels)[0], pixels[0])


def flat(red: int, green: int, blue: int) -> Augmented:
    return np.full((4, 4, 3), (red, green, blue), np.uint8), np.zeros((4, 4), np.uint8)


def test_brightness_is_a_factor():
    values = [apply(color_jitter(brightness=0.5, contrast=0.0, hue=0.0), flat(100, 100, 100), s)[0] for s in range(50)]
    assert 50 <= min(v.min() for v in values) < 60
    assert 140 < max(v.max() for v in values) <= 150


def test_contrast_is_about_the_mean_grey():
    image = np.zeros((2, 2, 3), np.uint8)
    image[0], image[1] = 60, 140
    for seed in range(20):
        dark, light = apply(
            color_jitter(brightness=0.0, contrast=0.5, saturation=0.0, hue=0.0), (image, image[..., 0]), seed
        )[0][:, 0, 0].astype(int)
        assert abs(dark + light - 200) <= 1
        assert 38 <= light - dark <= 122  # from half to one and a half times 80


def test_contrast_keeps_the_mean_that_brightness_gave():
    image = np.zeros((2, 2, 3), np.uint8)
    image[0], image[1] = 60, 120
    for seed in range(20):
        plain, steep = (
            apply(color_jitter(brightness=0.4, contrast=c, saturation=0.0, hue=0.0), (image, image[..., 0]), seed)[0]
            for c in (0.0, 0.4)
        )
        assert plain.mean() == pytest.approx(steep.mean(), abs=1)


def test_hue_turns_colours_and_keeps_how_strong_they_are():
    # The plane of I and Q, whose axes are those of the standard's matrix.
    plane = np.array([[0.596, -0.274, -0.322], [0.211, -0.523, 0.312]])
    strength = np.linalg.norm(plane @ [140, 100, 110])
    for seed in range(20):
        image, _ = apply(color_jitter(brightness=0.0, contrast=0.0, saturation=0.0, hue=0.5), flat(140, 100, 110), seed)
        assert np.linalg.norm(plane @ image[0, 0]) == pytest.approx(strength, abs=1)


def test_greys_have_no_colour_to_change():
    image, _ = apply(color_jitter(brightness=0.0, contrast=0.0, saturation=1.0, hue=0.5), flat(90, 90, 90))
    assert np.abs(image.astype(int) - 90).max() <= 1


def test_saturation_and_hue_keep_the_luma():
    luma = np.array([0.299, 0.587, 0.114])
    jitter = color_jitter(brightness=0.0, contrast=0.0, saturation=0.5, hue=0.5)
    colours = set()
    for seed in range(30):
        image, _ = apply(jitter, flat(120, 100, 110), seed)  # so little colour that nothing is clipped
        assert image[0, 0] @ luma == pytest.approx([120, 100, 110] @ luma, abs=1)
        colours.add(int(image[0, 0].argmax()))
    assert colours == {0, 1, 2}


def test_blur_smooths_and_keeps_the_mean():
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (64, 64, 3), np.uint8)
    smooth, _ = apply(blur(sigma=(1.0, 2.0), p=1.0), (image, image[..., 0]))
    assert smooth.std() < 0.4 * image.std()
    assert smooth.mean() == pytest.approx(image.mean(), rel=0.02)


@pytest.mark.parametrize(
    ("make", "key"),
    [
        (lambda: random_scale(scale=(2.0, 0.5)), r"random_scale\.scale"),
        (lambda: affine(scale=(2.0, 0.5)), r"affine\.scale"),
        (lambda: blur(sigma=(2.0, 0.5)), r"blur\.sigma"),
    ],
)
def test_a_range_upside_down_is_refused(make, key: str):
    with pytest.raises(UsageError, match=key + r": expected \[least, largest\], found \[2, 0\.5\]; swap the two"):
        make()
