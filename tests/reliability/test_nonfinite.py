"""A loss or a gradient that is not finite: found at its step, told with its images, and never saved.

One image of the data set holds a class that no other has, and a loss goes wrong where it sees that class: so it is the
same step in every run of a seed.
"""

import contextlib
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from vocseg.build import Job, build
from vocseg.data.loader import TrainingBatches
from vocseg.errors import TrainingError
from vocseg.recipe.prepare import load_recipe
from vocseg.run import Finished, resume, start
from vocseg.runs.checkpoint import load_state, load_tensors
from vocseg.train.loop import Epoch, Step, train
from vocseg.train.nonfinite import IN_A_ROW, NonFiniteError, Taken, Watch, all_finite

PLUGIN = '''"""A data set with one image that a loss cannot bear."""

from pathlib import Path

import numpy as np
import torch
from torch import nn

from vocseg import architecture, dataset, loss
from vocseg.data.dataset import Dataset


@dataset
def poisoned(root: Path, split: str, *, bad: tuple[int, ...] = (5,), images: int = 12) -> Dataset:
    """Small images; those that are bad hold class 3."""

    def read(index: int):
        rng = np.random.default_rng(index)
        mask = rng.integers(0, 3, (16, 16)).astype(np.uint8)
        if split == "train" and index in bad:
            mask[0, 0] = 3
        return rng.integers(0, 256, (16, 16, 3)).astype(np.uint8), mask

    return Dataset(("a", "b", "c", "d"), tuple(f"{split}/photo_{i}" for i in range(images)), read)


@loss
def brittle(num_classes: int, *, how: str):
    """Cross-entropy that goes wrong where there is class 3."""

    def compute(logits, target):
        value = nn.functional.cross_entropy(logits, target, ignore_index=255)
        if not (target == 3).any():
            return value
        if how == "gradient":  # of a root at nothing it is infinite, and times nothing it is NaN
            return value + torch.sqrt(logits.sum() * 0.0)
        return value * float(how)

    return compute


@architecture
def normed(num_classes: int) -> nn.Module:
    """With batch norm, whose statistics a step that is left out must not change."""
    network = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, num_classes, 1))
    network.stride = 1
    return network
'''

RECIPE = """
seed = 4
[model]
name = "normed"
[data]
name = "poisoned"
batch_size = 2
workers = 1
[[loss]]
name = "brittle"
how = "nan"
[optimizer]
name = "adamw"
lr = 1e-3
[train]
epochs = 2
precision = "fp32"
ema = 0.9
checkpoint_minutes = 0.0
"""


@pytest.fixture
def home(tmp_path: Path) -> Path:
    (tmp_path / "plugins").mkdir()
    (tmp_path / "plugins" / "poison.py").write_text(PLUGIN)
    (tmp_path / "poison.toml").write_text(RECIPE)
    return tmp_path


def recipe(home: Path, *overrides: str):
    return load_recipe(str(home / "poison.toml"), overrides=overrides)[0]


def job(home: Path, *overrides: str) -> Job:
    return build(recipe(home, *overrides), "cpu")


def how(kind: str) -> str:
    return f'loss=[{{name="brittle", how="{kind}"}}]'


def bad_step(home: Path, *overrides: str) -> int:
    """The step of the first epoch, from 1, whose batch holds image 5."""
    batches = job(home, *overrides).training.batches
    return next(step for step in range(len(batches)) if "train/photo_5" in batches.names(0, step)) + 1


def seed_with_bad_step(home: Path, wanted: int) -> str:
    return next(f"seed={seed}" for seed in range(50) if bad_step(home, f"seed={seed}") == wanted)


def stops(home: Path, *overrides: str) -> tuple[TrainingError, Path]:
    with pytest.raises(TrainingError) as caught:
        list(start(recipe(home, *overrides), out=home / "runs", device="cpu"))
    (run,) = (home / "runs" / "poison").iterdir()
    return caught.value, run


@pytest.mark.parametrize("kind", ["nan", "inf"])
def test_the_run_stops_at_the_step_and_names_its_images(home, kind):
    seed = seed_with_bad_step(home, 3)
    error, run = stops(home, how(kind), seed)
    names = job(home, seed).training.batches.names(0, 2)
    first, second = error.problems
    assert first.message.startswith(
        f"epoch 1, step 3: the training loss is {kind}; images: {', '.join(names)}; lower optimizer.lr"
    )
    assert second.where == str(run / "nonfinite.json")
    (found,) = json.loads((run / "nonfinite.json").read_text())["steps"]
    assert (found["epoch"], found["step"], found["lr"]) == (1, 3, 1e-3)
    assert found["names"] == names
    assert found["weights_finite"]
    # The state before the step is there, whole and finite.
    state, problems = load_state(run)
    assert (state["training"]["step"], problems) == (2, [])
    assert all_finite(state["training"]["network"].values())


