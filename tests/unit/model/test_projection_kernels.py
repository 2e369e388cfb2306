"""The output projection's Triton kernels, without a GPU: interpreted they equal the sliced path, and they
compile to an H100's code. What a GPU says of them is in test_on_gpu.py.
"""

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton", reason="triton is not installed: pip install triton (Linux only)")

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def differences() -> dict[str, list[float]]:
    root = str(HERE.parents[2])
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": root}
    done = subprocess.run(
        [sys.executable, str(HERE / "interpreted_kernels.py")],
        env=environment, capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, list[float]] = json.loads(done.stdout.splitlines()[-1])
    return found


def test_interpreted_they_equal_the_sliced_path(differences: dict[str, list[float]]) -> None:
    cases = {name: found for name, found in differences.items() if name.startswith("float32")}
    assert len(cases) == 4 * 2 * 4
    assert {name: max(found) for name, found in cases.items() if not max(found) < 1e-6} == {}


def test_in_bfloat16_a_slope_is_rounded_once_in_either_path(differences: dict[str, list[float]]) -> None:
    cases = {name: found for name, found in differences.items() if name.startswith("bfloat16")}
    assert len(cases) == 4 * 2
    for name, (logps, *gradients) in cases.items():
        same_logits = "plain" in name  # else plain torch scales and caps in bfloat16
        assert logps < (1e-6 if same_logits else 0.02), name
        assert max(gradients) < 0.04, name


def test_large_logits_stay_finite_no_rows_give_none_and_nan_stays_visible(
    differences: dict[str, list[float]],
) -> None:
    assert math.isfinite(differences["large"][0])
    assert differences["no rows"] == [0]
    assert differences["not a number"] == [0]


def test_in_a_rehearsal_they_allocate_as_much(differences: dict[str, list[float]]) -> None:
    assert differences["stand-in"] == [0]


@pytest.mark.parametrize(("kind", "capped"), [("fp32", False), ("bf16", True)])
@pytest.mark.parametrize("name", ["reduce_rows", "make_slopes"])
def test_they_compile_for_an_h100(
    name: str, kind: str, capped: bool, tmp_path: Path, monkeypatch: Any
) -> None:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from dpo.model import projection_kernels as kernels

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))  # compiled here, not read from a cache
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "1")  # as by default; else Triton 3.9 warns of 3.10
    others = {"picked": "*fp32"} if name == "reduce_rows" else {"outer": "*fp32"}
    signature = {
        "logits": f"*{kind}", "targets": "*i64", "totals": "*fp32", **others, "start": "i32",
        "columns": "i32", "stride": "i32", "scale": "fp32", "cap": "fp32",
        "CAPPED": "constexpr", "BLOCK": "constexpr",
    }  # fmt: skip
    constants = {"CAPPED": capped, "BLOCK": kernels.REDUCED if name == "reduce_rows" else kernels.MADE}
    source = ASTSource(getattr(kernels, name), signature, constants)
    made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": kernels.WARPS})
    assert ".target sm_90" in made.asm["ptx"]
    assert len(made.asm["cubin"]) > 1000
    assert "atom." not in made.asm["ptx"], "sums in any order would not repeat"
