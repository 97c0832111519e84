"""How the limit of experts that a client learned by running out of memory grows again.

What failed once may fit later: another program took the memory then, or the rows of that round were long. So after
`PATIENCE` good rounds the limit grows by one expert per layer, and so on until the budget. If a round fails after that,
the limit shrinks as always (`client.attempt.smaller`), and the next growth waits for twice as many good rounds.
"""

from dataclasses import dataclass

PATIENCE = 3


@dataclass
class Regrowth:
    """When the limit grows next."""

    good: int = 0
    """Rounds that went well since the limit changed."""
    patience: int = PATIENCE
    """Good rounds after which it grows."""
    grew: bool = False
    """Whether it grew since a round failed."""

    def failed(self) -> None:
        """Memory ran out."""
        self.patience *= 2 if self.grew else 1
        self.good, self.grew = 0, False

    def trained(self) -> bool:
        """A round went well; returns whether the limit grows now."""
        self.good += 1
        if self.good < self.patience:
            return False
        self.good, self.grew = 0, True
        return True
