"""The scripts of launch/: the commands they would start, and their errors for invalid variables.

These tests start only shells; tests/distributed and tests/faults start real ranks.
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
"""Replaces the interpreter: `dpo check` succeeds, and everything else does nothing."""


def shell(*command: str, folder: Path = ROOT, **variables: str) -> subprocess.CompletedProcess[str]:
    names = ("NNODES", "NODE_RANK", "NPROC", "MASTER_ADDR", "MASTER_PORT", "ACCELERATE_CONFIG", "PYTHON")
    names += ("CUDA_VISIBLE_DEVICES",)
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
def test_a_launch_configuration_sets_no_number_of_the_experiment(path: Path) -> None:
    launcher = yaml.safe_load(path.read_text())
    assert (launcher["distributed_type"] == "NO") == (path.name == "one_process.yaml")
    if launcher["distributed_type"] == "NO":
        assert "deepspeed_config" not in launcher
        return
    engine = launcher["deepspeed_config"]
    settings = json.loads((ROOT / engine["deepspeed_config_file"]).read_text())
    assert engine["zero3_init_flag"] == (settings["zero_optimization"]["stage"] == 3)
    for name in ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping"):
        assert settings[name] == "auto"
    assert "optimizer" not in settings
    assert settings["data_types"]["grad_accum_dtype"] == settings["communication_data_type"] == "fp32"


@pytest.mark.parametrize(
    ("variables", "problem"),
    [
        ({"NNODES": "2"}, "MASTER_ADDR is missing"),
        ({"NNODES": "2", "MASTER_ADDR": "a"}, "NODE_RANK is missing"),
        (
            {"NNODES": "2", "MASTER_ADDR": "a", "NODE_RANK": "2", "NPROC": "1"},
            "NODE_RANK: 2;",
        ),
        ({"NNODES": "two"}, "NNODES: two;"),
        ({"NPROC": "-1"}, "NPROC: -1;"),
    ],
)
def test_an_invalid_variable_is_named(variables: dict[str, str], problem: str) -> None:
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


def test_num_processes_counts_all_machines(checks: str) -> None:
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


def test_an_unreachable_machine_0_is_named(tmp_path: Path) -> None:
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


PYTHON_THAT_COUNTS = """#!/usr/bin/env bash
case "$*" in
    *"-m dpo check"*) echo runs/x ;;
    *device_count*) echo "${SEEN:-0}" ;;
esac
"""
MIG = (
    "GPU 0: A100 (UUID: GPU-1)\n  MIG 3g.20gb Device 0: (UUID: MIG-1)\n  MIG 3g.20gb Device 1: (UUID: MIG-2)"
)


def on_gpus(folder: Path, listed: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """A dry run of training where nvidia-smi lists GPUs and torch sees `SEEN` of them."""
    script(folder / "nvidia-smi", f"#!/usr/bin/env bash\necho '{listed}'\n")
    python = script(folder / "python", PYTHON_THAT_COUNTS)
    path = f"{folder}:{os.environ['PATH']}"
    words = ("launch/run", "train", "--config", "x.yaml")
    return shell(*words, PATH=path, PYTHON=str(python), DRY_RUN="1", **variables)


@pytest.mark.parametrize(
    ("listed", "seen", "expected"),
    [
        ("GPU 0\nGPU 1\nGPU 2", "3", "launch/one_node.yaml --num_processes 3 "),
        ("GPU 0\nGPU 1\nGPU 2", "2", "launch/one_node.yaml --num_processes 2 "),  # CUDA_VISIBLE_DEVICES=0,2
        (MIG, "1", "launch/one_gpu.yaml "),  # CUDA shows one instance to a process
    ],
)
def test_ranks_are_counted_by_the_gpus_that_torch_sees(
    tmp_path: Path, listed: str, seen: str, expected: str
) -> None:
    ended = on_gpus(tmp_path, listed, SEEN=seen)
    assert ended.returncode == 0, ended.stderr
    assert expected in ended.stdout


def test_a_torch_that_sees_no_gpu_is_refused_unless_the_cpu_is_asked_for(tmp_path: Path) -> None:
    refused = on_gpus(tmp_path, "GPU 0", SEEN="0")
    assert refused.returncode == 2
    assert "torch sees none" in refused.stderr
    assert len(refused.stderr.splitlines()) == 1
    for wanted in ({"CUDA_VISIBLE_DEVICES": ""}, {"ACCELERATE_CONFIG": "launch/cpu.yaml"}):
        ended = on_gpus(tmp_path, "GPU 0", SEEN="0", **wanted)
        assert ended.returncode == 0, ended.stderr
        assert "launch/cpu.yaml" in ended.stdout


def test_without_deepspeed_the_stage_is_started_directly(checks: str) -> None:
    words, plain = ("launch/run", "train", "--config", "x.yaml"), "launch/one_process.yaml"
    ended = shell(*words, DRY_RUN="1", PYTHON=checks, ACCELERATE_CONFIG=plain)
    assert ended.stdout.split() == [checks, *["-m", "dpo", "train", "--config", "x.yaml"]]
    refused = shell(*words, DRY_RUN="1", PYTHON=checks, ACCELERATE_CONFIG=plain, NPROC="2")
    assert refused.returncode == 2
    assert "NPROC: 2" in refused.stderr


def test_more_processes_than_gpus_are_refused(tmp_path: Path) -> None:
    checks = str(script(tmp_path / "python", PYTHON_THAT_COUNTS.replace("${SEEN:-0}", "2")))
    script(tmp_path / "nvidia-smi", "#!/usr/bin/env bash\necho GPU 0\necho GPU 1\n")
    path = f"{tmp_path}:{os.environ['PATH']}"
    words = ("launch/run", "train", "--config", "x.yaml")
    ended = shell(*words, PATH=path, NPROC="8", PYTHON=checks)
    assert ended.returncode == 2
    assert "NPROC: 8;" in ended.stderr
    assert shell(*words, PATH=path, NPROC="2", DRY_RUN="1", PYTHON=checks).returncode == 0
    on_cpus = {"ACCELERATE_CONFIG": "launch/cpu.yaml", "NPROC": "8"}
    assert shell(*words, PATH=path, DRY_RUN="1", PYTHON=checks, **on_cpus).returncode == 0


HOSTFILE = "# a comment\n10.0.0.1 slots=8\n\n10.0.0.2 slots=8\n"


def test_a_hostfile_becomes_one_command_per_machine(tmp_path: Path) -> None:
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
def test_an_invalid_hostfile_is_refused(tmp_path: Path, hosts: str, problem: str) -> None:
    (tmp_path / "hosts").write_text(hosts)
    ended = shell("launch/nodes", str(tmp_path / "hosts"), "train", "--config", "x.yaml")
    assert ended.returncode == 2
    assert problem in ended.stderr


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


@pytest.mark.parametrize(("status", "requeued"), [(0, False), (3, True), (1, False)])
def test_a_slurm_job_precomputes_trains_and_is_requeued(cluster: Path, status: int, requeued: bool) -> None:
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


def test_a_failed_stage_ends_the_job(cluster: Path) -> None:
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
