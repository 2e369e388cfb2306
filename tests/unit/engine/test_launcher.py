"""What the launcher says of the arithmetic: overridden and named, or refused in one line."""

from pathlib import Path

import pytest
import yaml

from dpo.config import ModelConfig
from dpo.engine.launcher import check_launcher, deepspeed_settings, overridden, variables_of
from dpo.errors import UserError

LAUNCH = Path(__file__).parents[3] / "launch"
INLINE = {
    "distributed_type": "DEEPSPEED",
    "mixed_precision": "bf16",
    "deepspeed_config": {
        "gradient_accumulation_steps": 4,
        "gradient_clipping": 1.0,
        "offload_optimizer_device": "none",
        "offload_param_device": "none",
        "zero3_init_flag": False,
        "zero_stage": 2,
    },
    "num_processes": 2,
}
"""What `accelerate config` writes."""


def written(tmp_path: Path, **changed: object) -> Path:
    file = tmp_path / "accelerate.yaml"
    file.write_text(yaml.safe_dump({**INLINE, **changed}))
    return file


@pytest.mark.parametrize("path", sorted(LAUNCH.glob("*.yaml")), ids=lambda path: path.name)
def test_our_files_are_in_order_and_override_nothing(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(LAUNCH.parent)
    check_launcher({}, file=path)
    assert overridden(variables_of(path), ModelConfig(name_or_path="x")) == []


def test_inline_numbers_are_named_as_not_used(tmp_path: Path) -> None:
    file = written(tmp_path)
    check_launcher({}, file=file)
    said = overridden(variables_of(file), ModelConfig(name_or_path="x", dtype="float32"))
    assert [line.partition(":")[0] for line in said] == [
        "the launcher's mixed_precision",
        "the launcher's gradient_accumulation_steps",
        "the launcher's gradient_clipping",
    ]


def test_what_shards_is_known_before_the_launcher_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(LAUNCH.parent)
    stages = {}
    for path in LAUNCH.glob("*.yaml"):
        settings = deepspeed_settings({}, file=path)
        stages[path.name] = settings and settings["zero_optimization"]["stage"]
    several = {
        f"{place}{end}.yaml": stage
        for place in ("one_node", "multi_node")
        for end, stage in (("", 2), ("_zero3", 3), ("_ddp", None))
    }
    assert stages == {"cpu.yaml": 2, "one_gpu.yaml": 2, "one_process.yaml": None, **several}
    inline = deepspeed_settings({}, file=written(tmp_path))
    assert inline is not None
    assert inline["zero_optimization"]["stage"] == 2
    assert deepspeed_settings({}) is None


@pytest.mark.parametrize(
    ("changed", "key"),
    [
        ({"distributed_type": "FSDP"}, "distributed_type: FSDP"),
        ({"distributed_type": "MEGATRON_LM"}, "distributed_type: MEGATRON_LM"),
        ({"distributed_type": "MULTI_CPU"}, "distributed_type: MULTI_CPU"),
        ({"parallelism_config": {"parallelism_config_tp_size": 2}}, "parallelism_config"),
        ({"mixed_precision": "fp16"}, "mixed_precision: fp16"),
        ({"mixed_precision": "fp8"}, "mixed_precision: fp8"),
        ({"fp8_config": {"backend": "MSAMP"}}, "fp8_backend: MSAMP"),
        ({"dynamo_config": {"dynamo_backend": "INDUCTOR"}}, "dynamo_backend: INDUCTOR"),
        ({"deepspeed_config": {"zero_stage": 4}}, "zero_optimization.stage: 4"),
        ({"deepspeed_config": {"zero_stage": 2, "offload_param_device": "cpu"}}, "offload_param"),
        ({"deepspeed_config": {"deepspeed_config_file": "none.json"}}, "none.json"),
    ],
)
def test_what_would_train_something_else_is_refused(
    changed: dict[str, object], key: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError) as refused:
        check_launcher({}, file=written(tmp_path, **changed))
    assert key in str(refused.value)
    assert len(str(refused.value).splitlines()) <= 2


@pytest.mark.parametrize(
    "environment",
    [
        {"ACCELERATE_USE_FSDP": "true", "WORLD_SIZE": "2"},
        {"ACCELERATE_MIXED_PRECISION": "fp16"},
        {"ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"},
        {"ACCELERATE_FP8_BACKEND": "TE"},
        {"ACCELERATE_USE_CPU": "True", "MASTER_PORT": "29500"},  # MULTI_CPU: one process was started
        {"ACCELERATE_USE_CPU": "true", "ACCELERATE_USE_DEEPSPEED": "true", "WORLD_SIZE": "2"},  # exported
    ],
)
def test_a_rank_refuses_what_the_command_line_said(environment: dict[str, str]) -> None:
    with pytest.raises(UserError):
        check_launcher(environment)


def test_what_the_launcher_always_sets_is_no_problem() -> None:
    check_launcher(
        {
            "ACCELERATE_MIXED_PRECISION": "no",
            "ACCELERATE_DYNAMO_BACKEND": "NO",
            "ACCELERATE_DYNAMO_MODE": "default",
            "ACCELERATE_USE_CPU": "False",
            "ACCELERATE_USE_DEEPSPEED": "true",
            "MASTER_PORT": "29500",
            "WORLD_SIZE": "2",
        }
    )


@pytest.mark.parametrize("content", ["[1", "a list", "\x00"])
def test_a_file_that_is_none_of_accelerates_is_named(content: str, tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_text(content)
    for file in (tmp_path / "x.yaml", tmp_path / "missing.yaml"):
        with pytest.raises(UserError, match=file.name):
            variables_of(file)
