"""One image through U-Net on a ResNet-34 at 512 x 512: vocseg's predictor, compiled too, and others' ways on the CPU.

    python benchmarks/predict.py [--rounds 5] [--images 4] [--no-compile]

Each side is a process of its own with the settings that it makes for itself, and they take turns. vocseg begins with
uint8 pixels, the others with normalised ones; all end with logits. Condition: on a network that was trained for it, on
scenes of `quickstart`, the mIoU of vocseg's bf16 is within 0.1 point of float32's. Prints one JSON object: milliseconds
of wall-clock and CPU time an image, how many times as long as vocseg each takes, and the share of labels that differ
from those of float32, on a network of random weights and so at its largest. Also what `vocseg predict` takes for a
folder of photographs of 500 x 375, files read and written, beside the network alone.
"""

import sys
import tempfile
import time
from pathlib import Path
from typing import Any

SIDE, CLASSES = 512, 21
SIDES = (
    "vocseg",
    "vocseg compiled",
    "vocseg fp32",
    "torch fp32",
    "torch bf16 autocast",
    "torch bf16 autocast channels_last",
    "onnxruntime fp32",
    "openvino fp32",
    "openvino bf16",
)


def network() -> Any:
    """U-Net with weights and statistics that keep values in a usual range."""
    import segmentation_models_pytorch as smp
    import torch

    torch.manual_seed(0)
    module = smp.Unet("resnet34", encoder_weights=None, classes=CLASSES)
    module(torch.randn(2, 3, 64, 64))  # statistics that fit the weights, so that no layer saturates
    return module.eval()


def image() -> Any:
    import numpy as np

    return np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)


def normalization() -> Any:
    from vocseg.network import choose_normalization

    return choose_normalization("imagenet", ((0, 0, 0), (1, 1, 1)))


def predictor(precision: str, compiled: bool = False) -> Any:
    """As `vocseg.build.Network.predictor` makes it."""
    import torch

    from vocseg.device import Placement
    from vocseg.evaluate.faster import InferenceCopy
    from vocseg.evaluate.inference import Predictor

    placement = Placement(torch.device("cpu"), precision)
    module = placement.place(network())
    if compiled or precision == "bf16":
        module = InferenceCopy(module, compiled=compiled, say=lambda text: sys.exit(text))
    return Predictor(module, placement, 32, normalization())


def build(side: str) -> tuple[Any, dict[str, Any]]:
    if side.startswith("vocseg"):
        from vocseg.process import prepare_process

        prepare_process()
    call = _call(side)
    begun = time.perf_counter()
    logits = call()
    figures = {"first_image_seconds": round(time.perf_counter() - begun, 1)}
    import torch

    with torch.inference_mode():
        exact = network()(normalization()(torch.from_numpy(image())[None]).contiguous())
    differ = (torch.as_tensor(logits).float().argmax(1) != exact.argmax(1)).float().mean()
    return call, figures | {"labels_that_differ": round(float(differ), 4)}


def _call(side: str) -> Any:
    if side.startswith("vocseg"):
        ready = predictor("fp32" if "fp32" in side else "bf16", "compiled" in side)
        pixels = image()
        return lambda: ready.logits(pixels)
    import torch

    images = normalization()(torch.from_numpy(image())[None]).contiguous()
    module = network()
    if side.startswith("onnxruntime"):
        import onnxruntime

        with tempfile.TemporaryDirectory() as folder:
            path = f"{folder}/network.onnx"
            torch.onnx.export(module, (images,), path, dynamo=False, input_names=["images"])
            session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        given = {"images": images.numpy()}
        return lambda: session.run(None, given)[0]
    if side.startswith("openvino"):
        import openvino

        hint = {"INFERENCE_PRECISION_HINT": "bf16" if "bf16" in side else "f32", "PERFORMANCE_HINT": "LATENCY"}
        ready = openvino.Core().compile_model(openvino.convert_model(module, example_input=images), "CPU", hint)
        array = images.numpy()
        return lambda: ready(array)[0]
    if "channels_last" in side:
        module, images = (thing.to(memory_format=torch.channels_last) for thing in (module, images))

    def call() -> Any:
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled="bf16" in side):
            return module(images)

    return call


