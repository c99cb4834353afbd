"""How many images a step takes: what is counted, what limits it, and that the run does not notice the search."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from vocseg.device import Placement
from vocseg.errors import TrainingError
from vocseg.network import Normalization
from vocseg.recipe.prepare import load_recipe
from vocseg.recipe.writer import json_schema, write_resolved
from vocseg.run import Finished, Started, start
from vocseg.runs.checkpoint import load_tensors
from vocseg.train.batch_size import Trial, most_images


@pytest.mark.parametrize(
    ("positions", "accumulate", "processes", "device", "most"),
    [
        (200, 1, 1, "cuda", 25),  # 200 / 8
        (200, 2, 1, "cuda", 12),  # 200 / (8 steps of 2 batches)
        (200, 1, 4, "cuda", 6),  # 200 / (8 steps of 4 processes)
        (200, 1, 1, "cpu", 16),
        (14, 1, 1, "cpu", 2),  # an eighth would be one image, which batch norms cannot always take
        (2, 1, 2, "cpu", 1),
    ],
)
def test_an_epoch_keeps_eight_steps_of_two_images_or_more_and_a_cpu_takes_at_most_sixteen(
    positions: int, accumulate: int, processes: int, device: str, most: int
) -> None:
    assert most_images(positions, accumulate, processes, torch.device(device))[0] == most


def trial(network: nn.Module, side: int = 16, **more: Any) -> Trial:
    def sgd(module: nn.Module, backbone: nn.Module | None) -> torch.optim.Optimizer:
        return torch.optim.SGD(module.parameters(), lr=0.1)

    placement = Placement(torch.device("cpu"), "fp32")
    given: dict[str, Any] = {
        "backbone": None,
        "loss": lambda logits, target: logits.mean(),
        "sample": (torch.zeros(side, side, 3, dtype=torch.uint8), torch.zeros(side, side, dtype=torch.uint8)),
        "optimizer": sgd,
        "placement": placement,
        "stride": 1,
        "normalization": Normalization(torch.zeros(3), torch.ones(3)),
    }
    return Trial(placement.place(network), **given | more)


def test_a_step_fits_a_quarter_of_the_memory_by_what_the_backward_pass_keeps() -> None:
    # A 1x1 convolution keeps its input: 3 channels of 16 x 16 floats, 3,072 bytes an image. Beside it are 8 x 3 + 8
    # weights and as many gradients, 256 bytes. Eight images take 24,832 bytes, a quarter of 99,328.
    one = trial(nn.Conv2d(3, 8, 1))
    assert one.largest(100, "why", 99_328) == (8, "largest that fits 0.0 MB, a quarter of the memory; 0.0 MB an image")
    assert one.largest(100, "why", 99_324)[0] == 4
    assert one.largest(100, "why", 0)[0] == 2  # which has been seen to do
    assert one.largest(12, "why", 1 << 40)[0] == 8
    assert one.largest(7, "an epoch is short", 1 << 40) == (4, "an epoch is short; 0.0 MB an image")
    assert one.largest(1, "why", 1 << 40)[0] == 1
    # An average is as large as the weights: 128 bytes more, for which memory has to be 512 bytes more.
    averaged = trial(nn.Conv2d(3, 8, 1), average=True)
    assert [averaged.largest(100, "why", memory)[0] for memory in (99_328, 99_840)] == [4, 8]


def test_a_frozen_encoder_keeps_nothing() -> None:
    # Of 512 x 512 floats, 1.05 MB a channel, the first layer keeps its input's 3 channels and the second its 8.
    network = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 4, 1))
    whole, frozen = (trial(network, 512, backbone=network[0], frozen=frozen) for frozen in (False, True))
    assert whole.largest(1, "whole", 0) == (1, "whole; 11.5 MB an image")
    assert frozen.largest(1, "frozen", 0) == (1, "frozen; 8.4 MB an image")


class Sized(nn.Module):
    """Runs out of memory, or into another error, with more images than it can take."""

    stride = 1

    def __init__(self, most: int, error: type[Exception] = torch.OutOfMemoryError):
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Dropout(0.5), nn.Conv2d(4, 2, 1))
        self.most, self.error = most, error

    def forward(self, x: Tensor) -> Tensor:
        if len(x) > self.most:
            raise self.error("no room for so many")
        return self.layers(x)


def test_what_does_not_fit_is_halved_down_to_one_image() -> None:
    assert trial(Sized(3)).largest(64, "why", 1 << 40) == (2, "largest that fits 274.88 GB, a quarter of the memory")
    assert trial(Sized(1)).largest(64, "why", 1 << 40)[0] == 1
    with pytest.raises(TrainingError, match=r"data.batch_size: not one image fits 274.88 GB"):
        trial(Sized(0)).largest(64, "why", 1 << 40)


def test_any_other_failure_is_said_and_not_taken_for_a_lack_of_memory() -> None:
    with pytest.raises(TrainingError, match=r"data.batch_size: a trial step of 2 images failed with KeyError"):
        trial(Sized(1, KeyError)).largest(64, "why", 1 << 40)


def test_a_network_that_cannot_train_on_one_image_gets_two() -> None:
    pooled = nn.Sequential(nn.Conv2d(3, 4, 1), nn.AdaptiveAvgPool2d(1), nn.BatchNorm2d(4), nn.Upsample((16, 16)))
    assert trial(pooled).largest(2, "why", 1)[0] == 2


def test_the_search_changes_nothing() -> None:
    network = Sized(64)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    network.eval()
    generator = torch.get_rng_state()
    trial(network, optimizer=lambda module, _: torch.optim.Adam(module.parameters())).largest(16, "why", 1 << 40)
    assert torch.equal(torch.get_rng_state(), generator)
    assert not network.training
    assert all(p.grad is None for p in network.parameters())
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


RECIPE = """
description = "A tiny run."
[model]
name = "fcn_baseline"
[data]
name = "synthetic"
size = 32
images = 35
val_images = 2
batch_size = "auto"
[[augmentation]]
name = "crop"
size = 32
[train]
epochs = 1
precision = "fp32"
"""


def finish(events: Any) -> tuple[Started, Finished]:
    started, *_, finished = (event for event in events if isinstance(event, Started | Finished))
    assert isinstance(finished, Finished)
    return started, finished


def test_a_run_with_auto_ends_with_the_weights_of_one_with_the_number_and_keeps_the_number(tmp_path: Path) -> None:
    (tmp_path / "tiny.toml").write_text(RECIPE)
    recipe, registry = load_recipe(str(tmp_path / "tiny.toml"))
    started, found = finish(start(recipe, out=tmp_path / "runs", device="cpu"))
    # An eighth of 35 images is 4.
    assert started.notes[-1].startswith("batch size 4: an epoch of 35 images keeps 8 steps; ")
    assert started.steps_per_epoch == 8
    assert "batch_size = 4\n" in (found.run / "resolved.toml").read_text()
    assert 'batch_size = "auto"\n' in (found.run / "recipe.toml").read_text()
    by_hand, _ = load_recipe(str(tmp_path / "tiny.toml"), overrides=["data.batch_size=4"])
    _, written = finish(start(by_hand, out=tmp_path / "runs", device="cpu"))
    mine, theirs = (load_tensors(run / "model.safetensors") for run in (found.run, written.run))
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(value, theirs[name]) for name, value in mine.items())
    assert recipe.resolved["data"]["batch_size"] == "auto"
    assert 'batch_size = "auto"\n' in write_resolved(recipe)
    schema = json_schema(registry)["$defs"]["data_voc"]["properties"]["batch_size"]
    assert schema["anyOf"] == [{"minimum": 1, "type": "integer"}, {"const": "auto", "type": "string"}]
