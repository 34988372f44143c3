"""Published versions: a trainer publishes and goes on, and replicas read in their own time, from whoever holds them.

A *holder* is whoever has a whole version to give: the trainer's copy in host memory, or that of a replica which passes
on what it has read. Each holder is a fleet of its own (`weft.fleet`), in which a version is offered to a replica when
it asks for one.
"""

from weft.publication.holders import Holder
from weft.publication.keeper import Keeper
from weft.publication.publisher import Publisher
from weft.publication.subscriber import Subscriber

__all__ = ["Holder", "Keeper", "Publisher", "Subscriber"]
