"""Files that other systems read, against the schemas of those systems."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from kubeflow_trainer_api.models import TrainerV1alpha1TrainJob

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("file", "schema"),
    [
        (".github/workflows/ci.yml", "vendor.github-workflows"),
        (".github/ISSUE_TEMPLATE/bug.yml", "vendor.github-issue-forms"),
        (".github/ISSUE_TEMPLATE/feature.yml", "vendor.github-issue-forms"),
        ("CITATION.cff", "vendor.citation-file-format"),
    ],
)
def test_a_file_follows_its_schema(file: str, schema: str) -> None:
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", schema, str(ROOT / file)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def lost(given: Any, kept: Any, place: str = "") -> list[str]:
    """Keys and values that a schema does not know."""
    if isinstance(given, dict) and isinstance(kept, dict):
        return [one for key in given for one in lost(given[key], kept.get(key), f"{place}.{key}")]
    if isinstance(given, list) and isinstance(kept, list) and len(given) == len(kept):
        return [
            one
            for n, (a, b) in enumerate(zip(given, kept, strict=True))
            for one in lost(a, b, f"{place}[{n}]")
        ]
    return [] if given == kept else [place]


def test_the_train_job_is_one_that_kubeflow_reads_whole() -> None:
    job = yaml.safe_load((ROOT / "launch" / "cloud" / "kubernetes.yaml").read_text())
    assert lost(job, TrainerV1alpha1TrainJob.from_dict(job).to_dict()) == []
    job["spec"]["trainer"]["numNode"] = 2
    assert lost(job, TrainerV1alpha1TrainJob.from_dict(job).to_dict()) == [".spec.trainer.numNode"]


def test_the_dockerfile_has_no_known_mistake() -> None:
    hadolint = Path(sys.executable).with_name("hadolint")
    done = subprocess.run([hadolint, ROOT / "Dockerfile"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")
