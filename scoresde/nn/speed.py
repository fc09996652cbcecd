"""Faster inference of a trained network: half precision and compiled kernels."""

import functools
import logging
import random

import torch
import torch._functorch.config
from torch import Tensor, nn

from scoresde.errors import InputError
from scoresde.shapes import check_output

log = logging.getLogger("scoresde")

PRECISIONS = {"float32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
MODES = ("default", "reduce-overhead", "max-autotune")
LAYOUTS = {4: torch.channels_last, 5: torch.channels_last_3d}  # by the number of axes
_HEAVY = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


class HalfPrecision(nn.Module):
    """A network that computes products in 16 bits, and norms and embeddings in 32 bits.

    It uses autocast. The weights of products are stored in 16 bits, so they are not converted in
    every evaluation. It is meant for sampling; training keeps weights in 32 bits.

    Arguments:
        network: The network; its weights are changed.
        dtype: ``torch.bfloat16`` or ``torch.float16``.
    """

    def __init__(self, network: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.network = network
        self.dtype = dtype
        for module in network.modules():
            if isinstance(module, _HEAVY):
                module.to(dtype)

    def forward(self, x: Tensor, c: Tensor, **cond: Tensor) -> Tensor:
        """Returns the network's output, in the data type of ``x``."""
        with torch.autocast(x.device.type, self.dtype):
            return check_output(self.network(x, c, **cond)).to(x.dtype)


def channels_last(network: nn.Module) -> torch.memory_format:
    """Returns the memory layout in which most convolutions of a network are fastest."""
    volumes = any(parameter.ndim == 5 for parameter in network.parameters())
    return LAYOUTS[5 if volumes else 4]


def can_compile(device: torch.device) -> bool:
    """Returns whether ``torch.compile`` works for a device; if not, the log says why.

    It is tried on a small function, so a later error comes from the network.
    """
    obstacle = _obstacle(device)
    if obstacle is not None:
        log.warning(
            "The network is not compiled, since torch.compile failed (%s); install a C and C++ "
            "compiler such as gcc and g++, or set compile=false (train.compile=false in "
            "training).",
            obstacle,
        )
    return obstacle is None


@functools.cache
def _obstacle(device: torch.device) -> str | None:
    """Returns the reason why ``torch.compile`` does not work, or None."""
    shift = random.random()  # a new constant, since cached kernels would not test the compiler
    try:
        torch.compile(lambda x: x + shift)(torch.zeros(2, device=device))
    except Exception as error:  # compilers fail in many ways
        first, _, _ = str(error).strip().partition("\n")
        return first or type(error).__name__
    return None


def _device_of(network: nn.Module) -> torch.device:
    return next((p.device for p in network.parameters()), torch.device("cpu"))


def accelerated(
    network: nn.Module, precision: str = "float32", mode: str | None = None
) -> nn.Module:
    """Returns a faster version of a trained network.

    Arguments:
        network: The network, on its device.
        precision: ``float32``, ``bf16`` or ``fp16``.
        mode: Mode of ``torch.compile``: ``default``, ``reduce-overhead`` (CUDA graphs) or
            ``max-autotune``. If None, the network is not compiled. If compilation does not work,
            the network is not compiled, with a message in the log.

    Raises:
        InputError: If a name is unknown.
    """
    if precision not in PRECISIONS:
        raise InputError(f"precision must be one of {', '.join(PRECISIONS)}, got {precision}.")
    if mode not in (None, *MODES):
        raise InputError(f"compile must be false, true or one of {', '.join(MODES)}, got {mode}.")
    dtype = PRECISIONS[precision]
    fast = network if dtype is None else HalfPrecision(network, dtype)
    if mode is not None and can_compile(_device_of(network)):
        # Traces and posteriors differentiate one evaluation several times, so its compiled
        # backward pass must keep its buffers. Torch has no public option for this.
        torch._functorch.config.donated_buffer = False
        fast.compile(mode=mode)
    return fast
