"""A feature pyramid on a whole ImageNet classifier: what it knows of classes is kept, not only its maps.

Other decoders drop the classifier's last layers. With some ten images a class those layers hold most of what can be
known: applied at every place of the map, they tell a cow from a horse before the decoder has seen either.
"""

from typing import Annotated, Any

import timm
import torch
import torch.nn.functional as F
from annotated_types import Interval, MultipleOf
from torch import Tensor, nn

from vocseg import architecture
from vocseg.errors import Problem, UsageError, did_you_mean

GROUPS = 32  # of the group norms, which do not mind small batches


@architecture(backbone="encoder")
def classifier_fpn(
    num_classes: int,
    *,
    encoder: str = "resnet34",
    width: Annotated[int, Interval(ge=32, le=1024), MultipleOf(32)] = 128,
    dropout: Annotated[float, Interval(ge=0, lt=1)] = 0.2,
) -> nn.Module:
    """FPN over a whole timm classifier, which scores every place of the coarsest map (after Kirillov et al. 2019).

    The pyramid and its summed head are those of Panoptic FPN (arXiv:1901.02446). The coarsest level adds to the
    encoder's last map its pooled features and the ImageNet scores of its classifier, applied as a 1x1 convolution
    (Long et al. 2015, arXiv:1411.4038). All of the classifier is the encoder, for weights, freezing and learning rate.

    Args:
        encoder: a convolutional network of timm whose classifier reads its last map, such as `resnet34`.
        width: channels of the pyramid.
        dropout: share of the pyramid's channels left out in training.
    """
    if not timm.is_model(encoder):
        near = did_you_mean(encoder, timm.list_models())
        raise UsageError(Problem("model.encoder", f"timm has no model named '{encoder}'{near}"))
    return ClassifierFPN(timm.create_model(encoder), num_classes, width, dropout, encoder)


class ClassifierFPN(nn.Module):
    """The network of `classifier_fpn`: (b, 3, h, w), sides multiples of `stride`, to logits at its finest map."""

    def __init__(self, encoder: Any, num_classes: int, width: int, dropout: float, name: str):
        super().__init__()
        self.encoder = encoder
        classifier = encoder.get_classifier()
        try:
            with torch.no_grad():
                last, maps = encoder.eval().forward_intermediates(torch.zeros(1, 3, 64, 64))
            encoder.train()
            if not isinstance(classifier, nn.Linear) or classifier.in_features != last.shape[1]:
                raise ValueError("its classifier does not read its last map")
        except Exception as error:
            reason = " ".join(str(error).split())
            raise UsageError(Problem("model.encoder", f"timm's '{name}' cannot be the encoder: {reason}")) from error
        strides = [64 // m.shape[-1] for m in maps]
        self.levels = [i for i, stride in enumerate(strides) if stride >= 4]
        self.stride = strides[-1]

        self.last = normed(last.shape[1], width, kernel=1)
        self.scores = normed(classifier.out_features, width, kernel=1)
        self.pooled = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(last.shape[1], width, 1), nn.ReLU(inplace=True))
        self.lateral = nn.ModuleList(nn.Conv2d(maps[i].shape[1], width, 1) for i in self.levels)
        self.smooth = nn.ModuleList(nn.Sequential(normed(width, width), nn.ReLU(inplace=True)) for _ in self.levels)
        self.dropout = nn.Dropout2d(dropout)
        self.classify = nn.Conv2d(width, num_classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        last, maps = self.encoder.forward_intermediates(x)
        maps = [maps[i] for i in self.levels]
        known = self.encoder.get_classifier()
        scores = F.conv2d(last, known.weight[:, :, None, None], known.bias)

        level = self.last(last) + self.scores(scores) + self.pooled(last) + self.lateral[-1](maps[-1])
        total = self.smooth[-1](level)
        for i in reversed(range(len(maps) - 1)):
            level = doubled(level) + self.lateral[i](maps[i])
            total = doubled(total) + self.smooth[i](level)
        return self.classify(self.dropout(total))


def normed(inside: int, outside: int, kernel: int = 3) -> nn.Sequential:
    conv = nn.Conv2d(inside, outside, kernel, padding=kernel // 2, bias=False)
    # Two channels a group at least: of a map of one pixel there would be nothing to normalise by, which torch refuses.
    return nn.Sequential(conv, nn.GroupNorm(min(GROUPS, outside // 2), outside))


def doubled(x: Tensor) -> Tensor:
    return F.interpolate(x, scale_factor=2, mode="bilinear")
