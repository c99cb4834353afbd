import json
import os
import time

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from vocseg.data.dataset import Dataset
from vocseg.data.images import read_pair
from vocseg.data.parallel import in_threads
from vocseg.data.stats import Spread, class_pixels, stats
from vocseg.errors import DataError, UsageError
from vocseg.report.dataset import draw_stats

CLASSES = ("background", "cat", "dog")

# Two images, 2 x 3 and 4 x 2 (h x w): six and eight pixels.
MASKS = (
    np.array([[0, 0, 1], [0, 255, 1]], np.uint8),
    np.array([[0, 0], [0, 0], [255, 255], [255, 1]], np.uint8),
)


def dataset(masks: tuple[np.ndarray, ...] = MASKS, classes: tuple[str, ...] = CLASSES) -> Dataset:
    def read(index: int) -> tuple[np.ndarray, np.ndarray]:
        return np.zeros((*masks[index].shape, 3), np.uint8), masks[index]

    return Dataset(classes, [f"image {i}" for i in range(len(masks))], read)


def test_pixels_and_images_are_counted_per_class_and_void_apart():
    counted = stats(dataset())
    assert counted.classes == CLASSES
    assert counted.images == 2
    # background 3 + 4, cat 2 + 1, dog none; void 1 + 3
    assert counted.class_pixels == (7, 3, 0)
    assert counted.class_images == (2, 2, 0)
    assert counted.void_pixels == 4
    assert counted.labelled_pixels == 10
    assert counted.pixel_shares == (0.7, 0.3, 0.0)
    assert counted.image_shares == (1.0, 1.0, 0.0)
    assert counted.void_share == 4 / 14
    assert counted.heights == Spread(2, 3.0, 4)
    assert counted.widths == Spread(2, 2.5, 3)


def test_class_pixels_are_the_counts_without_void():
    counts = class_pixels(dataset())
    assert counts.dtype == np.int64
    assert counts.tolist() == [7, 3, 0]


def test_a_mask_that_is_void_all_over_counts_nothing():
    counted = stats(dataset((np.full((2, 2), 255, np.uint8),)))
    assert counted.class_pixels == (0, 0, 0)
    assert counted.pixel_shares == (0.0, 0.0, 0.0)
    assert counted.void_share == 1.0


def test_counts_of_many_images_do_not_depend_on_the_threads():
    rng = np.random.default_rng(0)
    masks = tuple(rng.integers(0, 3, (7, 5), dtype=np.uint8) for _ in range(200))
    assert class_pixels(dataset(masks)).tolist() == np.bincount(np.stack(masks).ravel(), minlength=3).tolist()


@pytest.mark.parametrize("count", [stats, class_pixels])
def test_an_image_that_cannot_be_read_is_a_data_error_with_its_file(count, tmp_path):
    image, mask = tmp_path / "a.jpg", tmp_path / "a.png"
    Image.new("RGB", (4, 4)).save(image)
    mask.write_bytes(b"no PNG")
    broken = Dataset(CLASSES, ["a"], lambda index: read_pair(image, mask, 3), [(image, mask)])
    with pytest.raises(DataError, match=str(mask)):
        count(broken)


def test_all_images_that_cannot_be_read_are_named():
    def read(index: int) -> tuple[np.ndarray, np.ndarray]:
        if index % 3 == 1:
            raise DataError(f"image {index} is damaged")
        return np.zeros((2, 2, 3), np.uint8), np.zeros((2, 2), np.uint8)

    broken = Dataset(CLASSES, [f"image {i}" for i in range(8)], read)
    for count in (stats, class_pixels):
        with pytest.raises(DataError) as error:
            count(broken)
        assert [str(problem) for problem in error.value.problems] == [f"image {i} is damaged" for i in (1, 4, 7)]


def test_progress_tells_each_image_and_ends_at_all():
    seen: list[tuple[int, int]] = []
    stats(dataset(), lambda *p: seen.append(p))
    assert seen == [(1, 2), (2, 2)]


def test_what_threads_compute_comes_in_order_and_stops_at_the_first_error():
    assert list(in_threads(lambda i: i * i, range(50))) == [i * i for i in range(50)]
    done: list[int] = []

    def fail(index: int) -> int:
        if index == 3:
            raise DataError("three")
        if index > 3:
            time.sleep(0.005)
        done.append(index)
        return index

    results = in_threads(fail, range(1000))
    assert [next(results) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(DataError, match="three"):
        next(results)
    assert len(done) < 999


@pytest.mark.parametrize("suffix", [".png", ".svg", ".pdf"])
def test_the_picture_is_drawn_in_each_format(suffix, tmp_path):
    path = tmp_path / f"stats{suffix}"
    draw_stats({"train": stats(dataset()), "val": stats(dataset(MASKS[:1]))}, path)
    assert path.stat().st_size > 1000


def test_the_picture_takes_a_log_scale_only_where_a_linear_one_would_hide_classes(tmp_path):
    even = np.array([[0, 0, 1, 2]], np.uint8)
    # 9,900 of 10,000 pixels are background, 90 cat and 10 dog: their median is 0.9 %.
    skewed = np.repeat(np.array([0, 1, 2], np.uint8), [9900, 90, 10]).reshape(100, 100)
    for name, mask, logarithmic in (("even", even, False), ("skewed", skewed, True)):
        path = tmp_path / f"{name}.svg"
        draw_stats({"train": stats(dataset((mask,)))}, path)
        assert ("log scale" in path.read_text(encoding="utf-8")) == logarithmic


def test_a_picture_of_nothing_but_void_and_odd_names_is_drawn(tmp_path):
    classes = ("$x_1$", "a" * 200, "<b>&")
    draw_stats({"train": stats(dataset((np.full((2, 2), 255, np.uint8),), classes))}, tmp_path / "void.png")
    assert (tmp_path / "void.png").is_file()


def test_the_command_prints_a_table_or_json_and_draws_a_picture(tmp_path):
    from vocseg.cli.data import command

    picture = tmp_path / "new" / "stats.svg"
    few = ["stats", "quickstart", "--set", "data.images=3", "--set", "data.val_images=2"]
    table = CliRunner().invoke(command, [*few, "--out", str(picture)], catch_exceptions=False).stdout
    assert "train: 3 images, width " in table
    assert picture.is_file()
    counted = json.loads(CliRunner().invoke(command, [*few, "--json", "--split", "val"]).stdout)
    assert list(counted) == ["val"]
    assert counted["val"]["images"] == 2
    classes = counted["val"]["classes"]
    assert sum(c["pixels"] for c in classes.values()) == counted["val"]["labelled_pixels"]
    assert f"{classes['background']['pixels']:,}" in table


def test_a_picture_of_an_unknown_format_is_refused_before_anything_is_read(tmp_path):
    from vocseg.cli.data import command

    with pytest.raises(UsageError, match=r"stats\.gif: expected a file that ends in"):
        CliRunner().invoke(
            command, ["stats", "no such recipe", "--out", str(tmp_path / "stats.gif")], catch_exceptions=False
        )


def test_threads_are_only_a_few_images_ahead_of_who_asks():
    begun = []
    results = in_threads(lambda index: begun.append(index) or index, range(10_000))
    assert [next(results) for _ in range(3)] == [0, 1, 2]
    results.close()
    assert len(begun) <= 3 + 8 * (os.cpu_count() or 1)
