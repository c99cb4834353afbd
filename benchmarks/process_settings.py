"""What `vocseg.process.prepare_process` is worth: training steps with and without it, alternating, in fresh processes.

    python benchmarks/process_settings.py [--rounds 3] [--steps 6] [--busy]

`--busy` keeps one core busy meanwhile, as a browser or another run would. Prints one JSON object: the median step of
each side in milliseconds and their ratio. Both sides must reach the same loss, or there is no result.
"""

import argparse
import json
import statistics
import subprocess
import sys

STEP = """
import sys, time
if sys.argv[1] == "prepared":
    from vocseg.process import prepare_process
    prepare_process()
import torch
from vocseg.plugins import discover
torch.manual_seed(0)
parameters = {"decoder": "FPN", "encoder": "tu-tf_efficientnet_lite0"}
network = discover().get("architecture", "smp").build({"num_classes": 21}, parameters)
network.to(memory_format=torch.channels_last).train()
optimizer = torch.optim.AdamW(network.parameters(), 1e-3, fused=True)
images = torch.randn(8, 3, 256, 256).contiguous(memory_format=torch.channels_last)
target = torch.randint(0, 21, (8, 256, 256))
times = []
for _ in range(int(sys.argv[2])):
    begun = time.perf_counter()
    logits = network(images).permute(0, 2, 3, 1).reshape(-1, 21)
    loss = torch.nn.functional.cross_entropy(logits, target.reshape(-1))
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    times.append(time.perf_counter() - begun)
print(loss.item(), *times[1:])
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--busy", action="store_true")
    arguments = parser.parse_args()
    other = subprocess.Popen([sys.executable, "-c", "while True: pass"]) if arguments.busy else None
    times: dict[str, list[float]] = {"plain": [], "prepared": []}
    losses = set()
    try:
        for _ in range(arguments.rounds):
            for side, found in times.items():
                command = [sys.executable, "-W", "ignore", "-c", STEP, side, str(arguments.steps)]
                loss, *steps = map(
                    float, subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
                )
                losses.add(round(loss, 3))
                found += steps
    finally:
        if other is not None:
            other.kill()
    if len(losses) != 1:
        sys.exit(f"the sides disagree: {sorted(losses)}")
    milliseconds = {side: 1000 * statistics.median(found) for side, found in times.items()}
    ratio = milliseconds["plain"] / milliseconds["prepared"]
    print(json.dumps({**milliseconds, "times_faster": ratio, "busy": arguments.busy, "loss": losses.pop()}))


if __name__ == "__main__":
    main()
