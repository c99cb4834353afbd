"""Damaged files of a run: said in a line, or the state before is used with a warning; nothing is trained on damage."""

import hashlib
import io
import json
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save

from vocseg.errors import EnvironmentFault, VocsegError
from vocseg.recipe.prepare import load_recipe
from vocseg.run import Started, resume, start
from vocseg.runs.checkpoint import load_state
from vocseg.score import score
from vocseg.train.loop import Epoch

TINY = (
    "data.size=32", "data.images=12", "data.val_images=3", "data.batch_size=4", "data.workers=1", "model.width=4",
    "augmentation.0.size=32", "train.epochs=3", "train.precision=fp32", "train.ema=0.9",
    "train.checkpoint_minutes=60.0", "evaluate.metric=last",  # so that each epoch keeps its weights and saves its state
)  # fmt: skip


def left_after(epochs: int, out: Path) -> Path:
    """A run that was left after so many epochs."""
    recipe, _ = load_recipe("quickstart", overrides=TINY)
    events = start(recipe, out=out, device="cpu")
    for event in events:
        if isinstance(event, Started):
            folder = event.run
        if isinstance(event, Epoch) and event.epoch == epochs:
            next(events)  # its state is saved
            break
    events.close()
    return folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Runs of one recipe, left after one epoch, after two, and another one left after two."""
    out = tmp_path_factory.mktemp("damage")
    return {name: left_after(epochs, out) for name, epochs in {"one": 1, "two": 2, "other": 2}.items()}


@pytest.fixture
def copy_of(runs: dict[str, Path], tmp_path: Path) -> Callable[[str], Path]:
    """A copy of one of the runs, to be damaged."""

    def copied(name: str) -> Path:
        return shutil.copytree(runs[name], tmp_path / name / runs[name].name)

    return copied


def states(folder: Path) -> list[Path]:
    """The state files, the newest first."""
    return sorted(folder.glob("state-*.pt"), reverse=True)


def refusal(events: Iterator[object]) -> str:
    """What is said in place of the first event."""
    with pytest.raises(VocsegError) as error:
        next(iter(events))
    assert error.value.exit_code in (2, 3, 4)
    return str(error.value)


def damaged_forms(data: bytes, other: bytes, cuts: int, flips: int) -> Iterator[tuple[str, bytes]]:
    """So many ways to cut a file off and to flip a bit of it, and the file empty, gone to zeros, or another one."""
    rng = random.Random(0)
    for i in range(cuts):
        end = len(data) * i // cuts
        yield f"cut off at {end}", data[:end]
    for _ in range(flips):
        bit = rng.randrange(8 * len(data))
        yield f"bit {bit}", data[: bit // 8] + bytes([data[bit // 8] ^ 1 << bit % 8]) + data[bit // 8 + 1 :]
    yield "zeros", bytes(len(data))
    yield "another file", other


def test_72_damaged_states_are_told_and_the_state_before_is_used(copy_of):
    folder = copy_of("two")
    newest, before = states(folder)
    expected = torch.load(before, weights_only=True)["training"]["network"]
    forms = list(damaged_forms(newest.read_bytes(), before.read_bytes(), cuts=20, flips=50))
    assert len(forms) == 72
    for name, data in forms:
        newest.write_bytes(data)
        found, problems = load_state(folder)
        (problem,) = map(str, problems)
        assert problem.startswith(f"{newest}: damaged"), name
        assert all(torch.equal(tensor, expected[key]) for key, tensor in found["training"]["network"].items()), name
    began = next(resume(folder, device="cpu"))  # of the last form
    assert isinstance(began, Started)
    assert began.first_epoch == 1
    assert began.notes == (f"{problem}; going on from the newest whole state",)


def test_72_damaged_states_are_refused_where_there_is_none_before(copy_of):
    folder = copy_of("one")
    (only,) = states(folder)
    for name, data in damaged_forms(only.read_bytes(), b"another file", cuts=20, flips=50):
        only.write_bytes(data)
        with pytest.raises(EnvironmentFault) as error:
            load_state(folder)
        damaged, remedy = str(error.value).splitlines()
        assert damaged.startswith(f"{only}: damaged"), name
        assert remedy == f"{folder}: no state to resume from; start the recipe again without --resume"
    assert refusal(resume(folder, device="cpu")) == f"{damaged}\n{remedy}"


def test_states_are_found_by_their_names_where_state_json_is_missing_or_damaged(copy_of):
    folder = copy_of("two")
    newest = torch.load(states(folder)[0], weights_only=True)["training"]["epoch"]
    for content in (b"", b"{", b"[]", b'{"states": [{}]}', b'{"states": 7}', b"\xff\xfe", b"null", None):
        (folder / "state.json").unlink()
        if content is not None:
            (folder / "state.json").write_bytes(content)
        found, (problem,) = load_state(folder)
        assert found["training"]["epoch"] == newest == 2, content
        assert str(problem).startswith(f"{folder / 'state.json'}: ")
    began, *_, finished = resume(folder, device="cpu")
    assert began.notes == (f"{problem}; going on from the newest whole state",)
    assert len(json.loads((folder / "state.json").read_text())["states"]) == len(states(folder)) == 2
    assert finished.result["epochs"] == 3


def test_a_state_that_leads_out_of_its_folder_is_neither_read_nor_removed(copy_of):
    folder = copy_of("two")
    outside = folder.parent / "state-00000099-0123abcd.pt"
    outside.write_bytes(b"precious")
    entry = {"file": f"../{outside.name}", "sha256": "0123abcd" + "0" * 56, "step": 99}
    (folder / "state.json").write_text(json.dumps({"states": [entry] * 5}))
    began = next(resume(folder, device="cpu"))
    assert "is no name of a state" in began.notes[0]
    assert outside.read_bytes() == b"precious"


def test_a_state_of_another_run_is_refused_whether_it_is_named_or_not(copy_of):
    for named in (True, False):
        folder, other = copy_of("one"), copy_of("other")
        states(folder)[0].unlink()
        for path in states(other):
            shutil.copy(path, folder)
        if named:
            shutil.copy(other / "state.json", folder)
        else:
            (folder / "state.json").unlink()
        said = refusal(resume(folder, device="cpu")).splitlines()
        assert said[-3:-1] == [f"{path}: refused: it is the state of another run" for path in states(folder)]
        shutil.rmtree(folder.parent)
        shutil.rmtree(other.parent)


def test_a_run_folder_goes_on_wherever_it_is_moved_to(copy_of):
    moved = copy_of("two").rename(copy_of("one").parent / "my best run")
    assert next(resume(moved, device="cpu")).run == moved


def put_state(folder: Path, content: object) -> None:
    """Makes that the only state of the run, under the name that it should have."""
    for path in (*states(folder), folder / "state.json"):
        path.unlink()
    buffer = io.BytesIO()
    torch.save(content, buffer)
    digest = hashlib.sha256(buffer.getvalue()).hexdigest()
    (folder / f"state-00000001-{digest[:8]}.pt").write_bytes(buffer.getvalue())


CHANGES: dict[str, Callable[[dict], object]] = {
    "nothing in it": lambda state: [state.pop(key) for key in [*state] if key != "run"],
    "no training": lambda state: state.pop("training"),
    "no weights": lambda state: state["training"].pop("network"),
    "an epoch that is a word": lambda state: state["training"].update(epoch="first"),
    "a weight less": lambda state: state["training"]["network"].popitem(),
    "a weight of another shape": lambda state: state["training"]["network"].update({first(state): torch.zeros(3)}),
    "a weight that is a number": lambda state: state["training"]["network"].update({first(state): 3}),
    # torch's fused kernels write as many numbers as the parameter has, wherever the moment ends.
    "a moment of another shape": lambda state: state["training"]["optimizer"]["state"][0].update(exp_avg=torch.ones(1)),
    "a step that is a row": lambda state: state["training"]["optimizer"]["state"][0].update(step=torch.ones(5)),
    "moments of nobody": lambda state: state["training"]["optimizer"]["state"].update({99: {"exp_avg": torch.ones(1)}}),
    "no parameters": lambda state: state["training"]["optimizer"]["param_groups"].clear(),
    "no scoreboard": lambda state: state.pop("scoreboard"),
    "a scoreboard that is a tensor": lambda state: state.update(scoreboard=torch.ones(2)),
}


def first(state: dict) -> str:
    return next(iter(state["training"]["network"]))


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_whole_state_with_something_else_in_it_is_refused_in_a_line(copy_of, change):
    folder = copy_of("one")
    content = torch.load(states(folder)[0], weights_only=True)
    change(content)
    put_state(folder, content)
    for line in refusal(resume(folder, device="cpu")).splitlines():
        assert line.startswith(str(folder))


DAMAGE = (b"", b"{", b"[]", b"\xff\xfe\x00", b"null", b"[" * 100_000, b'{"id": 1, "classes": 2, "epoch": "three"}')


@pytest.mark.parametrize("name", ["environment.json", "resolved.toml", "metrics.jsonl", "model.safetensors"])
def test_any_other_damaged_file_of_the_run_is_told_in_a_line_before_anything_is_trained(copy_of, name):
    folder = copy_of("two")
    for content in DAMAGE:
        if (name, content) in (("metrics.jsonl", b""), ("resolved.toml", b"null")):
            continue
        (folder / name).write_bytes(content)
        lines = refusal(resume(folder, device="cpu")).splitlines()
        assert all(line.startswith((str(folder / name), name)) for line in lines), (content, lines)


def test_epochs_without_a_record_are_told_and_cost_nothing_else(copy_of):
    folder = copy_of("two")
    (folder / "metrics.jsonl").unlink()
    began = next(resume(folder, device="cpu"))
    note = "the records of 2 epochs are missing, and will be from the curves"
    assert (began.notes, began.first_epoch) == ((f"{folder / 'metrics.jsonl'}: {note}",), 2)


@pytest.mark.parametrize("name", ["environment.json", "resolved.toml", "classes.json", "model.safetensors"])
def test_scoring_a_run_with_a_damaged_file_is_refused_in_a_line(copy_of, name):
    folder = copy_of("two")
    for content in DAMAGE:
        (folder / name).write_bytes(content)
        said = refusal(score(folder, device="cpu"))
        assert all(str(folder / name) in line for line in said.splitlines()), (content, said)
    (folder / name).unlink()
    (folder / name).mkdir()
    refusal(score(folder, device="cpu"))


def test_weights_of_another_kind_are_no_weights_of_the_run(copy_of):
    folder = copy_of("two")
    state = torch.load(states(folder)[0], weights_only=True)
    name = first(state)
    own = {key: tensor.contiguous() for key, tensor in state["training"]["network"].items()}
    for other in ({name: own[name].int()}, {name: torch.zeros(1)}, {"more": torch.zeros(1)}):
        (folder / "model.safetensors").write_bytes(save({**own, **other}))
        (line,) = refusal(score(folder, device="cpu")).splitlines()
        assert line.endswith(f"is not the one of the run any more; see '{next(iter(other))}'")


def test_weights_of_another_network_are_refused_before_training_goes_on(copy_of):
    folder = copy_of("two")
    (folder / "model.safetensors").write_bytes(save({"more": torch.zeros(1)}))
    before = sorted(path.name for path in folder.iterdir())
    assert "not the weights of this run's network" in refusal(resume(folder, device="cpu"))
    assert sorted(path.name for path in folder.iterdir() if path.name != "lock") == [n for n in before if n != "lock"]


@pytest.mark.parametrize("steps", [[{}], [5], [{"epoch": 1, "step": 1}]])
def test_damaged_records_of_steps_are_refused_before_training_goes_on(copy_of, steps):
    folder = copy_of("two")
    (folder / "nonfinite.json").write_text(json.dumps({"steps": steps}))
    assert "nonfinite.json: damaged: expected epoch, step and skipped" in refusal(resume(folder, device="cpu"))
