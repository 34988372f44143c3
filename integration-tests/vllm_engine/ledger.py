"""What clients of an engine get, held against the versions that weft says are served. It knows neither vLLM nor weft.

Called in the order in which things happen in one event loop.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field


@dataclass(eq=False)
class Attempt:
    """One try of a request."""

    wanted: int
    """Tokens that it is to bring."""
    tokens: list[int] = field(default_factory=list)
    commits: int = 0
    """Of the ledger, when its last token came."""


@dataclass(eq=False)
class Ledger:
    """Counts, and notes whatever contradicts the promises of a pause mode in `wrong`."""

    token_of: Callable[[int], int]
    """What a model of a version says."""
    refusing: Callable[[], str | None]
    """Why the engine may not serve, if so."""
    version: int = 0
    """That the engine serves."""
    mode: str = "abort"
    """Of pauses from now on."""
    refitting: bool = False
    """Whether a refit is under way."""
    wrong: list[str] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    longest: float = 0.0
    """Seconds without a token."""
    _modes: list[str] = field(default_factory=list)
    """Of all commits."""
    _last_at: float | None = None

    def commit(self, version: int) -> None:
        """From now on tokens are of this version: the engine is paused, and all workers have it."""
        if version <= self.version:
            self._note(f"version {version} is committed after {self.version}")
        self.version = version
        self._modes.append(self.mode)
        self.counts["commits"] += 1

    def begin(self, wanted: int) -> Attempt:
        """A client asks for so many tokens."""
        self.counts["attempts"] += 1
        return Attempt(wanted, commits=len(self._modes))

    def get(self, attempt: Attempt, tokens: Sequence[int]) -> None:
        """Tokens have come."""
        if not tokens:
            return
        now = time.monotonic()
        if self._last_at is not None:
            self.longest = max(self.longest, now - self._last_at)
        self._last_at = now
        expected = self.token_of(self.version)
        if set(tokens) != {expected}:
            self._note(f"tokens {list(tokens)} while version {self.version} is served, whose token is {expected}")
        if reason := self.refusing():
            self._note(f"tokens {list(tokens)} while the engine refuses: {reason}")
        since = set(self._modes[attempt.commits :])
        if attempt.tokens and since:
            self.counts["straddling"] += 1
            if since != {"keep"}:
                self._note(f"an attempt goes on after a pause with mode {', '.join(sorted(since - {'keep'}))}")
        attempt.commits = len(self._modes)
        attempt.tokens += tokens
        self.counts["tokens"] += len(tokens)

    def label(self, attempt: Attempt, version: int, first: int, end: int) -> None:
        """The engine says that these tokens of an attempt are of a version."""
        self.counts["labelled"] += end - first
        if set(attempt.tokens[first:end]) - {self.token_of(version)}:
            self._note(f"tokens {attempt.tokens[first:end]} are labelled with version {version}")

    def refuse(self, attempt: Attempt) -> None:
        """The engine has not taken an attempt, and said why."""
        self.counts["refused"] += 1
        if attempt.tokens:
            self._note(f"an attempt that has {len(attempt.tokens)} tokens is refused")

    def end(self, attempt: Attempt, reason: str) -> None:
        """An attempt has ended."""
        self.counts[f"ended: {reason}"] += 1
        match reason:
            case "length":
                if len(attempt.tokens) != attempt.wanted:
                    self._note(f"{len(attempt.tokens)} tokens came, not {attempt.wanted}")
            case "abort":
                aborting = self.refitting and self.mode == "abort"
                if not (aborting or self.refusing()):
                    self._note(f"a request was aborted with mode {self.mode}, and nothing had failed")
                if not aborting:
                    self.counts["aborted by a failure"] += 1
            case _:
                self._note(f"an attempt has ended with {reason}")

    def _note(self, what: str) -> None:
        self.wrong.append(f"{what} (commit {len(self._modes)})")
