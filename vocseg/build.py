"""From a recipe to objects: data sets, network, loss, optimizer and schedule, ready to train or to score.

With `run.py`, `score.py` and the command line, the only code that sees a recipe.
"""

import contextlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vocseg.components.initializers import initialize
from vocseg.components.losses import weighted_sum
from vocseg.components.schedules import with_warmup
from vocseg.data.dataset import Dataset
from vocseg.data.loader import TrainingBatches, cached
from vocseg.data.published import imagenet_weights, normalization, published_weights
from vocseg.data.stats import class_pixels
from vocseg.data.weights import Filled, load_weights
from vocseg.device import Placement, choose_device, choose_precision
from vocseg.distributed import ALONE, World
from vocseg.errors import DataError, Problem, UsageError, VocsegError
from vocseg.evaluate.inference import Looks, Predictor
from vocseg.network import Normalization, backbone_of, choose_normalization, parameter_groups, stride_of
from vocseg.plugins import discover
from vocseg.recipe.prepare import load_recipe
from vocseg.recipe.reader import Part, Recipe
from vocseg.train.ema import Ema
from vocseg.train.loop import Training, steps_per_epoch
from vocseg.train.sync_batch_norm import synchronise

Loss = Callable[[Tensor, Tensor], Tensor]


def open_split(recipe: Recipe, split: str) -> Dataset:
    """Opens one split of the recipe's data set.

    Raises:
        DataError: the data is not there, or the split is empty.
    """
    part = recipe.data
    dataset = build_part(part, {"root": Path(part.settings.root), "split": split})
    if not isinstance(dataset, Dataset):
        raise UsageError(
            Problem(part.component.source, f"data set '{part.name}' returned {type(dataset).__name__}, not a Dataset")
        )
    if not len(dataset):
        raise DataError(Problem(f"data.{part.name}", f"the split '{split}' holds no image"))
    return dataset


def open_datasets(
    target: str,
    *,
    data: Path | None = None,
    overrides: Sequence[str] = (),
    plugins: Path | None = None,
    splits: Sequence[str] | None = None,
) -> dict[str, Dataset]:
    """The splits of a data set, named by a recipe or as `voc2007` … `voc2012`."""
    if target.startswith("voc") and target[3:].isdigit():
        voc = discover().get("dataset", "voc")
        root = data or Path(os.environ.get("VOCSEG_DATA") or "data")
        year = int(target[3:])
        return {s: voc.build({"root": root, "split": s}, {"year": year}) for s in splits or ("train", "val")}
    recipe, _ = load_recipe(target, overrides=overrides, data=data, plugins=plugins)
    return {s: open_split(recipe, s) for s in splits or (recipe.data.settings.train, recipe.data.settings.val)}


def build_part(part: Part, available: dict[str, Any]) -> Any:
    """Builds the component a recipe names; what goes wrong inside a plugin names its file.

    Raises:
        UsageError: the component's function raised.
    """
    try:
        return part.component.build(available, part.params)
    except VocsegError:
        raise
    except Exception as error:
        given = ", ".join(f"{k} = {v!r}" for k, v in part.params.items())
        raise UsageError(
            Problem(
                part.component.source,
                f"{part.component.kind} '{part.name}' cannot be built with {given or 'no parameters'}: "
                f"{type(error).__name__}: {error}",
            )
        ) from error


@dataclass(frozen=True)
class Network:
    """A built network, its pretrained part, what its images must look like, and how it is shown them."""

    module: nn.Module
    backbone: nn.Module | None
    stride: int
    normalization: Normalization
    looks: Looks
    filled: Filled | None = None  # what `model.weights` was loaded into

    def predictor(self, placement: Placement, module: nn.Module | None = None) -> Predictor:
        normalization = self.normalization.to(placement.device)
        return Predictor(module or self.module, placement, self.stride, normalization, self.looks)


def build_network(recipe: Recipe, num_classes: int, *, pretrained: bool = True) -> Network:
    """Builds the recipe's network on the CPU: initialised, then its pretrained weights loaded.

    Args:
        pretrained: load `model.weights`; without it the caller fills the network.

    Raises:
        UsageError: the architecture cannot be built, or the weights are another network's.
        EnvironmentFault: the weights cannot be had.
        DataError: what was downloaded are not the published weights.
    """
    torch.manual_seed(recipe.seed)
    component, settings = recipe.model.component, recipe.model.settings
    module = build_part(recipe.model, {"num_classes": num_classes})
    if not isinstance(module, nn.Module):
        found = type(module).__name__
        raise UsageError(
            Problem(component.source, f"architecture '{component.name}' returned {found}, not a torch module")
        )
    try:
        backbone = backbone_of(module, component.backbone)
    except AttributeError:
        raise UsageError(
            Problem(
                component.source,
                f"architecture '{component.name}' is marked backbone=\"{component.backbone}\", "
                "and its module has no such attribute",
            )
        ) from None
    weights = settings.weights if pretrained else "none"
    fill = build_part(recipe.initializer, {})
    initialize(module, fill, backbone if weights != "none" else None)
    filled = _fill_from(weights, recipe, module, backbone, num_classes) if weights != "none" else None
    pretrained_with = normalization(module if backbone is None or settings.weights == "published" else backbone)
    scored = recipe.evaluate
    return Network(
        module,
        backbone,
        stride_of(module),
        choose_normalization(recipe.data.settings.normalize, pretrained_with),
        Looks(scored.scales, scored.flip, scored.window, scored.overlap),
        filled,
    )


