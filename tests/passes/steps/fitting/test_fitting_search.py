"""The search by trying: what it finds, that it keeps its bounds, that it can be interrupted."""

from itertools import combinations

import numpy as np
import pytest

from hasten.errors import UsageError
from hasten.passes.steps.fitting_search import Search

STEPS, COMPUTED = 12, 5


def error(mask):
    """Reuses far from a computed call cost more, later ones twice; and one pair of calls is best computed together."""
    total, kept = 0.0, 0
    for n, bit in enumerate(mask):
        kept = n if bit == "1" else kept
        total += (n - kept) ** 2 * (2 if n > 7 else 1)
    return total - 3 * (mask[5] == "1" and mask[9] == "1")


def best():
    chosen = combinations(range(1, STEPS), COMPUTED - 1)
    return min(error("".join("1" if n == 0 or n in c else "0" for n in range(STEPS))) for c in chosen)


@pytest.mark.parametrize("seed", range(4))
def test_finds_the_best_of_330_masks_in_150(seed):
    mask, found = Search(error, 150, seed=seed).run("1" * COMPUTED + "0" * (STEPS - COMPUTED))
    assert found == error(mask) == best()
    assert mask.count("1") == COMPUTED
    assert mask[0] == "1"


def test_climbing_ends_where_no_shift_is_better():
    search = Search(error, 300, seed=1)
    mask, found = search.run("110000100101")
    for n in range(1, STEPS):
        for target in (n - 2, n - 1, n + 1, n + 2):
            if 1 <= target < STEPS and mask[n] == "1" and mask[target] == "0":
                bits = list(mask)
                bits[n], bits[target] = "0", "1"
                assert error("".join(bits)) >= found


@pytest.mark.parametrize("evaluations", [0, 1, 7, 40])
def test_no_more_masks_than_allowed_and_none_twice(evaluations):
    asked = []
    search = Search(lambda mask: asked.append(mask) or error(mask), evaluations)
    mask, found = search.run("110000100101")
    assert len(asked) == len(set(asked)) == evaluations
    assert found == (min(map(error, asked)) if asked else float("inf"))
    assert (mask in asked) or not asked


def test_an_interrupted_search_ends_as_if_it_had_not_been():
    whole = Search(error, 80, seed=5)
    result = whole.run("110000100101")
    known, count = {}, 0

    def until(mask):
        nonlocal count
        count += 1
        if count > 30:
            raise KeyboardInterrupt
        return error(mask)

    with pytest.raises(KeyboardInterrupt):
        Search(until, 80, seed=5, known=known).run("110000100101")
    assert len(known) == 30
    asked = []
    again = Search(lambda mask: asked.append(mask) or error(mask), 80, seed=5, known=known).run("110000100101")
    assert again == result
    assert len(asked) == 50


def test_no_time_is_no_search():
    assert Search(error, 50, seconds=-1).run("110000100101") == ("110000100101", float("inf"))


def test_a_mask_whose_run_fails_is_never_the_best():
    def failing(mask):
        return float("nan") if mask != "110000100101" else 4.0

    assert Search(failing, 30).run("110000100101") == ("110000100101", 4.0)


@pytest.mark.parametrize("start", ["0111", "", "12"])
def test_a_start_that_is_no_mask(start):
    with pytest.raises(UsageError, match="starts from a mask"):
        Search(error, 5).run(start)


def test_nothing_to_move():
    for start in ("1111", "1000"):
        assert Search(lambda m: float(np.int64(m)), 9).run(start) == (start, float(start))
