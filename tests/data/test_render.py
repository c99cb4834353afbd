"""Views rendered for a whole batch give what each sample gives by itself on the CPU."""

from collections.abc import Callable
from typing import Any

import cv2
import numpy as np
import pytest
import torch

from vocseg.components.augmentations import color_jitter, crop, horizontal_flip, random_scale
from vocseg.data.dataset import VOID, Dataset
from vocseg.data.loader import TrainingBatches
from vocseg.data.render import Views, stack_views
from vocseg.data.sample import Sample
from vocseg.device import Placement
from vocseg.plugins import discover
from vocseg.train.feed import on_device

PARAMETERS: dict[str, dict[str, Any]] = {
    "crop": {"size": (40, 56)},
    "class_balanced_crop": {"size": 40},
    "resize": {"size": (40, 56)},
    "pad": {"size": 72},
    "random_scale": {"scale": (0.7, 2.0), "aspect": 1.5},
    "affine": {"degrees": 30.0, "translate": 0.3, "scale": (0.7, 1.5), "shear": 20.0},
    "rotation": {"degrees": 180.0},
    "color_jitter": {"brightness": 0.5, "contrast": 0.5, "saturation": 1.0, "hue": 0.1},
}
FILL = (10, 200, 90)


def photographs(count: int = 6) -> Dataset:
    """Smooth images of different sizes, masks of blobs with void rims."""

    def read(index: int) -> tuple[np.ndarray, np.ndarray]:
        rng = np.random.default_rng(index)
        height, width = 48 + 5 * index, 64 - 3 * index
        coarse = rng.integers(0, 256, (6, 6, 3), dtype=np.uint8)
        image = cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)
        mask = cv2.resize(rng.integers(0, 4, (5, 5), dtype=np.uint8), (width, height), interpolation=cv2.INTER_NEAREST)
        mask[rng.random(mask.shape) < 0.1] = VOID
        return image, mask

    return Dataset(("a", "b", "c", "d"), tuple(map(str, range(count))), read)


def both(augmentations: list[Callable], epochs: int = 3) -> list[tuple[torch.Tensor, ...]]:
    """Images and labels of the same epochs, of the CPU and then as rendered."""
    placement = Placement(torch.device("cpu"), "fp32")

    def batches(render: bool) -> TrainingBatches:
        return TrainingBatches(photographs(), augmentations, batch_size=6, seed=4, workers=2, fill=FILL, render=render)

    pairs = zip(*(on_device(batches(render).epochs(0, epochs), placement) for render in (True, False)), strict=True)
    return [(*plain, *rendered) for plain, rendered in pairs]


def differences(images: torch.Tensor, rendered: torch.Tensor) -> torch.Tensor:
    assert images.dtype == rendered.dtype == torch.uint8
    assert images.shape == rendered.shape
    return (images.int() - rendered.int()).abs()


def built_in() -> list[str]:
    found = [c.name for c in discover() if c.kind == "augmentation" and c.origin == "vocseg"]
    assert len(found) >= 10
    return found


@pytest.mark.parametrize("name", built_in())
def test_every_augmentation_gives_the_pixels_and_labels_it_gives_on_the_cpu(name: str) -> None:
    step = discover().get("augmentation", name).build({}, PARAMETERS.get(name, {}))
    fixed = crop(size=(40, 56))
    order = [step, fixed] if name in ("random_scale", "resize", "pad") else [fixed, step]
    for images, labels, rendered, rendered_labels in both(order):
        assert torch.equal(labels, rendered_labels)
        apart = differences(images, rendered)
        # OpenCV may sample on a grid of 1/32 pixel, on slopes of up to 50 levels a pixel.
        assert (apart <= 2).float().mean() > 0.995
        assert apart.float().mean() < 0.5


def test_a_usual_pipeline_gives_the_same_statistics_and_labels() -> None:
    steps = [random_scale(scale=(0.5, 2.0)), horizontal_flip(), crop(size=48), color_jitter()]
    batches = both(steps, epochs=10)
    images, labels, rendered, rendered_labels = (torch.cat(tensors).double() for tensors in zip(*batches, strict=True))
    assert torch.equal(labels, rendered_labels)
    assert (images.mean((0, 1, 2)) - rendered.mean((0, 1, 2))).abs().max() < 0.1
    assert (images.std((0, 1, 2)) - rendered.std((0, 1, 2))).abs().max() < 0.1


