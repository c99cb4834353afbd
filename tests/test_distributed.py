"""Several processes as one: `torchrun` with two processes on the CPU, through the command line and below it."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from vocseg.data.dataset import Dataset
from vocseg.data.loader import TrainingBatches
from vocseg.distributed import ALONE
from vocseg.errors import UsageError

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
TINY = (
    "data.size=32", "data.images=12", "data.val_images=5", "data.batch_size=4", "train.epochs=10", "data.workers=1",
    "model.width=4", "augmentation.0.size=32", 'train.precision="fp32"', "train.sync_batch_norm=true",
    "train.ema=0.9", "train.checkpoint_minutes=0",
)  # fmt: skip


def environment(port: int) -> dict[str, str]:
    # A port of its own for each test: they may run beside each other.
    return {**os.environ, "OMP_NUM_THREADS": "1", "MASTER_PORT": str(port), "PYTHONWARNINGS": "ignore"}


def command(out: Path, *more: str) -> list[str]:
    return ["-m", "vocseg", "run", "--json", *more, "--out", str(out)]


def settings(*more: str) -> list[str]:
    return ["quickstart", *(word for setting in (*TINY, *more) for word in ("--set", setting))]


@pytest.fixture(scope="session")
def port(worker_id: str) -> int:
    return 29600 + (0 if worker_id == "master" else 10 * (1 + int(worker_id.removeprefix("gw"))))


def torchrun(port: int, *arguments: str, restarts: int = 0, cwd: Path, **more: object) -> subprocess.Popen[str]:
    launcher = [*TORCHRUN, "--master-port", str(port), "--max-restarts", str(restarts), *arguments]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(launcher, cwd=cwd, env=environment(port), **pipes, **more)  # type: ignore[call-overload]


def last_line(process: subprocess.Popen[str]) -> dict:
    out, error = process.communicate(timeout=240)
    assert process.returncode == 0, error
    return json.loads(out.splitlines()[-1])


WORKER = """
import sys
import numpy as np, timm, torch
from torch import nn
from vocseg.device import Placement
from vocseg.distributed import end_process, join
from vocseg.evaluate.inference import Predictor
from vocseg.evaluate.validation import evaluate
from vocseg.network import choose_normalization
from vocseg.plugins import discover
from vocseg.train.sync_batch_norm import synchronise

def finish(generator):
    while True:
        try:
            next(generator)
        except StopIteration as stop:
            return stop.value

def scored(world):
    torch.manual_seed(0)
    network = nn.Conv2d(3, 7, 3, padding=1)
    data = discover().get("dataset", "synthetic").build({"split": "val"}, {"val_images": 5, "size": 32})
    predictor = Predictor(network, Placement(torch.device("cpu"), "fp32"), 1, choose_normalization("half", ()))
    return finish(evaluate(predictor, data, nn.CrossEntropyLoss(ignore_index=255), world))

def normed(batch, world):
    torch.manual_seed(1)
    activated = timm.layers.BatchNormAct2d(3, act_layer=nn.SiLU)
    network = nn.Sequential(nn.BatchNorm2d(3), activated, nn.BatchNorm2d(3, momentum=None))
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.normal_()
    network.to(torch.float64)
    if world.size > 1:
        synchronise(network)
    share = batch.chunk(world.size)[world.rank].clone().requires_grad_()
    # The mean over processes of each one's mean is the mean over all: what training in parallel computes.
    (network(share).pow(3).mean() / world.size).backward()
    gradients = [parameter.grad.numpy() for parameter in network.parameters()]
    return share.grad, [world.total(g) for g in gradients], network.state_dict()

