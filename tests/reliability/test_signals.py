"""Ctrl-C, SIGTERM and a closed terminal, at any moment of a run: it is saved, and its exit code says so.

A second Ctrl-C or SIGTERM ends it at once.
"""

import os
import random
import signal
import sys
import threading
import time
from dataclasses import replace

import pytest

from vocseg.errors import Interrupted
from vocseg.train.signals import stop_request

SIGNALS = (signal.SIGTERM, signal.SIGINT, *([signal.SIGHUP] if hasattr(signal, "SIGHUP") else []))
PROMPTLY = 4.0  # seconds, on a busy machine; a step and a save of the tiny network take a hundredth of one

SLOW = '''"""Networks that keep their first step for themselves."""

import ctypes
import time

from torch import nn

from vocseg import architecture


class Waiting(nn.Module):
    def __init__(self, num_classes, wait):
        super().__init__()
        self.head = nn.Conv2d(3, num_classes, 1)
        self.wait = wait

    def forward(self, images):
        open("stepping", "w").close()
        self.wait()
        return self.head(images)


@architecture
def asleep(num_classes: int) -> nn.Module:
    """Waits where Python hears a signal."""
    return Waiting(num_classes, lambda: time.sleep(60))


def deadlock():
    mutex, lock = ctypes.create_string_buffer(64), ctypes.CDLL(None).pthread_mutex_lock
    lock(mutex)
    lock(mutex)


@architecture
def stuck(num_classes: int) -> nn.Module:
    """Waits where Python hears nothing, as inside a long step of torch."""
    return Waiting(num_classes, deadlock)
'''


def ended_by(number, ended):
    """Whether it is what a shell shows as 128 + number: before torch is there, the system itself ends the process."""
    return ended.code in (128 + number, -number)


def test_signals_are_given_back():
    before = [signal.getsignal(number) for number in SIGNALS]
    with stop_request() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.signal_number == signal.SIGTERM
        with pytest.raises(Interrupted, match="stopped early"), stop.at_once("stopped early"):
            raise AssertionError("it began")
    assert [signal.getsignal(number) for number in SIGNALS] == before
    assert threading.active_count() == len([t for t in threading.enumerate() if t.name != "vocseg-signals"])


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="this system has no such signal")
def test_a_terminal_that_ends_twice_is_no_second_signal():
    with stop_request() as stop:
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGHUP)
            time.sleep(0.1)
        time.sleep(3)  # in which the thread that watches would end this process
        assert stop.signal_number == signal.SIGHUP


def test_a_signal_that_the_process_was_started_to_ignore_stays_ignored():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with stop_request() as stop:
            os.kill(os.getpid(), signal.SIGINT)
            assert stop.signal_number == 0
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_outside_the_main_thread_signals_are_left_alone():
    def look():
        with stop_request() as stop:
            found.append((stop.signal_number, [signal.getsignal(number) for number in SIGNALS]))

    found = []
    thread = threading.Thread(target=look)
    thread.start()
    thread.join()
    assert found == [(0, [signal.getsignal(number) for number in SIGNALS])]


def interrupted_at_random(forks, whole, case, draw=False):
    """Sends a signal at a random moment of a run and resumes it. Gives whether it was in time."""
    rng = random.Random(case)
    number, expected, out = rng.choice(SIGNALS), whole(draw=draw), f"case-{case}"
    ended = forks.start(out=out, draw=draw, signals=[(rng.uniform(0, expected.seconds), number)])
    hit = ended.code != 0
    if hit:
        assert ended_by(number, ended), ended.said
        assert ended.since_signal < PROMPTLY
        folder = forks.folder(out)
        if folder is None:
            ended = forks.start(out=out, draw=draw)
        elif not (folder / "result.json").exists():
            assert f"--resume {folder}" in ended.said
            ended = forks.resume(folder, draw=draw)
        else:  # the system ended it a moment after its own end
            ended = replace(ended, code=0)
    assert ended.code == 0, ended.said
    assert forks.left(forks.folder(out)) == expected.left
    return hit


