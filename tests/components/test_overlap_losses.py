"""What the losses of overlap compute. What they hold about void and their plain formulas: `test_losses.py`."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from vocseg.components.overlap_losses import dice, focal_tversky, lovasz_softmax, tversky
from vocseg.data.dataset import VOID

quick = settings(max_examples=20, deadline=None)
seeds = st.integers(0, 2**32 - 1)
smooths = st.floats(0, 100)


def batch(seed: int, size: tuple[int, int] = (6, 7)) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(2, 5, *size, generator=generator)
    target = torch.randint(5, (2, *size), generator=generator)
    target[torch.rand(2, *size, generator=generator) < 0.3] = VOID
    return logits, target


def three_pixels() -> tuple[Tensor, Tensor]:
    """p of class 0 is 3/4 on three pixels, labelled 0, 1 and void; the third class is absent (p = 0 but for e^-20)."""
    logits = torch.tensor([3.0, 1.0, 2e-9]).log().reshape(1, 3, 1, 1).expand(1, 3, 1, 3)
    return logits, torch.tensor([[[0, 1, VOID]]])


def test_dice_loss_by_hand():
    # Class 0: 1 - (2 · 3/4 + 1) / (3/2 + 1 + 1) = 2/7; class 1: 1 - (2 · 1/4 + 1) / (1/2 + 1 + 1) = 2/5.
    assert dice(smooth=1.0)(*three_pixels()).item() == pytest.approx((2 / 7 + 2 / 5) / 2, rel=1e-5)


def test_tversky_loss_by_hand():
    # Class 0: found 3/4, invented 3/4, missed 1/4: 1 - (3/4 + 1) / (3/4 + 0.3 · 3/4 + 0.7 · 1/4 + 1) = 0.4 / 2.15.
    # Class 1: found 1/4, invented 1/4, missed 3/4: 1 - (1/4 + 1) / (1/4 + 0.3 · 1/4 + 0.7 · 3/4 + 1) = 0.6 / 1.85.
    first, second = 0.4 / 2.15, 0.6 / 1.85
    assert tversky()(*three_pixels()).item() == pytest.approx((first + second) / 2, rel=1e-5)
    expected = (first**0.75 + second**0.75) / 2
    assert focal_tversky()(*three_pixels()).item() == pytest.approx(expected, rel=1e-5)


@quick
@given(seed=seeds, smooth=smooths)
def test_tversky_with_both_weights_one_half_is_dice(seed: int, smooth: float):
    logits, target = batch(seed)
    ours = tversky(alpha=0.5, beta=0.5, smooth=smooth)(logits, target)
    assert torch.allclose(ours, dice(smooth=2 * smooth)(logits, target))


@quick
@given(seed=seeds)
def test_tversky_of_certain_predictions_with_both_weights_one_is_one_minus_their_mean_iou(seed: int):
    logits, target = batch(seed)
    predicted = logits.argmax(1)
    ious = [
        ((predicted == c) & (target == c)).sum() / (((predicted == c) & (target != VOID)) | (target == c)).sum()
        for c in range(5)
        if (target == c).any()
    ]
    ours = tversky(alpha=1.0, beta=1.0, smooth=0.0)(1e4 * F.one_hot(predicted, 5).movedim(3, 1).float(), target)
    assert torch.allclose(ours, 1 - torch.stack(ious).mean())


@quick
@given(seed=seeds, low=st.floats(0.01, 5), high=st.floats(0.01, 5))
def test_a_heavier_weight_makes_invented_and_missed_pixels_dearer(seed: int, low: float, high: float):
    logits, target = batch(seed)
    low, high = sorted((low, high))
    assert tversky(alpha=low)(logits, target) <= tversky(alpha=high)(logits, target) + 1e-6
    assert tversky(beta=low)(logits, target) <= tversky(beta=high)(logits, target) + 1e-6


def test_alpha_weighs_what_is_invented_and_beta_what_is_missed():
    # Class 1 is found whole, and invented on both pixels of class 0, which is missed altogether.
    logits = 100 * F.one_hot(torch.tensor([[[1, 1, 1, 1]]]), 2).movedim(3, 1).float()
    target = torch.tensor([[[1, 1, 0, 0]]])
    # Class 1: 1 - 2 / (2 + 2 alpha); class 0 is lost, 1, whatever the weights.
    for alpha in (0.5, 3.0):
        value = tversky(alpha=alpha, beta=1.0, smooth=0.0)(logits, target)
        assert value.item() == pytest.approx((1 + 1 - 2 / (2 + 2 * alpha)) / 2, rel=1e-5)
    # Where inventing costs nothing class 1 is perfect, 0.
    assert tversky(alpha=0.0, beta=9.0, smooth=0.0)(logits, target).item() == pytest.approx(1 / 2, rel=1e-5)


@quick
@given(seed=seeds, alpha=st.floats(0, 2), beta=st.floats(0.1, 2), smooth=smooths)
def test_focal_tversky_with_exponent_one_is_tversky(seed: int, alpha: float, beta: float, smooth: float):
    logits, target = batch(seed)
    focal = focal_tversky(alpha=alpha, beta=beta, gamma=1.0, smooth=smooth)
    assert torch.allclose(focal(logits, target), tversky(alpha=alpha, beta=beta, smooth=smooth)(logits, target))


def test_lovasz_of_certain_predictions_is_one_minus_their_mean_iou():
    # Predicted 0 0 1 1, truth 0 1 1 void: IoU of class 0 is 1/2, of class 1 also 1/2; class 2 is absent.
    predicted = torch.tensor([[[0, 0, 1, 1]]])
    logits = 100 * F.one_hot(predicted, 3).permute(0, 3, 1, 2).float()
    value = lovasz_softmax()(logits, torch.tensor([[[0, 1, 1, VOID]]]))
    assert value.item() == pytest.approx(0.5, rel=1e-5)


def test_lovasz_with_a_stride_is_that_of_every_nth_row_and_column():
    logits, target = batch(3)
    expected = lovasz_softmax()(logits[..., ::3, ::3], target[..., ::3, ::3])
    assert torch.equal(lovasz_softmax(stride=3)(logits, target), expected)
