"""weft: weights from trainer. Moves the weights of a model in training into the engines that serve it.

Start with `Refit`: one handle per member of a job. Layouts are made with `LayoutBuilder`, or by an adapter
(`weft_megatron`, `weft_vllm`); `plan` is what every member computes from them.
"""

from weft.authentication import Secret
from weft.box import Affine, Box
from weft.builder import LayoutBuilder
from weft.config import Config, load_config
from weft.contracts import ReplicaControl, Source, Target, Transport
from weft.deadline import Deadline, Deadlines
from weft.errors import (
    ConfigError,
    DeadlineError,
    LayoutError,
    NotSupportedError,
    PeerLostError,
    PlanError,
    PluginError,
    RecordError,
    RefitAbortedError,
    RendezvousError,
    StoreError,
    TransportError,
    WeftError,
)
from weft.fleet import Fleet, FleetMember, FleetOffer, FleetReport
from weft.installation import Installation
from weft.layout import Kind, Layout
from weft.member import Member
from weft.names import NameMap
from weft.offer import Offer
from weft.plan import Plan, plan
from weft.policy import Policy
from weft.publication import Holder, Keeper, Publisher, Subscriber
from weft.refit import Refit
from weft.report import Report
from weft.roster import Expect
from weft.store_server import StoreServer, serve_store
from weft.stores import open_store
from weft.views import execute

__all__ = [
    "Affine",
    "Box",
    "Config",
    "ConfigError",
    "Deadline",
    "DeadlineError",
    "Deadlines",
    "Expect",
    "Fleet",
    "FleetMember",
    "FleetOffer",
    "FleetReport",
    "Holder",
    "Installation",
    "Keeper",
    "Kind",
    "Layout",
    "LayoutBuilder",
    "LayoutError",
    "Member",
    "NameMap",
    "NotSupportedError",
    "Offer",
    "PeerLostError",
    "Plan",
    "PlanError",
    "PluginError",
    "Policy",
    "Publisher",
    "RecordError",
    "Refit",
    "RefitAbortedError",
    "RendezvousError",
    "ReplicaControl",
    "Report",
    "Secret",
    "Source",
    "StoreError",
    "StoreServer",
    "Subscriber",
    "Target",
    "Transport",
    "TransportError",
    "WeftError",
    "execute",
    "load_config",
    "open_store",
    "plan",
    "serve_store",
]
