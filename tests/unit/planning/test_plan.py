"""`dpo plan` from the command line: real configurations, small models, notes and wrong usage."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import save_file
from unit.planning.conftest import Planned

from dpo.cli.main import run
from dpo.planning.fit import LAUNCHERS, MOST_TOKENS

ROOT = Path(__file__).parents[3]
LLAMA = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "rms_norm_eps": 1e-5}
LLAMA |= {"vocab_size": 128256, "max_position_embeddings": 131072, "num_key_value_heads": 8}
LLAMA_70B = {
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_attention_heads": 64,
    "num_hidden_layers": 80,
}
LLAMA_8B = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
}
NEOX = {"model_type": "gpt_neox", "hidden_size": 2560, "intermediate_size": 10240, "num_attention_heads": 32}
QWEN = {"model_type": "qwen3", "hidden_size": 4096, "intermediate_size": 12288, "num_attention_heads": 32}
MODELS: dict[str, tuple[dict[str, Any], float]] = {
    "sentiment_gpt2": ({"model_type": "gpt2"}, 124e6),
    "sentiment_gpt2_medium": ({"model_type": "gpt2", "n_embd": 1024, "n_layer": 24, "n_head": 16}, 355e6),
    "sentiment_gpt2_large": ({"model_type": "gpt2", "n_embd": 1280, "n_layer": 36, "n_head": 20}, 774e6),
    "sentiment_gpt2_xl": ({"model_type": "gpt2", "n_embd": 1600, "n_layer": 48, "n_head": 25}, 1558e6),
    "hh_pythia_2.8b": (
        {**NEOX, "num_hidden_layers": 32, "vocab_size": 50304, "max_position_embeddings": 2048,
         "tie_word_embeddings": False},
        2775e6,
    ),
    "hh_llama_3.1_8b": ({**LLAMA, **LLAMA_8B, "tie_word_embeddings": False}, 8030e6),
    "hh_qwen_3_8b": (
        {**QWEN, "num_hidden_layers": 36, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936,
         "max_position_embeddings": 40960, "tie_word_embeddings": False},
        8191e6,
    ),
    "hh_llama_3.1_70b": ({**LLAMA, **LLAMA_70B, "tie_word_embeddings": False}, 70554e6),
}  # fmt: skip
"""Name in configs/ -> the model's config.json and its published size."""


@pytest.mark.parametrize("name", MODELS)
def test_every_configuration_of_a_published_model_can_be_planned(
    plan: Planned, described: Callable[..., Path], name: str
) -> None:
    config, size = MODELS[name]
    file = ROOT / "configs" / f"{name}.yaml"
    assert yaml.safe_load(file.read_text())["model"]["name_or_path"]
    found = plan(described(name, **config), "--config", str(file), gpus=64 if "70b" in name else 8)
    assert found["model"]["parameters"] == pytest.approx(size, rel=0.01)
    assert found["advice"]["sharding"] is not None


def test_a_70b_model_is_planned_in_seconds_without_weights(
    plan: Planned, described: Callable[..., Path], long_steps: tuple[str, ...]
) -> None:
    began = time.process_time()
    found = plan(described("big", **LLAMA, **LLAMA_70B), gpus=64, data=long_steps)
    assert time.process_time() - began < 60
    assert found["memory"]["ZeRO-2"]["largest_micro_batch"] == 0
    assert found["advice"]["sharding"] == "ZeRO-3"
    assert found["advice"]["gradient_checkpointing"]
    assert found["advice"]["launcher"] == "launch/multi_node_zero3.yaml"
    assert "the weights are not on this machine" in found["notes"][0]


def test_counts_of_a_small_run(plan: Planned, tiny_model: Path) -> None:
    found = plan(tiny_model, "--train.pairs_per_step", "10", "--train.num_epochs", "2", gpus=2)
    assert found["data"]["train"]["pairs"] == 37
    assert found["data"]["train"]["exact"]
    assert found["steps"] == 2 * 4
    assert found["reference"]["misses"] == 2 * 37
    assert [note.split(":")[0] for note in found["notes"]] == ["launch-bound"]
    assert 0 <= found["rank_excess"] < 0.2
    assert found["step_flops"] > 0
    assert set(found["memory"]) == {"ZeRO-2", "ZeRO-3", "ZeRO-3 offload"}
    assert "no DeepSpeed" in plan(tiny_model, gpus=1)["memory"]
    for way in found["memory"].values():
        parts = ("weights", "gradients", "optimizer", "activations", "projection", "buckets")
        assert way["total"] == sum(way[part] for part in parts)
    assert plan(tiny_model, "--exact", gpus=2)["data"] == found["data"]


def test_the_share_of_the_peak_is_that_of_the_models_size_unless_given(
    plan: Planned, described: Callable[..., Path]
) -> None:
    small, large = described("gpt2", model_type="gpt2"), described("llama", **LLAMA, **LLAMA_8B)
    assert plan(small)["machine"]["mfu"] == pytest.approx(0.19, abs=0.005)
    assert plan(large)["machine"]["mfu"] == pytest.approx(0.33, abs=0.005)
    assert plan(large, "--mfu", "0.5")["machine"]["mfu"] == 0.5


