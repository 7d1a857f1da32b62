import pytest

from schemas.drops import Dropped, DropReason
from stages.fetch.answer import LONGEST_REST_S, SECOND_CHANCE, Refused
from stages.fetch.manners import hosts
from stages.settings import DownloadSettings

A, B = ("http", "a.test", 80), ("http", "b.test", 80)
BROKEN = Dropped(DropReason.CONNECTION_ERROR)


class Clock:
    now = 1000.0

    def monotonic(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    made = Clock()
    monkeypatch.setattr(hosts, "time", made)
    return made


def known(failures=3, timeout_s=20.0):
    return hosts.Hosts(DownloadSettings(host_failures=failures, timeout_s=timeout_s))


def fail(health, times, failure=BROKEN, origin=A):
    for _ in range(times):
        health.record(origin, failure)


def refused(health, origin=A):
    with pytest.raises(Dropped) as caught:
        health.wait_s(origin)
    assert caught.value.reason in SECOND_CHANCE
    return caught.value.reason


@pytest.mark.parametrize("reason", ["timeout", "connection_error", "incomplete_body", "server_error", "rate_limited"])
def test_a_host_that_fails_in_a_row_is_left_alone_and_no_other(clock, reason):
    health = known()
    fail(health, 2, Dropped(DropReason(reason)))
    assert (health.wait_s(A) > 0) == (reason == "timeout"), "those that are under way may run out of time too"
    clock.now += health.wait_s(A)
    assert health.wait_s(A) == 0
    fail(health, 1, Dropped(DropReason(reason)))
    assert refused(health) == DropReason.HOST_DOWN
    assert health.wait_s(B) == 0


@pytest.mark.parametrize("reason", [None, "not_found", "small_image", "opted_out", "http_error", "too_many_bytes"])
def test_a_host_that_answers_is_up(clock, reason):
    health = known()
    for _ in range(9):
        fail(health, 2)
        health.record(A, reason and Dropped(DropReason(reason)))
    assert health.wait_s(A) == 0


def test_rests_double_up_to_a_limit_and_one_probe_ends_them(clock):
    health = known()
    fail(health, 3)
    rests = []
    for _ in range(9):
        begun = clock.now
        while True:
            try:
                assert health.wait_s(A) == 0
                break
            except Dropped:
                clock.now += 1
        rests.append(clock.now - begun)
        assert 0 < health.wait_s(A) < 1, "while one row probes, the others wait"
        fail(health, 1)
    assert rests == [10, 20, 40, 80, 160, 320, 600, 600, 600]
    clock.now += 601
    assert health.wait_s(A) == 0
    health.record(A, None)
    assert [health.wait_s(A) for _ in range(3)] == [0, 0, 0]
    fail(health, 2)
    assert health.wait_s(A) == 0


def test_a_probe_that_does_not_come_back_makes_way_for_another(clock):
    health = known(timeout_s=5.0)
    fail(health, 3)
    clock.now += 11
    assert health.wait_s(A) == 0
    clock.now += 4
    assert health.wait_s(A) > 0
    clock.now += 2
    assert health.wait_s(A) == 0
    assert health.wait_s(A) > 0


def test_failures_that_were_under_way_do_not_prolong_a_rest(clock):
    health = known()
    fail(health, 20)
    clock.now += 10.5
    assert health.wait_s(A) == 0


def test_zero_failures_mean_that_no_host_is_given_up(clock):
    health = known(failures=0)
    fail(health, 99)
    assert health.wait_s(A) == 0


@pytest.mark.parametrize("reason", ["rate_limited", "server_error"])
def test_nobody_waits_for_longer_than_the_deadline_of_a_url(clock, reason):
    health = known()
    health.record(A, Refused(DropReason(reason), 86400.0))
    assert refused(health) == reason
    health.record(A, None)  # a request that was under way went well
    assert refused(health) == reason
    clock.now += LONGEST_REST_S - 15
    assert health.wait_s(A) == 15
    clock.now += 16
    assert health.wait_s(A) == 0


def test_the_memory_is_bounded(clock, monkeypatch):
    monkeypatch.setattr(hosts, "_MOST_HOSTS", 10)
    health = known()
    for n in range(100):
        fail(health, 3, origin=("http", f"{n}.test", 80))
    assert len(health._known) == 10
    assert refused(health, ("http", "99.test", 80)) == DropReason.HOST_DOWN
