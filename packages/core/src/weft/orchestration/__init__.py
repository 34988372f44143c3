"""An orchestrator that is neither source nor target: it pauses and resumes the engines of many replicas.

Members of a replica that cannot reach their engine's control pass a `RemoteControl`, which asks through the job's
store; an `Orchestrator` that can reach the controls, but holds no weights and no engine's memory, does what they ask.
"""

from weft.orchestration.orchestrator import Orchestrator
from weft.orchestration.records import Doing, ReplicaState, replica_states
from weft.orchestration.remote import ControlError, RemoteControl

__all__ = ["ControlError", "Doing", "Orchestrator", "RemoteControl", "ReplicaState", "replica_states"]
