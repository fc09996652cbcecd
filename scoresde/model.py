r"""The score, the noise and the denoised data: three equal views of one function.

At time :math:`t` an example is :math:`x = \alpha x_0 + \sigma z`. What the noise was, what the
data was, and where the density grows are one question (Tweedie's formula):

.. math::
    \hat z(x, t) = E[z \mid x], \qquad
    D(x, t) = E[x_0 \mid x] = \frac{x - \sigma \hat z}{\alpha}, \qquad
    \nabla_x \log p_t(x) = -\frac{\hat z}{\sigma} .

A :class:`ScoreFunction` offers the three. A :class:`ScoreModel` is a network plus an SDE that
learns them; :class:`GaussianModel` and :class:`GaussianMixtureModel` know them in closed form, and
with them everything else can be held against the truth.

References:
    Efron, *Tweedie's formula and selection bias*, 2011.
    Song et al., https://arxiv.org/abs/2011.13456.
    Karras et al., *Elucidating the design space of diffusion-based generative models*, 2022,
    https://arxiv.org/abs/2206.00364 (section 5 and table 1).
    Salimans and Ho, *Progressive distillation*, 2022, https://arxiv.org/abs/2202.00512 (v).
"""

import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from scoresde.errors import InputError, check_count
from scoresde.sde import SDE, DiscreteVP, as_time
from scoresde.shapes import expand, one_or_each
from scoresde.streams import Purpose, Streams

Pair = tuple[Tensor, Tensor]


class ScoreFunction(nn.Module, ABC):
    """Abstract: what samplers and likelihoods ask for.

    In every method ``x`` has the shape ``(B, *)``, ``t`` the shape ``()`` or ``(B,)`` with values
    in [0, 1], and the result has the shape and the data type of ``x``. Further keywords are
    conditions for the network.
    """

    sde: SDE

    @abstractmethod
    def score(self, x: Tensor, t: Tensor, **cond: Tensor) -> Tensor:
        r"""Returns the score :math:`\nabla_x \log p_t(x)`."""

    @abstractmethod
    def noise(self, x: Tensor, t: Tensor, **cond: Tensor) -> Tensor:
        r"""Returns the expected noise :math:`E[z \mid x_t = x]`."""

    @abstractmethod
    def denoise(self, x: Tensor, t: Tensor, **cond: Tensor) -> Tensor:
        r"""Returns the expected data :math:`E[x_0 \mid x_t = x]`."""

    def _float(self) -> Tensor | None:
        """Returns the first array of floats that the model holds, if any."""
        arrays = itertools.chain(self.parameters(), self.buffers())
        return next((a for a in arrays if a.is_floating_point()), None)

    @property
    def dtype(self) -> torch.dtype:
        """The data type that the model computes in (torch's default if it holds no numbers)."""
        array = self._float()
        return torch.get_default_dtype() if array is None else array.dtype

    @property
    def device(self) -> torch.device:
        """The device that the model is on."""
        array = self._float()
        return torch.get_default_device() if array is None else array.device

    def state(self, x: Tensor) -> Tensor:
        """Returns data as a state around the model: no narrower than float32 nor the model."""
        dtype = torch.promote_types(torch.promote_types(torch.float32, self.dtype), x.dtype)
        return x.to(self.device, dtype)


class Evaluations:
    """A score function with its conditions bound, which counts the network's passes.

    Arguments:
        model: A score function.
        cond: The conditions, each with shape ``(B, *)``.
    """

    def __init__(self, model: ScoreFunction, cond: dict[str, Tensor] | None = None) -> None:
        self.model = model
        self.sde = model.sde
        self.cond = cond or {}
        self.count: int | Tensor = 0

    def score(self, x: Tensor, t: Tensor) -> Tensor:
        """Returns the score, and counts one pass."""
        self.count += 1
        return self.model.score(x, t, **self.cond)

    def noise(self, x: Tensor, t: Tensor) -> Tensor:
        """Returns the expected noise, and counts one pass."""
        self.count += 1
        return self.model.noise(x, t, **self.cond)

    def denoise(self, x: Tensor, t: Tensor) -> Tensor:
        """Returns the expected data, and counts one pass."""
        self.count += 1
        return self.model.denoise(x, t, **self.cond)

    def velocity(self, x: Tensor, t: Tensor) -> Tensor:
        r"""Returns the probability-flow field, :math:`f x + g^2 \hat z / (2 \sigma)`."""
        return self._drift(x, t, 0.5)

    def reverse_drift(self, x: Tensor, t: Tensor) -> Tensor:
        r"""Returns the drift of the reverse SDE, :math:`f x + g^2 \hat z / \sigma`."""
        return self._drift(x, t, 1.0)

    def _drift(self, x: Tensor, t: Tensor, share: float) -> Tensor:
        gain = share * self.sde.g(t) ** 2 / self.sde.sigma(t)
        return expand(self.sde.f(t), x) * x + expand(gain, x) * self.noise(x, t)

    def nfe(self, x: Tensor) -> Tensor:
        """Returns the number of passes so far for each example of ``x``, int64 ``(B,)``."""
        return torch.zeros(len(x), dtype=torch.int64, device=x.device) + self.count


