"""launch/slurm.sbatch: its stages on every machine, also in a container, and when the job is requeued."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from end_to_end.shells import PYTHON_THAT_CHECKS, ROOT, script, shell


@pytest.fixture
def cluster(tmp_path: Path) -> Path:
    """A fake SLURM: srun runs a task on each of SLURM_NNODES machines in turn; scontrol logs its calls."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "launch").mkdir()
    script(
        tmp_path / "bin" / "srun",
        '#!/usr/bin/env bash\nmachines=$SLURM_NNODES status=0\necho "$*" >>srun.log\n'
        "while [[ $1 == --* ]]; do [ $1 != --nodes=1 ] || machines=1; shift; done\n"
        'for SLURM_NODEID in $(seq 0 $((machines - 1))); do export SLURM_NODEID; "$@" || status=$?; done\n'
        'exit "$status"\n',
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
    variables = {"SLURM_JOB_ID": "41", "SLURM_NNODES": "2", "SLURM_CPUS_PER_TASK": "12"} | variables
    variables.setdefault("PYTHON", "true")
    return shell(*command, folder=cluster, PATH=path, **variables)


RECORDS = """#!/usr/bin/env bash
echo "$NODE_RANK of $NNODES, $NPROC each, at $MASTER_ADDR:$MASTER_PORT: $*" >>run.log
echo "$ACCELERATE_CONFIG, $SRUN_CPUS_PER_TASK cores$BOX" >>how.log
[ $1 = precompute-ref ] || exit STATUS
"""


@pytest.mark.parametrize(("status", "requeued"), [(0, False), (3, True), (1, False)])
def test_a_slurm_job_precomputes_trains_and_is_requeued(cluster: Path, status: int, requeued: bool) -> None:
    script(cluster / "launch" / "run", RECORDS.replace("STATUS", str(status)))
    ended = submit(cluster, SLURM_GPUS_ON_NODE="4", SLURM_JOB_NODELIST="n[7-8]")
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


def test_a_job_whose_training_would_be_refused_computes_no_reference(cluster: Path) -> None:
    script(cluster / "launch" / "run", RECORDS.replace("STATUS", "0"))
    refuses = script(cluster / "python", '#!/usr/bin/env bash\n[ "$3 $4" != "check train" ] || exit 2\n')
    assert submit(cluster, PYTHON=str(refuses)).returncode == 2
    assert not (cluster / "run.log").exists()


def test_a_failed_stage_ends_the_job(cluster: Path) -> None:
    script(cluster / "launch" / "run", '#!/usr/bin/env bash\necho "$1" >>run.log\nexit 2\n')
    ended = submit(cluster)
    assert ended.returncode == 2
    assert set((cluster / "run.log").read_text().split()) == {"precompute-ref"}


@pytest.mark.parametrize(
    ("machines", "gpus", "expected"),
    [
        ("1", "8", "launch/one_node.yaml"),
        ("1", "1", "launch/one_gpu.yaml"),
        ("2", "8", "launch/multi_node.yaml"),
    ],
)
def test_the_launch_configuration_follows_the_machines(
    cluster: Path, machines: str, gpus: str, expected: str
) -> None:
    """Every task also gets the cores of its machine, which srun no longer takes from the job."""
    script(cluster / "launch" / "run", RECORDS.replace("STATUS", "0"))
    ended = submit(cluster, SLURM_NNODES=machines, SLURM_GPUS_ON_NODE=gpus)
    assert ended.returncode == 0, ended.stderr
    assert set((cluster / "how.log").read_text().splitlines()) == {f"{expected}, 12 cores"}


def test_stages_and_the_count_of_attempts_run_in_the_container(cluster: Path) -> None:
    script(cluster / "launch" / "run", RECORDS.replace("STATUS", "3"))
    script(cluster / "bin" / "box", '#!/usr/bin/env bash\nshift\nBOX=" in a box" exec "$@"\n')
    python = script(cluster / "python", '#!/usr/bin/env bash\necho "python$BOX" >>how.log\n')
    submit(cluster, CONTAINER="box --nv", SRUN_OPTIONS="--mem=0", SLURM_NNODES="1", PYTHON=str(python))
    assert all(line.endswith(" in a box") for line in (cluster / "how.log").read_text().splitlines())
    assert "python in a box" in (cluster / "how.log").read_text()
    tasks = (cluster / "srun.log").read_text().count("--mem=0 box --nv ")
    assert tasks == 5  # the check, two stages, and the count, which takes two


@pytest.mark.parametrize(("machines", "launcher"), [("1", "one_node"), ("3", "multi_node")])
def test_a_dry_run_of_the_job_prints_the_commands_of_each_machine(
    tmp_path: Path, machines: str, launcher: str
) -> None:
    python = script(tmp_path / "python", PYTHON_THAT_CHECKS)
    variables = {"DRY_RUN": "1", "MASTER_ADDR": "n7", "PYTHON": str(python), "SLURM_NNODES": machines}
    ended = shell("bash", "launch/slurm.sbatch", "--config", "x.yaml", **variables)
    assert ended.returncode == 0, ended.stderr
    lines = ended.stdout.splitlines()
    outer, inner = [line for line in lines if line[0] != " "], [line for line in lines if line[0] == " "]
    assert [line.split()[-3] for line in outer] == ["precompute-ref", "train"]
    shown = ["0"] if machines == "1" else ["0", "2"]
    assert [line.split()[2] for line in inner] == [f"{node}:" for node in shown * 2]
    for line in inner:
        assert f"--config_file launch/{launcher}.yaml" in line
        assert f"--num_processes {8 * int(machines)} " in line


def test_a_dry_run_of_the_job_stops_at_a_configuration_that_is_refused(tmp_path: Path) -> None:
    python = script(tmp_path / "python", "#!/usr/bin/env bash\n[ $1 = -c ] || exit 2\n")
    ended = shell("bash", "launch/slurm.sbatch", "--config", "x.yaml", DRY_RUN="1", PYTHON=str(python))
    assert ended.returncode == 2
    assert "launch/run train" not in ended.stdout
