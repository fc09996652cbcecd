"""Check that the quantisation levels of a loss match the data."""

import torch
from torch import Tensor

from scoresde.data import Dataset
from scoresde.errors import InputError
from scoresde.loss import Loss
from scoresde.streams import Streams

_EXAMPLES = 256  # real-valued examples to check
_FAR = 1e9  # in model units: beyond every level
_OFF = 1e-3  # tolerated difference of the ends, in steps


def check_levels(loss: Loss, data: Dataset) -> None:
    """Checks that the decoder of a loss has the levels and the range of the data.

    The decoder moves examples to the centres of its own levels. With other levels, the model would
    be trained on other data. Real-valued data may lie anywhere in the range.

    Raises:
        InputError: If they differ.
    """
    decoder = loss.decoder
    if decoder is None or decoder.levels is None:
        return
    least, most = decoder.centre(torch.tensor([-_FAR, _FAR], dtype=torch.float64)).tolist()
    step = (most - least) / (decoder.levels - 1)
    low, high = least - step / 2, most + step / 2
    asked = f"{decoder.levels} levels in [{low:.4g}, {high:.4g}]"
    if data.levels is None:
        x = _examples(data)
        away = torch.maximum(low - x, x - high)
        if float(away.max()) > _OFF * step:
            raise InputError(
                f"decoder must cover the data, got {asked}, but {data.name} is real-valued and "
                f"contains {float(x.flatten()[away.argmax()]):.4g} in model units; use "
                "decoder=None, or a data set with levels."
            )
        return
    ends = data.codec.range
    off = max(abs(low - ends[0]), abs(high - ends[1]))
    if decoder.levels != data.levels or off > _OFF * step:
        raise InputError(
            f"decoder must have the levels of {data.name}, {data.levels} levels in "
            f"[{ends[0]:.4g}, {ends[1]:.4g}], got {asked}; set its levels, low and high to these "
            "(auto on the command line)."
        )


def _examples(data: Dataset) -> Tensor:
    count = min(_EXAMPLES, len(data.train))
    return data.batch("train", Streams(0, torch.arange(count))).x.double().cpu().flatten()
