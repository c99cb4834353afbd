"""Sides of a measurement in processes of their own, which take turns: for what is set once a process.

A script that measures so calls `serve` when it is started with `--worker`, and `take_turns` otherwise.
"""

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from subprocess import DEVNULL, PIPE
from typing import Any

Times = dict[str, float]


def serve(build: Callable[[str], tuple[Callable[[], Any], dict[str, Any]]]) -> None:
    """Runs the side that the command line names: one call for each line that comes in, the time it took for each out.

    Args:
        build: from a side to what is called, and figures of it that are told once.
    """
    try:
        run, figures = build(sys.argv[sys.argv.index("--worker") + 1])
        run()
        run()
    except ImportError as error:
        print(json.dumps({"missing": f"not installed: {error}"}), flush=True)
        return
    print(json.dumps(figures), flush=True)
    for line in sys.stdin:
        wall, cpu = [], []
        for _ in range(int(line)):
            moments = time.perf_counter(), time.process_time()
            run()
            wall.append(time.perf_counter() - moments[0])
            cpu.append(time.process_time() - moments[1])
        print(json.dumps([wall, cpu]), flush=True)


def take_turns(
    script: str,
    sides: Sequence[str],
    *,
    rounds: int,
    calls: int,
    environments: Mapping[str, Mapping[str, str]] | None = None,
    arguments: Sequence[str] = (),
) -> tuple[dict[str, Times], dict[str, dict[str, Any]], dict[str, str]]:
    """Starts a worker a side; each round lets every one of them make some calls, while the others wait.

    Returns:
        By side the median milliseconds of a call and the median milliseconds of CPU; what each side told at its start;
        and what each side that is missing lacks.
    """
    found: dict[str, tuple[list[float], list[float]]] = {}
    told, missing, workers = {}, {}, {}
    with ExitStack() as stack:
        for side in sides:
            environment = os.environ | dict((environments or {}).get(side, {}))
            command = [sys.executable, "-W", "ignore", script, "--worker", side, *arguments]
            worker = subprocess.Popen(command, stdin=PIPE, stdout=PIPE, stderr=DEVNULL, text=True, env=environment)
            stack.callback(worker.kill)
            said = _next_json(worker, side)
            if "missing" in said:
                missing[side] = said["missing"]
            else:
                told[side], workers[side], found[side] = said, worker, ([], [])
        for _ in range(rounds):
            for side, worker in workers.items():
                assert worker.stdin is not None
                worker.stdin.write(f"{calls}\n")
                worker.stdin.flush()
                for kept, new in zip(found[side], _next_json(worker, side), strict=True):
                    kept += new
    times = {
        side: {"ms": round(1000 * statistics.median(wall), 2), "cpu_ms": round(1000 * statistics.median(cpu), 2)}
        for side, (wall, cpu) in found.items()
    }
    return times, told, missing


def _next_json(worker: subprocess.Popen, side: str) -> Any:
    """The next line that is JSON; libraries print others."""
    assert worker.stdout is not None
    for line in worker.stdout:
        try:
            return json.loads(line)
        except ValueError:
            continue
    raise SystemExit(f"the worker of '{side}' ended without a word; try: {sys.argv[0]} --worker '{side}'")
