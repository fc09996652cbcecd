"""Random streams: the published generator, its distributions, and that an address is a number."""

import math

import pytest
import torch
from scipy import stats

from scoresde import InputError
from scoresde.streams import Purpose, Streams, fresh_seed, philox

DRAWS = ("normal", "uniform", "sign")
PI = (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0)
KNOWN_ANSWERS = [  # kat_vectors of Random123 1.14: counter, key, and the four words
    ((0,) * 4, (0,) * 2, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    (*PI, "d16cfe09 94fdcceb 5001e420 24126ea1"),
]
GOLDEN = {  # seed 12345678901234567890; samples 0, 7 and 2^40 + 1; five numbers of each
    "uniform": """
        0.6203944087028503 0.021525323390960693 0.2315623164176941 0.03600698709487915
        0.31298691034317017 0.3643478751182556 0.6545905470848083 0.47628146409988403
        0.43816226720809937 0.12276047468185425 0.9803555607795715 0.011594235897064209
        0.387267529964447 0.6254598498344421 0.5692490935325623""",
    "normal": """
        0.11294577524600492 2.700142349069753 0.9705889486195272 0.6215170867485265
        0.902229019062497 -1.4052673709728583 -0.8519752524452645 0.2109887456448781
        0.34875326462660855 1.2373271864993318 -0.151282210500324 -2.105110450020606
        0.1295898712100181 -2.117310840661688 -0.5413414549661707""",
    "sign": "-1 1 1 1 1 1 -1 1 1 1 -1 1 1 -1 -1",
}
PURPOSES = "LATENT DIFFUSION LANGEVIN PROBE TIME NOISE DEQUANTISE ORDER FLIP DATA COMPONENT"


def correlations(rows):
    """The largest absolute correlation between two rows, in standard errors."""
    r = torch.corrcoef(rows).fill_diagonal_(0).abs()
    return float(r.max()) * math.sqrt(rows.shape[1])


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN_ANSWERS)
def test_philox_gives_the_known_answers(counter, key, words):
    answer = philox(torch.tensor(counter), key)
    assert " ".join(f"{word:08x}" for word in answer.tolist()) == words


def test_philox_treats_every_counter_of_a_block_alone():
    counters = torch.tensor([KNOWN_ANSWERS[0][0], PI[0], (1, 2, 3, 4)]).T
    together = philox(counters, PI[1])
    alone = torch.stack([philox(counters[:, i], PI[1]) for i in range(3)], 1)
    assert torch.equal(together, alone)


@pytest.mark.parametrize("draw", DRAWS)
def test_seeded_numbers_are_those_recorded(draw):
    streams = Streams.of(12345678901234567890, [0, 7, 2**40 + 1])
    numbers = getattr(streams, draw)((5,), Purpose.DIFFUSION, 3, torch.float64)
    golden = torch.tensor([float(word) for word in GOLDEN[draw].split()], dtype=torch.float64)
    torch.testing.assert_close(numbers.flatten(), golden, rtol=0, atol=1e-13)


def test_purposes_keep_their_numbers():
    recorded = dict(zip(PURPOSES.split(), range(11), strict=True))
    assert recorded.items() <= {purpose.name: purpose.value for purpose in Purpose}.items()


def test_normal_numbers_have_the_normal_distribution():
    z = Streams.of(1, batch=64).normal((1024,), Purpose.NOISE, dtype=torch.float64)
    assert stats.kstest(z.flatten().numpy(), "norm").pvalue > 1e-3


@pytest.mark.parametrize(
    ("power", "moment", "variance"), [(1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)]
)
def test_normal_numbers_have_the_normal_moments(power, moment, variance):
    z = Streams.of(2, batch=64).normal((1024,), Purpose.NOISE, dtype=torch.float64)
    assert abs(float((z**power).mean()) - moment) < 4 * math.sqrt(variance / z.numel())


def test_uniform_numbers_have_the_uniform_distribution():
    u = Streams.of(3, batch=64).uniform((1024,), Purpose.TIME, dtype=torch.float64)
    assert stats.kstest(u.flatten().numpy(), "uniform").pvalue > 1e-3


def test_signs_are_fair():
    signs = Streams.of(4, batch=64).sign((1024,), Purpose.PROBE)
    assert set(signs.unique().tolist()) == {-1.0, 1.0}
    assert abs(float(signs.mean())) < 4 / math.sqrt(signs.numel())


@pytest.mark.parametrize("draw", DRAWS)
@pytest.mark.parametrize("axis", ["sample", "step", "purpose", "seed", "element"])
def test_numbers_are_independent_along_every_part_of_the_address(axis, draw):
    one = Streams.of(5, batch=1)
    shape = (4096,)
    rows = {
        "sample": lambda: getattr(Streams.of(5, batch=12), draw)(shape, Purpose.NOISE),
        "step": lambda: torch.cat(
            [getattr(one, draw)(shape, Purpose.NOISE, k) for k in range(12)]
        ),
        "purpose": lambda: torch.cat([getattr(one, draw)(shape, p) for p in Purpose]),
        "seed": lambda: torch.cat(
            [getattr(Streams.of(s, batch=1), draw)(shape, Purpose.NOISE) for s in range(12)]
        ),
        "element": lambda: getattr(Streams.of(5, batch=4096), draw)((12,), Purpose.NOISE).T,
    }[axis]()
    assert correlations(rows) < 4.5


