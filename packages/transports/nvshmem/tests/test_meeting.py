"""How members of a world meet in a store."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from weft.deadline import Deadline
from weft.errors import ConfigError, DeadlineError
from weft.stores import open_store
from weft_nvshmem.meeting import Guest, World, meet


def join(folder: Path, name: str, members: int, seconds: float = 60) -> World:
    deadline = Deadline.after(seconds)
    store = open_store(f"file://{folder}", deadline)
    try:
        return meet(store, "w", Guest(name, True, False), members, lambda: b"made by " + name.encode(), deadline)
    finally:
        store.close()


def test_all_members_find_the_same_world_and_one_makes_its_id(tmp_path: Path) -> None:
    with ThreadPoolExecutor(4) as pool:
        worlds = list(pool.map(lambda name: join(tmp_path, name, 4), "abcd"))
    assert worlds == [worlds[0]] * 4
    assert sorted(guest.name for guest in worlds[0].guests) == list("abcd")
    assert worlds[0].unique_id == b"made by " + worlds[0].guests[0].name.encode()
    assert [worlds[0].number_of(guest.name) for guest in worlds[0].guests] == [0, 1, 2, 3]
    with pytest.raises(ConfigError, match="x is none of the 4 members"):
        worlds[0].number_of("x")
    with pytest.raises(ConfigError, match=r"'w' has 4 members already: give every start a new name"):
        join(tmp_path, "e", 4)


@pytest.mark.trap(40)
def test_who_is_missing_is_said_in_time(tmp_path: Path) -> None:
    with pytest.raises(DeadlineError, match=r"making the NVSHMEM world: .* late: member 2 of 2"):
        join(tmp_path, "a", 2, 0.2)
    with pytest.raises(DeadlineError, match=r"late: PE 0 of the world"):
        join(tmp_path, "b", 2, 0.2)


def test_two_members_of_one_name_are_refused(tmp_path: Path) -> None:
    with ThreadPoolExecutor(2) as pool:
        joins = [pool.submit(join, tmp_path, "twin", 2) for _ in "ab"]
    assert [str(each.exception()) for each in joins] == [
        "NVSHMEM world 'w' has two members of one name: twin, twin"
    ] * 2