def test_a_signal_at_a_random_moment_saves_the_run(forks, whole):
    hits = [interrupted_at_random(forks, whole, case, draw=case == 0) for case in range(6)]
    assert any(hits)


@pytest.mark.long
def test_60_signals_at_random_moments_save_the_run(forks, whole):
    assert sum(interrupted_at_random(forks, whole, case, draw=case % 3 == 0) for case in range(60)) > 40


@pytest.mark.parametrize(
    ("number", "event", "which"),
    [
        (signal.SIGTERM, "Started", {}),
        (SIGNALS[-1], "Step", {"epoch": 1, "step": 1}),
        (signal.SIGTERM, "Scored", {"done": 2}),
        (signal.SIGINT, "Epoch", {"epoch": 5}),
    ],
)
def test_a_signal_is_heard_in_every_phase(forks, whole, number, event, which):
    ended = forks.start(at={"event": event, "is": which, "signal": number})
    assert ended.code == 128 + number, ended.said
    folder = forks.folder()
    assert f"all saved; go on with: vocseg run --resume {folder}" in ended.said
    assert forks.resume(folder).code == 0
    assert forks.left(folder) == whole().left


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_while_the_network_is_built_leaves_nothing(forks, number):
    ended = forks.start("model.build_seconds=30.0", signals=[(1.0, number)])
    assert ended.code == 128 + number, ended.said
    assert ended.since_signal < PROMPTLY
    assert "stopped before training began; nothing was written" in ended.said
    assert not (forks.home / "runs").exists()


def test_a_signal_while_a_resumed_network_is_built_changes_nothing(forks, whole):
    slow = ("model.build_seconds=1.5",)
    forks.start(*slow, at={"event": "Step", "is": {"step": 2}, "signal": signal.SIGTERM})
    folder = forks.folder()
    before = forks.files(folder)
    ended = forks.resume(folder, signals=[(0.7, signal.SIGTERM)])
    assert ended.code == 143, ended.said
    assert f"stopped before training went on; go on with: vocseg run --resume {folder}" in ended.said
    assert forks.files(folder) == before


def test_a_signal_while_pictures_are_drawn_leaves_them_to_be_drawn(forks, whole):
    curves = str(forks.home / "runs/*/*/curves.png")
    ended = forks.start(draw=True, once=curves, signals=[(0.0, signal.SIGTERM)])
    assert ended.code == 143, ended.said
    assert ended.since_signal < PROMPTLY
    folder = forks.folder()
    assert not (folder / "examples.png").exists()
    assert f"vocseg run --resume {folder}" in ended.said
    assert forks.resume(folder, draw=True).code == 0
    assert (folder / "examples.png").exists()
    assert forks.left(folder) == whole().left


@pytest.mark.parametrize("numbers", [(signal.SIGTERM, signal.SIGTERM), (signal.SIGINT, signal.SIGINT)])
@pytest.mark.parametrize("network", ["asleep", "stuck"])
def test_a_second_signal_ends_the_run_at_once(forks, numbers, network):
    if network == "stuck" and sys.platform != "linux":
        pytest.skip("the deadlock is of glibc's making")
    stepping = forks.home / "stepping"
    (forks.home / "plugins" / "slow.py").write_text(SLOW.replace('"stepping"', repr(str(stepping))))
    ended = forks.start(
        f"model.name={network}",
        "optimizer.encoder_lr=1.0",
        once=str(stepping),
        signals=[(0.1, numbers[0]), (0.5, numbers[1])],
    )
    assert ended.code == 128 + numbers[1], ended.said
    assert ended.since_signal < PROMPTLY
    said = ended.said.splitlines()[1:]  # after what it began with
    if network == "asleep":
        assert said[-1].startswith("stopped at once; no state was saved yet in ")
    else:
        assert said == ["stopped at once"]
