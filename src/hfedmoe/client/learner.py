"""What a client trains with: its model, its rows and the settings. It is the same in every round."""

from collections.abc import Sequence
from dataclasses import dataclass

from hfedmoe.config import MethodConfig, RunConfig, TrainConfig
from hfedmoe.data.encoding import Encoder
from hfedmoe.data.example import Example
from hfedmoe.method.methods import METHODS
from hfedmoe.method.row import Method
from hfedmoe.moe.model import MoEModel


@dataclass(frozen=True)
class Learner:
    """What one client needs for training."""

    model: MoEModel
    examples: Sequence[Example]
    """The client's own rows."""
    encoder: Encoder
    config: RunConfig
    number: int
    """The client's number. Its random numbers are derived from the run's seed, this number and the round."""

    @property
    def train(self) -> TrainConfig:
        """Section [train]."""
        return self.config.train

    @property
    def settings(self) -> MethodConfig:
        """Section [method]."""
        return self.config.method

    @property
    def method(self) -> Method:
        """The method's entry in `METHODS`."""
        return METHODS[self.config.method.name]

    @property
    def logit_adjustment(self) -> float:
        """Strength of the correction for label frequencies: the setting, else the method's own where it can apply."""
        if self.train.logit_adjustment or self.method.label_correction is None or not self.encoder.first_token_only:
            return self.train.logit_adjustment
        return self.method.label_correction(self.settings)

    @property
    def seed(self) -> int:
        """The run's seed."""
        return self.config.seed
