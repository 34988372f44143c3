"""The command weft: demo, plugins, plan."""