def test_squares_of_normal_numbers_are_uncorrelated_within_a_block():
    z = Streams.of(6, batch=8192).normal((8,), Purpose.NOISE, dtype=torch.float64)
    assert correlations((z**2).T) < 4.5


def extreme(word):
    return lambda counter, key: torch.full_like(counter, word)


@pytest.mark.parametrize("word", [0, 0xFFFFFFFF])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_uniform_numbers_are_strictly_inside_the_interval(word, dtype, monkeypatch):
    monkeypatch.setattr("scoresde.streams.philox", extreme(word))
    u = Streams.of(0, batch=1).uniform((4,), Purpose.TIME, dtype=dtype)
    assert bool(((u > 0) & (u < 1)).all())


@pytest.mark.parametrize("word", [0, 0xFFFFFFFF])
def test_normal_numbers_are_finite(word, monkeypatch):
    monkeypatch.setattr("scoresde.streams.philox", extreme(word))
    assert bool(Streams.of(0, batch=1).normal((4,), Purpose.NOISE).isfinite().all())


@pytest.mark.parametrize("draw", DRAWS)
def test_float32_numbers_are_the_float64_ones_rounded(draw):
    streams = Streams.of(7, batch=5)
    wide = getattr(streams, draw)((33,), Purpose.NOISE, 2, torch.float64)
    assert torch.equal(getattr(streams, draw)((33,), Purpose.NOISE, 2), wide.float())


@pytest.mark.parametrize("draw", DRAWS)
def test_a_sample_is_the_same_alone_and_in_a_batch_in_any_order(draw):
    def of(seeds):
        return getattr(Streams.of(8, seeds), draw)((3, 7), Purpose.NOISE, 1)

    batch, shuffled = of(range(64)), of(reversed(range(64)))
    assert torch.equal(batch, shuffled.flip(0))
    assert torch.equal(batch[37:38], of([37]))


def test_a_slice_of_streams_is_their_numbers_sliced():
    streams = Streams.of(9, batch=6)
    numbers = streams.normal((2,), Purpose.NOISE)
    assert torch.equal(streams[2:4].normal((2,), Purpose.NOISE), numbers[2:4])


@pytest.mark.parametrize("shape", [(), (1,), (4,), (5,), (2, 3), (3, 5, 7)])
@pytest.mark.parametrize("draw", DRAWS)
def test_any_shape_of_a_sample(draw, shape):
    assert getattr(Streams.of(0, batch=3), draw)(shape, Purpose.NOISE).shape == (3, *shape)


@pytest.mark.parametrize("other", [2, 1 + 2**32, 1 + 2**63])
def test_all_64_bits_of_the_seed_count(other):
    a, b = (Streams.of(s, batch=1).normal((8,), Purpose.NOISE) for s in (1, other))
    assert not bool((a == b).any())


@pytest.mark.parametrize("other", [2, 1 + 2**31, 1 + 2**32, 1 + 2**55])
def test_all_56_bits_of_the_index_count(other):
    a, b = Streams.of(0, [1, other]).normal((8,), Purpose.NOISE)
    assert not bool((a == b).any())


@pytest.mark.parametrize("other", [2, 1 + 2**4, 1 + 2**16, 1 + 2**31])
def test_all_32_bits_of_the_draw_count(other):
    streams = Streams.of(0, batch=1)
    a, b = (streams.normal((8,), Purpose.NOISE, draw) for draw in (1, other))
    assert not bool((a == b).any())


def test_a_large_index_never_meets_another_purpose():
    both = Streams.of(0, [2**32, 2**33])  # the purpose shares a word with the index's high bits
    numbers = torch.cat([both.normal((8,), purpose) for purpose in Purpose])
    assert len(numbers.unique()) == numbers.numel()


def test_a_fresh_seed_follows_torch():
    torch.manual_seed(11)
    first = (fresh_seed(), fresh_seed())
    torch.manual_seed(11)
    assert (fresh_seed(), fresh_seed()) == first
    assert first[0] != first[1]


def test_streams_without_a_seed_get_a_fresh_one():
    torch.manual_seed(11)
    first = fresh_seed()
    torch.manual_seed(11)
    assert Streams.of(batch=2).seed == first


def test_seeds_may_be_any_iterable_or_a_tensor():
    wanted = Streams.of(0, [3, 4]).indices
    assert torch.equal(Streams.of(0, range(3, 5)).indices, wanted)
    assert torch.equal(Streams.of(0, torch.tensor([3, 4], dtype=torch.int32)).indices, wanted)


@pytest.mark.parametrize(
    "arguments",
    [
        {"seed": -1, "batch": 2},
        {"seed": 2**64, "batch": 2},
        {"seed": 0},
        {"seed": 0, "seeds": [0, 1, 2], "batch": 2},
        {"seed": 0, "seeds": [[0, 1]]},
        {"seed": 0, "seeds": [-1]},
        {"seed": 0, "seeds": [2**56]},
    ],
    ids=repr,
)
def test_unusable_seeds_are_refused(arguments):
    with pytest.raises(InputError, match="seed"):
        Streams.of(**arguments)


@pytest.mark.parametrize("draw", [-1, 2**32])
def test_an_unusable_draw_is_refused(draw):
    with pytest.raises(InputError, match=rf"draw .*got {draw}\b"):
        Streams.of(0, batch=1).normal((2,), Purpose.NOISE, draw)
