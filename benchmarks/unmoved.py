"""The share of a model's weights that a training run has left as they were in the reference.

    python -m benchmarks.unmoved path/to/reference RUN/model ...

In bfloat16 a weight moves when its float32 master has gone half a spacing, 0.2 to 0.4 % of the weight; the
policy computes as if smaller updates were not there.
"""

import argparse
from pathlib import Path

from safetensors import safe_open

WEIGHTS = "*.safetensors"


def main() -> None:
    """Prints a line per model."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("reference", type=Path, help="folder of the reference")
    parser.add_argument("models", type=Path, nargs="+", help="folders of policies that started from it")
    args = parser.parse_args()
    for model in args.models:
        same, total = unmoved(args.reference, model)
        print(f"{model}: {same / total:.3f} of {total:,} weights are as in {args.reference}", flush=True)


def unmoved(reference: Path, model: Path) -> tuple[int, int]:
    """The number of equal weights, and of all that both folders hold; compared in the model's type."""
    same = total = 0
    places = {name: file for file in reference.glob(WEIGHTS) for name in _names(file)}
    for file in sorted(model.glob(WEIGHTS)):
        with safe_open(file, framework="pt") as ours:
            for name in sorted(places.keys() & set(ours.keys())):
                with safe_open(places[name], framework="pt") as theirs:
                    weight = ours.get_tensor(name)
                    same += int((weight == theirs.get_tensor(name).to(weight.dtype)).sum())
                    total += weight.numel()
    return same, total


def _names(file: Path) -> list[str]:
    with safe_open(file, framework="pt") as opened:
        return list(opened.keys())


if __name__ == "__main__":
    main()
