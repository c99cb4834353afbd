import math
import subprocess
import sys
from xml.etree import ElementTree

import matplotlib
import numpy as np
import pytest
from PIL import Image

from vocseg.report.figures import _confusion, _curves, _iou_bars, draw_confusion, draw_curves, draw_iou_bars
from vocseg.report.style import SHADES, label, paper_style


def record(epoch, **values):
    known = {"train_loss": 2 / epoch, "val_loss": 3 / epoch, "miou": 0.1 * epoch, "pixel_accuracy": 0.8, "lr": 1e-3}
    return {"epoch": epoch, **known, **values}


EPOCHS = [record(epoch) for epoch in range(1, 6)]
IOU = {"background": 0.9, "cat": 0.3, "dog": None, "sheep": 0.6}
MATRIX = np.array([[90, 10, 0], [30, 70, 0], [0, 0, 0]])

DRAWN = {
    "curves": lambda path: draw_curves(EPOCHS, path),
    "bars": lambda path: draw_iou_bars(IOU, path, miou=0.6, interval=(0.5, 0.7)),
    "confusion": lambda path: draw_confusion(MATRIX, ["background", "cat", "dog"], path),
}


@pytest.fixture(autouse=True)
def _our_style():
    with paper_style():
        yield


def lines(axes):
    """Label to (x, y) of the lines that a legend would list."""
    named = [line for line in axes.lines if not line.get_label().startswith("_")]
    return {line.get_label(): tuple(np.asarray(values).tolist() for values in line.get_data()) for line in named}


def panel(figure, name):
    """The axes that hold the line of that name."""
    return next(axes for axes in figure.axes if name in lines(axes))


def legend(axes):
    return [text.get_text() for text in axes.get_legend().get_texts()]


def test_curves_of_nothing_finite_say_so_and_no_axis_has_an_epoch_0():
    nothing = _curves([{"epoch": 1, "train_loss": math.nan, "lr": 0.1}], None)
    assert [text.get_text() for axes in nothing.axes for text in axes.texts] == ["no finite value"] * 2
    many = _curves([record(epoch) for epoch in range(1, 31)], None)
    assert all(axes.get_xlim()[0] > 0 for axes in many.axes)
    rates = panel(many, "learning rate")
    assert max(lines(rates)["learning rate"][1]) < rates.get_ylim()[1]


@pytest.mark.parametrize("draw", DRAWN.values(), ids=DRAWN)
def test_the_suffix_picks_the_format(draw, tmp_path):
    draw(tmp_path / "a.png")
    draw(tmp_path / "a.svg")
    draw(tmp_path / "a.pdf")
    with Image.open(tmp_path / "a.png") as picture:
        picture.load()
        assert picture.format == "PNG"
        assert picture.info["dpi"] == pytest.approx((200, 200), abs=0.1)
        assert np.asarray(picture.convert("L")).min() < 128
    assert ElementTree.parse(tmp_path / "a.svg").getroot().tag.endswith("svg")
    assert (tmp_path / "a.pdf").read_bytes().startswith(b"%PDF")


@pytest.mark.parametrize("suffix", [".png", ".svg", ".pdf"])
def test_equal_inputs_give_equal_files_whatever_the_users_settings(suffix, tmp_path):
    draw_curves(EPOCHS, tmp_path / f"a{suffix}")
    with matplotlib.rc_context({"axes.facecolor": "red", "font.size": 20, "figure.dpi": 50, "savefig.dpi": 50}):
        before = dict(matplotlib.rcParams)
        draw_curves(EPOCHS, tmp_path / f"b{suffix}")
        assert dict(matplotlib.rcParams) == before
    assert (tmp_path / f"a{suffix}").read_bytes() == (tmp_path / f"b{suffix}").read_bytes()