def _fill_from(weights: str, recipe: Recipe, module: nn.Module, backbone: nn.Module | None, num_classes: int) -> Filled:
    """Loads published weights, or a file of the whole network or of its encoder."""

    def other_classes() -> dict[str, torch.Size]:
        with torch.random.fork_rng(devices=[]):
            other = build_part(recipe.model, {"num_classes": num_classes + 1})
        return {key: tensor.shape for key, tensor in other.state_dict().items()}

    own = os.environ.get("VOCSEG_WEIGHTS")
    beside_data = Path(recipe.data.settings.root) / "weights"
    search = [Path(own), beside_data] if own else [beside_data]
    load = partial(load_weights, module, name=recipe.model.name, backbone=backbone, other_classes=other_classes)
    if weights == "imagenet":
        assert backbone is not None  # the recipe reader refuses "imagenet" without one
        return load(imagenet_weights(backbone, search), part="encoder")
    if weights == "published":
        return load(published_weights(module, search), part="whole network")
    return load(Path(weights))


def build_loss(recipe: Recipe, num_classes: int, open_train: Callable[[], Dataset]) -> Loss:
    """The weighted sum of the recipe's losses. The training masks are read only if one asks for their counts."""

    def count() -> Tensor:
        return torch.from_numpy(class_pixels(open_train()))

    available = {"num_classes": num_classes, "class_pixels": count}
    return weighted_sum([(part.settings.weight, build_part(part, available)) for part in recipe.losses])


def build_optimizer(recipe: Recipe, network: Network) -> torch.optim.Optimizer:
    """The recipe's optimizer over a network that is where it will train; the encoder has its own learning rate."""
    part = recipe.optimizer
    optimizer = build_part(part, {"params": parameter_groups(network.module, network.backbone)})
    if not isinstance(optimizer, torch.optim.Optimizer):
        found = type(optimizer).__name__
        raise UsageError(Problem(part.component.source, f"optimizer '{part.name}' returned {found}, not an Optimizer"))
    for group in optimizer.param_groups:
        if group.get("name") == "encoder":
            group["lr"] *= part.settings.encoder_lr
    return optimizer


def choose_placement(recipe: Recipe, device: str) -> Placement:
    chosen = choose_device(device)
    # Batch norm's backward pass fails on channels_last images on MPS (pytorch/pytorch#188371).
    channels_last = recipe.train.channels_last and chosen.type != "mps"
    return Placement(chosen, choose_precision(recipe.train.precision, chosen), channels_last)


@dataclass(frozen=True)
class Job:
    """Everything a recipe stands for, built and on its device."""

    recipe: Recipe
    train: Dataset
    val: Dataset
    network: Network
    placement: Placement
    loss: Loss
    training: Training

    def predictor(self, module: nn.Module) -> Predictor:
        return self.network.predictor(self.placement, module)


def build(recipe: Recipe, device: str = "auto", *, pretrained: bool = True, world: World = ALONE) -> Job:
    """Builds all of a recipe.

    Args:
        world: the processes that train together, each of which builds it.

    Raises:
        VocsegError: whatever a user can mend, before anything is trained.
    """
    placement = choose_placement(recipe, device)
    data, settings = recipe.data.settings, recipe.train
    train, val = open_split(recipe, data.train), open_split(recipe, data.val)
    if train.classes != val.classes:
        raise DataError(f"data: the splits '{data.train}' and '{data.val}' have different classes")
    if data.cache == "auto":
        train, val = (cached(dataset, _memory_bytes() // 8) for dataset in (train, val))
    network = build_network(recipe, len(train.classes), pretrained=pretrained)
    loss = build_loss(recipe, len(train.classes), lambda: train)
    batches = TrainingBatches(
        train,
        [build_part(part, {}) for part in recipe.augmentations],
        batch_size=data.batch_size,
        seed=recipe.seed,
        repeat=data.repeat,
        workers=data.workers,
        fill=network.normalization.fill,
        rank=world.rank,
        size=world.size,
        pin=placement.device.type == "cuda",
    )
    placement.place(network.module)
    if settings.sync_batch_norm and world.size > 1:
        synchronise(network.module)
    optimizer = build_optimizer(recipe, network)
    lr = float(optimizer.param_groups[0]["lr"])
    per_epoch = steps_per_epoch(len(batches), settings.accumulate)
    steps = settings.epochs * per_epoch
    warmup = round(recipe.schedule.settings.warmup_epochs * per_epoch)
    schedule = build_part(recipe.schedule, {"steps": steps - warmup, "steps_per_epoch": per_epoch, "lr": lr})
    frozen = settings.epochs if settings.unfreeze_after is None else settings.unfreeze_after
    training = Training(
        network=network.module,
        backbone=network.backbone,
        batches=batches,
        loss=loss,
        optimizer=optimizer,
        schedule=with_warmup(schedule, warmup),
        placement=placement,
        stride=network.stride,
        normalization=network.normalization.to(placement.device),
        epochs=settings.epochs,
        seed=recipe.seed,
        accumulate=settings.accumulate,
        clip=settings.clip,
        ema=Ema(network.module, settings.ema) if settings.ema is not None else None,
        frozen_epochs=frozen if settings.freeze_encoder else 0,
        validate_every=recipe.evaluate.every,
        compile=settings.compile,
        limit_seconds=settings.minutes * 60 if settings.minutes is not None else None,
        world=world,
    )
    return Job(recipe, train, val, network, placement, loss, training)


def _memory_bytes() -> int:
    """The machine's memory, or the container's where that has less; 4 GiB where it cannot be asked."""
    try:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return 4 << 30
    for limit in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        with contextlib.suppress(OSError, ValueError):  # no container, or no limit ("max")
            total = min(total, int(Path(limit).read_text()))
    return total
