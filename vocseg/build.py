"""From a recipe to objects: data sets, network, loss, optimizer and schedule, ready to train or to score.

With the modules beside it that compose too (`run.py`, `score.py`, `trial.py`, `lr.py`), the run folder and the command
line, the only code that sees a recipe.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from vocseg.components.initializers import initialize
from vocseg.components.losses import weighted_sum
from vocseg.components.schedules import with_warmup
from vocseg.data.bad_images import Bad, find_bad, without
from vocseg.data.cache import IN_MEMORY, cached, memory_bytes
from vocseg.data.dataset import Dataset
from vocseg.data.loader import TrainingBatches
from vocseg.data.published import imagenet_weights, normalization, published_weights
from vocseg.data.stats import class_pixels
from vocseg.data.weights import Filled, load_weights
from vocseg.device import Placement, choose_device, choose_precision
from vocseg.distributed import ALONE, World
from vocseg.errors import DataError, IncompleteError, Problem, UsageError
from vocseg.evaluate.faster import InferenceCopy, Say, silent
from vocseg.evaluate.inference import Looks, Predictor
from vocseg.evaluate.validation import read_ahead
from vocseg.network import Normalization, backbone_of, choose_normalization, parameter_groups, stride_of
from vocseg.plugins import discover
from vocseg.recipe.prepare import load_recipe, with_setting
from vocseg.recipe.reader import Recipe
from vocseg.train.batch_size import Trial, most_images
from vocseg.train.ema import Ema
from vocseg.train.loop import Training, steps_per_epoch
from vocseg.train.precision import try_bf16
from vocseg.train.sync_batch_norm import synchronise

Loss = Callable[[Tensor, Tensor], Tensor]

TRIAL_IMAGES = 4  # in a trial of bf16: eight say the same in twice the time


def open_split(recipe: Recipe, split: str, *, incomplete: bool = False) -> Dataset:
    """Opens one split of the recipe's data set.

    Args:
        incomplete: files may be missing, as far as the data set can be opened without them.

    Raises:
        DataError: the data is not there, or the split is empty.
    """
    part = recipe.data
    try:
        dataset = part.build({"root": Path(part.settings.root), "split": split})
    except IncompleteError as error:
        if not incomplete:
            raise
        dataset = error.rest
    if not isinstance(dataset, Dataset):
        raise UsageError(
            Problem(part.component.source, f"data set '{part.name}' returned {type(dataset).__name__}, not a Dataset")
        )
    if not len(dataset):
        raise DataError(Problem(f"data.{part.name}", f"the split '{split}' holds no image"))
    return replace(dataset, timeout=part.settings.timeout_seconds)


def open_readable(
    recipe: Recipe, split: str, *, cache: str = "off", known: Bad | None = None, world: World = ALONE
) -> tuple[Dataset, Bad, str]:
    """A split without the images that cannot be read, where the recipe says that these are to be left out.

    Args:
        cache: where decoded images are kept, as `data.cache`.
        known: what was found to be bad before; None to read all images.

    Returns:
        The rest of it, what was left out, and a note where decoded images are kept.

    Raises:
        DataError: nothing is left; or else whatever `open_split` raises.
    """
    skip = recipe.data.settings.on_bad_image == "skip"
    dataset, kept = cached(open_split(recipe, split, incomplete=skip), cache, reader=_reader(recipe))
    if not skip:
        return dataset, {}, kept
    bad = find_bad(dataset, world) if known is None else known
    return without(dataset, bad), bad, kept


def open_datasets(
    target: str,
    *,
    data: Path | None = None,
    overrides: Sequence[str] = (),
    plugins: Path | None = None,
    splits: Sequence[str] | None = None,
    incomplete: bool = False,
) -> dict[str, Dataset]:
    """The splits of a data set, named by a recipe or as `voc2007` … `voc2012`; `incomplete` as in `open_split`.

    Else, where a recipe says so, they are without the images that cannot be read.
    """
    if target.startswith("voc") and target[3:].isdigit():
        voc = discover().get("dataset", "voc")
        root = data or Path(os.environ.get("VOCSEG_DATA") or "data")
        year = int(target[3:])
        found = {}
        for split in splits or ("train", "val"):
            try:
                found[split] = voc.build({"root": root, "split": split}, {"year": year})
            except IncompleteError as error:
                if not incomplete:
                    raise
                found[split] = error.rest
        return found
    recipe, _ = load_recipe(target, overrides=overrides, data=data, plugins=plugins)
    wanted = splits or (recipe.data.settings.train, recipe.data.settings.val)
    if incomplete:
        return {split: open_split(recipe, split, incomplete=True) for split in wanted}
    return {split: open_readable(recipe, split)[0] for split in wanted}


@dataclass(frozen=True)
class Network:
    """A built network, its pretrained part, what its images must look like, and how it is shown them."""

    module: nn.Module
    backbone: nn.Module | None
    stride: int
    normalization: Normalization
    looks: Looks
    filled: Filled | None = None  # what `model.weights` was loaded into

    def predictor(
        self, placement: Placement, module: nn.Module | None = None, *, compiled: bool = False, say: Say = silent
    ) -> Predictor:
        """What segments images with the weights of now, of this network or of another module like it."""
        network, placement = module or self.module, placement.for_inference()
        if compiled or placement.precision == "bf16":
            network = InferenceCopy(network, compiled=compiled, say=say)
        return Predictor(network, placement, self.stride, self.normalization.to(placement.device), self.looks)


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
    module = recipe.model.build({"num_classes": num_classes})
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
    fill = recipe.initializer.build({})
    initialize(module, fill, backbone if weights != "none" else None)
    filled = _fill_from(weights, recipe, module, backbone, num_classes) if weights != "none" else None
    pretrained_with = normalization(module if backbone is None or settings.weights == "published" else backbone)
    try:
        stride = stride_of(module)
    except (TypeError, ValueError):
        stride = 0
    if stride < 1:
        message = f"architecture '{component.name}' has the stride {module.stride!r}; expected a whole number, which "
        raise UsageError(Problem(component.source, f"{message}the sides of an image are to be a multiple of"))
    scored = recipe.evaluate
    return Network(
        module,
        backbone,
        stride,
        choose_normalization(recipe.data.settings.normalize, pretrained_with),
        Looks(scored.scales, scored.flip, scored.window, scored.overlap),
        filled,
    )


def _fill_from(weights: str, recipe: Recipe, module: nn.Module, backbone: nn.Module | None, num_classes: int) -> Filled:
    """Loads published weights, or a file of the whole network or of its encoder."""

    def other_classes() -> dict[str, torch.Size]:
        with torch.random.fork_rng(devices=[]):
            other = recipe.model.build({"num_classes": num_classes + 1})
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
    return weighted_sum([(part.settings.weight, part.build(available)) for part in recipe.losses], num_classes)


def build_optimizer(recipe: Recipe, network: Network) -> torch.optim.Optimizer:
    """The recipe's optimizer over a network that is where it will train; the encoder has its own learning rate."""
    part = recipe.optimizer
    optimizer = part.build({"params": parameter_groups(network.module, network.backbone)})
    if not isinstance(optimizer, torch.optim.Optimizer):
        found = type(optimizer).__name__
        raise UsageError(Problem(part.component.source, f"optimizer '{part.name}' returned {found}, not an Optimizer"))
    for group in optimizer.param_groups:
        if group.get("name") == "encoder":
            group["lr"] *= part.settings.encoder_lr
    return optimizer


