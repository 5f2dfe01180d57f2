"""Who and what things are called."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zsfl.errors import BadShape
from zsfl.ids import CID_PATTERN, Cid, NodeCard, NodeId, Role, RunId, Version, parse_cid, step_cid

runs = st.text("0123456789abcdef", min_size=6, max_size=6).map(RunId)
versions = st.integers(0, 10**16 - 1).map(Version)
shards = st.integers(0, 10**9 - 1)


@given(runs, versions, shards, st.integers(0, 10**6 - 1))
def test_a_cid_says_what_it_was_made_of(run: RunId, version: Version, shard: int, k: int) -> None:
    cid = step_cid(run, shard, version, k)
    assert parse_cid(cid) == (run, version, shard, k)
    assert re.search(CID_PATTERN, cid)


@given(runs, st.lists(st.tuples(st.integers(0, 10**8 - 1), st.integers(0, 10**5 - 1), st.integers(0, 999)), min_size=2))
def test_within_a_run_cids_sort_by_version_shard_and_k(run: RunId, steps: list[tuple[int, int, int]]) -> None:
    cids = sorted(step_cid(run, shard, Version(version), k) for version, shard, k in steps)
    assert [(step.version, step.shard, step.k) for step in map(parse_cid, cids)] == sorted(steps)


@given(st.text(max_size=64) | st.from_regex(r"[0-9a-f]{6}-v\d{6,18}-s\d{3,11}-k\d{1,8}"))
def test_each_step_has_one_spelling(text: str) -> None:
    try:
        run, version, shard, k = parse_cid(text)
    except BadShape:
        assert not re.search(CID_PATTERN, text)
    else:
        assert step_cid(run, shard, version, k) == text


@pytest.mark.parametrize(
    "cid",
    [
        "",
        "../../etc/passwd",
        "3fa9c1-v00000012-s00003",
        "3fa9c1-v00000012-s00003-k000\n",
        "3fa9c1-v00000012-s00003-k000/x",
        "3FA9C1-v00000012-s00003-k000",
        "3fa9c1-v12-s3-k0",
        "3fa9c1-v000000012-s00003-k000",
        "3fa9c1-v00000012-s000003-k000",
        "3fa9c1-v00000012-s00003-k0000",
        "3fa9c1-v\u0661\u0661\u0661\u0661\u0661\u0661\u0661\u0661-s00003-k000",
        "x" * 10_000,
    ],
)
def test_nothing_else_is_a_cid(cid: str) -> None:
    with pytest.raises(BadShape, match="is not the id of a step") as caught:
        parse_cid(Cid(cid))
    assert len(str(caught.value)) < 500


def test_a_card_says_where_its_sockets_are() -> None:
    card = NodeCard(id=NodeId("1"), name="s", role=Role.CLIENT, host="10.0.0.5", control_port=4000, data_port=4001)
    assert card.address == "10.0.0.5:4000"
    assert card.endpoint(card.data_port) == "tcp://10.0.0.5:4001"
