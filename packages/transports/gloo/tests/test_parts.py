"""Options and packing of the gloo transport, without a network."""

from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from weft.contracts import SEGMENT, Bucket, TransferProgram
from weft.deadline import Deadline
from weft.errors import ConfigError, DeadlineError
from weft.member import Member, Region
from weft.testing.options import undocumented
from weft_gloo import GlooOptions, factory
from weft_gloo.messages import messages_of


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"hots": "x"}, r"no option hots; did you mean 'host'"),
        ({"depth": 0}, "depth"),
        ({"pack_bytes": "much"}, "pack_bytes"),
    ],
)
def test_wrong_options_are_refused_by_name(options: dict[str, Any], what: str) -> None:
    with pytest.raises(ConfigError, match=what):
        factory(options)


def test_every_option_is_documented() -> None:
    assert undocumented(GlooOptions) == []


@pytest.mark.trap(42)
def test_both_ends_divide_a_bucket_alike_within_bounds() -> None:
    random = np.random.default_rng(0)
    rows = np.zeros(500, SEGMENT)
    rows["nbytes"] = random.integers(0, 300, 500)
    rows["offset"] = random.permutation(500) * 300
    rows["remote_offset"] = random.permutation(500) * 300
    mirror = rows.copy()
    mirror["offset"] = rows["remote_offset"]
    here = Region("here", torch.arange(150_000).to(torch.uint8))
    there = Region("there", torch.zeros(150_000, dtype=torch.uint8))
    sent = messages_of(Bucket(0, "b", rows), [here], 200, 1000)
    received = messages_of(Bucket(0, "a", mirror), [there], 200, 1000)
    assert [message.nbytes for message in sent] == [message.nbytes for message in received]
    assert all(not message.packed or message.nbytes <= 1000 for message in sent)
    assert any(message.packed for message in sent)
    staging = torch.empty(1000, dtype=torch.uint8)
    for out, into in zip(sent, received, strict=True):
        into.scatter(out.gather(staging))
    for _, offset, _, remote_offset, nbytes in rows.tolist():
        assert torch.equal(there.memory[remote_offset : remote_offset + nbytes], here.memory[offset : offset + nbytes])


@pytest.mark.trap(42)
def test_members_that_pack_differently_refuse_each_other_and_no_default_group_is_made() -> None:
    members = [Member(name, None, None, None, 0, "here", "here", "cpu") for name in "ab"]
    one, two = factory({}), factory({"pack_bytes": 12345})
    try:
        one.open(members[0])
        two.open(members[1])
        with pytest.raises(ConfigError, match=r"1048576.*12345.*make them equal"):
            one.connect(members[1], two.address(), Deadline.after(1))
        assert not dist.is_initialized()
    finally:
        one.close()
        two.close()


@pytest.mark.trap(40, 48)
def test_prepare_waits_for_peers_without_buckets_too_for_a_connection_that_is_not_up_cannot_break() -> None:
    members = [Member(name, None, None, None, 0, "here", "here", "cpu") for name in "ab"]
    one, two = factory({}), factory({})
    try:
        one.open(members[0])
        two.open(members[1])
        one.connect(members[1], two.address(), Deadline.after(20))
        with pytest.raises(DeadlineError, match=r"connecting: not within 0\.2 s; late: b"):
            one.prepare(TransferProgram(b"key", (), (), (), {}), Deadline.after(0.2))
    finally:
        one.close()
        two.close()
