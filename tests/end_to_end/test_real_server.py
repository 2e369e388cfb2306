"""The sampler `endpoint` against a real server: llama-cpp-python's, with a GGUF of SmolLM2.

python -m venv V && V/bin/pip install "llama-cpp-python[server]"
python get_smollm2.py MODEL --gguf FILE            # the same weights for transformers and for llama.cpp
LLAMA_PYTHON=V/bin/python LLAMA_GGUF=FILE LLAMA_MODEL=MODEL pytest tests/end_to_end/test_real_server.py
"""

import json
import os
import shlex
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from ranks import free_port

from data_prep.cli import main

NEEDED = ("LLAMA_PYTHON", "LLAMA_GGUF", "LLAMA_MODEL")
pytestmark = pytest.mark.skipif(
    not all(os.environ.get(name) for name in NEEDED),
    reason=f"needs {', '.join(NEEDED)}: an interpreter with llama-cpp-python[server], a GGUF, and its model",
)
LENGTH = shlex.join(
    ["command:" + sys.executable, "-c", "import sys; [print(len(line)) for line in sys.stdin]"]
)
TOLERANCE = "0.3"
"""Nats: llama.cpp multiplies weights in 4 bits with activations in 8."""


def serve(port: int) -> str:
    words = [os.environ["LLAMA_PYTHON"], "-m", "llama_cpp.server", "--model", os.environ["LLAMA_GGUF"]]
    words += ["--port", str(port), "--n_ctx", "512", "--logits_all", "true", "--verbose", "false"]
    return shlex.join(words)


def run(model: Path, folder: Path, port: int, *options: str) -> int:
    (folder / "prompts.jsonl").write_text(
        "".join(
            json.dumps(
                {"prompt": [{"role": "user", "content": f"Say {word}."}], "chosen": "a", "rejected": "b"}
            )
            + "\n"
            for word in ("hello", "a number", "something kind", "why the sky is blue", "a colour", "no")
        )
    )
    assert (
        main(["preferences", str(folder / "prompts.jsonl"), "--output", str(folder / "p"), "--overwrite"])
        == 0
    )
    given = ["--model", str(model), "--output", str(folder / "out"), "--scorer", LENGTH, "--overwrite"]
    given += ["--sampler", "endpoint", "--endpoint", f"http://127.0.0.1:{port}", "--serve", serve(port)]
    given += ["--dtype", "float32", "--num_samples", "3", "--completion_tokens", "12", "--temperature", "1"]
    return main(["sample", str(folder / "p"), *given, "--endpoint_tolerance", TOLERANCE, *options])


def test_a_real_server_is_started_checked_and_sampled(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(Path(os.environ["LLAMA_MODEL"]), tmp_path, free_port(), "--test_fraction", "0") == 0
    assert "is the model that is meant: log-probs differ by mean 0." in capsys.readouterr().out
    rows = pq.read_table(tmp_path / "out" / "train.parquet").to_pylist()
    assert len(rows) >= 4
    assert len({text for row in rows for text in row["completions"]}) >= 10


def test_a_real_server_with_another_model_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from safetensors.torch import load_file, save_file

    source, other = Path(os.environ["LLAMA_MODEL"]), tmp_path / "other"
    other.mkdir()
    for file in source.iterdir():
        if file.suffix != ".safetensors":
            (other / file.name).write_bytes(file.read_bytes())
    weights = load_file(source / "model.safetensors")
    name = "model.layers.15.mlp.down_proj.weight"
    weights[name] = weights[name] * 3
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    assert run(other, tmp_path, free_port()) == 2
    assert "is not the one of --model: its log-probs differ by mean" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
