"""A GPU that is not there: tensors with real values on the CPU that claim to be on ``cuda:0``.

To torch's C++ the tensors are wrappers on the device ``meta``, the one that a build without CUDA
can differentiate on without having it; Python is told ``cuda:0`` instead. Every operation, those
of a backward pass too, meets CUDA's rule first: one device for all, but for numbers (0-dim tensors
of the CPU) in elementwise operations, and indices. Then the CPU computes the values.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten

CUDA, CPU = torch.device("cuda", 0), torch.device("cpu")
_INSIDE = torch.device("meta")
_aten = torch.ops.aten

# Elementwise, but one device for all, so far as is sure.
_REFUSE_NUMBERS = {_aten.lerp, _aten.lerp_, _aten.clamp, _aten.clamp_}
# Take values from any device to that of their first argument.
_COPIES = {_aten.copy_, _aten._foreach_copy_, _aten.to, _aten._to_copy, _aten.fill, _aten.fill_}
_INDEXING = {_aten.index, _aten.index_put, _aten.index_put_, _aten._index_put_impl_}
_NARROW = {
    *(functional.linear, functional.conv1d, functional.conv2d, functional.conv_transpose2d),
    *(functional.scaled_dot_product_attention, torch.einsum, torch.matmul, torch.bmm, torch.mm),
    *(Tensor.matmul, Tensor.__matmul__, Tensor.__rmatmul__, Tensor.bmm, Tensor.mm),
}  # what autocast computes in few digits


class FakeCuda(Tensor):
    """A tensor that claims to be on ``cuda:0``; ``inner`` has its values."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> "FakeCuda":
        out = Tensor._make_wrapper_subclass(
            cls,
            inner.shape,
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=_INSIDE,
        )
        out.inner = inner
        return out

    def __repr__(self) -> str:
        return f"FakeCuda({self.inner})"

    def __deepcopy__(self, memo: dict) -> "FakeCuda":
        if id(self) not in memo:
            copy = FakeCuda(self.inner.clone())
            if isinstance(self, torch.nn.Parameter):
                copy = torch.nn.Parameter(copy)
            memo[id(self)] = copy.requires_grad_(self.requires_grad)
        return memo[id(self)]

    def __reduce_ex__(self, protocol: int) -> Any:
        return self.inner.__reduce_ex__(protocol)  # a file has the values

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        return _run(func, args, kwargs or {})


def _run(func: Any, args: tuple, kwargs: dict) -> Any:
    """Runs an operation on the values, once its devices are found to agree."""
    flat, spec = tree_flatten((args, kwargs))
    there = any(isinstance(a, FakeCuda) for a in flat)
    device = kwargs.get("device")
    goal = (CUDA if there else CPU) if device is None else CUDA if device == _INSIDE else device
    if func.overloadpacket in _COPIES and isinstance(args[0], Tensor) and device is None:
        goal = CUDA if isinstance(args[0], FakeCuda) else CPU
    if not there and goal == CPU:
        return func(*args, **kwargs)
    _check_devices(func, args, flat)
    if func is _aten._efficientzerotensor.default:  # has no memory, which a wrapper would hide
        func = _aten.zeros.default
    plain = [
        a.inner if isinstance(a, FakeCuda) else CPU if isinstance(a, torch.device) else a
        for a in flat
    ]
    inner_args, inner_kwargs = tree_unflatten(plain, spec)
    out = func(*inner_args, **inner_kwargs)
    if device is not None and any(out is a for a in plain):
        out = out.clone()
    if goal == CPU:
        return args[0] if func._schema.is_mutable else out
    out = tree_map_only(Tensor, FakeCuda, out)
    aliases = _facts(func)[0] and device is None
    return return_and_correct_aliasing(func, args, kwargs, out) if aliases else out


@cache
def _facts(func: Any) -> tuple[bool, bool]:
    """Whether an operation returns a part of what it is given, and whether it takes numbers."""
    aliases = any(value.alias_info is not None for value in func._schema.returns)
    numbers = torch.Tag.pointwise in func.tags and func.overloadpacket not in _REFUSE_NUMBERS
    return aliases or func._schema.is_mutable, numbers


def _check_devices(func: Any, args: tuple, flat: list) -> None:
    """Refuses tensors of the CPU where CUDA does.

    Raises:
        RuntimeError: If a tensor is on the wrong device.
    """
    name = func.overloadpacket
    if name in _COPIES:
        return
    here = [a for a in flat if isinstance(a, Tensor) and not isinstance(a, FakeCuda)]
    if not here or all(not isinstance(a, FakeCuda) for a in flat):
        return
    if name in _INDEXING and isinstance(args[0], FakeCuda):  # indices may stay on the CPU
        here = [a for a in here if len(args) > 2 and a is args[2]]
        numbers = True
    else:
        numbers = _facts(func)[1] and not isinstance(args[0], list | tuple)
        # What an operation writes into, and a condition, decide where it runs.
        deciding = args[0] if func._schema.is_mutable or name is _aten.where else None
        if name in (_aten.masked_fill, _aten.masked_fill_):
            deciding, numbers = args[1], True
        numbers = numbers and all(a is not deciding for a in here)
    wrong = [a for a in here if a.ndim > 0 or not numbers]
    if wrong:
        raise RuntimeError(
            f"Expected all tensors to be on the same device, but found at least two devices, "
            f"cuda:0 and cpu! ({func}, {tuple(wrong[0].shape)} on the CPU)"
        )


