"""segmentation-models-pytorch (smp): each of its decoders on each of its encoders and on timm's.

Report 004, "UNet with transfer", is `decoder = "Unet"` on a pretrained encoder. The report does not say which; the
default here is ResNet34, as in its other networks, and smp's own values for all the rest.

Papers: Unet arXiv:1505.04597, UnetPlusPlus 1807.10165, MAnet doi:10.1109/ACCESS.2020.3025372, Linknet 1707.03718,
FPN 1612.03144 (as in 1901.02446), PSPNet 1612.01105, PAN 1805.10180, DeepLabV3 1706.05587, DeepLabV3Plus 1802.02611,
UPerNet 1807.10221, Segformer 2105.15203, DPT 2103.13413.
"""

import warnings
from typing import Annotated, Any, Literal

import segmentation_models_pytorch
import timm
import torch
from annotated_types import Ge, Interval
from torch import nn

from vocseg import architecture
from vocseg.errors import Problem, UsageError, did_you_mean

PER_LEVEL = ("Unet", "UnetPlusPlus", "MAnet")  # their decoder has one width for each level of the encoder
WIDTHS = {  # what smp calls the widths of the other decoders
    "Linknet": (),
    "FPN": ("decoder_pyramid_channels", "decoder_segmentation_channels"),
    "PSPNet": ("psp_out_channels",),
    "PAN": ("decoder_channels",),
    "DeepLabV3": ("decoder_channels",),
    "DeepLabV3Plus": ("decoder_channels",),
    "UPerNet": ("decoder_channels",),
    "Segformer": ("decoder_segmentation_channels",),
    "DPT": ("decoder_fusion_channels",),
}
DROPOUT = {
    "FPN": "decoder_dropout",
    "PSPNet": "psp_dropout",
    "DeepLabV3": "decoder_aspp_dropout",
    "DeepLabV3Plus": "decoder_aspp_dropout",
}
PROBE = 128


@architecture(backbone="encoder")
def smp(
    num_classes: int,
    *,
    decoder: Literal[
        "Unet", "UnetPlusPlus", "MAnet", "Linknet", "FPN", "PSPNet", "PAN", "DeepLabV3", "DeepLabV3Plus",
        "UPerNet", "Segformer", "DPT",
    ] = "Unet",
    encoder: str = "resnet34",
    encoder_depth: Annotated[int, Interval(ge=3, le=5)] | None = None,
    decoder_channels: tuple[Annotated[int, Ge(1)], ...] = (),
    decoder_dropout: Annotated[float, Interval(ge=0, lt=1)] | None = None,
) -> nn.Module:  # fmt: skip
    """Any decoder of segmentation-models-pytorch on any of its encoders or timm's.

    Args:
        encoder: one of smp's own (`resnet34`, `mit_b0`), or `tu-` and a timm name (`tu-tf_efficientnet_lite0`).
            Linknet and UnetPlusPlus take no `mit_`; DPT takes timm's vision transformers only.
        encoder_depth: how many times the encoder halves the image; without it 5, for PSPNet 3. DPT has none.
        decoder_channels: one width a level, deepest first, for Unet, UnetPlusPlus and MAnet; the pyramid's and
            the segmentation's (a multiple of 32) for FPN; one for the others; none for Linknet.
        decoder_dropout: for FPN, PSPNet, DeepLabV3 and DeepLabV3Plus.
    """
    problems = []
    options: dict[str, Any] = {"encoder_name": encoder, "encoder_weights": None, "classes": num_classes}
    if wrong := unknown(encoder):
        problems.append(Problem("model.encoder", wrong))
    if encoder_depth is not None:
        options["encoder_depth"] = encoder_depth
        if decoder in ("FPN", "PSPNet"):  # how far they enlarge their logits at the end, which smp sets for one depth
            options["upsampling"] = 2 ** (encoder_depth - 3 if decoder == "FPN" else encoder_depth)
    if decoder in PER_LEVEL:
        options["decoder_channels"] = decoder_channels or (256, 128, 64, 32, 16)[:encoder_depth]
    elif len(decoder_channels) > len(WIDTHS[decoder]):
        found = f"{decoder} takes {len(WIDTHS[decoder])}, found {len(decoder_channels)}"
        problems.append(Problem("model.decoder_channels", f"{found}; shorten the list"))
    else:
        options |= zip(WIDTHS[decoder], decoder_channels, strict=False)
    if decoder_dropout is not None and decoder not in DROPOUT:
        problems.append(Problem("model.decoder_dropout", f"{decoder} has no dropout; leave the key out"))
    elif decoder_dropout is not None:
        options[DROPOUT[decoder]] = decoder_dropout
    if problems:
        raise UsageError(*problems)
    try:
        network = build(getattr(segmentation_models_pytorch, decoder), options)
        # Some pairs fit together in name only; better told now than at the first image of another size.
        with torch.no_grad():
            height, width = network.eval()(torch.zeros(1, 3, PROBE, PROBE)).shape[-2:]
        if (height, width) != (PROBE, PROBE):
            raise ValueError(f"the logits of a {PROBE}x{PROBE} image are {height}x{width}")
    except Exception as error:
        reason = " ".join(f"{type(error).__name__} {error}".split())
        raise UsageError(Problem("model", f"smp cannot put {decoder} on '{encoder}' as asked: {reason}")) from error
    network.stride = PROBE if decoder == "PAN" else 32  # PAN halves the map at 1/16 three times more
    if encoder in segmentation_models_pytorch.encoders.encoders:  # timm's carry theirs
        network.encoder.pretrained_cfg = published(encoder)
    return network.train()


def unknown(encoder: str) -> str:
    """What is wrong with the name of an encoder; empty where nothing is."""
    own = segmentation_models_pytorch.encoders.get_encoder_names()
    if encoder in own or (encoder.startswith("tu-") and timm.is_model(encoder[3:])):
        return ""
    if timm.is_model(encoder):
        return f"smp has no encoder named '{encoder}', but timm has; did you mean 'tu-{encoder}'?"
    near = did_you_mean(encoder, [*own, *(f"tu-{name}" for name in timm.list_models())])
    return f"neither smp nor timm (names with 'tu-' before them) has an encoder '{encoder}'{near}"


def build(make: Any, options: dict[str, Any]) -> Any:
    """The network without pretrained weights; vision transformers for images of any size where timm can."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of smp's `timm-` encoders, which still work
        try:
            return make(**options, dynamic_img_size=True)
        except TypeError:  # the other timm networks do not know the word
            return make(**options)


def published(encoder: str) -> dict[str, Any]:
    """Where one of smp's own encoders has its weights and how they want their images, in timm's words.

    smp keeps mean and deviation beside the weights, on the hub; given here are those that are not ImageNet's.
    """
    settings = segmentation_models_pytorch.encoders.encoders[encoder]["pretrained_settings"]
    tag = "imagenet" if "imagenet" in settings else next(iter(settings))
    cfg: dict[str, Any] = {
        "architecture": encoder,
        "hf_hub_id": f"{settings[tag]['repo_id']}@{settings[tag]['revision']}",
    }
    if encoder.startswith(("inception", "xception", "timm-tf_efficientnet_lite")):
        cfg |= {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
    elif encoder.startswith("dpn"):
        cfg |= {"mean": (124 / 255, 117 / 255, 104 / 255), "std": (1 / (0.0167 * 255),) * 3}
    return cfg
