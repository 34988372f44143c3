"""Where a Redis server is, and who asks it. The password is in here and comes out nowhere."""

from __future__ import annotations

from dataclasses import dataclass, field
from urllib.parse import unquote, urlsplit

from weft.errors import ConfigError
from weft.stores import shown

_DEFAULT_PORT = 6379
_EXPECTED = "redis://[user:password@]host[:port][/database], or rediss:// for TLS"


@dataclass(frozen=True, slots=True)
class Address:
    """What a URL says."""

    host: str
    port: int
    database: int
    tls: bool
    user: str | None = None
    password: str | None = field(default=None, repr=False)

    @property
    def url(self) -> str:
        """For people: without user and password."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{'rediss' if self.tls else 'redis'}://{host}:{self.port}/{self.database}"

    @classmethod
    def parse(cls, url: str) -> Address:
        """Raises `ConfigError`, which shows neither user nor password, for what is no such URL."""
        fault = f"store: expected {_EXPECTED} (special characters of user and password as %XX), found {shown(url)!r}"
        try:
            parts = urlsplit(url)
            port = parts.port
        except ValueError:
            raise ConfigError(fault) from None  # its words may be a part of the password
        database = parts.path.removeprefix("/")
        known = parts.scheme in ("redis", "rediss") and not parts.query and not parts.fragment
        if not known or not parts.hostname or port == 0 or not (database.isdecimal() or not database):
            raise ConfigError(fault)
        return cls(
            host=parts.hostname,
            port=port or _DEFAULT_PORT,
            database=int(database or 0),
            tls=parts.scheme == "rediss",
            user=unquote(parts.username) if parts.username else None,
            password=unquote(parts.password) if parts.password else None,
        )

    def without_password(self, text: str) -> str:
        """A text of somebody else's that may quote it."""
        return text.replace(self.password, "…") if self.password else text
