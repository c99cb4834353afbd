"""Whole runs of a tiny network, through the same functions the command line calls."""

import csv
import json
import os
import re
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file

from vocseg.errors import DataError, Interrupted, TrainingError, UsageError
from vocseg.evaluate.scores import scores
from vocseg.recipe.prepare import load_recipe
from vocseg.run import Finished, Started, resume, start
from vocseg.runs.checkpoint import load_state
from vocseg.score import predict, score
from vocseg.train.loop import Epoch, Step

PLUGIN = '''"""A tiny network with all that makes resuming hard: dropout, batch norm, an encoder."""

from torch import nn

from vocseg import architecture


@architecture(backbone="encoder")
def tiny(num_classes: int, *, width: int = 8, scale: float = 1.0) -> nn.Module:
    """Two convolutions, for tests."""
    network = nn.Sequential()
    encoder = nn.Sequential(nn.Conv2d(3, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU())
    network.add_module("encoder", encoder)
    network.add_module("dropout", nn.Dropout2d(0.2))
    network.add_module("head", nn.Conv2d(width, num_classes, 3, padding=1))
    network.stride = 1
    with __import__("torch").no_grad():
        network.head.weight.mul_(scale)
    return network
'''

RECIPE = """
description = "A tiny run."
seed = 3
[model]
name = "tiny"
[data]
name = "synthetic"
size = 32
images = 14
val_images = 4
batch_size = 3
workers = 2
[[augmentation]]
name = "crop"
size = 24
[[augmentation]]
name = "color_jitter"
[[loss]]
name = "cross_entropy"
class_weights = "inverse"
[optimizer]
name = "adamw"
lr = 1e-2
encoder_lr = 0.5
[schedule]
name = "cosine"
warmup_epochs = 1.0
[train]
epochs = 3
precision = "fp32"
accumulate = 2
clip = 1.0
ema = 0.9
checkpoint_minutes = 0.0
"""


@pytest.fixture
def project(tmp_path):
    """A folder with a plugin and a recipe, as a user would have it."""
    (tmp_path / "plugins").mkdir()
    (tmp_path / "plugins" / "tiny.py").write_text(PLUGIN)
    (tmp_path / "tiny.toml").write_text(RECIPE)
    return tmp_path


def recipe(project, *overrides, **options):
    return load_recipe(str(project / "tiny.toml"), overrides=overrides, **options)[0]


def finish(events):
    for event in events:
        last = event
    assert isinstance(last, Finished)
    return last


def run(project, *overrides, out="runs", **options):
    return finish(start(recipe(project, *overrides, **options), out=project / out, device="cpu"))


def interrupted(project, stop_at, *overrides, number=signal.SIGINT):
    """Starts a run, sends a signal at the first event `stop_at` picks, and gives the run's folder."""
    folder = None

    def until_it_stops():
        nonlocal folder
        for event in start(recipe(project, *overrides), out=project / "stopped", device="cpu"):
            if isinstance(event, Started):
                folder = event.run
            if stop_at(event):
                os.kill(os.getpid(), number)

    with pytest.raises(Interrupted) as error:
        until_it_stops()
    assert error.value.exit_code == 128 + number
    assert f"vocseg run --resume {folder}" in str(error.value)
    return folder


def test_a_run_leaves_a_folder_that_explains_it(project):
    finished = run(project)
    names = {p.name for p in finished.run.iterdir()}
    assert names >= {
        "recipe.toml", "resolved.toml", "environment.json", "classes.json", "plugins", "metrics.jsonl", "metrics.csv",
        "model.safetensors", "result.json", "state.json", "curves.png", "iou.png", "confusion.png", "examples.png",
    }  # fmt: skip
    assert finished.run.parent == project / "runs" / "tiny"
    assert (finished.run / "recipe.toml").read_bytes() == (project / "tiny.toml").read_bytes()
    assert (finished.run / "plugins" / "tiny.py").read_text() == PLUGIN
    environment = json.loads((finished.run / "environment.json").read_text())
    assert environment["packages"]["torch"].partition("+")[0] == torch.__version__.partition("+")[0]
    assert len(environment["components"]["architecture tiny"]["sha256"]) == 64
    records = [json.loads(line) for line in (finished.run / "metrics.jsonl").read_text().splitlines()]
    assert [r["epoch"] for r in records] == [1, 2, 3]
    with (finished.run / "metrics.csv").open() as file:
        assert [float(row["miou"]) for row in csv.DictReader(file)] == [r["miou"] for r in records]


