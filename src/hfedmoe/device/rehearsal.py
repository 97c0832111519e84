"""A training step without weights: the real model code runs on fake tensors, and a `Trace` measures its memory.

Two simplifications do not change the result. Each layer has only `GROUPS` experts, with all pairs spread evenly over
them; what grows with the number of experts (their gradients) is counted separately and scaled. And of equal decoder
layers only some are run; the forward and backward pass of one of them is repeated as often as the model has it.
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

from hfedmoe.data.encoding import Batch
from hfedmoe.data.losses import answer_loss
from hfedmoe.device.trace import Segment, Timeline, Trace
from hfedmoe.device.workload import Workload
from hfedmoe.moe.anatomy import find_moe_layers
from hfedmoe.moe.experts.groups import Groups
from hfedmoe.moe.experts.quantised import BLOCK, stored_bytes
from hfedmoe.moe.experts.state import ExpertState
from hfedmoe.moe.experts.store import ExpertStore
from hfedmoe.moe.experts.trained import full_experts, lora_experts
from hfedmoe.moe.model import MoEModel

GROUPS = 2
"""Experts per layer in a rehearsal; two, so that one is fetched while the one before is still in memory."""
_ALIKE = 3
"""Number of equal layers that are run; the second stands for all, because the last one has another neighbour."""


@dataclass(frozen=True)
class Rehearsed:
    """What a step holds in addition to weights and optimizer state, and what it computes."""

    step: Timeline
    """Of forward and backward pass: kinds "activations", "logits", "gradients", and "expert_gradients" of GROUPS
    experts per layer."""
    forward: Timeline
    """Of a forward pass without gradients."""
    flops: int
    """Of forward and backward pass."""


def rehearse(model: Any, workload: Workload, reduce: bool = True) -> Rehearsed:
    """Run the step of `workload` on fake tensors.

    Args:
        model: on the meta device, in the precisions of the workload; it is changed.
        reduce: run only some of the equal layers.
    """
    stacks = [_Stack(stack) for stack in _stacks(model)]
    if reduce:
        for stack in stacks:
            stack.reduce(model.config)
    with FakeTensorMode(allow_non_fake_inputs=True), _plain_conversion():
        moe = _imagine(model, workload)
        step, forward = _trace(moe, workload, stacks, True), _trace(moe, workload, stacks, False)
    segments = list(_expanded(step, stacks))
    return Rehearsed(
        step.timeline(segments),
        forward.timeline(_expanded(forward, stacks)),
        sum(segment.flops for segment in segments),
    )


@contextmanager
def _plain_conversion() -> Iterator[None]:
    """Let modules convert fake parameters: torch would swap them, which fails if there are weak references to them."""
    original = nn.Module._apply

    def apply(module: nn.Module, fn: Any, recurse: bool = True) -> nn.Module:
        for child in module.children() if recurse else ():
            apply(child, fn)
        with torch.no_grad():
            for own in (module._parameters, module._buffers):
                for name, tensor in own.items():
                    if tensor is None or (converted := fn(tensor)) is tensor:
                        continue
                    if converted.device == tensor.device:
                        tensor.data = converted
                    elif isinstance(tensor, nn.Parameter):  # a fake tensor keeps its device
                        own[name] = nn.Parameter(converted, tensor.requires_grad)
                    else:
                        own[name] = converted
        return module

    nn.Module._apply = apply  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module._apply = original  # type: ignore[method-assign]


class _Stack:
    """A list of decoder or encoder layers, and for each layer the run layer that stands for it."""

    def __init__(self, layers: nn.ModuleList) -> None:
        self.layers = layers
        self.stands_for = list(range(len(layers)))

    def reduce(self, config: Any) -> None:
        """Of the layers that are equal and follow equal layers, keep `_ALIKE`."""
        signatures = [_signature(layer, index, config) for index, layer in enumerate(self.layers)]
        first_moe = next(i for i, layer in enumerate(self.layers) if _has_experts(layer))
        pairs = [(signatures[i], signatures[i - 1] if i > first_moe + 1 else i) for i in range(len(signatures))]
        # Up to the first layer that is trained, and in the one after it, the backward pass differs.
        kept: list[int] = []
        seen: Counter[Any] = Counter()
        second: dict[Any, int] = {}
        for index, pair in enumerate(pairs):
            seen[pair] += 1
            if seen[pair] <= _ALIKE:
                if seen[pair] <= 2:
                    second[pair] = len(kept)
                kept.append(index)
        if len(kept) == len(pairs):
            return
        number = len(pairs)
        self.stands_for = [second[pair] for pair in pairs]
        keep = set(kept)
        for index in reversed(range(number)):
            if index not in keep:
                del self.layers[index]
        _reduce_lists(config, number, kept)


def _reduce_lists(config: Any, number: int, kept: list[int]) -> None:
    """Shorten the config's lists with one value per layer: the forward pass reads them by position."""
    for key, value in list(vars(config).items()):
        if isinstance(value, list) and len(value) == number:
            setattr(config, key, [value[index] for index in kept])


