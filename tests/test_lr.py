"""The learning-rate range test: what it reads from losses, what it trains, and what it writes."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from vocseg.build import Job, build
from vocseg.cli import main
from vocseg.recipe.prepare import load_recipe
from vocseg.train.loop import Step, train
from vocseg.train.lr_range import has_diverged, rates_between, read_losses, sweep

RATES = rates_between(1e-7, 1, 100)


def valley(rate: float, bottom: float = 3e-2) -> float:
    """Falls from 3 to 1 in half a decade around 1e-3, and rises again behind `bottom`."""
    fall = 2 / (1 + math.exp(-8 * (math.log10(rate) + 3)))
    return 3 - fall + 40 * max(0.0, math.log10(rate / bottom)) ** 2


def test_rates_grow_by_one_factor_from_end_to_end() -> None:
    assert rates_between(1e-3, 10, 5) == pytest.approx([1e-3, 1e-2, 1e-1, 1, 10])


def test_the_suggestion_is_where_the_loss_falls_fastest_whatever_comes_after() -> None:
    found = read_losses(RATES, [valley(rate) for rate in RATES])
    assert found.suggestion is not None
    assert 0.7e-3 < found.suggestion < 1.5e-3
    assert found.suggestion == float(f"{found.suggestion:.1e}")  # as it is printed
    assert 5e-3 < found.stops_falling < 5e-2
    assert found.diverged is None
    assert found.remark == ""


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 1000), st.floats(0.01, 100), st.floats(-5, 5))
def test_noise_scale_and_offset_of_the_loss_hardly_move_it(seed: int, scale: float, offset: float) -> None:
    noise = np.random.default_rng(seed).normal(0, 0.05, len(RATES))
    found = read_losses(RATES, [scale * (valley(r) + n + offset) for r, n in zip(RATES, noise, strict=True)])
    assert found.suggestion is not None
    assert 3e-4 < found.suggestion < 3e-3


def test_a_loss_that_explodes_hides_nothing_of_the_fall_before_it() -> None:
    falling = [valley(rate) for rate in RATES[:65]]  # from where it falls fastest, step 57, it falls on to the end
    found = read_losses(RATES, [*falling, 1e3, 1e5, 1e7])
    assert found.suggestion == read_losses(RATES, falling).suggestion == float(f"{RATES[57]:.1e}")
    assert found.stops_falling == RATES[64]
    assert len(found.smoothed) == 65


def test_a_loss_that_ends_in_nan_or_early_has_diverged_there() -> None:
    falling = [valley(rate) for rate in RATES[:70]]
    assert read_losses(RATES, [*falling, math.nan]).diverged == RATES[70]
    assert read_losses(RATES, falling).diverged == RATES[69]
    assert len(read_losses(RATES, [*falling, math.inf]).smoothed) == 70


def test_where_nothing_falls_there_is_no_suggestion_and_it_says_so() -> None:
    for level in (lambda rate: 2.0, lambda rate: 2 + math.log10(rate) / 10):
        flat = read_losses(RATES, [level(rate) for rate in RATES])
        assert flat.suggestion is None
        assert "never clearly falls" in flat.remark
    for seed in range(50):
        noise = np.random.default_rng(seed).normal(2, 0.1, len(RATES)).tolist()
        assert read_losses(RATES, noise).suggestion is None
    short = read_losses(RATES, [2.0, 1.9, 50.0])
    assert (short.suggestion, short.diverged) == (None, RATES[2])
    assert short.remark == "the loss rises after 2 steps; begin lower with --from"


def test_a_late_dip_by_chance_is_not_taken_for_the_bottom() -> None:
    losses = [valley(rate, bottom=1e9) for rate in RATES]
    # After the fall to 1, up to 1.5 and down to 0.9.
    losses[75:90] = [1.5] * 15
    losses[90:] = [0.9] * 10
    assert read_losses(RATES, losses).stops_falling < RATES[76]


def test_diverged_is_four_times_the_lowest_or_not_finite() -> None:
    assert not has_diverged(4.0, 1.0)
    assert has_diverged(4.1, 1.0)
    assert has_diverged(math.nan, 1.0)
    assert has_diverged(math.inf, -1.0)
    assert not has_diverged(1.0, -1.0)  # of a loss below zero no multiple says anything


RECIPE = """
description = "A tiny run."
[model]
name = "transfer_fcn"
encoder = "resnet18"
[data]
name = "synthetic"
size = 32
images = 8
val_images = 2
batch_size = 4
[[augmentation]]
name = "crop"
size = 32
[optimizer]
name = "sgd"
lr = 1e-3
encoder_lr = 0.1
[schedule]
name = "poly"
warmup_epochs = 1.0
[train]
epochs = 2
precision = "fp32"
ema = 0.9
minutes = 0.0001
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.toml"
    path.write_text(RECIPE)
    return path


def job(path: Path) -> Job:
    return build(load_recipe(str(path))[0], "cpu")


