"""`weft verify`: an engine or a model, against a checkpoint."""
