"""A whole run with mmengine's Runner and mmsegmentation's pipeline, preprocessor and metric, at whole_run.py's setting.

As configs/_base_ of mmsegmentation set them (VOC 2012, 20k schedule), but for the setting; PhotoMetricDistortion and
the limit on a crop's largest class are left out, since no one else has them.
"""

# ruff: noqa: E402 - mmseg is told about mmcv before it is imported

import sys
import types
from typing import Any

import mmcv


class Missing(types.ModuleType):
    """mmcv-lite has no compiled operators; mmseg imports them, and nothing here uses them."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)


sys.modules.setdefault("mmcv._ext", Missing("mmcv._ext"))
mmcv.__version__ = min(mmcv.__version__, "2.1.0")  # mmseg 1.2.2 asks for mmcv < 2.2

import torch
from mmengine.registry import MODELS
from mmengine.runner import Runner
from mmseg.models.segmentors import BaseSegmentor
from mmseg.utils import register_all_modules
from peer_setting import CLASSES, LONG, MEAN, SHORT, STD, VOID, Unet, finish, setting
from torch import Tensor, nn

del sys.modules["mmcv._ext"]  # mmengine looks for it, to know that this is mmcv-lite


@MODELS.register_module()
class Segmentor(BaseSegmentor):
    """The network in mmsegmentation's clothes."""

    def __init__(self, data_preprocessor: Any, val_loss: bool):
        super().__init__(data_preprocessor)
        self.network = Unet()
        self.align_corners, self.out_channels = False, CLASSES  # asked for when logits become classes
        self.losses: list[float] | None = [] if val_loss else None

    def loss(self, inputs: Tensor, data_samples: list[Any]) -> dict[str, Tensor]:
        truth = torch.stack([sample.gt_sem_seg.data for sample in data_samples]).squeeze(1)
        return {"loss_ce": nn.functional.cross_entropy(self.network(inputs), truth, ignore_index=VOID)}

    def predict(self, inputs: Tensor, data_samples: list[Any]) -> list[Any]:
        logits = self.network(inputs)
        if self.losses is not None:
            truth = data_samples[0].gt_sem_seg.data
            self.losses.append(nn.functional.cross_entropy(logits, truth.long(), ignore_index=VOID).item())
        return self.postprocess_result(logits, data_samples)

    def extract_feat(self, inputs: Tensor) -> Tensor:
        return self.network(inputs)

    def encode_decode(self, inputs: Tensor, batch_data_samples: list[Any]) -> Tensor:
        return self.network(inputs)

    def _forward(self, inputs: Tensor, data_samples: Any = None) -> Tensor:
        return self.network(inputs)


def main() -> None:
    asked = setting()
    register_all_modules()
    load = [{"type": "LoadImageFromFile"}, {"type": "LoadAnnotations"}]
    size = (asked.crop, asked.crop)
    augment = [
        {"type": "RandomResize", "scale": (LONG, SHORT), "ratio_range": (0.5, 2.0), "keep_ratio": True},
        {"type": "RandomCrop", "crop_size": size},
        {"type": "RandomFlip", "prob": 0.5},
    ]

    def loader(split: str, steps: list[Any], batch: int, sampler: dict[str, Any], **more: Any) -> dict[str, Any]:
        dataset = {
            "type": "PascalVOCDataset",
            "data_root": str(asked.root / "VOCdevkit/VOC2007"),
            "ann_file": f"ImageSets/Segmentation/{split}.txt",
            "data_prefix": {"img_path": "JPEGImages", "seg_map_path": "SegmentationClass"},
            "pipeline": [*steps, {"type": "PackSegInputs"}],
        }
        workers = {"num_workers": asked.workers, "persistent_workers": asked.workers > 0}
        return {"batch_size": batch, **workers, "sampler": sampler, "dataset": dataset, **more}

    train = loader("train", load + augment, asked.batch, {"type": "InfiniteSampler", "shuffle": True})
    names = (asked.root / "VOCdevkit/VOC2007/ImageSets/Segmentation/train.txt").read_text().split()
    steps = len(names) // asked.batch
    metric = {"type": "IoUMetric", "iou_metrics": ["mIoU"]}
    optimizer = {"type": "AdamW", "lr": asked.lr, "weight_decay": asked.decay}
    runner = Runner(
        model={
            "type": "Segmentor",
            "val_loss": asked.val_loss,
            "data_preprocessor": {
                "type": "SegDataPreProcessor",
                "mean": [255 * value for value in MEAN],
                "std": [255 * value for value in STD],
                "bgr_to_rgb": True,
                "pad_val": 0,
                "seg_pad_val": VOID,
                "size": size,
                "test_cfg": {"size_divisor": 1},
            },
        },
        work_dir=str(asked.out),
        train_dataloader=train,
        val_dataloader=loader("val", load, 1, {"type": "DefaultSampler", "shuffle": False}),
        train_cfg={"type": "IterBasedTrainLoop", "max_iters": steps, "val_interval": steps},
        val_cfg={"type": "ValLoop"},
        val_evaluator=metric,
        optim_wrapper={"type": "OptimWrapper", "optimizer": optimizer},
        param_scheduler={"type": "PolyLR", "power": 0.9, "begin": 0, "end": steps, "by_epoch": False},
        default_hooks={
            "logger": {"type": "LoggerHook", "interval": 50, "log_metric_by_epoch": False},
            "checkpoint": {"type": "CheckpointHook", "by_epoch": False, "interval": steps},
        },
        env_cfg={"mp_cfg": {"mp_start_method": "fork", "opencv_num_threads": 0}, "dist_cfg": {"backend": "gloo"}},
        default_scope="mmseg",
        experiment_name="whole_run",
    )
    runner.train()
    losses = runner.model.losses
    miou = runner.message_hub.get_scalar("val/mIoU").current() / 100
    finish(miou, sum(losses) / len(losses) if losses else None)


if __name__ == "__main__":
    main()
