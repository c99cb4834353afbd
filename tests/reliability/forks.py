"""A process that has imported torch and vocseg, and forks one child for each command line it is given.

So a run begins within milliseconds, and can be killed at any moment of it. Reads JSON lines, answers each with one:

{"arguments": those of `vocseg`, "log": file for what it says, "draw": whether pictures are drawn, which takes longer
 than all the rest of a tiny run, "signals": [[seconds since the fork, or since `once` matched a file, number], …],
 "once": glob or "", "at": {"event": …, "is": {…}, "signal": number} or null, "forget": item of the state, or ""}
{"group": of the child's processes, "code": as `subprocess` has it, "seconds": …, "since_signal": the last one's}
"""

import gc
import glob
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch._dynamo  # optimizers import it when they are made, which takes a second

import vocseg.cli.reporters
import vocseg.cli.run
import vocseg.run
from vocseg.cli import main as vocseg_main
from vocseg.train.loop import Training
from vocseg.train.scoreboard import Scoreboard

LONGEST = 180.0  # seconds that a run may take; most take one


def main() -> None:
    gc.freeze()  # so that no child copies all memory by looking for garbage in it
    print("ready", flush=True)
    for line in sys.stdin:
        command = json.loads(line)
        begun = time.monotonic()
        child = os.fork()
        if not child:
            os.setsid()  # a group of its own, so that nobody who is left of it goes unseen
            os._exit(run(command))
        print(json.dumps({"group": child, **watch(child, begun, command)}), flush=True)


def watch(child: int, begun: float, command: dict[str, Any]) -> dict[str, Any]:
    """Sends the signals when it is time, and waits for the end."""
    sent = begun
    clock = None if command["once"] else begun
    signals = command["signals"]
    while True:
        ended, status = os.waitpid(child, os.WNOHANG)
        now = time.monotonic()
        if ended:
            code = os.waitstatus_to_exitcode(status)
            return {"code": code, "seconds": now - begun, "since_signal": now - sent}
        if clock is None and glob.glob(command["once"]):
            clock = now
        if clock is not None and signals and now - clock >= signals[0][0]:
            os.kill(child, int(signals.pop(0)[1]))
            sent = now
        if now - begun > LONGEST:
            os.kill(child, signal.SIGKILL)
        time.sleep(0.0005)


def run(command: dict[str, Any]) -> int:
    """The command line, in the child."""
    log = os.open(command["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(log, 1)
    os.dup2(log, 2)
    if not command["draw"]:
        vocseg.run.write_pictures = lambda *given, **named: None
    if command["forget"]:
        forget(command["forget"])
    if command["at"]:
        for name in ("start", "resume"):
            setattr(vocseg.run, name, signalling(getattr(vocseg.run, name), **command["at"]))
    sys.argv = ["vocseg", *command["arguments"]]
    try:
        vocseg_main()
    except SystemExit as end:
        return int(end.code or 0)
    except BaseException:
        traceback.print_exc()
        return 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
    return 0


def signalling(
    events_of: Callable[..., Iterator[Any]], event: str, signal: int, **more: Any
) -> Callable[..., Iterator]:
    """The same events; the first one that is as described is accompanied by a signal."""

    def follow(*given: Any, **named: Any) -> Iterator[Any]:
        sent = False
        for found in events_of(*given, **named):
            is_it = type(found).__name__ == event and all(getattr(found, k) == v for k, v in more["is"].items())
            if is_it and not sent:
                sent = True
                os.kill(os.getpid(), signal)
            yield found

    return follow


def forget(item: str) -> None:
    """Makes a resumed run go on with that item as it is at the start of a run, as if no state had held it."""
    load, load_board = Training.load, Scoreboard.load

    def load_without(training: Training, state: dict[str, Any]) -> None:
        fresh = training.state()
        network = {k: v for k, v in fresh["network"].items() if ("running" in k or "num_b" in k) == (item == "buffers")}
        if item in ("weights", "buffers"):
            state = {**state, "network": {**state["network"], **network}}
        elif item in fresh:
            state = {**state, item: fresh[item]}
        load(training, state)

    def load_board_without(board: Any, state: dict[str, Any]) -> None:
        load_board(board, {**state, item: board.state()[item]} if item in state else state)

    Training.load, Scoreboard.load = load_without, load_board_without  # type: ignore[method-assign]


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
    os._exit(0)  # what was imported and never used is not to be taken apart, which some of it complains about
