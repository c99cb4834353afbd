import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from vocseg.errors import DataError
from vocseg.evaluate.confusion import count_pixels, marginals
from vocseg.evaluate.dialect import constant_counts, dialect_scores, perfect_counts
from vocseg.evaluate.figures import figures
from vocseg.evaluate.validation import Evaluation
from vocseg.runs.files import without_nan


def counted(truth, prediction, classes):
    counts = [
        count_pixels(torch.from_numpy(t), torch.from_numpy(p), classes) for t, p in zip(truth, prediction, strict=True)
    ]
    matrix = torch.stack(counts).sum(0)[:-1].numpy()
    return Evaluation(0.5, matrix, torch.stack([marginals(c) for c in counts]).numpy())


def pixel_by_pixel(truth, prediction, classes):
    """The dialect as it is told: void turned into background, then IoU image by image and class by class."""
    iou, right = [], []
    for t, p in zip(truth, prediction, strict=True):
        t = np.where(t == 255, 0, t)
        unions = [((t == k) | (p == k)).sum() for k in range(classes)]
        hits = [((t == k) & (p == k)).sum() for k in range(classes)]
        iou.append(np.mean([h / u if u else 0 for h, u in zip(hits, unions, strict=True)]))
        right.append((t == p).mean())
    return np.mean(iou), np.mean(right)


TRUTH = np.array([[[0, 0, 1], [1, 1, 255]], [[255, 255, 0], [0, 0, 0]]], np.uint8)
PREDICTION = np.array([[[0, 1, 1], [1, 0, 0]], [[0, 2, 0], [0, 0, 2]]], np.uint8)


def test_two_images_worked_out_by_hand():
    # First image, void taken for background: truth 0 0 1 1 1 0, predicted 0 1 1 1 0 0. Class 0: 2 hits of a union of 4;
    # class 1: 2 of 4; class 2 is absent, 0. Mean of three: 1/3. 4 of 6 pixels are right.
    # Second: all six are background, predicted 0 2 0 0 0 2. Class 0: 4 of 6; class 1 absent, class 2: 0 of 2. Mean 2/9.
    found = dialect_scores(counted(TRUTH, PREDICTION, 3).per_image)
    assert found.miou == pytest.approx((1 / 3 + 2 / 9) / 2)
    assert found.pixel_accuracy == pytest.approx((4 / 6 + 4 / 6) / 2)


masks = arrays(np.uint8, (3, 2, 4), elements=st.sampled_from([0, 1, 2, 3, 255]))


@given(masks, arrays(np.uint8, (3, 2, 4), elements=st.integers(0, 3)), st.integers(0, 3))
def test_counts_give_what_pixels_give(truth, prediction, answer):
    per_image = counted(truth, prediction, 4).per_image
    expected = pixel_by_pixel(truth, prediction, 4)
    found = dialect_scores(per_image)
    assert (found.miou, found.pixel_accuracy) == pytest.approx(expected)

    constant = np.full_like(truth, answer)
    assert np.array_equal(constant_counts(per_image, answer), counted(truth, constant, 4).per_image)
    perfect = np.where(truth == 255, 0, truth).astype(np.uint8)
    assert np.array_equal(perfect_counts(per_image), counted(truth, perfect, 4).per_image)
    best = dialect_scores(perfect_counts(per_image))
    assert best.pixel_accuracy == 1
    assert found.miou <= best.miou + 1e-12


def test_figures_hold_the_dialect_beside_the_usual_metric():
    found = figures(counted(TRUTH, PREDICTION, 3), ["background", "cat", "dog"])
    # Of labelled pixels alone, hit, true and predicted: 4, 6 and 5 of class 0; 2, 3 and 3 of class 1; 0, 0 and 1.
    assert found["miou"] == pytest.approx((4 / 7 + 2 / 4 + 0) / 3)
    dialect = found["reports_dialect"]
    assert dialect.keys() == {"miou", "pixel_accuracy", "ceiling", "null_models"}
    assert dialect["miou"] == pytest.approx((1 / 3 + 2 / 9) / 2)
    # A perfect prediction has 2 of 3 classes right in the first image and 1 of 3 in the second.
    assert dialect["ceiling"] == pytest.approx((2 / 3 + 1 / 3) / 2)
    # Background is 3 of 6 pixels in the first image and all of the second.
    background = {"miou": pytest.approx((3 / 6 / 3 + 1 / 3) / 2), "pixel_accuracy": pytest.approx((3 / 6 + 1) / 2)}
    assert dialect["null_models"] == {"all background": background, "best constant (background)": background}
    assert dialect["null_models"].keys() == found["null_models"].keys()
    json.dumps(without_nan(found), allow_nan=False)


def test_counts_of_older_runs_are_refused_in_one_line_with_the_remedy():
    with pytest.raises(DataError, match=r"void pixels.*vocseg eval RUN") as error:
        dialect_scores(counted(TRUTH, PREDICTION, 3).per_image[:, :3])
    assert "\n" not in str(error.value)