def test_a_plugin_package_is_kept_whole_and_scored_from_the_copy(project):
    package = project / "plugins" / "tiny"
    package.mkdir()
    (project / "plugins" / "tiny.py").unlink()
    (package / "__init__.py").write_text('"""A package."""\n')
    (package / "network.py").write_text(PLUGIN.replace("from vocseg", "from .sizes import WIDTH\n\nfrom vocseg", 1))
    (package / "sizes.py").write_text("WIDTH = 8\n")
    finished = run(project, "train.epochs=1", "schedule.warmup_epochs=0")
    assert {p.name for p in (finished.run / "plugins" / "tiny").iterdir()} >= {"__init__.py", "network.py", "sizes.py"}
    shutil.rmtree(project / "plugins")
    assert next(score(finished.run, device="cpu")).total == 4


def test_the_result_has_the_figures_that_are_promised(project):
    finished = run(project)
    result = json.loads((finished.run / "result.json").read_text())
    assert result.keys() >= {
        "miou", "miou_interval", "pixel_accuracy", "iou", "null_models", "best_epoch", "parameters",
        "images_per_second", "peak_memory_bytes", "minutes", "device", "precision",
    }  # fmt: skip
    counts = load_file(finished.run / "counts.safetensors")
    assert counts["per_image"].shape == (4, 4, 7)
    assert torch.equal(counts["per_image"].sum(0)[1], counts["confusion"].sum(1))
    assert scores(counts["confusion"].numpy()).miou == result["miou"]
    low, high = result["miou_interval"]
    assert 0 <= low <= high <= 1
    assert next(iter(result["iou"])) == "background"
    assert all(null.keys() == {"miou", "pixel_accuracy"} for null in result["null_models"].values())
    # 3·8·9 + 8, batch norm 16, 8·7·9 + 7
    assert result["parameters"] == 224 + 16 + 511
    assert (result["device"], result["precision"]) == ("cpu", "fp32")
    records = [json.loads(line) for line in (finished.run / "metrics.jsonl").read_text().splitlines()]
    best = max(records, key=lambda r: r["miou"])
    assert (result["best_epoch"], result["miou"]) == (best["epoch"], best["miou"])


def test_two_runs_of_a_seed_are_bit_identical_whatever_the_number_of_workers(project):
    first = run(project, "data.workers=1")
    second = run(project, "data.workers=4", "data.cache=off")
    assert (first.run / "model.safetensors").read_bytes() == (second.run / "model.safetensors").read_bytes()
    assert first.run != second.run
    other = run(project, seed=4)
    assert (first.run / "model.safetensors").read_bytes() != (other.run / "model.safetensors").read_bytes()


@pytest.mark.parametrize("kind", ["step", "epoch", "validation"])
def test_a_resumed_run_equals_an_uninterrupted_one(project, kind):
    whole = run(project)
    picks = {
        "step": lambda e: isinstance(e, Step) and (e.epoch, e.step) == (1, 1),
        "epoch": lambda e: isinstance(e, Epoch) and e.epoch == 1,
        "validation": lambda e: type(e).__name__ == "Scored" and e.done == 2,
    }
    folder = interrupted(project, picks[kind])
    resumed = finish(resume(folder, device="cpu"))
    assert resumed.run == folder
    assert (folder / "model.safetensors").read_bytes() == (whole.run / "model.safetensors").read_bytes()
    old, new = (load_state(f)[0]["training"] for f in (whole.run, folder))
    for part in ("network", "ema"):
        assert all(torch.equal(old[part][name], new[part][name]) for name in old[part])
    for number, entry in old["optimizer"]["state"].items():
        assert all(torch.equal(value, new["optimizer"]["state"][number][name]) for name, value in entry.items())
    timeless = ("epoch", "train_loss", "val_loss", "miou", "pixel_accuracy", "lr")
    old, new = ((f / "metrics.jsonl").read_text().splitlines() for f in (whole.run, folder))
    assert [[json.loads(r)[k] for k in timeless] for r in old] == [[json.loads(r)[k] for k in timeless] for r in new]


