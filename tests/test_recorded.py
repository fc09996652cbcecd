"""Numbers are those of commit 073b527, but for rounding (see tests/recorded.py)."""

import functools

import pytest

from tests.recorded import FILE, GROUPS, difference, numbers, read

old = functools.cache(lambda: read(FILE))


@pytest.mark.parametrize("name", GROUPS)
def test_numbers_are_those_recorded(name):
    recorded = {key: value for key, value in old().items() if key.split("/")[1] == name}
    found = numbers(name)
    assert recorded
    wrong = [
        sentence
        for key in {**recorded, **found}
        if (sentence := difference(key, found.get(key), recorded.get(key))) is not None
    ]
    assert not wrong, f"{len(wrong)} of {len(recorded)} numbers:\n" + "\n".join(wrong[:20])
