"""A training step on the CPU: vocseg's default, compiled and in fp32, against what peers do without a flag.

    python benchmarks/step.py [--rounds 5] [--steps 2] [--no-compile]

U-Net on a ResNet-34, 224 x 224, batch 8, AdamW, cross-entropy. Each side is a process of its own with the settings that
it makes for itself, and they take turns. Condition: over 100 steps of a small batch, bf16 follows the loss curve of
fp32 no worse than fp32 does itself once its first weights are rounded to bf16, within a factor of two. Prints one JSON
object: milliseconds of wall-clock and CPU time a step, how many times as long as vocseg each takes, what matrix
products and convolutions reach on this machine, and how much of that the steps do.
"""

import statistics
import sys
import time
from typing import Any

SIDE, BATCH, CLASSES = 224, 8, 21
SIDES = ("vocseg", "vocseg compiled", "vocseg fp32", "torch defaults", "lightning", "accelerate")


def network() -> Any:
    import segmentation_models_pytorch as smp
    import torch

    torch.manual_seed(0)
    return smp.Unet("resnet34", encoder_weights=None, classes=CLASSES)


def batch(side: int = SIDE, images: int = BATCH) -> tuple[Any, Any]:
    """Noise that can be learnt: uint8 pixels (b, h, w, 3), and as classes how bright blocks of them are."""
    import torch

    generator = torch.Generator().manual_seed(1)
    levels = torch.randint(0, CLASSES, (images, side // 8, side // 8), generator=generator)
    labels = levels.repeat_interleave(8, 1).repeat_interleave(8, 2)
    noise = torch.randint(0, 12, (images, side, side, 3), generator=generator)
    return (labels[..., None] * 11 + noise).to(torch.uint8), labels.to(torch.uint8)


class Repeated:
    """One batch, as often as it is asked for."""

    def __init__(self, batch: tuple[Any, Any], steps: int):
        self.batch, self.steps = batch, steps

    def __len__(self) -> int:
        return self.steps

    def epochs(self, *_: Any, **__: Any) -> Any:
        for _ in range(self.steps):
            yield self.batch


def vocseg_steps(module: Any, precision: str, compiled: bool = False, steps: int = 10**9, data: Any = None) -> Any:
    """vocseg's own loop with its own loss and optimizer; yields after each step."""
    import torch

    from vocseg.components.losses import cross_entropy
    from vocseg.components.optimizers import adamw
    from vocseg.device import Placement
    from vocseg.network import choose_normalization
    from vocseg.train.loop import Step, Training, train

    placement = Placement(torch.device("cpu"), precision)
    placement.place(module)
    training = Training(
        network=module,
        backbone=getattr(module, "encoder", None),
        batches=Repeated(data or batch(), steps),  # type: ignore[arg-type]
        loss=cross_entropy(CLASSES, lambda: torch.zeros(CLASSES)),
        optimizer=adamw([{"params": list(module.parameters())}]),
        schedule=lambda step: 1.0,
        placement=placement,
        stride=32,
        normalization=choose_normalization("imagenet", ((0, 0, 0), (1, 1, 1))),
        epochs=1,
        seed=0,
        compile=compiled,
    )
    return (event for event in train(training, None) if isinstance(event, Step))  # type: ignore[arg-type]


def peers_batch() -> tuple[Any, Any]:
    """What peers' loaders give: images normalised, in float32 NCHW, and int64 labels."""
    from vocseg.network import choose_normalization

    pixels, labels = batch()
    return choose_normalization("imagenet", ((0, 0, 0), (1, 1, 1)))(pixels).contiguous(), labels.long()


def build(side: str) -> tuple[Any, dict[str, Any]]:
    if side.startswith("vocseg"):
        from vocseg.process import prepare_process

        prepare_process()
        steps = vocseg_steps(network(), "fp32" if "fp32" in side else "bf16", compiled="compiled" in side)
        begun = time.perf_counter()
        next(steps)
        return lambda: next(steps), {"first_step_seconds": round(time.perf_counter() - begun, 1)}
    import torch
    import torch.nn.functional as F

    images, labels = peers_batch()
    if side == "lightning":
        return _lightning(images, labels), {}
    module = network().train()
    optimizer = torch.optim.AdamW(module.parameters(), 1e-3)
    backward = torch.Tensor.backward
    if side == "accelerate":
        from accelerate import Accelerator

        accelerator = Accelerator(cpu=True)
        module, optimizer = accelerator.prepare(module, optimizer)
        backward = accelerator.backward

    def step() -> None:
        loss = F.cross_entropy(module(images), labels, ignore_index=255)
        backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        loss.item()  # as all of them do, for their logs

    return step, {}


def _lightning(images: Any, labels: Any) -> Any:
    """Lightning's own loop, in a thread that goes on by one step whenever it is asked to."""
    import threading

    import lightning
    import torch
    import torch.nn.functional as F

    may, done = threading.Semaphore(0), threading.Semaphore(0)

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.module = network()

        def training_step(self, given: Any, index: int) -> Any:
            loss = F.cross_entropy(self.module(given[0]), given[1], ignore_index=255)
            self.log("loss", loss, prog_bar=True)
            return loss

        def on_train_batch_end(self, *_: Any) -> None:
            done.release()
            may.acquire()

        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(self.parameters(), 1e-3)

    class Same(torch.utils.data.IterableDataset):
        def __iter__(self) -> Any:
            while True:
                yield images, labels

    trainer = lightning.Trainer(max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False)
    loader = torch.utils.data.DataLoader(Same(), batch_size=None)
    threading.Thread(target=trainer.fit, args=(Module(), loader), daemon=True).start()

    done.acquire()  # the first step begins by itself

    def step() -> None:
        may.release()
        done.acquire()

    return step


def loss_curves() -> dict[str, list[float]]:
    """100 steps at 64 x 64, batch 4: in fp32, in bf16, and in fp32 from weights rounded to bf16."""
    import torch

    curves = {}
    for name in ("fp32", "bf16", "fp32 from rounded weights"):
        module = network()
        if "rounded" in name:
            with torch.no_grad():
                for parameter in module.parameters():
                    parameter.copy_(parameter.bfloat16())
        steps = vocseg_steps(module, "bf16" if name == "bf16" else "fp32", data=batch(64, 4))
        curves[name] = [float(step.loss) for _, step in zip(range(100), steps, strict=False)]
    return curves


def distance(one: list[float], other: list[float]) -> float:
    """The mean difference of two curves, each averaged over ten steps, as a share of what was learnt."""
    smooth = [[statistics.mean(curve[i : i + 10]) for i in range(0, 100, 10)] for curve in (one, other)]
    apart = statistics.mean(abs(a - b) for a, b in zip(*smooth, strict=True))
    return apart / (one[0] - min(one))


def ceilings() -> dict[str, float]:
    """GFLOP/s of large matrix products and of a convolution of 128 channels."""
    import torch
    from measure import alternate

    convolution = torch.nn.Conv2d(128, 128, 3, padding=1, bias=False).to(memory_format=torch.channels_last)
    images = torch.randn(8, 128, 56, 56).contiguous(memory_format=torch.channels_last)
    operations = {"matmul": 2 * 2048**3, "convolution": 2 * 8 * 56**2 * 128**2 * 9}
    sides = {}
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        a, b = (torch.randn(2048, 2048).to(dtype) for _ in range(2))
        x, layer = images.to(dtype), torch.nn.Conv2d(128, 128, 3, padding=1, bias=False)
        layer.load_state_dict(convolution.state_dict())
        layer = layer.to(dtype=dtype, memory_format=torch.channels_last)  # type: ignore[call-overload]
        sides[f"matmul {name}"] = lambda a=a, b=b: a @ b
        sides[f"convolution {name}"] = lambda x=x, layer=layer: layer(x)
    with torch.inference_mode():
        seconds = alternate(sides, 7, time.perf_counter)
    return {name: round(operations[name.split()[0]] / value / 1e9) for name, value in seconds.items()}


def main() -> None:
    from measure import arguments, environment, report, times_faster
    from workers import take_turns

    from vocseg.process import prepare_process

    options = arguments(__doc__, 5, steps=2, no_compile=False)
    prepare_process()

    import torch
    from torch.utils.flop_counter import FlopCounterMode

    curves = loss_curves()
    noise = distance(curves["fp32"], curves["fp32 from rounded weights"])
    apart = distance(curves["fp32"], curves["bf16"])
    if apart > 2 * noise:
        sys.exit(f"the curves are {apart:.4f} apart in bf16, and {noise:.4f} from rounding the first weights")
    with FlopCounterMode(display=False) as counter:
        images, labels = peers_batch()
        torch.nn.functional.cross_entropy(network()(images), labels).backward()
    operations = counter.get_total_flops() / 1e9

    sides = [side for side in SIDES if not (options.no_compile and "compiled" in side)]
    times, told, missing = take_turns(__file__, sides, rounds=options.rounds, calls=options.steps)
    report(
        **environment("segmentation-models-pytorch", "lightning", "accelerate"),
        loss_apart={"bf16 from fp32": round(apart, 4), "fp32 from rounded weights": round(noise, 4)},
        last_loss={name: round(curve[-1], 4) for name, curve in curves.items()},
        gflop_a_step=round(operations),
        ceilings_gflop_per_second=ceilings(),
        steps={
            side: found | told[side] | {"gflop_per_second": round(operations / found["ms"] * 1000)}
            for side, found in times.items()
        },
        times_as_long_as_vocseg=times_faster({side: found["ms"] for side, found in times.items()}, "vocseg"),
        vocseg_fp32_times_faster=times_faster({side: found["ms"] for side, found in times.items()}, "vocseg fp32"),
        missing=missing,
    )


if __name__ == "__main__":
    if "--worker" in sys.argv:
        from workers import serve

        serve(build)
    else:
        main()
