"""Memory that runs out, in training and in validation: one line with something to try, and nothing lost."""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from vocseg.data.dataset import Dataset
from vocseg.device import Placement
from vocseg.errors import TrainingError
from vocseg.evaluate.inference import Looks, Predictor
from vocseg.evaluate.validation import evaluate
from vocseg.network import Normalization
from vocseg.recipe.prepare import load_recipe
from vocseg.run import Event, start
from vocseg.runs.checkpoint import load_state
from vocseg.train.loop import Step

PLUGIN = '''"""A network that asks for more memory than there is, for images or batches of a certain size."""

import torch
from torch import nn

from vocseg import architecture


class Greedy(nn.Module):
    def __init__(self, num_classes, batch, side):
        super().__init__()
        self.head = nn.Conv2d(3, num_classes, 1)
        self.batch, self.side, self.stride = batch, side, 1

    def forward(self, images):
        if self.batch and self.training and len(images) >= self.batch:
            torch.empty(1 << 50)
        if self.side and not self.training and max(images.shape[2:]) >= self.side:
            torch.empty(1 << 50)
        return self.head(images)


@architecture
def greedy(num_classes: int, *, batch: int = 0, side: int = 0) -> nn.Module:
    """A 1x1 convolution; it takes no batch and sees no side so large or larger, unless they are 0."""
    return Greedy(num_classes, batch, side)
'''

RECIPE = """
[model]
name = "greedy"
[data]
name = "synthetic"
size = 96
images = 24
val_images = 3
batch_size = 12
workers = 1
[[augmentation]]
name = "crop"
size = 64
[optimizer]
name = "adamw"
[train]
epochs = 1
precision = "fp32"
accumulate = 2
checkpoint_minutes = 0.0
"""


@pytest.fixture
def home(tmp_path: Path) -> Path:
    (tmp_path / "plugins").mkdir()
    (tmp_path / "plugins" / "greedy.py").write_text(PLUGIN)
    (tmp_path / "greedy.toml").write_text(RECIPE)
    return tmp_path


def runs_out(home: Path, *overrides: str) -> tuple[str, Path, list[Event]]:
    """What the run says when memory runs out, its folder, and what happened before."""
    events: list[Event] = []
    with pytest.raises(TrainingError) as caught:
        events.extend(
            start(load_recipe(str(home / "greedy.toml"), overrides=overrides)[0], out=home / "runs", device="cpu")
        )
    assert caught.value.exit_code == 5
    said, kept = caught.value.problems
    assert kept.message == "what was saved before is kept"
    assert "\n" not in str(said)
    return str(said), Path(kept.where), events


@pytest.mark.parametrize(
    ("batch", "accumulate", "tried"),
    [(12, 2, (6, 4)), (2, 1, (1, 2)), (15, 1, (5, 3)), (7, 3, (1, 21))],
)
def test_a_batch_that_does_not_fit_is_told_with_one_that_makes_the_same_steps(home, batch, accumulate, tried):
    settings = (f"data.batch_size={batch}", f"train.accumulate={accumulate}", f"model.batch={batch}")
    said, _, _ = runs_out(home, *settings)
    found = re.search(r"try data\.batch_size = (\d+) with train\.accumulate = (\d+)", said)
    assert found is not None, said
    assert tuple(map(int, found.groups())) == tried
    assert batch * accumulate == np.prod(tried)


def test_what_is_to_be_tried_fits(home):
    changed = ("data.batch_size=6", "train.accumulate=4")
    recipe = load_recipe(str(home / "greedy.toml"), overrides=("model.batch=12", *changed))[0]
    assert [event.images for event in start(recipe, out=home / "runs", device="cpu") if isinstance(event, Step)] == [24]


def test_one_image_that_does_not_fit_is_told_with_a_smaller_crop(home):
    said, _, _ = runs_out(home, "data.batch_size=1", "model.batch=1")
    assert "one image takes too much: try a 'crop' of 32 pixels, a smaller network" in said


def test_an_image_that_cannot_be_scored_is_named_with_a_window_and_training_is_saved(home):
    said, run, _ = runs_out(home, "model.side=90")
    assert re.match(r"\S+: scoring its \d+ x \d+ pixels takes too much memory \(", said), said
    assert "try evaluate.window = 32" in said
    assert load_state(run)[0]["training"]["step"] == 1
    recipe = load_recipe(
        str(home / "greedy.toml"), overrides=("model.side=90", "evaluate.window=32", "evaluate.overlap=0.0")
    )[0]
    list(start(recipe, out=home / "again", device="cpu"))


def test_windows_and_scales_that_do_not_fit_are_told_with_smaller_ones():
    def fail(images):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    network = torch.nn.Module()
    network.forward = fail
    placement = Placement(torch.device("cpu"), "fp32")
    looks = Looks(scales=(1.0, 1.5), window=512)
    predictor = Predictor(network, placement, 1, Normalization(torch.zeros(3), torch.ones(3)), looks)
    pair = np.zeros((600, 700, 3), np.uint8), np.zeros((600, 700), np.uint8)
    data = Dataset(("a", "b"), ("big",), lambda index: pair)
    with pytest.raises(
        TrainingError, match=r"big: scoring its 700 x 600 pixels .* evaluate\.window = 256 and evaluate"
    ):
        list(evaluate(predictor, data, torch.nn.functional.cross_entropy))


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the system does not keep to the limit")
def test_memory_that_really_runs_out_ends_in_the_same_line(tmp_path):
    # A limit on the address space, less above what is there once torch is imported than a step wants.
    (tmp_path / "big.toml").write_text(RECIPE.replace('"greedy"', '"mini_unet"').replace("size = 96", "size = 1024"))
    script = """
import re, resource, sys
import torch, vocseg.run
from vocseg.cli import main
now = int(re.search(r"VmSize:\\s*(\\d+)", open("/proc/self/status").read())[1]) * 1024
resource.setrlimit(resource.RLIMIT_AS, (now + (1 << 29),) * 2)
main()
"""
    settings = ("data.images=4", "data.val_images=1", "data.batch_size=4", "train.accumulate=1", "augmentation=[]")
    command = [sys.executable, "-c", script, "run", str(tmp_path / "big.toml"), "--out", str(tmp_path / "runs")]
    command += [word for setting in settings for word in ("--set", setting)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    ended = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert ended.returncode == TrainingError.exit_code, ended.stderr[-1000:]
    first, *rest = ended.stderr.splitlines()
    assert "try data.batch_size = 2 with train.accumulate = 2" in first
    assert len(rest) == 1
