"""What the leases of all stores have in common, whatever makes their keys vanish."""

from __future__ import annotations

from collections.abc import Callable

from weft.contracts import LEASE_BYTES
from weft.errors import StoreError


class KeyLease:
    """See `StoreLease`. `renew` says whether the key was still this lease's."""

    def __init__(
        self, url: str, key: str, seconds: float, renew: Callable[[], bool], release: Callable[[], object]
    ) -> None:
        self.key, self.seconds = key, seconds
        self._url, self._renew, self._release = url, renew, release
        self._released = False

    def renew(self) -> None:
        """See `StoreLease.renew`."""
        if self._released:
            raise StoreError(f"store {self._url}: lease of {self.key!r}: it is released; take another")
        if not self._renew():
            raise StoreError(
                f"store {self._url}: lease of {self.key!r} is lost: not renewed for {self.seconds} s, or replaced; "
                "take another"
            )

    def release(self) -> None:
        """See `StoreLease.release`."""
        if not self._released:
            self._release()
            self._released = True

    def __repr__(self) -> str:
        return f"KeyLease({self.key!r}, {self.seconds} s, {self._url!r})"


def check_lease(url: str, key: str, value: bytes, seconds: float) -> None:
    """Raises `StoreError` for a lease that no store takes."""
    if not seconds > 0 or len(value) > LEASE_BYTES:
        raise StoreError(
            f"store {url}: lease {key!r}: expected at most {LEASE_BYTES} bytes for more than 0 s, found {len(value)} "
            f"bytes for {seconds} s"
        )
