"""The user guide explains every message that weft's errors can carry, and nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest

import errors
from errors import Entry, entries, explained, messages


def test_every_message_is_explained_once():
    known = entries()
    wrong = [str(message) for message in messages() if len(explained(message, known)) != 1]
    assert not wrong, f"explain them in {errors.PAGE.name} (`python3 tools/errors.py --missing`): " + "\n".join(wrong)


def test_nothing_is_explained_that_nobody_raises():
    known = entries()
    used = {entry for message in messages() for entry in explained(message, known)}
    assert [entry.text for entry in known if entry not in used] == []
    assert len(known) == len(set(known))


MODULE = """
class OddError(ConfigError):
    pass

def check(path, count):
    faults = [f"{path}: odd" for _ in range(count)]
    faults += [f"{count} left"] if count else []
    faults.append("last " "one")
    if faults:
        raise LayoutError(faults)
    busy = [f"{path} is busy" if count else "all busy"]
    raise other.OddError(busy)

def _size_fault(size):
    return f"size {size} is odd"

def names() -> list[str]:
    return ["from a list"]

def wait(deadline, peer):
    deadline.wait(lambda: True, f"word of {peer}", lambda: [peer])
    raise PeerLostError(peer, "it ended")

def not_ours():
    raise ValueError("not weft's")
"""


def test_messages_are_found_wherever_errors_get_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "core" / "src" / "weft").mkdir(parents=True)
    (tmp_path / "core" / "src" / "weft" / "module.py").write_text(MODULE)
    (tmp_path / "core" / "src" / "weft" / "errors.py").write_text(
        "class WeftError(Exception): ...\n"
        + "".join(f"class {name}(WeftError): ...\n" for name in ("ConfigError", "LayoutError", "PeerLostError"))
    )
    monkeypatch.setattr(errors, "PACKAGES", tmp_path)
    assert {(message.raised_as, message.text) for message in messages()} == {
        ("", "…: odd"),
        ("", "… left"),
        ("", "last one"),
        ("", "… is busy"),
        ("", "all busy"),
        ("", "size … is odd"),
        ("", "from a list"),
        ("DeadlineError", "word of …: not within … s; late: …"),
        ("PeerLostError", "lost …: it ended"),
    }


def test_the_entry_that_says_most_explains_a_message():
    broad, narrow = Entry("buffer …: …"), Entry("buffer …: declared twice")
    message = errors.Message(Path("x"), 1, "", "buffer …: declared twice")
    assert explained(message, [broad, narrow]) == [narrow]
    assert explained(message, [Entry("piece …")]) == []
    assert len(explained(message, [narrow, Entry("buffer …: declared twice")])) == 2
