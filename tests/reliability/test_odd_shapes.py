"""Odd images, masks and sizes through every component that is registered: what can be trained on is, without a NaN.

Components come from the registry, so that a new one is tried without a line here; `SMALL` only makes some of them
cheaper.
"""

import itertools
import json
import math
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from vocseg.components.losses import weighted_sum
from vocseg.components.schedules import with_warmup
from vocseg.data.dataset import VOID
from vocseg.data.render import stack_views
from vocseg.data.sample import Sample
from vocseg.errors import DataError, TrainingError, UsageError
from vocseg.network import backbone_of, outputs, parameter_groups, stride_of
from vocseg.plugins import discover
from vocseg.recipe.prepare import load_recipe
from vocseg.registry import Component
from vocseg.run import start
from vocseg.train.loop import combined_loss

CLASSES = 4
SMALL: dict[str, dict[str, Any]] = {
    "classifier_fpn": {"encoder": "resnet10t", "width": 32},
    "darrennet_transfer": {"encoder": "resnet10t", "extra_blocks": 0},
    "mini_unet": {"width": 4},
    "smp": {"encoder": "tu-mobilenetv3_small_050"},
    "torchvision": {"network": "lraspp_mobilenet_v3_large"},
    "transfer_fcn": {"encoder": "resnet10t"},
    "unet": {"width": 4},
}
ON_A_TRANSFORMER = {"decoder": "DPT", "encoder": "tu-vit_tiny_patch16_224", "decoder_channels": (16,)}
NEEDS_MORE_VALUES = "Expected more than 1 value per channel when training"


def components(kind: str) -> list[Component]:
    found = [component for component in discover() if component.kind == kind]
    assert len(found) > 2
    return found


def variants(component: Component) -> list[dict[str, Any]]:
    """Parameters of a component: the cheap ones, and each other value of those that have a list of values."""
    small = SMALL.get(component.name, {})
    found = [small]
    for parameter in component.parameters:
        choices = get_args(parameter.annotation) if get_origin(parameter.annotation) is Literal else ()
        if parameter.annotation is bool:
            choices = (True, False)
        found += [{**small, parameter.name: c} for c in choices if c != small.get(parameter.name, parameter.default)]
    return [ON_A_TRANSFORMER if params.get("decoder") == "DPT" else params for params in found]


# Masks


def void(h: int, w: int) -> Tensor:
    return torch.full((h, w), VOID)


def background(h: int, w: int) -> Tensor:
    return torch.zeros(h, w, dtype=torch.int64)


