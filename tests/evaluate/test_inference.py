import gc
from dataclasses import replace
from itertools import islice

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from vocseg.data.dataset import Dataset
from vocseg.device import Placement
from vocseg.evaluate.inference import Looks, Predictor, window_starts
from vocseg.evaluate.scores import scores
from vocseg.evaluate.validation import evaluate
from vocseg.network import Normalization, outputs


class BrightOrDark(nn.Module):
    """Class 1 where the first channel is positive; refuses sides that are no multiple of 32."""

    def forward(self, images):
        assert images.shape[-1] % 32 == 0
        assert images.shape[-2] % 32 == 0
        return torch.cat([-images[:, :1], images[:, :1]], dim=1)


class Pixelwise(nn.Module):
    """Logits of each pixel from its colour alone; keeps the sizes it was shown."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Conv2d(3, 4, 1)
        nn.init.normal_(self.layer.weight, generator=torch.Generator().manual_seed(0))
        self.sizes = []

    def forward(self, images):
        self.sizes.append(tuple(images.shape[-2:]))
        return self.layer(images)


class Column(nn.Module):
    """Logits 0 and the number of the pixel's column in what is shown, from 0."""

    def forward(self, images):
        columns = torch.arange(images.shape[-1], dtype=torch.float32).expand(1, 1, *images.shape[-2:])
        return torch.cat([torch.zeros_like(columns), columns], dim=1)


def predictor(network, stride=32, **looks):
    half = Normalization(torch.full((3,), 127.5), torch.full((3,), 127.5))
    return Predictor(network, Placement(torch.device("cpu"), "fp32"), stride, half, Looks(**looks))


def noise(height, width):
    return np.random.default_rng(height * 1000 + width).integers(0, 256, (height, width, 3)).astype(np.uint8)


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
    # A row each for hits, truth, prediction, and what was predicted on the two void rows.
    assert found.per_image.shape == (3, 4, 2)
    assert found.per_image.dtype == np.int32  # a few hundred bytes an image
    assert np.array_equal(found.per_image.sum(0)[0], np.diagonal(found.matrix))
    assert found.per_image.sum(2)[:, 1].tolist() == [int((mask != 255).sum()) for _, mask in pairs]
    assert found.per_image.sum(2)[:, 3].tolist() == [2 * 47, 2 * 64, 2 * 100]


def test_the_loss_is_the_mean_over_images():
    images = [np.zeros((32, 32, 3), np.uint8), np.full((32, 64, 3), 255, np.uint8)]
    dataset = Dataset(("dark", "bright"), ("a", "b"), lambda i: (images[i], np.zeros(images[i].shape[:2], np.uint8)))
    found = drain(evaluate(predictor(BrightOrDark()), dataset, cross_entropy))
    # Logits are (1, -1) on the dark image and (-1, 1) on the bright one; both are class 0.
    right, wrong = np.log(1 + np.exp(-2)), np.log(1 + np.exp(2))
    assert found.loss == pytest.approx((right + wrong) / 2, rel=1e-5)


