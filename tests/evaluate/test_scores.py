import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from vocseg.evaluate.scores import (
    BY_COUNTS,
    bootstrap_interval,
    constant_scores,
    image_miou,
    iou_of,
    null_models,
    scores,
)

MATRIX = np.array([[6, 2, 0], [1, 3, 0], [0, 0, 0]])


def marginals(matrix):
    """The first three rows: pixels hit, true and predicted."""
    return np.stack([matrix.diagonal(), matrix.sum(1), matrix.sum(0)])


def test_scores_of_a_matrix_worked_out_by_hand():
    # Class 0: 6 hits, union 6 + 2 + 1 = 9. Class 1: 3 hits, union 3 + 1 + 2 = 6. Class 2 is nowhere and left out.
    found = scores(MATRIX)
    assert found.iou[:2] == pytest.approx([6 / 9, 3 / 6])
    assert np.isnan(found.iou[2])
    assert found.miou == pytest.approx((6 / 9 + 3 / 6) / 2)
    assert found.pixel_accuracy == pytest.approx(9 / 12)


def test_a_class_that_is_only_predicted_counts_as_zero():
    # Its union is not empty, so it is averaged in, with no hit.
    assert scores(np.array([[5, 1], [0, 0]])).miou == pytest.approx((5 / 6 + 0) / 2)


def test_nothing_labelled_has_no_score():
    found = scores(np.zeros((3, 3), np.int64))
    assert np.isnan(found.miou)
    assert np.isnan(found.pixel_accuracy)


def test_null_models_on_the_same_pixels():
    # 8 pixels of background and 4 of class 1. All background: IoU 8/12 and 0, class 2 absent; 8 of 12 right.
    found = constant_scores(MATRIX, 0)
    assert found.miou == pytest.approx((8 / 12) / 2)
    assert found.pixel_accuracy == pytest.approx(8 / 12)
    # Background has most pixels here, so it is the best constant too; where cat has most, cat is.
    assert null_models(MATRIX, ["background", "cat", "dog"]) == {"all background": 0, "best constant (background)": 0}
    cats = null_models(np.array([[1, 0], [0, 9]]), ["background", "cat"])
    assert cats == {"all background": 0, "best constant (cat)": 1}


def test_voc_background_scores_its_share_over_21_classes():
    truth = np.diag([79] + [1] * 20)  # 79 of 99 pixels are background
    assert constant_scores(truth, 0).miou == pytest.approx(79 / 99 / 21)


@given(arrays(np.int64, (6, 4, 4), elements=st.integers(0, 50)))
@settings(deadline=None)
def test_the_interval_lies_around_what_resampled_images_score(matrices):
    assume(matrices.any())
    per_image = np.stack([marginals(m) for m in matrices])
    low, high = bootstrap_interval(per_image, draws=200)
    assert 0 <= low <= high <= 1
    assert (low, high) == bootstrap_interval(per_image, draws=200)


def test_equal_images_have_an_interval_of_no_width():
    per_image = np.stack([marginals(MATRIX)] * 5)
    assert bootstrap_interval(per_image) == pytest.approx((scores(MATRIX).miou,) * 2)


def test_the_interval_covers_the_whole_set_score_and_narrows_with_images():
    rng = np.random.default_rng(0)
    matrices = rng.integers(0, 100, (400, 3, 3)) + np.eye(3, dtype=np.int64) * 80
    per_image = np.stack([marginals(m) for m in matrices])
    few, many = bootstrap_interval(per_image[:20]), bootstrap_interval(per_image)
    assert many[0] < scores(matrices.sum(0)).miou < many[1]
    assert many[1] - many[0] < few[1] - few[0]


def test_no_image_has_no_interval():
    for images in (0, 5):
        assert all(np.isnan(bootstrap_interval(np.zeros((images, 3, 4), np.int64))))


def test_draws_of_unlabelled_images_alone_say_nothing():
    # A quarter of a pair's draws have no pixel; all others hold the first image, which is perfect.
    perfect, void = marginals(np.diag([3, 4])), marginals(np.zeros((2, 2), np.int64))
    assert bootstrap_interval(np.stack([perfect, void])) == (1.0, 1.0)


def test_marginals_hold_what_iou_needs_whatever_rows_follow():
    per_image = np.stack([marginals(MATRIX)])
    longer = np.concatenate([per_image, [[[9, 9, 9]]]], axis=1)
    assert iou_of(per_image[0])[0] == pytest.approx(6 / 9)
    for counts in (per_image, longer):
        assert image_miou(counts) == pytest.approx([scores(MATRIX).miou])
        assert bootstrap_interval(counts) == bootstrap_interval(per_image)


def test_drawing_some_at_a_time_gives_the_interval_of_drawing_all_at_once():
    # 3,000 images in 1,000 draws are more than are drawn at a time.
    per_image = np.random.default_rng(0).integers(0, 90, (3000, 3, 2))
    per_image[:, 1:] += per_image[:, :1]
    weights = np.random.default_rng(0).multinomial(3000, np.full(3000, 1 / 3000), size=1000)
    miou = iou_of((weights @ per_image.reshape(3000, -1)).reshape(1000, 3, 2)).mean(1)
    assert bootstrap_interval(per_image) == tuple(np.quantile(miou, [0.025, 0.975]))


def test_images_are_drawn_alike_below_and_above_the_size_from_which_each_is_drawn():
    rng = np.random.default_rng(0)
    per_image = rng.integers(0, 90, (BY_COUNTS + 1, 3, 2))
    per_image[:, 1:] += per_image[:, :1]
    below, above = bootstrap_interval(per_image[:-1], draws=400), bootstrap_interval(per_image, draws=400)
    assert above == bootstrap_interval(per_image, draws=400)
    assert above[0] < scores(np.diag([1, 1])).miou
    # Both ends within a third of the interval's width of each other.
    assert np.allclose(below, above, rtol=0, atol=(below[1] - below[0]) / 3)
    same = np.repeat(per_image[:1], BY_COUNTS + 1, axis=0)
    assert np.ptp(bootstrap_interval(same, draws=5)) == pytest.approx(0, abs=1e-12)


def test_the_miou_of_an_image_without_labels_is_nan():
    per_image = np.stack([marginals(MATRIX), np.zeros((3, 3), np.int64)])
    assert image_miou(per_image) == pytest.approx([scores(MATRIX).miou, np.nan], nan_ok=True)
