import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed.utils.config import get_timers_config
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from dpo.engine.deepspeed_config import (
    compile_for_host,
    offloads_optimizer,
    problems,
    read_settings,
    set_ours,
    without_waiting,
)
from dpo.engine.deepspeed_model import LARGEST_BUCKET, SMALLEST_BUCKET, fit_buckets
from dpo.errors import UserError

CONFIGS = Path(__file__).parents[3] / "configs"


def gpt2(width: int, layers: int) -> nn.Module:
    with torch.device("meta"):
        return GPT2LMHeadModel(GPT2Config(n_embd=width, n_layer=layers, n_head=width // 64))


def filled(name: str, model: nn.Module) -> dict[str, object]:
    settings = json.loads((CONFIGS / name).read_text())
    fit_buckets(settings, model)
    return dict(settings["zero_optimization"])


@pytest.mark.parametrize("name", ["ds_zero2.json", "ds_zero3.json", "ds_zero3_offload.json"])
def test_a_bucket_holds_a_block_and_nothing_is_left_open(name: str) -> None:
    zero = filled(name, gpt2(768, 12))
    assert "auto" not in zero.values()
    assert zero["reduce_bucket_size"] == 12 * 768 * 768 + 13 * 768  # matrices; biases and two norms


def test_norms_and_biases_stay_whole_and_matrices_do_not() -> None:
    threshold = filled("ds_zero3.json", gpt2(768, 12))["stage3_param_persistence_threshold"]
    assert isinstance(threshold, int)
    assert 4 * 768 <= threshold < 768 * 768


def test_a_tiny_model_has_no_tiny_buckets_and_a_huge_one_no_huge_ones() -> None:
    assert filled("ds_zero2.json", gpt2(64, 2))["reduce_bucket_size"] == SMALLEST_BUCKET
    assert filled("ds_zero2.json", nn.Linear(2, 2))["reduce_bucket_size"] == SMALLEST_BUCKET
    wide = LlamaConfig(hidden_size=8192, intermediate_size=28672, num_hidden_layers=1, num_attention_heads=64)
    with torch.device("meta"):
        llama = LlamaForCausalLM(wide)
    assert filled("ds_zero3.json", llama)["reduce_bucket_size"] == LARGEST_BUCKET


def test_a_size_that_somebody_chose_stays() -> None:
    settings = {"zero_optimization": {"stage": 2, "reduce_bucket_size": 7, "allgather_bucket_size": "auto"}}
    fit_buckets(settings, gpt2(64, 1))
    assert settings["zero_optimization"]["reduce_bucket_size"] == 7


@pytest.mark.parametrize(
    ("offload", "expected"),
    [(None, False), ({"device": "none"}, False), ({"device": "cpu"}, True), ({"device": "nvme"}, True)],
)
def test_an_offloaded_optimizer_is_recognized(offload: dict[str, str] | None, expected: bool) -> None:
    assert offloads_optimizer({"zero_optimization": {"stage": 3, "offload_optimizer": offload}}) is expected
    assert not offloads_optimizer({"zero_optimization": {"stage": 3}})


@pytest.mark.filterwarnings("ignore")  # torch's, on a compiler that it does not know
@pytest.mark.parametrize("offload", [None, {"device": "cpu"}])
def test_an_offloaded_optimizer_without_a_compiler_is_refused_in_one_line(
    offload: dict[str, str] | None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("CXX", "/none/c++")
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    said = pytest.raises(
        UserError, match=r"^offload_optimizer: .*/none/c\+\+: not found\): install g\+\+ .*$"
    )
    with said if offload else nullcontext():
        compile_for_host({"zero_optimization": {"stage": 3, "offload_optimizer": offload}})
    assert [*tmp_path.iterdir()] == ([tmp_path / "cpu_adam"] if offload else [])


@pytest.mark.parametrize("name", ["ds_zero2.json", "ds_zero3.json", "ds_zero3_offload.json"])
def test_our_configurations_have_no_problems(name: str) -> None:
    assert problems(read_settings(CONFIGS / name)) == []


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"train_batch_size": 64}, 'train_batch_size: 64; set "auto": train.pairs_per_step'),
        ({"gradient_clipping": 1.0}, "gradient_clipping: 1.0"),
        ({"optimizer": {"type": "Adam"}}, "optimizer"),
        ({"fp16": {"enabled": True}}, "fp16.enabled"),
        ({"bf16": {"enabled": True}}, "bf16.enabled"),
        ({"zero_optimization": 2}, "expected an object with a stage"),
        ({"zero_optimization": {"stage": 4}}, "zero_optimization.stage: 4"),
        ({"zero_optimization": {"stage": 2, "overlap_com": True}}, "zero_optimization.overlap_com: True"),
        ({"zero_optimization": {"stage": 2, "cpu_offload": True}}, "removed it; use offload_optimizer"),
        ({"zero_optimization": {"stage": 2, "offload_param": {"device": "cpu"}}}, "needs stage 3 or more"),
        ({"zero_optimization": {"stage": 0, "offload_optimizer": {"device": "cpu"}}}, "needs stage 1"),
        ({"zero_optimization": {"stage": 3, "offload_param": {"device": "disk"}}}, "offload_param.device"),
        ({"tensor_parallel": {"autotp_size": 2}}, "tensor_parallel"),
        ({"sequence_parallel_size": 2}, "sequence_parallel_size: 2"),
        ({"compile": {"deepcompile": True}}, "compile"),
        ({"torch_autocast": {"enabled": True, "dtype": "bfloat16"}}, "torch_autocast"),
        ({"prescale_gradients": True}, "prescale_gradients: True"),
        ({"gradient_predivide_factor": 2.0}, "gradient_predivide_factor: 2.0"),
        ({"gradient_allreduce_op": "sum"}, "gradient_allreduce_op: 'sum'"),
        ({"managed_gradient_accumulation": True}, "managed_gradient_accumulation"),
        ({"amp": {"enabled": False}}, "amp: DeepSpeed has removed it"),
        ({"grad_clipping": 1.0, "zero_optimisation": {"stage": 2}}, "zero_optimisation"),
        ({"communication_data_type": "bf16"}, "communication_data_type: 'bf16'; expected 'fp32'"),
        ({"data_types": {"grad_accum_dtype": "bf16"}}, "data_types.grad_accum_dtype: 'bf16'"),
        ({"data_types": {"param_dtype": "fp16"}}, "data_types.param_dtype: 'fp16'"),
        ({"bf16": {"enabled": "auto", "bf16_optimizer_states": True}}, "bf16.bf16_optimizer_states"),
        ({"zero_optimization": {"stage": 3, "zero_quantized_gradients": True}}, "zero_quantized_gradients"),
        ({"zero_optimization": {"stage": 2, "compute_grad_norm": False}}, "compute_grad_norm"),
        ({"bf16": {"enabled": "auto"}}, "zero_optimization: None; expected an object with a stage"),
    ],
)
def test_what_would_be_ignored_or_fail_late_is_said_at_once(
    settings: dict[str, object], said: str, tmp_path: Path
) -> None:
    file = tmp_path / "ds.json"
    file.write_text(json.dumps(settings))
    with pytest.raises(UserError) as refused:
        read_settings(file)
    assert said in str(refused.value)
    assert str(file) in str(refused.value)