def test_no_result_is_read_before_the_last_image_is_done():
    class NothingIsRead(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            assert func.name() not in ("aten::item", "aten::is_nonzero", "aten::_local_scalar_dense")
            return func(*args, **(kwargs or {}))

    dataset = Dataset(("a", "b", "c", "d"), ("x", "y", "z"), lambda i: (noise(9, 7), np.zeros((9, 7), np.uint8)))
    scoring = evaluate(predictor(Pixelwise(), flip=True, window=6), dataset, cross_entropy)
    with NothingIsRead():
        assert [scored.done for scored in islice(scoring, 3)] == [1, 2, 3]
    assert drain(scoring).per_image.shape == (3, 4, 4)


def test_no_confusion_matrix_and_no_logits_of_an_image_are_kept():
    classes = 40

    class Many(nn.Module):
        def forward(self, images):
            return images[:, :1].expand(-1, classes, -1, -1) * 1.0

    dataset = Dataset(tuple(map(str, range(classes))), "abcdefghi", lambda i: (noise(8, 8), np.zeros((8, 8), np.uint8)))
    large = {}
    for scored in evaluate(predictor(Many()), dataset, cross_entropy):
        if scored.done in (2, 9):
            large[scored.done] = sum(type(o) is torch.Tensor and o.numel() >= classes**2 for o in gc.get_objects())
    assert 0 < large[9] <= large[2]


def test_a_mapping_gives_its_auxiliary_logits_at_full_size():
    class Auxiliary(nn.Module):
        def forward(self, images):
            return {"out": images, "aux": images[..., ::8, ::8]}

    found = outputs(Auxiliary(), torch.randn(1, 3, 33, 40), stride=32)
    assert found["out"].shape == found["aux"].shape == (1, 3, 33, 40)


@pytest.mark.parametrize("size", [(64, 64), (33, 47), (5, 100)])
def test_logits_at_a_whole_fraction_are_upsampled_as_a_network_would_do_it(size):
    images = torch.randn(1, 3, *size)
    for factor in (2, 3, 4, 32):
        upsampling = nn.Sequential(nn.AvgPool2d(factor), nn.Upsample(scale_factor=factor, mode="bilinear"))
        expected = outputs(upsampling, images, stride=96)["out"]
        found = outputs(nn.AvgPool2d(factor), images, stride=96)["out"]
        assert found.shape == expected.shape == images.shape
        assert torch.allclose(found, expected, atol=1e-6)
        assert outputs(nn.AvgPool2d(factor).bfloat16(), images.bfloat16(), stride=96)["out"].dtype == torch.float32


@pytest.mark.parametrize("kernel", [(4, 2), (1, 2), (64, 64)])
def test_logits_of_another_size_are_refused_with_the_remedy(kernel):
    with pytest.raises(ValueError, match="or at the same whole fraction of height and width"):
        outputs(nn.AvgPool2d(kernel, ceil_mode=False), torch.randn(1, 3, 64, 96), stride=32)


@pytest.mark.parametrize("looks", [{}, {"window": 24}, {"flip": True}, {"scales": (1.5,)}])
@pytest.mark.parametrize("channels_last", [True, False])
def test_a_network_that_leaves_upsampling_to_vocseg_is_scored_as_if_it_did_not(looks, channels_last):
    small = nn.Sequential(nn.AvgPool2d(4), Pixelwise())
    itself = nn.Sequential(small, nn.Upsample(scale_factor=4, mode="bilinear"))
    rng = np.random.default_rng(0)
    sizes = [(33, 47), (64, 64), (5, 100)]
    pairs = [(noise(*size), rng.choice(np.array([0, 1, 2, 3, 255], np.uint8), size)) for size in sizes]
    dataset = Dataset(("a", "b", "c", "d"), ("x", "y", "z"), pairs.__getitem__)
    placement = Placement(torch.device("cpu"), "fp32", channels_last=channels_last)
    one, other = (
        drain(evaluate(replace(predictor(n, 8, **looks), placement=placement), dataset, cross_entropy))
        for n in (small, itself)
    )
    assert np.array_equal(one.matrix, other.matrix)
    assert np.array_equal(one.per_image, other.per_image)
    assert one.loss == pytest.approx(other.loss, rel=1e-5)


def test_a_look_is_what_the_network_gave_and_after_several_their_mean_at_full_size():
    small = nn.Sequential(nn.AvgPool2d(4), Pixelwise())
    image = noise(33, 47)
    seen = predictor(small, 8).look(image)
    assert (seen.raw.shape, seen.padded, seen.size) == ((1, 4, 10, 12), (40, 48), (33, 47))
    assert torch.equal(seen.full(), predictor(small, 8).logits(image))
    assert predictor(small, 8, window=47).look(image).raw.shape == (1, 4, 10, 12)  # the window holds all of it
    for looks in ({"window": 46}, {"flip": True}, {"scales": (0.5,)}):
        seen = predictor(small, 8, **looks).look(image)
        assert (seen.raw.shape[2:], seen.padded, seen.size) == ((33, 47),) * 3
        assert torch.equal(seen.full(), predictor(small, 8, **looks).logits(image))


def test_looking_twice_averages_probabilities():
    class LeftIsOne(nn.Module):
        """Class 1 in the left half of whatever it is shown."""

        def forward(self, images):
            left = (torch.arange(images.shape[-1]) < images.shape[-1] / 2).float() * 4 - 2
            ones = left.expand(images.shape[0], 1, *images.shape[-2:])
            return torch.cat([-ones, ones], dim=1)

    image = np.zeros((32, 64, 3), np.uint8)
    once = predictor(LeftIsOne())
    mirrored = predictor(LeftIsOne(), flip=True)
    assert once.logits(image).argmax(1)[0, 0].tolist() == [1] * 32 + [0] * 32
    # The mirrored look says 1 on the right, so that both classes are equally likely everywhere.
    assert torch.allclose(mirrored.logits(image).exp(), torch.full((1, 2, 32, 64), 0.5))


def test_looking_at_other_sizes_gives_logits_of_the_images_own_size():
    rng = np.random.default_rng(0)
    image = np.repeat(rng.integers(0, 2, (40, 50, 1)).astype(np.uint8) * 255, 3, axis=2)
    found = predictor(BrightOrDark(), scales=(0.5, 1.0, 1.3)).logits(image)
    assert found.shape == (1, 2, 40, 50)
    assert torch.allclose(found.exp().sum(1), torch.ones(1, 40, 50), atol=1e-5)


@given(length=st.integers(1, 3000), window=st.integers(1, 800), overlap=st.floats(0, 0.9))
def test_windows_cover_a_side_lie_inside_it_and_overlap_as_they_should(length, window, overlap):
    starts = window_starts(length, window, overlap)
    assert starts[0] == 0
    assert starts[-1] + min(window, length) == length
    steps = np.diff(starts)
    assert (steps > 0).all()
    # No gap, and no less in common than asked for but for rounding to whole pixels.
    assert (steps <= min(window, max(1, window * (1 - overlap) + 0.5))).all()


@given(
    height=st.integers(1, 40),
    width=st.integers(1, 40),
    window=st.integers(3, 20),
    overlap=st.sampled_from([0.0, 0.3, 0.5, 0.9]),
    stride=st.sampled_from([1, 4]),
)
@settings(max_examples=60, deadline=None)
def test_a_pixelwise_network_says_the_same_through_windows(height, width, window, overlap, stride):
    network, image = Pixelwise(), noise(height, width)
    whole = predictor(network, stride).logits(image)
    network.sizes.clear()
    found = predictor(network, stride, window=window, overlap=overlap).logits(image)
    assert torch.allclose(found, whole, atol=1e-5)
    # It never saw more than a window, padded to the stride.
    sides = np.array(network.sizes)
    assert sides.max() <= window + -window % stride
    assert len(sides) == len(window_starts(height, window, overlap)) * len(window_starts(width, window, overlap))


def test_windows_work_on_the_scaled_and_on_the_mirrored_image():
    network, image = Pixelwise(), noise(30, 21)
    looks = {"scales": (0.5, 1.0, 1.7), "flip": True}
    whole = predictor(network, 1, **looks).logits(image)
    network.sizes.clear()
    assert torch.allclose(predictor(network, 1, **looks, window=20).logits(image), whole, atol=1e-4)
    # 30 x 21 at 0.5 is 15 x 10 (halves to even), one look; at 1, 2 x 2 windows; at 1.7, 51 x 36: rows begin at 0, 10,
    # 20, 30 and 31, columns at 0, 10 and 16. All of it twice.
    assert len(network.sizes) == 2 * (1 + 2 * 2 + 5 * 3)
    assert set(network.sizes) == {(15, 10), (20, 20)}


def test_an_image_no_larger_than_the_window_is_seen_at_once():
    network = Pixelwise()
    predictor(network, 1, window=32).logits(noise(32, 20))
    assert network.sizes == [(32, 20)]


def test_logits_are_averaged_where_windows_overlap():
    # Windows of 4 begin at columns 0 and 2 of 6. Columns 2 and 3 are the first's 2 and 3 and the second's 0 and 1:
    # (2 + 0) / 2 = 1 and (3 + 1) / 2 = 2; columns 4 and 5 are the second's 2 and 3.
    found = predictor(Column(), 1, window=4).logits(np.zeros((3, 6, 3), np.uint8))
    assert found[0, 1].tolist() == [[0, 1, 1, 2, 2, 3]] * 3
    assert not found[0, 0].any()


def test_the_last_window_is_pushed_back_into_the_image():
    # Without overlap windows of 4 begin at 0 and, of 5 columns, at 1: columns 1 to 3 are seen twice.
    # Column 1 is 1 and 0, 2 is 2 and 1, 3 is 3 and 2, and 4 is the second's 3.
    found = predictor(Column(), 1, window=4, overlap=0.0).logits(np.zeros((2, 5, 3), np.uint8))
    assert found[0, 1].tolist() == [[0, 0.5, 1.5, 2.5, 3]] * 2


def test_windows_of_images_in_contiguous_memory_give_the_same():
    laid_out = predictor(Pixelwise(), window=20)
    contiguous = replace(laid_out, placement=Placement(torch.device("cpu"), "fp32", channels_last=False))
    image = noise(33, 47)
    assert torch.allclose(laid_out.logits(image), contiguous.logits(image), atol=1e-5)
