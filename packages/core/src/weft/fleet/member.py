"""A member of a replica of a fleet."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from typing import Any

from weft.authentication import Secret
from weft.contracts import ReplicaControl, Target
from weft.deadline import Deadline, Deadlines
from weft.errors import DeadlineError, RendezvousError, TransportError
from weft.fleet.roll import Announcement
from weft.job_store import JobStore
from weft.policy import Policy
from weft.refit import Refit
from weft.roster import Expect
from weft.stores import open_store

_LOG = logging.getLogger(__name__)
_AGAIN_SECONDS = 0.2


def cell_of(job: str, replica: str) -> str:
    """The job between all sources of a fleet and one replica."""
    return f"{job}/{replica}"


class FleetMember(Refit):
    """One member of a replica that may come and go while the trainer runs on: a `Refit` of its replica's own cell.

    `open` waits until the sources admit it, which they do when they next offer a version: let
    `Deadlines.rendezvous` be longer than a step of training. After a loss (`PeerLostError`, `RefitAbortedError`) that
    this replica does not survive, or when the trainer has restarted, close it and open another, in all members of the
    replica; layouts and addresses may be others then.
    """

    def __init__(
        self, *, target: Target, replica: str, replica_size: int = 1, sources: int, store: str, job: str, name: str,
        transport: str, transport_options: Mapping[str, Any] | None = None, control: ReplicaControl | None = None,
        deadlines: Deadlines | None = None, policy: Policy | None = None, host: str | None = None,
        domain: str | None = None, secret: Secret | bytes | str | None = None, served: int | None = None,
    ) -> None:  # fmt: skip
        (policy or Policy()).check_alone()
        super().__init__(
            target=target, control=control, transport=transport, transport_options=transport_options, store=store,
            job=cell_of(job, replica), name=name, replica=replica, replica_size=replica_size,
            expect=Expect(sources, 1), deadlines=deadlines, policy=policy, host=host, domain=domain, secret=secret,
            served=served,
        )  # fmt: skip
        self._fleet, self._replica, self._size, self._url = job, replica, replica_size, store
        self._patience = (deadlines or Deadlines()).rendezvous
        self._connect_seconds = self._deadlines.begin  # as long as the sources take to join
        self._records: JobStore | None = None
        self._call: Announcement | None = None

    def open(self) -> None:
        """Wait to be admitted, and join this replica's cell. Raises as `Refit.open`.

        What remains of the replica's former life in its cell may stand in the way until the sources have seen that it
        is over: it is tried again until `Deadlines.rendezvous` has passed.
        """
        deadline = Deadline.after(self._patience)
        store = open_store(self._url, deadline)
        try:
            self._records = JobStore(store, self._fleet, self._secret)
            self._try(deadline)
        except BaseException:
            self.close()
            raise
        finally:
            self._records = None
            store.close()

    def _announced(self) -> None:
        """Ask the sources to come: only now, or they might meet a former life of this member and be gone when this one
        comes. Anew every time: sources that have tried to join the cell once wait for another announcement.
        """
        assert self._records is not None, "it is being opened"
        self._call = Announcement(self._records, self._replica, self.name, self._size, self._patience)

    def _try(self, deadline: Deadline) -> None:
        while True:
            try:
                return super().open()
            except (RendezvousError, TransportError, DeadlineError) as error:
                if deadline.expired():
                    raise
                _LOG.info("%s tries again to join its cell: %s", self.name, error)
            finally:
                if self._call is not None:
                    self._call.end()
                    self._call = None
            time.sleep(_AGAIN_SECONDS)
