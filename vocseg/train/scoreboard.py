"""Which epoch's weights a run keeps, and when it has waited long enough for better ones."""

from typing import Any

from vocseg.train.early_stopping import Best, better_is_less
from vocseg.train.loop import Epoch


class Scoreboard:
    """Looks at the figures of each epoch.

    Args:
        keep: the metric whose best epoch is kept, or "last".
        patience: (metric, mode, epochs): stop where the metric has not become better for so many epochs; None: never.

    Attributes:
        stopped: early.
        trained: the network holds the weights that were kept, no more those that were trained last.
    """

    def __init__(self, keep: str, patience: tuple[str, str, int] | None = None):
        self.keep = keep
        self.best = Best(better_is_less(keep))
        self.stopper: Best | None = None
        if patience is not None:
            self.stop_metric, mode, self.patience = patience
            self.stopper = Best(better_is_less(self.stop_metric, mode))
        self.stopped = False
        self.trained = False

    def update(self, epoch: Epoch) -> bool:
        """Takes an epoch's figures, and says whether its weights are the ones to keep so far."""
        if self.stopper is not None:
            value = epoch.metric(self.stop_metric)
            if value is not None:
                self.stopper.update(value, epoch.epoch)
                # Only validated weights can be kept: with evaluate.every above 1 the next validation is waited for.
                self.stopped = self.stopper.waited >= self.patience and epoch.miou is not None
        if epoch.miou is None:
            return False
        if self.keep == "last":
            self.best.value, self.best.epoch = epoch.miou, epoch.epoch
            return True
        value = epoch.metric(self.keep)
        assert value is not None  # a validated epoch has every figure
        return self.best.update(value, epoch.epoch)

    def state(self) -> dict[str, Any]:
        return {"best": self.best.state(), "stopper": self.stopper and self.stopper.state(), "stopped": self.stopped}

    def load(self, state: dict[str, Any]) -> None:
        self.best.load(state["best"])
        if self.stopper is not None:
            self.stopper.load(state["stopper"])
        self.stopped = state["stopped"]