def choose_placement(recipe: Recipe, device: str, precision: str | None = None) -> Placement:
    """Where the recipe's network runs, in the precision given or, without one, in the one that suits the device."""
    chosen = choose_device(device)
    # Batch norm's backward pass fails on channels_last images on MPS (pytorch/pytorch#188371).
    channels_last = recipe.train.channels_last and chosen.type != "mps"
    return Placement(chosen, precision or choose_precision(recipe.train.precision, chosen), channels_last)


@dataclass(frozen=True)
class Job:
    """Everything a recipe stands for, built and on its device.

    Attributes:
        notes: what the user should know of it before it runs.
        left_out: by split, the images that cannot be read; none where `data.on_bad_image` is not "skip".
    """

    recipe: Recipe
    train: Dataset
    val: Dataset
    network: Network
    placement: Placement
    loss: Loss
    training: Training
    notes: tuple[str, ...] = ()
    left_out: Mapping[str, Bad] = field(default_factory=dict)

    def predictor(self, module: nn.Module) -> Predictor:
        return self.network.predictor(self.placement, module)


def build(
    recipe: Recipe,
    device: str = "auto",
    *,
    pretrained: bool = True,
    precision: str | None = None,
    left_out: Mapping[str, Bad] | None = None,
    world: World = ALONE,
) -> Job:
    """Builds all of a recipe.

    Args:
        precision: what the run began with; None does what the recipe says, which may be to try both.
        left_out: what the run began without; None to find what cannot be read, where it is to be left out.
        world: the processes that train together, each of which builds it.

    Raises:
        VocsegError: whatever a user can mend, before anything is trained.
    """
    placement = choose_placement(recipe, device, precision)
    data, settings = recipe.data.settings, recipe.train
    opened = {
        split: open_readable(
            recipe, split, cache=data.cache, known=None if left_out is None else left_out.get(split, {}), world=world
        )
        for split in dict.fromkeys((data.train, data.val))
    }
    (train, _, kept), (val, _, val_kept) = opened[data.train], opened[data.val]
    if train.classes != val.classes:
        raise DataError(f"data: the splits '{data.train}' and '{data.val}' have different classes")
    network = build_network(recipe, len(train.classes), pretrained=pretrained)
    loss = build_loss(recipe, len(train.classes), lambda: train)
    batches_of = partial(
        TrainingBatches,
        train,
        [part.build({}) for part in recipe.augmentations],
        augmentation_names=[part.name for part in recipe.augmentations],
        seed=recipe.seed,
        repeat=data.repeat,
        workers=data.workers,
        fill=network.normalization.fill,
        rank=world.rank,
        size=world.size,
        pin=placement.device.type == "cuda",
        render=data.augment_on == "cpu",
    )
    placement.place(network.module)
    notes = tuple(dict.fromkeys(note for note in (kept, val_kept) if not note.startswith(IN_MEMORY)))
    bad = {split: found for split, (_, found, _) in opened.items() if found}
    notes += tuple(
        f"{len(found)} of {len(found) + len(opened[split][0])} images of '{split}' cannot be read, and are left out"
        for split, found in bad.items()
    )
    batch_size = data.batch_size
    if batch_size == "auto":
        batch_size, note = _find_batch_size(recipe, network, batches_of(batch_size=world.size), loss, placement, world)
        recipe, notes = with_setting(recipe, "data", "batch_size", batch_size), (*notes, note)
    batches = batches_of(batch_size=batch_size)
    to_choose = precision is None and settings.precision == "auto" and placement.device.type == "cpu"
    if to_choose and placement.precision == "bf16":
        said = _try_bf16(recipe, network, batches, val, loss, placement) if world.first else ("", "")
        chosen, note = (world.text_of_first(text) for text in said)
        placement, notes = replace(placement, precision=chosen), (*notes, note)
    if settings.sync_batch_norm and world.size > 1:
        synchronise(network.module)
    optimizer = build_optimizer(recipe, network)
    lr = float(optimizer.param_groups[0]["lr"])
    per_epoch = steps_per_epoch(len(batches), settings.accumulate)
    steps = settings.epochs * per_epoch
    warmup = round(recipe.schedule.settings.warmup_epochs * per_epoch)
    schedule = recipe.schedule.build({"steps": steps - warmup, "steps_per_epoch": per_epoch, "lr": lr})
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
        skip_nonfinite=settings.on_nonfinite == "skip",
        limit_seconds=settings.minutes * 60 if settings.minutes is not None else None,
        world=world,
    )
    return Job(recipe, train, val, network, placement, loss, training, notes, bad)


