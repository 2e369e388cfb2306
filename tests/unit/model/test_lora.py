"""An adapter on a frozen base: its start, which layers it may adapt, training, and what is exported."""

import json
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from benchmarks.tiny_models import tiny_model
from dpo.cli.main import run
from dpo.cli.parse import parse
from dpo.config import Config, LoraConfig, ModelConfig, OptimizationConfig
from dpo.data.trees import sequence_batch
from dpo.engine import world
from dpo.engine.engine import Engine
from dpo.errors import UserError
from dpo.model import lora as lora_module
from dpo.model.files import num_parameters
from dpo.model.load import load_model
from dpo.model.lora import check_policy, load_policy, num_adapter_parameters
from dpo.model.lora_export import export_trained, merged_model
from dpo.reference.identity import policy_is_reference, reference_identity, reference_model
from dpo.tracking.run_folder import RunFolder
from dpo.train.checkpoint import Progress, load_checkpoint, save_checkpoint
from dpo.train.disk_space import checkpoint_bytes

IDS = torch.tensor([[5, 6, 7, 8, 9, 10]])
SEQUENCES = [
    (torch.arange(3, dtype=torch.int32).numpy(), torch.arange(4, 4 + n, dtype=torch.int32).numpy())
    for n in (2, 5, 3)
]


@pytest.fixture(scope="module")
def untied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=300, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, initializer_range=0.2, tie_word_embeddings=False,
        bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(params=["tied", "untied"])
def base(request: pytest.FixtureRequest, tiny_model: Path, untied: Path) -> Path:
    return tiny_model if request.param == "tied" else untied


def configured(base: Path, **options: Any) -> ModelConfig:
    return ModelConfig(
        name_or_path=str(base), dtype="float32", lora=LoraConfig(**{"rank": 4, "alpha": 8, **options})
    )


def made(config: ModelConfig, seed: int = 0) -> PreTrainedModel:
    return load_policy(config, dtype=torch.float32, seed=seed)


def trained(config: ModelConfig, steps: int = 2, **options: Any) -> Engine:
    engine = Engine(world.start(config), made(config), config, OptimizationConfig(**options))
    for _ in range(steps):
        advance(engine)
    return engine


def advance(engine: Engine) -> float:
    engine.accumulate(-engine.score(sequence_batch(SEQUENCES)).sum() / 10, last=True)
    return engine.update(0.02)


def adapter_of(model: PreTrainedModel) -> dict[str, Tensor]:
    return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(IDS).logits
    return found


def test_the_policy_starts_equal_to_its_base_bit_for_bit(base: Path) -> None:
    config = configured(base)
    assert torch.equal(logits(made(config)), logits(load_model(config)))


def test_only_the_adapter_is_trained_and_only_its_second_half_starts_at_zero(base: Path) -> None:
    model = made(configured(base))
    adapter = adapter_of(model)
    assert len(adapter) > 2
    assert all(".lora_" in name for name in adapter)
    assert all(bool(weight.any()) == (".lora_A." in name) for name, weight in adapter.items())
    assert not any(".lora_" in name for name in model.state_dict().keys() - adapter.keys())


def test_the_start_depends_only_on_the_seed(base: Path) -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = adapter_of(made(configured(base), seed=3))
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(6)
    again, other = adapter_of(made(configured(base), seed=3)), adapter_of(made(configured(base), seed=4))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not any(torch.equal(first[name], other[name]) for name in first if ".lora_A." in name)


def test_a_frozen_base_has_the_compute_dtype_and_the_adapter_float32(tiny_model: Path) -> None:
    config = replace(configured(tiny_model), dtype="bfloat16")
    model = made(config)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert {p.dtype for p in model.parameters() if not p.requires_grad} == {torch.bfloat16}


