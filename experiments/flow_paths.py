"""Draws how straight the paths of three flows are, and what one step of each gives.

    python experiments/flow_paths.py [--steps 2000]

The flows are trained on two moons: with independent noise, with noise assigned by optimal
transport within a batch of 256, and on the pairs that the first flow makes (reflow). Writes
flow_matching/paths.png.
"""

import argparse
import warnings
from pathlib import Path

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from scoresde import FlowMatching, RectifiedFlow, ScoreModel, VelocityParametrisation, fit
from scoresde.data import Dataset, two_moons
from scoresde.loss import OptimalTransport
from scoresde.nn import MLP
from scoresde.sample import Euler, ProbabilityFlow, sample_trajectory
from scoresde.train import Reflow

PATHS, SAMPLES = 40, 600


def trained(data: Dataset, loss: FlowMatching, steps: int) -> ScoreModel:
    """Returns a flow."""
    torch.manual_seed(0)
    model = ScoreModel(MLP(2, width=128, depth=3), RectifiedFlow(), VelocityParametrisation())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the score, which is not drawn
        return fit(model, data, steps, loss=loss, seed=0, progress=False)


def draw_paths(axes: Axes, paths: Tensor) -> None:
    """Draws paths ``(points, n, 2)`` from noise (grey) to data (colour)."""
    axes.plot(*paths.unbind(-1), color="0.75", linewidth=0.7, zorder=1)
    axes.scatter(*paths[0].T, s=8, color="0.5", zorder=2)
    axes.scatter(*paths[-1].T, s=12, color="C0", zorder=3)


def main() -> None:
    """Trains the flows and draws the figure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=2000)
    steps = parser.parse_args().steps
    torch.set_num_threads(1)
    moons = two_moons()
    flow = trained(moons, FlowMatching(), steps)
    coupled = trained(moons, FlowMatching(coupling=OptimalTransport()), steps)
    pairs = Reflow(flow, ProbabilityFlow(1e-4, 1e-4)).pairs(10_000, seed=0)
    flows = {
        "independent noise": flow,
        "optimal transport": coupled,
        "after reflow": trained(pairs, FlowMatching(), steps),
    }
    latent = torch.randn(SAMPLES, 2, generator=torch.Generator().manual_seed(0))
    figure = Figure(figsize=(9, 6), layout="constrained")
    top, bottom = figure.subplots(2, 3, sharex=True, sharey=True)
    for above, below, (name, model) in zip(top, bottom, flows.items(), strict=True):
        _, kept = sample_trajectory(model, Euler(steps=100), latent[:PATHS], points=51)
        draw_paths(above, kept.x)
        x = Euler(steps=1)(model, latent=latent).x
        below.scatter(*x.T, s=5, color="C0", linewidths=0)
        above.set_title(name, fontsize=10)
    for axes in (*top, *bottom):
        axes.set_aspect("equal")
        axes.set_axis_off()
    top[0].text(-0.05, 0.5, "paths", transform=top[0].transAxes, rotation=90, va="center")
    bottom[0].text(-0.05, 0.5, "one step", transform=bottom[0].transAxes, rotation=90, va="center")
    out = Path(__file__).parent / "flow_matching"
    out.mkdir(exist_ok=True)
    figure.savefig(out / "paths.png", dpi=130)


if __name__ == "__main__":
    main()