def check_model(model: ScoreFunction) -> None:
    """Checks a model.

    Raises:
        InputError: If it is no score function.
    """
    if not isinstance(model, ScoreFunction):
        raise InputError(
            f"A score function is needed and {type(model).__name__} is none; wrap the network: "
            "ScoreModel(network, sde)."
        )


def check_batch(x: Tensor) -> None:
    """Checks the form of a batch of examples.

    Raises:
        InputError: If ``x`` is not a batch ``(B, *)`` of floats.
    """
    if x.ndim < 2 or len(x) == 0 or not x.is_floating_point():
        raise InputError(
            f"Data of shape {tuple(x.shape)} and type {x.dtype} are no batch of examples; give "
            "floats (B, ...), with integers dequantised."
        )


def check_data(x: Tensor) -> None:
    """Checks a batch of examples and their values, for which a GPU has to be waited for.

    Raises:
        InputError: If ``x`` is not a batch ``(B, *)`` of floats, all of them finite.
    """
    check_batch(x)
    if not bool(torch.isfinite(x).all()):
        raise InputError("The data have values that are not finite; remove or replace them.")


@contextmanager
def evaluating(model: ScoreFunction, frozen: bool = False) -> Iterator[None]:
    """Switches dropout off for a while: a solver needs the same field at every call.

    Arguments:
        model: A score function.
        frozen: Whether its parameters need no gradients for the while. Then what a layer keeps
            for them is not kept, and a compiled network does not compute them.
    """
    training = [module for module in model.modules() if module.training]
    learned = [p for p in model.parameters() if frozen and p.requires_grad]
    model.eval()
    for parameter in learned:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for module in training:
            module.training = True
        for parameter in learned:
            parameter.requires_grad_(True)


# --- What a network's output means ---------------------------------------------------------------


@dataclass(frozen=True)
class Parametrisation(ABC):
    r"""Abstract: reads the network's output as noise and as data.

    All of them are linear. Given :math:`\alpha` and :math:`\sigma`, each method returns the two
    coefficients of :math:`a x + b F`, where :math:`F` is the network's output.

    Arguments:
        sigma_data: The data's standard deviation :math:`\sigma_d`. The network's input is divided
            by that of :math:`x_t`, :math:`n = \sqrt{\alpha^2 \sigma_d^2 + \sigma^2}`; ``None``
            leaves the input as it is, as the first publications did.
    """

    sigma_data: float | None = 1.0

    def __post_init__(self) -> None:
        if self.sigma_data is not None and not self.sigma_data > 0:
            raise InputError(
                f"sigma_data={self.sigma_data} is not positive; give the standard deviation of "
                "the data in model units (about 0.5 for images in [-1, 1])."
            )

    @abstractmethod
    def to_noise(self, alpha: Tensor, sigma: Tensor) -> Pair:
        """Returns the coefficients of the expected noise."""

    @abstractmethod
    def to_data(self, alpha: Tensor, sigma: Tensor) -> Pair:
        """Returns the coefficients of the expected data."""

    def scale_in(self, alpha: Tensor, sigma: Tensor) -> Tensor:
        """Returns the factor of the network's input."""
        if self.sigma_data is None:
            return torch.ones_like(alpha)
        return torch.rsqrt((alpha * self.sigma_data) ** 2 + sigma**2)