def test_the_product_is_scaled_by_alpha_over_rank(tiny_model: Path) -> None:
    config = configured(tiny_model, rank=4, alpha=6, target_modules=["h.0.mlp.c_fc"])
    model = made(config)
    weights = {name: torch.ones_like(weight) for name, weight in adapter_of(model).items()}
    assert len(weights) == 2
    added = merged_model(config, weights).state_dict()["transformer.h.0.mlp.c_fc.weight"]
    added = added - load_model(config).state_dict()["transformer.h.0.mlp.c_fc.weight"]
    torch.testing.assert_close(added, torch.full_like(added, 4 * 6 / 4))


@pytest.mark.parametrize(
    ("targets", "reason"),
    [
        (["lm_head"], "lm_head is the output layer"),
        (["embed_tokens"], "model.embed_tokens is a Embedding"),
        (["q_proj", "lm_head"], "lm_head is the output layer"),
        (["nothing"], "not found in the base model"),
        (["self_attn"], "LlamaAttention"),
    ],
)
def test_layers_that_cannot_be_adapted_are_refused(untied: Path, targets: list[str], reason: str) -> None:
    config = configured(untied, target_modules=targets)
    with pytest.raises(UserError, match=rf"model\.lora\.target_modules: .*{reason}"):
        made(config)
    with pytest.raises(UserError, match=reason):
        check_policy(config, local=True)


def test_a_tied_embedding_cannot_be_adapted(tiny_model: Path) -> None:
    with pytest.raises(UserError, match=r"transformer\.wte is a Embedding"):
        made(configured(tiny_model, target_modules=["wte"]))


