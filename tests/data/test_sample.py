"""A sample's geometry: exact where it can be, void wherever it is invented, and the same for image and mask."""

import copy

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from vocseg.components.augmentations import crop, horizontal_flip, random_scale
from vocseg.data.dataset import VOID
from vocseg.data.sample import Sample
from vocseg.errors import UsageError

FILL = (124, 116, 104)


def noise(h: int, w: int) -> Sample:
    """A sample in which every pixel and label is another."""
    rng = np.random.default_rng((h, w))
    image = rng.integers(0, 256, (h, w, 3), dtype=np.uint8)
    return Sample(image, rng.integers(0, 21, (h, w), dtype=np.uint8), FILL)


def shift(x: float, y: float) -> NDArray[np.float64]:
    return np.array([[1.0, 0, x], [0, 1, y], [0, 0, 1]])


def mirror(width: int) -> NDArray[np.float64]:
    return np.array([[-1.0, 0, width], [0, 1, 0], [0, 0, 1]])


def test_an_untouched_sample_gives_back_its_own_arrays():
    image, mask = np.zeros((4, 5, 3), np.uint8), np.zeros((4, 5), np.uint8)
    sample = Sample(image, mask)
    assert sample.image is image
    assert sample.mask is mask
    assert sample.size == (4, 5)


def test_identity_changes_nothing():
    sample, same = noise(23, 31), noise(23, 31)
    same.transform(np.eye(3))
    np.testing.assert_array_equal(same.image, sample.image)
    np.testing.assert_array_equal(same.mask, sample.mask)


@pytest.mark.parametrize(("h", "w"), [(23, 31), (20, 30), (1, 7), (300, 500)])
def test_flips_and_quarter_turns_are_exact(h, w):
    original = noise(h, w)
    cases = {
        "horizontal": (mirror(w), (h, w), lambda a: a[:, ::-1]),
        "vertical": (np.array([[1.0, 0, 0], [0, -1, h], [0, 0, 1]]), (h, w), lambda a: a[::-1]),
        # (x, y) goes to (y, w - x): counter-clockwise on the screen, where y points down.
        "quarter turn": (np.array([[0.0, 1, 0], [-1, 0, w], [0, 0, 1]]), (w, h), np.rot90),
    }
    for name, (matrix, size, expected) in cases.items():
        sample = noise(h, w)
        sample.transform(matrix, size)
        np.testing.assert_array_equal(sample.image, expected(original.image), err_msg=name)
        np.testing.assert_array_equal(sample.mask, expected(original.mask), err_msg=name)


def test_two_flips_are_none():
    sample, original = noise(23, 31), noise(23, 31)
    sample.transform(mirror(31))
    sample.transform(mirror(31))
    np.testing.assert_array_equal(sample.image, original.image)
    np.testing.assert_array_equal(sample.mask, original.mask)


@given(st.integers(-40, 40), st.integers(-40, 40), st.integers(1, 50), st.integers(1, 50))
def test_a_crop_at_whole_pixels_is_exact_and_outside_is_void_and_fill(x, y, height, width):
    original, sample = noise(23, 31), noise(23, 31)
    sample.transform(shift(-x, -y), (height, width))
    # The source in the middle of a field of void that is wide enough for every window.
    mask = np.full((23 + 200, 31 + 200), VOID, np.uint8)
    mask[100:123, 100:131] = original.mask
    image = np.full((23 + 200, 31 + 200, 3), FILL, np.uint8)
    image[100:123, 100:131] = original.image
    window = np.s_[100 + y : 100 + y + height, 100 + x : 100 + x + width]
    assert sample.size == (height, width)
    np.testing.assert_array_equal(sample.mask, mask[window])
    np.testing.assert_array_equal(sample.image, image[window])


