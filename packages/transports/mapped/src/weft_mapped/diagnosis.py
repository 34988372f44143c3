"""What `weft doctor` learns from this package: whether other processes may write this one's memory."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np

from weft.diagnosis import Finding
from weft_mapped.kernel import PTRACE_SCOPE, allow_writers

_SECONDS = 60.0
_WORD = b"weft was here..."
_WRITE = """
import sys
import numpy as np
from weft_mapped.kernel import IOVEC, write_memory
process, address, word = int(sys.argv[1]), int(sys.argv[2]), np.frombuffer(sys.argv[3].encode(), np.uint8)
there = np.array([(address, len(word))], IOVEC)
write_memory(process, np.array([(word.ctypes.data, len(word))], IOVEC), there)
"""
_FIX = (
    "let the container's seccomp profile pass process_vm_writev, or give it CAP_SYS_PTRACE; shared memory is reached "
    "without it"
)


def diagnose(root: Path) -> list[Finding]:
    """Lets a child process write a few bytes of this one, as a trainer writes an engine's."""
    if sys.platform != "linux":
        return [Finding("mapped memory", "broken", f"needs Linux, this is {sys.platform}", "use transport gloo")]
    return [_written(), *scope(root)]


def _written() -> Finding:
    allow_writers()
    memory = np.zeros(len(_WORD), np.uint8)
    command = [sys.executable, "-c", _WRITE, str(os.getpid()), str(memory.ctypes.data), _WORD.decode()]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        return Finding("process_vm_writev", "broken", f"no answer within {_SECONDS:.0f} s", "try again")
    if done.returncode == 0 and memory.tobytes() == _WORD:
        return Finding("process_vm_writev", "ok", "another process of this user writes this one's memory")
    lines = done.stderr.strip().splitlines()
    return Finding("process_vm_writev", "broken", lines[-1] if lines else "nothing arrived", _FIX)


def scope(root: Path) -> list[Finding]:
    """What Yama allows (its `ptrace_scope`); nothing where the kernel has no Yama."""
    try:
        found = (root / PTRACE_SCOPE).read_text().strip()
    except OSError:
        return []
    if found in ("0", "1"):
        words = "no restriction" if found == "0" else "receivers allow writers by themselves (option allow_writers)"
        return [Finding("Yama", "ok", f"ptrace_scope {found}: {words}")]
    fix = f"sysctl kernel.yama.ptrace_scope=1, or {_FIX}" if found == "2" else "use shared memory, or transport nixl"
    return [Finding("Yama", "note", f"ptrace_scope {found}: only CAP_SYS_PTRACE writes, or nobody", fix)]
