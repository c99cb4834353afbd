import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from vocseg.evaluate.confusion import class_map, count_pixels, marginals


def test_pixels_are_counted_by_truth_and_prediction_and_void_by_itself():
    truth = torch.tensor([[0, 0, 1], [1, 2, 255]], dtype=torch.uint8)
    prediction = torch.tensor([[0, 1, 1], [1, 0, 2]], dtype=torch.uint8)
    # Truth 0: once right, once taken for 1. Truth 1: twice right. Truth 2: taken for 0. The void pixel: taken for 2.
    expected = torch.tensor([[1, 1, 0], [0, 2, 0], [1, 0, 0], [0, 0, 1]])
    assert torch.equal(count_pixels(truth, prediction, 3), expected)
    assert count_pixels(truth, prediction, 3).dtype == torch.int64


@given(st.data(), st.integers(1, 255))
def test_counts_equal_a_plain_loop_over_pixels(data, classes):
    labels = st.one_of(st.integers(0, classes - 1), st.just(255))
    truth = data.draw(arrays(np.uint8, (3, 4), elements=labels))
    prediction = data.draw(arrays(np.uint8, (3, 4), elements=st.integers(0, min(classes - 1, 254))))
    expected = np.zeros((classes + 1, classes), np.int64)
    for t, p in zip(truth.flat, prediction.flat, strict=True):
        expected[classes if t == 255 else t, p] += 1
    found = count_pixels(torch.from_numpy(truth), torch.from_numpy(prediction), classes)
    assert np.array_equal(found.numpy(), expected)


def test_an_image_of_void_alone_has_an_empty_confusion_matrix():
    void = torch.full((4, 4), 255, dtype=torch.uint8)
    assert count_pixels(void, torch.zeros_like(void), 3).tolist() == [[0, 0, 0]] * 3 + [[16, 0, 0]]


def test_marginals_are_hits_truth_prediction_and_prediction_on_void():
    counts = torch.tensor([[6, 2, 0], [1, 3, 0], [0, 0, 0], [4, 0, 5]])
    assert marginals(counts).tolist() == [[6, 3, 0], [8, 4, 0], [7, 5, 0], [4, 0, 5]]


def test_counting_on_an_accelerator_reads_nothing_back():
    # A tensor on `meta` has no values: whatever reads one raises.
    labels = torch.zeros(4, 4, dtype=torch.uint8, device="meta")
    assert marginals(count_pixels(labels, labels, 3)).shape == (4, 3)


def test_more_pixels_than_float32_can_count_are_counted_exactly():
    size = 2**24 + 3
    zeros = torch.zeros(size, dtype=torch.uint8)
    assert count_pixels(zeros, zeros, 2)[0, 0] == size


@pytest.mark.parametrize("label", [3, 254])
def test_a_label_outside_the_classes_is_an_error(label):
    labels, zeros = torch.tensor([0, label], dtype=torch.uint8), torch.zeros(2, dtype=torch.uint8)
    for truth, prediction in ((labels, zeros), (zeros, labels), (zeros + 255, labels)):
        with pytest.raises(ValueError, match="outside 0…2"):
            count_pixels(truth, prediction, 3)


def test_shapes_must_agree():
    with pytest.raises(ValueError, match="differ in shape"):
        count_pixels(torch.zeros(2, 2, dtype=torch.uint8), torch.zeros(4, dtype=torch.uint8), 3)


def test_the_class_map_is_the_argmax():
    logits = torch.randn(2, 5, 7, 9, generator=torch.Generator().manual_seed(0))
    assert torch.equal(class_map(logits).long(), logits.argmax(1))
    assert class_map(logits).dtype == torch.uint8
