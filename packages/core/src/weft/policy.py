"""The policy: every choice that shapes a plan. All members must hold the same one; it is part of the fingerprint."""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import Annotated

import msgspec

from weft.errors import ConfigError, NotSupportedError
from weft.layout import ITEM_BYTES
from weft.options import bound_faults, one_of

_MIB = 1 << 20


class Policy(msgspec.Struct, frozen=True, kw_only=True):
    """Choices that are not facts. New fields go to the end, with defaults that keep the old behaviour."""

    only: tuple[str, ...] = ()
    """Patterns of the logical tensors that move; the others keep what they hold, on both sides. Empty moves all."""
    casts: tuple[tuple[str, str], ...] = ()
    """Declared (source dtype, target dtype) pairs, rounded to nearest even at the source. Any other difference is an
    error.
    """
    ignore: tuple[str, ...] = ()
    """Patterns (`*` matches anything) of logical tensors that sources hold and no target wants."""
    landing: Annotated[str, one_of("in_place", "shadow", "shadow_on_host")] = "in_place"
    """`in_place`: into live weights while the replica is paused. `shadow`: beside them on the same device while it
    serves, and paused only to copy them over; `shadow_on_host`: the same in pinned memory of the host.
    """
    encodings: tuple[str, ...] = ()
    """Encodings other than `casts`."""
    drive: Annotated[str, one_of("lock_step", "published")] = "lock_step"
    """`lock_step`: sources push a version and wait until it is installed. `published`: they go on, and replicas read
    it in their own time; set by `weft.Publisher` and `weft.Subscriber`, and for them alone.
    """
    relay: Annotated[str, one_of("never", "host", "domain", "auto")] = "never"
    """`host`: what several targets of a replica on one host want comes there once and is passed on among them;
    `domain`: the same within a fabric domain, whatever its hosts; `never`: sources send to every target themselves;
    `auto`: `host` where that saves at least a quarter of the bytes between hosts, else `never`.
    """
    digests: bool = True
    """Whether every bucket's digest is compared before the vote."""
    bucket_bytes: Annotated[int, msgspec.Meta(ge=4096)] = 16 * _MIB
    """Upper bound of one bucket."""
    staging_bytes: Annotated[int, msgspec.Meta(ge=65_536)] = 128 * _MIB
    """Upper bound of a member's staging memory per direction."""
    direct_run_bytes: Annotated[int, msgspec.Meta(ge=0)] = 0
    """Contiguous runs at least this long move straight between final buffers, shorter ones through staging.
    0 takes what the transport says (`Capabilities.direct_run_bytes`); planned without a transport it means always."""
    max_segments: Annotated[int, msgspec.Meta(ge=1, extra={"unit": "segments"})] = 16_384
    """Most segments of one bucket."""
    least_cut_bytes: Annotated[int, msgspec.Meta(ge=1)] = _MIB
    """A copy may be divided between equally near senders, for balance, into parts of at least so many bytes."""
    digest_every: Annotated[int, msgspec.Meta(ge=1, extra={"unit": "buckets"})] = 1
    """With digests, one bucket in so many has one, in turn while versions grow by one. Above 1, versions have no digest
    of their own.
    """
    chain: Annotated[str, one_of("never", "always", "auto")] = "never"
    """`always`: what several replicas want comes from sources to the first of them, by name, and each passes it on to
    the next while more arrives; `never`: sources send to every replica themselves; `auto`: where that saves at least a
    quarter of what the busiest member sends or takes, or of the bytes between domains without more for the busiest. A
    replica that gives a version up takes those behind it along.
    """

    def check(self) -> None:
        """Raise `ConfigError` with every contradiction, or `NotSupportedError` for what has its place but is not
        built.
        """
        faults = [
            f"cast {source} to {target}: both must be one of {', '.join(ITEM_BYTES)}"
            for source, target in self.casts
            if source not in ITEM_BYTES or target not in ITEM_BYTES
        ]
        faults += bound_faults(self)
        if faults:
            raise ConfigError("policy: " + "; ".join(faults))
        if self.encodings:
            raise NotSupportedError(f"encodings {', '.join(self.encodings)} are not built yet: only declared casts are")

    def check_alone(self) -> None:
        """Raise `ConfigError` for what means nothing where each replica has a plan of its own."""
        if self.chain != "never":
            raise ConfigError(
                f"policy: chain is {self.chain}, but each replica has a plan of its own here, and chains are for "
                "several replicas of one plan (weft.Refit); to pass on whole versions, see weft.Subscriber(relay=True)"
            )

    @property
    def shadow(self) -> bool:
        """Whether versions land beside the weights that are served."""
        return self.landing != "in_place"

    def moves(self, name: str) -> bool:
        """Whether a tensor takes part at all."""
        return not self.only or any(fnmatchcase(name, pattern) for pattern in self.only)

    def ignores(self, name: str) -> bool:
        """Whether a source tensor may go unused."""
        return any(fnmatchcase(name, pattern) for pattern in self.ignore)
