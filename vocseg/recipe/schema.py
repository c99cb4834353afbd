"""What a recipe may hold: its tables and their keys, and how a component's parameters join them.

Every table that names a component has `name`, the core's keys below, and the component's own parameters.
Parameters that are left out here (learning rate, crop size, …) are the components': see `vocseg list NAME`.
"""

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, create_model

from vocseg.errors import Problem, UsageError, one_line, shown_path
from vocseg.recipe.describe import split_doc
from vocseg.registry import Component

WEIGHTS = ("none", "imagenet", "published")
"""What `model.weights` may be besides a file."""

CACHES = ("auto", "off")
"""What `data.cache` may be besides a folder."""

Metric = Literal["train_loss", "val_loss", "miou", "pixel_accuracy"]


class Table(BaseModel):
    # Most of the models below are only the base of another. Built when they are wanted, they cost 20 ms less.
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False, defer_build=True)


class Named(Table):
    name: Annotated[str, Field(min_length=1, description="the component's name, as `vocseg list` shows it")]


class Model(Named):
    """The network: an architecture and its weights to start from."""

    weights: Annotated[
        str,
        Field(
            description='weights to start from: "none", "imagenet" (the encoder\'s published ones), "published" (the '
            "whole network's), or a .safetensors or .pth file of either"
        ),
    ] = "none"


class Data(Named):
    """The data set, its splits, and how images become batches."""

    root: Annotated[str, Field(description="folder of the data; --data and VOCSEG_DATA come before it")] = "data"
    train: Annotated[str, Field(description="split to train on")] = "train"
    val: Annotated[str, Field(description="split to score on")] = "val"
    batch_size: Annotated[
        Annotated[int, Field(ge=1)] | Literal["auto"],
        Field(description="images a training step; auto: a power of two, the largest that fits where the run begins"),
    ] = 8
    repeat: Annotated[int, Field(ge=1, description="how often an epoch shows each image")] = 1
    normalize: Annotated[
        Literal["auto", "imagenet", "half", "none", "bgr_mean"],
        Field(
            description="mean and deviation taken off the image; auto: what the encoder was pretrained with; "
            "bgr_mean: Caffe's, channels as BGR in 0…255 less their mean"
        ),
    ] = "auto"
    workers: Annotated[int, Field(ge=0, le=64, description="threads that prepare batches; 0: one a core")] = 0
    augment_on: Annotated[
        Literal["cpu", "device"],
        Field(description="device: a GPU computes the images of a batch at once, for when the CPU cannot keep it busy"),
    ] = "cpu"
    cache: Annotated[
        Literal["auto", "off"] | Annotated[str, Field(pattern=r"[/\\]|^[~.]", title="a folder written with a /")],
        Field(
            description="where decoded images are kept. auto: in memory where they fit, else in the user's cache "
            "folder where the disk has room; or a folder"
        ),
    ] = "auto"
    on_bad_image: Annotated[
        Literal["stop", "skip"],
        Field(description="skip: all images are read before the run begins, and those that cannot be are left out"),
    ] = "stop"
    timeout_seconds: Annotated[
        float, Field(ge=0, description="longest that reading and augmenting one image may take; 0: for ever")
    ] = 300.0


class Augmentation(Named):
    """One step from a training image to a training sample; the steps run in the order they are written."""


class Loss(Named):
    """One term of the loss."""

    weight: Annotated[float, Field(gt=0, description="factor on this term")] = 1.0


class Optimizer(Named):
    """What changes the weights."""

    encoder_lr: Annotated[float, Field(gt=0, le=1, description="factor on the encoder's learning rate")] = 1.0


class Schedule(Named):
    """How the learning rate changes, step by step."""

    warmup_epochs: Annotated[float, Field(ge=0, description="linear warm-up before the schedule")] = 0.0


class Initializer(Named):
    """How layers without pretrained weights start."""


