"""One item ahead, in order, with errors raised where the item would have been."""

import threading

import pytest

from dpo.data.prefetch import prefetch


def test_everything_is_built_in_order() -> None:
    assert list(prefetch(number**2 for number in range(5))) == [0, 1, 4, 9, 16]
    assert list(prefetch([])) == []


def test_the_next_item_is_built_while_this_one_is_used() -> None:
    built = {number: threading.Event() for number in range(3)}

    def build(number: int) -> int:
        built[number].set()
        return number

    items = prefetch(map(build, range(3)))
    assert next(items) == 0
    assert built[1].wait(10)  # it has not been asked for yet
    assert not built[2].is_set()  # one ahead, not all: memory stays bounded
    assert list(items) == [1, 2]


def test_an_error_is_raised_after_the_items_before_it() -> None:
    items = prefetch(1 // number for number in (1, 0, 1))
    assert next(items) == 1
    with pytest.raises(ZeroDivisionError):
        next(items)


def test_the_thread_ends_with_the_loop() -> None:
    before = threading.active_count()
    items = prefetch(iter(range(100)))
    next(items)
    items.close()  # type: ignore[attr-defined]
    assert threading.active_count() == before
