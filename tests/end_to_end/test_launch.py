"""The scripts of launch/: what they would start, and what they say of a wrong variable. Only shells are
started here; tests/distributed and tests/faults start the real thing.
"""

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
SCRIPTS = sorted(path for path in (ROOT / "launch").iterdir() if path.read_text().startswith("#!"))
PYTHON_THAT_CHECKS = """#!/usr/bin/env bash
case "$*" in *"-m dpo check"*) echo runs/x ;; esac
"""
"""Instead of an interpreter: `dpo check` finds everything in order."""


def shell(*command: str, folder: Path = ROOT, **variables: str) -> subprocess.CompletedProcess[str]:
    names = ("NNODES", "NODE_RANK", "NPROC", "MASTER_ADDR", "MASTER_PORT", "ACCELERATE_CONFIG", "PYTHON")
    environment = {name: value for name, value in os.environ.items() if name not in names} | variables
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


def script(path: Path, content: str) -> Path:
    path.write_text(content)
    path.chmod(0o755)
    return path


@pytest.fixture
def checks(tmp_path: Path) -> str:
    return str(script(tmp_path / "python", PYTHON_THAT_CHECKS))


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_shellcheck_finds_nothing(path: Path) -> None:
    found = subprocess.run(["shellcheck", str(path)], capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stdout


@pytest.mark.parametrize("path", sorted((ROOT / "launch").glob("*.yaml")), ids=lambda path: path.name)
def test_a_launch_configuration_owns_no_number_of_the_experiment(path: Path) -> None:
    engine = yaml.safe_load(path.read_text())["deepspeed_config"]
    settings = json.loads((ROOT / engine["deepspeed_config_file"]).read_text())
    assert engine["zero3_init_flag"] == (settings["zero_optimization"]["stage"] == 3)
    for name in ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping"):
        assert settings[name] == "auto"
    assert "optimizer" not in settings
    assert settings["data_types"]["grad_accum_dtype"] == settings["communication_data_type"] == "fp32"


@pytest.mark.parametrize(
    ("variables", "problem"),
    [
        ({"NNODES": "2"}, "MASTER_ADDR is missing; expected the address of machine 0, since NNODES is 2"),
        ({"NNODES": "2", "MASTER_ADDR": "a"}, "NODE_RANK is missing; expected this machine's number, from 0"),
        (
            {"NNODES": "2", "MASTER_ADDR": "a", "NODE_RANK": "2", "NPROC": "1"},
            "NODE_RANK: 2; expected a number below",
        ),
        ({"NNODES": "two"}, "NNODES: two; expected a number"),
        ({"NPROC": "-1"}, "NPROC: -1; expected a number"),
    ],
)
def test_a_wrong_variable_is_named(variables: dict[str, str], problem: str) -> None:
    ended = shell("launch/run", "train", "--config", "x.yaml", **variables)
    assert ended.returncode == 2
    assert problem in ended.stderr
    assert len(ended.stderr.splitlines()) == 1


def test_a_dry_run_prints_the_command_and_starts_nothing(checks: str) -> None:
    words = ("launch/run", "train", "--config", "a b.yaml")
    ended = shell(*words, DRY_RUN="1", PYTHON=checks, NPROC="3", LOG_DIR="logs")
    assert ended.returncode == 0, ended.stderr
    assert (
        ended.stdout.split()
        == (
            f"{checks} -m accelerate.commands.launch --config_file launch/cpu.yaml --num_processes 3 "
            "--main_process_port 0 --log_dir logs --tee 3 -m dpo train --config a\\ b.yaml"
        ).split()
    )


def test_a_machine_of_several_counts_the_processes_of_all(checks: str) -> None:
    place = {"NNODES": "4", "NODE_RANK": "3", "MASTER_ADDR": "10.0.0.1", "NPROC": "8"}
    ended = shell("launch/run", "train", "--config", "x.yaml", DRY_RUN="1", PYTHON=checks, **place)
    assert ended.returncode == 0, ended.stderr
    expected = "--num_machines 4 --machine_rank 3 --main_process_ip 10.0.0.1"
    assert expected in ended.stdout
    assert "--num_processes 32 --main_process_port 29500" in ended.stdout


def test_what_a_killed_launch_run_left_is_removed(tmp_path: Path) -> None:
    python = script(tmp_path / "python", PYTHON_THAT_WAITS.replace("PYTHON", sys.executable))
    (tmp_path / "dpo-run.999999999.abcdef").touch()
    alive = tmp_path / f"dpo-run.{os.getpid()}.abcdef"
    alive.touch()
    ended = shell(
        "launch/run", "train", "--config", "x.yaml", PYTHON=str(python), TMPDIR=str(tmp_path), NPROC="1"
    )
    assert "started" in ended.stdout, ended.stderr
    assert list(tmp_path.glob("dpo-run.*")) == [alive]


PYTHON_THAT_WAITS = """#!/usr/bin/env bash
case "$*" in
    *"-m dpo check"*) echo runs/x ;;
    *socket.create_connection*) exec PYTHON "$@" ;;
    *) echo started ;;
esac
"""


def test_a_machine_0_that_does_not_answer_is_named(tmp_path: Path) -> None:
    python = script(tmp_path / "python", PYTHON_THAT_WAITS.replace("PYTHON", sys.executable))
    place = {"NNODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "127.0.0.1", "NPROC": "1", "MASTER_WAIT": "1"}
    with socket.create_server(("127.0.0.1", 0)) as machine:
        place |= {"MASTER_PORT": str(machine.getsockname()[1]), "PYTHON": str(python)}
        there = shell("launch/run", "train", "--config", "x.yaml", **place)
        assert "started" in there.stdout
    gone = shell("launch/run", "train", "--config", "x.yaml", **place)
    assert gone.returncode == 2
    assert "MASTER_ADDR: 127.0.0.1 does not answer at port" in gone.stderr
    assert len(gone.stderr.splitlines()) == 1
    assert "started" not in gone.stdout


def test_more_processes_than_gpus_are_refused(tmp_path: Path, checks: str) -> None:
    script(tmp_path / "nvidia-smi", "#!/usr/bin/env bash\necho GPU 0\necho GPU 1\n")
    path = f"{tmp_path}:{os.environ['PATH']}"
    words = ("launch/run", "train", "--config", "x.yaml")
    ended = shell(*words, PATH=path, NPROC="8", PYTHON=checks)
    assert ended.returncode == 2
    assert "NPROC: 8; this machine has 2 GPU(s)" in ended.stderr
    assert shell(*words, PATH=path, NPROC="2", DRY_RUN="1", PYTHON=checks).returncode == 0
    on_cpus = {"ACCELERATE_CONFIG": "launch/cpu.yaml", "NPROC": "8"}
    assert shell(*words, PATH=path, DRY_RUN="1", PYTHON=checks, **on_cpus).returncode == 0


HOSTFILE = "# ours\n10.0.0.1 slots=8\n\n10.0.0.2 slots=8\n"


def test_a_hostfile_becomes_a_command_a_machine(tmp_path: Path) -> None:
    (tmp_path / "hosts").write_text(HOSTFILE)
    ended = shell("launch/nodes", str(tmp_path / "hosts"), "train", "--config", "a b.yaml", DRY_RUN="1")
    assert ended.returncode == 0, ended.stderr
    first, second = ended.stdout.splitlines()
    assert first.startswith("ssh -tt 10.0.0.1 cd ")
    assert "env NNODES=2 NODE_RANK=1 NPROC=8 MASTER_ADDR=10.0.0.1" in second
    assert second.endswith("launch/run train --config a\\ b.yaml ")


@pytest.mark.parametrize(
    ("hosts", "problem"),
    [
        ("", "names no machine"),
        ("10.0.0.1\n", "expected a line such as 10.0.0.1 slots=8"),
        ("10.0.0.1 slots=8\n10.0.0.2 slots=4\n", "slots differ (8 4)"),
    ],
)
def test_a_wrong_hostfile_is_refused(tmp_path: Path, hosts: str, problem: str) -> None:
    (tmp_path / "hosts").write_text(hosts)
    ended = shell("launch/nodes", str(tmp_path / "hosts"), "train", "--config", "x.yaml")
    assert ended.returncode == 2
    assert problem in ended.stderr


@pytest.fixture
def cluster(tmp_path: Path) -> Path:
    """A SLURM of two machines: srun starts a task on each, one after the other, and scontrol writes down."""
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


@pytest.mark.parametrize(("status", "requeued"), [(0, False), (3, True), (1, False)])
def test_a_slurm_job_precomputes_trains_and_goes_back_into_the_queue(
    cluster: Path, status: int, requeued: bool
) -> None:
    script(
        cluster / "launch" / "run",
        "#!/usr/bin/env bash\n"
        'echo "$NODE_RANK of $NNODES, $NPROC each, at $MASTER_ADDR:$MASTER_PORT: $*" >>run.log\n'
        f"[ $1 = precompute-ref ] || exit {status}\n",
    )
    ended = shell(
        "bash",
        str(ROOT / "launch" / "slurm.sbatch"),
        "--config",
        "x.yaml",
        folder=cluster,
        PATH=f"{cluster / 'bin'}:{os.environ['PATH']}",
        SLURM_JOB_ID="41",
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
    ended = shell(
        "bash",
        str(ROOT / "launch" / "slurm.sbatch"),
        "--config",
        "x.yaml",
        folder=cluster,
        PATH=f"{cluster / 'bin'}:{os.environ['PATH']}",
        PYTHON=str(script(cluster / "python", instead)),
        SLURM_JOB_ID="41",
        SLURM_RESTART_COUNT="4",
    )
    assert ended.returncode == 3
    assert (cluster / "scontrol.log").is_file() == requeued
    assert ended.stderr.splitlines()[0] == "launch/slurm.sbatch: job 41, attempt 5"
    said = "3 attempts in a row gained no step; the last: SIGTERM before the first step"
    assert (said in ended.stderr) is not requeued


def test_a_stage_that_fails_is_not_followed_by_the_next(cluster: Path) -> None:
    script(cluster / "launch" / "run", '#!/usr/bin/env bash\necho "$1" >>run.log\nexit 2\n')
    path = f"{cluster / 'bin'}:{os.environ['PATH']}"
    ended = shell(
        "bash", str(ROOT / "launch" / "slurm.sbatch"), "--config", "x.yaml", folder=cluster, PATH=path
    )
    assert ended.returncode == 2
    assert set((cluster / "run.log").read_text().split()) == {"precompute-ref"}


def test_a_dry_run_of_the_job_prints_both_stages(tmp_path: Path) -> None:
    ended = shell("bash", "launch/slurm.sbatch", "--config", "x.yaml", DRY_RUN="1", MASTER_ADDR="n7")
    assert ended.returncode == 0, ended.stderr
    stages = [line.split()[-3] for line in ended.stdout.splitlines()]
    assert stages == ["precompute-ref", "train"]