def test_whole_pixels_are_moved_and_mirrored_exactly_and_outside_is_the_fill() -> None:
    rng = np.random.default_rng(0)
    image, mask = rng.integers(0, 256, (9, 7, 3), dtype=np.uint8), rng.integers(0, 4, (9, 7), dtype=np.uint8)
    sample = Sample(image, mask, fill=FILL)
    horizontal_flip(p=1.0)(sample, rng)
    sample.crop(-2, 3, (8, 6))
    images, labels = stack_views([sample.unrendered()], FILL).render()
    # Rows -2 and -1 lie outside, and so do columns 7 and 8 of the mirrored image.
    expected = np.full((8, 6, 3), FILL, np.uint8)
    expected[2:, :4] = image[:6, ::-1][:, 3:]
    assert np.array_equal(images[0].numpy(), expected)
    assert (labels[0, :2] == VOID).all()
    assert np.array_equal(labels[0, 2:, :4].numpy(), mask[:6, ::-1][:, 3:])


def test_colours_change_by_the_mean_of_the_view_as_it_is_rendered() -> None:
    image = np.zeros((2, 4, 3), np.uint8)
    image[:, :2] = (100, 50, 0)  # the left half; the right is black
    sample = Sample(image, np.zeros((2, 4), np.uint8))
    sample.crop(0, 1, (2, 2))
    sample.recolour(np.diag([2.0, 1.0, 1.0]), np.eye(3))
    # Half of the view is (100, 50, 0), so that its mean is (50, 25, 0): 2*100 + 50, 50 + 25, 0; and the mean alone.
    expected = [[250, 75, 0], [50, 25, 0]]
    images, _ = stack_views([sample.unrendered()], FILL).render()
    assert images[0, 0].tolist() == expected
    assert sample.image[0].tolist() == expected


def test_what_moves_after_a_change_of_colours_moves_changed_colours() -> None:
    def view() -> Sample:
        sample = Sample(np.full((4, 4, 3), 100, np.uint8), np.zeros((4, 4), np.uint8), fill=FILL)
        sample.recolour(np.eye(3) / 2, np.zeros((3, 3)))
        sample.crop(0, 2, (4, 4))
        return sample

    images, _ = stack_views([view().unrendered()], FILL).render()
    # What came in from outside came after.
    assert images[0, 0].tolist() == view().image[0].tolist() == [[50] * 3, [50] * 3, [*FILL], [*FILL]]


def test_what_looks_at_pixels_is_rendered_beside_what_is_not() -> None:
    def sometimes(sample: Sample, rng: np.random.Generator) -> None:
        if rng.random() < 0.5:
            sample.image = 255 - sample.image

    for images, labels, rendered, rendered_labels in both([random_scale(scale=(0.7, 2.0)), crop(size=32), sometimes]):
        assert torch.equal(labels, rendered_labels)
        assert (differences(images, rendered) <= 2).float().mean() > 0.995


def test_an_image_that_shrinks_or_is_out_of_sight_is_rendered_on_the_cpu() -> None:
    image, mask = photographs().read(0)
    for matrix, size in (
        (np.diag([0.4, 0.5, 1.0]), (24, 26)),
        (np.array([[1, 0, 200.0], [0, 1, 0], [0, 0, 1]]), (8, 8)),
    ):
        sample = Sample(image, mask, fill=FILL)
        sample.transform(matrix, size)
        images, labels = stack_views([sample.unrendered()], FILL).render()
        assert np.array_equal(images[0].numpy(), sample.image)
        assert np.array_equal(labels[0].numpy(), sample.mask)


def test_a_batch_that_is_to_be_rendered_holds_no_more_pixels_than_its_views_show() -> None:
    batches = TrainingBatches(photographs(), [crop(size=16)], batch_size=6, seed=0, render=False)
    views = next(batches.epoch(0))
    assert isinstance(views, Views)
    # 16 pixels, up to two more at each side for sampling, and the rim.
    assert max(views.sources.shape[1:3]) <= 16 + 4 + 2
    assert views.colours.shape == (0, 2, 3, 3)
