"""Claims: one holder at a time, lost ones go on, failures end."""

import threading
import time

import pytest

from data_shards.storage.store import Store
from jobs.scheduling.claims import ClaimPhase, Claims
from pipeline.run.lease import Holding, Lease, LeaseError
from tests.object_store import BUCKET, s3_clients, s3_server

FIRST = Lease("0123abcd", 1)


@pytest.fixture
def claims(tmp_path):
    return Claims(str(tmp_path / "claims"), lease_s=0.4, attempts=3)


def at_once(url, number=6):
    """Let several clients of a folder take the same claim at the same time."""
    clients = [Claims(url, lease_s=60.0) for _ in range(number)]
    barrier, taken = threading.Barrier(number), []

    def take(client):
        barrier.wait()
        if client.take(FIRST, {"suite": "certify"}):
            taken.append(client)

    threads = [threading.Thread(target=take, args=(client,)) for client in clients]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return taken


def test_one_of_many_takes_a_claim(tmp_path):
    (winner,) = at_once(str(tmp_path))
    assert winner.read(FIRST)["suite"] == "certify"
    assert winner.read(FIRST)["by"] == winner._me


@pytest.mark.integration
def test_one_of_many_takes_a_claim_on_an_object_store():
    with s3_server() as address, s3_clients(f"http://{address}"):
        url = f"s3://{BUCKET}/claims"
        (winner,) = at_once(url)
        winner.require_exclusive()
        winner.beat(FIRST)
        assert winner.states() == {FIRST.key: winner.states()[FIRST.key]}
        assert winner.states()[FIRST.key].phase is ClaimPhase.RUNNING
        winner.end(FIRST, 0)
        assert winner.states()[FIRST.key].phase is ClaimPhase.DONE


def test_a_store_without_conditional_writes_is_refused(claims, monkeypatch):
    claims.require_exclusive()
    monkeypatch.setattr(Store, "create", lambda *_: True)
    with pytest.raises(LeaseError, match=r"If-None-Match.*another store"):
        claims.require_exclusive()


def test_an_attempt_without_a_sign_of_life_is_lost(claims):
    assert claims.states() == {}
    claims.take(FIRST, {})
    assert claims.states()[FIRST.key].phase is ClaimPhase.RUNNING
    time.sleep(0.3)
    claims.beat(FIRST)
    time.sleep(0.3)
    assert claims.states()[FIRST.key].phase is ClaimPhase.RUNNING
    time.sleep(0.3)
    assert claims.states()[FIRST.key].phase is ClaimPhase.OPEN
    assert claims.take(FIRST.next, {})
    assert claims.states()[FIRST.key].claim == FIRST.next
    assert not claims.is_held(FIRST)
    assert claims.is_held(FIRST.next)


@pytest.mark.parametrize(
    ("code", "at_once", "later"),
    [
        (0, ClaimPhase.DONE, ClaimPhase.DONE),
        (1, ClaimPhase.WAITING, ClaimPhase.OPEN),
        (2, ClaimPhase.FAILED, ClaimPhase.FAILED),  # bad input stays bad
        (137, ClaimPhase.OPEN, ClaimPhase.OPEN),
    ],
)
def test_how_an_attempt_ended_decides_about_the_next(claims, code, at_once, later):
    claims.take(FIRST, {})
    claims.end(FIRST, code)
    claims.end(FIRST, 0 if code else 1)  # the first word counts
    state = claims.states()[FIRST.key]
    assert (state.phase, state.code) == (at_once, code)
    time.sleep(0.5)
    assert claims.states()[FIRST.key].phase is later


def test_failures_are_counted_and_stops_are_not(claims):
    claim = FIRST
    for code in (143, 130, 143, 143, 137, 137):
        claims.take(claim, {})
        claims.end(claim, code)
        assert claims.states()[FIRST.key].phase is ClaimPhase.OPEN
        claim = claim.next
    claims.take(claim, {})
    claims.end(claim, 137)
    assert claims.states()[FIRST.key].phase is ClaimPhase.FAILED


def test_a_holder_outlives_its_lease_and_learns_of_its_loss(claims):
    claims.take(FIRST, {})
    lost = []
    holding = Holding(claims, FIRST, lost=lost.append)
    with holding():
        time.sleep(0.8)
        assert claims.states()[FIRST.key].phase is ClaimPhase.RUNNING
        assert not lost
        claims.take(FIRST.next, {})
        time.sleep(0.4)
    assert lost
    assert "0123abcd.0001 was taken over" in lost[0]


def test_names_of_claims():
    assert Lease.parse(FIRST.name) == FIRST
    with pytest.raises(LeaseError, match="no lease"):
        Lease.parse("0123abcd")
