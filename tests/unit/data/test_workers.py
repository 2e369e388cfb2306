"""Work in processes: results and errors in order, and no process outlives the one that started it."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from dpo.data.workers import map_in_order
from dpo.errors import RunFailed, UserError

ROOT = Path(__file__).parents[3]


def square(offset: int, number: int) -> int:
    if number == 5:
        raise UserError(f"no {number}")
    time.sleep(0.02 * (number % 3))  # later ones may finish first
    return offset + number * number


def process(_: None, number: int) -> int:
    if number < 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return os.getpid()


def terminated(_: None, number: int) -> int:
    if number == 4:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
    return number


@pytest.mark.parametrize("num_workers", [1, 2])
def test_results_and_errors_come_in_the_order_of_the_items(num_workers: int) -> None:
    items = [0, 1, 2, 3, 4, 7, 8, 9, 5, 5]
    results = map_in_order(square, 10, items, num_workers=num_workers)
    assert [next(results) for _ in range(8)] == [10, 11, 14, 19, 26, 59, 74, 91]
    with pytest.raises(UserError, match="no 5"):
        next(results)


def test_few_items_are_worked_on_here_and_many_are_not() -> None:
    assert {*map_in_order(process, None, range(3), num_workers=2)} == {os.getpid()}
    assert os.getpid() not in {*map_in_order(process, None, range(8), num_workers=2)}


def test_a_signal_to_the_group_is_the_parents_to_handle() -> None:
    results = map_in_order(terminated, None, range(20), num_workers=2)
    assert [*results] == [*range(20)]


def test_items_are_not_all_read_ahead() -> None:
    taken = []

    def items() -> Iterator[int]:
        for number in range(100):
            taken.append(number)
            yield number

    results = map_in_order(process, None, items(), num_workers=2)
    next(results)
    assert len(taken) < 20
    results.close()  # type: ignore[attr-defined]


def test_a_killed_process_is_an_error_that_says_how_to_go_on() -> None:
    with pytest.raises(RunFailed, match=r"data\.num_workers"):
        list(map_in_order(process, None, [0, 1, 2, -1, 4, 5], num_workers=2))


def test_the_processes_end_with_the_one_that_started_them() -> None:
    program = (
        "import sys, time; sys.path.insert(0, sys.argv[1])\n"
        "from test_workers import process\n"
        "from dpo.data.workers import map_in_order\n"
        "if __name__ == '__main__':\n"
        "    results = map_in_order(process, None, range(1000), num_workers=2)\n"
        "    print(next(results), flush=True)\n"
        "    time.sleep(60)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program, str(Path(__file__).parent)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
    ) as parent:
        assert parent.stdout is not None
        worker = int(parent.stdout.readline())
        parent.kill()
        deadline = time.monotonic() + 30
        while Path(f"/proc/{worker}").exists() and time.monotonic() < deadline:
            time.sleep(0.05)
    assert not Path(f"/proc/{worker}").exists()
