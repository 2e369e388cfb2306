"""A finished adapter as the start of a run: trained on, or merged, and what is read of its files."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.tiny_models import tiny_model as family
from dpo.cli.main import run
from dpo.config import LoraConfig, ModelConfig, OptimizationConfig, ReferenceConfig
from dpo.data.tokenize import tokenizer_digest
from dpo.data.trees import sequence_batch
from dpo.engine import world
from dpo.engine.engine import Engine
from dpo.errors import UserError
from dpo.model import files
from dpo.model.load import load_model
from dpo.model.lora import check_policy, load_policy, num_adapter_parameters
from dpo.model.lora_export import export_trained
from dpo.model.tokenizer import load_tokenizer
from dpo.reference.identity import policy_is_reference, reference_identity, reference_model
from dpo.tracking.run_folder import RunFolder
from dpo.train.checkpoint import Progress, load_checkpoint, save_checkpoint

SEQUENCES = [
    (torch.arange(3, dtype=torch.int32).numpy(), torch.arange(4, 4 + n, dtype=torch.int32).numpy())
    for n in (2, 5, 3)
]
LORA: dict[str, Any] = {"rank": 4, "alpha": 8.0}
KINDS: dict[str, dict[str, Any]] = {
    "lora": {},
    "rank-stabilized": {"rank_stabilized": True},
    "dora": {"dora": True},
    "with whole modules": {"modules_to_save": ["lm_head", "embed_tokens", "norm"]},
    "experts": {"target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]},
}


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> dict[str, Path]:
    """An untied Llama, and a mixture of experts, with the tests' tokenizer."""
    folder = tmp_path_factory.mktemp("bases")
    tokenizer = load_tokenizer(ModelConfig(name_or_path=str(tiny_model)))
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=300, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, initializer_range=0.2, tie_word_embeddings=False,
        bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    for name, model in (("dense", LlamaForCausalLM(config)), ("experts", family("mixtral"))):
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return {name: folder / name for name in ("dense", "experts")}


def configured(base: Path, kind: str = "lora", **options: Any) -> ModelConfig:
    lora = LoraConfig(**{**LORA, **KINDS[kind], "export": "adapter", **options})
    return ModelConfig(name_or_path=str(base), dtype="float32", lora=lora)


def engine_of(config: ModelConfig, seed: int = 0, *, double: bool = False, **options: Any) -> Engine:
    model = load_policy(config, dtype=torch.float32, seed=seed)
    model = model.double() if double else model
    return Engine(world.start(config), model, config, OptimizationConfig(**options))


def advance(engine: Engine, rate: float = 0.02) -> Tensor:
    logps = engine.score(sequence_batch(SEQUENCES))
    engine.accumulate(-logps.sum() / 10, last=True)
    engine.update(rate)
    return logps.detach()


def logps_of(engine: Engine) -> Tensor:
    return engine.score_only(sequence_batch(SEQUENCES))


def written(engine: Engine, config: ModelConfig, folder: Path) -> Path:
    tokenizer = load_tokenizer(config)
    export_trained(config, engine.model, engine.weights(), tokenizer, folder, "card")
    return folder


def finished(base: Path, folder: Path, kind: str = "lora", **options: Any) -> Path:
    """An adapter that has been trained for three steps."""
    config = configured(base, kind, **options)
    engine = engine_of(config)
    for _ in range(3):
        advance(engine)
    return written(engine, config, folder)


