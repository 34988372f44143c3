"""Every step × role × fault in a fleet of real processes: a sample, and the table of all of them."""

from __future__ import annotations

import json
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from itertools import combinations
from pathlib import Path

import pytest
from support.fault_matrix import NOT_RUN, STOPS, Case, groups, key_of, pairwise, product, rows

from weft.protocol.events import Step

TABLE = Path(__file__).parents[1] / "docs" / "fault-matrix.json"
WORDS = ("committed", "kept the old version, caught up", "refused, caught up")


def pairs(case: Case) -> set[object]:
    values = (case.step, case.role, case.fault, case.transport, case.landing)
    return set(combinations(enumerate(values), 2))


def test_the_sample_has_every_pair() -> None:
    sample, possible = pairwise(), [case for case in product() if not case.excluded]
    assert set.union(*map(pairs, sample)) == set.union(*map(pairs, possible))
    assert set(sample) < set(possible)
    assert len(sample) < 50


def test_every_step_has_its_rows() -> None:
    assert set(STOPS) == set(Step)
    steps = Counter(case.step for case in product())
    assert steps.keys() == set(Step)
    assert len(set(steps.values())) == 1


@pytest.mark.trap(40, 48)
def test_the_table_has_exactly_the_rows_of_the_product() -> None:
    made = {key_of(row): row for row in json.loads(TABLE.read_text()) if row["engine"] == "memory"}
    assert list(made) == [case.key for case in product()], "run python3 tools/dev.py faults"
    for case in product():
        row = made[case.key]
        wanted = [f"not applicable: {case.excluded}"] if case.excluded else [*WORDS, NOT_RUN]
        assert row["outcome"] in wanted, row
        assert (row["outcome"] in WORDS) == (row["seconds_to_recover"] is not None)


@pytest.mark.trap(34, 40, 41, 48, 64, 65)
def test_a_sample_of_faults() -> None:
    """In a fleet for each transport and landing, all at once: they mostly wait for deadlines."""
    fleets = groups(pairwise())
    with ThreadPoolExecutor(len(fleets)) as pool:
        outcomes = [
            (key_of(row), row["outcome"]) for made in pool.map(lambda cases: [*rows(cases)], fleets) for row in made
        ]
    assert len(outcomes) == len(pairwise())
    assert [(key, outcome) for key, outcome in outcomes if outcome not in WORDS] == []
