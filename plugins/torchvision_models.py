"""torchvision's segmentation networks: FCN, DeepLabV3 and LR-ASPP on dilated ResNets and MobileNetV3.

Report 002, "FCN ResNet-101" (Table 3), is `network = "fcn_resnet101"`, the default, with `model.weights = "published"`
(COCO images with VOC's classes) and `train.freeze_encoder = true`: all but the classifier is the encoder. The table's
last layer has a 3x3 kernel, as have all its convolutions; torchvision's is 1x1, and its weights are wanted.

The file is not named torchvision.py, which would hide the package from whatever is started in this folder.

Papers: FCN arXiv:1411.4038, DeepLabV3 1706.05587, LR-ASPP (with MobileNetV3) 1905.02244.
"""

from typing import Any, Literal

from torch import Tensor, nn
from torchvision.models import get_model_builder, get_model_weights
from torchvision.models.segmentation import LRASPP

from vocseg import architecture
from vocseg.errors import Problem, UsageError


@architecture(backbone="backbone")
def torchvision(
    num_classes: int,
    *,
    network: Literal[
        "fcn_resnet50", "fcn_resnet101",
        "deeplabv3_resnet50", "deeplabv3_resnet101", "deeplabv3_mobilenet_v3_large",
        "lraspp_mobilenet_v3_large",
    ] = "fcn_resnet101",
    auxiliary: bool = False,
) -> nn.Module:  # fmt: skip
    """torchvision's segmentation networks, with their published weights.

    Args:
        auxiliary: a second head on an earlier map of the encoder, whose loss is added; LR-ASPP has none.
    """
    if auxiliary and network.startswith("lraspp"):
        raise UsageError(Problem("model.auxiliary", f"{network} has no auxiliary head; leave the key out"))
    build = get_model_builder(network)
    module: Any = AtItsOwnSize(build(weights=None, weights_backbone=None, num_classes=num_classes, aux_loss=auxiliary))
    module.stride = 16 if "mobilenet" in network else 8
    module.pretrained_cfg = published(network, "COCO_WITH_VOC_LABELS_V1")
    # The ImageNet weights that torchvision itself starts these networks from; it has newer ones for some encoders.
    module.backbone.pretrained_cfg = published(network.partition("_")[2], "IMAGENET1K_V1")
    return module


class AtItsOwnSize(nn.Module):
    """A network of torchvision's, with the same names of weights, without the bilinear upsampling at its end."""

    def __init__(self, whole: Any):
        super().__init__()
        self.backbone = whole.backbone
        self.classifier = whole.classifier
        self.aux_classifier = getattr(whole, "aux_classifier", None)
        self.reads_two_maps = isinstance(whole, LRASPP)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """(b, 3, h, w), sides multiples of `stride`, to logits of 1/8 or 1/16 of that size."""
        maps = self.backbone(x)
        logits = {"out": self.classifier(maps if self.reads_two_maps else maps["out"])}
        if self.aux_classifier is not None:
            logits["aux"] = self.aux_classifier(maps["aux"])
        return logits


def published(name: str, tag: str) -> dict[str, Any]:
    """Where torchvision has the weights of one of its networks and how they want their images, in timm's words."""
    weights = get_model_weights(name)[tag]
    images = weights.transforms()
    return {"architecture": name, "url": weights.url, "mean": tuple(images.mean), "std": tuple(images.std)}
