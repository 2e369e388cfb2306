import time

import pytest
import torch

from dpo.train.stopwatch import Stopwatch


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU's own clock is asked where there is one")
def test_blocks_are_added_up_and_the_rest_is_not_counted() -> None:
    watch = Stopwatch()
    for _ in range(2):
        with watch.running():
            time.sleep(0.02)
        time.sleep(0.2)
    assert 0.04 <= watch.seconds() < 0.2


def test_nothing_took_no_time() -> None:
    assert Stopwatch().seconds() == 0
