"""The exact model of jointly Gaussian pairs, for bridges and stochastic interpolants."""

import torch
from torch import Tensor

from scoresde.errors import InputError, check_count
from scoresde.model.base import Model
from scoresde.model.exact import check_shape, check_symmetric, floats
from scoresde.passes import count_pass
from scoresde.sde import Interpolant, as_time, check_source
from scoresde.shapes import one_or_each
from scoresde.streams import Purpose, Streams


class GaussianBridge(Model):
    r"""The exact model of pairs :math:`(x_0, x_1) \sim N(m, C)` on any interpolant.

    With :math:`x_t = a x_0 + b x_1 + c z`, its mean :math:`m_t` and covariance :math:`V`,

    .. math::
        E[x_0 \mid x_t] = m_0 + (a C_{00} + b C_{01}) V^{-1} (x_t - m_t), \qquad
        \nabla \log p_t = -V^{-1} (x_t - m_t) .

    If the model sees the source, the same formulas hold for the law of :math:`x_0` given
    :math:`x_1`, whose covariance is :math:`C_{00} - C_{01} C_{11}^{-1} C_{10}`.

    Arguments:
        mean: The means of examples and sources, with shape ``(2, *)``.
        covariance: The joint covariance of flattened examples and sources, ``(2 D, 2 D)``,
            symmetric and positive definite.
        process: The bridge or interpolant.
        sees_source: Whether the model is given the source.

    Raises:
        InputError: If the shapes disagree, or the covariance is not positive definite.

    Example:
        >>> from scoresde.sde import InDI
        >>> pairs = GaussianBridge(torch.zeros(2, 1), [[1.0, 0.8], [0.8, 0.89]], InDI())
        >>> pairs.denoise(torch.tensor([[0.89]]), 1.0)
        tensor([[0.8000]])
    """

    mean: Tensor
    covariance: Tensor

    def __init__(
        self,
        mean: Tensor,
        covariance: Tensor,
        process: Interpolant,
        sees_source: bool = False,
    ) -> None:
        super().__init__()
        mean = floats(mean)
        covariance = floats(covariance, mean)
        if mean.ndim < 2 or len(mean) != 2 or covariance.shape != (mean.numel(), mean.numel()):
            raise InputError(
                "mean and covariance must have shapes (2, *) and (2 D, 2 D), got "
                f"{tuple(mean.shape)} and {tuple(covariance.shape)}."
            )
        check_symmetric(covariance)
        smallest = torch.linalg.eigvalsh(covariance).min()
        if not bool(smallest > 0):
            raise InputError(
                f"covariance must be positive definite, got the eigenvalue {smallest:.4g}; add "
                "noise to the sources."
            )
        if not isinstance(process, Interpolant):
            raise InputError(
                f"process must be an Interpolant such as InDI(), got {type(process).__name__}."
            )
        self._process, self.sees_source = process, sees_source
        self.register_buffer("mean", mean)
        self.register_buffer("covariance", covariance)

    @property
    def process(self) -> Interpolant:
        """The bridge or interpolant."""
        return self._process

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of one example."""
        return tuple(self.mean.shape[1:])

    def takes(self, name: str) -> bool:
        """Returns whether it takes a condition; it takes only the source."""
        return name == "source"

    def denoise(self, x: Tensor, t: Tensor, **cond: Tensor) -> Tensor:
        r"""Returns :math:`E[x_0 \mid x_t]`, given the source too if ``sees_source``."""
        w = (torch.ones(()), torch.zeros(()), torch.zeros(()))
        return self._expected(x, as_time(t), cond, w)

    def velocity(self, x: Tensor, t: Tensor, **cond: Tensor) -> Tensor:
        r"""Returns :math:`E[a' x_0 + b' x_1 + c' z \mid x_t]`."""
        t = as_time(t)
        p = self._process
        return self._expected(x, t, cond, (p.alpha_dot(t), p.sigma_dot(t), p.gamma_rate(t)))

    def score(self, x: Tensor, t: Tensor, **cond: Tensor) -> Tensor:
        r"""Returns :math:`\nabla_x \log p_t(x)`."""
        w = (torch.zeros(()), torch.zeros(()), -torch.ones(()))
        return self._expected(x, as_time(t), cond, w)

    def reverse_drift(self, x: Tensor, t: Tensor, diffusion: float, **cond: Tensor) -> Tensor:
        r"""Returns the drift :math:`u - \epsilon \nabla \log p_t` of the SDE from t = 1 to 0."""
        t = as_time(t)
        p = self._process
        rates = p.alpha_dot(t), p.sigma_dot(t), p.gamma_rate(t) + diffusion
        return self._expected(x, t, cond, rates)

    def sample(self, n: int, *, seed: int | None = None) -> tuple[Tensor, Tensor]:
        """Draws ``n`` examples and their sources, each with shape ``(n, *)``."""
        streams = Streams.of(seed, batch=check_count("n", n), device=self.mean.device)
        z = streams.normal((self.mean.numel(),), Purpose.DATA, dtype=self.mean.dtype)
        both = self.mean.flatten() + z @ torch.linalg.cholesky(self.covariance).T
        x, y = both.unflatten(1, (2, -1)).unbind(1)
        return x.reshape(n, *self.shape), y.reshape(n, *self.shape)

    def posterior(self, source: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the mean ``(B, *)`` and the covariance ``(D, D)`` of examples given sources."""
        c00, c01, c11 = self._blocks(source)
        gain = torch.linalg.solve(c11, c01.T).T
        left = (source.flatten(1) - self.mean[1].flatten().to(source)) @ gain.T
        mean = self.mean[0].flatten().to(source) + left
        return mean.reshape(source.shape), c00 - gain @ c01.T

    def _blocks(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        d = len(self.covariance) // 2
        c = self.covariance.to(x)
        return c[:d, :d], c[:d, d:], c[d:, d:]

    def _expected(
        self, x: Tensor, t: Tensor, cond: dict[str, Tensor], weights: tuple[Tensor, ...]
    ) -> Tensor:
        """Returns E[p x_0 + q x_1 + (r / c) z | x_t] for weights (p, q, r), ``(B or 1, 1)``."""
        check_shape(x, self.mean.shape[1:])
        count_pass(len(x))
        p, q, r = (one_or_each(as_time(w), x).to(x)[:, :, None] for w in weights)
        a, b, c = (
            one_or_each(f(t), x).to(x)[:, :, None]
            for f in (self._process.alpha, self._process.sigma, self._process.gamma)
        )
        eye = torch.eye(x[0].numel(), dtype=x.dtype, device=x.device)
        if self.sees_source:
            source = check_source(cond, x).to(x)
            m0, c00 = self.posterior(source)
            m0, m1 = m0.flatten(1), source.flatten(1)
            shared, variance = p * a * c00, a**2 * c00
        else:
            c00, c01, c11 = self._blocks(x)
            m0, m1 = (part.flatten()[None].to(x) for part in self.mean)
            shared = p * (a * c00 + b * c01) + q * (a * c01.T + b * c11)
            variance = a**2 * c00 + a * b * (c01 + c01.T) + b**2 * c11
        left = x.flatten(1) - a[..., 0] * m0 - b[..., 0] * m1
        # If both vanish (t = 1 of a bridge without noise), the state carries no information.
        empty = ((a == 0) & (c == 0)).to(x) if self.sees_source else torch.zeros_like(a)
        solved = _solve(variance + (c**2 + empty) * eye, left)
        gained = _times(shared + r * eye, solved)
        return (p[..., 0] * m0 + q[..., 0] * m1 + gained).reshape(x.shape)


def _solve(matrix: Tensor, x: Tensor) -> Tensor:
    """Returns :math:`M^{-1} x` for matrices ``(B or 1, D, D)`` and vectors ``(B, D)``."""
    if len(matrix) == 1:
        return torch.linalg.solve(matrix[0], x.T).T
    return torch.linalg.solve(matrix, x[..., None])[..., 0]


def _times(matrix: Tensor, x: Tensor) -> Tensor:
    if len(matrix) == 1:
        return x @ matrix[0].T
    return (matrix @ x[..., None])[..., 0]
