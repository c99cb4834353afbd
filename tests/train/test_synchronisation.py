"""Nothing in a step makes the host wait for the device.

Where there is no GPU that is seen in two ways. On the CPU a step is refused every operation that on a GPU would have to
know what the device has computed. And on torch's `meta` device, whose tensors have a shape and no values, whoever asks
for a value fails; there nothing takes a shortcut that is for CPUs alone, and a tensor that was left on the CPU is found
out. `tests/gpu` asks CUDA itself.
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from vocseg.build import Job, build
from vocseg.device import Placement
from vocseg.evaluate.inference import Looks, Predictor
from vocseg.evaluate.validation import Scored, evaluate
from vocseg.plugins import discover
from vocseg.recipe.prepare import load_recipe
from vocseg.train.ema import Ema
from vocseg.train.loop import Step, Training, combined_loss, train

META = torch.device("meta")
# Each of these has to know values before it can say how large its result is, or gives them to the host.
WAITING = {
    "_local_scalar_dense", "is_nonzero", "equal", "nonzero", "nonzero_numpy", "argwhere", "masked_select", "_unique2",
    "unique_dim", "unique_consecutive", "bincount", "repeat_interleave", "histc", "nanmedian", "quantile",
}  # fmt: skip
INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index", "_unsafe_index_put"}
COPYING = {"_to_copy", "copy_", "copy"}


class Waits(Exception):  # noqa: N818 - what it says of the operation
    """An operation that makes the host wait for a GPU."""


class NothingWaits(TorchDispatchMode):
    """Refuses, while it is entered, what makes the host wait for a GPU."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        if name in WAITING:
            raise Waits(str(func))
        if name in INDEXING and any(
            index is not None and index.dtype in (torch.bool, torch.uint8) for index in tree_leaves(args[1])
        ):
            raise Waits(f"{func} with a mask")
        found = func(*args, **kwargs)
        if name in COPYING and isinstance(found, Tensor):
            devices = {thing.device for thing in (*tree_leaves(args), found) if isinstance(thing, Tensor)}
            non_blocking = kwargs.get("non_blocking", len(args) > 2 and args[2])
            if len(devices) > 1 and not non_blocking:
                raise Waits(f"{func} between {devices}")
        return found


@pytest.mark.parametrize(
    "operation",
    [
        lambda x: float(x.sum()),
        lambda x: bool((x > 0).all()),
        lambda x: x[x > 0],
        lambda x: x[:, (x > 0).any(0)],
        lambda x: x.index_put_((x > 0,), torch.ones(())),
        lambda x: x.masked_select(x > 0),
        lambda x: (x > 0).nonzero(),
        lambda x: x.unique(),
        lambda x: x.long().flatten().bincount(),
        lambda x: torch.equal(x, x + 1),
        lambda x: x.flatten().repeat_interleave(x.flatten().long()),
    ],
)
def test_what_makes_the_host_wait_is_refused(operation: Callable) -> None:
    operation(torch.ones(2, 3))
    with NothingWaits(), pytest.raises(Waits):
        operation(torch.ones(2, 3))


@pytest.mark.parametrize(
    "operation", [lambda x: x.cpu(), lambda x: x + torch.ones(3), lambda x: x.copy_(torch.ones(3))]
)
def test_tensors_that_are_not_on_the_device_are_refused(operation: Callable) -> None:
    with NothingWaits(), pytest.raises((Waits, RuntimeError, NotImplementedError)):
        operation(torch.ones(3, device=META))


@dataclass(frozen=True)
class Somewhere(Placement):
    """The meta device in a GPU's place, where it lacks what a GPU has."""

    def autocast(self) -> contextlib.AbstractContextManager:
        return contextlib.nullcontext()

    def send(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.device, non_blocking=True)


RECIPE = """
[model]
name = "mini_unet"
width = 4
[data]
name = "synthetic"
size = 32
images = 12
val_images = 3
batch_size = 2
normalize = "{normalize}"
augment_on = "{augment_on}"
[[augmentation]]
name = "crop"
size = 28
[[augmentation]]
name = "rotation"
[[augmentation]]
name = "color_jitter"
[[loss]]
name = "cross_entropy"
class_weights = "inverse"
label_smoothing = 0.1
[[loss]]
name = "{loss}"
[optimizer]
name = "{optimizer}"
[schedule]
name = "poly"
[train]
epochs = 1
precision = "{precision}"
accumulate = 2
clip = 1.0
ema = 0.9
"""


