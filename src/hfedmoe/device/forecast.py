"""The planner's results: what a training step takes, how many experts fit, and what would have to change."""

from dataclasses import dataclass

KINDS = (
    "framework",
    "embeddings_head",
    "attention",
    "other_base",
    "routers",
    "experts",
    "adapters",
    "gradients",
    "optimizer",
    "activations",
    "logits",
    "buffers",
)
"""`other_base` is norms, dense feed-forward blocks, shared experts and tables; `buffers` is messages and workspace."""


@dataclass(frozen=True)
class Forecast:
    """Memory and work of a client's process that holds some experts."""

    residents: list[int]
    """Experts per layer."""
    kinds: dict[str, int]
    """Bytes by kind (`KINDS`) at the moment when their sum is largest."""
    flops: int
    """Of one training step; a multiplication and an addition count as two."""
    loading_peak: int
    """Peak bytes while the model is read and the experts are made resident."""
    bootstrap_peak: int
    """Peak bytes of a forward pass over all experts, with at most as many in memory as are resident (`bootstrap =
    "stream"`)."""
    bytes_down: int
    bytes_up: int
    """Of the messages of a round in which all resident experts are trained."""
    beside: int
    """Bytes of the device's other processes."""

    @property
    def num_residents(self) -> int:
        """Over all layers."""
        return sum(self.residents)

    @property
    def peak(self) -> int:
        """Peak bytes while training."""
        return sum(self.kinds.values())

    @property
    def highest(self) -> int:
        """Peak bytes at any time: loading, bootstrap or training."""
        return max(self.peak, self.loading_peak, self.bootstrap_peak)

    def needed(self, margin: float) -> int:
        """Bytes that a device must give: the peak times a margin, and its other processes."""
        return round(self.highest * margin) + self.beside

    def seconds_per_step(self, flops_per_second: float) -> float:
        """Time of a step at a sustained speed."""
        return self.flops / flops_per_second


@dataclass(frozen=True)
class Fit:
    """The most experts that fit into some memory."""

    memory_bytes: int
    residents: int
    """Experts over all layers; 0 if nothing fits."""
    forecast: Forecast
    """With these residents; if nothing fits, with the fewest that can train (top-k per layer)."""
    needed_bytes: int
    """What `forecast` needs, safety margin and the device's other processes included."""

    @property
    def fits(self) -> bool:
        """Whether the budget holds at least the fewest experts that can train."""
        return self.residents > 0


@dataclass(frozen=True)
class Change:
    """Changed settings with which the fewest experts that can train fit."""

    settings: dict[str, object]
    """By their names in the configuration, for `--set`."""
    needed_bytes: int
    """Safety margin included."""

    def __str__(self) -> str:
        return ", ".join(f"{key} = {_toml(value)}" for key, value in self.settings.items())


def _toml(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return f'"{value}"' if isinstance(value, str) else str(value)
