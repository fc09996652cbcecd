"""Misuse of the library that would give silent nonsense is an error that says so."""

import re

import pytest
import torch

from scoresde import (
    VPSDE,
    DenoisingScoreMatching,
    GaussianMixtureModel,
    GaussianModel,
    InputError,
    Likelihood,
    NoiseWeighting,
    ScoreModel,
)
from scoresde.data import make_splits
from scoresde.errors import check_count
from scoresde.sample import Langevin, PredictorCorrector

GAUSSIAN = GaussianModel(torch.zeros(2), 1.0, VPSDE())
MIXTURE = GaussianMixtureModel([0.5, 0.5], torch.zeros(2, 2), [1.0, 2.0], VPSDE())


@pytest.mark.parametrize(
    "detach", [lambda x, c: 2 * x.detach(), torch.no_grad()(lambda x, c: 2 * x)]
)
def test_a_network_without_gradients_has_no_likelihood(detach: object) -> None:
    with pytest.raises(InputError, match=r"network.*without a gradient"):
        Likelihood(probes="exact")(ScoreModel(detach, VPSDE()), torch.zeros(2, 2))


def test_integers_are_no_data() -> None:
    pixels = torch.full((1, 2), 100)
    with pytest.raises(InputError, match="int64"):
        VPSDE().marginal(pixels, torch.tensor(0.1))
    with pytest.raises(InputError, match="int64"):
        DenoisingScoreMatching()(GAUSSIAN, pixels)


@pytest.mark.parametrize("model", [GAUSSIAN, MIXTURE], ids=["Gaussian", "mixture"])
@pytest.mark.parametrize("shape", [(4, 1), (4, 3), (4, 2, 1)], ids=str)
def test_exact_models_do_not_broadcast_data(model: GaussianModel, shape: tuple) -> None:
    with pytest.raises(InputError, match=r"\(B, 2\)"):
        model.log_prob(torch.ones(shape))


@pytest.mark.parametrize("t", [500.0, -1.0, float("nan")])
def test_step_numbers_are_no_times(t: float) -> None:
    with pytest.raises(InputError, match=rf"\[0, 1\].*{t:g}"):
        DenoisingScoreMatching()(GAUSSIAN, torch.zeros(3, 2), t=torch.full((3,), t))


def test_a_bare_network_is_no_model() -> None:
    with pytest.raises(InputError, match="ScoreModel"):
        DenoisingScoreMatching()(torch.nn.Linear(2, 2), torch.zeros(3, 2))


def test_a_module_is_no_sde() -> None:
    with pytest.raises(InputError, match="Identity"):
        ScoreModel(torch.nn.Linear(2, 2), torch.nn.Identity())


def test_parts_are_objects_and_not_classes() -> None:
    with pytest.raises(InputError, match=r"corrector.*Langevin"):
        PredictorCorrector(corrector=Langevin)
    with pytest.raises(InputError, match="weighting"):
        DenoisingScoreMatching(weighting=NoiseWeighting)


@pytest.mark.parametrize(
    ("value", "said"),
    [(10.0, "got 10.0; write 10"), (2.5, "got 2.5."), (0, "got 0."), (2**64, "got 18446744")],
)
def test_counts_are_integers(value, said):
    with pytest.raises(InputError, match=f"^steps .*{re.escape(said)}"):
        check_count("steps", value)


@pytest.mark.parametrize(
    "call",
    [
        lambda x: Likelihood()(GAUSSIAN, x),
        lambda x: DenoisingScoreMatching()(GAUSSIAN, x, seed=0),
        make_splits,
    ],
)
def test_an_array_of_numpy_is_no_tensor(call):
    with pytest.raises(InputError, match=r"tensor.*ndarray.*torch\.as_tensor"):
        call(torch.zeros(30, 2).numpy())