def _reader(recipe: Recipe) -> str:
    """What decides about pixels besides their files: nothing for vocseg's own data sets, which read them alike."""
    component = recipe.data.component
    if component.origin == "vocseg":
        return ""
    return f"{component.file} {os.stat(component.file).st_mtime_ns} {recipe.data.params}"


def _find_batch_size(
    recipe: Recipe, network: Network, batches: TrainingBatches, loss: Loss, placement: Placement, world: World
) -> tuple[int, str]:
    """The batch size of all processes together, the same for each of them, and what limits it."""
    image, mask = (torch.tensor(array) for array in batches.first_sample())
    settings = recipe.train
    trial = Trial(
        network=network.module,
        backbone=network.backbone,
        loss=loss,
        sample=(image, mask),
        optimizer=lambda module, backbone: build_optimizer(recipe, replace(network, module=module, backbone=backbone)),
        placement=placement,
        stride=network.stride,
        normalization=network.normalization.to(placement.device),
        average=settings.ema is not None,
        frozen=settings.freeze_encoder and settings.unfreeze_after is None,
    )
    positions = len(batches) * batches.batch_size
    most, why = most_images(positions, settings.accumulate, world.size, placement.device)
    size, limit = trial.largest(most, why, memory_bytes() // int(os.environ.get("LOCAL_WORLD_SIZE") or 1))
    size = -int(world.largest(-size)[0])  # what fits the process that has the least room
    each = f", {size} in each of {world.size} processes" if world.size > 1 else ""
    return size * world.size, f"batch size {size * world.size}{each}: {limit}"


def _try_bf16(
    recipe: Recipe, network: Network, batches: TrainingBatches, val: Dataset, loss: Loss, placement: Placement
) -> tuple[str, str]:
    """The precision that the network is faster in, on a batch and on a whole image, and what was measured."""
    image, mask = (torch.tensor(array) for array in batches.first_sample())
    size = min(batches.batch_size, TRIAL_IMAGES)
    settings = recipe.train
    whole, _ = next(read_ahead(val, [0]))

    def infer(module: nn.Module, precision: str) -> Callable[[], object]:
        return partial(network.predictor(replace(placement, precision=precision), module).look, whole)

    return try_bf16(
        network.module,
        network.backbone,
        loss,
        (image.expand(size, *image.shape), mask.expand(size, *mask.shape)),
        placement=placement,
        stride=network.stride,
        normalization=network.normalization,
        frozen=settings.freeze_encoder and settings.unfreeze_after is None,
        infer=infer,
    )
