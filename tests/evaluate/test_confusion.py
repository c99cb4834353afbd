import time

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
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
@settings(deadline=None)
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


def test_labels_of_any_layout_are_counted():
    truth = torch.randint(0, 3, (40, 30), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    prediction = truth.roll(1, 0)
    expected = count_pixels(truth.contiguous(), prediction.contiguous(), 3)
    assert torch.equal(count_pixels(truth.mT, prediction.mT, 3), expected)
    wide = truth.repeat_interleave(2, 1)[:, ::2]
    assert torch.equal(count_pixels(wide, prediction, 3), expected)
    assert count_pixels(truth[:0], prediction[:0], 3).sum() == 0


@pytest.mark.parametrize("label", [3, 254])
def test_a_label_outside_the_classes_is_an_error(label):
    labels, zeros = torch.tensor([0, label], dtype=torch.uint8), torch.zeros(2, dtype=torch.uint8)
    for truth, prediction in ((labels, zeros), (zeros, labels), (zeros + 255, labels)):
        with pytest.raises(ValueError, match="outside 0…2"):
            count_pixels(truth, prediction, 3)


def test_shapes_must_agree():
    with pytest.raises(ValueError, match="differ in shape"):
        count_pixels(torch.zeros(2, 2, dtype=torch.uint8), torch.zeros(4, dtype=torch.uint8), 3)


# The class map


def reference(logits, padded, size):
    """Upsampled logits, and their argmax; max(1) is as exact, and takes less time."""
    full = logits.float()
    if full.shape[2:] != padded:
        full = F.interpolate(full, padded, mode="bilinear")
    full = full[..., : size[0], : size[1]]
    return full, full.max(1).indices


def laid_out(logits, how):
    """The same logits in another order in memory."""
    if how == "channels_last":
        return logits.contiguous(memory_format=torch.channels_last)
    if how == "a window of more":
        return F.pad(logits, (2, 3, 1, 4))[..., 1:-4, 2:-3]
    return logits.mT.contiguous().mT if how == "columns" else logits


LAYOUTS = ("contiguous", "channels_last", "a window of more", "columns")


@given(
    factor=st.sampled_from([1, 2, 3, 4, 6, 8, 16]),
    small=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    cut=st.tuples(st.integers(0, 40), st.integers(0, 40)),
    classes=st.integers(1, 70),
    how=st.sampled_from(LAYOUTS),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=150, deadline=None)
def test_it_is_the_argmax_of_upsampled_logits_but_where_classes_are_equal(
    factor, small, cut, classes, how, dtype, seed
):
    logits = torch.randn(2, classes, *small, generator=torch.Generator().manual_seed(seed)).to(dtype)
    padded = small[0] * factor, small[1] * factor
    size = max(1, padded[0] - cut[0]), max(1, padded[1] - cut[1])
    full, expected = reference(logits, padded, size)
    found = class_map(laid_out(logits, how), padded, size).long()
    assert found.shape == expected.shape
    # Rounded in another order: of the few values that went into each, at most some units in the last place.
    short_of_best = full.amax(1) - full.gather(1, found[:, None])[:, 0]
    assert short_of_best.max() <= 4 * torch.finfo(torch.float32).eps * full.abs().max()
    assert (found != expected).sum() <= 1


@pytest.mark.parametrize("how", LAYOUTS)
@pytest.mark.parametrize("factor", [1, 4])
def test_of_equal_classes_it_takes_the_lowest(factor, how):
    # Small whole numbers are upsampled by 4 without rounding, so that many places are equal to the last bit. 300 x 400
    # pixels are more than a block.
    small = 300 // factor, 400 // factor
    logits = torch.randint(0, 3, (1, 7, *small), generator=torch.Generator().manual_seed(0)).float()
    full, expected = reference(logits, (300, 400), (299, 397))
    assert ((full == full.amax(1, keepdim=True)).sum(1) > 1).float().mean() > 0.05
    found = class_map(laid_out(logits, how), (300, 400), (299, 397))
    assert torch.equal(found.long(), expected)
    assert found.dtype == torch.uint8


@pytest.mark.parametrize("padded", [(39, 27), (78, 54), (101, 67), (26, 36)])
def test_whatever_is_no_power_of_two_is_upsampled_by_torch_itself(padded):
    # Equal whole numbers are told apart by how torch rounds its weights, thirds for instance.
    logits = torch.randint(0, 3, (1, 5, 13, 9), generator=torch.Generator().manual_seed(0)).float()
    assert torch.equal(class_map(logits, padded).long(), reference(logits, padded, padded)[1])


@pytest.mark.parametrize("how", LAYOUTS)
@pytest.mark.parametrize("padded", [(12, 10), (48, 40)])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_counts_as_torch_has_it(value, padded, how):
    logits = torch.randn(1, 5, 12, 10, generator=torch.Generator().manual_seed(0))
    logits[0, 3, 4:6, 2] = value
    logits[0, 4, 0, 0] = logits[0, 1, 0, 0] = value
    assert torch.equal(class_map(laid_out(logits, how), padded).long(), reference(logits, padded, padded)[1])


def test_more_than_64_interleaved_classes_are_told_apart_too():
    logits = torch.randn(1, 200, 9, 7, generator=torch.Generator().manual_seed(0))
    for how in LAYOUTS:
        assert torch.equal(class_map(laid_out(logits, how)).long(), logits.argmax(1))


def test_logits_with_a_graph_and_those_of_inference_mode_have_class_maps():
    logits = torch.randn(1, 3, 4, 4, requires_grad=True)
    with torch.inference_mode():
        assert torch.equal(class_map(logits * 1), class_map(logits))


def test_the_class_map_of_an_accelerator_stays_there_and_reads_nothing_back():
    found = class_map(torch.zeros(1, 5, 4, 4, device="meta"), (16, 16), (13, 15))
    assert (found.shape, found.dtype, found.device.type) == ((1, 13, 15), torch.uint8, "meta")


def test_from_a_quarter_of_the_size_to_counts_is_at_least_three_times_as_fast_as_by_torch():
    logits = torch.randn(1, 21, 125, 125, generator=torch.Generator().manual_seed(0))
    truth = torch.randint(0, 21, (1, 500, 500), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))

    def ours():
        return count_pixels(truth, class_map(logits, (500, 500)), 21)[:-1]

    def naive():
        prediction = F.interpolate(logits, (500, 500), mode="bilinear").argmax(1)
        return torch.bincount(truth.flatten().long() * 21 + prediction.flatten(), minlength=441).reshape(21, 21)

    assert (ours() - naive()).abs().sum() <= 2  # two counts a pixel that rounding decides
    seconds = {ours: [], naive: []}
    for _ in range(3):
        for run, found in seconds.items():
            begun = time.process_time()
            run()
            found.append(time.process_time() - begun)
    assert 3 * min(seconds[ours]) < min(seconds[naive])