@pytest.mark.parametrize("command", ["train", "sft"])
def test_without_peft_the_error_is_one_line_with_the_remedy(
    command: str,
    tiny_model: Path,
    pairs_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(lora_module, "find_spec", lambda name: None)
    arguments = ["--model.name_or_path", str(tiny_model), "--data.train", str(pairs_file)]
    arguments += ["--model.lora.rank", "8", "--run_dir", str(tmp_path / "run")]
    for words in (["check", command], [command]):
        assert run([*words, *arguments]) == 2
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert error.startswith("dpo: error: model.lora: adapters need peft")
        assert "pip install" in error


def test_the_check_finds_missing_layers(
    tiny_model: Path, pairs_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--model.name_or_path", str(tiny_model), "--data.train", str(pairs_file)]
    arguments += ["--run_dir", str(tmp_path / "run"), "--model.lora.target_modules", "[q_proj]"]
    assert run(["check", "train", *arguments]) == 2
    assert "Target modules {'q_proj'} not found" in capsys.readouterr().err


def test_parameters_are_counted_without_weights(base: Path) -> None:
    config = configured(base)
    assert num_adapter_parameters(config) == sum(w.numel() for w in adapter_of(made(config)).values())


def test_training_changes_the_adapter_and_not_the_base(base: Path) -> None:
    config = configured(base)
    engine = trained(config, weight_decay=0.1)
    start, plain = adapter_of(made(config)), load_model(config).state_dict()
    assert engine.num_parameters - engine.num_frozen == num_adapter_parameters(config)
    assert engine.num_frozen == num_parameters(config)
    weights = engine.weights()
    assert weights.keys() == start.keys()
    assert not any(torch.equal(weights[name], start[name]) for name in start)
    for name, weight in engine.model.state_dict().items():
        if ".lora_" not in name:
            assert torch.equal(weight, plain[name.replace(".base_layer", "")])


def test_gradients_equal_those_of_a_model_wrapped_by_peft(base: Path) -> None:
    config = configured(base)
    engine = trained(config, steps=1)  # from then on both halves have a gradient
    twin = made(config)
    twin.load_state_dict(engine.weights(), strict=False)
    total = torch.zeros(())
    for prompt, completion in SEQUENCES:
        ids = torch.cat([torch.from_numpy(prompt), torch.from_numpy(completion)]).long()
        logps = twin(input_ids=ids[None]).logits[0].log_softmax(-1)
        at = torch.arange(len(prompt) - 1, len(ids) - 1)
        total = total - logps[at, ids[at + 1]].sum() / 10
    total.backward()
    engine.accumulate(-engine.score(sequence_batch(SEQUENCES)).sum() / 10, last=True)
    expected = {name: p.grad for name, p in twin.named_parameters()}
    for name, parameter in engine.model.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-4, atol=1e-6)
        else:
            assert parameter.grad is None, "no gradient is computed for a frozen weight"


def test_recomputed_activations_give_the_same_gradients(base: Path) -> None:
    config = configured(base)
    plain, recomputed = trained(config), trained(replace(config, gradient_checkpointing=True))
    for name, weight in plain.weights().items():
        torch.testing.assert_close(recomputed.weights()[name], weight, rtol=1e-4, atol=1e-6)
    assert advance(plain) == pytest.approx(advance(recomputed), rel=1e-5)


def exported(engine: Engine, config: ModelConfig, tokenizer: PreTrainedTokenizerFast, folder: Path) -> Path:
    export_trained(config, engine.model, engine.weights(), tokenizer, folder, "card")
    return folder


def test_the_merged_model_is_the_trained_policy_and_needs_no_peft(
    base: Path, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    config = configured(base)
    engine = trained(config)
    folder = exported(engine, config, tokenizer, tmp_path / "model")
    assert not (folder / "adapter_config.json").exists()
    again, report = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    assert not any(report.values())
    assert again.state_dict().keys() == load_model(config).state_dict().keys()
    torch.testing.assert_close(logits(again), logits(engine.model), rtol=1e-5, atol=1e-5)
    assert (logits(again) - logits(load_model(config))).abs().max() > 0.1


@pytest.mark.filterwarnings("ignore::FutureWarning:transformers")  # peft calls it by an old name
def test_the_adapter_loads_on_its_base_and_is_the_trained_policy(
    base: Path, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    config = configured(base, export="adapter")
    engine = trained(config)
    folder = exported(engine, config, tokenizer, tmp_path / "model")
    files = {path.name for path in folder.iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "README.md", "tokenizer.json"} <= files
    assert not files & {"config.json", "model.safetensors"}
    assert json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"] == str(base)
    ours = load_model(ModelConfig(name_or_path=str(folder), dtype="float32"))
    theirs = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), folder
    )
    both = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for model in (ours, theirs, both):
        torch.testing.assert_close(logits(model), logits(engine.model), rtol=1e-5, atol=1e-5)
    twice = exported(engine, config, tokenizer, tmp_path / "again")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (twice / name).read_bytes() == (folder / name).read_bytes()


def test_merging_in_bfloat16_rounds_each_sum_once(tiny_model: Path) -> None:
    config = replace(configured(tiny_model), dtype="bfloat16")
    weights = {name: torch.randn_like(w) / 10 for name, w in adapter_of(made(config)).items()}
    found = merged_model(config, weights).state_dict()
    exact = merged_model(replace(config, dtype="float32"), weights).state_dict()
    narrow = load_model(config).state_dict()
    for name, weight in load_model(replace(config, dtype="float32")).state_dict().items():
        added = exact[name] - weight  # the base was already in bfloat16
        torch.testing.assert_close(
            found[name], (narrow[name].float() + added).bfloat16(), rtol=2**-7, atol=1e-6
        )


def test_weights_that_do_not_fit_are_not_merged(tiny_model: Path) -> None:
    config = configured(tiny_model)
    weights = adapter_of(made(config))
    weights.pop(next(iter(weights)))
    with pytest.raises(RuntimeError, match="adapter"):
        merged_model(config, weights)


def state_of(folder: Path) -> dict[str, Mapping[str, Any]]:
    found: dict[str, Mapping[str, Any]] = torch.load(folder / "engine.pt", weights_only=True)
    return found


def test_a_checkpoint_holds_only_the_adapter_and_resumes_bit_for_bit(base: Path, tmp_path: Path) -> None:
    config = configured(base)
    options = OptimizationConfig()
    engine = trained(config)
    folder = save_checkpoint(engine, Progress(step=2), RunFolder(tmp_path), 1, {})
    assert all(".lora_" in name for name in state_of(folder)["model"])
    written = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    expected = checkpoint_bytes(num_adapter_parameters(config), torch.float32, options, sharded=False)
    assert written < expected + 40_000, "names, headers and the random state of one rank"
    advance(engine)
    resumed = Engine(world.start(config), made(config, seed=9), config, options)
    load_checkpoint(resumed, folder, folder)
    advance(resumed)
    found, wanted = resumed.weights(), engine.weights()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_a_checkpoint_that_lacks_a_part_of_the_adapter_is_not_loaded(
    tiny_model: Path, tmp_path: Path
) -> None:
    engine = trained(configured(tiny_model))
    engine.save(tmp_path)()
    state: dict[str, Any] = state_of(tmp_path)  # type: ignore[assignment]
    del state["model"][next(iter(state["model"]))]
    torch.save(state, tmp_path / "engine.pt")
    with pytest.raises(RuntimeError, match="hold"):
        engine.load(tmp_path)


def test_the_reference_is_the_base(tiny_model: Path, pairs_file: Path, tmp_path: Path) -> None:
    keys = ["--model.name_or_path", str(tiny_model), "--data.train", str(pairs_file)]
    full, lora = parse("train", keys), parse("train", [*keys, "--model.lora.rank", "8"])
    assert isinstance(full, Config)
    assert isinstance(lora, Config)
    reference = reference_model(full.model, full.reference)
    assert reference_model(lora.model, lora.reference) == reference
    identity = reference_identity(reference, tmp_path)
    assert reference_identity(lora.model, tmp_path) == identity
    assert policy_is_reference(lora.model, identity, tmp_path)


def test_the_first_loss_is_ln_2_on_an_adapter(tiny_model: Path) -> None:
    config = configured(tiny_model)
    engine, plain = trained(config, steps=0), load_model(config)
    other = Engine(world.start(config), plain, replace(config, lora=None), OptimizationConfig())
    batch = sequence_batch(SEQUENCES)
    margins = engine.score_only(batch) - other.score_only(batch)
    assert -torch.nn.functional.logsigmoid(0.1 * margins).mean().item() == pytest.approx(
        math.log(2), abs=1e-9
    )


def test_a_model_that_is_an_adapter_is_not_trained(
    pairs_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text('{"base_model_name_or_path": "base"}')
    (adapter / "adapter_model.safetensors").write_bytes(b"")
    arguments = ["--model.name_or_path", str(adapter), "--data.train", str(pairs_file)]
    assert run(["check", "train", *arguments, "--run_dir", str(tmp_path / "run")]) == 2
    assert f"model.name_or_path: {adapter}" in capsys.readouterr().err


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3", "qwen3_moe", "gpt_oss", "phi3"])
def test_all_linear_adapts_every_linear_layer_and_names_the_experts_that_it_leaves_out(
    family: str, tmp_path: Path, tokenizer: PreTrainedTokenizerFast, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = tiny_model(family)
    plain.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    config = ModelConfig(name_or_path=str(tmp_path), dtype="float32", lora=LoraConfig())
    policy = load_policy(config, dtype=torch.float32, seed=0)
    adapted = {
        name.partition(".lora_")[0] for name, weight in policy.named_parameters() if weight.requires_grad
    }
    linear = {name for name, module in plain.named_modules() if isinstance(module, torch.nn.Linear)}
    has_experts = family != "phi3"
    shared = {name for name in linear if name.endswith(("gate_proj", "up_proj", "down_proj")) and has_experts}
    assert adapted == linear - {"lm_head"} - shared
    said = "".join(capsys.readouterr())
    assert ("leaves out the experts, which are one tensor per block" in said) == has_experts