class _Dispatch(TorchDispatchMode):
    """Makes tensors on the pretended device, and moves them there."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        return _run(func, args, kwargs or {})


class _Names(TorchFunctionMode):
    """Says ``cuda`` to Python, and ``meta`` to C++."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        if func == Tensor.device.__get__:
            device = func(*args)
            return CUDA if device == _INSIDE else device
        if func == Tensor.is_cuda.__get__:
            return Tensor.is_meta.__get__(args[0])
        if func == Tensor.is_meta.__get__:
            return False
        if func is Tensor.numpy and Tensor.is_meta.__get__(args[0]):
            raise TypeError("can't convert cuda:0 device type tensor to numpy.")
        if func is Tensor.tolist:
            return args[0].cpu().tolist()
        if func is Tensor.cuda:
            func, args = Tensor.to, (args[0], CUDA)
        if func is torch.device:
            return func(*args, **(kwargs or {}))
        _check_generator(args, kwargs or {})
        args = tuple(map(_inside, args))
        kwargs = {name: _inside(value) for name, value in (kwargs or {}).items()}
        if func in (torch.tensor, torch.as_tensor) and kwargs.get("device") == _INSIDE:
            return func(*args, **kwargs | {"device": CPU}).to(_INSIDE)
        if func is Tensor.new_tensor and Tensor.is_meta.__get__(args[0]):
            return torch.tensor(args[1], **{"dtype": args[0].dtype, **kwargs}).to(_INSIDE)
        return func(*args, **kwargs)


def _check_generator(args: tuple, kwargs: dict) -> None:
    generator = kwargs.get("generator")
    if generator is None:
        return
    wanted = kwargs.get("device") or (args[0].device if isinstance(args[0], Tensor) else CPU)
    place, wanted = getattr(generator, "place", CPU).type, torch.device(wanted).type
    if place != wanted:
        raise RuntimeError(f"Expected a '{wanted}' device type for generator but found '{place}'")


def _inside(value: Any) -> Any:
    named = isinstance(value, torch.device) or (isinstance(value, str) and value[:4] == "cuda")
    return _INSIDE if named and torch.device(value).type == "cuda" else value


class _Narrow(TorchFunctionMode):
    """Autocast: what it is known for is computed in another data type."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def __torch_function__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        if func in _NARROW:
            args, kwargs = tree_map_only(Tensor, self._cast, (args, kwargs or {}))
        return func(*args, **(kwargs or {}))

    def _cast(self, x: Tensor) -> Tensor:
        return x.to(self.dtype) if x.device == CUDA and x.dtype == torch.float32 else x


class FakeGenerator(torch.Generator):
    """A generator on either device."""

    def __new__(cls, device: Any = "cpu") -> "FakeGenerator":
        generator = super().__new__(cls)
        generator.place = CUDA if torch.device(device).type == "cuda" else CPU
        return generator

    def manual_seed(self, seed: int) -> "FakeGenerator":
        super().manual_seed(seed)
        return self


@contextmanager
def fake_cuda() -> Iterator[torch.device]:
    """Pretends that there is a GPU; yields its device."""
    real = torch.autocast

    def autocast(device_type: str, dtype: Any = None, enabled: bool = True, **options: Any) -> Any:
        if device_type != "cuda":
            return real(device_type, dtype, enabled, **options)
        return _Narrow(dtype or torch.float16) if enabled else ExitStack()

    patches: dict[str, Callable] = {
        "torch.autocast": autocast,
        "torch.Generator": FakeGenerator,
        "torch.cuda.is_available": lambda: True,
        "torch.cuda.device_count": lambda: 1,
        "torch.cuda.current_device": lambda: 0,
        "torch.cuda.synchronize": lambda *_: None,
        "torch.cuda.get_rng_state": lambda *_: torch.get_rng_state(),
        "torch.cuda.set_rng_state": lambda state, *_: torch.set_rng_state(state),
    }
    with ExitStack() as stack:
        for name, value in patches.items():
            stack.enter_context(mock.patch(name, value))
        stack.enter_context(_Names())
        stack.enter_context(_Dispatch())
        torch._C._set_only_lift_cpu_tensors(True)
        stack.callback(torch._C._set_only_lift_cpu_tensors, False)
        yield CUDA