with join(torch.device("cpu")) as world:
    evaluation = scored(world)
    batch = torch.randn(4, 3, 5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    images, weights, state = normed(batch, world)
    found = {"evaluation": vars(evaluation), "images": images, "weights": weights, "state": state}
    torch.save(found, f"{sys.argv[1]}-{world.size}-{world.rank}.pt")
end_process()
"""


def test_two_processes_count_and_normalise_as_one_does(tmp_path, port):
    (tmp_path / "worker.py").write_text(WORKER)
    process = torchrun(port, "worker.py", "found", cwd=tmp_path)
    subprocess.run([sys.executable, "worker.py", "found"], cwd=tmp_path, env=environment(port), check=True)
    _, error = process.communicate(timeout=240)
    assert process.returncode == 0, error
    one, *two = (torch.load(tmp_path / f"found-{name}.pt", weights_only=False) for name in ("1-0", "2-0", "2-1"))
    for share in two:
        assert (share["evaluation"]["matrix"] == one["evaluation"]["matrix"]).all()
        assert (share["evaluation"]["per_image"] == one["evaluation"]["per_image"]).all()
        assert share["evaluation"]["loss"] == one["evaluation"]["loss"]
        for name, value in one["state"].items():
            torch.testing.assert_close(share["state"][name], value)
        for found, expected in zip(share["weights"], one["weights"], strict=True):
            np.testing.assert_allclose(found, expected, atol=1e-12)
    assert one["evaluation"]["per_image"].shape == (5, 4, 7)
    torch.testing.assert_close(torch.cat([share["images"] for share in two]), one["images"])


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory, port: int) -> dict:
    """What a run by two processes says of itself, uninterrupted."""
    folder = tmp_path_factory.mktemp("together")
    return last_line(torchrun(port, *command(folder, *settings()), cwd=folder))


def test_two_processes_train_as_one_and_leave_one_folder(together, tmp_path, port):
    alone = subprocess.run(
        [sys.executable, *command(tmp_path, *settings())],
        cwd=tmp_path, env=environment(port), capture_output=True, text=True, check=True,
    )  # fmt: skip
    one = json.loads(alone.stdout.splitlines()[-1])
    assert (together["processes"], one["processes"]) == (2, 1)
    assert together["train_images"] == one["train_images"]
    folder = Path(together["run"])
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]
    losses = [
        [json.loads(line)["train_loss"] for line in (Path(run["run"]) / "metrics.jsonl").read_text().splitlines()]
        for run in (together, one)
    ]
    # Each process takes the mean over its own labelled pixels, so that the two differ by how void is spread over them.
    assert losses[0] == pytest.approx(losses[1], rel=0.02)


def test_a_killed_process_is_restarted_and_the_run_ends_as_if_nothing_had_been(together, tmp_path, port):
    process = torchrun(port, *command(tmp_path, *settings()), restarts=1, cwd=tmp_path)
    folder = wait_for_state(tmp_path, process)
    os.kill(max(workers_of(process.pid)), signal.SIGKILL)
    killed = last_line(process)
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]
    assert killed["miou"] == together["miou"]
    assert same_weights(together, killed)


def same_weights(first: dict, second: dict) -> bool:
    one, two = (load_file(Path(run["run"]) / "model.safetensors") for run in (first, second))
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def stopped_and_resumed(port: int, out: Path, *more: str) -> dict:
    """What a run of two processes says that was stopped by SIGTERM in the middle, and went on."""
    process = torchrun(port, *command(out, *settings(*more)), cwd=out.parent)
    folder = wait_for_state(out, process)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=120)
    assert not (folder / "result.json").exists()
    return last_line(torchrun(port, "-m", "vocseg", "run", "--json", "--resume", str(folder), cwd=out.parent))


def test_a_run_stopped_with_two_processes_goes_on_with_two_as_if_nothing_had_been(together, tmp_path, port):
    resumed = stopped_and_resumed(port, tmp_path / "out")
    assert (resumed["processes"], resumed["miou"]) == (2, together["miou"])
    assert same_weights(together, resumed)


@pytest.mark.long
def test_so_it_is_in_half_precision_and_with_accumulation(tmp_path, port):
    changes = ('train.precision="bf16"', "train.accumulate=2", "data.images=24")
    whole = last_line(torchrun(port, *command(tmp_path / "whole", *settings(*changes)), cwd=tmp_path))
    assert same_weights(whole, stopped_and_resumed(port, tmp_path / "stopped", *changes))


def test_a_run_stopped_with_two_processes_goes_on_with_one(tmp_path, port):
    process = torchrun(port, *command(tmp_path, *settings("train.epochs=40")), cwd=tmp_path)
    folder = wait_for_state(tmp_path, process)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=120)
    assert process.returncode != 0
    assert not (folder / "result.json").exists()
    assert not list(folder.glob(".*"))
    done = subprocess.run(
        [sys.executable, "-m", "vocseg", "run", "--json", "--resume", str(folder)],
        cwd=tmp_path, env=environment(port), capture_output=True, text=True, check=True,
    )  # fmt: skip
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert lines[0]["first_epoch"] * lines[0]["steps_per_epoch"] + lines[0]["first_step"] > 0
    assert (lines[-1]["epochs"], lines[-1]["processes"]) == (40, 1)


def wait_for_state(out: Path, process: subprocess.Popen[str]) -> Path:
    """The run folder, once it holds a state to go on from."""
    for _ in range(12_000):
        found = list(out.glob("*/*/state.json"))
        if found:
            return found[0].parent
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    raise AssertionError("no state was saved")


def workers_of(launcher: int) -> list[int]:
    listed = subprocess.run(["ps", "-o", "pid=", "--ppid", str(launcher)], capture_output=True, text=True, check=True)
    return [int(line) for line in listed.stdout.split()]


def numbered(count: int) -> Dataset:
    def read(index: int) -> tuple[np.ndarray, np.ndarray]:
        return np.full((4, 4, 3), index, np.uint8), np.zeros((4, 4), np.uint8)

    return Dataset(("a",), tuple(map(str, range(count))), read)


@pytest.mark.parametrize("size", [2, 3])
def test_the_shares_of_a_batch_are_the_batch(size):
    whole = TrainingBatches(numbered(14), [], batch_size=6, seed=1)
    shares = [TrainingBatches(numbered(14), [], batch_size=6, seed=1, rank=rank, size=size) for rank in range(size)]
    for expected, *found in zip(whole.epoch(3), *(share.epoch(3) for share in shares), strict=True):
        assert torch.equal(torch.cat([images for images, _ in found]), expected[0])


def test_a_batch_that_cannot_be_shared_equally_is_refused():
    with pytest.raises(UsageError, match=r"data.batch_size: 4 images cannot be shared by 3 processes"):
        TrainingBatches(numbered(14), [], batch_size=4, seed=1, size=3)


def test_a_world_of_one_gives_back_what_it_gets():
    assert ALONE.largest(1.5, 2) == [1.5, 2]
    assert ALONE.text_of_first("a") == "a"
    assert ALONE.every(torch.tensor(2.5)).tolist() == [2.5]
    network = torch.nn.Conv2d(3, 1, 1)
    assert ALONE.parallel(network) is network
