"""The server: rounds of sampling, planning, training and folding, with a checkpoint after each."""

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

import torch
from flwr.app import Context
from flwr.serverapp import Grid, ServerApp
from torch import Tensor

from hfedmoe.config import RunConfig
from hfedmoe.config.budgets import in_experts
from hfedmoe.errors import UserError
from hfedmoe.events import Evaluation, Watcher
from hfedmoe.files.blob import Rows
from hfedmoe.method.methods import METHODS
from hfedmoe.method.row import Residents, Wish
from hfedmoe.moe.payload import public, select
from hfedmoe.moe.ranks import cut
from hfedmoe.server.attendance import Attendance
from hfedmoe.server.collecting import collect
from hfedmoe.server.evaluation import Metrics
from hfedmoe.server.fold import Fold
from hfedmoe.server.keeper import Keeper
from hfedmoe.server.members import Member, Roll, reply_of, sample
from hfedmoe.server.personal import Shared, ask_clients
from hfedmoe.server.records import RoundRecord
from hfedmoe.server.sites import ask_sites
from hfedmoe.server.staleness import discount, on_the_model_of_now
from hfedmoe.server.works import Work, Works
from hfedmoe.wire import checks
from hfedmoe.wire.exchange import LEFT, Answer, Request, clean
from hfedmoe.wire.messages import (
    PLAN,
    TRAIN,
    InvalidReplyError,
    Plan,
    pack_bits,
    plan_request,
    train_request,
    wire_bytes,
)
from hfedmoe.wire.order import in_order
from hfedmoe.wire.same import NO_DIGESTS, Digests
from hfedmoe.wire.trouble import FAILED, REFUSED

Evaluate = Callable[[dict[str, Tensor], str], Metrics]
"""(global tensors, "all" or "watch") -> the global model measured on all held-out rows, or on the watched ones."""


