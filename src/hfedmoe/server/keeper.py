"""Write a federation's progress to its run folder, and read it when the run is resumed."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import closing, contextmanager
from typing import Any

import torch
from torch import Tensor

from hfedmoe.errors import UserError
from hfedmoe.events import ClientRound, ClientTotals, Evaluation, Participant, SiteGain, Watcher
from hfedmoe.method.methods import METHODS
from hfedmoe.method.row import PAST, Past
from hfedmoe.method.usage import FederationUsage, HeldCounts
from hfedmoe.runs.experts import of_round
from hfedmoe.runs.folder import RunFolder
from hfedmoe.server.evaluation import Metrics
from hfedmoe.server.records import RoundRecord, trained_loss
from hfedmoe.wire.messages import pack_bits, unpack_bits

DECIDING = 50
"""Fewest rows that decide which checkpoint is best."""
SaveClients = Callable[[], dict[str, Tensor]]
Completed = Callable[[dict[str, Any], Iterable[ClientRound]], None]
"""Takes the line of a round in metrics.jsonl, without its clients, and these."""


class Keeper:
    """A federation's progress: sums in memory; lines, expert rows and checkpoints in the run folder.

    Args:
        folder: of the run; None keeps only sums in memory (a server app without a folder).
        save_clients: returns what the clients of this process remember, if it changed since the last call; saved with
            each checkpoint. None: the clients are in other processes.
        from_round: round of the checkpoint from which the run continues.
        continued_by: the command that continues the run; None: `hfedmoe resume`, if its clients are in this process.

    Raises:
        UserError: experts.npy is damaged, or lacks rows that method.bootstrap = "prior" needs.
    """

    def __init__(
        self,
        folder: RunFolder | None,
        save_clients: SaveClients | None = None,
        from_round: int | None = None,
        continued_by: str | None = None,
    ) -> None:
        self.folder = folder
        # A run can only be continued with its clients' memory: in its checkpoint, or on the devices.
        self._continued_by = continued_by or ("hfedmoe resume" if save_clients is not None else None)
        self._save_clients = save_clients or (dict)
        self._last_saved = from_round
        self.gained: Callable[[list[SiteGain]], None] = lambda _: None
        """Told what each site gained, when that is written."""
        self.completed: Completed = lambda *_: None
        """Told of every round when its checkpoint is written: no resumed run does it again."""
        self.scores: list[Evaluation] = []
        self.totals: dict[int, ClientTotals] = {}
        """Of the clients that took part so far."""
        self._who: dict[int, Participant] = {}
        self.gains: list[SiteGain] = []
        """What each site gained, at the end of the run."""
        self.usage = FederationUsage()
        """Of the federation, over all complete rounds."""
        self.held = HeldCounts()
        """How often clients held each expert, over all complete rounds."""
        self._past: dict[int, deque[tuple[float, bytes]]] = {}
        """Of each client's last rounds, its loss and the bits of what it held."""
        if folder is not None:
            self._recall(folder)

    def _recall(self, folder: RunFolder) -> None:
        rows = folder.read_expert_rows()
        method = METHODS[folder.config.method.name]
        counted = folder.config.method.bootstrap == "prior" or method.needs_usage or method.assign is not None
        for line in folder.iter_rounds():
            if "all" in line["evaluation"]:
                self.scores.append(_evaluation(line["round"], line["evaluation"]["all"]))
            examples = {row["client"]: row["weight"] for row in line["clients"] if row["status"] == "ok"}
            losses = {row["client"]: row.get("last_loss") for row in line["clients"]}
            if counted and examples and not line.get("failed"):
                for client, usage, held in _rows_of(folder, rows, line["round"], examples):
                    self.usage.add(usage, examples[client])
                    self.held.add(held)
                    self._note(client, losses[client], [held])
            for row in line["clients"] if "bytes_down" in line else ():
                self._count(ClientRound.from_json(row))

    def took(self, client: int, usage: list[Tensor], held: list[Tensor], weight: int, loss: float | None) -> None:
        """Count a client's valid update: its usage float32 [E] and what it held bool [E], per layer; its last loss."""
        self.usage.add(torch.cat(usage), weight)
        self.held.add(torch.cat(held))
        self._note(client, loss, held)

    def past(self, client: int, num_experts: list[int]) -> list[Past]:
        """A client's last rounds, the latest last."""
        return [Past(loss, unpack_bits(bits, num_experts)) for loss, bits in self._past.get(client, ())]

    def _note(self, client: int, loss: float | None, held: list[Tensor]) -> None:
        if loss is not None:
            self._past.setdefault(client, deque(maxlen=PAST)).append((loss, pack_bits(held)))

    @contextmanager
    def recording(self, round: int, num_experts: list[int], tau: float) -> Iterator[RoundRecord]:
        """The record of a round, until the block ends."""
        with closing(RoundRecord(round, num_experts, tau)) as log:
            yield log

    @contextmanager
    def taking_rows(self, log: RoundRecord) -> Iterator[None]:
        """Collect the clients' expert vectors through the record; they are kept if the block ends without an error."""
        if self.folder is None:
            yield
            return
        with self.folder.expert_rows(log.round, log.num_experts) as log.add_row:
            yield

    @property
    def resume_hint(self) -> str:
        """The end of an error message: how to continue the run; empty if that is not possible."""
        if self.folder is None or self._continued_by is None:
            return ""
        return f"; `{self._continued_by} {self.folder.path}` continues from there"

    def introduce(self, clients: Mapping[int, Participant]) -> None:
        """Remember who takes part, by number, for the last table and the report."""
        news = {client: who for client, who in clients.items() if self._who.get(client) != who}
        self._who |= news
        if news and self.folder is not None:
            self.folder.note_clients(news)

    def name_of(self, client: int) -> str:
        """A client's name."""
        return self._who[client].name if client in self._who else f"client {client}"

    def save_start(self, tensors: dict[str, Tensor], metrics: Metrics) -> None:
        """Round 0: the model before any training."""
        line: dict[str, Any] = {
            "round": 0,
            **trained_loss(metrics),
            "accuracy": metrics.accuracy,
            "macro_f1": metrics.macro_f1,
        }
        line |= {"evaluation": {"all": metrics.figures()}, "clients": [], "short": False}
        self._append(line)
        self._note_answers(0, metrics)
        self.scores.append(_evaluation(0, metrics.figures()))
        self._checkpoint(0, tensors, None, None)
        self.completed(line, [])

    def save_round(
        self,
        log: RoundRecord,
        tensors: dict[str, Tensor],
        watched: Metrics | None,
        whole: Metrics | None,
    ) -> None:
        """Save a complete round. The checkpoint comes last: it shows that the rest is there."""
        line = log.line(watched, whole)
        self._append(line, self._counted(log))
        if whole is not None:
            self._note_answers(log.round, whole)
            self.scores.append(_evaluation(log.round, whole.figures()))
        # Decision: the best checkpoint is chosen on the watched rows, which the final evaluation never uses. Few rows
        # decide nothing: with 24 the accuracy of a round is known to 20 points, and the last round counts as best.
        self._checkpoint(log.round, tensors, watched or whole, whole)
        self.completed(line, log.clients())

    def failed(self, log: RoundRecord) -> None:
        """Save a failed round: it gets a line, but no checkpoint."""
        self._append({**log.line(None, None), "failed": True}, self._counted(log))

    def final_totals(self) -> list[ClientTotals]:
        """The totals of every client that completed a round, by number."""
        known = [(client, done) for client, done in sorted(self.totals.items()) if client in self._who]
        for client, done in known:
            done.name = self._who[client].name
        return [done for _, done in known if done.rounds]

    def show_totals(self, watcher: Watcher) -> None:
        """The last tables: what every client did, the first and last evaluation, and what each site gained."""
        before, after = (self.scores[0], self.scores[-1]) if self.scores else (None, None)
        watcher.final_table(self.final_totals(), before, after)
        if self.gains:
            watcher.site_gains(self.gains)

    def knows_sites(self, round: int) -> bool:
        """Whether it is written down already what each site had gained after a round; then `gains` has it."""
        lines = () if self.folder is None else self.folder.iter_rounds()
        known = next((line["sites"] for line in lines if line["round"] == round and "sites" in line), None)
        self.gains = self.gains if known is None else [SiteGain.from_json(entry) for entry in known]
        return known is not None

    def save_sites(self, round: int, gains: list[SiteGain]) -> None:
        """Write down what each site had gained after a round."""
        self.gains = gains
        if self.folder is not None:
            self.folder.amend_round(round, {"sites": [gain.to_json() for gain in gains]})
        self.gained(gains)

    def _count(self, done: ClientRound) -> None:
        self.totals.setdefault(done.client, ClientTotals()).add(done)

    def _counted(self, log: RoundRecord) -> Iterator[dict[str, Any]]:
        """The entries of a round's clients; each is added to the totals when it is written."""
        for done in log.clients():
            self._count(done)
            yield done.to_json()

    def _note_answers(self, round: int, metrics: Metrics) -> None:
        if self.folder is not None and metrics.predicted is not None:
            self.folder.append_answers(round, metrics.predicted)

    def _append(self, line: dict[str, Any], clients: Iterator[dict[str, Any]] | None = None) -> None:
        if self.folder is not None:
            self.folder.append_round(line, clients)
        for _ in clients or ():
            pass  # without a folder they must still be counted

    def _checkpoint(
        self, round: int, tensors: dict[str, Tensor], judged: Metrics | None, whole: Metrics | None
    ) -> None:
        if self.folder is None:
            return
        score, metric = None, "accuracy"
        if judged is not None and judged.examples < DECIDING:
            score, metric = float(round), "round"
        elif judged is not None:
            score, metric = (judged.accuracy, "accuracy") if judged.accuracy is not None else (-judged.loss, "-loss")
        state = {"evaluation": None if whole is None else whole.figures()}
        self.folder.save_checkpoint(round, tensors, state, self._save_clients(), score, metric, self._last_saved)
        self._last_saved = round


def _rows_of(folder: RunFolder, rows: Any, round: int, clients: dict[int, int]) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Number, usage float32 [sum E_l] and residents bool [sum E_l] of the clients of a round, as in experts.npy.

    Raises UserError if the row of a client is missing.
    """
    own = () if rows is None else of_round(rows, round)
    missing = clients.keys() - {int(row["client"]) for row in own}
    if missing:
        raise UserError(
            f"{folder.path / 'experts.npy'}: has no row of client {min(missing)} in round {round}, which "
            "its method needs; restore the file or start the run again"
        )
    for row in own:
        if int(row["client"]) in clients:
            usage = torch.from_numpy(row["usage"].copy())
            exists = ~usage.isnan()  # NaN pads layers of fewer experts
            yield int(row["client"]), usage[exists], torch.from_numpy(row["resident"].copy())[exists]


def _evaluation(round: int, metrics: dict[str, Any]) -> Evaluation:
    return Evaluation(
        round,
        metrics["accuracy"],
        metrics["macro_f1"],
        metrics["loss"],
        metrics["examples"],
        choice_loss=metrics.get("choice_loss"),
    )