def test_a_gradient_that_is_not_finite_is_put_down_to_its_own_step(home):
    seed = seed_with_bad_step(home, 3)
    error, run = stops(home, how("gradient"), seed)
    names = job(home, seed).training.batches.names(0, 2)
    images = ", ".join(names)
    said = f"step 4: the training loss is nan, since the step before broke the weights; its images: {images};"
    assert said in error.problems[0].message
    (found,) = json.loads((run / "nonfinite.json").read_text())["steps"]
    assert (found["step"], found["weights_finite"], found["names_before"]) == (4, False, names)
    # After the step there were weights to save that are not finite: they were not.
    assert load_state(run)[0]["training"]["step"] == 2


def test_weights_that_the_last_step_of_an_epoch_breaks_are_neither_scored_nor_kept(home):
    seed = seed_with_bad_step(home, 6)
    error, run = stops(home, how("gradient"), seed)
    assert "epoch 1, step 6: " in str(error)
    assert "the weights are not finite after it" in str(error)
    assert "train/photo_5" in str(error)
    assert not (run / "model.safetensors").exists()
    assert not (run / "metrics.jsonl").exists()
    assert load_state(run)[0]["training"]["step"] == 5


def test_a_run_that_stopped_goes_on_from_its_last_finite_state_leaving_the_step_out(home):
    seed = seed_with_bad_step(home, 4)
    _, run = stops(home, seed)
    with pytest.raises(TrainingError, match="step 4: the training loss is nan"):
        list(resume(run, device="cpu"))
    *_, finished = resume(run, device="cpu", overrides=['train.on_nonfinite="skip"'])
    assert isinstance(finished, Finished)
    skipping = start(recipe(home, seed, 'train.on_nonfinite="skip"'), out=home / "other", device="cpu")
    *_, whole = skipping
    assert isinstance(whole, Finished)
    assert (run / "model.safetensors").read_bytes() == (whole.run / "model.safetensors").read_bytes()
    assert finished.result["steps_left_out"] == whole.result["steps_left_out"] == 2  # the image comes once an epoch
    records = json.loads((run / "nonfinite.json").read_text())["steps"]
    assert [(found["epoch"], found["skipped"]) for found in records] == [(1, True), (2, True)]
    assert "2 steps left out" in whole.notes[0]


def never(module):
    raise AssertionError("not to be validated")
    yield


@pytest.mark.parametrize("kind", ["nan", "gradient"])
def test_a_step_that_is_left_out_changes_nothing(home, kind):
    training = job(home, seed_with_bad_step(home, 3), 'train.on_nonfinite="skip"', how(kind)).training
    held = [training.network.state_dict(), training.ema.network.state_dict(), training.optimizer.state_dict()["state"]]
    before = None
    losses = []
    with contextlib.closing(train(training, never)) as events:
        for event in events:
            assert isinstance(event, Step)
            now = [{str(k): torch.as_tensor(v).clone() for k, v in flat(part).items()} for part in held]
            if event.step == 3:
                assert event.left_out is not None
                assert all(torch.equal(a[k], b[k]) for a, b in zip(before, now, strict=True) for k in a)
            else:
                assert event.left_out is None
                losses.append(float(event.loss))
            before = now
            if event.step == 6:
                break
    assert training.left_out == 1
    assert float(training.loss_sum) == pytest.approx(sum(losses))
    assert training.ema.updates == 5


def flat(part: dict) -> dict:
    inner = {k: v for k, v in part.items() if isinstance(v, dict)}
    return {k: v for k, v in part.items() if k not in inner} | {
        f"{k}.{name}": value for k, entry in inner.items() for name, value in entry.items()
    }


def test_the_mean_loss_of_an_epoch_is_that_of_the_steps_that_were_taken(home):
    events = list(start(recipe(home, 'train.on_nonfinite="skip"'), out=home / "runs", device="cpu"))
    for epoch in (0, 1):
        losses = [float(e.loss) for e in events if isinstance(e, Step) and e.epoch == epoch and e.left_out is None]
        (record,) = [e for e in events if isinstance(e, Epoch) and e.epoch == epoch + 1]
        assert len(losses) == 5
        assert record.train_loss == pytest.approx(np.mean(losses))