def test_micro_batches_that_make_nothing_faster_are_not_advised(plan: Planned, tiny_model: Path) -> None:
    found = plan(tiny_model, "--train.max_tokens_per_micro_batch", "600000", gpus=2)
    assert found["memory"]["ZeRO-2"]["largest_micro_batch"] <= MOST_TOKENS


def test_float32_offers_stage_0_and_rmsprop_does_not_offer_offload(plan: Planned, tiny_model: Path) -> None:
    options = ("--model.dtype", "float32", "--train.optimizer", "rmsprop")
    found = plan(tiny_model, *options, gpus=2)
    assert set(found["memory"]) == {"ZeRO-0", "ZeRO-2", "ZeRO-3"}


def test_the_optimizers_memory_is_planned(plan: Planned, tiny_model: Path) -> None:
    kept = {}
    for name in ("adamw", "rmsprop", "lion", "adafactor", "muon"):
        found = plan(tiny_model, "--model.dtype", "float32", "--train.optimizer", name, gpus=1)
        kept[name] = found["memory"]["no DeepSpeed"]["optimizer"]
    size = found["model"]["parameters"]
    assert (kept["adamw"], kept["rmsprop"], kept["lion"]) == (8 * size, 4 * size, 4 * size)
    assert 0 < kept["adafactor"] < kept["lion"] < kept["muon"] < kept["adamw"]
    several = plan(tiny_model, "--model.dtype", "bfloat16", "--train.optimizer", "muon", gpus=2)
    assert set(several["memory"]) == {"no DeepSpeed"}
    assert "muon orthogonalizes the updates of whole matrices" in several["notes"][0]


def test_a_cached_gradient_is_advised_where_no_group_fits(
    plan: Planned, described: Callable[..., Path], write_jsonl: Callable[..., str]
) -> None:
    row = {"prompt": "a " * 50, "completions": [f"{n} " * 500 for n in range(16)], "scores": [*range(16)]}
    small = {"n_embd": 256, "n_layer": 24, "n_head": 4, "vocab_size": 4096, "n_positions": 2048}
    model, options = described("gpt2", model_type="gpt2", **small), ("--model.gradient_checkpointing", "true")
    options += ("--data.train", write_jsonl([row] * 4), "--data.max_length", "2048")
    options += ("--train.pairs_per_step", "60", "--train.optimizer", "lion")  # which is not offloaded
    roomy = plan(model, *options, gpus=1, memory="80GB")
    assert not roomy["advice"]["cached"]
    tight = plan(model, *options, gpus=1, memory="0.8GB")
    assert tight["advice"]["cached"]
    assert tight["advice"]["sharding"] is not None
    assert tight["max_tokens_per_micro_batch"] < tight["data"]["train"]["longest"]
    assert tight["micro_batches"] > 4  # the four groups are cut
    direct = plan(model, *options, "--train.backward", "direct", gpus=1, memory="0.8GB")
    assert direct["advice"]["sharding"] is None
    cached = plan(model, *options, "--train.backward", "cached", gpus=1, memory="80GB")
    assert cached["advice"]["cached"]
    assert cached["step_flops"] > roomy["step_flops"]
    sorting = plan(model, *options, "--loss.type", "aot", gpus=1, memory="80GB")
    assert sorting["advice"] == cached["advice"]


