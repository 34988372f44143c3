"""What a replica's control is told while a version comes in."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from weft.contracts import ReplicaControl
from weft.deadline import Deadline
from weft.installation import Installation
from weft.report import Report


class NoControl:
    """`weft.contracts.ReplicaControl` of members that have none: somebody else pauses and resumes their replica."""

    def pause(self, mode: str, deadline: Deadline) -> None:
        """Nothing."""

    def invalidate_caches(self, version: int) -> None:
        """Nothing."""

    def resume(self, version: int) -> None:
        """Nothing."""

    def refuse(self, reason: str) -> None:
        """Nothing."""


@dataclass(slots=True)
class Serving:
    """What a replica serves, as the member beside its control knows."""

    control: ReplicaControl
    pause_seconds: float
    shadow: bool
    version: int | None = None
    """The version that is known to be whole; None before the first, and from a failure that may have left a mixture
    until the next.
    """

    def receive(self, begin: Callable[[], Installation]) -> Report:
        """Pause, begin, update, commit and resume; with a shadow, pause only once the whole replica has every byte.

        After a failure the control is told to refuse, unless nothing that is served has changed: then it goes on, with
        the version that is known to be whole. Raises `RefitAbortedError` and the like.
        """
        served, self.version = self.version, None
        installation, paused = None, not self.shadow
        if not self.shadow:
            self._pause()
        try:
            installation = begin()
            if self.shadow:
                installation.fetch()
                paused = True
                self._pause()
            installation.update()
            report = installation.commit()
            self.control.invalidate_caches(report.version)
            self.control.resume(report.version)
        except Exception as error:  # noqa: BLE001  # raised again, in the words of the protocol
            failure = installation.failed(error) if installation is not None else error
            untouched = self.shadow and (installation is None or not installation.touched)
            self.version = served if untouched else None
            if paused and self.version is not None:
                self.control.resume(self.version)
            elif paused:
                self.control.refuse(f"{type(error).__name__}: {error}")
            try:
                raise failure from (error if failure is not error else None)
            finally:
                del failure  # which holds this frame, and with it all memory of the member
        self.version = report.version
        return report

    def _pause(self) -> None:
        self.control.pause("wait", Deadline.after(self.pause_seconds))
