"""Reading a Hugging Face config, so that everything it lacks is named at once."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


class Fields:
    """A config, and the sizes that were asked of it in vain."""

    def __init__(self, config: Mapping[str, Any], missing: list[str] | None = None) -> None:
        self._config = config
        self.missing: list[str] = [] if missing is None else missing

    def part(self, name: str) -> Fields:
        """A config within, such as a tower's; what is missing is noted together."""
        found = self._config.get(name)
        return Fields(found if isinstance(found, Mapping) else {}, self.missing)

    def merged(self, name: str) -> Fields:
        """This config with what a part of it says instead."""
        found = self._config.get(name)
        return Fields({**self._config, **found} if isinstance(found, Mapping) else self._config, self.missing)

    def size(self, name: str, *others: str) -> int:
        """An integer, under the first of several names that has one; 1 where none has."""
        for key in (name, *others):
            if isinstance(self._config.get(key), int):
                return int(self._config[key])
        self.missing.append(name)
        return 1

    def get(self, name: str, default: Any = None) -> Any:
        """Anything that has a default; null counts as not given."""
        found = self._config.get(name)
        return default if found is None else found

    def flag(self, *names: str) -> bool:
        """Whether any of them is set."""
        return any(bool(self._config.get(name)) for name in names)
