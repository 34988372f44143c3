"""Equal plans whatever the numpy: integers and stable sorts only (trap 73).

`WEFT_OLDER_NUMPY` names a folder with another numpy (`nox -s "tests(core)"` makes one); without it this is skipped.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from dataclasses import fields
from random import Random

import numpy as np
import pytest

from weft.plan import Plan, plan
from weft.policy import Policy
from weft.testing.models import random_case

OLDER = os.environ.get("WEFT_OLDER_NUMPY")
CASES = 60


def fingerprint(made: Plan) -> bytes:
    """Of every column."""
    total = hashlib.sha256(made.splits.tobytes())
    for table in (made.parts, made.routes, made.copies):
        for field in fields(table):
            total.update(getattr(table, field.name).tobytes())
    return total.digest()


def fingerprints() -> str:
    """Of plans of many random cases, small copies divided between senders, half of them with relays."""
    total = hashlib.sha256()
    for seed in range(CASES):
        case = random_case(Random(seed))
        policy = Policy(least_cut_bytes=8, relay=("never", "host")[seed % 2])
        made = plan([r.member for r in case.sources], [r.member for r in case.targets], case.layouts, policy)
        total.update(fingerprint(made))
    return total.hexdigest()


@pytest.mark.trap(73)
@pytest.mark.skipif(OLDER is None, reason="WEFT_OLDER_NUMPY names no other numpy")
def test_plans_do_not_depend_on_numpys_version() -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(OLDER), *sys.path])}
    ended = subprocess.run(
        [sys.executable, __file__], env=environment, capture_output=True, text=True, timeout=300, check=True
    )
    version, found = ended.stdout.split()
    assert version != np.__version__
    assert found == fingerprints()


if __name__ == "__main__":
    print(np.__version__, fingerprints())