def test_a_full_cache_needs_no_reference_work(
    plan: Planned, tiny_model: Path, tmp_path: Path, pairs_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--model.name_or_path", str(tiny_model), "--data.train", str(pairs_file)]
    options += ["--data.cache_dir", str(tmp_path / "tokenized"), "--run_dir", str(tmp_path / "run")]
    assert run(["precompute-ref", *options, "--reference.cache_dir", str(tmp_path / "reference")]) == 0
    capsys.readouterr()
    found = plan(tiny_model)["reference"]
    assert (found["hits"], found["misses"], found["hours"]) == (74, 0, 0)


def test_less_memory_changes_micro_batches_sharding_and_recomputation(
    plan: Planned, described: Callable[..., Path], long_steps: tuple[str, ...]
) -> None:
    model = described("llama", **LLAMA, **LLAMA_8B)
    sizes = ("200GB", "80GB", "24GB", "8GB")
    advice = [plan(model, memory=memory, data=long_steps)["advice"] for memory in sizes]
    found = [(each["sharding"], each["gradient_checkpointing"]) for each in advice]
    assert found[0] == ("ZeRO-2", False)
    budgets = [each["max_tokens_per_micro_batch"] for each in advice]
    assert budgets[0] == 16384
    assert advice[1]["max_tokens_per_micro_batch"] < 16384
    assert found[2] == ("ZeRO-3 offload", "selective")
    assert found[3] in [(None, "full"), ("ZeRO-3 offload", "full")]
    assert "would need" in advice[2]["reason"]


def test_an_8b_model_in_4_bits_is_trained_on_one_card_of_24_gb(
    plan: Planned, described: Callable[..., Path], long_steps: tuple[str, ...]
) -> None:
    model, lora = described("llama", **LLAMA, **LLAMA_8B), ("--model.lora.rank", "16")
    whole, packed, in_8_bits = (
        plan(model, *lora, *more, gpus=1, memory="24GB", data=long_steps)
        for more in ((), ("--model.quantization", "nf4"), ("--model.quantization", "int8"))
    )
    assert set(packed["memory"]) == {"no DeepSpeed", "ZeRO-2"}
    weights = [each["memory"]["no DeepSpeed"]["weights"] for each in (whole, packed)]
    in_blocks = 32 * (4096 * (2 * 4096 + 2 * 1024) + 3 * 4096 * 14336)
    assert weights[0] - weights[1] == pytest.approx(in_blocks * (2 - 0.516), rel=1e-3)
    of_8_bits = in_8_bits["memory"]["no DeepSpeed"]["weights"]
    assert weights[0] - of_8_bits == pytest.approx(in_blocks * (2 - 1), rel=2e-3)  # but 4 bytes a row
    assert weights[1] < 5.9e9  # of which the two vocabulary matrices take 2.1e9, and the adapter 0.2e9
    assert packed["advice"]["sharding"] == "no DeepSpeed"
    assert packed["advice"]["max_tokens_per_micro_batch"] >= 4096
    assert packed["memory"]["no DeepSpeed"]["largest_micro_batch"] >= 4096


def test_activations_are_those_of_the_steps_that_the_data_makes(
    plan: Planned, tiny_model: Path, long_steps: tuple[str, ...]
) -> None:
    few = plan(tiny_model, gpus=1)  # 37 short pairs: less than a micro-batch of 16,384 tokens
    assert few["advice"]["max_tokens_per_micro_batch"] < 2000
    many = plan(tiny_model, "--data.max_length", "64", gpus=1, data=long_steps)
    assert many["advice"]["max_tokens_per_micro_batch"] == 16384
    sharding = few["advice"]["sharding"]
    assert few["memory"][sharding]["activations"] < many["memory"][sharding]["activations"] / 4


def test_if_nothing_fits_the_advice_says_so(plan: Planned, described: Callable[..., Path]) -> None:
    found = plan(described("big", **LLAMA, **LLAMA_70B), gpus=1, memory="2GB")
    assert found["advice"]["sharding"] is None
    assert "nothing fits" in found["advice"]["reason"]


def test_an_incomplete_download_is_noted(plan: Planned, tiny_model: Path, tmp_path: Path) -> None:
    import torch

    folder = tmp_path / "half"
    folder.mkdir()
    for file in tiny_model.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    save_file({"transformer.wte.weight": torch.zeros(3, 3)}, folder / "model.safetensors")
    assert "hold 9 parameters" in plan(folder)["notes"][0]


def test_every_launcher_that_may_be_advised_exists() -> None:
    for name in LAUNCHERS.values():
        for place in ("one_node", "multi_node"):
            for word in name.format(place=place).split(" with "):
                assert (ROOT / word).is_file(), word


def test_more_gpus_than_pairs_is_noted(plan: Planned, tiny_model: Path) -> None:
    notes = plan(tiny_model, "--train.pairs_per_step", "4", gpus=8)["notes"]
    assert "train.pairs_per_step is 4" in notes[0]


def test_the_page_fits_the_terminal(
    tiny_model: Path, pairs_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--model.name_or_path", str(tiny_model), "--data.train", str(pairs_file)]
    options += ["--data.cache_dir", str(tmp_path), "--reference.cache_dir", str(tmp_path)]
    assert run(["plan", "--num_gpus", "2", "--gpu_memory", "24GiB", *options]) == 0
    page = capsys.readouterr().out
    for word in ("parameters", "steps", "ZeRO-3 offload", "micro-batch", "advice", "TFLOP", "disk"):
        assert word in page
    assert max(map(len, page.splitlines())) <= 110


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "--num_gpus"),
        (["--num_gpus", "2", "--gpu_memory", "much"], "--gpu_memory: much"),
        (["--num_gpus", "2", "--gpu_memory", "80GB", "--mfu", "40"], "--mfu: 40.0"),
        (["--num_gpus", "two"], "num_gpus"),
        (["--num_gpus", "2", "--gpu_memory", "80GB", "--trian.seed", "1"], "train.seed"),
    ],
)
def test_wrong_usage_names_the_option(
    capsys: pytest.CaptureFixture[str], arguments: list[str], said: str
) -> None:
    assert run(["plan", "--model.name_or_path", "x", "--data.train", "y", *arguments]) == 2
    assert said in capsys.readouterr().err


def test_a_model_that_does_not_exist_is_an_error(
    capsys: pytest.CaptureFixture[str], pairs_file: Path
) -> None:
    options = ["--num_gpus", "1", "--gpu_memory", "80GB", "--data.train", str(pairs_file)]
    assert run(["plan", *options, "--model.name_or_path", "./nowhere"]) == 2
    assert "model.name_or_path: ./nowhere" in capsys.readouterr().err