def names(kind: str) -> list[str]:
    found = [c.name for c in discover() if c.kind == kind and c.origin == "vocseg"]
    assert len(found) >= 3
    return found


def job(folder: Path, **changed: str) -> Job:
    settings = {"loss": "dice", "optimizer": "adamw", "precision": "fp32", "normalize": "imagenet", "augment_on": "cpu"}
    settings |= changed
    path = folder / "step.toml"
    path.write_text(RECIPE.format(**settings))
    return build(load_recipe(str(path))[0], "cpu")


def steps(training: Training) -> Iterator[Step]:
    """Two steps of an epoch of three, in which nothing waits."""

    def never(network: nn.Module) -> Any:
        raise AssertionError("the epoch was not to end")

    events = train(training, never)
    with contextlib.closing(events), NothingWaits():
        for _ in range(2):
            event = next(events)
            assert isinstance(event, Step)
            yield event


def on_meta(training: Training) -> Training:
    """The same with all its tensors on the meta device."""
    network = training.network.to(META)
    training.placement = Somewhere(META, "fp32")
    training.normalization = training.normalization.to(META)
    training.optimizer = torch.optim.SGD(network.parameters(), lr=1e-3)  # Adam's, unless fused, counts on the CPU
    training.base_lrs = [1e-3]
    training.ema = Ema(network, 0.9)
    training.loss_sum = torch.zeros((), device=META)
    return training


@pytest.mark.parametrize(
    ("optimizer", "precision"), [*((name, "fp32") for name in names("optimizer")), ("adamw", "bf16")]
)
def test_no_optimizer_waits_within_a_step(tmp_path: Path, optimizer: str, precision: str) -> None:
    training = job(tmp_path, optimizer=optimizer, precision=precision).training
    before = training.network.state_dict()["classify.weight"].clone()
    assert [step.step for step in steps(training)] == [1, 2]
    assert not torch.equal(training.network.state_dict()["classify.weight"], before)


@pytest.mark.parametrize(
    "changed",
    [*({"loss": name} for name in names("loss")), {"normalize": "bgr_mean"}, {"augment_on": "device"}],
    ids=str,
)
def test_no_step_asks_for_values_or_leaves_the_device(tmp_path: Path, changed: dict[str, str]) -> None:
    training = on_meta(job(tmp_path, **changed).training)
    taken = list(steps(training))
    assert [step.loss.device for step in taken] == [META, META]
    assert training.loss_sum.device == META


@pytest.mark.parametrize("loss", names("loss"))
def test_auxiliary_logits_make_nothing_wait(loss: str) -> None:
    function = discover().get("loss", loss).build({"num_classes": 4, "class_pixels": lambda: torch.ones(4)}, {})
    named = {name: torch.zeros(2, 4, 6, 6, device=META, requires_grad=True) for name in ("out", "aux")}
    with NothingWaits():
        combined_loss(function, named, torch.zeros(2, 6, 6, dtype=torch.long, device=META)).backward()
    assert all(logits.grad is not None for logits in named.values())


@pytest.mark.parametrize(
    "looks", [Looks(), Looks(scales=(0.5, 1.0), flip=True), Looks(window=32)], ids=["once", "scales", "windows"]
)
def test_a_validation_waits_for_the_device_at_its_end_only(tmp_path: Path, looks: Looks) -> None:
    parts = job(tmp_path)
    training = on_meta(parts.training)
    predictor = Predictor(training.network, training.placement, training.stride, training.normalization, looks)
    events = evaluate(predictor, parts.val, parts.loss)
    with NothingWaits():
        assert [next(events) for _ in range(3)] == [Scored(1, 3), Scored(2, 3), Scored(3, 3)]
        with pytest.raises((Waits, NotImplementedError)):  # for there is nothing to be read on this device
            next(events)


def test_a_loss_of_a_plugin_that_waits_is_found(tmp_path: Path) -> None:
    training = on_meta(job(tmp_path).training)
    training.loss = lambda logits, target: logits.permute(0, 2, 3, 1)[target != 255].mean()
    with pytest.raises(Waits, match="with a mask"):
        list(steps(training))
