"""`third_party` is a distribution of its own: `test_third_party.py` installs it and runs its tests."""

collect_ignore = ["third_party"]
