"""How a client reports that it could not do its part of a round.

A simulated client sends its reason as text. A real device never sends text, which could contain rows, cells, labels and
file names of its owner. It sends a code from `CODES` and a count. The text stays in its own log, and the server turns
the code into text.
"""

from dataclasses import dataclass

OUT_OF_MEMORY, OUT_OF_TIME, TOO_SMALL, REFUSED, FAILED = (
    "out_of_memory",
    "out_of_time",
    "too_small",
    "refused",
    "failed",
)
STATUSES = (OUT_OF_MEMORY, OUT_OF_TIME, TOO_SMALL, REFUSED, FAILED)
"""The status in such a reply, shown without underscores. TOO_SMALL: no room for the experts that the method needs."""

OWN_DATA, SETTINGS, REQUEST, VERSION, DISK, FAULT = "own_data", "settings", "request", "version", "disk", "fault"
BASE, TOKENIZER = "base", "tokenizer"
POLICY_MODEL, POLICY_STEPS, POLICY_BATCH, POLICY_EXPERTS, POLICY_TUNE, POLICY_ROUND, POLICY_TASK = (
    "policy_model",
    "policy_steps",
    "policy_batch",
    "policy_experts",
    "policy_tune",
    "policy_round",
    "policy_task",
)
"""The run asks for more than the device's owner allows (`client.policy`)."""
OTHER_TASK, MANY_TASKS = "other_task", "many_tasks"
"""The server asks about another task than before in this run, or about too many in all (`fleet.asked`)."""
CODES = {
    OUT_OF_MEMORY: "ran out of memory with {count} experts",
    OUT_OF_TIME: "ran out of time with {count} experts",
    TOO_SMALL: "has no room for the experts that the method needs",
    OWN_DATA: "its own rows do not fit the run; its log says which",
    SETTINGS: "cannot take part with its settings, model or data; its log says why",
    REQUEST: "refuses what the server asked; its log says why",
    DISK: "cannot write what it remembers, perhaps because its disk is full; its log says where",
    BASE: "its base model is not the server's: other weights, another seed or another upcycling; give both the same "
    "checkpoint and the same model settings",
    TOKENIZER: "its tokenizer is not the server's; give both the same checkpoint",
    VERSION: "has another version of hfedmoe; its log says which",
    POLICY_MODEL: "does not allow the run's model (model.name)",
    POLICY_STEPS: "allows fewer steps per round than the run asks for (train.steps)",
    POLICY_BATCH: "allows no batches as small as the run's (train.batch_size)",
    POLICY_EXPERTS: "allows fewer experts than the run needs (method.name, model.name)",
    POLICY_TUNE: "does not go on training for itself: its owner allows no steps for it, or fewer than the run asks for "
    "(evaluation.tune_steps)",
    POLICY_ROUND: "was asked for the same round more often than its owner's limits on steps or seconds allow",
    POLICY_TASK: "allows no other columns or labels than its owner says (data.text, data.label and so on, data.labels)",
    OTHER_TASK: "took part in this run with other columns, labels or settings of rows ([data]); begin a new run",
    MANY_TASKS: "was asked about too many different tasks; its owner must start it again",
    FAULT: "failed; its log says why",
}
"""What a code of a real device means; {count} is the number that comes with it.

OWN_DATA has none: a server that names columns and labels as it likes could count who is among the rows.
"""


@dataclass(frozen=True)
class Trouble:
    """Why a client has no update: `status` is one of `STATUSES`, `reason` one line."""

    status: str
    reason: str
    code: str = ""
    """One of `CODES`, which a real device sends instead of the reason."""
    count: int = 0
