"""launch/slurm.sbatch: its stages on every machine, and when the job is requeued."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from end_to_end.shells import ROOT, script, shell


@pytest.fixture
def cluster(tmp_path: Path) -> Path:
    """A fake SLURM with two machines: srun runs a task on each in sequence, and scontrol logs its calls."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "launch").mkdir()
    script(
        tmp_path / "bin" / "srun",
        "#!/usr/bin/env bash\nwhile [[ $1 == --* ]]; do shift; done\nstatus=0\n"
        'for SLURM_NODEID in 0 1; do export SLURM_NODEID; "$@" || status=$?; done\nexit "$status"\n',
    )
    script(
        tmp_path / "bin" / "scontrol",
        '#!/usr/bin/env bash\n[ "$1" = show ] && printf "n7\\nn8\\n" || echo "$*" >>scontrol.log\n',
    )
    return tmp_path


def submit(cluster: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """Runs the job as SLURM would; its number is 41."""
    command = ("bash", str(ROOT / "launch" / "slurm.sbatch"), "--config", "x.yaml")
    path = f"{cluster / 'bin'}:{os.environ['PATH']}"
    return shell(*command, folder=cluster, PATH=path, SLURM_JOB_ID="41", **variables)


@pytest.mark.parametrize(("status", "requeued"), [(0, False), (3, True), (1, False)])
def test_a_slurm_job_precomputes_trains_and_is_requeued(cluster: Path, status: int, requeued: bool) -> None:
    script(
        cluster / "launch" / "run",
        "#!/usr/bin/env bash\n"
        'echo "$NODE_RANK of $NNODES, $NPROC each, at $MASTER_ADDR:$MASTER_PORT: $*" >>run.log\n'
        f"[ $1 = precompute-ref ] || exit {status}\n",
    )
    ended = submit(
        cluster,
        SLURM_NNODES="2",
        SLURM_GPUS_ON_NODE="4",
        SLURM_JOB_NODELIST="n[7-8]",
    )
    assert ended.returncode == status, ended.stderr
    assert (cluster / "run.log").read_text().splitlines() == [
        f"{node} of 2, 4 each, at n7:20041: {stage} --config x.yaml"
        for stage in ("precompute-ref", "train")
        for node in (0, 1)
    ]
    assert (cluster / "scontrol.log").is_file() == requeued
    assert not requeued or (cluster / "scontrol.log").read_text() == "requeue 41\n"


@pytest.mark.parametrize(("without", "requeued"), [(0, True), (2, True), (3, False)])
def test_a_job_that_gains_no_step_gives_up_with_the_reason(
    cluster: Path, without: int, requeued: bool
) -> None:
    script(cluster / "launch" / "run", "#!/usr/bin/env bash\n[ $1 = precompute-ref ] || exit 3\n")
    (cluster / "runs").mkdir()
    record = {"attempts_without_a_step": without, "message": "SIGTERM before the first step"}
    (cluster / "runs" / "exit.json").write_text(json.dumps(record))
    instead = (
        f'#!/usr/bin/env bash\ncase "$*" in "-m dpo"*) echo runs ;; *) exec {sys.executable} "$@" ;; esac\n'
    )
    ended = submit(cluster, PYTHON=str(script(cluster / "python", instead)), SLURM_RESTART_COUNT="4")
    assert ended.returncode == 3
    assert (cluster / "scontrol.log").is_file() == requeued
    assert ended.stderr.splitlines()[0] == "launch/slurm.sbatch: job 41, attempt 5"
    said = "3 attempts in a row gained no step; the last: SIGTERM before the first step"
    assert (said in ended.stderr) is not requeued


def test_a_failed_stage_ends_the_job(cluster: Path) -> None:
    script(cluster / "launch" / "run", '#!/usr/bin/env bash\necho "$1" >>run.log\nexit 2\n')
    ended = submit(cluster)
    assert ended.returncode == 2
    assert set((cluster / "run.log").read_text().split()) == {"precompute-ref"}


def test_a_dry_run_of_the_job_prints_both_stages(tmp_path: Path) -> None:
    ended = shell("bash", "launch/slurm.sbatch", "--config", "x.yaml", DRY_RUN="1", MASTER_ADDR="n7")
    assert ended.returncode == 0, ended.stderr
    stages = [line.split()[-3] for line in ended.stdout.splitlines()]
    assert stages == ["precompute-ref", "train"]
