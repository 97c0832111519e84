"""Weights & Biases. Its key, address and mode come from its own variables, such as WANDB_API_KEY and WANDB_MODE."""

import os

from hfedmoe.report.tracking.figures import Figures
from hfedmoe.report.tracking.start import FINISHED, Start, Status

os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # read when the library is imported

import wandb


class Run:
    """A run of W&B, found again by its id. Nothing is collected but what is sent here."""

    store: str | None = None

    def __init__(self, start: Start) -> None:
        settings = wandb.Settings(
            console="off",
            silent=True,
            disable_git=True,
            disable_code=True,
            disable_job_creation=True,
            x_disable_meta=True,
            x_disable_machine_info=True,
            x_disable_stats=True,
            x_save_requirements=False,
            program="hfedmoe",
        )
        self._run = wandb.init(
            project=start.project,
            id=start.key,
            name=start.name,
            group=start.group,
            tags=start.tags,
            config=start.config,
            dir=os.environ.get("WANDB_DIR") or start.folder,
            resume="allow",
            settings=settings,
        )
        self.place = self._run.url or self._run.dir.removesuffix("files")
        # Online, W&B knows how far the run is.
        self.last = self._run.step - 1 if self._run.resumed else None

    def log(self, round: int, figures: Figures) -> None:
        """As `child.Tracker`."""
        self._run.log(figures, step=round, commit=True)

    def gains(self, round: int, figures: Figures) -> None:
        """As `child.Tracker`: in the summary, because W&B takes no more for a step that is complete."""
        self._run.summary.update(figures)

    def close(self, status: Status) -> None:
        """As `child.Tracker`."""
        self._run.finish(exit_code=0 if status == FINISHED else 1)


def open_run(start: Start) -> Run:
    """Begin or go on."""
    return Run(start)
