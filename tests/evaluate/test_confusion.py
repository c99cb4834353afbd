import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from vocseg.evaluate.confusion import class_map, confusion_matrix


def test_pixels_are_counted_by_truth_and_prediction_without_void():
    truth = torch.tensor([[0, 0, 1], [1, 2, 255]], dtype=torch.uint8)
    prediction = torch.tensor([[0, 1, 1], [1, 0, 2]], dtype=torch.uint8)
    # Truth 0: once right, once taken for 1. Truth 1: twice right. Truth 2: taken for 0. The void pixel is left out.
    expected = torch.tensor([[1, 1, 0], [0, 2, 0], [1, 0, 0]])
    assert torch.equal(confusion_matrix(truth, prediction, 3), expected)
    assert confusion_matrix(truth, prediction, 3).dtype == torch.int64


@given(st.data(), st.integers(1, 255))
def test_counts_equal_a_plain_loop_over_pixels(data, classes):
    labels = st.one_of(st.integers(0, classes - 1), st.just(255))
    truth = data.draw(arrays(np.uint8, (3, 4), elements=labels))
    prediction = data.draw(arrays(np.uint8, (3, 4), elements=st.integers(0, min(classes - 1, 254))))
    expected = np.zeros((classes, classes), np.int64)
    for t, p in zip(truth.flat, prediction.flat, strict=True):
        if t != 255:
            expected[t, p] += 1
    found = confusion_matrix(torch.from_numpy(truth), torch.from_numpy(prediction), classes)
    assert np.array_equal(found.numpy(), expected)


def test_an_image_of_void_alone_counts_nothing():
    void = torch.full((4, 4), 255, dtype=torch.uint8)
    assert confusion_matrix(void, torch.zeros_like(void), 3).sum() == 0


def test_more_pixels_than_float32_can_count_are_counted_exactly():
    size = 2**24 + 3
    zeros = torch.zeros(size, dtype=torch.uint8)
    assert confusion_matrix(zeros, zeros, 2)[0, 0] == size


@pytest.mark.parametrize("label", [3, 254])
def test_a_label_outside_the_classes_is_an_error(label):
    truth = torch.tensor([0, label], dtype=torch.uint8)
    with pytest.raises(ValueError, match="outside 0…2"):
        confusion_matrix(truth, torch.zeros_like(truth), 3)


def test_shapes_must_agree():
    with pytest.raises(ValueError, match="differ in shape"):
        confusion_matrix(torch.zeros(2, 2, dtype=torch.uint8), torch.zeros(4, dtype=torch.uint8), 3)


def test_the_class_map_is_the_argmax():
    logits = torch.randn(2, 5, 7, 9, generator=torch.Generator().manual_seed(0))
    assert torch.equal(class_map(logits).long(), logits.argmax(1))
    assert class_map(logits).dtype == torch.uint8
