"""What is opened, used and closed, by hand or in a `with` statement."""

from __future__ import annotations

from abc import ABC, abstractmethod
from types import TracebackType
from typing import Self


class Opened(ABC):
    """`with` opens it and closes it again, whatever happens in between."""

    @abstractmethod
    def open(self) -> None:
        """Get ready, or raise with nothing half-done."""

    @abstractmethod
    def close(self) -> None:
        """Let go of everything. Idempotent."""

    def __enter__(self) -> Self:
        self.open()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