class Train(Table):
    """The training loop."""

    epochs: Annotated[int, Field(ge=1)]
    minutes: Annotated[float | None, Field(gt=0, description="stop after this long, whatever the epoch")] = None
    precision: Annotated[
        Literal["auto", "fp32", "bf16"], Field(description="auto: bf16 where the device is fast at it")
    ] = "auto"
    channels_last: Annotated[bool, Field(description="lay images out by pixel, which is faster; never on MPS")] = True
    compile: Annotated[bool, Field(description="torch.compile the network")] = False
    accumulate: Annotated[int, Field(ge=1, description="batches whose gradients make one step")] = 1
    clip: Annotated[float | None, Field(gt=0, description="largest norm of the gradient")] = None
    on_nonfinite: Annotated[
        Literal["stop", "skip"],
        Field(
            description="where a loss or gradient is not finite. stop: the run ends; skip: the step is left out, which "
            "a GPU is waited for at each step to see"
        ),
    ] = "stop"
    ema: Annotated[
        float | None, Field(ge=0, lt=1, description="decay of an average of the weights, which is then what is scored")
    ] = None
    sync_batch_norm: Annotated[
        bool, Field(description="under torchrun: batch norms see the whole batch, not a process's share of it")
    ] = False
    freeze_encoder: Annotated[bool, Field(description="train the decoder alone; batch norms stay as they are")] = False
    unfreeze_after: Annotated[int | None, Field(ge=1, description="epochs after which the encoder trains too")] = None
    checkpoint_minutes: Annotated[
        float, Field(ge=0, description="least time between two saves of the state to resume from")
    ] = 1.0


class EarlyStopping(Table):
    """When to stop before the last epoch."""

    metric: Metric = "miou"
    mode: Annotated[Literal["auto", "min", "max"], Field(description="auto: min for losses, else max")] = "auto"
    patience: Annotated[int, Field(ge=1, description="values without a better one")] = 5


class Evaluate(Table):
    """How and how often the validation split is scored."""

    every: Annotated[int, Field(ge=1, description="epochs from one validation to the next; the last is always one")] = 1
    metric: Annotated[
        Literal["miou", "pixel_accuracy", "val_loss", "last"],
        Field(description="which weights are kept: the best by this metric, or those of the last epoch"),
    ] = "miou"
    scales: Annotated[
        tuple[Annotated[float, Field(ge=0.1, le=4)], ...],
        Field(min_length=1, description="sizes at which an image is looked at; the probabilities are averaged"),
    ] = (1.0,)
    flip: Annotated[bool, Field(description="look at the mirrored image too")] = False
    window: Annotated[
        int | None,
        Field(ge=32, description="side in pixels of the windows to look through; whole images if left out"),
    ] = None
    overlap: Annotated[
        float, Field(ge=0, le=0.9, description="share of a window's side that it has in common with the next")
    ] = 0.5


@dataclass(frozen=True)
class Place:
    """A recipe table that names a component."""

    table: str
    kind: str
    core: type[Named]
    many: bool = False
    default: str | None = None  # the component when the recipe leaves the table out; None: it must be there

    @property
    def header(self) -> str:
        return f"[[{self.table}]]" if self.many else f"[{self.table}]"


PLACES = (
    Place("model", "architecture", Model),
    Place("data", "dataset", Data),
    Place("augmentation", "augmentation", Augmentation, many=True, default=""),
    Place("loss", "loss", Loss, many=True, default="cross_entropy"),
    Place("optimizer", "optimizer", Optimizer, default="adamw"),
    Place("schedule", "schedule", Schedule, default="constant"),
    Place("initializer", "initializer", Initializer, default="none"),
)


class Top(Table):
    """The keys that stand before any table."""

    description: Annotated[str, Field(description="what the experiment is, in a sentence or more")] = ""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0


class Plain(Top):
    """What a recipe holds besides the tables that name components."""

    train: Train
    evaluate: Evaluate = Evaluate()
    early_stopping: EarlyStopping | None = None


TABLES: dict[str, type[Table]] = {"train": Train, "evaluate": Evaluate, "early_stopping": EarlyStopping}


def table_model(place: Place, component: Component) -> type[Named]:
    """The pydantic model of a table that names this component: the core's keys and its own parameters.

    A parameter is the field `parameter_<name>` with its name as alias, so that none clashes with pydantic's own.

    Raises:
        UsageError: pydantic cannot check one of the parameters' types.
    """
    said = split_doc(component.doc)[1]
    fields: Any = {
        f"parameter_{p.name}": (p.annotation, Field(p.default, alias=p.name, description=said.get(p.name)))
        for p in component.parameters
    }
    try:
        name = f"{place.table}_{component.name}"
        model = create_model(name, __base__=place.core, __doc__=component.summary, **fields)
        model.model_rebuild()  # now, so that what is wrong with a parameter's type is said here
    except Exception as error:
        reason = one_line(error, None)
        raise UsageError(
            Problem(
                shown_path(component.source),
                f"the parameters of {place.kind} '{component.name}' cannot be checked: {reason}",
            )
        ) from error
    return model