@dataclass(frozen=True)
class NoiseParametrisation(Parametrisation):
    r"""The network predicts the noise: :math:`\hat z = F` (Ho et al. 2020)."""

    def to_noise(self, alpha: Tensor, sigma: Tensor) -> Pair:
        return torch.zeros_like(alpha), torch.ones_like(alpha)

    def to_data(self, alpha: Tensor, sigma: Tensor) -> Pair:
        return 1 / alpha, -sigma / alpha


@dataclass(frozen=True)
class DataParametrisation(Parametrisation):
    r"""The network predicts the data: :math:`D = F`."""

    def to_noise(self, alpha: Tensor, sigma: Tensor) -> Pair:
        return 1 / sigma, -alpha / sigma

    def to_data(self, alpha: Tensor, sigma: Tensor) -> Pair:
        return torch.zeros_like(alpha), torch.ones_like(alpha)


@dataclass(frozen=True)
class VParametrisation(Parametrisation):
    r"""The network predicts :math:`v = \alpha z - \sigma x_0` (Salimans and Ho 2022).

    Together with :math:`x = \alpha x_0 + \sigma z` this is solved for both; with
    :math:`\alpha^2 + \sigma^2 \neq 1` too:

    .. math::
        \hat z = \frac{\sigma x + \alpha F}{\alpha^2 + \sigma^2}, \qquad
        D = \frac{\alpha x - \sigma F}{\alpha^2 + \sigma^2}
    """

    def to_noise(self, alpha: Tensor, sigma: Tensor) -> Pair:
        norm = alpha**2 + sigma**2
        return sigma / norm, alpha / norm

    def to_data(self, alpha: Tensor, sigma: Tensor) -> Pair:
        norm = alpha**2 + sigma**2
        return alpha / norm, -sigma / norm


@dataclass(frozen=True)
class ScoreParametrisation(Parametrisation):
    r"""The network predicts the score itself: :math:`\hat z = -\sigma F`."""

    def to_noise(self, alpha: Tensor, sigma: Tensor) -> Pair:
        return torch.zeros_like(alpha), -sigma

    def to_data(self, alpha: Tensor, sigma: Tensor) -> Pair:
        return 1 / alpha, sigma**2 / alpha


