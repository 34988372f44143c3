"""weft: weights from trainer. Layouts, planner, replay and plug-in registry."""
