"""A run that is killed goes on as if nothing had been: kill -9 at random moments, and what may change on the way."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch

from vocseg.errors import UsageError
from vocseg.recipe.changes import FREE, refuse_changes
from vocseg.recipe.prepare import load_recipe
from vocseg.run import Finished, Started, resume, run_recipe, start
from vocseg.runs.checkpoint import load_state, save_state
from vocseg.runs.folder import RunFolder
from vocseg.train.loop import Epoch

FAILING = ("model.fails=0.1", "train.on_nonfinite=skip")
VARIANTS = (
    (),
    ("train.checkpoint_minutes=0.001",),  # some steps are lost, and made again
    ("optimizer.name=sgd", "train.accumulate=1"),
    ("train.freeze_encoder=true", "train.unfreeze_after=2", "evaluate.every=2"),
    FAILING,
)


def killed_twice(forks, whole, case, *overrides, draw=False):
    """Kills a run at two random moments, each uniform over all that is left, and resumes it. Gives how many hit."""
    rng = random.Random(case)
    expected = whole(*overrides, draw=draw)
    length = expected.seconds
    out = f"case-{case}"
    folder, hits = None, 0
    for _ in range(2):
        kill = [(rng.uniform(0, length), signal.SIGKILL)]
        if folder is None:  # nothing was saved, and nothing is lost
            ended = forks.start(*overrides, out=out, draw=draw, signals=kill)
        else:
            ended = forks.resume(folder, draw=draw, signals=kill)
        folder = forks.folder(out)
        hits += ended.code != 0
        if folder and (folder / "result.json").exists():  # it had ended, perhaps a moment before
            break
        assert ended.code == -signal.SIGKILL, ended.said
        length -= kill[0][0]
    else:
        ended = forks.resume(folder, draw=draw) if folder else forks.start(*overrides, out=out, draw=draw)
        assert ended.code == 0, ended.said
    assert forks.left(forks.folder(out)) == expected.left
    shutil.rmtree(forks.home / out)
    return hits


@pytest.mark.parametrize("case", range(6))
def test_a_run_killed_at_random_moments_ends_as_if_it_had_not_been(forks, whole, case):
    killed_twice(forks, whole, case, *VARIANTS[case % len(VARIANTS)], draw=case == 0)


@pytest.mark.long
def test_200_runs_killed_twice_end_as_if_they_had_not_been(forks, whole):
    hits = 0
    for case in range(200):
        hits += killed_twice(forks, whole, case, *VARIANTS[case % len(VARIANTS)], draw=case % 7 == 0)
    assert hits > 200  # the others had ended by then


@pytest.mark.long
def test_40_runs_of_two_loader_threads_killed_twice_end_as_if_they_had_not_been(forks, whole):
    assert sum(killed_twice(forks, whole, case, "data.workers=2", draw=case % 5 == 0) for case in range(40)) > 40


@pytest.mark.long
def test_six_runs_of_the_program_killed_twice_end_as_if_they_had_not_been(forks, whole):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    program = [sys.executable, "-m", "vocseg", "run", "--quiet"]
    expected = whole()
    for case in range(6):
        rng, out = random.Random(case), f"case-{case}"
        begin = [*program, str(forks.home / "tiny.toml"), "--out", out]
        folder, length = None, 0.0
        for kills in (True, True, False):
            command = [*program, "--resume", str(folder)] if folder else begin
            with subprocess.Popen(command, cwd=forks.home, env=environment, start_new_session=True) as process:
                begun = time.monotonic()
                if kills:
                    try:
                        process.wait(rng.uniform(0, length or 10.0))
                    except subprocess.TimeoutExpired:
                        process.kill()
                process.wait(120)
                length = length or time.monotonic() - begun
            folder = forks.folder(out)
            if folder and (folder / "result.json").exists():
                break
            assert process.returncode == -signal.SIGKILL
        assert forks.left(folder) == expected.left


# With so large a learning rate the first epoch stays the best by val_loss; by train_loss, of which more is better here,
# it is the best too, and the fifth epoch the last.
NOTICING = (
    "optimizer.lr=0.3", "evaluate.metric=val_loss", "train.epochs=8",
    "early_stopping={metric='train_loss', mode='max', patience=4}",
)  # fmt: skip
MID_EPOCH = {"event": "Step", "is": {"epoch": 2, "step": 2}}
STATE = {
    (NOTICING, "Step"): ("weights", "buffers", "optimizer", "ema", "ema_updates", "epoch", "step", "loss_sum", "images",
                         "seconds", "best", "stopper"),
    (NOTICING, "Epoch"): ("stopped",),
    (FAILING, "Step"): ("left_out",),
}  # fmt: skip
"""Each item of a state, and a run in which it counts, stopped within the third epoch or after the fifth."""


@pytest.mark.parametrize(("overrides", "event"), STATE)
def test_nothing_could_be_left_out_of_a_state(forks, whole, overrides, event):
    at = MID_EPOCH if event == "Step" else {"event": "Epoch", "is": {"epoch": 5}}
    forks.start(*overrides, at={**at, "signal": signal.SIGTERM})
    folder = forks.folder()
    state = load_state(folder)[0]
    known = {*state["training"], *state["scoreboard"], "weights", "buffers"} - {"network", "seconds_training"}
    assert known == {item for items in STATE.values() for item in items}  # an item that is new belongs above
    age(folder)
    kept = shutil.copytree(folder, forks.home / "kept")
    for item in ("", *STATE[overrides, event]):  # first, with nothing left out
        shutil.rmtree(folder)
        shutil.copytree(kept, folder)
        ended = forks.resume(folder, forget=item)
        assert (ended.code == 0 and same(forks, folder, whole(*overrides))) == (not item), (item, ended.said)


def age(folder):
    """Makes the time behind a run longer than any that is to come: that it was forgotten shows in the records then."""
    state = load_state(folder)[0]
    state["training"]["seconds"] += 1000.0
    save_state(folder, state, json.loads((folder / "state.json").read_text())["states"][0]["step"], state["run"])
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    lines = [json.dumps({**record, "seconds": record["seconds"] + 1000.0}) for record in records]
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")


def same(forks, folder, whole_run):
    try:
        return forks.left(folder) == whole_run.left
    except AssertionError:
        return False


AT = {
    "mid-epoch": MID_EPOCH,
    "at the boundary of two epochs": {"event": "Epoch", "is": {"epoch": 2}},
    "after the best epoch": {"event": "Epoch", "is": {"epoch": 3}},
    "at the last step": {"event": "Step", "is": {"epoch": 4, "step": 3}},
    "after the last epoch": {"event": "Epoch", "is": {"epoch": 5}},
}


@pytest.mark.parametrize("moment", AT)
def test_a_run_goes_on_from_every_kind_of_moment(forks, whole, moment):
    assert forks.start(at={**AT[moment], "signal": signal.SIGINT}).code == 130
    folder = forks.folder()
    assert forks.resume(folder).code == 0
    assert forks.left(folder) == whole().left


def test_a_run_goes_on_from_the_state_before_a_damaged_one(forks, whole, stopped):
    newest = stopped / json.loads((stopped / "state.json").read_text())["states"][0]["file"]
    newest.write_bytes(newest.read_bytes()[:-1])
    ended = forks.resume(stopped)
    assert ended.code == 0, ended.said
    assert f"{newest}: damaged" in ended.said
    assert forks.left(stopped) == whole().left


def test_a_run_that_ended_is_refused_and_says_where_its_figures_are(forks, whole):
    folder = whole().folder
    ended = forks.resume(folder)
    assert ended.code == 2
    assert f"{folder}: this run has ended; its figures are in {folder / 'result.json'}" in ended.said


@pytest.fixture
def voc(forks, voc_root):
    """The recipe over photographs: what `vocseg run` takes for it."""
    synthetic = 'name = "synthetic"\nsize = 32\nimages = 20\nval_images = 3\nbatch_size = 3\n'
    recipe = forks.home / "voc.toml"
    text = (forks.home / "tiny.toml").read_text()
    recipe.write_text(text.replace(synthetic, 'name = "voc"\nyear = 2007\nbatch_size = 2\n'))
    return [
        "run",
        str(recipe),
        "--data",
        str(voc_root),
        "--set",
        "train.accumulate=1",
        "--out",
        str(forks.home / "runs"),
    ]


def test_a_run_goes_on_with_other_threads_cache_and_saves_and_data_that_was_moved(forks, voc, voc_root):
    changes = ("data.workers=3", "data.cache=off", "train.checkpoint_minutes=5.0", 'description="Later."')
    assert {change.split("=")[0] for change in changes} | {"data.root"} <= set(FREE)
    ended = forks.vocseg(*voc[:-1], str(forks.home / "whole"))
    assert ended.code == 0, ended.said
    forks.vocseg(*voc, at={**MID_EPOCH, "signal": signal.SIGTERM})
    moved = voc_root.rename(voc_root.with_name("moved"))
    folder = forks.folder()
    missing = forks.resume(folder)
    assert missing.code == 3
    assert "--data" in missing.said
    ended = forks.resume(folder, *changes, data=moved)
    assert ended.code == 0, ended.said
    assert forks.left(folder) == forks.left(forks.folder("whole"))


def test_a_run_does_not_go_on_with_other_images(forks, voc, voc_root):
    forks.vocseg(*voc, at={**MID_EPOCH, "signal": signal.SIGTERM})
    listed = voc_root / "VOCdevkit/VOC2007/ImageSets/Segmentation/train.txt"
    listed.write_text("\n".join(listed.read_text().split()[::-1]) + "\n")
    ended = forks.resume(forks.folder())
    assert ended.code == 3
    assert f"{voc_root}: its images are not those that the run began with" in ended.said


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ("data.batch_size=4", "data.batch_size: the run began with 3, found 4"),
        ("optimizer.lr=0.5", "optimizer.lr: the run began with 0.01, found 0.5"),
        ("augmentation.0.size=20", "augmentation.0.size: the run began with 24, found 20"),
        ("train.minutes=5.0", "train.minutes: the run began with nothing, found 5.0"),
        ("seed=4", "seed: the run began with 3, found 4"),
    ],
)
def test_a_changed_recipe_is_refused_and_its_keys_are_named(forks, stopped_once, change, problem):
    before = forks.files(stopped_once)
    ended = forks.resume(stopped_once, change)
    assert ended.code == 2
    assert f"{stopped_once}: {problem}" in ended.said
    assert all(key in ended.said for key in FREE)
    assert forks.files(stopped_once) == before


def test_a_run_folder_whose_recipe_was_edited_is_refused_and_the_keys_are_named(forks, stopped):
    text = (stopped / "resolved.toml").read_text()
    edited = (
        text.replace("lr = 0.01\n", "lr = 0.02\n").replace("clip = 1.0\n", "").replace("workers = 1", "workers = 2")
    )
    (stopped / "resolved.toml").write_text(edited)
    ended = forks.resume(stopped)
    assert ended.code == 2
    lr, clip, remedy = json.loads(ended.said.splitlines()[0])["error"]
    assert lr == f"{stopped}: optimizer.lr: the run began with 0.01, found 0.02"
    assert clip == f"{stopped}: train.clip: the run began with 1.0, found nothing"
    assert "start a new one" in remedy


def test_a_key_that_is_newer_than_the_run_has_its_default_in_both(project):
    recipe, _ = load_recipe(str(project / "tiny.toml"))
    train = {key: value for key, value in recipe.resolved["train"].items() if key != "channels_last"}
    older = {**recipe.resolved, "train": train}
    refuse_changes(older, recipe, project)
    changed, _ = load_recipe(str(project / "tiny.toml"), overrides=["train.channels_last=false"])
    with pytest.raises(UsageError, match=r"train.channels_last: the run began with nothing, found false"):
        refuse_changes(older, changed, project)


def test_the_help_names_what_may_change(forks):
    said = forks.vocseg("run", "--help").said
    assert all(key in said for key in FREE)


def test_a_state_can_be_read_where_there_is_no_other_device(stopped_once):
    def tensors(value):
        if isinstance(value, torch.Tensor):
            yield value
        for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
            yield from tensors(inner)

    assert {tensor.device.type for tensor in tensors(load_state(stopped_once)[0])} == {"cpu"}


def test_half_precision_and_accumulation_go_on_exactly(forks, whole):
    changes = ("train.precision=bf16", "train.accumulate=3", "data.images=30")
    expected = whole(*changes)
    assert expected.left["result"]["precision"] == "bf16"
    forks.start(*changes, at={**MID_EPOCH, "signal": signal.SIGTERM})
    assert forks.resume(forks.folder()).code == 0
    assert forks.left(forks.folder()) == expected.left


def test_what_one_sitting_changed_the_next_one_keeps(project):
    recipe, _ = load_recipe(str(project / "tiny.toml"))
    events = start(recipe, out=project / "runs", device="cpu")
    run = next(event.run for event in events if isinstance(event, Started))
    next(event for event in events if isinstance(event, Epoch))
    events.close()
    changed = resume(run, device="cpu", overrides=["data.workers=7", 'train.on_nonfinite="skip"'])
    assert isinstance(next(changed), Started)
    changed.close()
    kept = run_recipe(RunFolder(run))
    assert (kept.data.settings.workers, kept.train.on_nonfinite) == (7, "skip")
    *_, finished = resume(run, device="cpu")
    assert isinstance(finished, Finished)
    assert run_recipe(RunFolder(run)).resolved == kept.resolved


def test_an_epoch_that_was_told_of_is_saved(project):
    recipe, _ = load_recipe(str(project / "tiny.toml"), overrides=["train.checkpoint_minutes=60"])
    events = start(recipe, out=project / "runs", device="cpu")
    run = next(event.run for event in events if isinstance(event, Started))
    next(event for event in events if isinstance(event, Epoch))
    events.close()
    state, _ = load_state(run)
    assert (state["training"]["epoch"], state["training"]["step"]) == (1, 0)
