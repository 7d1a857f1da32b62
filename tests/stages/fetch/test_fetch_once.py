"""What is learned once per host: robots.txt, addresses."""

import asyncio
from collections import Counter

import pytest

from schemas.drops import Dropped, DropReason
from stages.fetch import once
from stages.fetch.once import Once


def asker(most=100, weigh=lambda _: 1):
    """A function that gets some keys at the same time, and how often each was learned; `bad` cannot be."""
    learned = Counter()

    async def learn(key):
        learned[key] += 1
        await asyncio.sleep(0)
        if key == "bad":
            raise Dropped(DropReason.SERVER_ERROR)
        if key == "broken":
            raise OSError("this machine")
        return key.upper()

    known = Once(learn, 24 * 3600.0, most, weigh)

    def get(*keys):
        async def answers():
            got = await asyncio.gather(*map(known.get, keys), return_exceptions=True)
            return [str(getattr(answer, "reason", answer)) for answer in got]

        return asyncio.run(answers())

    return get, learned


def test_what_was_learned_is_remembered_for_a_day_and_failures_for_a_minute(monkeypatch):
    now = 1000.0
    monkeypatch.setattr(once.time, "monotonic", lambda: now)
    get, learned = asker(3)
    for _ in range(2):
        assert get("a", "a", "bad", "bad") == ["A", "A", "server_error", "server_error"]
    assert learned == {"a": 1, "bad": 1}
    now += 70
    get("a", "bad")
    assert learned == {"a": 1, "bad": 2}
    now += 24 * 3600
    get("a")
    assert learned == {"a": 2, "bad": 2}
    for _ in range(9):  # what is learned again takes no more room
        now += 25 * 3600
        get("a", "b", "bad")
    get("a", "b", "bad")
    assert learned == {"a": 11, "b": 9, "bad": 11}


def test_trouble_of_this_machine_reaches_all_who_wait_and_is_not_remembered():
    get, learned = asker()
    for _ in range(2):
        assert get("broken", "broken") == ["this machine"] * 2
    assert learned["broken"] == 2


@pytest.mark.parametrize(("weights", "oldest"), [({}, 40), ({"K47": 8}, 47), ({"K48": 999}, 49), ({"K49": 999}, 49)])
def test_what_is_remembered_is_bounded_by_its_weight_and_the_oldest_goes_first(weights, oldest):
    get, learned = asker(10, lambda answer: weights.get(answer, 1))
    get(*(f"k{n}" for n in range(50)))
    get(*(f"k{n}" for n in range(oldest, 50)))
    assert max(learned.values()) == 1
    get(f"k{oldest - 1}")
    assert learned[f"k{oldest - 1}"] == 2
