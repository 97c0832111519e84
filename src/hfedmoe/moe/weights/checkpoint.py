"""The names of a model's tensors in a checkpoint, and how to read one expert from it.

Hub checkpoints have one tensor per expert, newer ones have stacks, and names differ by family. transformers has the
renamings and conversions to load whole models; this module uses them for one tensor, or one expert, at a time.
"""

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

from hfedmoe.moe.anatomy import MoELayer
from hfedmoe.moe.experts.layouts import layout_of
from hfedmoe.moe.experts.store import MATRICES
from hfedmoe.moe.weights.shards import CheckpointError, Shards


@dataclass
class Sources:
    """The stored tensors that make one parameter of the model: names in the checkpoint by the pattern they match."""

    converter: Any = None
    """transformers' conversion of these tensors into the parameter; None if it is stored without conversion."""
    names: dict[str, list[str]] = field(default_factory=dict)

    @property
    def first(self) -> str:
        """One of the names, for messages."""
        return next(iter(self.names.values()))[0]


class StoredModel:
    """The parameters and buffers of a transformers model in a safetensors checkpoint, by their names in the model.

    Args:
        model: the model without weights.
    """

    def __init__(self, shards: Shards, model: Any) -> None:
        self.shards, self.model = shards, model
        self.sources = _sources(shards, model)

    def read(self, name: str) -> dict[str, Tensor]:
        """A parameter in its stored precision, and any others that the same conversion makes.

        Raises:
            CheckpointError: the checkpoint lacks it, is damaged, or has it in a form that cannot be converted.
        """
        return self._made_of(name, self.shards.read, self._source(name).names)

    def read_expert(self, name: str, expert: int, num_experts: int) -> Tensor:
        """Row `expert` of a parameter that the model stacks to [E, ...]; reads no other row. Raises CheckpointError."""
        source = self._source(name)
        if source.converter is None:
            return self.shards.read_row(source.first, expert)
        if any(1 < len(names) < num_experts for names in source.names.values()):
            raise CheckpointError(f"{self.shards.folder}: {name} is not stored per expert ({source.first}, ...)")
        own: dict[str, list[str]] = {
            pattern: names if len(names) == 1 else [names[expert]] for pattern, names in source.names.items()
        }
        stacked = num_experts > 1 and any(len(names) == 1 for names in source.names.values())

        def read(stored: str) -> Tensor:
            return self.shards.read_row(stored, expert)[None] if stacked else self.shards.read(stored)

        return self._made_of(name, read, own)[name][0]

    def missing(self, name: str, experts: int | None = None) -> bool:
        """Whether a parameter, or a part of it, is not stored.

        Args:
            experts: number of rows (experts) that it stacks, if they may be stored one by one.
        """
        source = self.sources.get(name)
        if source is None:
            return True
        patterns = [name] if source.converter is None else list(source.converter.source_patterns)
        if source.converter is not None and len(source.names) < len(patterns):
            return True
        return experts is not None and any(1 < len(names) < experts for names in source.names.values())

    def _made_of(self, name: str, read: Callable[[str], Tensor], names: dict[str, list[str]]) -> dict[str, Tensor]:
        source = self._source(name)
        if source.converter is None:
            return {name: read(source.first)}
        converter = deepcopy(source.converter)
        for pattern, stored in names.items():
            converter.collected_tensors[pattern] = [read(one) for one in stored]
        try:
            made = converter.convert(name, model=self.model, config=self.model.config)
        except (ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{self.shards.folder}: cannot make {name} from {source.first} ({error})") from None
        made = {key: value[0] if isinstance(value, list) else value for key, value in made.items()}
        if name not in made:
            raise CheckpointError(f"{self.shards.folder}: cannot make {name} from {source.first}")
        return made

    def _source(self, name: str) -> Sources:
        try:
            return self.sources[name]
        except KeyError:
            raise CheckpointError(f"{self.shards.folder}: the checkpoint has nothing for {name}") from None


class CheckpointExperts:
    """An `ExpertSource` that reads the experts of a model's MoE layers one by one from its checkpoint."""

    def __init__(self, checkpoint: StoredModel, layers: list[MoELayer]) -> None:
        self.checkpoint, self.layers = checkpoint, layers
        self._names = [layout_of(layer).names() for layer in layers]
        wanted = checkpoint.model.state_dict()
        self._shapes = [
            {kind: tuple(wanted[name].shape[-2 if kind in MATRICES else -1 :]) for kind, name in names[0].items()}
            for names in self._names
        ]

    def missing(self) -> list[str]:
        """Parameters of experts that are not stored, or not for every expert."""
        return [
            name
            for layer, names in zip(self.layers, self._names, strict=True)
            for own in names
            for name in own.values()
            if self.checkpoint.missing(name, None if len(names) > 1 else layer.num_experts)
        ]

    def shapes(self, layer: int) -> dict[str, tuple[int, ...]]:
        """Shape of every tensor of one expert."""
        return self._shapes[layer]

    def read(self, layer: int, expert: int) -> dict[str, Tensor]:
        """The tensors of one expert in the precision they are stored in. Raises CheckpointError."""
        names, number = self._names[layer], self.layers[layer].num_experts
        own = names[expert] if len(names) > 1 else names[0]
        if len(names) > 1:
            read = {kind: self.checkpoint.read(name)[name] for kind, name in own.items()}
        else:
            read = {kind: self.checkpoint.read_expert(name, expert, number) for kind, name in own.items()}
        for kind, tensor in read.items():
            if tuple(tensor.shape) != self._shapes[layer][kind]:
                raise CheckpointError(
                    f"{self.checkpoint.shards.folder}: {own[kind]} has experts of shape {list(tensor.shape)}, but "
                    f"the model's have {list(self._shapes[layer][kind])}"
                )
        return read


def _sources(shards: Shards, model: Any) -> dict[str, Sources]:
    """Stored names by parameter, as transformers matches them when it loads the whole model."""
    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    wanted, prefix = model.state_dict(), model.base_model_prefix
    sources: dict[str, Sources] = {}
    for stored in sorted(shards.entries, key=dot_natural_key):
        name, pattern = rename_source_key(stored, renamings, converters, prefix, wanted)
        if name not in wanted and stored in wanted:
            name, pattern = stored, None
        if name not in wanted:
            continue  # transformers also ignores what the model does not have
        source = sources.setdefault(name, Sources(None if pattern is None else by_pattern[pattern]))
        source.names.setdefault(pattern or stored, []).append(stored)
    return sources
