"""The `redis://` store of weft: a Redis server."""

from weft_redis.address import Address
from weft_redis.store import RedisStore, open_redis

__all__ = ["Address", "RedisStore", "open_redis"]
