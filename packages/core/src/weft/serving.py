"""What a replica's control is told while a version comes in."""

from __future__ import annotations

from collections.abc import Callable

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


def receive(
    begin: Callable[[], Installation], control: ReplicaControl, pause_seconds: float, served: int, *, shadow: bool
) -> Report:
    """Pause, begin, update, commit and resume; with a shadow, pause only once the whole replica has every byte.

    After a failure the control is told to refuse, unless the weights that it serves are still those of `served`: then
    it goes on. Raises `RefitAbortedError` and the like.
    """
    installation, paused = None, not shadow
    if not shadow:
        control.pause("wait", Deadline.after(pause_seconds))
    try:
        installation = begin()
        if shadow:
            installation.fetch()
            paused = True
            control.pause("wait", Deadline.after(pause_seconds))
        installation.update()
        report = installation.commit()
    except Exception as error:  # noqa: BLE001  # raised again, in the words of the protocol
        failure = installation.failed(error) if installation is not None else error
        if not shadow or (installation is not None and installation.touched):
            control.refuse(f"{type(error).__name__}: {error}")
        elif paused:
            control.resume(served)
        raise failure from (error if failure is not error else None)
    control.invalidate_caches(report.version)
    control.resume(report.version)
    return report
