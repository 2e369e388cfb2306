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
from end_to_end.shells import PYTHON_THAT_CHECKS, ROOT, script, shell

from dpo.cli.table import COMMANDS

FILES = [path for path in (ROOT / "launch").iterdir() if path.is_file()]
SCRIPTS = sorted(path for path in FILES if path.read_text().startswith("#!"))


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
    without_deepspeed = {"one_process.yaml": "NO", "one_node_ddp.yaml": "MULTI_GPU"}
    without_deepspeed["multi_node_ddp.yaml"] = "MULTI_GPU"
    assert launcher["distributed_type"] == without_deepspeed.get(path.name, "DEEPSPEED")
    if path.name in without_deepspeed:
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
        (
            {"ACCELERATE_CONFIG": "launch/multi_node.yaml"},
            "NNODES is missing; launch/multi_node.yaml is for 2",
        ),
        ({"ACCELERATE_CONFIG": "launch/multi_node.yaml", "NNODES": "1"}, "NPROC is missing"),
        ({"PYTHON": "nothing"}, "PYTHON: nothing is not the environment of make setup"),
    ],
)
def test_an_invalid_variable_is_named(checks: str, variables: dict[str, str], problem: str) -> None:
    ended = shell("launch/run", "train", "--config", "x.yaml", **({"PYTHON": checks} | variables))
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


def test_one_machine_does_not_wait_for_the_machines_of_its_launch_configuration(checks: str) -> None:
    one = {"NNODES": "1", "NPROC": "8", "ACCELERATE_CONFIG": "launch/multi_node.yaml"}
    ended = shell("launch/run", "train", "--config", "x.yaml", DRY_RUN="1", PYTHON=checks, **one)
    assert ended.returncode == 0, ended.stderr
    assert "--num_machines 1 --machine_rank 0 --num_processes 8 --main_process_port 0 " in ended.stdout


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
    *supervise.py*) echo started ;;
esac
"""


PYTHON_THAT_FAILS = """#!/usr/bin/env bash
case "$*" in
    *"-m dpo check"*) mkdir -p RUN_DIR && echo RUN_DIR ;;
    *supervise.py*)
        echo '{"status": 2, "message": "the cache lacks rows; run: make precompute-ref"}' >RUN_DIR/exit.json
        exit 1
        ;;
    *) exec PYTHON "$@" ;;
esac
"""


def test_the_status_is_the_stages_own_and_its_reason_is_the_last_line(tmp_path: Path) -> None:
    """The launcher turns a stage's status 2 into 1."""
    code = PYTHON_THAT_FAILS.replace("RUN_DIR", str(tmp_path / "run")).replace("PYTHON", sys.executable)
    python = script(tmp_path / "python", code)
    ended = shell("launch/run", "train", "--config", "x.yaml", PYTHON=str(python), NPROC="2")
    assert ended.returncode == 2
    assert ended.stderr.splitlines()[-1] == (
        "dpo train: stopped with status 2: the cache lacks rows; run: make precompute-ref"
    )


LAUNCHER = """
import logging, subprocess, sys, threading
logging.basicConfig()
logging.error("launcher %s", sys.argv[1:])
subprocess.run([sys.executable, "-c", "import sys; print('rank', file=sys.stderr)"])
tail = threading.Thread(target=lambda: print("tee", file=sys.stderr))
tail.start(); tail.join()
raise RuntimeError("forty lines")
"""


def test_what_the_launcher_says_itself_goes_to_a_file(tmp_path: Path) -> None:
    """Its ranks, and the threads that pass on what they write, keep the terminal."""
    (tmp_path / "launcher.py").write_text(LAUNCHER)
    words = [str(ROOT / "launch" / "quietly.py"), "log", "launcher", "--option", "x"]
    ended = shell(sys.executable, *words, folder=tmp_path)
    assert ended.returncode == 1
    assert ended.stderr == "rank\ntee\n"
    log = (tmp_path / "log").read_text()
    assert "launcher ['--option', 'x']" in log
    assert log.rstrip().endswith("RuntimeError: forty lines")


@pytest.mark.parametrize("recorded", [True, False])
def test_the_last_line_names_the_launchers_log_and_an_unexplained_end_shows_it(
    tmp_path: Path, recorded: bool
) -> None:
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    record = f"""echo '{{"status": 3, "message": "saved"}}' >{run_dir}/exit.json""" if recorded else ":"
    code = f"""#!/usr/bin/env bash
case "$*" in
    *"-m dpo check"*) echo {run_dir} ;;
    *supervise.py*) echo Traceback >"$5"; {record}; exit 1 ;;
    *) exec {sys.executable} "$@" ;;
esac
"""
    python = script(tmp_path / "python", code)
    ended = shell("launch/run", "train", "--config", "x.yaml", PYTHON=str(python), NPROC="2")
    lines = ended.stderr.splitlines()
    assert (run_dir / "launcher.log").read_text() == "Traceback\n"
    if recorded:
        log = f"(the launcher's own words: {run_dir}/launcher.log)"
        assert lines == [f"dpo train: stopped with status 3: saved {log}"]
    else:
        assert lines[0] == "Traceback"
        assert "no rank recorded a reason" in lines[1]


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


def test_a_hostfile_becomes_one_command_per_machine(tmp_path: Path, checks: str) -> None:
    (tmp_path / "hosts").write_text(HOSTFILE)
    words = ("launch/nodes", str(tmp_path / "hosts"), "train", "--config", "a b.yaml")
    ended = shell(*words, DRY_RUN="1", PYTHON=checks)
    assert ended.returncode == 0, ended.stderr
    first, first_inner, second, second_inner = ended.stdout.splitlines()
    assert first.startswith("ssh -tt 10.0.0.1 cd ")
    assert "env NNODES=2 NODE_RANK=1 NPROC=8 MASTER_ADDR=10.0.0.1" in second
    assert second.endswith("launch/run train --config a\\ b.yaml ")
    for node, line in enumerate((first_inner, second_inner)):
        assert f"on machine {node}, if it has GPUs: {checks} -m accelerate" in line
        assert f"--num_machines 2 --machine_rank {node} " in line


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


def targets() -> set[str]:
    lines = (ROOT / "Makefile").read_text().splitlines()
    named = {
        line.partition(":")[0] for line in lines if line[:1].islower() and ":" in line and ":=" not in line
    }
    return {name for name in named if " " not in name}


def test_make_help_lists_every_target_in_80_columns() -> None:
    ended = shell("make", "-s", "help")
    assert ended.returncode == 0, ended.stderr
    lines = ended.stdout.splitlines()
    assert {line.split()[0] for line in lines if line[2] != " "} == targets()
    assert max(map(len, lines)) <= 80


@pytest.mark.parametrize("command", [name for name in COMMANDS if name not in ("evaluate", "data", "init")])
def test_every_command_is_a_target(command: str) -> None:
    assert command in targets()
