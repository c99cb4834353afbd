"""What every loss holds about void, and what each one computes."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from vocseg.components.losses import class_weights, cross_entropy, dice, focal, lovasz_softmax, weighted_sum
from vocseg.data.dataset import VOID
from vocseg.errors import UsageError
from vocseg.plugins import discover

C = 5
quick = settings(max_examples=20, deadline=None)
COUNTS = torch.tensor([700, 20, 200, 0, 80])
VARIANTS: dict[str, list[dict[str, Any]]] = {
    "cross_entropy": [
        {},
        {"label_smoothing": 0.1},
        {"class_weights": "inverse", "label_smoothing": 0.1, "background_multiplier": 80.0},
        {"class_weights": (0.0, 1.0, 2.0, 3.0, 4.0)},
    ],
    "focal": [{}, {"gamma": 0.5}, {"gamma": 0.0}],
    "dice": [{}, {"smooth": 0.0}],
    "lovasz_softmax": [{}],
}


def every_loss() -> list:
    components = [c for c in discover() if c.kind == "loss" and c.origin == "vocseg"]
    assert {c.name for c in components} == set(VARIANTS)
    available = {"num_classes": C, "class_pixels": lambda: COUNTS}
    return [
        pytest.param(c.build(available, params), id=f"{c.name}-{i}")
        for c in components
        for i, params in enumerate(VARIANTS[c.name])
    ]


def uncounted() -> Tensor:
    raise AssertionError("the training masks were read")


def batch(seed: int = 0, void: float = 0.3, size: tuple[int, int] = (6, 7)) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(2, C, *size, generator=generator)
    target = torch.randint(C, (2, *size), generator=generator)
    target[torch.rand(2, *size, generator=generator) < void] = VOID
    return logits, target


def gradient(loss: Callable, logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    leaf = logits.clone().requires_grad_()
    value = loss(leaf, target)
    assert value.shape == ()
    value.backward()
    assert leaf.grad is not None
    return value.detach(), leaf.grad


@pytest.mark.parametrize("loss", every_loss())
def test_a_batch_of_void_gives_exactly_zero_with_a_graph(loss: Callable):
    logits, target = batch()
    value, grad = gradient(loss, 100 * logits, torch.full_like(target, VOID))
    assert value == 0
    assert torch.equal(grad, torch.zeros_like(grad))


@pytest.mark.parametrize("loss", every_loss())
@quick
@given(seed=st.integers(0, 2**32 - 1))
def test_the_logits_of_void_pixels_change_nothing(loss: Callable, seed: int):
    logits, target = batch(seed)
    void = (target == VOID)[:, None].expand_as(logits)
    value, grad = gradient(loss, logits, target)
    other, other_grad = gradient(loss, torch.where(void, 50 * logits.flip(1), logits), target)
    assert torch.allclose(value, other, rtol=1e-5, atol=1e-6)
    assert torch.allclose(grad, other_grad, rtol=1e-4, atol=1e-6)
    assert not grad[void].any()


@pytest.mark.parametrize("loss", every_loss())
def test_a_border_of_void_changes_nothing(loss: Callable):
    logits, target = batch()
    padded = loss(F.pad(logits, (3, 2, 1, 4)), F.pad(target, (3, 2, 1, 4), value=VOID))
    assert torch.allclose(loss(logits, target), padded, rtol=1e-5)


@pytest.mark.parametrize("loss", every_loss())
def test_memory_format_changes_nothing(loss: Callable):
    logits, target = batch()
    assert torch.equal(loss(logits, target), loss(logits.to(memory_format=torch.channels_last), target))


@pytest.mark.parametrize("loss", every_loss())
def test_saturated_logits_give_finite_gradients(loss: Callable):
    _, target = batch()
    sure = 1e4 * F.one_hot(torch.where(target == VOID, 0, target), C).permute(0, 3, 1, 2).float()
    for logits in (sure, -sure):
        value, grad = gradient(loss, logits, target)
        assert value.isfinite()
        assert grad.isfinite().all()


@pytest.mark.parametrize("loss", every_loss())
def test_training_on_it_learns_the_target(loss: Callable):
    _, target = batch()
    # One loss here gives class 0 a weight of 0: it is left out.
    target[target == 0] = VOID
    logits = torch.zeros(2, C, *target.shape[1:], requires_grad=True)
    optimizer = torch.optim.Adam([logits], lr=0.1)
    for _ in range(60):
        optimizer.zero_grad()
        loss(logits, target).backward()
        optimizer.step()
    labelled = target != VOID
    assert torch.equal(logits.argmax(1)[labelled], target[labelled])


@pytest.mark.parametrize("loss", every_loss())
def test_the_host_never_waits_for_the_device(loss: Callable):
    # Tensors on the meta device have no values: whatever would ask for one (item, bool, a mask as index) raises.
    logits = torch.empty(2, C, 6, 7, device="meta", requires_grad=True)
    loss(logits, torch.empty(2, 6, 7, device="meta", dtype=torch.int64)).backward()


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("weights", ["none", (0.5, 1.0, 2.0, 0.0, 3.0)])
@quick
@given(seed=st.integers(0, 2**32 - 1))
def test_cross_entropy_is_that_of_torch(smoothing: float, weights: Any, seed: int):
    logits, target = batch(seed)
    ours = cross_entropy(C, uncounted, label_smoothing=smoothing, class_weights=weights)
    weight = None if weights == "none" else torch.tensor(weights)

    def reference(x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(x, y, weight, ignore_index=VOID, label_smoothing=smoothing)

    value, grad = gradient(ours, logits, target)
    expected, expected_grad = gradient(reference, logits, target)
    assert torch.allclose(value, expected, rtol=1e-5)
    assert torch.allclose(grad, expected_grad, rtol=1e-4, atol=1e-7)


def test_only_pixels_of_weight_zero_give_zero():
    loss = cross_entropy(C, uncounted, class_weights=(0.0, 1.0, 1.0, 1.0, 1.0))
    logits, target = batch()
    value, grad = gradient(loss, logits, torch.zeros_like(target))
    assert value == 0
    assert not grad.any()


def test_the_background_multiplier_works_without_counting():
    logits, target = batch()
    loss = cross_entropy(C, uncounted, background_multiplier=3.0)
    expected = F.cross_entropy(logits, target, torch.tensor([3.0, 1, 1, 1, 1]), ignore_index=VOID)
    assert torch.allclose(loss(logits, target), expected)


def test_weights_used_first_in_inference_mode_can_be_trained_with():
    # The meta device stands for one to which the weights have to be moved.
    loss = cross_entropy(C, lambda: COUNTS, class_weights="inverse")
    target = torch.zeros(1, 2, 2, dtype=torch.int64, device="meta")
    with torch.inference_mode():
        loss(torch.zeros(1, C, 2, 2, device="meta"), target)
    loss(torch.zeros(1, C, 2, 2, device="meta", requires_grad=True), target).backward()


def test_a_list_of_weights_must_have_one_a_class_and_not_be_all_zero():
    with pytest.raises(UsageError) as caught:
        cross_entropy(21, uncounted, class_weights=(0.0, 0.0))
    first, second = caught.value.problems
    assert "21 classes, found 2" in first.message
    assert "every weight is 0" in second.message


def test_inverse_frequency_weights():
    # 1/n = 1/700, 1/20, 1/200, -, 1/80 = (2, 70, 7, -, 17.5) / 1400; their mean is 24.125 / 1400.
    weights = class_weights(COUNTS, "inverse", 80)
    assert weights.dtype == torch.float32
    expected = torch.tensor([80 * 2, 70, 7, 24.125, 17.5]) / 24.125
    assert torch.allclose(weights, expected)


def test_log_frequency_weights():
    # Σn / n = 10/7, 50, 5, -, 12.5; log 50 is the largest logarithm.
    expected = torch.tensor([0.0911747, 1.0, 0.4114058, 1.0, 0.6456285])
    assert torch.allclose(class_weights(COUNTS, "log"), expected, rtol=1e-5)


def test_median_frequency_weights():
    # The median of 20, 80, 200, 700 is 140.
    assert torch.allclose(class_weights(COUNTS, "median", 2), torch.tensor([2 * 0.2, 7, 0.7, 1, 1.75]))


@pytest.mark.parametrize("scheme", ["none", "inverse", "log", "median"])
@quick
@given(counts=st.lists(st.one_of(st.just(0), st.integers(1, 2**40)), min_size=1, max_size=30))
def test_weights_are_finite_whatever_the_counts(scheme: Any, counts: list[int]):
    weights = class_weights(torch.tensor(counts), scheme)
    assert weights.isfinite().all()
    assert (weights >= 0).all()
    assert (weights[torch.tensor(counts) == 0] == 1).all()


def test_focal_loss_by_hand():
    # Two labelled pixels with p = 3/4 and 1/4 for their class, gamma 2:
    # ((1/4)² · ln(4/3) + (3/4)² · ln 4) / 2 = (0.0179801 + 0.7797905) / 2.
    logits = torch.tensor([3.0, 1.0]).log().reshape(1, 2, 1, 1).expand(1, 2, 1, 3)
    value = focal(gamma=2.0)(logits, torch.tensor([[[0, 1, VOID]]]))
    assert value.item() == pytest.approx(0.3988853, rel=1e-5)


def test_focal_loss_without_gamma_is_cross_entropy():
    logits, target = batch()
    assert torch.allclose(focal(gamma=0.0)(logits, target), cross_entropy(C, uncounted)(logits, target))


def test_dice_loss_by_hand():
    # p of class 0: 3/4 on three pixels, labelled 0, 1, void; class 2 of three is absent (p = 0 but for e^-20).
    # class 0: 1 - (2 · 3/4 + 1) / (3/2 + 1 + 1) = 2/7; class 1: 1 - (2 · 1/4 + 1) / (1/2 + 1 + 1) = 2/5.
    logits = torch.tensor([3.0, 1.0, 2e-9]).log().reshape(1, 3, 1, 1).expand(1, 3, 1, 3)
    value = dice(smooth=1.0)(logits, torch.tensor([[[0, 1, VOID]]]))
    assert value.item() == pytest.approx((2 / 7 + 2 / 5) / 2, rel=1e-5)


def test_lovasz_of_certain_predictions_is_one_minus_their_mean_iou():
    # Predicted 0 0 1 1, truth 0 1 1 void: IoU of class 0 is 1/2, of class 1 also 1/2; class 2 is absent.
    predicted = torch.tensor([[[0, 0, 1, 1]]])
    logits = 100 * F.one_hot(predicted, 3).permute(0, 3, 1, 2).float()
    value = lovasz_softmax()(logits, torch.tensor([[[0, 1, 1, VOID]]]))
    assert value.item() == pytest.approx(0.5, rel=1e-5)


@quick
@given(seed=st.integers(0, 2**32 - 1))
def test_lovasz_is_the_published_algorithm(seed: int):
    """Against Berman's `lovasz_softmax_flat` with void removed beforehand."""
    logits, target = batch(seed)

    def reference(logits: Tensor, target: Tensor) -> Tensor:
        labelled = target != VOID
        probabilities, labels = logits.softmax(1).permute(0, 2, 3, 1)[labelled], target[labelled]
        losses = []
        for c in labels.unique():
            truth = (labels == c).float()
            errors, order = torch.sort((truth - probabilities[:, c]).abs(), descending=True)
            sorted_truth = truth[order]
            intersection = truth.sum() - sorted_truth.cumsum(0)
            union = truth.sum() + (1 - sorted_truth).cumsum(0)
            jaccard = 1 - intersection / union
            jaccard[1:] = jaccard[1:] - jaccard[:-1].clone()
            losses.append(errors @ jaccard)
        return torch.stack(losses).mean()

    value, grad = gradient(lovasz_softmax(), logits, target)
    expected, expected_grad = gradient(reference, logits, target)
    assert torch.allclose(value, expected, rtol=1e-5, atol=1e-6)
    assert torch.allclose(grad, expected_grad, rtol=1e-3, atol=1e-6)


def test_a_weighted_sum_adds_its_terms():
    logits, target = batch()
    total = weighted_sum([(1.0, cross_entropy(C, uncounted)), (0.5, dice())])
    assert torch.allclose(
        total(logits, target), cross_entropy(C, uncounted)(logits, target) + 0.5 * dice()(logits, target)
    )
