"""A draft head's weights exchanged in a running worker: all of them or none, and back again.

Three functions that the engine runs in each worker, between two steps (``collective_rpc``): ``read`` a head into
memory and check every tensor, ``replace`` the running one by it, ``take_back`` the earlier one. They answer None, or
in one line why not: an exception that left a worker would end the engine.

vLLM's own loader writes into the tensors that are there, so what has captured their addresses (CUDA graphs, compiled
code) reads the new ones; it shards, fuses and repacks as at the start. The target's own tensors, which most heads
share, are out of its reach meanwhile.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from serving.head_check import Layout
from specdec.safetensors_header import TORCH_DTYPES

STATE = "specdec_head"  # the runner's attribute
PACKED = "cpu_linear"  # the function that vLLM puts in the place of a packed weight on CPU


@dataclass(slots=True)
class State:
    """What one worker holds besides the running head."""

    read: dict[str, Any] = field(default_factory=dict)  # tensors of the head to come, as they are in its file
    earlier: Weights | None = None  # the last head that has proved itself


@dataclass(frozen=True, slots=True)
class Weights:
    """A copy of a module's tensors in the form in which they are computed with, in the host's memory."""

    tensors: list[tuple[dict[str, Any], str, Any, Any]]  # a module's own, a name in it, the tensor, and its copy
    packed: list[tuple[Any, Any]]  # a module, and the function that holds its packed weight

    @classmethod
    def of(cls, model: Any) -> Weights:
        places = [place for module in model.modules() for place in (module._parameters, module._buffers)]
        found = [(place, name, tensor) for place in places for name, tensor in place.items() if tensor is not None]
        modules = [module for module in model.modules() if hasattr(module, PACKED)]
        return cls(
            tensors=[(*each, each[-1].detach().to("cpu", copy=True)) for each in found],
            packed=[(module, getattr(module, PACKED)) for module in modules],
        )

    def put_back(self) -> None:
        for place, name, tensor, copy in self.tensors:
            place[name] = tensor
            tensor.data.copy_(copy)
        for module, function in self.packed:
            setattr(module, PACKED, function)


def read(worker: Any, directory: str, layout: Layout) -> str | None:
    """Hold the head in ``directory`` ready. Each tensor must have the layout's dtype and shape, and be finite."""

    def work(runner: Any, state: State) -> None:
        state.read = {}
        tensors = read_tensors(Path(directory), layout)
        shared = shared_names(runner)
        own = [name for name in tensors if any(each.endswith(name) for each in shared)]
        if own:
            raise ValueError(
                f"it brings its own {own[0]}, but the running head shares the target's: restart the server with it"
            )
        state.read = tensors

    return answering(worker, work)


def replace(worker: Any) -> str | None:
    """Put what was read in the place of the running head, of which a copy stays unless there is one already."""

    def work(runner: Any, state: State) -> None:
        tensors, state.read = state.read, {}
        with own_modules(runner) as model:
            before = Weights.of(model)
            try:
                load(runner, model, tensors)
            except Exception:
                before.put_back()
                raise
        state.earlier = state.earlier or before
        prepare_masks(runner)

    return answering(worker, work)


def take_back(worker: Any) -> str | None:
    """The last head that has proved itself drafts again."""

    def work(runner: Any, state: State) -> None:
        if state.earlier is not None:
            state.earlier.put_back()
            prepare_masks(runner)
        state.earlier = None

    return answering(worker, work)


def settle(worker: Any) -> str | None:
    """The running head has proved itself: there is no way back from here."""

    def work(runner: Any, state: State) -> None:
        state.earlier = None

    return answering(worker, work)


def answering(worker: Any, work: Callable[[Any, State], None]) -> str | None:
    """Do the work on the worker's runner and its state."""
    try:
        runner = worker.model_runner
        if not hasattr(runner, STATE):
            setattr(runner, STATE, State())
        work(runner, getattr(runner, STATE))
    except Exception as error:
        return str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
    return None


def read_tensors(directory: Path, layout: Layout) -> dict[str, Any]:
    """Every tensor of the head's files, copied: a file that changes later changes nothing.

    Raises:
        ValueError: a file can't be read, or a tensor has another dtype or shape, is missing, or not finite.
    """
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load as parse

    tensors: dict[str, Any] = {}
    for path in sorted(directory.glob("*.safetensors")):
        try:
            tensors |= parse(path.read_bytes())
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{path} can't be read ({error}); copy or export it again") from error
    found = {name: (str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape)) for name, tensor in tensors.items()}
    wanted = {name: (TORCH_DTYPES.get(dtype, dtype), tuple(shape)) for name, (dtype, shape) in layout.items()}
    if found != wanted:
        changed = sorted(name for name in {*found, *wanted} if found.get(name) != wanted.get(name))
        raise ValueError(f"{directory} changed while it was read ({changed[0]}): swap again when it is complete")
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise ValueError(f"{name} holds numbers that are not finite: train the head again")
    return tensors


def shared_names(runner: Any) -> list[str]:
    """Of the head's tensors that are the target's own."""
    target = {id(tensor) for tensor in runner.get_model().parameters()}
    named = runner.get_draft_model().named_parameters(remove_duplicate=False)
    return [name for name, tensor in named if id(tensor) in target]


@contextmanager
def own_modules(runner: Any) -> Iterator[Any]:
    """The head's module, with empty ones where it has the target's."""
    from torch import nn

    model = runner.get_draft_model()
    target = {id(module) for module in runner.get_model().modules()}
    places = [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent.named_children()
        if id(child) in target and id(parent) not in target
    ]
    for parent, name, _ in places:
        setattr(parent, name, nn.Module())
    try:
        yield model
    finally:
        for parent, name, child in places:
            setattr(parent, name, child)


def load(runner: Any, model: Any, tensors: dict[str, Any]) -> None:
    """As vLLM loads a checkpoint into a model that has weights already."""
    import torch
    from vllm.config import set_current_vllm_config
    from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

    config = runner.vllm_config
    with set_current_vllm_config(config), torch.device(runner.device), torch.no_grad():
        initialize_layerwise_reload(model)
        try:
            model.load_weights(iter(tensors.items()))
        finally:
            finalize_layerwise_reload(model, config.speculative_config.draft_model_config)
    for name in ("mask_hidden", "token_map"):  # the loader writes these past what it restores
        if name in tensors:
            place = getattr(model, name)
            place.data.copy_(tensors[name].view_as(place))


def prepare_masks(runner: Any) -> None:
    """What a parallel drafter reads where no token is known: it is computed once, from the head's weights."""
    import torch

    place = getattr(getattr(runner, "drafter", None), "parallel_drafting_hidden_state_tensor", None)
    if place is not None:
        model = runner.get_draft_model()
        mask = model.mask_hidden.view(-1)
        with torch.no_grad():
            place.copy_(model.combine_hidden_states(mask) if runner.drafter.eagle3_use_aux_hidden_state else mask)