@dataclass
class Server:
    """The state of a federation on the server: the global tensors and the round.

    `num_experts` and `top_k` are per layer; `round` is the last complete one.
    """

    config: RunConfig
    tensors: dict[str, Tensor]
    num_experts: list[int]
    top_k: list[int]
    evaluate: Evaluate
    keeper: Keeper
    watcher: Watcher
    terms: str = ""
    """The run's task, as every device is told (`data.terms.Terms.to_json`)."""
    digests: Digests = NO_DIGESTS
    """Of the base model and the tokenizer, which every client must have."""
    watches: bool = True
    """Whether there are held-out rows to measure after every round."""
    round: int = 0
    roll: Roll | None = None
    """Who the clients are, if that is known by their keys."""
    asks_sites: bool = False
    """Whether real devices measure, at the end, what they gained."""
    shared: Shared | None = None
    """Measures the model on a client's own rows, which only the server of simulated clients has."""
    untold: set[int] = field(default_factory=set)
    """Clients that say nothing of rows of their own, because they have too few, or their owner does not want it."""
    ends_early: Callable[[], bool] = lambda: False
    """Asked after every round: whether the run ends here, to be continued later."""

    def __post_init__(self) -> None:
        self._asked = checks.Asked.of(self.config, self.top_k)
        self._method = METHODS[self.config.method.name]
        self._at_least = self._method.at_least(self.top_k)
        self._works: Works | None = None
        """Training that may outlive its round; None: every round waits for all."""

    def run(self, grid: Grid) -> None:
        """All rounds that are left, then the last evaluation.

        Raises:
            UserError: too few clients connect, or too few give a valid update; the last checkpoint is intact.
        """
        attendance = self.attendance(grid)
        attendance.gather()
        self._announce(attendance)
        self._works = Works(attendance) if self.config.federation.outlives else None
        last = self.config.federation.rounds
        if self.round == 0 and not self.keeper.scores:
            metrics = self._measure("all", 0)
            self.keeper.save_start(self.tensors, metrics)
        while self.round < last:
            attendance.look()
            self._one_round(attendance, self.round + 1)
            self.round += 1
            if self.ends_early():
                return
        if self.asks_sites and self._method.merged is None:
            ask_sites(self, attendance)

    def last_request(self, member: Member, kind: str) -> Request:
        """A request with the final model, for what a client planned to hold."""
        return self.request(member, kind, self.round)

    def request(self, member: Member, kind: str, round: int) -> Request:
        """A request with the model as it is after a round, for what a client planned to hold."""
        return Request(member.node, kind, train_request(round, member.resident, self._tensors_for(member)))

    def _tensors_for(self, member: Member) -> Mapping[str, Tensor | Rows]:
        """The global tensors that a client gets for what it planned to hold, to be written at once."""
        tensors = cut(public(self.tensors, self._method.private), self._rank(member))
        # Experts that are merged on the device are all sent.
        return tensors if self._method.merged is not None else select(tensors, member.resident)

    def attendance(self, grid: Grid) -> Attendance:
        """Who is here, before anybody was asked."""
        return Attendance(grid, self.config, self.num_experts, self.terms, self.digests, self.watcher, self.roll)

    def _announce(self, attendance: Attendance) -> None:
        clients = attendance.participants()
        self.keeper.introduce(clients)
        rounds = self.config.federation.rounds
        self.watcher.start(self.config.name, rounds, self.round + 1, list(clients.values()), self.keeper.scores)

    def _measure(self, kind: Literal["all", "watch"], round: int) -> Metrics:
        metrics = self.evaluate(self.tensors, kind)
        self.watcher.evaluated(
            Evaluation(
                round,
                metrics.accuracy,
                metrics.macro_f1,
                metrics.loss,
                metrics.examples,
                kind,
                metrics.choice_loss,
            )
        )
        return metrics

    def _one_round(self, attendance: Attendance, round: int) -> None:
        started = time.perf_counter()
        self.keeper.introduce(attendance.participants())
        self.watcher.round_started(round)
        with self.keeper.recording(round, self.num_experts, self.config.method.tau) as log:
            with self.keeper.taking_rows(log):
                planned = self._plan(attendance, self._asked_in(attendance, round), log)
                log.planning_seconds = time.perf_counter() - started
                fold = self._fold(attendance, planned, log)
                self._require_enough(fold.clients, log)
                with log.phases("average"):
                    self.tensors = self._averaged(fold, log)
            self._close(round, log, attendance, started)

    def _fold(self, attendance: Attendance, planned: list[Member], log: RoundRecord) -> Fold:
        """Have the clients train, and fold in their updates in the order of their numbers."""
        usage = self.keeper.usage.value() if self._method.needs_usage else None
        fold = Fold(
            self.tensors,
            self.config.method,
            self._method.exact_lora(self.config.train.lora),
            self.config.train.rank,
            None if usage is None else list(usage.split(self.num_experts)),
        )
        if self._works is not None:
            for work, answer in self._collected(self._works, planned, log):
                self._take(answer, work, fold, attendance, log)
                answer.reply = None
            self._part(self._works, log)
            return fold
        works = {member.node: self._work(member, log) for member in planned}
        requests = (self._train_request(work, log) for work in works.values())
        for answer in in_order(attendance.ask(requests, f"train-{log.round}"), list(works)):
            self._take(answer, works[answer.node], fold, attendance, log)
            answer.reply = None  # folded in: the next client works without it in memory
        return fold

    def _asked_in(self, attendance: Attendance, round: int) -> list[Member]:
        """The members who are asked in a round, of those who are not busy with an earlier one."""
        settings, members = self.config.federation, attendance.members
        wanted, works = settings.clients_per_round, self._works
        if works is not None:
            for work, _ in works.answers(lambda: not works.waits and all(map(works.is_busy, members.values()))):
                assert work.dropped  # only such are left; one of them is free again
            members = {client: member for client, member in members.items() if not works.is_busy(member)}
            if wanted is not None:
                wanted += settings.spare_clients - (len(works.going_on) if settings.mode == "async" else 0)
                wanted = max(0, wanted)
        return sample(members, self.config, round, wanted)

    def _collected(self, works: Works, planned: list[Member], log: RoundRecord) -> Iterator[tuple[Work, Answer]]:
        """Have the clients train, and yield the answers that count in this round."""

        def begin(work: Work) -> tuple[Work, Request]:
            return work, self._train_request(work, log)

        def again(work: Work, answer: Answer) -> None:
            """Give the next work to a client that has answered, if it has said what it will hold."""
            member = work.member
            if self.config.federation.clients_per_round is not None or not self._plans_next(log.round):
                return
            with contextlib.suppress(InvalidReplyError):  # its update will be refused for it
                plan = checks.next_plan(reply_of(answer), self._room(member))
                if plan is not None and plan.resident is not None:
                    member.resident_bits = pack_bits(plan.resident)
                    works.ask(partial(begin, Work(member, log.round, member.resident_bits, self.tensors)))

        for member in planned:
            work = self._work(member, log)
            work.tensors = self.tensors
            works.ask(partial(begin, work))
        clients = self.config.clients.count
        yield from collect(works, self.config.federation, log.round, len(planned), clients, again)

    def _part(self, works: Works, log: RoundRecord) -> None:
        """Say of those who still work whether their updates will count."""
        settings = self.config.federation
        for work in works.going_on:
            if settings.mode == "rounds" and work.round == log.round:
                client, member = work.member.about.client, work.member
                folds = settings.late == "fold"
                reason = "its update counts when it comes" if folds else "the round went on without it"
                done = log.left_out(client, "late", reason, (work.bytes_down, work.bytes_up))
                work.bytes_down = work.bytes_up = 0  # noted
                self.watcher.client_done(log.round, member.position, done)
                work.dropped = not folds
            if log.round + 1 - work.round > settings.max_staleness:
                work.dropped = True
            if work.dropped:
                work.tensors = {}

    def _work(self, member: Member, log: RoundRecord) -> Work:
        """What a client has been asked to plan, and will be asked to train."""
        client = member.about.client
        down, up = log.bytes_down.get(client, 0), log.bytes_up.get(client, 0)
        return Work(member, log.round, member.resident_bits, {}, down, up)

    def _take(self, answer: Answer, work: Work, fold: Fold, attendance: Attendance, log: RoundRecord) -> None:
        """Check a client's answer, fold its update in and note it, or leave the client out."""
        member, resident, late = work.member, work.resident, log.round - work.round
        try:
            with log.phases("check"):
                room, rank = self._room(member) if self._plans_next(work.round) else None, self._rank(member)
                update = checks.update(reply_of(answer), resident, self.tensors, self._asked, rank, room)
            if update.work.examples != member.about.examples:
                raise InvalidReplyError(f"says it has {update.work.examples} examples, but had {member.about.examples}")
        except InvalidReplyError as error:
            self._leave_out(log, attendance, work, answer, error)
            return
        if late:
            factor = discount(late, self.config.federation.staleness)
            private = self._method.private
            update.tensors = on_the_model_of_now(update, work.tensors, self.tensors, factor, rank, private)
        member.plans(log.round + 1 if self.config.federation.mode == "async" else work.round + 1, update.next)
        size = wire_bytes(answer.reply.content)  # type: ignore[union-attr]
        with log.phases("fold"):
            fold.add(update, resident, member.weight)
        with log.phases("note"):
            wanted, own = self._activation_wanted(resident), (work.bytes_down, work.bytes_up)
            done = log.received(member.about.client, update, resident, size, member.weight, wanted, own, late)
            self.keeper.took(member.about.client, update.usage, resident, member.weight, update.work.last_loss)
            held, trained = (torch.cat(bits).tolist() for bits in (resident, update.trained))
            self.watcher.client_experts(log.round, member.position, held, trained)
            self.watcher.client_done(log.round, member.position, done)

    def _averaged(self, fold: Fold, log: RoundRecord) -> dict[str, Tensor]:
        """The new global tensors. Raises UserError if one is not finite."""
        folded = fold.result()
        broken = [name for name, tensor in folded.items() if not bool(tensor.isfinite().all())]
        if broken:
            self.keeper.failed(log)
            raise UserError(
                f"round {log.round}: {broken[0]} is not finite after averaging; lower train.lr; "
                f"the checkpoint of round {log.round - 1} is intact{self.keeper.resume_hint}"
            )
        return folded

    def _plan(self, attendance: Attendance, sampled: list[Member], log: RoundRecord) -> list[Member]:
        """Ask the sampled clients what they want to hold; those with a valid answer go on, in the order of numbers."""
        by_node = {member.node: member for member in sampled}
        usage = (
            self.keeper.usage.value() if self.config.method.bootstrap == "prior" or self._method.needs_usage else None
        )

        said = {member.node: member.plan_of(log.round) for member in sampled}

        def requests() -> Iterator[Request]:
            for member in (member for member in sampled if said[member.node] is None):
                content = plan_request(log.round, usage)
                log.sent(member.about.client, wire_bytes(content))
                yield Request(member.node, PLAN, content)

        plans = {by_node[node].about.client: plan for node, plan in said.items() if plan is not None}
        for answer in attendance.ask(requests(), f"plan-{log.round}"):
            member = by_node[answer.node]
            try:
                reply = reply_of(answer)
                plans[member.about.client] = checks.plan(reply, self._room(member))
                log.bytes_up[member.about.client] = wire_bytes(reply.content)
            except InvalidReplyError as error:
                self._leave_out(log, attendance, self._work(member, log), answer, error)
        # Always in the same order, so that a run does not depend on who answers first.
        planned = sorted((m for m in sampled if m.about.client in plans), key=lambda member: member.about.client)
        self._settle(planned, plans)
        return planned

    def _settle(self, planned: list[Member], plans: dict[int, Plan]) -> None:
        """Note what every client holds."""
        wishes = {}
        for member in planned:
            client, plan = member.about.client, plans[member.about.client]
            if plan.resident is not None:
                member.resident_bits = pack_bits(plan.resident)
            elif plan.contribution is not None:
                room, past = self._room(member), self.keeper.past(client, self.num_experts)
                examples = member.about.examples
                wishes[client] = Wish(self.num_experts, self.top_k, room.budget, examples, plan.contribution, past)
        if wishes:
            for member, resident in zip(planned, self._assigned(planned, wishes), strict=True):
                member.resident_bits = pack_bits(resident)

    def _room(self, member: Member) -> checks.Room:
        """What a client's plan must keep to."""
        free = self._method.ignores_budgets(self.config.method)
        budget = sum(self.num_experts) if free else member.about.budget
        return checks.Room(self.num_experts, self._at_least, budget, self._method.assign is not None)

    def _plans_next(self, round: int) -> bool:
        """Whether clients say with their update what they will hold in the next round: one message less."""
        return round < self.config.federation.rounds and not self._method.needs_usage

    def _assigned(self, planned: list[Member], wishes: dict[int, Wish]) -> list[Residents]:
        """What every client holds, by the server's own plan."""
        assert self._method.assign is not None
        held = self.keeper.held.value()
        held = torch.zeros(sum(self.num_experts)) if held is None else held
        return self._method.assign([wishes[member.about.client] for member in planned], held, self.config.method)

    def _train_request(self, work: Work, log: RoundRecord) -> Request:
        member = work.member
        with log.phases("pack"):
            content = train_request(work.round, work.resident, self._tensors_for(member), self._plans_next(work.round))
        size = wire_bytes(content)
        log.sent(member.about.client, size)
        work.bytes_down += size
        self.watcher.client_started(work.round, member.position, self.config.train.steps)
        return Request(member.node, TRAIN, content)

    def _rank(self, member: Member) -> int | None:
        """The rank of the LoRA pairs of a client's experts; None: the configured one."""
        if self._method.rank is None:
            return None
        return self._method.rank(member.about.budget / sum(self.num_experts), self.config.train.rank)

    def _activation_wanted(self, resident: list[Tensor]) -> float:
        """Experts per layer (mean over the layers) that a step of the client would train without a deadline."""
        held = [int(keep.sum()) for keep in resident]
        limit = self.config.clients.activation
        if limit is not None:
            held = [min(h, in_experts(limit, number)) for h, number in zip(held, self.num_experts, strict=True)]
        return sum(held) / len(held)

    def _leave_out(
        self, log: RoundRecord, attendance: Attendance, work: Work, answer: Answer, error: InvalidReplyError
    ) -> None:
        member, own = work.member, (work.bytes_down, work.bytes_up)
        status = "invalid" if answer.status == "ok" else answer.status
        if isinstance(error, checks.TroubleError):
            status = error.status
        reason = clean(str(error))
        self.watcher.client_done(log.round, member.position, log.left_out(member.about.client, status, reason, own))
        if status != LEFT:
            self.watcher.warning(f"round {log.round}: {member.about.name} is left out ({status}): {reason}")
        if not isinstance(error, checks.TroubleError) or error.status in (REFUSED, FAILED):
            attendance.lost(member, status)

    def _require_enough(self, valid: int, log: RoundRecord) -> None:
        needed = self.config.federation.min_clients
        if valid < needed:
            self.keeper.failed(log)
            missing = "; ".join(f"{self.keeper.name_of(client)} {reason}" for client, reason in log.missing.items())
            if log.num_missing > len(log.missing):
                missing += f"; and {log.num_missing - len(log.missing)} more"
            raise UserError(
                f"round {log.round}: {valid} valid updates, fewer than federation.min_clients = {needed} ({missing}); "
                f"the checkpoint of round {log.round - 1} is intact{self.keeper.resume_hint}"
            )

    def _close(self, round: int, log: RoundRecord, attendance: Attendance, started: float) -> None:
        """Measure the new global model, write the round down, and the checkpoint last."""
        settings = self.config.evaluation
        final = round == self.config.federation.rounds
        evaluating = time.perf_counter()
        watched = self._measure("watch", round) if self.watches else None
        whole = None
        if final or (settings.every and round % settings.every == 0):
            whole = self._measure("all", round)
        log.personal = ask_clients(self, attendance, log)
        now = time.perf_counter()
        log.seconds, log.evaluation_seconds = now - started, now - evaluating
        self.keeper.save_round(log, self.tensors, watched, whole)
        if log.personal:
            self.watcher.personal(round, log.personal)
        self.watcher.round_done(round, log.seconds, sum(log.bytes_down.values()), sum(log.bytes_up.values()))


def server_app(server_of: Callable[[Context], AbstractContextManager[Server]]) -> ServerApp:
    """The ServerApp that runs the federation which `server_of` makes from Flower's context, and then closes."""
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        with server_of(context) as server:
            server.run(grid)

    return app
