"""How several processes train one model: on torch's own engines, as if they were one.

The examples of a batch are divided between the processes, the gradients are averaged, and every
process takes the same step. Batches, times and noise are functions of the seed and the example, so
that the weights do not depend on how many processes there are, but for rounding.
"""

import contextlib
import os
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from scoresde.errors import InputError
from scoresde.model import ScoreFunction, ScoreModel

# --- The processes -------------------------------------------------------------------------------


@dataclass(frozen=True)
class ProcessGroup:
    """The processes that work together; one alone by default.

    Arguments:
        rank: The number of this one, from 0.
        size: How many there are, positive.
    """

    rank: int = 0
    size: int = 1

    @staticmethod
    def here() -> "ProcessGroup":
        """Returns the processes that have been joined (see :func:`process_group`)."""
        if not (dist.is_available() and dist.is_initialized()):
            return ProcessGroup()
        return ProcessGroup(dist.get_rank(), dist.get_world_size())

    @property
    def first(self) -> bool:
        """Whether this is the process that writes."""
        return self.rank == 0

    def part(self, count: int) -> slice:
        """Returns which of ``count`` examples are this process's: equal parts, but for one."""
        return slice(count * self.rank // self.size, count * (self.rank + 1) // self.size)

    def total(self, values: Tensor) -> Tensor:
        """Returns the sum of the values of all processes."""
        if self.size > 1:
            values = values.clone()
            dist.all_reduce(values)
        return values

    def all(self, value: Any) -> list[Any]:
        """Returns the plain values of all processes, in order."""
        if self.size == 1:
            return [value]
        values = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def agree(self, value: Any) -> Any:
        """Returns the first process's value."""
        return self.all(value)[0]


@contextlib.contextmanager
def process_group() -> Iterator[ProcessGroup]:
    """Joins the processes that torchrun has started, for as long as it is entered."""
    meeting = "MASTER_ADDR" in os.environ and int(os.environ.get("WORLD_SIZE", 1)) > 1
    if not meeting or dist.is_initialized():
        yield ProcessGroup.here()
        return
    local = int(os.environ.get("LOCAL_RANK", 0))
    if torch.cuda.is_available():
        torch.cuda.set_device(local % torch.cuda.device_count())
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    try:
        yield ProcessGroup.here()
    finally:
        dist.destroy_process_group()


# --- The engines ---------------------------------------------------------------------------------


class Engine(ABC):
    """Abstract way in which a group shares the training of a model."""

    @abstractmethod
    def share(self, model: ScoreFunction, averages: list[ScoreFunction]) -> ScoreFunction:
        """Returns what the loss is computed with; its gradients are those of the whole batch.

        Arguments:
            model: The model, whose weights the optimiser will get; it is changed.
            averages: Copies of it that follow its weights.
        """

    @abstractmethod
    def gather(self, shared: ScoreFunction, on: bool) -> None:
        """Sets whether the next backward pass ends with the gradients of all processes."""


@dataclass(frozen=True)
class Replicated(Engine):
    """Every process holds the model (torch's DistributedDataParallel).

    Arguments:
        unused: Whether some weights may have no part in a loss, which costs a search.
    """

    unused: bool = False

    def share(self, model: ScoreFunction, averages: list[ScoreFunction]) -> ScoreFunction:
        if ProcessGroup.here().size == 1:
            return model
        network = _network(model)
        parallel = DistributedDataParallel(network, find_unused_parameters=self.unused)
        assert isinstance(model, ScoreModel)
        return ScoreModel(parallel, model.sde, model.parametrisation, model.noise_label)

    def gather(self, shared: ScoreFunction, on: bool) -> None:
        network = getattr(shared, "network", None)
        if isinstance(network, DistributedDataParallel):
            network.require_backward_grad_sync = on


@dataclass(frozen=True)
class Sharded(Engine):
    """Every process holds a part of each weight, its averages and its optimiser (fully_shard).

    Blocks of the network are gathered when they are computed, so that a network fits that is
    larger than the memory of one device. Checkpoints are written in parts, one for each process.

    Arguments:
        block: The least number of weights that are gathered together, positive.
    """

    block: int = 1_000_000

    def share(self, model: ScoreFunction, averages: list[ScoreFunction]) -> ScoreFunction:
        if ProcessGroup.here().size > 1:
            # Nothing writes into what a network returns.
            warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* view")
            self._shard(_network(model))
            for one in averages:  # no backward pass tells them to give up what was gathered
                self._shard(_network(one), reshard_after_forward=True)
        return model

    def _shard(self, network: nn.Module, **options: Any) -> None:
        """Shards blocks from the innermost that are large enough, then what is left."""
        from torch.distributed.fsdp import fully_shard  # slow to import

        for module in reversed(list(network.modules())):
            left = sum(p.numel() for p in module.parameters() if not in_parts(p))
            called = not isinstance(module, nn.ModuleList | nn.ModuleDict)
            if module is network or (called and left >= self.block):
                fully_shard(module, **options)

    def gather(self, shared: ScoreFunction, on: bool) -> None:
        choose = getattr(getattr(shared, "network", None), "set_requires_gradient_sync", None)
        if choose is not None:  # the network is sharded
            choose(on)


def _network(model: ScoreFunction) -> nn.Module:
    network = getattr(model, "network", None)
    if not isinstance(network, nn.Module):
        raise InputError("Several processes train a network that is a torch.nn.Module, no other.")
    if sum(1 for _ in model.parameters()) != sum(1 for _ in network.parameters()):
        raise InputError("Several processes train a network alone, and its SDE has weights too.")
    return network


# --- Tensors of which each process holds a part --------------------------------------------------


def in_parts(tree: Any) -> bool:
    """Whether a tensor, or one in a tree of values, is sharded (a ``DTensor``)."""
    match tree:
        case Tensor():
            return hasattr(tree, "to_local")  # its class is slow to import
        case Mapping():
            return any(in_parts(value) for value in tree.values())
        case list() | tuple():
            return any(in_parts(value) for value in tree)
    return False


def own(tensor: Tensor) -> Tensor:
    """Returns what this process holds of a tensor: all of it, unless it is sharded."""
    return tensor.to_local() if in_parts(tensor) else tensor  # type: ignore[attr-defined]


def whole(tree: Any) -> Any:
    """Returns a tree of values in which sharded tensors are whole; all processes must ask."""
    return _mapped(tree, lambda t: t.full_tensor() if in_parts(t) else t)  # type: ignore[attr-defined]


def like(tree: Any, pattern: Any) -> Any:
    """Returns whole tensors sharded as those of another tree are."""
    if isinstance(pattern, Mapping):
        return {key: like(value, pattern.get(key)) for key, value in tree.items()}
    if isinstance(pattern, Tensor) and in_parts(pattern) and not in_parts(tree):
        from torch.distributed.tensor import DTensor, distribute_tensor  # slow to import

        assert isinstance(pattern, DTensor)
        tree = tree.to(pattern.device)
        return distribute_tensor(tree, pattern.device_mesh, pattern.placements)
    return tree


def _mapped(tree: Any, act: Callable[[Tensor], Tensor]) -> Any:
    match tree:
        case Tensor():
            return act(tree)
        case Mapping():
            return {key: _mapped(value, act) for key, value in tree.items()}
        case list() | tuple():
            return type(tree)(_mapped(value, act) for value in tree)
    return tree
