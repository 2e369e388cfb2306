"""Faults of a reference cache: none is silent, and none loses a finished row.

The faults are those of the table in docs/reference-cache.md.
"""

from pathlib import Path

import pytest

from benchmarks.cache_faults import FAULTS, Fault, Skip, try_fault


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name.replace(" ", "_"))
def test_a_fault_ends_as_documented(fault: Fault, tmp_path: Path) -> None:
    try:
        try_fault(fault, tmp_path)
    except Skip as reason:
        pytest.skip(str(reason))
