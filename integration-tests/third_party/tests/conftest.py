"""Failures of the suite show what was compared."""

import pytest

pytest.register_assert_rewrite("weft.testing")
