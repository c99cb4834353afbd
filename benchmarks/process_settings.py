"""What the settings of `vocseg.process` are worth, each by itself, on a quiet machine and on a busy one.

    python benchmarks/process_settings.py [--rounds 5] [--busy]

Training steps in bf16 of two networks, the small one of `quickstart` and U-Net on a ResNet-34, in processes that take
turns and differ in their settings alone. `--busy` keeps one core busy meanwhile, as a browser or another run would.
Condition: the first loss is the same whatever the settings. Prints one JSON object: milliseconds of wall-clock and CPU
time a step, and how many times as long as with vocseg's settings each takes.
"""

import os
import subprocess
import sys
from typing import Any

SIDES: dict[
    str, dict[str, str]
] = {  # environments; vocseg leaves alone what stands in them, memory if anything of it does
    "vocseg": {},
    "torch defaults": {"GOMP_SPINCOUNT": "300000", "MALLOC_ARENA_MAX": "16"},
    "spinning 300,000 times, as by default": {"GOMP_SPINCOUNT": "300000"},
    "sleeping at once": {"OMP_WAIT_POLICY": "PASSIVE"},
    "memory as by default": {"MALLOC_ARENA_MAX": "16"},
    "transparent huge pages too": {"THP_MEM_ALLOC_ENABLE": "1"},
}
NETWORKS = {"mini_unet": (96, 40), "unet_resnet34": (224, 2)}  # side of the images, steps a turn


def build(side: str) -> tuple[Any, dict[str, Any]]:
    from vocseg.process import prepare_process

    prepare_process()
    import torch
    from step import batch, network, vocseg_steps

    from vocseg.plugins import discover

    name = sys.argv[-1]
    torch.manual_seed(0)
    small = name == "mini_unet"
    module = discover().get("architecture", name).build({"num_classes": 21}, {}) if small else network()
    steps = vocseg_steps(module, "bf16", data=batch(NETWORKS[name][0]))
    return lambda: next(steps), {"first_loss": round(float(next(steps).loss), 3)}


def main() -> None:
    from measure import arguments, environment, report, times_faster
    from workers import take_turns

    options = arguments(__doc__, 5, busy=False)
    for name in {name for side in SIDES.values() for name in side} & os.environ.keys():
        sys.exit(f"{name} is set: unset it, so that only the sides differ")
    other = subprocess.Popen([sys.executable, "-c", "while True: pass"]) if options.busy else None
    figures = {}
    try:
        for name, (_, calls) in NETWORKS.items():
            times, told, _ = take_turns(
                __file__, tuple(SIDES), rounds=options.rounds, calls=calls, environments=SIDES, arguments=(name,)
            )
            losses = {side: said["first_loss"] for side, said in told.items()}
            if len({*losses.values()}) != 1:
                sys.exit(f"the sides disagree: {losses}")
            wall = {side: found["ms"] for side, found in times.items()}
            figures[name] = {"steps": times, "times_as_long_as_vocseg": times_faster(wall, "vocseg")}
    finally:
        if other is not None:
            other.kill()
    report(**environment(), busy=options.busy, **figures)


if __name__ == "__main__":
    if "--worker" in sys.argv:
        from workers import serve

        serve(build)
    else:
        main()
