"""A classifier of noised examples."""

from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor, nn

from scoresde.errors import InputError
from scoresde.model.base import Trainable
from scoresde.model.noise_label import NoiseLabel, NoiseLevel
from scoresde.passes import count_pass
from scoresde.recipe import describable
from scoresde.sde import SDE, as_time
from scoresde.shapes import check_output, expand


@describable
class Classifier(Trainable):
    r"""The class of a noised example, :math:`p(c \mid x_t)` for all times.

    It is trained like a model, with :class:`~scoresde.loss.CrossEntropy`, and used by
    :class:`~scoresde.guidance.ClassifierGuidance`. The network sees
    :math:`x_t / \sqrt{\alpha^2 + \sigma^2}`, which has unit variance if the data have.

    Arguments:
        network: A callable ``network(x, c)`` from states ``(B, *)`` and noise labels ``(B,)`` to
            one number per class, ``(B, C)``, such as an :class:`~scoresde.nn.Encoder` or an
            ``MLP(outputs=C)``.
        sde: The forward process.
        noise_label: The number by which the network is conditioned on the time.

    Raises:
        InputError: If ``sde`` is not an SDE.

    References:
        Dhariwal and Nichol 2021, https://arxiv.org/abs/2105.05233 (section 4).

    Example:
        >>> from scoresde.nn import MLP
        >>> from scoresde.sde import VPSDE
        >>> classifier = Classifier(MLP(2, width=8, outputs=3), VPSDE())
        >>> classifier(torch.zeros(4, 2), torch.tensor(0.1)).shape
        torch.Size([4, 3])
    """

    def __init__(
        self,
        network: nn.Module | Callable[..., Tensor],
        sde: SDE,
        noise_label: NoiseLabel | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(sde, SDE):
            raise InputError(f"sde must be an SDE such as VPSDE(), got {type(sde).__name__}.")
        self.network = network
        self.sde = sde
        self.noise_label = noise_label or NoiseLevel()

    @property
    def process(self) -> SDE:
        """The forward process."""
        return self.sde

    def takes(self, name: str) -> bool:
        """Returns whether it takes a condition; only the classes, which its loss requires."""
        return name == "label"

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        r"""Returns :math:`\log p(c \mid x_t)` in nats, ``(B, C)``.

        Arguments:
            x: States, with shape ``(B, *)``.
            t: Their time, ``()`` or ``(B,)``.

        Raises:
            InputError: If the network's output has another shape.
        """
        t = as_time(t)
        alpha, sigma = self.sde.alpha(t), self.sde.sigma(t)
        dtype = x.dtype if self._float() is None else self.dtype
        c = self.noise_label(self.sde, t).to(x.device, torch.promote_types(torch.float32, dtype))
        scaled = expand((alpha**2 + sigma**2).rsqrt(), x) * x
        count_pass(len(x))
        network = cast(Callable[..., Tensor], self.network)
        output = check_output(network(scaled.to(dtype), c.expand(len(x))))
        if output.ndim != 2 or len(output) != len(x):
            raise InputError(
                f"network must return one number per class, ({len(x)}, C), got "
                f"{tuple(output.shape)}; use Encoder(outputs=C)."
            )
        return torch.log_softmax(output.to(torch.promote_types(torch.float32, dtype)), 1)