def _signature(layer: nn.Module, index: int, config: Any) -> Any:
    """A value that is equal for layers that compute the same: modules, shapes and kind of attention."""
    kinds = getattr(config, "layer_types", None)
    parts = [str(kinds[index]) if kinds else ""]
    for name, module in layer.named_modules():
        shapes = [tuple(parameter.shape) for parameter in module.parameters(recurse=False)]
        parts.append(f"{name} {type(module).__name__} {shapes} {getattr(module, 'sliding_window', None)}")
    return tuple(parts)


def _has_experts(layer: nn.Module) -> bool:
    return any(hasattr(module, "_holds_experts") for module in layer.modules())


def _stacks(model: nn.Module) -> list[nn.ModuleList]:
    """The outermost lists of layers that contain MoE layers."""
    blocks = find_moe_layers(model)
    for block in blocks:
        object.__setattr__(block.block, "_holds_experts", True)
    names = [block.name for block in blocks]
    found: dict[str, nn.ModuleList] = {}
    for name, module in model.named_modules():
        holds = isinstance(module, nn.ModuleList) and any(block.startswith(name + ".") for block in names)
        if holds and not any(name.startswith(outer + ".") for outer in found):
            found[name] = module
    return list(found.values())


def _imagine(model: Any, workload: Workload) -> MoEModel:
    """The model with fake weights, and with fake experts and trained tensors for GROUPS experts per layer."""
    dtype, device = workload.torch_dtype, torch.device(workload.device)
    layers = find_moe_layers(model)
    shapes = [
        {name: tuple(stack.shape[1:]) for name, stack in ExpertState(layer).tensors().items()} for layer in layers
    ]
    experts = {id(parameter) for layer in layers for parameter in layer.experts.parameters()}
    _fill(model, device, experts)
    store = _ImaginedStore(shapes, [layer.num_experts for layer in layers], workload, device)
    moe = MoEModel(
        model,
        experts=workload.experts,
        rank=workload.rank,
        freeze_a=workload.freeze_a,
        router=workload.router,
        attention=workload.attention,
        store=store,
    )
    for state, own in zip(moe.states, shapes, strict=True):
        state.observer = None
        state.norms = (lambda norms: None) if workload.measures_activation else None
        state.grouping = _even
        state.resident = torch.ones(state.layer.num_experts, dtype=torch.bool, device=device)
        state.local = torch.zeros(state.layer.num_experts + 1, dtype=torch.int64, device=device)
        if workload.experts == "lora":
            up, down = own["up"], own["down"]
            if state.math().transposed:
                up, down = up[::-1], down[::-1]
            state.trained = lora_experts(
                GROUPS, (up[0], up[1]), (down[0], down[1]), workload.rank, 1.0, 0, device, workload.freeze_a
            )
        elif workload.experts == "full":
            state.trained = full_experts(
                {name: torch.empty(GROUPS, *shape, dtype=dtype, device=device) for name, shape in own.items()}
            )
    if workload.gradient_checkpointing:
        moe.checkpoint_activations()
    return moe


