import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from PIL import Image

from vocseg.report.overlays import Example, _comparison, draw_comparison, overlay
from vocseg.report.style import paper_style, save

CLASSES = ("background", "cat", "dog", "_sheep_", "$cow")
PALETTE = ((0, 0, 0), (201, 1, 1), (1, 201, 1), (1, 1, 201), (101, 101, 1))


@pytest.fixture(autouse=True)
def _our_style():
    with paper_style():
        yield


def photo(height, width, grey=101):
    return np.full((height, width, 3), grey, np.uint8)


def halves(height=12, width=16, left=0, right=1):
    mask = np.full((height, width), left, np.uint8)
    mask[:, width // 2 :] = right
    return mask


def example(group="best", name="000032", mask=None, miou=0.5, image=None):
    mask = halves() if mask is None else mask
    return Example(group, name, photo(*mask.shape) if image is None else image, mask, mask, miou)


def texts(figure):
    return [text.get_text() for text in figure.axes[0].texts]


def test_an_overlay_mixes_a_classs_colour_with_the_grey_photograph():
    shown = overlay(photo(12, 16), halves(), PALETTE, alpha=0.5)
    # Background: half 101, half white = 178. Cat: half 101, half (201, 1, 1) = (151, 51, 51).
    # Where they meet, between columns 7 and 8, both sides are the dark line.
    assert np.unique(shown[:, :7], axis=1).tolist() == [[[178, 178, 178]]] * 12
    assert np.unique(shown[:, 9:], axis=1).tolist() == [[[151, 51, 51]]] * 12
    assert np.unique(shown[:, 7:9], axis=1).tolist() == [[[25, 25, 25]]] * 12


def test_a_class_whose_colour_is_grey_is_told_from_the_photograph():
    shown = overlay(photo(12, 16), halves(), [(0, 0, 0), (128, 128, 128)])
    assert np.ptp(shown[:, 10:], axis=-1).min() > 30
    several = overlay(photo(12, 16), halves(left=1, right=2), [(0, 0, 0), (85, 85, 85), (170, 170, 170)])
    assert (np.abs(several[:, 2].astype(int) - several[:, -2]).max(axis=-1) > 20).all()


def test_void_is_striped_in_grey_and_draws_no_line_around_itself():
    shown = overlay(photo(12, 16), halves(left=1, right=255), PALETTE, alpha=0.5)
    assert np.unique(shown[:, :8].reshape(-1, 3), axis=0).tolist() == [[151, 51, 51]]
    assert np.unique(shown[:, 8:].reshape(-1, 3), axis=0).tolist() == [[165] * 3, [250] * 3]


@settings(max_examples=30, deadline=None)
@given(mask=arrays(np.uint8, array_shapes(min_dims=2, max_dims=2, max_side=9), elements=st.integers(0, 255)))
def test_an_overlay_changes_neither_image_nor_mask(mask):
    image = np.random.default_rng(0).integers(0, 256, (*mask.shape, 3), dtype=np.uint8)
    image_before, mask_before = image.copy(), mask.copy()
    shown = overlay(image, mask)
    assert (shown.shape, shown.dtype) == (image.shape, np.uint8)
    assert np.array_equal(image, image_before)
    assert np.array_equal(mask, mask_before)


def test_an_overlay_of_unlike_sizes_is_refused():
    with pytest.raises(ValueError, match=r"got \(3, 4, 3\) and \(4, 4\)"):
        overlay(photo(3, 4), np.zeros((4, 4), np.uint8))


def test_the_legend_names_the_classes_that_occur_and_no_others():
    truth, prediction = halves(left=0, right=255), halves(left=0, right=4)
    odd = Example("", "x", photo(12, 16), truth, prediction, 0.25)
    figure = _comparison([example(mask=halves(left=0, right=3)), odd], CLASSES, PALETTE, "")
    assert [text for text in texts(figure) if text in (*CLASSES, "void")] == ["background", "_sheep_", "$cow", "void"]


def test_headings_groups_names_and_scores_are_written():
    figure = _comparison(
        [example("best", "a", miou=0.91234), example("worst", "b", miou=None), example("worst", "c", miou=math.nan)],
        CLASSES,
        PALETTE,
        "a title",
    )
    written = texts(figure)
    assert written[:7] == ["a title", *("image", "truth", "prediction") * 2]
    assert written[7:15] == ["a", "mIoU 0.912", "best", "b", "mIoU \N{EN DASH}", "c", "mIoU \N{EN DASH}", "worst"]


def test_examples_stand_in_pairs_only_where_a_group_has_several():
    one = _comparison([example("best"), example("worst")], CLASSES, PALETTE, "")
    pairs = _comparison([example("best"), example("best"), example("worst")], CLASSES, PALETTE, "")
    assert texts(one).count("image") == 1
    assert texts(pairs).count("image") == 2


def panels(figure):
    """The arrays of the photographs and overlays, without the legend's swatches."""
    return [image.get_array() for image in figure.axes[0].images if image.get_array().shape[:2] != (24, 40)]


@pytest.mark.parametrize("shape", [(375, 500), (500, 333), (20, 400), (400, 20), (1, 1), (3000, 4000)])
def test_panels_keep_the_proportions_of_the_image(shape):
    figure = _comparison([example(mask=np.ones(shape, np.uint8))], CLASSES, PALETTE, "")
    shown = panels(figure)
    assert len(shown) == 3
    for image, pixels in zip(figure.axes[0].images, shown, strict=False):
        height, width = pixels.shape[:2]
        assert height == max(1, round(width * shape[0] / shape[1])) or width == max(
            1, round(height * shape[1] / shape[0])
        )
        left, right, bottom, top = image.get_extent()
        assert (right - left, bottom - top) == (width, height)


def test_enlarging_a_mask_invents_no_class():
    figure = _comparison([example(mask=halves(left=0, right=4))], CLASSES, PALETTE, "")
    # Background, the dark line, and 0.35 * 101 + 0.65 * (101, 101, 1) = (101, 101, 36).
    for pixels in panels(figure)[1:]:
        assert np.unique(pixels.reshape(-1, 3), axis=0).tolist() == [[25] * 3, [101, 101, 36], [178] * 3]


def test_panels_reach_the_file_pixel_by_pixel(tmp_path):
    image = np.random.default_rng(0).integers(0, 256, (300, 400, 3), dtype=np.uint8)
    figure = _comparison([example(image=image, mask=np.zeros((300, 400), np.uint8))] * 2, CLASSES, PALETTE, "")
    save(figure, tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as picture:
        drawn = np.asarray(picture.convert("RGB"))
        assert picture.width == 2100  # 7 inches at 300 dpi
        assert picture.info["dpi"] == pytest.approx((300, 300), abs=0.1)
    for artist in figure.axes[0].images[:6]:
        left, right, bottom, top = map(int, artist.get_extent())
        assert np.array_equal(drawn[top:bottom, left:right], artist.get_array())


@pytest.mark.parametrize("suffix", [".png", ".svg", ".pdf"])
def test_a_comparison_of_nothing_or_of_many_is_drawn(suffix, tmp_path):
    draw_comparison([], CLASSES, tmp_path / f"none{suffix}", title="none")
    draw_comparison([example(name="x" * 200)] * 5, CLASSES, tmp_path / f"many{suffix}", palette=PALETTE)
    assert (tmp_path / f"none{suffix}").stat().st_size < (tmp_path / f"many{suffix}").stat().st_size


def test_a_legend_of_151_classes_stays_within_the_page():
    mask = np.arange(151, dtype=np.uint8).reshape(1, 151).repeat(100, axis=0)
    figure = _comparison([example(mask=mask)], [f"class number {i}" for i in range(151)], (), "")
    right = max(text.get_window_extent().x1 for text in figure.axes[0].texts)
    assert right <= 2100
    assert sum(text.startswith("class number") for text in texts(figure)) == 151


def test_masks_of_another_size_than_the_image_are_refused():
    wrong = Example("best", "000032", photo(12, 16), halves(), halves(12, 18), 0.5)
    with pytest.raises(ValueError, match=r"000032: the sizes of image \(12, 16\), truth \(12, 16\) and prediction"):
        _comparison([wrong], CLASSES, PALETTE, "")