@pytest.fixture(scope="module")
def adapter(bases: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return finished(bases["dense"], tmp_path_factory.mktemp("finished") / "adapter")


def continuing(adapter: Path, **options: Any) -> ModelConfig:
    return ModelConfig(
        name_or_path=str(adapter), dtype="float32", lora=LoraConfig(**{"start": "continue", **options})
    )


def reference_of(config: ModelConfig) -> Engine:
    model = reference_model(config, ReferenceConfig())
    return Engine(world.start(model), load_model(model), model, OptimizationConfig())


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_starts_as_its_base_and_goes_on_as_it_ended(
    bases: dict[str, Path], kind: str, tmp_path: Path
) -> None:
    base = bases["experts" if kind == "experts" else "dense"]
    config = configured(base, kind)
    engine = engine_of(config)
    assert torch.equal(logps_of(engine), logps_of(reference_of(config)))  # law 1
    assert engine.num_parameters - engine.num_frozen == num_adapter_parameters(config)
    start = engine.weights()
    for _ in range(3):
        advance(engine)
    ended, weights = logps_of(engine), engine.weights()
    assert not any(torch.equal(weights[name], start[name]) for name in start)
    assert (ended - logps_of(reference_of(config))).abs().min() > 0.1
    folder = written(engine, config, tmp_path / "adapter")
    again = continuing(folder)
    going_on = engine_of(again)
    assert torch.equal(logps_of(going_on), ended)
    assert going_on.weights().keys() == weights.keys()
    assert num_adapter_parameters(again) == num_adapter_parameters(config)
    assert torch.equal(logps_of(reference_of(again)), ended)  # law 1 of the next run
    merged = written(engine, replace(config, lora=replace(config.lora, export="merged")), tmp_path / "merged")
    whole = ModelConfig(name_or_path=str(merged), dtype="float32")
    torch.testing.assert_close(logps_of(reference_of(whole)), ended, rtol=1e-5, atol=2e-5)


@pytest.mark.filterwarnings("ignore::FutureWarning:transformers")  # peft calls it by an old name
@pytest.mark.parametrize("kind", KINDS)
def test_peft_reads_what_we_write(bases: dict[str, Path], kind: str, tmp_path: Path) -> None:
    base = bases["experts" if kind == "experts" else "dense"]
    folder = finished(base, tmp_path / "adapter", kind)
    theirs = AutoPeftModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ours = load_model(ModelConfig(name_or_path=str(folder), dtype="float32"))
    ids = torch.tensor([[5, 6, 7, 8, 9, 10]])
    torch.testing.assert_close(ours(ids).logits, theirs(ids).logits, rtol=1e-5, atol=1e-5)


def test_a_rank_stabilized_product_is_scaled_by_alpha_over_the_root_of_rank(bases: dict[str, Path]) -> None:
    config = configured(bases["dense"], rank_stabilized=True, target_modules=["layers.0.mlp.up_proj"])
    model = load_policy(config, dtype=torch.float32, seed=0)
    (layer,) = [module for name, module in model.named_modules() if name.endswith("0.mlp.up_proj")]
    assert layer.scaling["default"] == 8 / math.sqrt(4)


@pytest.mark.parametrize("start", ["continue", "merge"])
def test_the_first_loss_is_ln_2_from_an_adapter(adapter: Path, start: Any) -> None:
    config = continuing(adapter, start=start)
    margins = logps_of(engine_of(config)) - logps_of(reference_of(config))
    loss = -torch.nn.functional.logsigmoid(0.1 * margins).mean().item()
    assert loss == pytest.approx(math.log(2), abs=1e-6 if start == "merge" else 1e-12)


def test_training_on_equals_training_an_adapter_of_the_merged_model_step_by_step(adapter: Path) -> None:
    """With W' = W + s B0 A0: as long as A keeps A0, W + s B A0 and W' + s (B - B0) A0 are the same function
    of the same steps in B, which AdamW takes without regard to where B is. So the other half's rate is 0,
    and its gradient may not shorten the others by clipping.
    """
    frozen_half: dict[str, Any] = {"learning_rate_ratio": 1e12}
    on = continuing(adapter, **frozen_half)
    new = continuing(adapter, start="merge", **LORA, **frozen_half)
    going_on, merged = (engine_of(config, double=True, max_grad_norm=0.0) for config in (on, new))
    start = going_on.weights()
    halves = {name: weight for name, weight in start.items() if ".lora_A." in name}
    assert halves
    merged.model.load_state_dict(halves, strict=False)
    for _ in range(6):
        first, second = (advance(engine, 2e-14) for engine in (going_on, merged))
        torch.testing.assert_close(first, second, rtol=0, atol=1e-5)
    ended = going_on.weights()
    assert all(torch.allclose(ended[name], start[name], rtol=1e-6, atol=1e-9) for name in halves)
    assert (logps_of(going_on) - logps_of(reference_of(on))).abs().min() > 0.05


def test_the_half_that_starts_at_zero_learns_faster_by_the_ratio(bases: dict[str, Path]) -> None:
    plain, fast = (engine_of(configured(bases["dense"], learning_rate_ratio=ratio)) for ratio in (1.0, 16.0))
    for engine in (plain, fast):  # AdamW's first step has the size of the learning rate
        advance(engine, 1e-3)
    for name, weight in fast.weights().items():
        if ".lora_B." in name:
            torch.testing.assert_close(weight, 16 * plain.weights()[name], rtol=1e-3, atol=1e-6)
        else:
            assert torch.equal(weight, plain.weights()[name])


def test_the_reference_is_the_base_with_the_adapter_as_it_was(
    adapter: Path, bases: dict[str, Path], tmp_path: Path
) -> None:
    def identity(config: ModelConfig) -> Any:
        return reference_identity(reference_model(config, ReferenceConfig()), tmp_path)

    on, merged = identity(continuing(adapter)), identity(continuing(adapter, start="merge"))
    other = finished(bases["dense"], tmp_path / "other", alpha=16.0)
    plain, another = identity(configured(bases["dense"])), identity(continuing(other))
    assert on == merged
    assert on.weights == plain.weights == another.weights
    assert len({on.digest, plain.digest, another.digest}) == 3
    assert plain.adapter == {}
    assert on.adapter.keys() == {"adapter_config.json", "adapter_model.safetensors"}
    assert policy_is_reference(continuing(adapter), on, tmp_path)


def test_adapters_of_one_base_share_its_tokenized_data(adapter: Path, bases: dict[str, Path]) -> None:
    base = ModelConfig(name_or_path=str(bases["dense"]))
    assert (adapter / "tokenizer.json").is_file()
    digest = tokenizer_digest(load_tokenizer(base))
    assert tokenizer_digest(load_tokenizer(continuing(adapter))) == digest
    for file in adapter.glob("tokenizer*"):  # as peft saves adapters
        file.rename(adapter.parent / file.name)
    try:
        assert tokenizer_digest(load_tokenizer(continuing(adapter))) == digest
    finally:
        for file in adapter.parent.glob("tokenizer*"):
            file.rename(adapter / file.name)


@pytest.mark.parametrize("start", ["continue", "merge"])
def test_a_run_from_an_adapter_resumes_bit_for_bit(adapter: Path, start: Any, tmp_path: Path) -> None:
    config = continuing(adapter, start=start)
    engine = engine_of(config)
    advance(engine)
    folder = save_checkpoint(engine, Progress(step=1), RunFolder(tmp_path), 1, {})
    advance(engine)
    resumed = engine_of(config, seed=9)
    load_checkpoint(resumed, folder, folder)
    advance(resumed)
    found, wanted = resumed.weights(), engine.weights()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def edited(adapter: Path, folder: Path, **options: Any) -> Path:
    folder.mkdir()
    settings = json.loads((adapter / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(settings | options))
    (folder / "adapter_model.safetensors").write_bytes((adapter / "adapter_model.safetensors").read_bytes())
    return folder


def test_an_adapters_dropout_is_off_and_that_is_said(
    adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    noisy = edited(adapter, tmp_path / "noisy", lora_dropout=0.5)
    first, second = (advance(engine_of(continuing(folder))) for folder in (adapter, noisy))
    assert torch.equal(first, second)
    said = "".join(capsys.readouterr())
    assert said.count("its dropout of 0.5 is off") == 1


@pytest.mark.parametrize(
    ("options", "lora", "said"),
    [
        ({}, {"start": "new"}, "is an adapter: set model.lora.start to continue"),
        ({}, {"start": "continue", "rank": 8}, r"model\.lora\.rank: 8; the adapter has 4: leave it out"),
        ({}, {"start": "continue", "dora": True}, r"model\.lora\.dora: True; the adapter has False"),
        (
            {},
            {"start": "continue", "target_modules": ["q_proj"]},
            r"model\.lora\.target_modules: .*the adapter has",
        ),
        ({"peft_type": "LOHA"}, {"start": "merge"}, "is a LOHA adapter; expected LORA"),
        ({"bias": "all"}, {"start": "continue"}, r"bias: all; expected none"),
        ({"base_model_name_or_path": None}, {"start": "merge"}, "names no base model"),
    ],
)
def test_what_cannot_be_the_start_is_refused_before_anything_is_loaded(
    adapter: Path, options: dict[str, Any], lora: dict[str, Any], said: str, tmp_path: Path
) -> None:
    config = continuing(edited(adapter, tmp_path / "edited", **options), **lora)
    with pytest.raises(UserError, match=said):
        check_policy(config, local=True)


def test_without_lora_an_adapter_is_not_trained(
    adapter: Path, pairs_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--model.name_or_path", str(adapter), "--data.train", str(pairs_file)]
    assert run(["check", "train", *arguments, "--run_dir", str(tmp_path / "run")]) == 2
    assert "set model.lora.start to continue" in capsys.readouterr().err
    assert run(["check", "train", *arguments, "--model.lora.start", "continue"]) == 0


def test_a_start_needs_an_adapter_in_a_folder_of_its_own(
    adapter: Path, bases: dict[str, Path], tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=r"model\.lora\.start: merge; .* is not an adapter"):
        check_policy(continuing(bases["dense"], start="merge"), local=True)
    both = edited(adapter, tmp_path / "both")
    (both / "config.json").write_bytes((bases["dense"] / "config.json").read_bytes())
    with pytest.raises(UserError, match="holds a model and an adapter"):
        check_policy(continuing(both), local=True)


def test_the_check_asks_the_hub_for_nothing_of_an_adapters_base(
    adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(name: str) -> None:
        raise AssertionError(name)

    far = edited(adapter, tmp_path / "far", base_model_name_or_path="org/base")
    monkeypatch.setattr(files, "ask_hub", lambda name: None if Path(name).is_dir() else refuse(name))
    check_policy(continuing(far), local=True)


def test_weights_that_do_not_fit_the_base_are_refused(
    adapter: Path, bases: dict[str, Path], tmp_path: Path
) -> None:
    less = edited(adapter, tmp_path / "less")
    weights = load_file(less / "adapter_model.safetensors")
    weights.pop(next(iter(weights)))
    save_file(weights, less / "adapter_model.safetensors")
    with pytest.raises(UserError, match="1 weights of one are not in the other, such as"):
        load_policy(continuing(less), dtype=torch.float32, seed=0)
    other = edited(adapter, tmp_path / "other", base_model_name_or_path=str(bases["experts"]))
    with pytest.raises(UserError, match=rf"is no adapter of {bases['experts']}"):
        load_policy(continuing(other), dtype=torch.float32, seed=0)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"target_modules": ["q_proj", "nothing"]}, r"target_modules: .*nothing is no layer of the model"),
        ({"target_parameters": ["nothing"]}, r"target_parameters: .*nothing is no weight of the model"),
        ({"target_parameters": ["norm.weight"]}, "target_parameters: .*1 dimensional Parameter"),
        ({"target_parameters": ["lm_head.weight"]}, r"lm_head\.weight is not a stack of experts"),
        ({"modules_to_save": ["nothing"]}, r"modules_to_save: .*nothing is no module of the model"),
    ],
)
def test_names_that_fit_nothing_are_refused(
    bases: dict[str, Path], options: dict[str, Any], said: str
) -> None:
    with pytest.raises(UserError, match=rf"model\.lora\.{said}" if "lm_head" not in said else said):
        check_policy(configured(bases["dense"], **options), local=True)


def test_a_tied_module_is_not_trained_whole(tiny_model: Path) -> None:
    with pytest.raises(UserError, match=r"modules_to_save: .*wte is tied to another layer"):
        check_policy(configured(tiny_model, modules_to_save=["wte"]), local=True)