def _fill(model: Any, device: torch.device, leave: set[int]) -> None:
    """Put new tensors in place of all parameters and buffers, except those with an id in `leave`."""
    made: dict[int, Any] = {}
    for module in model.modules():
        for own in (module._parameters, module._buffers):
            for name, tensor in own.items():
                if tensor is None or id(tensor) in leave:
                    continue
                if id(tensor) not in made:
                    fresh = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
                    made[id(tensor)] = (
                        nn.Parameter(fresh, requires_grad=False) if isinstance(tensor, nn.Parameter) else fresh,
                        tensor,  # kept alive, so that no id is reused
                    )
                own[name] = made[id(tensor)][0]


def _even(experts: Tensor, num_experts: int, top_k: int, keep: Tensor | None = None) -> Groups:
    """As `group_pairs`, with pairs spread evenly over the experts: the routing is not known."""
    pairs = experts.shape[0]
    ends = [pairs * (index + 1) // num_experts for index in range(num_experts)]
    spans = list(zip(range(num_experts), [0, *ends], ends, strict=False))
    spans = [span for span in spans if span[2] > span[1]]
    token, pair, places = torch.empty_like(experts), torch.empty_like(experts), torch.empty_like(experts)
    return Groups(pairs // top_k, token, pair, spans, num_experts, token.new_empty(num_experts), places.view(-1, top_k))


class _Imagined:
    """A stored tensor without contents."""

    def __init__(self, shape: tuple[int, ...], workload: Workload, device: torch.device) -> None:
        self.shape, self._device = shape, device
        self._quantised = workload.expert_dtype in ("8bit", "4bit") and len(shape) > 1
        self._four = workload.expert_dtype == "4bit"
        plain = workload.expert_dtype in ("same", "8bit", "4bit")
        held = workload.torch_dtype if plain else getattr(torch, workload.expert_dtype)
        self.nbytes = stored_bytes(shape, workload.expert_dtype, workload.torch_dtype)
        self.tensor = None if self._quantised else torch.empty(shape, dtype=held, device=device)

    def __call__(self, dtype: torch.dtype) -> Tensor:
        if self.tensor is not None:
            return self.tensor.to(dtype)
        values = torch.Size(self.shape).numel()
        scales = torch.empty(-(-values // BLOCK) if self._four else 0, device=self._device)
        whole = torch.empty(self.shape, dtype=dtype, device=self._device)
        del scales
        return whole


class _Shapes:
    """An `ExpertSource` that knows only shapes."""

    def __init__(self, shapes: list[dict[str, tuple[int, ...]]]) -> None:
        self._shapes = shapes

    def shapes(self, layer: int) -> dict[str, tuple[int, ...]]:
        return self._shapes[layer]

    def read(self, layer: int, expert: int) -> dict[str, Tensor]:
        raise NotImplementedError("a rehearsal reads nothing")


class _ImaginedStore(ExpertStore):
    """GROUPS experts per layer, without contents."""

    def __init__(
        self,
        shapes: list[dict[str, tuple[int, ...]]],
        num_experts: list[int],
        workload: Workload,
        device: torch.device,
    ) -> None:
        super().__init__(_Shapes(shapes), num_experts, workload.expert_dtype, workload.torch_dtype, device)
        self.present = [list(range(GROUPS)) for _ in num_experts]
        for layer, own in enumerate(shapes):
            for expert in range(GROUPS):
                self._held[layer, expert] = {name: _Imagined(shape, workload, device) for name, shape in own.items()}

    def tensors(self) -> Iterator[Tensor]:
        """The tensors that would be held."""
        for held in self._held.values():
            for stored in held.values():
                if isinstance(stored, _Imagined) and stored.tensor is not None:
                    yield stored.tensor


def _batch(workload: Workload, encoder_decoder: bool) -> Batch:
    size, answer, device = workload.batch_size, workload.answer_tokens, workload.device
    length = workload.length if encoder_decoder else workload.length + answer - 1

    def ids(columns: int) -> Tensor:
        return torch.zeros(size, columns, dtype=torch.int64, device=device)

    return Batch(
        input_ids=ids(length),
        attention_mask=ids(length),
        targets=ids(answer),
        answers=torch.zeros(size, dtype=torch.int64, device=device),
        decoder_input_ids=ids(answer) if encoder_decoder else None,
    )


def _trace(moe: MoEModel, workload: Workload, stacks: list[_Stack], backward: bool) -> Trace:
    model, store = moe.model, moe.store
    assert isinstance(store, _ImaginedStore)
    encoder_decoder = bool(getattr(model.config, "is_encoder_decoder", False))
    vocabulary = model.get_input_embeddings().weight.shape[0]
    model.train(backward)
    known = [tensor for tensor in (*model.parameters(), *model.buffers()) if not tensor.is_meta]
    trained = [stack for s in moe.states if s.trained is not None for stack in s.trained.stacks.values()]
    resident = [tensor for s in moe.states for tensor in (s.resident, s.local) if tensor is not None]

    def kind(tensor: Tensor) -> str:
        return "logits" if tensor.dim() > 0 and tensor.shape[-1] == vocabulary else "activations"

    trace = Trace([*known, *trained, *resident, *store.tensors()], kind)
    marks = _Marks(trace, stacks)
    try:
        with trace, torch.set_grad_enabled(backward):
            batch = _batch(workload, encoder_decoder)
            logits = model(**batch.model_inputs()).logits
            if backward:
                loss = answer_loss(logits, batch)
                del logits
                marks.forward = False
                loss.backward()
                del loss
                leaves = {id(leaf) for s in moe.states if s.trained is not None for leaf in s.trained.parameters()}
                for parameter in moe.parameters():
                    if parameter.grad is not None:
                        trace.tag(parameter.grad, "expert_gradients" if id(parameter) in leaves else "gradients")
            else:
                del logits
    finally:
        marks.remove()
        for parameter in moe.parameters():
            parameter.grad = None
    return trace


class _Marks:
    """Tell the trace where each layer's forward and backward pass begin."""

    def __init__(self, trace: Trace, stacks: list[_Stack]) -> None:
        self.trace, self.forward = trace, True
        self._handles: list[Any] = []
        for number, stack in enumerate(stacks):
            for index, layer in enumerate(stack.layers):
                last = index == len(stack.layers) - 1
                self._handles.append(layer.register_forward_pre_hook(self._before(number, index)))
                self._handles.append(layer.register_forward_hook(self._after(number, index, last)))

    def _before(self, stack: int, index: int) -> Any:
        def hook(module: nn.Module, args: Any) -> None:
            if self.forward:  # under gradient checkpointing a layer's forward runs again in its backward
                self.trace.mark(("forward", stack, index))

        return hook

    def _after(self, stack: int, index: int, last: bool) -> Any:
        def on_gradient(grad: Tensor) -> None:
            self.trace.mark(("backward", stack, index))

        def hook(module: nn.Module, args: Any, output: Any) -> None:
            if not self.forward:
                return
            hidden = output[0] if isinstance(output, tuple) else output
            if hidden.requires_grad:
                hidden.register_hook(on_gradient)
            if last:
                self.trace.mark(None)

        return hook

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()


def _expanded(trace: Trace, stacks: list[_Stack]) -> Iterator[Segment]:
    """The segments of the whole model: that of each run layer, once for every layer that it stands for."""
    waiting = list(trace.segments)
    while waiting:
        label = waiting[0].label
        if label is None:
            yield waiting.pop(0)
            continue
        way, number, _ = label
        run: dict[int, Segment] = {}
        while waiting and waiting[0].label is not None and waiting[0].label[:2] == (way, number):
            segment = waiting.pop(0)
            run[segment.label[2]] = segment
        places = stacks[number].stands_for
        for place in places if way == "forward" else reversed(places):
            if place in run:
                yield run[place]
