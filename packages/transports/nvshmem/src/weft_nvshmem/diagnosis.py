"""What `weft doctor` learns from this package: whether NVSHMEM could be used here, and that it is unproven."""

from __future__ import annotations

from pathlib import Path

from weft.diagnosis import Finding
from weft.errors import ConfigError
from weft.member import Member
from weft_nvshmem.library import Library


def diagnose(root: Path) -> list[Finding]:
    """Imports NVSHMEM, and makes no world."""
    unproven = Finding(
        "NVSHMEM", "note", "transport 'nvshmem' is unproven: it never ran on a GPU", "compare what arrives"
    )
    library = Library()
    try:
        library.start(Member("doctor", None, None, None, 0, "here", "here", "cuda:0"))
    except ConfigError as error:
        return [unproven, Finding("nvshmem4py", "note", str(error), "use transport 'gloo' or 'nixl'")]
    return [unproven, Finding("nvshmem4py", "ok", f"imports; packs {library.packs}")]
