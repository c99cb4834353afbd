"""`vocseg run` as a process: what it prints, and how it ends."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from vocseg.cli.reporters import describe_epoch
from vocseg.run import Started
from vocseg.train.loop import Epoch

RECIPE = """
description = "A tiny run."
[model]
name = "fcn_baseline"
[data]
name = "synthetic"
size = 32
images = 8
val_images = 2
batch_size = 4
[[augmentation]]
name = "crop"
size = 32
[train]
epochs = {epochs}
precision = "fp32"
"""

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


@pytest.fixture
def recipe(tmp_path):
    def write(epochs=1, text=RECIPE):
        path = tmp_path / "tiny.toml"
        path.write_text(text.format(epochs=epochs))
        return path

    return write


def vocseg(*arguments, cwd):
    command = [sys.executable, "-m", "vocseg", *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, env=ENVIRONMENT, timeout=120)


def test_plain_lines_end_with_the_runs_path(recipe, tmp_path):
    done = vocseg("run", recipe(2), "--out", "here", "--device", "cpu", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[-1].startswith(os.path.join("here", "tiny", ""))
    assert (tmp_path / lines[-1] / "result.json").is_file()
    assert sum(line.startswith("epoch ") and "train loss" in line for line in lines) == 2
    assert any("all background" in line for line in lines)
    assert "\x1b" not in done.stdout


def test_json_ends_with_an_object_of_the_run_and_its_figures(recipe, tmp_path):
    done = vocseg("run", recipe(), "--json", cwd=tmp_path)
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert [line["event"] for line in lines] == ["started", "epoch", "finished"]
    result = json.loads((tmp_path / lines[-1]["run"] / "result.json").read_text())
    assert {key: lines[-1][key] for key in result} == result


def test_quiet_prints_the_path_and_nothing_else(recipe, tmp_path):
    done = vocseg("run", recipe(), "--quiet", cwd=tmp_path)
    (line,) = done.stdout.splitlines()
    assert (tmp_path / line / "model.safetensors").is_file()
    assert done.stderr == ""


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_the_run_with_its_code_and_says_how_to_go_on(recipe, tmp_path, number, code):
    command = [sys.executable, "-m", "vocseg", "run", str(recipe(500)), "--json"]
    process = subprocess.Popen(
        command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT
    )
    assert process.stdout is not None
    while json.loads(process.stdout.readline())["event"] != "epoch":
        time.sleep(0.01)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == code
    assert "vocseg run --resume runs/tiny/" in err
    assert json.loads(out.splitlines()[-1])["exit_code"] == code
    folder = err.strip().rpartition(" ")[2]
    assert (tmp_path / folder / "state.json").is_file()


@pytest.mark.skipif(sys.platform != "linux", reason="terminals are made and closed in each system's own way")
def test_a_terminal_that_is_closed_stops_the_run_and_all_is_saved(recipe, tmp_path):
    # A leader of a session of its own, whose terminal it is; it has no other place to write to.
    become = (
        "import fcntl, os, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); os.execv(sys.executable, sys.argv[1:])"
    )
    reads, writes = os.openpty()
    command = [sys.executable, "-m", "vocseg", "run", str(recipe(100_000))]
    process = subprocess.Popen(
        [sys.executable, "-c", become, *command],
        cwd=tmp_path, stdin=writes, stdout=writes, stderr=writes, env=ENVIRONMENT, start_new_session=True,
    )  # fmt: skip
    os.close(writes)
    said = b""
    while said.count(b"train loss") < 2:
        said += os.read(reads, 4096)
    os.close(reads)
    assert process.wait(60) == 129
    (folder,) = (tmp_path / "runs" / "tiny").iterdir()
    records = len((folder / "metrics.jsonl").read_text().splitlines())
    state = torch.load(next(iter(sorted(folder.glob("state-*.pt"), reverse=True))), weights_only=True)
    assert state["training"]["epoch"] == records >= 2


@pytest.mark.skipif(os.name == "nt", reason="a shell closes streams in another way")
@pytest.mark.parametrize(
    ("line", "code"),
    [
        ("schema >&-", 0),
        ("list <&- >&- 2>&-", 0),
        ("run nowhere.toml >&- 2>&-", 2),
        ("list > /dev/full 2> /dev/full", 4),
    ],
)
def test_a_command_ends_with_its_code_though_it_cannot_speak(tmp_path, line, code):
    if "/dev/full" in line and not os.path.exists("/dev/full"):
        pytest.skip("this system has no disk that is always full")
    command = ["/bin/sh", "-c", f'"$0" -m vocseg {line}', sys.executable]
    done = subprocess.run(command, cwd=tmp_path, env=ENVIRONMENT, capture_output=True)
    assert (done.returncode, done.stderr) == (code, b"")


def test_an_epochs_line_fits_a_narrow_terminal():
    epoch = Epoch(6, 0.1689, 0.1551, 0.8196, 0.9555, 3.5e-9, 327.3, 48.0)
    started = Started(Path("runs"), "tiny", "cpu", 1, 8, 2, 7, 30, 2, 0, 0)
    whole = describe_epoch(epoch, started)
    assert whole.endswith("mIoU 0.8196  pixel accuracy 0.9555  lr 3.5e-09  327.3 img/s  0:48")
    for room in (80, 100):
        line = describe_epoch(epoch, started, room)
        assert len(line) <= room
        assert whole.startswith(line)
        assert "mIoU 0.8196" in line


def test_background_is_told_once_where_it_is_the_best_constant(recipe, tmp_path):
    done = vocseg("run", recipe(), cwd=tmp_path)
    assert ("all background" in done.stdout, "best constant" in done.stdout) == (True, False)


@pytest.mark.parametrize(
    ("change", "code", "message"),
    [
        (('name = "fcn_baseline"', 'name = "fcn_baselin"'), 2, "did you mean 'fcn_baseline'?"),
        (('name = "synthetic"\nsize = 32\nimages = 8\nval_images = 2', 'name = "voc"'), 3, "vocseg data fetch voc2012"),
        (('[[augmentation]]\nname = "crop"\nsize = 32', ""), 2, "differ in size"),
    ],
)
def test_errors_are_lines_with_a_remedy_and_a_code_of_their_kind(recipe, tmp_path, change, code, message):
    done = vocseg("run", recipe(text=RECIPE.replace(*change)), cwd=tmp_path)
    assert done.returncode == code
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    shown = vocseg("--debug", "run", recipe(text=RECIPE.replace(*change)), cwd=tmp_path)
    assert "Traceback" in shown.stderr


def test_all_that_is_wrong_with_a_recipe_and_its_data_is_said_without_importing_torch(recipe, tmp_path):
    text = RECIPE.replace('name = "synthetic"\nsize = 32\nimages = 8\nval_images = 2', 'name = "voc"')
    command = [sys.executable, "-X", "importtime", "-m", "vocseg", "run", str(recipe(text=f"sed = 1\n{text}"))]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=ENVIRONMENT, timeout=120)
    assert done.returncode == 2
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines() if line.startswith("import time")}
    first, second = (line for line in done.stderr.splitlines() if not line.startswith("import time"))
    assert "sed: unknown key" in first
    assert "VOC2012: no such folder" in second
    assert "numpy" in imported  # the augmentation was tried
    assert "torch" not in imported


def test_a_device_that_is_not_there_is_an_environment_fault(recipe, tmp_path):
    done = vocseg("run", recipe(), "--device", "cuda:99", cwd=tmp_path)
    assert done.returncode == 4
    assert "there is: cpu" in done.stderr


def test_check_trains_and_writes_nothing(recipe, tmp_path):
    path = recipe()
    done = vocseg("check", path, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "ready to run" in done.stdout
    report = json.loads(vocseg("check", path, "--json", cwd=tmp_path).stdout)
    assert report["classes"] == 7
    # Adam keeps two numbers a weight, and a step counter a tensor.
    assert report["optimizer_bytes"] >= 2 * report["weights_bytes"]
    assert report["moved_by_one_step"].split(" of ")[0] == report["moved_by_one_step"].split(" of ")[1].split()[0]
    assert list(tmp_path.iterdir()) == [path]