def test_pyplot_is_never_imported():
    code = "import sys, vocseg.report.figures, vocseg.report.overlays; sys.exit('matplotlib.pyplot' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_curves_hold_every_epoch_and_mark_the_one_with_the_highest_miou():
    figure = _curves([*EPOCHS[:3], record(4, miou=0.2)], None)
    loss, metrics, lr = (panel(figure, name) for name in ("training", "mIoU", "learning rate"))
    assert legend(loss) == ["training", "validation"]
    assert legend(metrics) == ["mIoU", "pixel accuracy", "best epoch 3: 0.300"]
    assert lines(loss)["training"] == ([1, 2, 3, 4], [2, 1, 2 / 3, 0.5])
    assert lines(metrics)["mIoU"] == ([1, 2, 3, 4], [0.1, 0.2, pytest.approx(0.3), 0.2])
    assert lines(metrics)["best epoch 3: 0.300"] == ([3], [pytest.approx(0.3)])
    assert lines(lr)["learning rate"] == ([1, 2, 3, 4], [1e-3] * 4)


def test_a_best_epoch_can_be_given():
    assert legend(panel(_curves(EPOCHS, 2), "mIoU"))[2] == "best epoch 2: 0.200"


def test_an_epoch_without_validation_is_passed_over_and_nan_breaks_the_line():
    epochs = [
        record(1),
        record(2, val_loss=None, miou=None),
        record(3, val_loss=math.nan),
        record(4, val_loss=math.inf),
    ]
    del epochs[1]["pixel_accuracy"]
    figure = _curves(epochs, None)
    x, y = lines(panel(figure, "validation"))["validation"]
    assert x == [1, 3, 4]
    assert y == pytest.approx([3, math.nan, math.nan], nan_ok=True)
    assert lines(panel(figure, "mIoU"))["mIoU"][0] == [1, 3, 4]
    assert lines(panel(figure, "mIoU"))["pixel accuracy"][0] == [1, 3, 4]


def test_losses_over_more_than_a_decade_are_drawn_on_a_log_scale():
    assert panel(_curves([record(1, train_loss=4), record(2, train_loss=0.3)], None), "training").get_yscale() == "log"
    for last in (0.5, 0.0, -1.0):
        epochs = [record(1, train_loss=4), record(2, train_loss=last)]
        assert panel(_curves(epochs, None), "training").get_yscale() == "linear"


NAN = record(1, train_loss=math.nan, val_loss=math.nan, miou=math.nan, pixel_accuracy=math.nan, lr=math.nan)


