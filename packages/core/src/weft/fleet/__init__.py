"""Fleets: sources with replicas that come, go and come back while training runs on.

Each replica of a fleet is a *cell*: a refit job of its own between all sources and that replica, with its own
rendezvous, plan and connections. What happens to one replica touches no other cell, and no source restarts.
"""

from weft.fleet.member import FleetMember
from weft.fleet.offer import FleetOffer, FleetReport
from weft.fleet.sources import Fleet

__all__ = ["Fleet", "FleetMember", "FleetOffer", "FleetReport"]