def one_pixel(h: int, w: int) -> Tensor:
    """All void but for one pixel of the last class."""
    mask = void(h, w)
    mask[h // 2, w // 2] = CLASSES - 1
    return mask


def mixed(h: int, w: int) -> Tensor:
    """Every class but the second, and void."""
    mask = torch.arange(h * w).reshape(h, w) % CLASSES
    return mask.where(mask != 1, VOID)


Case = tuple[tuple[int, int], tuple[Callable[[int, int], Tensor], ...]]
FEW: tuple[Case, ...] = (
    ((1, 1), (void,)),
    ((1, 33), (mixed, void)),
    ((33, 65), (one_pixel,)),
    ((65, 33), (background, mixed)),
)
SIZES = ((1, 1), (1, 2), (2, 1), (1, 33), (7, 5), (31, 33), (33, 65))
ALL: tuple[Case, ...] = tuple(
    (size, masks)
    for size in SIZES
    for masks in ((void,), (background,), (one_pixel,), (mixed,), (void, void), (mixed, void), (background, mixed))
)


def counts() -> Tensor:
    """The pixels of each class in the training masks; one has none."""
    return torch.tensor([900, 0, 30, 70])


def losses() -> dict[str, Callable[[Tensor, Tensor], Tensor]]:
    """Each loss with its defaults and with each other value of what it lets one choose."""
    available = {"num_classes": CLASSES, "class_pixels": counts}
    return {
        f"{component.name} {params}": component.build(available, params)
        for component in components("loss")
        for params in loss_variants(component)
    }


def loss_variants(component: Component) -> list[dict[str, Any]]:
    """Parameters of a loss: its own, each scheme of weights, and each number at one half, a power below 1 for one."""
    schemes = [{"class_weights": scheme} for scheme in ("inverse", "log", "median")]
    halves = [{p.name: 0.5} for p in component.parameters if isinstance(p.default, float)]
    return [{}, *(schemes if component.name == "cross_entropy" else []), *halves]


def finite(tensors: Iterable[Tensor]) -> bool:
    return all(bool(tensor.isfinite().all()) for tensor in tensors)


def trains(network: nn.Module, backbone: nn.Module | None, case: Case, loss: Callable, name: str) -> bool:
    """Makes one step, and holds that all is finite; False where batch norm found too little to train on."""
    size, makers = case
    target = torch.stack([make(*size) for make in makers])
    images = torch.randn(len(makers), 3, *size, generator=torch.Generator().manual_seed(0))
    optimizer = torch.optim.SGD(parameter_groups(network, backbone), lr=1e-3)
    network.train()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            named = outputs(network, images, stride_of(network))
        except ValueError as error:
            if NEEDS_MORE_VALUES in str(error) and len(makers) == 1:
                return False
            raise
        value = combined_loss(loss, named, target)
        value.backward()
    assert named["out"].shape == (len(makers), CLASSES, *size)
    assert value.isfinite(), (name, case)
    if bool((target == VOID).all()):
        assert value == 0, (name, case)
    assert finite(p.grad for p in network.parameters() if p.grad is not None), (name, case)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    assert finite([*network.parameters(), *network.buffers()]), (name, case)
    return True


def built(component: Component, params: dict[str, Any]) -> tuple[nn.Module, nn.Module | None]:
    torch.manual_seed(0)
    network = component.build({"num_classes": CLASSES}, params)
    return network, backbone_of(network, component.backbone)


def scores(network: nn.Module, sizes: tuple[tuple[int, int], ...]) -> None:
    """Logits of any size come back for a single image in eval mode."""
    network.eval()
    with torch.no_grad():
        for h, w in sizes:
            logits = outputs(network, torch.randn(1, 3, h, w), stride_of(network))["out"]
            assert logits.shape == (1, CLASSES, h, w)
            assert logits.isfinite().all()


def large(network: nn.Module) -> bool:
    return sum(p.numel() for p in network.parameters()) > 10_000_000


@pytest.mark.parametrize("component", components("architecture"), ids=lambda component: component.name)
def test_an_architecture_takes_a_step_on_any_size_and_mask(component: Component) -> None:
    network, backbone = built(component, SMALL.get(component.name, {}))
    turns = itertools.cycle(losses().items())
    for case in FEW[-1:] if large(network) else FEW:
        name, loss = next(turns)
        trained = trains(network, backbone, case, loss, f"{component.name}, {name}")
        assert trained or case[0] != (65, 33)  # two images of an odd size are enough for any
    scores(network, SIZES[:1] if large(network) else SIZES)


def _each_variant() -> Iterator[Any]:
    for component in components("architecture"):
        for i, params in enumerate(variants(component)):
            yield pytest.param(component, params, id=f"{component.name}-{i}")


@pytest.mark.long
@pytest.mark.parametrize(("component", "params"), [*_each_variant()])
def test_every_architecture_takes_a_step_with_every_loss_on_every_size_and_mask(
    component: Component, params: dict[str, Any]
) -> None:
    try:
        network, backbone = built(component, params)
    except UsageError:  # two values that do not go together, LR-ASPP and an auxiliary head, say
        if params == SMALL.get(component.name, {}):
            raise
        return
    every = losses()
    turns = itertools.cycle(every.items())
    for case in FEW if large(network) else ALL:
        trains(network, backbone, case, *next(turns)[::-1])
    for name, loss in every.items():
        trains(network, backbone, FEW[-1], loss, name)
    scores(network, SIZES)


# Losses by themselves


LOGITS: dict[str, Callable[[Tensor], Tensor]] = {
    "zeros": torch.zeros_like,
    "noise": lambda logits: logits,
    "sure": lambda logits: logits * 1e4,
    "very sure": lambda logits: logits.sign() * 1e30,
}


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_every_loss_is_finite_and_so_is_its_gradient_on_any_size_mask_and_logits(size: tuple[int, int]) -> None:
    for name, loss in losses().items():
        for makers in ((void,), (background,), (one_pixel,), (mixed, void)):
            target = torch.stack([make(*size) for make in makers])
            noise = torch.randn(len(makers), CLASSES, *size, generator=torch.Generator().manual_seed(1))
            for kind, change in LOGITS.items():
                logits = change(noise).clone().requires_grad_()
                value = loss(logits, target)
                value.backward()
                where = (name, kind, [make.__name__ for make in makers])
                assert value.isfinite(), where
                assert logits.grad is not None, where
                assert logits.grad.isfinite().all(), where
                assert not logits.grad[(target == VOID)[:, None].expand_as(logits)].any(), where


@pytest.mark.parametrize("found", [1, CLASSES - 1, CLASSES + 1])
def test_logits_of_another_number_of_classes_are_refused_with_a_remedy(found: int) -> None:
    for loss in losses().values():
        total = weighted_sum([(1.0, loss)], CLASSES)
        with pytest.raises(ValueError, match=f"expected logits of {CLASSES} classes, found {found}; the architecture"):
            total(torch.zeros(2, found, 3, 5), torch.stack([mixed(3, 5)] * 2))


# Augmentations


def augmentation_params(component: Component) -> dict[str, Any]:
    """What makes it act every time, on a small window."""
    wanted = {"size": (5, 3), "p": 1.0, "foreground": 1.0, "min_pixels": 1, "degrees": 90.0, "share": (0.01, 1.0)}
    wanted |= {"scale": (0.1, 2.0), "aspect": 4.0}
    return {p.name: wanted[p.name] for p in component.parameters if p.name in wanted}


def scene(h: int, w: int, make: Callable[[int, int], Tensor]) -> Sample:
    def sample() -> Sample:
        pixels = np.random.default_rng(h * 100 + w).integers(0, 256, (h, w, 3), dtype=np.uint8)
        return Sample(pixels, make(h, w).numpy().astype(np.uint8), draw_partner=lambda rng: sample())

    return sample()


SHAPES = ((1, 1), (1, 9), (9, 1), (6, 7), (33, 2))
MASKS = (void, background, one_pixel, mixed)


def holds(sample: Sample, labels: set[int], where: object) -> None:
    assert sample.image.dtype == sample.mask.dtype == np.uint8, where
    assert sample.image.shape == (*sample.size, 3), where
    assert sample.mask.shape == sample.size, where
    assert min(sample.size) >= 1, where
    assert set(np.unique(sample.mask).tolist()) <= {*labels, VOID}, where


def test_every_augmentation_keeps_its_word_on_any_size_and_mask() -> None:
    rng = np.random.default_rng(0)
    for component in components("augmentation"):
        augment = component.build({}, augmentation_params(component))
        for shape, make in itertools.product(SHAPES, MASKS):
            labels = set(make(*shape).unique().tolist())
            for _ in range(5):
                where = (component.name, shape, make.__name__)
                sample = scene(*shape, make)
                augment(sample, rng)
                rendered = stack_views([sample.unrendered()], sample.fill).render()
                assert rendered[0].shape == (1, *sample.size, 3), where
                assert rendered[1].shape == (1, *sample.size), where
                holds(sample, labels, where)


def test_any_two_augmentations_go_together_on_any_size_and_mask() -> None:
    rng = np.random.default_rng(0)
    steps = {c.name: c.build({}, augmentation_params(c)) for c in components("augmentation")}
    for (first, one), (second, two) in itertools.product(steps.items(), repeat=2):
        for shape, make in zip(SHAPES, itertools.cycle(MASKS), strict=False):
            sample = scene(*shape, make)
            one(sample, rng)
            partner = scene(*sample.size, mixed)
            sample.draw_partner = lambda _, partner=partner: partner
            two(sample, rng)
            labels = {*range(CLASSES)} if "cutmix" in (first, second) or "copy_paste" in (first, second) else None
            holds(sample, labels or set(make(*shape).unique().tolist()), (first, second, shape))


# Schedules


@pytest.mark.parametrize("component", components("schedule"), ids=lambda component: component.name)
def test_a_schedule_is_finite_for_one_step_and_where_warm_up_is_longer_than_training(component: Component) -> None:
    for total, warmup, per_epoch in itertools.product((1, 2, 3, 50), (0, 1, 2, 200), (1, 2, 50)):
        available = {"steps": total - warmup, "steps_per_epoch": per_epoch, "lr": 0.01}
        schedule = with_warmup(component.build(available, {}), warmup)
        factors = [schedule(step) for step in range(total + 2)]
        assert all(math.isfinite(factor) and 0 <= factor <= 1 for factor in factors), (total, warmup, factors)
        if warmup:
            assert factors[0] < 1


# Whole runs


def write_pairs(root: Path, shapes: list[tuple[int, int]], masks: list[Callable[[int, int], Tensor]]) -> None:
    for i, ((h, w), make) in enumerate(zip(shapes, itertools.cycle(masks), strict=False)):
        for home in ("images", "masks"):
            (root / home).mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(i).integers(0, 256, (h, w, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(root / f"images/{i}.png")
        Image.fromarray(make(h, w).numpy().astype(np.uint8)).save(root / f"masks/{i}.png")


def recipe_for(root: Path, model: str, crop: str = "[5, 33]", classes: int = CLASSES, batch_size: int = 2) -> Path:
    names = ", ".join(f'"c{i}"' for i in range(classes))
    every = "".join(f'[[loss]]\nname = "{c.name}"\n' for c in components("loss"))
    path = root / "odd.toml"
    path.write_text(
        f'{model}\n[data]\nname = "folder"\nroot = {json.dumps(str(root))}\nclasses = [{names}]\n'
        f'batch_size = {batch_size}\nworkers = 1\n[[augmentation]]\nname = "crop"\nsize = {crop}\n{every}'
        '[optimizer]\nname = "sgd"\n[schedule]\nname = "cosine"\nwarmup_epochs = 1\n'
        '[train]\nepochs = 2\nprecision = "fp32"\n'
    )
    return path


def run(path: Path, out: Path) -> dict[str, Any]:
    *_, finished = start(load_recipe(str(path))[0], out=out, device="cpu")
    return finished.result


MINI = '[model]\nname = "mini_unet"\nwidth = 4\n'
ODD = [(1, 1), (1, 33), (33, 1), (33, 65), (7, 5), (2, 2), (40, 3)]


@pytest.mark.parametrize(("masks", "count"), [([void], 7), ([mixed, void], 7), ([background], 2)])
def test_a_run_on_odd_images_with_all_losses_ends_with_figures(masks: list, count: int, tmp_path: Path) -> None:
    # Of seven images six train: three batches of two; of two images one does: a batch of one.
    write_pairs(tmp_path, ODD[:count], masks)
    result = run(recipe_for(tmp_path, MINI), tmp_path / "runs")
    assert result["epochs"] == 2
    rows = (Path(result["run"]) / "metrics.csv") if "run" in result else next((tmp_path / "runs").rglob("metrics.*"))
    assert "nan" not in rows.read_text().lower().replace("cannot", "")


def test_masks_with_ids_beyond_the_classes_are_named(tmp_path: Path) -> None:
    write_pairs(tmp_path, ODD, [mixed])
    with pytest.raises(DataError, match=r"masks/\d\.png: unknown ids .*; 2 classes have ids 0 to 1, void is 255"):
        run(recipe_for(tmp_path, MINI, classes=2), tmp_path / "runs")


def test_a_network_with_another_number_of_classes_than_the_data_is_named(tmp_path: Path) -> None:
    write_pairs(tmp_path, ODD, [mixed])
    (tmp_path / "plugins").mkdir()
    (tmp_path / "plugins/deaf.py").write_text(
        "from torch import nn\nfrom vocseg import architecture\n\n\n@architecture\ndef deaf(num_classes: int):\n"
        '    """A network that gives as many classes as it likes."""\n    return nn.Sequential(nn.Conv2d(3, 9, 1))\n'
    )
    with pytest.raises(TrainingError, match=f"expected logits of {CLASSES} classes, found 9") as caught:
        run(recipe_for(tmp_path, '[model]\nname = "deaf"\n'), tmp_path / "runs")
    assert all(len(str(problem).splitlines()) == 1 for problem in caught.value.problems)


@pytest.mark.parametrize("stride", ["(1, 1)", "0", "None", '"wide"'])
def test_a_stride_that_is_none_is_named(stride: str, tmp_path: Path) -> None:
    write_pairs(tmp_path, ODD, [mixed])
    (tmp_path / "plugins").mkdir()
    (tmp_path / "plugins/wide.py").write_text(
        "from torch import nn\nfrom vocseg import architecture\n\n\n@architecture\ndef wide(num_classes: int):\n"
        f'    """A convolution."""\n    net = nn.Conv2d(3, num_classes, 1)\n    net.stride = {stride}\n    return net\n'
    )
    with pytest.raises(UsageError, match=r"wide\.py:\d+: architecture 'wide' has the stride .*; expected a whole"):
        run(recipe_for(tmp_path, '[model]\nname = "wide"\n'), tmp_path / "runs")


def test_a_batch_that_batch_norm_cannot_train_on_is_told_with_a_remedy(tmp_path: Path) -> None:
    write_pairs(tmp_path, [(8, 8), (8, 8)], [mixed])
    model = '[model]\nname = "smp"\ndecoder = "DeepLabV3Plus"\nencoder = "tu-mobilenetv3_small_050"\n'
    with pytest.raises(TrainingError) as caught:
        run(recipe_for(tmp_path, model), tmp_path / "runs")
    assert "batch norm" in str(caught.value)
    assert "data.batch_size of 2 or more" in str(caught.value)