def test_resuming_keeps_count_of_the_best_score_and_of_early_stopping(project):
    # With a learning rate of nothing no epoch improves on the first, so the third is one too many.
    still = ("optimizer.lr=1e-30", "train.epochs=9", "early_stopping={metric='val_loss', patience=2}", "train.ema=0.0")
    still = (*still, "optimizer.weight_decay=0.0", "evaluate.metric='val_loss'")
    whole = run(project, *still, "model.scale=0.0")
    folder = interrupted(project, lambda e: isinstance(e, Epoch) and e.epoch == 2, *still, "model.scale=0.0")
    resumed = finish(resume(folder, device="cpu"))
    assert resumed.result["epochs"] == whole.result["epochs"] < 9
    assert resumed.result["best_epoch"] == whole.result["best_epoch"]
    assert resumed.result["miou"] == whole.result["miou"]


def test_sigterm_saves_and_exits_with_its_own_code(project):
    folder = interrupted(project, lambda e: isinstance(e, Step), number=signal.SIGTERM)
    assert load_state(folder)[0]["training"]["step"] == 1


def test_a_damaged_state_costs_no_more_than_the_work_since_the_one_before(project):
    folder = interrupted(project, lambda e: isinstance(e, Epoch) and e.epoch == 2)
    newest = folder / json.loads((folder / "state.json").read_text())["states"][0]["file"]
    newest.write_bytes(newest.read_bytes()[:-7])
    started, *_, finished = resume(folder, device="cpu")
    assert "damaged" in started.notes[0]
    assert finished.result["epochs"] == 3


def test_stopping_early_waits_for_a_validation_so_that_there_are_weights_to_keep(project):
    rules = ("early_stopping={metric='train_loss', mode='max', patience=1}", "evaluate.every=4", "train.epochs=9")
    finished = run(project, *rules, "schedule.warmup_epochs=0")
    assert finished.result["epochs"] % 4 == 0 or finished.result["epochs"] == 9
    assert (finished.run / "model.safetensors").is_file()


def test_a_run_that_ended_is_not_resumed(project):
    finished = run(project, "train.epochs=1", "schedule.warmup_epochs=0")
    with pytest.raises(UsageError, match="has ended"):
        next(resume(finished.run))


def test_what_is_no_run_folder_is_said_so(tmp_path):
    with pytest.raises(UsageError, match="no such run folder"):
        next(resume(tmp_path / "nowhere"))


def test_a_frozen_encoder_keeps_weights_and_statistics(project):
    finished = run(project, "train.freeze_encoder=true", "train.ema=0.0")
    torch.manual_seed(3)
    trained = load_file(finished.run / "model.safetensors")
    assert torch.equal(trained["encoder.1.running_mean"], torch.zeros(8))
    thawed = run(
        project, "train.freeze_encoder=true", "train.unfreeze_after=1", "train.ema=0.0", "evaluate.metric=last"
    )
    late = load_file(thawed.run / "model.safetensors")
    assert not torch.equal(late["encoder.1.running_mean"], torch.zeros(8))
    assert not torch.equal(late["encoder.0.weight"], trained["encoder.0.weight"])
    # Both began from the same seed, and the head trained in both.
    free = run(project, "train.freeze_encoder=true", "train.ema=0.0", "optimizer.lr=1e-5")
    assert torch.equal(load_file(free.run / "model.safetensors")["encoder.0.weight"], trained["encoder.0.weight"])


