"""The best value of a metric so far, and when to give up waiting for a better one."""

from dataclasses import dataclass


def better_is_less(metric: str, mode: str = "auto") -> bool:
    """Whether a metric is to be minimised. `auto` minimises losses and maximises all else."""
    return mode == "min" if mode != "auto" else metric.endswith("loss")


@dataclass
class Best:
    """The best value of a metric over validations.

    Attributes:
        less: whether smaller values are better.
        value: the best so far; None before the first.
        epoch: the epoch it was seen in.
        waited: updates since then.
    """

    less: bool
    value: float | None = None
    epoch: int = 0
    waited: int = 0

    def update(self, value: float, epoch: int) -> bool:
        """Takes a new value, and says whether it is the best so far. NaN never is, unless nothing else was seen."""
        comparable = value == value
        improved = self.value is None or (
            comparable and (self.value != self.value or (value < self.value if self.less else value > self.value))
        )
        if improved:
            self.value, self.epoch, self.waited = value, epoch, 0
        else:
            self.waited += 1
        return improved

    def state(self) -> dict[str, float | int | None]:
        return {"value": self.value, "epoch": self.epoch, "waited": self.waited}

    def load(self, state: dict) -> None:
        self.value, self.epoch, self.waited = state["value"], state["epoch"], state["waited"]