def test_many_steps_left_out_in_a_row_end_the_run(home):
    every = f"data.bad=[{', '.join(map(str, range(60)))}]"
    error, run = stops(home, every, "data.images=60", 'train.on_nonfinite="skip"')
    assert f"step {IN_A_ROW}: " in str(error)
    assert f"{IN_A_ROW} steps in a row were left out" in str(error)
    assert len(json.loads((run / "nonfinite.json").read_text())["steps"]) == IN_A_ROW


def test_an_epoch_of_nothing_but_steps_left_out_ends_the_run(home):
    error, run = stops(home, f"data.bad=[{', '.join(map(str, range(12)))}]", 'train.on_nonfinite="skip"')
    assert "epoch 1, step 6: the training loss is nan" in str(error)
    assert "all steps of the epoch were left out; lower optimizer.lr" in str(error)
    assert "on_nonfinite" not in str(error)
    assert not (run / "model.safetensors").exists()


PARTS = ("network", "buffer", "ema", "optimizer", "loss_sum")


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("part", PARTS)
def test_a_state_that_is_not_finite_in_any_part_is_not_to_be_saved(home, part, value):
    training = job(home, "data.bad=[]").training
    events = train(training, never)
    next(events)
    events.close()
    state = training.state()
    assert training.is_finite(state)
    tensor = {
        "network": state["network"]["0.weight"],
        "buffer": state["network"]["1.running_mean"],
        "ema": state["ema"]["3.bias"],
        "optimizer": state["optimizer"]["state"][0]["exp_avg"],
        "loss_sum": state["loss_sum"],
    }[part]
    tensor[(0,) * tensor.ndim] = value
    # A network may have a mask of minus infinity among its buffers.
    assert training.is_finite(state) == (part == "buffer" and value == math.inf)


def test_kept_weights_are_finite(home):
    *_, finished = start(recipe(home, 'train.on_nonfinite="skip"'), out=home / "runs", device="cpu")
    assert all_finite(load_tensors(finished.run / "model.safetensors").values())


def test_losses_of_a_device_that_is_not_waited_for_are_looked_at_now_and_then():
    watch = Watch(torch.device("mps"))  # no tensor goes there
    total = torch.zeros(())
    found = None
    for step in range(200):
        loss = torch.tensor(math.nan if step >= 70 else 1.0)
        total += loss
        found = watch.first_bad(Taken(0, step, 0.1, loss), total)
        if found:
            break
    assert found is not None
    assert (found.step, step) == (70, 99)
    assert watch.look() is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("size", [1, 3, 17, 1000, 100_003])
def test_one_number_that_is_not_finite_is_found_anywhere(dtype, size):
    assert all_finite([torch.full((size,), torch.finfo(dtype).max, dtype=dtype), torch.zeros(0), torch.zeros(2).long()])
    for value in (math.nan, math.inf, -math.inf):
        for place in {0, size // 2, size - 1}:
            tensor = torch.zeros(size, dtype=dtype)
            tensor[place] = value
            assert not all_finite([torch.ones(3), tensor])


def test_the_error_says_what_it_is(home):
    with pytest.raises(NonFiniteError) as caught:
        list(train(job(home).training, never))
    assert caught.value.exit_code == 5
    assert caught.value.found.skipped is False


def test_every_process_names_the_images_of_all(home):
    batches = job(home).training.batches
    whole = batches.names(1, 0, 2)
    assert len(whole) == 2 * batches.batch_size
    for rank in range(2):
        share = TrainingBatches(
            batches.dataset, [], batch_size=batches.batch_size, seed=batches.seed, rank=rank, size=2
        )
        assert share.names(1, 0, 2) == whole


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="this system does not list a process's threads")
def test_to_look_at_a_state_on_a_thread_of_its_own_starts_no_threads():
    # In a process of its own: the tests have one thread for OpenMP, which starts none.
    script = """
import os
from threading import Thread
import torch
from torch import nn
from vocseg.train.nonfinite import state_finite

network = nn.Conv2d(256, 256, 3)
torch.ones(1 << 22).isfinite().all()  # the main thread has its team by now
state = {"network": network.state_dict(), "ema": None, "optimizer": {"state": {}}, "loss_sum": torch.zeros(1)}

def look():
    before = len(os.listdir("/proc/self/task"))
    finite = state_finite(network, state)
    print(finite, len(os.listdir("/proc/self/task")) - before)

thread = Thread(target=look)
thread.start()
thread.join()
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "2"}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment, check=True)
    assert done.stdout == "True 0\n"
