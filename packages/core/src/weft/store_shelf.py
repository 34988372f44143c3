"""What the embedded store holds, and who waits for it. Used by one event loop, which is its clock."""

from __future__ import annotations

import asyncio
from collections import defaultdict, deque
from dataclasses import dataclass

from weft.store_wire import Reply, Request

_REMEMBERED_SECONDS = 300.0
"""An `add` that is asked again within this time counts once."""
_LARGEST_SUM = (1 << 63) - 1
_LATE_SECONDS = 1.0
"""A lease whose end is looked at so late was kept from being renewed by the server itself, and gets its time again."""


@dataclass(slots=True)
class _Holding:
    token: bytes
    seconds: float
    end: asyncio.TimerHandle


class Shelf:
    """Values, counters and leases."""

    def __init__(self) -> None:
        self._values: dict[str, bytes] = {}
        self._counters: dict[str, int] = {}
        self._leases: dict[str, _Holding] = {}
        self._watchers: dict[str, set[asyncio.Event]] = defaultdict(set)
        self._sums: dict[bytes, int] = {}
        self._summed: deque[tuple[float, bytes]] = deque()

    async def answer(self, request: Request) -> Reply:
        """Carry out one request."""
        match request.operation:
            case "get":
                return Reply(self._values.get(request.key))
            case "set":
                self._put(request.key, request.value)
            case "add":
                return self._add(request)
            case "delete":
                self._counters.pop(request.key, None)
                self._put(request.key, None)
            case "keys":
                names = self._values.keys() | self._counters.keys()
                return Reply(names=tuple(sorted(name for name in names if name.startswith(request.key))))
            case "lease":
                self._put(request.key, request.value)
                self._hold(request.key, request.token, request.seconds)
            case "renew":
                return Reply(number=int(self._renew(request)))
            case "release":
                if self._holds(request):
                    self._put(request.key, None)
            case "watch":
                return Reply(await self._watch(request))
        return Reply()

    def _put(self, key: str, value: bytes | None) -> None:
        """Write, or remove; whatever lease there was ends."""
        if holding := self._leases.pop(key, None):
            holding.end.cancel()
        if value is None:
            self._values.pop(key, None)
        else:
            self._values[key] = value
        for changed in self._watchers.get(key, ()):
            changed.set()

    def _add(self, request: Request) -> Reply:
        now = asyncio.get_running_loop().time()
        while self._summed and self._summed[0][0] < now - _REMEMBERED_SECONDS:
            del self._sums[self._summed.popleft()[1]]
        if request.token not in self._sums:
            total = self._counters.get(request.key, 0) + request.number
            if abs(total) > _LARGEST_SUM:
                return Reply(refusal=f"expected sums of 64 bits, found {total}")
            self._counters[request.key] = self._sums[request.token] = total
            self._summed.append((now, request.token))
        return Reply(number=self._sums[request.token])

    def _hold(self, key: str, token: bytes, seconds: float) -> None:
        end = asyncio.get_running_loop().call_later(seconds, self._expire, key, token)
        self._leases[key] = _Holding(token, seconds, end)

    def _expire(self, key: str, token: bytes) -> None:
        holding = self._leases[key]
        if asyncio.get_running_loop().time() > holding.end.when() + _LATE_SECONDS:
            self._hold(key, token, holding.seconds)
        else:
            self._put(key, None)

    def _holds(self, request: Request) -> bool:
        return request.key in self._leases and self._leases[request.key].token == request.token

    def _renew(self, request: Request) -> bool:
        if not self._holds(request):
            return False
        holding = self._leases[request.key]
        holding.end.cancel()
        self._hold(request.key, holding.token, holding.seconds)
        return True

    async def _watch(self, request: Request) -> bytes | None:
        changed = asyncio.Event()
        watchers = self._watchers[request.key]
        watchers.add(changed)
        try:
            async with asyncio.timeout(request.seconds):
                while self._values.get(request.key) == request.value:
                    changed.clear()
                    await changed.wait()
        except TimeoutError:
            pass  # then it is what it was
        finally:
            watchers.discard(changed)
            if not watchers and self._watchers.get(request.key) is watchers:
                del self._watchers[request.key]
        return self._values.get(request.key)
