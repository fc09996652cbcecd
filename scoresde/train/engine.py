"""Training of one model in several processes, with torch's own engines.

The examples of a batch are divided between the processes, the gradients are averaged, and every
process takes the same step. Batches, times and noise are functions of the seed and the example, so
the weights do not depend on the number of processes, up to rounding.
"""

import contextlib
import os
import sys
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from scoresde.loss import Loss
from scoresde.model import Trainable
from scoresde.sde import Interpolant

if TYPE_CHECKING:
    from torch.distributed.fsdp import FSDPModule  # slow to import

# --- The processes -------------------------------------------------------------------------------


@dataclass(frozen=True)
class ProcessGroup:
    """A group of processes that train together; a single process by default.

    Arguments:
        rank: The number of this process, from 0.
        size: The number of processes, positive.
    """

    rank: int = 0
    size: int = 1

    @staticmethod
    def here() -> "ProcessGroup":
        """Returns the current process group (see :func:`process_group`)."""
        if not (dist.is_available() and dist.is_initialized()):
            return ProcessGroup()
        return ProcessGroup(dist.get_rank(), dist.get_world_size())

    @property
    def first(self) -> bool:
        """True for the process that writes."""
        return self.rank == 0

    def part(self, count: int) -> slice:
        """Returns this process's slice of ``count`` examples; sizes differ by at most one."""
        return slice(count * self.rank // self.size, count * (self.rank + 1) // self.size)

    def total(self, values: Tensor) -> Tensor:
        """Returns the sum of the values of all processes."""
        if self.size > 1:
            values = values.clone()
            dist.all_reduce(values)
        return values

    def all(self, value: Any) -> list[Any]:
        """Returns the plain values of all processes, by rank."""
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
    """Context manager that joins the processes started by torchrun into a group."""
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


# --- The shared loss -----------------------------------------------------------------------------


class ModelLoss(nn.Module):
    """A model and its loss as one module, whose ``forward`` performs the whole computation.

    If the loss is a module, its weights and buffers are included.

    Arguments:
        model: The model.
        loss: The loss.
    """

    def __init__(self, model: Trainable, loss: Loss) -> None:
        super().__init__()
        self.model, self.loss = model, loss

    def forward(
        self, x: Tensor, **options: Any
    ) -> tuple[Tensor, dict[str, Tensor], Tensor | None]:
        """Returns the value, parts and record of the loss; arguments as for :meth:`Loss.terms`."""
        terms = self.loss.terms(self.model, x, **options)
        return terms.value, terms.parts, terms.record

    def loss_state(self) -> dict[str, Tensor]:
        """Returns the weights and buffers of the loss; an empty mapping if it has none."""
        return self.loss.state_dict() if isinstance(self.loss, nn.Module) else {}

    def load_loss_state(self, state: Mapping[str, Tensor]) -> None:
        """Loads the weights and buffers of the loss.

        Raises:
            RuntimeError: If names or shapes do not match.
        """
        if isinstance(self.loss, nn.Module):
            self.loss.load_state_dict(state)


class SharedLoss:
    """Loss of a model shared by a group of processes; this class is for a single process.

    Arguments:
        terms: Module that computes the loss, as :class:`ModelLoss` does.
    """

    def __init__(self, terms: nn.Module) -> None:
        self.terms = terms

    @contextlib.contextmanager
    def computing(self, last: bool) -> Iterator[None]:
        """Context manager for computing the loss of a part of a batch and its gradient.

        Arguments:
            last: Whether this is the last part. After it, the gradients are averaged over all
                processes.
        """
        yield


class _ReplicatedLoss(SharedLoss):
    def __init__(self, terms: DistributedDataParallel) -> None:
        super().__init__(terms)
        self.parallel = terms

    @contextlib.contextmanager
    def computing(self, last: bool) -> Iterator[None]:
        with contextlib.nullcontext() if last else self.parallel.no_sync():
            yield


class _ShardedLoss(SharedLoss):
    def __init__(self, terms: ModelLoss, networks: "Sequence[FSDPModule]") -> None:
        super().__init__(terms)
        self.networks = networks
        self.rest = [p for p in terms.parameters() if not in_parts(p)]

    @contextlib.contextmanager
    def computing(self, last: bool) -> Iterator[None]:
        for network in self.networks:
            network.set_requires_gradient_sync(last)
        yield
        if last:
            _average([p.grad for p in self.rest if p.grad is not None])


def _average(gradients: list[Tensor]) -> None:
    """Averages whole gradients over the processes."""
    if gradients:
        group = ProcessGroup.here()
        means = group.total(torch.cat([g.flatten() for g in gradients])) / group.size
        for gradient, mean in zip(
            gradients, means.split([g.numel() for g in gradients]), strict=True
        ):
            gradient.copy_(mean.view_as(gradient))


def networks(model: nn.Module) -> list[nn.Module]:
    """Returns the networks of a model: the outermost modules that are called by ``forward``.

    Other parts, such as models, learned parametrisations and lists, have other methods or none;
    they may contain networks. A process is not searched: schedules are small.
    """
    found: dict[nn.Module, None] = {}
    for child in model.children():
        if isinstance(child, Interpolant):
            continue
        # The default for a module without its own forward.
        asked = isinstance(child, Trainable) or type(child).forward is nn.Module.forward
        found |= dict.fromkeys(networks(child) if asked else [child])
    return list(found)


# --- The engines ---------------------------------------------------------------------------------


class Engine(ABC):
    """Base class for parallelism strategies."""

    @abstractmethod
    def share(self, terms: ModelLoss, averages: Sequence[Trainable]) -> SharedLoss:
        """Returns the loss whose gradients are those of the whole batch.

        Arguments:
            terms: The loss of the model; it is changed. The optimiser updates its weights.
            averages: Moving averages of the model.
        """


@dataclass(frozen=True)
class Replicated(Engine):
    """Every process holds the model (torch's DistributedDataParallel).

    Arguments:
        unused: Whether some weights may not contribute to the loss; finding them costs time.
    """

    unused: bool = False

    def share(self, terms: ModelLoss, averages: Sequence[Trainable]) -> SharedLoss:
        if ProcessGroup.here().size == 1:
            return SharedLoss(terms)
        parallel = DistributedDataParallel(terms, find_unused_parameters=self.unused)
        return _ReplicatedLoss(parallel)


@dataclass(frozen=True)
class Sharded(Engine):
    """Each process holds a part of every weight, average and optimiser state (fully_shard).

    Blocks of a network are gathered when they are computed, so the network may be larger than the
    memory of one device. Checkpoints are written in parts, one per process. Weights outside the
    networks, such as those of a learned schedule or a loss, are few and are not sharded.

    Arguments:
        block: The minimum number of weights gathered together, positive.
    """

    block: int = 1_000_000

    def share(self, terms: ModelLoss, averages: Sequence[Trainable]) -> SharedLoss:
        if ProcessGroup.here().size == 1:
            return SharedLoss(terms)
        # Outputs of a network are never modified in place.
        warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* view")
        for one in averages:  # without a backward pass, nothing else frees the gathered weights
            for network in networks(one):
                self._shard(network, reshard_after_forward=True)
        return _ShardedLoss(terms, [self._shard(network) for network in networks(terms.model)])

    def _shard(self, network: nn.Module, **options: Any) -> "FSDPModule":
        """Shards sufficiently large blocks from the innermost outwards, then the rest."""
        from torch.distributed.fsdp import fully_shard  # slow to import

        # fully_shard supports only this layout.
        network.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
        for module in reversed(list(network.modules())[1:]):
            left = sum(p.numel() for p in module.parameters() if not in_parts(p))
            if left >= self.block and not isinstance(module, nn.ModuleList | nn.ModuleDict):
                fully_shard(module, **options)
        return fully_shard(network, **options)


# --- Sharded tensors -----------------------------------------------------------------------------


def in_parts(tree: Any) -> bool:
    """Returns whether a tensor, or any tensor in a tree, is sharded (a ``DTensor``)."""
    match tree:
        case Tensor():
            # The class is slow to import; if it was never imported, there are no such tensors.
            loaded = sys.modules.get("torch.distributed.tensor")
            return loaded is not None and isinstance(tree, loaded.DTensor)
        case Mapping():
            return any(in_parts(value) for value in tree.values())
        case list() | tuple():
            return any(in_parts(value) for value in tree)
    return False


def own(tensor: Tensor) -> Tensor:
    """Returns this process's part of a tensor: the whole tensor unless it is sharded."""
    return tensor.to_local() if in_parts(tensor) else tensor  # type: ignore[attr-defined]


def whole(tree: Any) -> Any:
    """Returns a tree with sharded tensors gathered; all processes must call it."""
    return _mapped(tree, lambda t: t.full_tensor() if in_parts(t) else t)  # type: ignore[attr-defined]


def like(tree: Any, pattern: Any) -> Any:
    """Returns a tree of whole tensors, sharded like the tensors of another tree."""
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
