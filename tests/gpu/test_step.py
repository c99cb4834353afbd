"""A step on a GPU: nothing waits for it, and it does what a step on the CPU does."""

import contextlib
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from vocseg.build import Job, build
from vocseg.cli.reporters import _Loss
from vocseg.device import Placement
from vocseg.evaluate.confusion import class_map, count_pixels
from vocseg.evaluate.validation import evaluate
from vocseg.plugins import discover
from vocseg.recipe.prepare import load_recipe
from vocseg.train.feed import on_device
from vocseg.train.loop import Step, train

if not torch.cuda.is_available():
    pytest.skip("no CUDA device", allow_module_level=True)

CUDA = torch.device("cuda")
RECIPE = """
[model]
name = "mini_unet"
width = 4
[data]
name = "synthetic"
size = 48
images = 24
val_images = 4
batch_size = 2
augment_on = "{augment_on}"
[[augmentation]]
name = "crop"
size = 40
[[augmentation]]
name = "rotation"
[[augmentation]]
name = "color_jitter"
[[loss]]
name = "{loss}"
[[loss]]
name = "cross_entropy"
class_weights = "inverse"
label_smoothing = 0.1
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
    return [c.name for c in discover() if c.kind == kind and c.origin == "vocseg"]


def job(folder: Path, device: str = "cuda", **changed: str) -> Job:
    settings = {"loss": "dice", "optimizer": "adamw", "precision": "bf16", "augment_on": "cpu"} | changed
    path = folder / "step.toml"
    path.write_text(RECIPE.format(**settings))
    return build(load_recipe(str(path))[0], device)


@contextlib.contextmanager
def waiting_is_an_error() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # torch says that it does not see everything that waits
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def never(network: nn.Module) -> Any:
    raise AssertionError("the epoch was not to end")


def test_torch_notices_what_waits() -> None:
    value = torch.ones(3, device=CUDA)
    with waiting_is_an_error(), pytest.raises(RuntimeError, match="synchroniz"):
        value.sum().item()


@pytest.mark.parametrize(
    "changed",
    [
        *({"loss": name} for name in names("loss")),
        *({"optimizer": name} for name in names("optimizer")),
        {"precision": "fp32"},
        {"augment_on": "device"},
    ],
    ids=str,
)
def test_no_step_makes_the_host_wait(tmp_path: Path, changed: dict[str, str]) -> None:
    training = job(tmp_path, **changed).training
    with contextlib.closing(train(training, never)) as events:
        next(events)  # what is done once, such as trying kernels, may
        with waiting_is_an_error():
            steps = [next(events) for _ in range(3)]
    assert all(isinstance(step, Step) and step.loss.is_cuda for step in steps)
    assert all(step.loss.isfinite() for step in steps if isinstance(step, Step))


def test_scoring_an_image_does_not_make_the_host_wait(tmp_path: Path) -> None:
    parts = job(tmp_path)
    events = evaluate(parts.predictor(parts.network.module), parts.val, parts.loss)
    next(events)
    with waiting_is_an_error():
        assert [next(events).done for _ in range(3)] == [2, 3, 4]


def test_a_reported_loss_is_that_of_the_report_before_and_only_that_is_waited_for() -> None:
    def step(value: float) -> Step:
        return Step(0, 1, torch.full((), value, device=CUDA), 0.1, 1)

    loss = _Loss()
    assert [loss.read(step(value)) for value in (3.0, 2.0, 1.0)] == [3.0, 3.0, 2.0]
    first = step(5.0)
    loss.read(first)
    torch.cuda.synchronize()
    torch.cuda._sleep(2_000_000_000)  # about a second of work
    busy = torch.cuda.current_stream().record_event()
    assert loss.read(step(4.0)) == 5.0
    assert not busy.query()


def test_batches_arrive_as_they_were_sent_while_earlier_ones_are_in_use() -> None:
    generator = torch.Generator().manual_seed(0)
    batches = [
        tuple(torch.randint(256, (4, 64, 64), dtype=torch.uint8, generator=generator).pin_memory() for _ in range(2))
        for _ in range(30)
    ]
    found = []
    for images, labels in on_device(iter(batches), Placement(CUDA, "fp32")):  # type: ignore[arg-type]
        torch.cuda._sleep(5_000_000)  # longer than copying takes: the next ones overtake what is computed here
        found.append((images.clone(), labels.clone()))
        del images, labels  # so that their memory would be given away, were it not marked as in use
    for batch, arrived in zip(batches, found, strict=True):
        assert all(torch.equal(sent, there.cpu()) for sent, there in zip(batch, arrived, strict=True))


def test_the_loader_pins_its_batches(tmp_path: Path) -> None:
    for augment_on in ("cpu", "device"):
        with contextlib.closing(job(tmp_path, augment_on=augment_on).training.batches.epoch(0)) as batches:
            assert all(tensor.is_pinned() for tensor in next(batches) if tensor.numel())


def test_images_augmented_on_the_gpu_are_those_of_the_cpu(tmp_path: Path) -> None:
    def batches(device: str, augment_on: str) -> list[tuple[Tensor, Tensor]]:
        training = job(tmp_path, device, augment_on=augment_on).training
        sent = on_device(training.batches.epoch(0), training.placement)
        return [(images.cpu(), labels.cpu()) for images, labels in sent]

    for plain, *others in zip(batches("cpu", "cpu"), batches("cpu", "device"), batches("cuda", "device"), strict=True):
        for images, labels in others:
            assert torch.equal(plain[1], labels)
            assert ((plain[0].int() - images.int()).abs() <= 2).float().mean() > 0.99


def test_a_step_in_fp32_is_that_of_the_cpu(tmp_path: Path) -> None:
    losses = []
    for device in ("cpu", "cuda"):
        with contextlib.closing(train(job(tmp_path, device, precision="fp32").training, never)) as events:
            losses.append([float(event.loss) for event in (next(events) for _ in range(3)) if isinstance(event, Step)])
    # torch multiplies in TF32 within convolutions, which has ten bits of mantissa.
    assert losses[1] == pytest.approx(losses[0], rel=0.02)


@pytest.mark.parametrize("classes", [2, 21, 150])
def test_class_maps_and_counts_are_those_of_the_cpu_for_equal_logits(classes: int) -> None:
    generator = torch.Generator().manual_seed(classes)
    logits = torch.randn(1, classes, 31, 45, generator=generator)
    truth = torch.randint(classes, (1, 31, 45), generator=generator, dtype=torch.uint8)
    truth[torch.rand(truth.shape, generator=generator) < 0.2] = 255
    found = []
    for device in (torch.device("cpu"), CUDA):
        prediction = class_map(logits.to(device))
        found.append((prediction.cpu(), count_pixels(truth.to(device), prediction, classes).cpu()))
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])


def test_scores_of_a_network_are_nearly_those_of_the_cpu(tmp_path: Path) -> None:
    found = []
    for device in ("cpu", "cuda"):
        parts = job(tmp_path, device, precision="fp32")
        events = evaluate(parts.predictor(parts.network.module), parts.val, parts.loss)
        while True:
            try:
                next(events)
            except StopIteration as done:
                found.append(done.value)
                break
    cpu, gpu = found
    assert cpu.matrix.sum() == gpu.matrix.sum()
    assert abs(cpu.matrix - gpu.matrix).sum() <= 0.02 * cpu.matrix.sum()  # pixels whose classes TF32 makes equal
    assert gpu.loss == pytest.approx(cpu.loss, rel=0.02)


def test_kernels_are_tried_for_batches_and_not_where_results_must_repeat() -> None:
    placement = Placement(CUDA, "fp32")
    with placement.kernels_tried(True):
        assert torch.backends.cudnn.benchmark
    assert not torch.backends.cudnn.benchmark
    with placement.kernels_tried(False):
        assert not torch.backends.cudnn.benchmark
    torch.use_deterministic_algorithms(True)
    try:
        with placement.kernels_tried(True):
            assert not torch.backends.cudnn.benchmark
    finally:
        torch.use_deterministic_algorithms(False)
