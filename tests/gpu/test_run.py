"""Whole runs on a GPU, and the states they go on from."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from vocseg.recipe.prepare import load_recipe
from vocseg.run import Finished, Started, resume, start
from vocseg.runs.checkpoint import load_state, load_tensors, state_saver
from vocseg.runs.folder import RunFolder
from vocseg.train.loop import Step

if not torch.cuda.is_available():
    pytest.skip("no CUDA device", allow_module_level=True)

# A network whose kernels all have a deterministic form on CUDA, which bilinear upsampling and some losses lack.
PLUGIN = '''"""A tiny network with all that makes resuming hard: dropout, batch norm, an encoder."""

from torch import nn

from vocseg import architecture


@architecture(backbone="encoder")
def tiny(num_classes: int) -> nn.Module:
    """Two convolutions, for tests."""
    network = nn.Sequential()
    encoder = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
    network.add_module("encoder", encoder)
    network.add_module("dropout", nn.Dropout2d(0.2))
    network.add_module("head", nn.Conv2d(8, num_classes, 3, padding=1))
    network.stride = 1
    return network
'''
RECIPE = """
[model]
name = "tiny"
[data]
name = "synthetic"
size = 32
images = 14
val_images = 4
batch_size = 3
augment_on = "{augment_on}"
[[augmentation]]
name = "crop"
size = 24
[[augmentation]]
name = "color_jitter"
[[loss]]
name = "cross_entropy"
[optimizer]
name = "{optimizer}"
[schedule]
name = "cosine"
[train]
epochs = 3
precision = "{precision}"
clip = 1.0
ema = 0.9
checkpoint_minutes = 0
"""
SCORES = ("miou", "pixel_accuracy", "best_epoch")


@pytest.fixture
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def recipe(folder: Path, **changed: str) -> Path:
    settings = {"optimizer": "adamw", "precision": "fp32", "augment_on": "cpu"} | changed
    (folder / "plugins").mkdir()
    (folder / "plugins" / "tiny.py").write_text(PLUGIN)
    path = folder / "tiny.toml"
    path.write_text(RECIPE.format(**settings))
    return path


@pytest.mark.usefixtures("deterministic")
@pytest.mark.parametrize(
    "changed", [{}, {"precision": "bf16"}, {"optimizer": "sgd"}, {"augment_on": "device"}], ids=str
)
def test_a_resumed_run_equals_an_uninterrupted_one_with_deterministic_algorithms(
    tmp_path: Path, changed: dict[str, str]
) -> None:
    read, _ = load_recipe(str(recipe(tmp_path, **changed)))

    def stopped_after(steps: int) -> Path:
        done, path = 0, Path()
        events = start(read, out=tmp_path / f"stopped-{steps}", device="cuda")
        for event in events:
            if isinstance(event, Started):
                path = event.run
            done += isinstance(event, Step)
            if done > steps:  # the state is saved once the event before has been taken
                break
        events.close()  # type: ignore[attr-defined]
        return path

    def finished(events) -> Finished:
        *_, last = events
        assert isinstance(last, Finished)
        return last

    whole = finished(start(read, out=tmp_path / "whole", device="cuda"))
    for steps in (2, 6):  # within the first epoch and within the second, of four steps each
        resumed = finished(resume(stopped_after(steps), device="cuda"))
        assert [resumed.result[name] for name in SCORES] == [whole.result[name] for name in SCORES]
        expected, found = (load_state(run.run)[0]["training"] for run in (whole, resumed))
        for part in ("network", "ema"):
            assert expected[part].keys() == found[part].keys()
            assert all(torch.equal(expected[part][key], found[part][key]) for key in expected[part])
        weights = [load_tensors(RunFolder(run.run).weights) for run in (whole, resumed)]
        assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])


def test_a_state_holds_what_was_saved_though_everything_changes_right_after(tmp_path: Path) -> None:
    network = nn.Sequential(*(nn.Conv2d(32, 32, 3) for _ in range(40))).to("cuda", memory_format=torch.channels_last)
    with state_saver(tmp_path) as saver:
        for round_ in range(3):
            torch.cuda._sleep(20_000_000)  # so that copies are asked for before the device comes to what they copy
            with torch.no_grad():
                for weights in network.parameters():
                    weights.fill_(round_)
            saver.save({"network": network.state_dict()}, round_)
            with torch.no_grad():
                for weights in network.parameters():
                    weights.fill_(-1.0)
    state, problems = load_state(tmp_path)
    assert not problems
    assert len(state["network"]) == 80
    for name, tensor in state["network"].items():
        assert (tensor == 2).all(), name


def test_saving_a_state_does_not_wait_for_the_device(tmp_path: Path) -> None:
    network = nn.Conv2d(8, 8, 3).cuda()
    with state_saver(tmp_path) as saver:
        saver.save({"network": network.state_dict()}, 0)  # the first pays for pinned memory
        saver.wait()
        torch.cuda._sleep(2_000_000_000)  # about a second of work
        busy = torch.cuda.current_stream().record_event()
        saver.save({"network": network.state_dict()}, 1)
        assert not busy.query()
