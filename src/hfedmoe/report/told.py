"""What a run says before its first round: which rows measure what, what its loss means, and what comes after it."""

import math

from hfedmoe.config import EvaluationConfig, RunConfig
from hfedmoe.data.kept import MOST_CLIENTS
from hfedmoe.data.task import Task
from hfedmoe.server.keeper import DECIDING


def held_out_words(task: Task, watched: int, settings: EvaluationConfig) -> str:
    """Which held-out rows are measured when, and which decide the best checkpoint."""
    when = f", every {settings.every} rounds," if settings.every else ""
    text = f"held out: {len(task.test)} rows measure the model before{when} and after the run"
    others = f"{watched} others are watched after every round"
    if watched >= DECIDING:
        return f"{text}; {others} and decide which checkpoint is best"
    last = "so the last checkpoint counts as best"
    if watched:
        return f"{text}; {others}, too few to decide anything (that takes {DECIDING}), {last}"
    return f"{text}; no others are watched, {last}"


def loss_words(task: Task, trained: str) -> str:
    """What the loss compares, which is the same for clients and for the model of all.

    Args:
        trained: `train.loss`.
    """
    among, guess = "all words", ""
    if trained == "choices":
        among = "the choices"
        guess = f", {math.log(len(task.labels)):.2f} is guessing" if task.labels else ""
    setting = f'train.loss = "{trained}"'
    return f"loss: of the right answer among {among} ({setting}), a mean over rows; 0 is best{guess}"


def tuning_words(config: RunConfig) -> str:
    """What `evaluation.tune_steps` costs."""
    steps, rounds = config.evaluation.tune_steps, config.evaluation.tune_steps / config.train.steps
    return (
        f"evaluation.tune_steps: after the run every client that took part trains {steps} steps more for itself; this "
        f"takes about as long as {rounds:.3g} round{'' if rounds == 1 else 's'} of all clients"
    )


def personal_words(config: RunConfig) -> str:
    """What `evaluation.personal_every` does and costs."""
    settings = config.evaluation
    when = "every round" if settings.personal_every == 1 else f"every {settings.personal_every} rounds"
    text = f"evaluation.personal_every: after {when} its clients measure the model on rows that they keep back"
    if config.clients.count > MOST_CLIENTS:
        return f"{text}; of more than {MOST_CLIENTS} clients none keeps any back"
    return f"{text}, up to {settings.own_rows} each; they get the model once more for it"


def alone_words(sites: int) -> str:
    """What `evaluation.alone` costs."""
    return (
        f"evaluation.alone: after the run the {sites} sites train again, each by itself, with as many steps; this "
        "takes about as long as the run"
    )