@dataclass(frozen=True)
class Preconditioned(Parametrisation):
    r"""The parametrisation of Karras et al. 2022, for any SDE.

    Their :math:`D = c_{skip} \tilde x + c_{out} F(c_{in} \tilde x)`, in the coordinates
    :math:`\tilde x = x / \alpha`, :math:`\tilde\sigma = \sigma / \alpha`, reads

    .. math::
        D = \frac{\alpha \sigma_d^2}{n^2} x + \frac{\sigma \sigma_d}{n} F, \qquad
        \hat z = \frac{\sigma}{n^2} x - \frac{\alpha \sigma_d}{n} F, \qquad
        n^2 = \alpha^2 \sigma_d^2 + \sigma^2 .

    With :math:`F = 0` it is the exact model of :math:`N(0, \sigma_d^2 I)`, so that the network
    has only the difference to learn, with input and target of unit variance at every time.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.sigma_data is None:
            raise InputError(
                "Preconditioned needs the data's standard deviation: give sigma_data a number."
            )

    def to_noise(self, alpha: Tensor, sigma: Tensor) -> Pair:
        scale = self.scale_in(alpha, sigma)
        return sigma * scale**2, -alpha * self._std * scale

    def to_data(self, alpha: Tensor, sigma: Tensor) -> Pair:
        scale = self.scale_in(alpha, sigma)
        return alpha * (self._std * scale) ** 2, sigma * self._std * scale

    @property
    def _std(self) -> float:
        assert self.sigma_data is not None
        return self.sigma_data


# --- What a network is told about the time -------------------------------------------------------


class Label(ABC):
    """Abstract: the number by which a network knows the time."""

    @abstractmethod
    def __call__(self, sde: SDE, t: Tensor) -> Tensor:
        """Returns one label for each time, with the shape of ``t``."""


@dataclass(frozen=True)
class NoiseLevel(Label):
    r"""The relative noise level :math:`\tfrac14 \log (\sigma / \alpha) = -\lambda / 8`.

    It is the :math:`c_{noise}` of Karras et al. 2022 and says nothing of the SDE, so that a
    network keeps its meaning when the schedule changes.
    """

    def __call__(self, sde: SDE, t: Tensor) -> Tensor:
        return -0.125 * sde.log_snr(t)


@dataclass(frozen=True)
class ScaledTime(Label):
    """The time itself, scaled: 999 t in Song et al. 2021.

    Arguments:
        scale: The factor.
    """

    scale: float = 999.0

    def __call__(self, sde: SDE, t: Tensor) -> Tensor:
        return self.scale * t


@dataclass(frozen=True)
class ChainIndex(Label):
    """The index t N - 1 of a level of a discrete chain, 0 to N - 1 (Ho et al. 2020)."""

    def __call__(self, sde: SDE, t: Tensor) -> Tensor:
        if not isinstance(sde, DiscreteVP):
            raise InputError(
                f"ChainIndex needs a discrete chain, such as DiscreteVP(), not {sde}."
            )
        return sde.index(t)


@dataclass(frozen=True)
class Sigma(Label):
    """The noise level itself, sigma (NCSN++): embed it with ``FourierEmbedding(log=True)``."""

    def __call__(self, sde: SDE, t: Tensor) -> Tensor:
        return sde.sigma(t)


@dataclass(frozen=True)
class ReversedIndex(Label):
    """The index (1 - t)(N - 1), rounded, of a noise level of SMLD: 0 is the largest.

    Arguments:
        scales: The number N of noise levels.
    """

    scales: int = 1000

    def __post_init__(self) -> None:
        check_count("scales", self.scales, "the published chain has 1000")

    def __call__(self, sde: SDE, t: Tensor) -> Tensor:
        return torch.round((1 - t) * (self.scales - 1))


# --- Models --------------------------------------------------------------------------------------


class ScoreModel(ScoreFunction):
    """A network plus an SDE.

    Arguments:
        network: A callable ``network(x, c, **cond)`` from data ``(B, *)`` and labels ``(B,)`` to
            an output of the shape of the data.
        sde: The forward process.
        parametrisation: What the network's output means.
        label: What the network is told about the time.

    Example:
        >>> from scoresde.sde import VPSDE
        >>> model = ScoreModel(lambda x, c: 0 * x, VPSDE())
        >>> model.denoise(torch.ones(4, 2), t=0.1).shape
        torch.Size([4, 2])
    """

    def __init__(
        self,
        network: nn.Module | Callable[..., Tensor],
        sde: SDE,
        parametrisation: Parametrisation | None = None,
        label: Label | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(sde, SDE):
            raise InputError(f"sde is a {type(sde).__name__}; it must be a scoresde.SDE.")
        self.network = network
        self.sde = sde
        self.parametrisation = parametrisation or Preconditioned()
        self.label = label or NoiseLevel()

    def noise(self, x: Tensor, t: Tensor, **cond: Tensor) -> Tensor:
        return self._read(self.parametrisation.to_noise, x, as_time(t), cond)

    def denoise(self, x: Tensor, t: Tensor, **cond: Tensor) -> Tensor:
        return self._read(self.parametrisation.to_data, x, as_time(t), cond)

    def score(self, x: Tensor, t: Tensor, **cond: Tensor) -> Tensor:
        return -self.noise(x, t, **cond) / expand(self.sde.sigma(t), x)

    def _read(
        self,
        reading: Callable[[Tensor, Tensor], Pair],
        x: Tensor,
        t: Tensor,
        cond: dict[str, Tensor],
    ) -> Tensor:
        """Calls the network and combines its output with its input."""
        alpha, sigma = self.sde.alpha(t), self.sde.sigma(t)
        scale = expand(self.parametrisation.scale_in(alpha, sigma), x)
        dtype = x.dtype if self._float() is None else self.dtype
        # The label keeps float32: bfloat16 would merge neighbouring times.
        c = self.label(self.sde, t).to(x.device, torch.promote_types(torch.float32, dtype))
        output = self.network((scale * x).to(dtype), c.expand(len(x)), **cond)
        if output.shape != x.shape:
            raise InputError(
                f"The network turned shape {tuple(x.shape)} into {tuple(output.shape)}; it must "
                "return the shape of its input."
            )
        if x.requires_grad and torch.is_grad_enabled() and not output.requires_grad:
            raise InputError(
                "The network's output carries no gradient of its input, which a likelihood needs; "
                "remove torch.no_grad, detach or NumPy from it (to a constant, add 0 * x)."
            )
        a, b = reading(alpha, sigma)
        return expand(a, x) * x + expand(b, x) * output.to(x.dtype)


class GaussianModel(ScoreFunction):
    r"""The exact model of Gaussian data :math:`N(m, C)`.

    The marginal is :math:`N(\alpha m, V)` with :math:`V = \alpha^2 C + \sigma^2 I`, so that

    .. math::
        \nabla_x \log p_t(x) = -V^{-1} (x - \alpha m), \qquad
        \frac{d (x - \alpha m)}{dt} = \tfrac12 \frac{dV}{dt} V^{-1} (x - \alpha m)

    along the probability-flow ODE, whose solution keeps :math:`V^{-1/2} (x - \alpha m)`.

    Arguments:
        mean: The mean, with shape ``(*)`` of one example.
        std: The standard deviation, a positive number or with shape ``(*)``.
        covariance: Or the covariance of the flattened data, with shape ``(D, D)``, positive
            definite.
        sde: The forward process.

    Example:
        >>> from scoresde.sde import VPSDE
        >>> exact = GaussianModel(mean=torch.zeros(2), std=1.0, sde=VPSDE())
        >>> exact.score(torch.ones(1, 2), t=0.5)
        tensor([[-1., -1.]])
    """

    mean: Tensor
    variances: Tensor
    basis: Tensor | None

    def __init__(
        self,
        mean: Tensor | Sequence,
        std: Tensor | float | None = None,
        sde: SDE | None = None,
        *,
        covariance: Tensor | None = None,
    ) -> None:
        super().__init__()
        if sde is None or (std is None) == (covariance is None):
            raise InputError("GaussianModel needs a mean, an sde, and a std or a covariance.")
        mean = _floats(mean)
        variances, basis = _spectrum(mean, std, covariance)
        if not bool((variances > 0).all()):
            raise InputError(
                f"The covariance has the eigenvalue {variances.min():.4g}; it must be positive "
                "definite."
            )
        self.sde = sde
        self.register_buffer("mean", mean)
        self.register_buffer("variances", variances)
        self.register_buffer("basis", basis)

    def score(self, x: Tensor, t: Tensor, **cond: Tensor) -> Tensor:
        return self._weigh(x, t, lambda alpha, sigma, v: -1 / v)

    def noise(self, x: Tensor, t: Tensor, **cond: Tensor) -> Tensor:
        return self._weigh(x, t, lambda alpha, sigma, v: sigma / v)

    def denoise(self, x: Tensor, t: Tensor, **cond: Tensor) -> Tensor:
        gain = self._weigh(x, t, lambda alpha, sigma, v: alpha * self.variances / v)
        return self.mean.to(x) + gain

    def log_prob(self, x: Tensor, t: Tensor | float = 0.0) -> Tensor:
        """Returns the log-density of the marginal at ``t`` in nats: ``(B, *)`` to ``(B,)``."""
        y, _, _, v = self._eigen(x, as_time(t))
        return -0.5 * (y**2 / v + torch.log(2 * torch.pi * v)).sum(1)

    def sample(self, n: int, t: Tensor | float = 0.0, *, seed: int | None = None) -> Tensor:
        """Draws ``n`` examples of the marginal at ``t``, with shape ``(n, *)``."""
        z = Streams.of(seed, batch=check_count("n", n), device=self.mean.device).normal(
            self.mean.shape, Purpose.DATA, dtype=self.mean.dtype
        )
        alpha, _, v = self._variances(as_time(t), z)
        y = self._back(z.flatten(1) * torch.sqrt(v)) + alpha * self.mean.flatten()
        return y.reshape(z.shape)

    def flow(self, x: Tensor, t: Tensor | float, s: Tensor | float) -> Tensor:
        r"""Moves states along the probability-flow ODE, exactly.

        .. math:: x_s = \alpha_s m + V_s^{1/2} V_t^{-1/2} (x_t - \alpha_t m)

        Arguments:
            x: States at time ``t``, with shape ``(B, *)``.
            t: The time that they are at.
            s: The time to move them to.
        """
        y, _, _, v = self._eigen(x, as_time(t))
        alpha, _, w = self._variances(as_time(s), x)
        moved = self._back(y * torch.sqrt(w / v)) + alpha * self.mean.flatten().to(x)
        return moved.reshape(x.shape)

    def _variances(self, t: Tensor, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Returns alpha, sigma ``(B or 1, 1)``, and the eigenvalues of V ``(B or 1, D)``."""
        alpha, sigma = one_or_each(self.sde.alpha(t), x), one_or_each(self.sde.sigma(t), x)
        v = alpha**2 * self.variances + sigma**2
        return alpha.to(x), sigma.to(x), v.to(x)

    def _eigen(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Returns x - alpha m in the eigenbasis ``(B, D)``, alpha, sigma and V."""
        alpha, sigma, v = self._variances(t, x)
        _check_shape(x, self.mean.shape)
        y = x.flatten(1) - alpha * self.mean.flatten().to(x)
        return (y if self.basis is None else y @ self.basis.to(x)), alpha, sigma, v

    def _back(self, y: Tensor) -> Tensor:
        return y if self.basis is None else y @ self.basis.to(y).T

    def _weigh(self, x: Tensor, t: Tensor, gain: Callable[..., Tensor]) -> Tensor:
        """Multiplies x - alpha m by a function of V."""
        y, alpha, sigma, v = self._eigen(x, as_time(t))
        return self._back(y * gain(alpha, sigma, v).to(y)).reshape(x.shape)


class GaussianMixtureModel(ScoreFunction):
    r"""The exact model of a mixture of isotropic Gaussians :math:`\sum_k w_k N(m_k, s_k^2 I)`.

    The marginal is the mixture of :math:`N(\alpha m_k, v_k I)`, :math:`v_k = \alpha^2 s_k^2 +
    \sigma^2`, and with the responsibilities :math:`r_k(x) \propto w_k N(x; \alpha m_k, v_k I)`

    .. math::
        \nabla_x \log p_t(x) = -\sum_k r_k \frac{x - \alpha m_k}{v_k}, \qquad
        D(x, t) = \sum_k r_k \left( m_k + \frac{\alpha s_k^2}{v_k} (x - \alpha m_k) \right) .

    Arguments:
        weights: The weights, positive, with shape ``(K,)``; they are normalised.
        means: The means, with shape ``(K, *)``.
        stds: The standard deviations, positive, with shape ``(K,)``.
        sde: The forward process.
    """

    log_weights: Tensor
    means: Tensor
    stds: Tensor

    def __init__(
        self,
        weights: Tensor | Sequence,
        means: Tensor | Sequence,
        stds: Tensor | Sequence,
        sde: SDE,
    ) -> None:
        super().__init__()
        means = _floats(means)
        weights = _floats(weights).to(means)
        stds = _floats(stds).to(means)
        if means.ndim < 2 or not weights.shape == stds.shape == means.shape[:1]:
            raise InputError(
                f"weights {tuple(weights.shape)}, means {tuple(means.shape)} and stds "
                f"{tuple(stds.shape)} do not fit; give (K,), (K, *) and (K,)."
            )
        if not (bool((weights > 0).all()) and bool((stds > 0).all())):
            raise InputError("A weight or a std of the mixture is not positive; make it positive.")
        self.sde = sde
        self.register_buffer("log_weights", torch.log(weights / weights.sum()))
        self.register_buffer("means", means)
        self.register_buffer("stds", stds)

    def score(self, x: Tensor, t: Tensor, **cond: Tensor) -> Tensor:
        deviations, responsibilities, _, _, v = self._posterior(x, t)
        return -self._mix(responsibilities / v, deviations, x)

    def noise(self, x: Tensor, t: Tensor, **cond: Tensor) -> Tensor:
        deviations, responsibilities, _, sigma, v = self._posterior(x, t)
        return self._mix(responsibilities * sigma / v, deviations, x)

    def denoise(self, x: Tensor, t: Tensor, **cond: Tensor) -> Tensor:
        deviations, responsibilities, alpha, _, v = self._posterior(x, t)
        means = responsibilities @ self.means.flatten(1).to(x)
        gain = alpha * self.stds.to(x) ** 2 / v
        return means.reshape(x.shape) + self._mix(responsibilities * gain, deviations, x)

    def log_prob(self, x: Tensor, t: Tensor | float = 0.0) -> Tensor:
        """Returns the log-density of the marginal at ``t`` in nats: ``(B, *)`` to ``(B,)``."""
        _, joint, _, _, _ = self._components(x, as_time(t))
        return torch.logsumexp(joint, 1)

    def sample(self, n: int, t: Tensor | float = 0.0, *, seed: int | None = None) -> Tensor:
        """Draws ``n`` examples of the marginal at ``t``, with shape ``(n, *)``."""
        streams = Streams.of(seed, batch=check_count("n", n), device=self.means.device)
        u = streams.uniform((), Purpose.COMPONENT, dtype=torch.float64)
        edges = self.log_weights.double().exp().cumsum(0)[:-1]
        k = torch.searchsorted(edges, u)
        z = streams.normal(self.means.shape[1:], Purpose.DATA, dtype=self.means.dtype)
        alpha, sigma = self.sde.alpha(as_time(t)), self.sde.sigma(as_time(t))
        std = torch.sqrt(alpha**2 * self.stds[k] ** 2 + sigma**2)
        return expand(alpha, z) * self.means[k] + expand(std, z) * z

    def _components(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Returns x - alpha m_k ``(B, K, D)``, log w_k N_k ``(B, K)``, and alpha, sigma, v_k."""
        alpha, sigma = one_or_each(self.sde.alpha(t), x), one_or_each(self.sde.sigma(t), x)
        v = (alpha**2 * self.stds**2 + sigma**2).to(x)
        alpha, sigma = alpha.to(x), sigma.to(x)
        _check_shape(x, self.means.shape[1:])
        means = self.means.flatten(1).to(x)
        deviations = x.flatten(1).unsqueeze(1) - alpha.unsqueeze(2) * means
        dimension = means.shape[1]
        log_normals = -0.5 * ((deviations**2).sum(2) / v + dimension * torch.log(2 * torch.pi * v))
        return deviations, self.log_weights.to(x) + log_normals, alpha, sigma, v

    def _posterior(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Returns what :meth:`_components` does, with responsibilities for the joint densities."""
        deviations, joint, alpha, sigma, v = self._components(x, as_time(t))
        return deviations, torch.softmax(joint, 1), alpha, sigma, v

    @staticmethod
    def _mix(weights: Tensor, deviations: Tensor, x: Tensor) -> Tensor:
        return torch.einsum("bk,bkd->bd", weights, deviations).reshape(x.shape)


def _check_shape(x: Tensor, shape: torch.Size) -> None:
    if x.shape[1:] != shape or not x.is_floating_point():
        raise InputError(
            f"Data of shape {tuple(x.shape)} and type {x.dtype} do not fit a model of examples "
            f"{tuple(shape)}; give floats (B, {', '.join(map(str, shape))})."
        )


def _floats(values: Tensor | Sequence) -> Tensor:
    """Turns numbers into floats; floats keep their data type."""
    array = torch.as_tensor(values)
    return array if array.is_floating_point() else array.to(torch.get_default_dtype())


def _spectrum(
    mean: Tensor, std: Tensor | float | None, covariance: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Returns the eigenvalues ``(D,)`` and the eigenbasis (``None``: the axes) of a covariance."""
    if covariance is None:
        std = torch.as_tensor(std).to(mean)
        if std.ndim > 0 and std.shape != mean.shape:
            raise InputError(
                f"The std has shape {tuple(std.shape)} and the mean {tuple(mean.shape)}; give one "
                "number, or one for each."
            )
        if not bool((std > 0).all()):
            raise InputError(f"The std {std.min():.4g} is not positive; give positive numbers.")
        return std.expand(mean.shape).flatten() ** 2, None
    covariance = torch.as_tensor(covariance).to(mean)
    if covariance.shape != (mean.numel(), mean.numel()):
        raise InputError(
            f"The covariance has shape {tuple(covariance.shape)} for {mean.numel()} dimensions; "
            "give one row and one column per dimension of the flattened data."
        )
    if not torch.allclose(covariance, covariance.T):
        raise InputError("The covariance is not symmetric; give (C + C.T) / 2.")
    variances, basis = torch.linalg.eigh(covariance)
    return variances, basis