def test_the_learning_rate_follows_schedule_and_warm_up(project):
    steps = [e for e in start(recipe(project), out=project / "runs", device="cpu") if isinstance(e, Step)]
    # 14 images in batches of 3, two batches a step: 2 steps an epoch, 6 in all, the first 2 of them on the way up.
    # Then a cosine over 4 steps: (1 + cos(pi k / 4)) / 2.
    expected = [1 / 3, 2 / 3, *((1 + np.cos(np.pi * np.arange(4) / 4)) / 2)]
    assert [s.lr for s in steps] == pytest.approx([1e-2 * f for f in expected])


def test_time_up_ends_the_run_in_good_order(project):
    finished = run(project, "train.minutes=1e-9", "train.epochs=500")
    assert finished.result["epochs"] == 1
    assert (finished.run / "model.safetensors").is_file()


def test_a_loss_that_is_not_finite_is_an_error_that_says_what_to_do(project):
    with pytest.raises(TrainingError, match=r"(?s)training loss is (nan|inf).*lower optimizer.lr") as error:
        run(project, "optimizer.lr=10.0", "train.clip=1e30", "model.scale=1e38")
    assert error.value.exit_code == 5


def test_evaluating_a_run_again_gives_the_figures_of_the_run(project):
    finished = run(project)
    scoring = score(finished.run, device="cpu")
    while True:
        try:
            next(scoring)
        except StopIteration as end:
            found = end.value
            break
    assert found["miou"] == finished.result["miou"]
    assert found["miou_interval"] == finished.result["miou_interval"]
    assert found["loss"] == pytest.approx(finished.result["loss"])
    with pytest.raises(DataError, match="no split 'nosuch'"):
        next(score(finished.run, split="nosuch", device="cpu"))


def test_a_run_is_scored_after_its_plugin_is_gone(project):
    finished = run(project)
    (project / "plugins" / "tiny.py").unlink()
    assert next(score(finished.run, device="cpu")).total == 4


def test_predictions_are_palette_masks_of_the_images_size(project):
    finished = run(project)
    pictures = project / "pictures" / "deep"
    pictures.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for name, size in {"a.jpg": (20, 31), "b.png": (33, 8)}.items():
        Image.fromarray(rng.integers(0, 256, (*size, 3)).astype(np.uint8)).save(pictures / name)
    done = list(predict(finished.run, [project / "pictures"], out=project / "masks", device="cpu"))
    assert [p.mask for p in done] == [project / "masks" / "deep" / "a.png", project / "masks" / "deep" / "b.png"]
    for predicted in done:
        with Image.open(predicted.mask) as mask, Image.open(predicted.source) as source:
            assert mask.mode == "P"
            assert mask.size == source.size
            assert np.asarray(mask).max() < 7
        with Image.open(predicted.overlay) as overlay:
            assert overlay.size == source.size


def test_all_that_cannot_be_predicted_is_named_before_anything_is_written(project):
    finished = run(project, "train.epochs=1", "schedule.warmup_epochs=0")
    (project / "empty").mkdir()
    (project / "x").mkdir()
    for path in (project / "a.png", project / "x" / "a.png"):
        Image.new("RGB", (8, 8)).save(path)
    given = [project / "missing.jpg", project / "empty", project / "a.png", project / "x" / "a.png"]
    with pytest.raises(DataError) as error:
        list(predict(finished.run, given, out=project / "masks"))
    text = str(error.value)
    assert "missing.jpg: no such image" in text
    assert "no image in this folder" in text
    assert "would be written to the same place" in text
    assert not Path(project / "masks").exists()


