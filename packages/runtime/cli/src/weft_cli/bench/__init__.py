"""`weft bench`: what a refit costs on this machine, beside what the bare network costs in the same run."""