def test_what_is_switched_off_is_no_problem() -> None:
    off = {
        "tensor_parallel": {"autotp_size": 1},
        "sequence_parallel_size": 1,
        "compile": {"deepcompile": False},
        "torch_autocast": {"enabled": False, "dtype": "bfloat16"},
        "prescale_gradients": False,
        "gradient_predivide_factor": 1.0,
        "fp16": {"enabled": False, "loss_scale": 0},
    }
    assert problems({**off, "zero_optimization": {"stage": 2}}) == []


def test_our_numbers_are_written_over_those_of_the_launcher() -> None:
    settings = {
        "train_batch_size": 64,
        "train_micro_batch_size_per_gpu": 8,
        "gradient_accumulation_steps": 4,
        "gradient_clipping": 7.0,
        "zero_optimization": {"stage": 2},
    }
    set_ours(settings, max_grad_norm=0.5, universal=True)
    assert settings == {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.5,
        "checkpoint": {"load_universal": True},
        "communication_data_type": "fp32",
        "data_types": {"grad_accum_dtype": "fp32"},
        "zero_optimization": {"stage": 2},
    }


def test_zero3_gathers_its_weights_for_the_model_whatever_the_file_says() -> None:
    for stage, said in ((3, {}), (3, {"stage3_gather_16bit_weights_on_model_save": False}), (2, {})):
        settings: dict[str, Any] = {"zero_optimization": {"stage": stage, **said}}
        set_ours(settings, max_grad_norm=1.0, universal=False)
        found = settings["zero_optimization"].get("stage3_gather_16bit_weights_on_model_save")
        assert found is (True if stage == 3 else None)


def test_all_problems_are_listed() -> None:
    settings = {"train_batch_size": 8, "fp16": {"enabled": True}, "zero_optimization": {"stage": 9}}
    assert len(problems(settings)) == 3


@pytest.mark.parametrize("content", ["{", "[]", "\xff"])
def test_what_is_no_configuration_is_refused(content: str, tmp_path: Path) -> None:
    file = tmp_path / "ds.json"
    file.write_bytes(content.encode("latin-1"))
    with pytest.raises(UserError, match="not a DeepSpeed configuration"):
        read_settings(file)
    with pytest.raises(UserError, match="not a DeepSpeed configuration"):
        read_settings(tmp_path / "none.json")


def test_the_throughput_timer_is_off_unless_a_users_file_sets_it() -> None:
    settings: dict[str, object] = {"zero_optimization": {"stage": 2}}
    without_waiting(settings)
    assert not get_timers_config(settings).enabled
    chosen = {"timers": {"throughput": {"enabled": True}}}
    without_waiting(chosen)
    assert get_timers_config(chosen).enabled
