import pytest
import torch

from vocseg.errors import EnvironmentFault
from vocseg.runs.checkpoint import load_state, load_tensors, save_state, save_tensors, state_saver


def state(value):
    return {"training": {"network": {"weight": torch.full((3,), float(value))}, "epoch": value}, "best": None}


def test_the_newest_state_is_the_one_that_is_loaded(tmp_path):
    for step in (10, 20, 30):
        save_state(tmp_path, state(step), step)
    found, problems = load_state(tmp_path)
    assert found["training"]["epoch"] == 30
    assert torch.equal(found["training"]["network"]["weight"], torch.full((3,), 30.0))
    assert problems == []


def test_only_two_states_are_kept(tmp_path):
    for step in (10, 20, 30):
        save_state(tmp_path, state(step), step)
    assert sorted(p.name[:15] for p in tmp_path.glob("*.pt")) == ["state-00000020-", "state-00000030-"]


def test_saving_the_same_step_again_replaces_it(tmp_path):
    for value in (1, 2):
        save_state(tmp_path, state(value), 10)
    assert load_state(tmp_path)[0]["training"]["epoch"] == 2


@pytest.mark.parametrize("position", [0, 100, -1])
def test_one_flipped_bit_is_noticed_and_the_state_before_is_used(tmp_path, position):
    for step in (10, 20):
        save_state(tmp_path, state(step), step)
    (newest,) = tmp_path.glob("state-00000020-*.pt")
    data = bytearray(newest.read_bytes())
    data[position] ^= 1
    newest.write_bytes(data)
    found, problems = load_state(tmp_path)
    assert found["training"]["epoch"] == 10
    assert "damaged" in str(problems[0])


def test_without_a_whole_state_every_reason_is_named(tmp_path):
    save_state(tmp_path, state(10), 10)
    next(tmp_path.glob("*.pt")).unlink()
    with pytest.raises(EnvironmentFault, match=r"(?s)state-00000010-\w+.pt: cannot be read.*no state to resume from"):
        load_state(tmp_path)


def test_weights_round_trip_with_shared_and_strided_tensors(tmp_path):
    shared = torch.arange(6.0).reshape(2, 3)
    weights = {"a": shared, "b": shared, "t": shared.t()}
    save_tensors(tmp_path / "model.safetensors", weights, {"recipe": "x"})
    found = load_tensors(tmp_path / "model.safetensors")
    assert all(torch.equal(found[name], tensor) for name, tensor in weights.items())


def test_damaged_weights_are_one_line(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"not weights")
    with pytest.raises(EnvironmentFault, match="damaged"):
        load_tensors(tmp_path / "model.safetensors")


def test_a_saved_state_is_what_it_was_when_it_was_saved(tmp_path):
    with state_saver(tmp_path) as saver:
        changing = state(10)
        saver.save(changing, 10)
        changing["training"]["network"]["weight"].fill_(-1)
        changing["training"]["epoch"] = -1
    found, _ = load_state(tmp_path)
    assert found["training"]["epoch"] == 10
    assert torch.equal(found["training"]["network"]["weight"], torch.full((3,), 10.0))


def test_a_state_is_written_only_if_its_copy_is_found_worth_it(tmp_path):
    with state_saver(tmp_path) as saver:
        for step in (10, 20):
            saver.save(state(step), step, only_if=lambda copy: copy["training"]["epoch"] == 10)
    assert load_state(tmp_path)[0]["training"]["epoch"] == 10


def test_a_state_that_could_not_be_written_is_an_error_of_the_next_save_and_of_the_end(tmp_path):
    gone = tmp_path / "gone"
    with state_saver(gone) as saver:
        saver.save(state(10), 10)
        with pytest.raises(EnvironmentFault, match="state-00000010"):
            saver.save(state(20), 20)
    with pytest.raises(EnvironmentFault, match="state-00000030"), state_saver(gone) as saver:
        saver.save(state(30), 30)
