"""Augmentations that mix two training samples: a rectangle or objects of another image, with their labels.

The other one comes from `Sample.partner`: any image of the training split, brought through the same steps as the sample
so far. So these belong after the step that gives all samples one size, and as they compute the pixels of the view they
find, after all that moves pixels. A step that mixes after another one gets a partner that may be mixed itself.
"""

from typing import Annotated

import numpy as np
from annotated_types import Ge, Interval
from numpy.typing import NDArray

from vocseg import augmentation
from vocseg.components.augmentations import Augment, ordered
from vocseg.data.dataset import VOID
from vocseg.data.opencv import cv2
from vocseg.data.sample import Sample
from vocseg.errors import Problem, UsageError

Probability = Annotated[float, Interval(ge=0, le=1)]
Share = Annotated[float, Interval(gt=0, le=1)]

_RIM = 10  # VOC's void rims are 5 pixels wide, and images are enlarged up to twice


@augmentation
def cutmix(*, p: Probability = 0.5, share: tuple[Share, Share] = (0.1, 0.5)) -> Augment:
    """Puts a rectangle of another training image in place (Yun et al. 2019, arXiv:1905.04899).

    Image and labels, as French et al. (2020, arXiv:1906.01916) do for segmentation; from them too is the rectangle:
    of any shape that fits, and always whole. It needs samples of one size: put it after `crop` or `resize`.

    Args:
        share: least and largest share of the image that is replaced.

    Raises:
        UsageError: the range is upside down.
    """
    low, high = ordered("cutmix.share", share)

    def augment(sample: Sample, rng: np.random.Generator) -> None:
        if rng.random() >= p:
            return
        partner = _partner("cutmix", sample, rng)
        area = rng.uniform(low, high)
        tall = area ** rng.uniform()  # from the area's share, when it is as wide as the image, to 1
        height, width = (max(1, round(s * t)) for s, t in zip(sample.size, (tall, area / tall), strict=True))
        y = int(rng.integers(sample.size[0] - height, endpoint=True))
        x = int(rng.integers(sample.size[1] - width, endpoint=True))
        partner.crop(y, x, (height, width))  # so that no other pixel of it is computed
        inside = np.s_[y : y + height, x : x + width]
        image, mask = sample.image.copy(), sample.mask.copy()
        image[inside], mask[inside] = partner.image, partner.mask
        sample.image, sample.mask = image, mask

    return augment


@augmentation
def copy_paste(
    *,
    p: Probability = 0.5,
    max_objects: Annotated[int, Ge(1)] = 10,
    min_pixels: Annotated[int, Ge(1)] = 64,
) -> Augment:
    """Pastes objects of another training image at their place (Ghiasi et al. 2021, arXiv:2012.07177).

    An object is a connected part of one class other than the background. Some of the other image's are drawn, any
    number of them equally often. Void within 10 pixels of an object is pasted with it, as void: its outline lies in
    there, and without it every pasted object would have lost its edge. Nothing is blended, which the paper found to
    make no difference. It needs samples of one size: put it after `crop` or `resize`.

    Args:
        max_objects: most objects that are pasted.
        min_pixels: parts smaller than this are no objects.
    """

    def augment(sample: Sample, rng: np.random.Generator) -> None:
        if rng.random() >= p:
            return
        partner = _partner("copy_paste", sample, rng)
        objects = _objects(partner.mask, min_pixels)
        if not objects:
            return
        count = rng.integers(1, min(len(objects), max_objects), endpoint=True)
        pasted = np.logical_or.reduce([objects[i] for i in rng.permutation(len(objects))[:count]])
        distance = cv2.distanceTransform((~pasted).astype(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_5)
        pasted |= (partner.mask == VOID) & (distance <= _RIM)
        sample.image = np.where(pasted[..., None], partner.image, sample.image)
        sample.mask = np.where(pasted, partner.mask, sample.mask)

    return augment


def _partner(name: str, sample: Sample, rng: np.random.Generator) -> Sample:
    partner = sample.partner(rng)
    if partner.size != sample.size:
        sizes = " and ".join(f"{h}x{w}" for h, w in (sample.size, partner.size))
        raise UsageError(
            Problem(f"augmentation.{name}", f"expected two samples of one size, found {sizes}; put a 'crop' before it")
        )
    return partner


def _objects(mask: NDArray[np.uint8], min_pixels: int) -> list[NDArray[np.bool_]]:
    """Where each connected part of a class other than the background lies, if it has that many pixels."""
    found = []
    for label in np.unique(mask):
        if label not in (0, VOID):
            count, parts, stats, _ = cv2.connectedComponentsWithStats((mask == label).astype(np.uint8))
            found += [parts == i for i in range(1, count) if stats[i, cv2.CC_STAT_AREA] >= min_pixels]
    return found
