"""Files of a store are read several at a time, and what comes next is made meanwhile: in order, and no more of it."""

import threading
from itertools import count

import pytest

from pipeline.shared.files import RemotePath
from pipeline.shared.several import ahead, of_each

STORE = RemotePath("memory://several")
NAMES = [str(number) for number in range(40)]


def test_those_of_a_store_are_read_together_and_come_in_order():
    meeting = threading.Barrier(8)

    def read(name):
        meeting.wait(60)  # breaks unless eight are read at a time
        return f"read {name}"

    assert list(of_each(STORE, read, NAMES)) == [f"read {name}" for name in NAMES]


def test_those_of_a_folder_are_read_one_by_one_as_they_are_wanted(tmp_path):
    begun = []
    each = of_each(tmp_path, lambda name: begun.append(name) or name, NAMES)
    assert [next(each), next(each)] == NAMES[:2] == begun


@pytest.mark.parametrize("end", ["error", "enough"])
def test_when_one_fails_or_enough_is_read_the_others_are_not_begun(end):
    begun = []

    def read(name):
        begun.append(name)
        if name == "3" and end == "error":
            raise OSError("gone")
        return name

    each = of_each(STORE, read, NAMES)
    assert [next(each) for _ in range(3)] == NAMES[:3]
    if end == "error":
        with pytest.raises(OSError, match="gone"):
            next(each)
    else:
        each.close()
    assert len(begun) < len(NAMES)
    before = list(begun)
    assert not list(each)
    assert begun == before, "nothing goes on behind"


def test_what_comes_next_is_made_while_the_one_before_is_in_use_and_no_more():
    made, stops = [], threading.Event()

    def numbers():
        for number in count():
            made.append(number)
            yield number
            if number == 2:
                stops.wait(60)

    each = ahead(numbers())
    assert made == [], "nothing is begun before it is wanted"
    for wanted in range(3):
        assert next(each) == wanted
        while len(made) < min(wanted + 2, 3):  # the one after it, which nobody has asked for
            pass
    assert made == [0, 1, 2]
    each.close()  # does not wait for the fourth
    stops.set()


def test_an_error_comes_in_its_turn_and_the_end_is_one():
    def numbers():
        yield 1
        yield 2
        raise OSError("gone")

    each = ahead(numbers())
    assert [next(each), next(each)] == [1, 2]
    with pytest.raises(OSError, match="gone"):
        next(each)
    assert list(ahead(iter([]))) == []
    assert list(ahead(iter([None, 3]))) == [None, 3]
