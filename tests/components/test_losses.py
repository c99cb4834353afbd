"""What every loss holds about void, that each is what its formula says, and what those over pixels compute."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from vocseg.components.losses import class_weights, cross_entropy, focal, ohem, weighted_sum
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
    "ohem": [{}, {"threshold": 0.1, "min_kept": 0.4}, {"threshold": 1.0}],
    "dice": [{}, {"smooth": 0.0}],
    "tversky": [{}, {"alpha": 0.0, "beta": 0.2, "smooth": 0.0}, {"alpha": 2.0, "beta": 1.0}],
    "focal_tversky": [{}, {"gamma": 1.5, "smooth": 0.0}, {"alpha": 0.9, "beta": 0.4, "gamma": 0.25}],
    "lovasz_softmax": [{}],
}


def variants() -> list[tuple[Any, dict[str, Any], str]]:
    components = [c for c in discover() if c.kind == "loss" and c.origin == "vocseg"]
    assert {c.name for c in components} == set(VARIANTS)
    return [(c, params, f"{c.name}-{i}") for c in components for i, params in enumerate(VARIANTS[c.name])]


def build(component: Any, params: dict[str, Any]) -> Callable:
    return component.build({"num_classes": C, "class_pixels": lambda: COUNTS}, params)


def every_loss() -> list:
    return [pytest.param(build(component, params), id=name) for component, params, name in variants()]


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


# The references: plain loops over the labelled pixels in float64, each a row of probabilities and a label.

Pixels = list[tuple[NDArray[np.float64], int]]


def labelled_pixels(logits: NDArray[np.float64], target: NDArray[np.int64]) -> Iterator:
    for b, y, x in np.ndindex(target.shape):
        if target[b, y, x] != VOID:
            powers = np.exp(logits[b, :, y, x] - logits[b, :, y, x].max())
            yield powers / powers.sum(), int(target[b, y, x])


def plain_cross_entropy(
    pixels: Pixels, label_smoothing: float = 0.0, class_weights: Any = "none", background_multiplier: float = 1.0
) -> float:
    # 1/n = (2, 70, 7, -, 17.5) / 1400, whose mean is 24.125 / 1400; the class without pixels weighs 1.
    weights = {"none": [1.0] * C, "inverse": [2 / 24.125, 70 / 24.125, 7 / 24.125, 1.0, 17.5 / 24.125]}.get(
        str(class_weights), class_weights
    )
    weights = [background_multiplier * weights[0], *weights[1:]]
    total = weight = 0.0
    for p, label in pixels:
        total -= (1 - label_smoothing) * weights[label] * math.log(p[label])
        total -= label_smoothing / C * sum(weights[c] * math.log(p[c]) for c in range(C))
        weight += weights[label]
    return total / weight


def plain_focal(pixels: Pixels, gamma: float = 2.0) -> float:
    return sum(-((1 - p[label]) ** gamma) * math.log(p[label]) for p, label in pixels) / len(pixels)


def plain_ohem(pixels: Pixels, threshold: float = 0.7, min_kept: float = 0.0625) -> float:
    hardest_first = sorted(p[label] for p, label in pixels)
    kept = [p for i, p in enumerate(hardest_first) if p <= threshold or i < math.ceil(min_kept * len(pixels))]
    return sum(-math.log(p) for p in kept) / max(len(kept), 1)


def plain_tversky(pixels: Pixels, alpha: float = 0.3, beta: float = 0.7, smooth: float = 1.0) -> float:
    return plain_focal_tversky(pixels, alpha, beta, 1.0, smooth)


def plain_focal_tversky(
    pixels: Pixels, alpha: float = 0.3, beta: float = 0.7, gamma: float = 0.75, smooth: float = 1.0
) -> float:
    losses = []
    for c in {label for _, label in pixels}:
        found = sum(p[c] for p, label in pixels if label == c)
        invented = sum(p[c] for p, label in pixels if label != c)
        missed = sum(1 - p[c] for p, label in pixels if label == c)
        losses.append((1 - (found + smooth) / (found + alpha * invented + beta * missed + smooth)) ** gamma)
    return sum(losses) / len(losses)


def plain_dice(pixels: Pixels, smooth: float = 1.0) -> float:
    losses = []
    for c in {label for _, label in pixels}:
        overlap = sum(p[c] * (label == c) for p, label in pixels)
        size = sum(p[c] + (label == c) for p, label in pixels)
        losses.append(1 - (2 * overlap + smooth) / (size + smooth))
    return sum(losses) / len(losses)


def plain_lovasz_softmax(pixels: Pixels) -> float:
    """The Lovász extension itself: each error, largest first, times what its pixel adds to the Jaccard loss."""
    losses = []
    for c in {label for _, label in pixels}:
        errors = sorted(((1 - p[c] if label == c else p[c], i) for i, (p, label) in enumerate(pixels)), reverse=True)
        truth = {i for i, (_, label) in enumerate(pixels) if label == c}
        wrong: set[int] = set()
        total = before = 0.0
        for error, i in errors:
            wrong.add(i)
            jaccard = len(wrong) / len(truth | wrong)
            total += error * (jaccard - before)
            before = jaccard
        losses.append(total)
    return sum(losses) / len(losses)


PLAIN: dict[str, Callable[..., float]] = {
    "cross_entropy": plain_cross_entropy,
    "focal": plain_focal,
    "ohem": plain_ohem,
    "dice": plain_dice,
    "tversky": plain_tversky,
    "focal_tversky": plain_focal_tversky,
    "lovasz_softmax": plain_lovasz_softmax,
}


def plain(name: str, params: dict[str, Any]) -> Callable[[NDArray[np.float64], NDArray[np.int64]], float]:
    return lambda logits, target: PLAIN[name](list(labelled_pixels(logits, target)), **params)


def slopes(function: Callable, logits: NDArray[np.float64], target: NDArray[np.int64]) -> NDArray[np.float64]:
    """Central differences."""
    result, step = np.zeros_like(logits), 1e-5
    for i in np.ndindex(logits.shape):
        ends = []
        for sign in (1, -1):
            moved = logits.copy()
            moved[i] += sign * step
            ends.append(function(moved, target))
        result[i] = (ends[0] - ends[1]) / (2 * step)
    return result


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("component", "params"), [pytest.param(c, p, id=i) for c, p, i in variants()])
def test_value_and_gradient_are_those_of_the_plain_formula(component: Any, params: dict[str, Any], seed: int):
    logits, target = batch(seed, size=(2, 3))
    if seed == 0:
        target[(target == 1) | (target == 3)] = 2  # classes that are in none of the pixels
    value, grad = gradient(build(component, params), logits, target)
    reference, inputs = plain(component.name, params), (logits.double().numpy(), target.numpy())
    assert value.item() == pytest.approx(reference(*inputs), rel=1e-5)
    assert np.allclose(grad.numpy(), slopes(reference, *inputs), rtol=1e-3, atol=2e-6)


@pytest.mark.parametrize("seed", range(3))
def test_a_weighted_sum_adds_values_and_gradients(seed: int):
    logits, target = batch(seed, size=(2, 3))
    parts = [(1.0, "focal", {}), (0.5, "dice", {"smooth": 0.0}), (2.0, "lovasz_softmax", {})]
    found = {c.name: c for c, _, _ in variants()}
    value, grad = gradient(weighted_sum([(w, build(found[n], p)) for w, n, p in parts], C), logits, target)

    def reference(logits: NDArray[np.float64], target: NDArray[np.int64]) -> float:
        return sum(factor * plain(name, params)(logits, target) for factor, name, params in parts)

    inputs = (logits.double().numpy(), target.numpy())
    assert value.item() == pytest.approx(reference(*inputs), rel=1e-5)
    assert np.allclose(grad.numpy(), slopes(reference, *inputs), rtol=1e-3, atol=2e-6)


@pytest.mark.parametrize("name", sorted(VARIANTS))
def test_a_single_class_leaves_nothing_to_learn(name: str):
    component = next(c for c, _, _ in variants() if c.name == name)
    loss = component.build({"num_classes": 1, "class_pixels": lambda: torch.tensor([7])}, {})
    logits, target = batch()
    value, grad = gradient(loss, logits[:, :1], torch.where(target == VOID, VOID, 0))
    assert 0 <= value < 1e-20
    assert not grad.any()


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


def row_of(*probabilities: float) -> Tensor:
    """Logits (1, 2, 1, n) of two classes, the first of which has these probabilities."""
    first = torch.tensor(probabilities)
    return torch.stack([first, 1 - first]).log().reshape(1, 2, 1, -1)


def test_ohem_by_hand():
    logits = row_of(0.9, 0.8, 0.6, 0.2, 0.01)
    target = torch.tensor([[[0, 0, 0, 0, VOID]]])
    # Below 0.7 are 0.6 and 0.2: (-ln 0.6 - ln 0.2) / 2 = (0.5108256 + 1.6094379) / 2.
    assert ohem(threshold=0.7, min_kept=0.5)(logits, target).item() == pytest.approx(1.0601318, rel=1e-5)
    # Three quarters of the four labelled pixels are three, 0.8 with -ln 0.8 = 0.2231436 among them.
    assert ohem(threshold=0.7, min_kept=0.75)(logits, target).item() == pytest.approx(0.7811357, rel=1e-5)
    # Half of four is two, of which one is above 0.3; more than half is three.
    assert ohem(threshold=0.3, min_kept=0.5)(logits, target).item() == pytest.approx(1.0601318, rel=1e-5)
    assert ohem(threshold=0.3, min_kept=0.51)(logits, target).item() == pytest.approx(0.7811357, rel=1e-5)


def test_ohem_can_keep_more_pixels_than_float32_counts():
    pixels = 2**24 + 3  # 2^24 + 4 in float32
    assert ohem(min_kept=1.0)(torch.zeros(1, 1, 1, pixels), torch.zeros(1, 1, pixels, dtype=torch.long)) == 0


def test_ohem_trains_on_nothing_where_no_pixel_is_hard_and_none_has_to_be_kept():
    target = torch.tensor([[[0, 0, VOID]]])
    value, grad = gradient(ohem(threshold=0.7, min_kept=0.0), row_of(0.9, 0.8, 0.1), target)
    assert value == 0
    assert not grad.any()
    _, grad = gradient(ohem(threshold=0.7, min_kept=0.1), row_of(0.9, 0.8, 0.1), target)
    assert grad[0, 0, 0].bool().tolist() == [False, True, False]


@quick
@given(seed=st.integers(0, 2**32 - 1), share=st.floats(0, 1))
def test_ohem_of_all_pixels_is_cross_entropy(seed: int, share: float):
    logits, target = batch(seed)
    logits[:, :, 0] *= 100  # so sure that a probability is exactly 1
    expected = cross_entropy(C, uncounted)(logits, target)
    assert torch.allclose(ohem(threshold=1.0, min_kept=share)(logits, target), expected)
    assert torch.allclose(ohem(threshold=0.7, min_kept=1.0)(logits, target), expected)


@quick
@given(seed=st.integers(0, 2**32 - 1), low=st.floats(0.01, 1), high=st.floats(0.01, 1))
def test_ohem_falls_as_it_keeps_more(seed: int, low: float, high: float):
    logits, target = batch(seed)
    low, high = sorted((low, high))
    for few, many in (
        (ohem(threshold=low), ohem(threshold=high)),
        (ohem(threshold=0.01, min_kept=low), ohem(threshold=0.01, min_kept=high)),
    ):
        assert few(logits, target) >= many(logits, target) - 1e-6