def test_a_shipped_recipe_trains_on_voc_from_a_file_of_encoder_weights(voc_root, tmp_path):
    torch.manual_seed(1)
    published = timm.create_model("resnet10t")
    file = tmp_path / "resnet10t.pth"
    torch.save(published.state_dict(), file)
    small = (
        "data.year=2007",
        "model.encoder=resnet10t",
        f"model.weights={file}",
        "train.epochs=2",
        "data.batch_size=3",
    )
    read, _ = load_recipe("transfer_resnet34", overrides=(*small, "augmentation.3.size=64"), data=voc_root)
    finished = finish(start(read, out=tmp_path / "runs", device="cpu"))
    assert finished.result["iou"]["sofa"] != finished.result["iou"]["sofa"]  # in no mask and never predicted, or NaN
    assert (finished.result["images"], finished.result["train_images"]) == (4, 6)
    kept = load_file(finished.run / "model.safetensors")
    frozen = {name.removeprefix("encoder."): value for name, value in kept.items() if name.startswith("encoder.")}
    own = published.state_dict()
    assert frozen.keys() == {name for name in own if not name.startswith("fc.")}
    assert all(torch.equal(value, own[name]) for name, value in frozen.items())


def test_time_that_runs_out_during_a_validation_adds_no_epoch_of_no_steps(project):
    # Long enough for the first step, and over before the last validated image.
    events = start(recipe(project, "train.minutes=1e-3", "train.epochs=500"), out=project / "runs", device="cpu")
    for event in events:
        if type(event).__name__ == "Scored":
            time.sleep(0.07)
    records = (event.run / "metrics.jsonl").read_text().splitlines()
    assert all(json.loads(record)["train_loss"] > 0 for record in records)
    assert event.result["epochs"] == len(records)


def test_a_prediction_never_overwrites_what_it_was_made_from(project):
    finished = run(project, "train.epochs=1", "schedule.warmup_epochs=0")
    photos = project / "photos"
    photos.mkdir()
    for name in ("a.png", "b.jpg", "b_overlay.jpg"):
        Image.new("RGB", (8, 8)).save(photos / name)
    with pytest.raises(DataError, match="would overwrite"):
        list(predict(finished.run, [photos / "a.png"], out=photos))
    with pytest.raises(DataError, match="same place"):
        list(predict(finished.run, [photos / "b.jpg", photos / "b_overlay.jpg"]))


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ('raise IndexError("my own mistake")', "IndexError: my own mistake; `vocseg check tiny` tries one batch"),
        ("return images[..., ::3, ::4]", "at the same whole fraction of height and width"),
        ("return images, images", "the network returned tuple; expected logits, or a mapping of them with 'out'"),
        ("return images[:, :2]", "Error"),
    ],
)
def test_a_plugin_that_fails_in_training_is_an_error_of_training(project, code, message):
    wrong = f'''
class Wrong(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(__import__("torch").ones(1))

    def forward(self, images):
        images = images * self.weight
        {code}


@architecture
def wrong(num_classes: int) -> nn.Module:
    """Fails."""
    return Wrong()
'''
    (project / "plugins" / "wrong.py").write_text("from torch import nn\nfrom vocseg import architecture\n" + wrong)
    with pytest.raises(TrainingError, match="(?s)" + re.escape(message)):
        run(project, "model.name=wrong", "optimizer.encoder_lr=1.0")


def test_an_optimizer_without_a_learning_rate_of_its_own_trains_at_its_torch_default(project):
    (project / "plugins" / "plain.py").write_text(
        "import torch\nfrom vocseg import optimizer\n\n\n@optimizer\ndef plain(params, *, momentum: float = 0.5):\n"
        '    """SGD at a rate of its own."""\n    return torch.optim.SGD(params, lr=0.02, momentum=momentum)\n'
    )
    text = (project / "tiny.toml").read_text().replace('name = "adamw"\nlr = 1e-2', 'name = "plain"')
    (project / "tiny.toml").write_text(text)
    steps = [e for e in start(recipe(project), out=project / "runs", device="cpu") if isinstance(e, Step)]
    assert max(step.lr for step in steps) == pytest.approx(0.02)