def test_each_step_has_its_rate_and_the_encoder_its_share_over_as_many_epochs_as_it_takes(recipe: Path) -> None:
    training = job(recipe).training
    assert training.steps_per_epoch == 2
    rates = [1e-4, 1e-3, 1e-2, 1e-2, 1e-3]
    groups = []
    for _ in sweep(training, rates):
        groups.append([group["lr"] for group in training.optimizer.param_groups])
    assert groups == [pytest.approx([rate, rate / 10]) for rate in rates]


def test_an_encoder_that_is_frozen_at_first_stays_so(recipe: Path) -> None:
    recipe.write_text(RECIPE.replace("minutes = 0.0001", "freeze_encoder = true\nunfreeze_after = 1"))
    training = job(recipe).training
    assert training.backbone is not None
    before = [p.clone() for p in training.backbone.parameters()]
    assert len(list(sweep(training, [1e-3] * 5))) == 5  # two and a half epochs
    assert all(old.equal(new) for old, new in zip(before, training.backbone.parameters(), strict=True))


def test_it_begins_where_the_run_begins_with_the_same_batches_and_losses(recipe: Path) -> None:
    recipe.write_text(RECIPE.replace("warmup_epochs = 1.0", "").replace("minutes = 0.0001", ""))
    (first, second) = (job(recipe).training for _ in range(2))
    swept = [loss for loss, _ in zip(sweep(first, [1e-9] * 2), range(2), strict=False)]
    second.schedule = lambda step: 1e-6  # of 1e-3
    steps = (event for event in train(second, lambda module: iter(())) if isinstance(event, Step))  # type: ignore
    assert swept == [float(next(steps).loss) for _ in range(2)]


def test_an_absurd_rate_is_noticed_and_ends_it(recipe: Path) -> None:
    rates = rates_between(1e-2, 1e12, 40)
    losses = list(sweep(job(recipe).training, rates))
    assert 3 < len(losses) < 40
    found = read_losses(rates, losses)
    assert found.diverged == rates[len(losses) - 1]


@pytest.fixture
def vocseg(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[str, str]]:
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str, code: int = 0) -> tuple[str, str]:
        monkeypatch.setattr("sys.argv", ["vocseg", *arguments])
        with pytest.raises(SystemExit) as done:
            main()
        out, err = capsys.readouterr()
        assert (done.value.code or 0) == code, err
        return out, err

    return run


def test_the_command_suggests_draws_and_writes_and_changes_no_recipe(
    recipe: Path, vocseg: Callable[..., tuple[str, str]]
) -> None:
    out, err = vocseg("lr", "tiny.toml", "--device", "cpu", "--steps", "40", "--from", "1e-5", "--to", "1e3")
    lines = out.splitlines()
    folder = Path(lines[-1])
    assert folder.parent == Path("runs/tiny")
    assert folder.name.startswith("lr-")
    assert {path.name for path in folder.iterdir()} == {"lr.json", "lr.png"}
    written = json.loads((folder / "lr.json").read_text())
    suggestion = written["suggestion"]
    assert suggestion is not None
    assert 1e-5 < suggestion < 1e3
    assert lines[0].startswith("steepest descent  ")
    assert lines[0].endswith(f"try --set optimizer.lr={suggestion:g}")
    assert [line.split("  ")[0] for line in lines[1:4]] == ["stops falling", "diverges", "the recipe's"]
    assert suggestion <= written["stops_falling"] < (written["diverged"] or math.inf)
    assert len(written["rates"]) == len(written["losses"]) <= 40
    assert "tiny on cpu, fp32: 40 steps of 4 images, at rates from 1e-05 to 1000" in err
    assert recipe.read_text() == RECIPE
    with Image.open(folder / "lr.png") as image:
        width, height = image.size
        assert width > height > 300


def test_json_is_one_object_with_the_folder_and_out_is_where_it_goes(vocseg: Callable[..., tuple[str, str]]) -> None:
    Path("tiny.toml").write_text(RECIPE)
    out, _ = vocseg("lr", "tiny.toml", "--json", "--steps", "20", "--out", "here", "--device", "cpu", "--to", "1e9")
    printed = json.loads(out)
    assert printed.pop("folder") == "here"
    assert printed == json.loads(Path("here/lr.json").read_text())
    assert printed["diverged"] is not None
    assert Path("here/lr.png").is_file()


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["--from", "1", "--to", "0.1"], 2, "--from 1 --to 0.1: expected two numbers above 0"),
        (["--from", "nan"], 2, "expected two numbers above 0"),
        (["--from", "0"], 2, "expected two numbers above 0"),
        (["--to", "inf"], 2, "expected two numbers above 0"),
        (["--steps", "3"], 2, "--steps"),
        (["--set", "train.epocs=1"], 2, "did you mean 'epochs'?"),
        (["--set", "data={name='voc'}"], 3, "no such folder"),
        (["--device", "abacus"], 2, "no such device"),
        (["--out", "tiny.toml/x", "--steps", "20", "--device", "cpu"], 4, "choose another folder with --out"),
    ],
)
def test_bad_input_is_a_line_and_a_code(
    recipe: Path, vocseg: Callable[..., tuple[str, str]], arguments: list[str], code: int, said: str
) -> None:
    assert said in vocseg("lr", "tiny.toml", *arguments, code=code)[1]
