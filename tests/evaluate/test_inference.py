from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from vocseg.data.dataset import Dataset
from vocseg.device import Placement
from vocseg.evaluate.inference import Predictor, evaluate
from vocseg.evaluate.scores import scores
from vocseg.network import outputs


class BrightOrDark(nn.Module):
    """Class 1 where the first channel is positive; refuses sides that are no multiple of 32."""

    def forward(self, images):
        assert images.shape[-1] % 32 == 0
        assert images.shape[-2] % 32 == 0
        return torch.cat([-images[:, :1], images[:, :1]], dim=1)


def predictor(network):
    half = torch.tensor([0.5, 0.5, 0.5])
    return Predictor(network, Placement(torch.device("cpu"), "fp32"), 32, half, half)


def drain(generator):
    while True:
        try:
            next(generator)
        except StopIteration as end:
            return end.value


def cross_entropy(logits, target):
    return nn.functional.cross_entropy(logits, target, ignore_index=255)


def test_images_of_any_size_are_scored_at_their_own_size():
    rng = np.random.default_rng(0)
    pairs = []
    for size in [(33, 47), (64, 64), (5, 100)]:
        mask = rng.integers(0, 2, size).astype(np.uint8)
        image = np.repeat((mask * 255)[..., None], 3, axis=2)
        mask[:2] = 255
        mask[2, :3] = 1 - mask[2, :3]  # three pixels an image that the network gets wrong
        pairs.append((image, mask))
    dataset = Dataset(("dark", "bright"), ("a", "b", "c"), pairs.__getitem__)
    found = drain(evaluate(predictor(BrightOrDark()), dataset, cross_entropy))
    labelled = sum(int((mask != 255).sum()) for _, mask in pairs)
    assert found.matrix.sum() == labelled
    assert scores(found.matrix).pixel_accuracy == pytest.approx(1 - 9 / labelled)
    assert found.per_image.shape == (3, 3, 2)
    assert np.array_equal(found.per_image.sum(0)[0], np.diagonal(found.matrix))


def test_the_loss_is_the_mean_over_images():
    images = [np.zeros((32, 32, 3), np.uint8), np.full((32, 64, 3), 255, np.uint8)]
    dataset = Dataset(("dark", "bright"), ("a", "b"), lambda i: (images[i], np.zeros(images[i].shape[:2], np.uint8)))
    found = drain(evaluate(predictor(BrightOrDark()), dataset, cross_entropy))
    # Logits are (1, -1) on the dark image and (-1, 1) on the bright one; both are class 0.
    right, wrong = np.log(1 + np.exp(-2)), np.log(1 + np.exp(2))
    assert found.loss == pytest.approx((right + wrong) / 2, rel=1e-5)


def test_a_mapping_gives_its_auxiliary_logits_at_full_size():
    class Auxiliary(nn.Module):
        def forward(self, images):
            return {"out": images, "aux": images[..., ::8, ::8]}

    found = outputs(Auxiliary(), torch.randn(1, 3, 33, 40), stride=32)
    assert found["out"].shape == found["aux"].shape == (1, 3, 33, 40)


def test_logits_of_another_size_are_refused_with_the_remedy():
    with pytest.raises(ValueError, match="upsample them"):
        outputs(nn.AvgPool2d(4), torch.randn(1, 3, 64, 64), stride=32)


def test_looking_twice_averages_probabilities():
    class LeftIsOne(nn.Module):
        """Class 1 in the left half of whatever it is shown."""

        def forward(self, images):
            left = (torch.arange(images.shape[-1]) < images.shape[-1] / 2).float() * 4 - 2
            ones = left.expand(images.shape[0], 1, *images.shape[-2:])
            return torch.cat([-ones, ones], dim=1)

    half = torch.tensor([0.5, 0.5, 0.5])
    image = np.zeros((32, 64, 3), np.uint8)
    once = Predictor(LeftIsOne(), Placement(torch.device("cpu"), "fp32"), 32, half, half)
    mirrored = replace(once, flip=True)
    assert once.logits(image).argmax(1)[0, 0].tolist() == [1] * 32 + [0] * 32
    # The mirrored look says 1 on the right, so that both classes are equally likely everywhere.
    assert torch.allclose(mirrored.logits(image).exp(), torch.full((1, 2, 32, 64), 0.5))


def test_looking_at_other_sizes_gives_logits_of_the_images_own_size():
    rng = np.random.default_rng(0)
    image = np.repeat(rng.integers(0, 2, (40, 50, 1)).astype(np.uint8) * 255, 3, axis=2)
    found = replace(predictor(BrightOrDark()), scales=(0.5, 1.0, 1.3)).logits(image)
    assert found.shape == (1, 2, 40, 50)
    assert torch.allclose(found.exp().sum(1), torch.ones(1, 40, 50), atol=1e-5)
