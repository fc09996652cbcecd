"""A loss with a decoder over levels is trained on the data that it is for."""

import pytest
import torch

from scoresde import (
    DiscreteVP,
    GaussianMixtureModel,
    GaussianModel,
    InputError,
    LearnedSchedule,
    ScoreModel,
    fit,
)
from scoresde.codec import DiscretisedGaussian, Levels
from scoresde.configuration import measured
from scoresde.data import Dataset
from scoresde.loss import BoundLoss, HybridLoss, ImportanceSampled, Loss, VariationalLoss
from scoresde.nn import MLP
from scoresde.train.levels import check_levels


def integers(dequantise: bool = True, centred: bool = True) -> Dataset:
    generator = torch.Generator().manual_seed(0)
    splits = [torch.randint(0, 5, (40, 3), generator=generator, dtype=torch.uint8)] * 3
    return Dataset.of("grades", splits, levels=5, dequantise=dequantise, centred=centred)


@pytest.mark.parametrize(
    "decoder", [Levels(17), Levels(5, 0.0, 1.0), DiscretisedGaussian.reference(5)]
)
def test_other_levels_are_refused(decoder) -> None:
    model = ScoreModel(MLP(3, width=8), LearnedSchedule())
    with pytest.raises(InputError, match=r"decoder .*grades.*5 levels in \[-1, 1\]"):
        fit(model, integers(), steps=1, loss=VariationalLoss(decoder), progress=False)


def test_real_numbers_must_lie_in_the_range() -> None:
    near = Dataset.of("x", [torch.rand(20, 2)] * 3, standardise=False)
    check_levels(VariationalLoss(Levels(5)), near)
    far = Dataset.of("x", [5 * torch.ones(20, 2)] * 3, standardise=False)
    with pytest.raises(InputError, match=r"decoder .*5 levels.*\b5 in model units"):
        check_levels(VariationalLoss(Levels(5)), far)
    check_levels(VariationalLoss(), far)


def test_data_that_are_not_centred_fit_their_own_range() -> None:
    check_levels(VariationalLoss(Levels(5, 0.0, 1.0)), integers(centred=False))


@pytest.mark.parametrize("dequantise", [True, False])
@pytest.mark.parametrize(
    "loss",
    [
        HybridLoss(decoder=DiscretisedGaussian(5)),
        BoundLoss(decoder=Levels(5)),
        ImportanceSampled(BoundLoss(decoder=Levels(5)), steps=1000),
    ],
)
def test_bounds_of_a_chain_train_on_levels_dequantised_or_not(
    loss: Loss, dequantise: bool
) -> None:
    assert loss.on_levels
    model = ScoreModel(MLP(3, width=8, output_heads=2), DiscreteVP())
    if not isinstance(loss, HybridLoss):
        model = ScoreModel(MLP(3, width=8), DiscreteVP())
    fit(model, integers(dequantise), steps=2, loss=loss, progress=False)


@pytest.mark.parametrize("kind", [HybridLoss, BoundLoss])
def test_dequantisation_makes_no_difference(kind: type) -> None:
    loss, data = kind(decoder=DiscretisedGaussian(5)), integers()
    model = ScoreModel(MLP(3, width=8, output_heads=2), DiscreteVP())
    assert isinstance(data.train, torch.Tensor)
    centres = data.encode(data.train, centre=True)
    dequantised = centres + 0.19 * (2 * torch.rand(centres.shape) - 1)
    torch.testing.assert_close(loss(model, centres, seed=0), loss(model, dequantised, seed=0))


@pytest.mark.parametrize("given", [{"levels": "auto"}, {"levels": 5}, {"levels": 17}])
def test_the_range_is_filled_in_whatever_is_said_of_the_levels(given: dict[str, object]) -> None:
    found = measured({"low": "auto", "high": "auto", **given}, integers())
    levels = 17 if given["levels"] == 17 else 5
    assert found == {"levels": levels, "low": -1.0, "high": 1.0}


def test_samples_of_an_exact_model_have_no_graph() -> None:
    sde, one = LearnedSchedule(), torch.ones(1)
    mixture = GaussianMixtureModel(weights=one, means=one[None], stds=one, sde=sde)
    for exact in (GaussianModel(mean=one, std=1.0, sde=sde), mixture):
        assert not exact.sample(2, seed=0).requires_grad


def test_ends_that_are_no_numbers_are_refused() -> None:
    with pytest.raises(InputError, match=r"log_snr_max.*13"):
        LearnedSchedule("13")  # type: ignore[arg-type]
