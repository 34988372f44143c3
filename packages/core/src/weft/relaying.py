"""Relaying: what one target passes on in one version, while more of it comes."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from weft.deadline import Deadline, Deadlines
from weft.errors import DeadlineError, WeftError
from weft.protocol import source
from weft.protocol.events import Event, heard, tell
from weft.replay import Sender
from weft.wire import Wire


class Relaying:
    """Within its replica a target passes on as soon as it may; to another replica, to which it is a source, once all of
    that have begun. A replica that takes nothing for half of `Deadlines.move`, though there is something for it, is
    given up, and so is one that has not taken everything when this target has a quarter of that left for itself.
    """

    def __init__(
        self, wire: Wire, version: int, within: Sender, between: Mapping[str, Callable[[], Sender]], leader_name: str,
        deadlines: Deadlines,
    ) -> None:  # fmt: skip
        """`between` makes a sender per replica, and `leader_name` leads the sources."""
        self._wire, self._version, self._within, self._make = wire, version, within, dict(between)
        self._leader_name, self._patience_seconds = leader_name, deadlines.move / 2
        self._end = Deadline.after(deadlines.begin + 0.75 * deadlines.move)
        self._state = source.Source(leader_name, tuple(map(source.Serving, between)), relay=True)
        self._between: dict[str, Sender] = {}
        self._limits: dict[str, tuple[tuple[object, ...], Deadline]] = {}
        self._credit: dict[str, tuple[int, ...]] = {}

    @property
    def nbytes(self) -> int:
        """Bytes posted so far."""
        return self._within.nbytes + sum(sender.nbytes for sender in self._between.values())

    @property
    def done(self) -> bool:
        """Whether nobody needs anything from here any more."""
        return self._within.done and self._state.released

    def waiting_for(self) -> list[str]:
        """Receivers that have not taken everything, and replicas that have not begun."""
        waiting = self._within.waiting_for()
        for known in self._state.replicas:
            if known.stage is source.Stage.WAITING and not known.ended:
                waiting.append(f"replica {known.replica}")
            elif known.replica in self._between:
                waiting += self._between[known.replica].waiting_for()
        return waiting

    def reads(self, group: int) -> bool:
        """Whether anything of this group, or of one before it, has not left yet."""
        return self._within.reads(group) or any(
            self._between[known.replica].reads(group) if known.stage is source.Stage.SENDING else True
            for known in self._state.replicas
            if known.stage is not source.Stage.SENT and not known.ended
        )

    def step(self) -> None:
        """Do what can be done now. Raises what fails within the replica; another one is given up for it."""
        if self.done:
            return  # credits are for this member's source, if for anybody
        for peer, notice in self._wire.take(self._version, "credit"):
            self._credit[peer] = notice.numbers  # may come before "go", from one that lands what nothing comes for
            for sender in (self._within, *self._between.values()):
                sender.take_credit(peer, *notice.numbers)
        for kind in ("go", "outcome") if self._make else ():
            for peer, notice in self._wire.take(self._version, kind):
                self._feed(heard(peer, notice))
        self._within.step()
        for known in self._state.replicas:
            if known.stage is source.Stage.SENDING and not known.ended:
                self._advance(known.replica, self._between[known.replica])
        if not self._state.released:
            self._wire.check(lambda: [self._leader_name])

    def give_up(self, reason: str) -> None:
        """Pass on nothing more; replicas that have everything already need not know."""
        for known in self._state.replicas:
            if known.stage is source.Stage.SENDING and not known.ended:
                self._between[known.replica].collect()
                if self._between[known.replica].done:
                    self._feed(Event("sent", replica=known.replica))
        self._within.cancel()
        self._feed(Event("give-up", text=reason))

    def _advance(self, replica: str, sender: Sender) -> None:
        try:
            sender.step()
            self._wire.check(sender.waiting_for)
            self._be_patient(replica, sender)
        except WeftError as error:
            self._feed(Event("error", replica=replica, text=str(error)))
            return
        if sender.done:
            self._feed(Event("sent", replica=replica))

    def _be_patient(self, replica: str, sender: Sender) -> None:
        before, limit = self._limits.get(replica, ((), None))
        if limit is None or before != sender.progress or not sender.ignored:
            self._limits[replica] = sender.progress, Deadline.after(self._patience_seconds)
        elif limit.expired():
            what = f"version {self._version}, passed on to replica {replica}, of which nothing was taken"
            raise DeadlineError(what, limit.seconds, sender.waiting_for())
        if self._end.expired() and sender.held_up:
            what = f"version {self._version}, passed on to replica {replica}, of which not all was taken"
            raise DeadlineError(what, self._end.seconds, sender.waiting_for())

    def _feed(self, event: Event) -> None:
        self._state, actions = source.step(self._state, event)
        for action in tell(self._wire, self._version, actions):
            if action.what == "send":
                self._between[action.about] = sender = self._make[action.about]()
                for peer, numbers in self._credit.items():
                    sender.take_credit(peer, *numbers)
            elif action.about in self._between:
                self._between[action.about].cancel()