def test_transforms_compose_in_the_order_they_are_called():
    # A pixel centre at 2.5 goes to 3.5 and then to 7 by shift and scale, to 5 and then to 6 the other way round.
    mask = np.arange(8, dtype=np.uint8)[None].repeat(8, axis=0)
    first = Sample(np.zeros((8, 8, 3), np.uint8), mask)
    first.transform(shift(1, 0))
    first.transform(np.diag([2.0, 2, 1]), (16, 18))
    assert first.mask[0].tolist() == [255] * 2 + [i // 2 for i in range(16)]
    second = Sample(np.zeros((8, 8, 3), np.uint8), mask)
    second.transform(np.diag([2.0, 2, 1]), (16, 16))
    second.transform(shift(1, 0), (16, 17))
    assert second.mask[0].tolist() == [255] + [i // 2 for i in range(16)]


def test_shrinking_averages_pixels():
    # One white column in eight, an eighth the size: every pixel has 1/8 of 255 = 32, where bilinear sampling between
    # columns 3 and 4 of each eight would see black only.
    columns = np.where(np.arange(64) % 8 == 0, 255, 0).astype(np.uint8)
    sample = Sample(np.broadcast_to(columns[:, None], (64, 64, 3)).copy(), np.zeros((64, 64), np.uint8))
    sample.transform(np.diag([0.125, 0.125, 1]), (8, 8))
    assert sample.image.shape == (8, 8, 3)
    np.testing.assert_allclose(sample.image, 32, atol=1)


def test_what_was_cut_off_is_void_once_the_pixels_were_looked_at():
    sample = noise(20, 20)
    sample.transform(shift(-10, 0), (20, 10))
    sample.transform(shift(10, 0), (20, 20))
    assert not (sample.mask == VOID).any()
    sample = noise(20, 20)
    sample.transform(shift(-10, 0), (20, 10))
    assert sample.image.shape == (20, 10, 3)
    sample.transform(shift(10, 0), (20, 20))
    assert (sample.mask[:, :10] == VOID).all()
    assert not (sample.mask[:, 10:] == VOID).any()


def test_pixels_that_are_set_are_moved_by_what_follows():
    sample = noise(6, 8)
    sample.transform(shift(-2, -1), (4, 5))
    sample.image = np.full((4, 5, 3), 7, np.uint8)
    sample.mask = np.arange(20, dtype=np.uint8).reshape(4, 5)
    sample.transform(mirror(5))
    assert (sample.image == 7).all()
    assert sample.mask[0].tolist() == [4, 3, 2, 1, 0]


@pytest.mark.parametrize("wrong", [np.zeros((5, 6), np.uint8), np.zeros((6, 8), np.int64), np.zeros((6, 8), bool)])
def test_labels_of_another_size_or_type_are_refused(wrong):
    sample = noise(6, 8)
    with pytest.raises(ValueError, match=r"expected uint8 labels of shape \(6, 8\)"):
        sample.mask = wrong
    with pytest.raises(ValueError, match=r"expected uint8 pixels of shape \(6, 8, 3\)"):
        sample.image = np.stack([wrong] * 3, axis=-1)


@given(st.integers(-40, 40), st.integers(-40, 40), st.integers(1, 50), st.integers(1, 50))
def test_a_crop_moves_the_view_to_that_corner(y, x, height, width):
    cropped, shifted = noise(23, 31), noise(23, 31)
    cropped.crop(y, x, (height, width))
    shifted.transform(shift(-x, -y), (height, width))
    np.testing.assert_array_equal(cropped.image, shifted.image)
    np.testing.assert_array_equal(cropped.mask, shifted.mask)


@pytest.mark.parametrize("step", [1, 3, 5, 9])
def test_labels_looked_at_are_those_in_the_middle_of_each_cell(step):
    sample = noise(23, 31)
    for matrix in (np.eye(3), mirror(31), np.array([[0.0, 1, 4], [-1, 0, 29], [0, 0, 1]])):
        sample.transform(matrix)
        found = sample.labels_every(step)
        assert sample._matrix is not None
        np.testing.assert_array_equal(found, copy.copy(sample).mask[step // 2 :: step, step // 2 :: step])
    assert noise(2, 2).labels_every(8).shape == (1, 1)


def test_a_partner_is_what_the_sample_was_given_to_draw():
    other, rng = noise(4, 5), np.random.default_rng(0)
    given_to = []
    sample = Sample(
        np.zeros((4, 5, 3), np.uint8), np.zeros((4, 5), np.uint8), FILL, lambda r: given_to.append(r) or other
    )
    assert sample.partner(rng) is other
    assert given_to == [rng]


def test_a_sample_without_partners_tells_how_to_give_it_some():
    with pytest.raises(
        UsageError, match=r"no partner; the loader provides it, elsewhere pass Sample\(image, mask, draw_"
    ):
        noise(4, 5).partner(np.random.default_rng(0))


def steps() -> st.SearchStrategy[NDArray[np.float64]]:
    """One geometric step of an augmentation."""
    factor = st.floats(0.4, 2.5)
    scales = st.builds(lambda a, b: np.diag([a, b, 1.0]), factor, factor)
    shifts = st.builds(shift, st.floats(-60, 60), st.floats(-60, 60))
    flips = st.sampled_from([mirror(100), np.array([[1.0, 0, 0], [0, -1, 80], [0, 0, 1]])])
    shears = st.builds(lambda a: np.array([[1.0, a, 0], [0, 1, 0], [0, 0, 1]]), st.floats(-0.5, 0.5))
    turns = st.builds(
        lambda a: np.array([[np.cos(a), -np.sin(a), 0], [np.sin(a), np.cos(a), 0], [0, 0, 1]]), st.floats(-3.2, 3.2)
    )
    # About the centre, or else most views would miss the image.
    centred = st.one_of(scales, flips, shears, turns).map(lambda m: shift(50, 40) @ m @ shift(-50, -40))
    return st.one_of(centred, centred, shifts)


@settings(max_examples=200, deadline=None)
@given(st.lists(steps(), min_size=1, max_size=5), st.integers(1, 90), st.integers(1, 90))
def test_any_chain_shows_image_and_mask_where_the_matrix_says(chain, height, width):
    # Red and green tell where a pixel comes from: 2 x and 3 y at its centre. The label is that of its 5 x 5 cell.
    y, x = np.mgrid[:80, :100]
    image = np.stack([2 * x, 3 * y, np.full_like(x, 50)], axis=-1).astype(np.uint8)
    mask = (x // 5 % 10 + y // 5 % 10 * 10).astype(np.uint8)
    sample = Sample(image, mask, FILL)
    for matrix in chain:
        sample.transform(matrix)
    sample.transform(np.eye(3), (height, width))

    matrix = np.eye(3)
    for step in chain:
        matrix = step @ matrix
    rows, columns = np.mgrid[:height, :width]
    centres = np.stack([columns + 0.5, rows + 0.5, np.ones_like(rows)]).reshape(3, -1)
    u, v = (np.linalg.inv(matrix) @ centres)[:2].reshape(2, height, width)

    # Labels: exact but for centres that fall within 0.03 of a pixel's edge, which rounding may put on either side.
    certain = (np.abs(u - np.rint(u)) > 0.03) & (np.abs(v - np.rint(v)) > 0.03)
    inside = (u > 0) & (u < 100) & (v > 0) & (v < 80)
    column, row = np.floor(u).clip(0, 99).astype(int), np.floor(v).clip(0, 79).astype(int)
    expected = np.where(inside, mask[row, column], VOID)
    np.testing.assert_array_equal(sample.mask[certain], expected[certain])
    assert np.isin(sample.mask, [*np.unique(mask), VOID]).all()

    # Pixels: a ramp stays a ramp, away from the edge by what bilinear sampling of the shrunken image reaches.
    scale = min(1.0, np.sqrt(abs(np.linalg.det(matrix))))
    reach = 0.6 + 1.5 / scale
    inner = (u > reach) & (u < 100 - reach) & (v > reach) & (v < 80 - reach)
    # A thirty-second of a shrunken pixel, by which OpenCV rounds positions, and two roundings of the value.
    tolerance = 3 / scale / 32 + 1.5
    np.testing.assert_allclose(sample.image[..., 0][inner], 2 * (u - 0.5)[inner], atol=tolerance)
    np.testing.assert_allclose(sample.image[..., 1][inner], 3 * (v - 0.5)[inner], atol=tolerance)
    far = (u < -reach) | (u > 100 + reach) | (v < -reach) | (v > 80 + reach)
    assert (sample.image[far] == FILL).all()


@settings(max_examples=100, deadline=None)
@given(st.lists(steps(), min_size=1, max_size=4), st.integers(1, 90), st.integers(1, 90))
def test_what_is_computed_in_a_short_way_is_what_opencv_makes_of_the_whole(chain, height, width):
    sample = noise(80, 100)
    pixels, labels = sample.image, sample.mask
    matrix = np.eye(3)
    for step in chain:
        sample.transform(step)
        matrix = step @ matrix
    sample.transform(np.eye(3), (height, width))
    scale = np.sqrt(abs(np.linalg.det(matrix[:2, :2])))
    to_source = np.eye(3)
    if scale < 0.6:
        small = (max(1, round(100 * scale)), max(1, round(80 * scale)))
        pixels = cv2.resize(pixels, small, interpolation=cv2.INTER_AREA)
        to_source = np.diag([100 / small[0], 80 / small[1], 1.0])

    def warp(array, matrix, interpolation, outside):
        centred = (shift(-0.5, -0.5) @ matrix @ shift(0.5, 0.5))[:2]
        return cv2.warpAffine(array, centred, (width, height), flags=interpolation, borderValue=outside)

    # Noise is as steep as pixels can be: rounding positions otherwise than OpenCV would show.
    expected = warp(pixels, matrix @ to_source, cv2.INTER_LINEAR, FILL).astype(int)
    assert np.abs(sample.image - expected).max() <= 1
    # Labels, but for centres that fall on a pixel's edge.
    other = sample.mask != warp(labels, matrix, cv2.INTER_NEAREST, VOID)
    y, x = np.nonzero(other)
    u, v = (np.linalg.inv(matrix) @ np.stack([x + 0.5, y + 0.5, np.ones(len(x))]))[:2]
    assert (np.minimum(np.abs(u - np.rint(u)), np.abs(v - np.rint(v))) < 1e-3).all()


def test_a_view_of_nothing_but_outside_is_void_and_fill():
    for matrix in (shift(-100, 0), shift(0.5, 300), mirror(-40), np.diag([1.5, 1.5, 1]) @ shift(0, 99)):
        sample = noise(23, 31)
        sample.transform(matrix, (10, 12))
        assert (sample.image == FILL).all()
        assert (sample.mask == VOID).all()
        assert sample.image.shape == (10, 12, 3)


@pytest.mark.parametrize("matrix", [np.eye(3), mirror(31), shift(-4, -2), np.diag([1.5, 1.5, 1])])
def test_what_is_shown_is_never_the_memory_it_was_read_from(matrix):
    original, sample = noise(23, 31), noise(23, 31)
    source = sample.image, sample.mask
    for array in source:
        array.setflags(write=False)  # as what comes from a cache is
    sample.transform(matrix, (20, 24))
    sample.image[:] = 0
    sample.mask[:] = 0
    np.testing.assert_array_equal(source[0], original.image)


def furthest(a: NDArray[np.float64], b: NDArray[np.float64]) -> float:
    """The statistic of Kolmogorov and Smirnov: how far two samples' shares below any value are apart."""
    values = np.sort(np.concatenate([a, b]))
    below = [np.searchsorted(np.sort(sample), values, side="right") / len(sample) for sample in (a, b)]
    return float(np.abs(below[0] - below[1]).max())


def test_crops_are_distributed_as_those_of_scaling_then_cutting_then_mirroring():
    # Where a view looks is read off its pixels, in an image whose red and green tell x and y: 2 x and 3 y at a centre.
    height, width, side, count = 80, 100, 48, 1500
    y, x = np.mgrid[:height, :width]
    image = np.stack([2 * x, 3 * y, x], axis=-1).astype(np.uint8)
    mask = np.zeros((height, width), np.uint8)
    recipe = [random_scale(scale=(0.5, 2.0)), crop(size=side), horizontal_flip()]

    def line(values: NDArray[np.uint8], inside: NDArray[np.bool_], step: int) -> tuple[float, float]:
        """Slope of the source's coordinate along a line of the view, and its value in the view's middle."""
        (at,) = np.nonzero(inside)
        at = at[2:-2]
        slope, start = np.polyfit(at + 0.5, values[at] / step + 0.5, 1)
        return float(slope), float(start + slope * side / 2)

    found = []
    for seed in range(count):
        sample, rng = Sample(image, mask, FILL), np.random.default_rng((7, seed))
        for step in recipe:
            step(sample, rng)
        inside = sample.mask != VOID
        row, column = np.argmax(inside.sum(axis=1)), np.argmax(inside.sum(axis=0))
        slope, across = line(sample.image[row, :, 0], inside[row], 2)
        _, down = line(sample.image[:, column, 1], inside[:, column], 3)
        found.append((1 / abs(slope), across, down, slope < 0))

    rng = np.random.default_rng(8)
    expected = []
    for _ in range(count):
        factor = rng.uniform(0.5, 2.0)
        scaled = round(width * factor), round(height * factor)
        corner = [rng.integers(min(0, s - side), max(0, s - side) + 1) for s in scaled]
        # The window's middle, back on the source's scale.
        middle = [(c + side / 2) * s / w for c, w, s in zip(corner, scaled, (width, height), strict=True)]
        expected.append((factor, *middle, rng.random() < 0.5))

    ours, theirs = np.array(found, float), np.array(expected, float)
    # Two samples of one distribution are further apart once in a thousand times: 1.95 * sqrt(2 / 1500) = 0.071. With
    # scales up to 1.8 the first would be 0.13, with crops in the middle the others 0.2 and more.
    distances = [furthest(ours[:, i], theirs[:, i]) for i in range(3)]
    assert max(distances) < 0.071
    # 750 of 1,500 are mirrored, with a deviation of 19.4: 3.3 of them happen once in a thousand times.
    assert abs(ours[:, 3].sum() - 750) < 64