@pytest.mark.parametrize(
    "epochs", [[], [record(1)], [NAN], [NAN, record(2)], [record(1, lr=0.0, train_loss=0.0)]], ids=str
)
def test_curves_of_hardly_anything_are_drawn(epochs, tmp_path):
    draw_curves(epochs, tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as picture:
        assert picture.size == (1400, 520)  # 7.0 x 2.6 inches at 200 dpi


def bars(figure):
    """Class to (bar length, number beside it), from top to bottom and column by column."""
    found = {}
    for axes in figure.axes:
        names = [text.get_text() for text in axes.get_yticklabels()]
        numbers = [text.get_text() for text in axes.texts]
        lengths = [bar.get_width() for bar in axes.patches if bar.get_height() == pytest.approx(0.72)]
        found |= dict(zip(names, zip(lengths, numbers, strict=True), strict=True))
    return found


def test_bars_run_from_the_best_class_to_the_absent_one():
    figure = _iou_bars({**IOU, "cow": math.nan}, 0.6, (0.5, 0.7))
    assert list(bars(figure).items()) == [
        ("background", (0.9, "0.90")),
        ("sheep", (0.6, "0.60")),
        ("cat", (0.3, "0.30")),
        ("dog", (0, "absent")),
        ("cow", (0, "absent")),
    ]
    assert figure.get_suptitle() == "mIoU 0.600 (95 % interval 0.500\N{EN DASH}0.700)"
    assert [line.get_xdata() for line in figure.axes[0].lines] == [[0.6, 0.6]]


def test_an_interval_that_is_not_known_is_left_out():
    assert _iou_bars(IOU, 0.6, (math.nan, math.nan)).get_suptitle() == "mIoU 0.600"


@pytest.mark.parametrize("count", [0, 1, 2, 21, 151, 255])
def test_every_class_has_its_bar_on_one_page(count):
    figure = _iou_bars({f"class {i}": i / 300 for i in range(count)}, 0.4, None)
    assert len(bars(figure)) == count
    width, height = figure.get_size_inches()
    assert width <= 12
    assert height <= 9


def test_many_bars_are_drawn(tmp_path):
    draw_iou_bars({}, tmp_path / "none.png", miou=math.nan, interval=(math.nan, math.nan))
    draw_iou_bars({f"class {i}": i / 300 for i in range(151)}, tmp_path / "many.png", miou=0.4, interval=(0.3, 0.5))
    with Image.open(tmp_path / "none.png") as none, Image.open(tmp_path / "many.png") as many:
        assert (none.width, many.width) == (680, 1400)  # one column of a paper, and both, at 200 dpi


def test_without_any_scored_class_there_is_no_mean():
    figure = _iou_bars({"a": None, "b": math.nan}, math.nan, (math.nan, math.nan))
    assert figure.get_suptitle() == ""
    assert not figure.axes[0].lines


def test_confusions_are_shares_of_the_true_class():
    figure = _confusion(MATRIX, ["background", "cat", "dog"])
    axes = figure.axes[0]
    # 90 of 100 background pixels and 70 of 100 cat pixels are right; there is no dog to be found.
    shares = axes.images[0].get_array()
    assert shares[:2].tolist() == [[0.9, 0.1, 0], [0.3, 0.7, 0]]
    assert shares.mask[2].all()
    numbers = {text.get_position(): text.get_text() for text in axes.texts}  # (column, row)
    assert numbers == {(0, 0): "90", (1, 0): "10", (0, 1): "30", (1, 1): "70"}
    assert (axes.get_ylabel(), axes.get_xlabel()) == ("truth", "prediction")
    assert [text.get_text() for text in axes.get_yticklabels()] == ["background", "cat", "dog"]
    assert legend(axes) == ["class absent from the truth"]


@pytest.mark.parametrize("count", [25, 26, 151])
def test_numbers_are_written_up_to_25_classes(count):
    figure = _confusion(np.eye(count, dtype=np.int64), [f"class {i}" for i in range(count)])
    assert len(figure.axes[0].texts) == (25 if count == 25 else 0)
    assert figure.axes[0].get_legend() is None
    assert max(figure.get_size_inches()) <= 15


def test_a_matrix_that_does_not_fit_the_classes_is_refused():
    with pytest.raises(ValueError, match=r"expected a matrix \(2, 2\) for 2 classes, got \(3, 3\)"):
        _confusion(MATRIX, ["a", "b"])


def test_equal_steps_of_the_colour_map_are_equal_steps_of_lightness():
    """Lightness in OKLab (Ottosson 2020) falls evenly from 1, so that no share stands out by its colour alone."""
    srgb = SHADES(np.linspace(0, 1, 9))[:, :3]
    linear = np.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4)
    lms = linear @ np.array(
        [
            [0.4122214708, 0.2119034982, 0.0883024619],
            [0.5363325363, 0.6806995451, 0.2817188376],
            [0.0514459929, 0.1073969566, 0.6299787005],
        ]
    )
    lightness = np.cbrt(lms) @ [0.2104542553, 0.7936177850, -0.0040720468]
    assert lightness[0] == pytest.approx(1, abs=1e-3)
    assert np.diff(lightness) == pytest.approx(-0.0925, abs=0.005)


def test_names_are_drawn_as_they_are_written(tmp_path):
    names = ["_background_", "$\\frac{$", "cost $5 $6", "two\nlines", "\udcff.jpg", "猫", "कुत्ता", "x" * 300]
    draw_iou_bars(dict.fromkeys(names, 0.5), tmp_path / "a.png", miou=0.5)
    draw_confusion(np.eye(8, dtype=np.int64), names, tmp_path / "b.png")
    figure = _iou_bars(dict.fromkeys(names, 0.5), 0.5, None)
    assert list(bars(figure))[:4] == ["_background_", "$\\frac{$", "cost $5 $6", "two\N{REPLACEMENT CHARACTER}lines"]


def test_a_long_name_loses_its_middle():
    assert label("abcdefgh", 8) == "abcdefgh"
    assert label("abcdefghi", 8) == "abcd…ghi"
    assert label("a\tb\udc80") == "a\N{REPLACEMENT CHARACTER}b\N{REPLACEMENT CHARACTER}"
