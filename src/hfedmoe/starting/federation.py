"""Clients, rounds, steps and budgets of a first config."""

from hfedmoe.config import RunConfig
from hfedmoe.data.partition import partition
from hfedmoe.errors import UserError
from hfedmoe.report.inspection import Anatomy
from hfedmoe.report.words import human_bytes
from hfedmoe.starting import sizes
from hfedmoe.starting.draft import Draft
from hfedmoe.starting.machine import Machine, machine_for
from hfedmoe.starting.rows import Seen
from hfedmoe.starting.tasks import Tasks

SIXTEEN_BIT = ("bfloat16", "float16")


def put_clients(files: list[str], seen: Seen, draft: Draft, tasks: Tasks) -> list[str]:
    """Put the split, rounds and steps for the number of rows; returns a line about them. Raises UserError."""
    if len(files) == 1:
        _put_split(seen, draft, len(tasks.of(draft.config())[0].train))
    config = draft.config()
    rows, count = len(tasks.of(config)[0].train), config.clients.count
    least = sizes.least_rows(rows, count)
    if least < sizes.MIN_ROWS:
        draft.put("partition.min_rows", least, "fewest rows that a client gets")
    parts = _parts(draft, tasks)
    if count > sizes.MANY_CLIENTS:
        draft.put("federation.clients_per_round", sizes.MANY_CLIENTS // 2, "drawn for each round")
    # The budget is decided last, because it depends on all other settings; this is its place in the file.
    draft.put("clients.budgets", ["100%"])
    rounds, steps = sizes.rounds_and_steps(sum(parts) / len(parts))
    draft.put("train.steps", steps, f"of each client in a round, {config.train.batch_size} rows each")
    draft.put("train.lr", config.train.lr, "learning rate")
    draft.put("federation.rounds", rounds, "more rounds or steps: more passes over the rows")
    config = draft.config()
    each = f"{min(parts)} to {max(parts)}" if min(parts) < max(parts) else f"{parts[0]}"
    return [
        f"run:    {len(parts)} clients with {each} rows, {config.federation.rounds} rounds of {config.train.steps} "
        f"steps; {len(tasks.of(config)[0].test)} rows held out"
    ]


def _put_split(seen: Seen, draft: Draft, training_rows: int) -> None:
    site = seen.roles.site
    if site is not None and not draft.has("partition.scheme") and not draft.has("clients.count"):
        draft.put("clients.count", len(set(seen.values(site))), f'as many as the column "{site}" names')
        draft.put("partition.scheme", "natural", "the rows say to which client they belong ...")
        draft.put("partition.column", site, "... in this column")
        return
    draft.put("clients.count", sizes.clients_for(training_rows), "simulated devices that share the rows")
    if seen.labels:
        draft.put("partition.scheme", "dirichlet", "every client has its own mix of labels; or iid: the same mix")
        if draft.config().partition.scheme == "dirichlet":
            draft.put("partition.alpha", 1.0, "the smaller, the more different the mixes")


def _parts(draft: Draft, tasks: Tasks) -> list[int]:
    """Training rows of each client; a split that finds too few rows for a client becomes one at random."""

    def split(config: RunConfig) -> list[int]:
        return list(map(len, partition(tasks.of(config)[0], config.partition, config.clients.count, config.seed)))

    config = draft.config()
    try:
        return split(config)
    except UserError:
        if draft.has("partition.scheme") or config.partition.scheme != "dirichlet":
            raise
        draft.drop("partition.alpha")
        draft.put("partition.scheme", "iid", "the same mix of labels for every client: there are few rows")
        return split(draft.config())


def put_budget(draft: Draft, anatomy: Anatomy) -> list[str]:
    """Put what a client can hold on a machine like this one; returns lines about model and memory. Raises UserError."""
    machine = machine_for(draft.config())
    if not machine.fits and anatomy.dtype in SIXTEEN_BIT and not draft.has("model.dtype"):
        draft.put("model.dtype", "bfloat16", "of the frozen weights; float32 does not fit into this machine")
        machine = machine_for(draft.config())
    # Whole experts in every layer: a share that holds the top-k is at least one that can train.
    budget = f"{machine.share}%" if machine.share else "100%"
    draft.put("clients.budgets", [budget], 'experts that clients hold, in turn: "25%", 96, "4GiB", a device by name')
    size = human_bytes(anatomy.total.bytes)
    return [f"model:  {anatomy.model}: {shape_of(anatomy)}, {size} in {anatomy.dtype}", _room_told(machine)]


def shape_of(anatomy: Anatomy) -> str:
    """Layers, experts and top-k in words."""
    layers = anatomy.layers
    same = len({(layer.num_experts, layer.top_k) for layer in layers}) == 1
    more = "" if same else " in the first"
    return f"{len(layers)} layers of {layers[0].num_experts} experts, top-{layers[0].top_k}{more}"


def _room_told(machine: Machine) -> str:
    needs = f"here:   needs {human_bytes(machine.needed_bytes)} of memory, {human_bytes(machine.free_bytes)} are free"
    if machine.fits:
        minutes = round(machine.seconds / 60)
        time = f"at least {minutes} minutes" if minutes > 1 else "a minute or more"
        return f"{needs}, so every client may hold all experts; takes {time}"
    alone = f"a device of this size holds {machine.share} % of the experts; " if machine.share else ""
    return (
        f"{needs}: too little to simulate the clients here; {alone}use a smaller model, --set model.expert_dtype=4bit, "
        "or devices on machines of their own (hfedmoe serve)"
    )
