"""Starts the scripts of launch/, and writes others in their place."""

import os
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[2]
PYTHON_THAT_CHECKS = """#!/usr/bin/env bash
case "$*" in *"-m dpo check"*) echo runs/x ;; esac
"""
"""Replaces the interpreter: `dpo check` succeeds, and everything else does nothing."""


def shell(*command: str, folder: Path = ROOT, **variables: str) -> subprocess.CompletedProcess[str]:
    names = ("NNODES", "NODE_RANK", "NPROC", "MASTER_ADDR", "MASTER_PORT", "ACCELERATE_CONFIG", "PYTHON")
    names += ("CUDA_VISIBLE_DEVICES", "CONTAINER", "SRUN_OPTIONS", "DRY_RUN")
    environment = {name: value for name, value in os.environ.items() if name not in names} | variables
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


def script(path: Path, content: str) -> Path:
    path.write_text(content)
    path.chmod(0o755)
    return path
