"""Times on the CPU meet states on a GPU: checked without one, by tensors without values."""

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from scoresde import (
    SDE,
    VESDE,
    VPSDE,
    GaussianMixtureModel,
    GaussianModel,
    ScoreFunction,
    ScoreModel,
    SubVPSDE,
)
from scoresde.model import Conditioned
from scoresde.sample import (
    AncestralPredictor,
    AnnealedLangevin,
    BatchMeanNorm,
    EulerMaruyamaPredictor,
    Interval,
    Langevin,
    ReverseDiffusionPredictor,
)


def bare(kind: type[ScoreFunction], sde: SDE, **buffers: torch.Tensor) -> ScoreFunction:
    """An exact model of arrays without values, which its constructor would look at."""
    model = object.__new__(kind)
    nn.Module.__init__(model)
    model.sde = sde
    for name, buffer in buffers.items():
        model.register_buffer(name, buffer)
    return model


def models(sde: SDE) -> list[ScoreFunction]:
    with torch.device("cuda"):
        one, two, square = torch.ones(2), torch.ones(2), torch.ones(2, 2)
        return [
            ScoreModel(lambda x, c: x * c.unsqueeze(1), sde),
            bare(GaussianModel, sde, mean=one, variances=two, basis=square),
            bare(GaussianMixtureModel, sde, log_weights=one, means=square, stds=two),
        ]


@pytest.mark.parametrize("sde", [VPSDE(), SubVPSDE(), VESDE()], ids=lambda sde: type(sde).__name__)
@pytest.mark.parametrize("kind", [0, 1, 2], ids=["network", "Gaussian", "mixture"])
def test_states_stay_on_their_device(kind: int, sde: SDE) -> None:
    t, s = (torch.tensor(v, dtype=torch.float64, device="cpu") for v in (0.5, 0.4))
    interval = Interval.of(sde, t, s)
    predictors = (EulerMaruyamaPredictor(), ReverseDiffusionPredictor(), AncestralPredictor())
    rows = [predictor.row(sde, interval) for predictor in predictors]
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = models(sde)[kind]
        x, z = torch.empty(4, 2, device="cuda"), torch.empty(4, 2, device="cuda")
        field = Conditioned(model)
        results = [view(x, t) for view in (model.score, model.noise, model.denoise)]
        results += [field.velocity(x, t), sde.prior_log_prob(x)]
        results += [row(x, (field.noise(x, t),), (z,)) for row in rows]
        correctors = (Langevin(), Langevin(rule=BatchMeanNorm()), AnnealedLangevin())
        results += [corrector(field, x, interval, z) for corrector in correctors]
        assert {result.device.type for result in results} == {"cuda"}
        assert {result.dtype for result in results} == {torch.float32}
