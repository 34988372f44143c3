"""weft adapter for vLLM: weight-transfer engine, target and replica control of a live engine."""