def trained_miou(folder: Path) -> dict[str, float]:
    """Trains `quickstart` for an epoch or two, and scores it in both precisions."""
    import torch

    from vocseg.build import build_network, open_split
    from vocseg.device import Placement
    from vocseg.evaluate.scores import scores
    from vocseg.evaluate.validation import evaluate
    from vocseg.recipe.prepare import load_recipe
    from vocseg.run import start
    from vocseg.runs.checkpoint import load_tensors

    recipe, _ = load_recipe("quickstart", overrides=("train.epochs=2", "data.images=1200"))
    *_, finished = start(recipe, out=folder, device="cpu")
    split = open_split(recipe, recipe.data.settings.val)
    trained = build_network(recipe, len(split.classes), pretrained=False)
    trained.module.load_state_dict(load_tensors(finished.run / "model.safetensors"))
    found = {}
    for precision in ("fp32", "bf16"):
        placement = Placement(torch.device("cpu"), precision)
        placement.place(trained.module).eval()
        scoring = evaluate(trained.predictor(placement), split, lambda logits, target: torch.zeros(()))
        while True:
            try:
                next(scoring)
            except StopIteration as end:
                found[precision] = scores(end.value.matrix).miou
                break
    return found


def folder_of_photographs(folder: Path, images: int = 16) -> dict[str, float]:
    """Milliseconds an image: `vocseg predict` from files to files, and the network alone on what they hold."""
    from measure import alternate, draw_voc

    from vocseg.data.images import read_image
    from vocseg.evaluate.confusion import class_map
    from vocseg.recipe.prepare import load_recipe
    from vocseg.run import start
    from vocseg.score import predict

    unet = ("model.name=smp", "model.decoder=Unet", "model.encoder=resnet34", "train.precision=bf16", "train.epochs=1")
    recipe, _ = load_recipe("quickstart", overrides=(*unet, "data.images=8", "data.val_images=2"))
    *_, finished = start(recipe, out=folder, device="cpu")
    photographs = draw_voc(folder, images) / "VOCdevkit" / "VOC2007" / "JPEGImages"
    pixels = [read_image(path) for path in sorted(photographs.iterdir())]
    alone = predictor("bf16")
    sides = {
        "files to files": lambda: list(predict(finished.run, [photographs], out=folder / "masks", device="cpu")),
        "network alone": lambda: [class_map(*alone.look(image)) for image in pixels],
    }
    seconds = alternate(sides, 3, time.perf_counter)
    return {name: round(1000 * value / images, 1) for name, value in seconds.items()}


def main() -> None:
    from measure import arguments, environment, report, times_faster
    from workers import take_turns

    from vocseg.process import prepare_process

    options = arguments(__doc__, 5, images=4, no_compile=False)
    prepare_process()
    with tempfile.TemporaryDirectory() as folder:
        miou = trained_miou(Path(folder))
        photographs = folder_of_photographs(Path(folder))
    if abs(miou["fp32"] - miou["bf16"]) > 0.001 or miou["fp32"] < 0.2:
        sys.exit(f"mIoU in fp32 and bf16: {miou}")

    import torch
    from torch.utils.flop_counter import FlopCounterMode

    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        network()(torch.randn(1, 3, SIDE, SIDE))
    sides = [side for side in SIDES if not (options.no_compile and "compiled" in side)]
    times, told, missing = take_turns(__file__, sides, rounds=options.rounds, calls=options.images)
    wall = {side: found["ms"] for side, found in times.items()}
    report(
        **environment("segmentation-models-pytorch", "onnxruntime", "openvino"),
        trained_miou={precision: round(100 * value, 3) for precision, value in miou.items()},
        gflop_an_image=round(counter.get_total_flops() / 1e9),
        images={
            side: found | told[side] | {"gflop_per_second": round(counter.get_total_flops() / 1e6 / found["ms"])}
            for side, found in times.items()
        },
        times_as_long_as_vocseg=times_faster(wall, "vocseg"),
        milliseconds_a_photograph=photographs,
        missing=missing,
    )


if __name__ == "__main__":
    if "--worker" in sys.argv:
        from workers import serve

        serve(build)
    else:
        main()
