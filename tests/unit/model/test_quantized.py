"""A frozen base in 4 or 8 bits: one function in training, scoring and export, and what is counted of it."""

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from dpo.cli.main import run
from dpo.cli.validate import problems
from dpo.config import Config, DataConfig, LoraConfig, ModelConfig, OptimizationConfig, ReferenceConfig
from dpo.data.trees import sequence_batch, tree_batch
from dpo.engine import world
from dpo.engine.engine import Engine
from dpo.engine.launcher import check_launcher
from dpo.errors import UserError
from dpo.model import quantized
from dpo.model.flops import work_of
from dpo.model.load import load_model
from dpo.model.lora import check_policy, load_policy
from dpo.model.lora_export import export_trained
from dpo.model.probe_trees import ProbeTrees
from dpo.model.quantized import num_elements, packed_bytes, packed_weights, plain
from dpo.model.tokenizer import load_tokenizer
from dpo.reference.identity import policy_is_reference, reference_identity, reference_model
from dpo.tracking.run_folder import RunFolder
from dpo.train.checkpoint import Progress, load_checkpoint, save_checkpoint

SEQUENCES = [
    (torch.arange(3, dtype=torch.int32).numpy(), torch.arange(4, 4 + n, dtype=torch.int32).numpy())
    for n in (2, 5, 3)
]
TREES = [(prompt, [completion]) for prompt, completion in SEQUENCES]


@pytest.fixture(autouse=True)
def any_precision() -> Iterator[None]:
    """Lets each test choose the compute type of its process."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="module")
def base(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tied Llama that is large enough for blocks of 64 weights, with the tests' tokenizer."""
    folder = tmp_path_factory.mktemp("base")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=300, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, initializer_range=0.2, tie_word_embeddings=True,
        bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    load_tokenizer(ModelConfig(name_or_path=str(tiny_model))).save_pretrained(folder)
    return folder


@pytest.fixture(params=["nf4", "int8"])
def scheme(request: pytest.FixtureRequest) -> Any:
    """How the base is quantized."""
    return request.param


def configured(base: Path, scheme: Any = "nf4", **lora: Any) -> ModelConfig:
    options = LoraConfig(**{"rank": 4, "alpha": 8.0, **lora})
    return ModelConfig(name_or_path=str(base), dtype="float32", quantization=scheme, lora=options)


def engine_of(config: ModelConfig, seed: int = 0) -> Engine:
    model = load_policy(config, dtype=torch.float32, seed=seed)
    return Engine(world.start(config), model, config, OptimizationConfig())


def reference_of(config: ModelConfig) -> Engine:
    model = reference_model(config, ReferenceConfig())
    return Engine(world.start(model), load_model(model), model, OptimizationConfig())


def advance(engine: Engine) -> None:
    engine.accumulate(-engine.score(sequence_batch(SEQUENCES)).sum() / 10, last=True)
    engine.update(0.02)


def logps_of(engine: Engine) -> Tensor:
    return engine.score_only(sequence_batch(SEQUENCES))


@pytest.mark.parametrize(
    "kind", [{}, {"dora": True}, {"rank_stabilized": True}, {"modules_to_save": ["norm"]}]
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_first_loss_is_ln_2_and_the_reference_is_the_quantized_base(
    base: Path, scheme: Any, kind: dict[str, Any], dtype: Any
) -> None:
    config = replace(configured(base, scheme, **kind), dtype=dtype)
    engine, reference = engine_of(config), reference_of(config)
    margins = logps_of(engine) - logps_of(reference)
    within = 1e-6 if dtype == "float32" else 0.02
    loss = -torch.nn.functional.logsigmoid(0.1 * margins).mean().item()
    assert loss == pytest.approx(math.log(2), abs=within)
    plainly = reference_of(replace(config, quantization=None))
    assert (logps_of(reference) - logps_of(plainly)).abs().max() > (0.1 if scheme == "nf4" else 0.01)


def test_what_is_computed_is_the_function_of_the_values_that_so_few_bits_hold(
    base: Path, scheme: Any
) -> None:
    config = configured(base, scheme)
    engine, twin = reference_of(config), load_model(replace(config, quantization=None))
    with torch.no_grad():
        for (name, weight), packed in zip(
            twin.named_parameters(), load_model(config).parameters(), strict=True
        ):
            values = plain(packed)
            assert values.shape == weight.shape, name
            widest = 0.16 if scheme == "nf4" else 0.5 / 127 + 2**-11  # half the widest step; float16
            assert (values - weight).abs().max() <= widest * weight.abs().max()
            weight.copy_(values)
    other = Engine(world.start(config), twin, replace(config, quantization=None), OptimizationConfig())
    with torch.enable_grad():
        learning = engine_of(config).score(sequence_batch(SEQUENCES)).detach()
    for found in (logps_of(engine), learning):
        torch.testing.assert_close(found, logps_of(other), rtol=0, atol=2e-5)


def test_8_bits_keep_no_weight_for_the_backward_pass_and_their_scales_in_float32(base: Path) -> None:
    """Not even where DeepSpeed casts the whole model to the compute type."""
    model = load_policy(configured(base, "int8"), dtype=torch.float32, seed=0)
    values, ids, saved = logits_of(model), torch.arange(4)[None], []
    layer = model.model.layers[0].mlp.up_proj.base_layer

    def keep(tensor: Tensor) -> Tensor:
        saved.append(tensor.shape)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(input_ids=ids)
    assert layer.weight.shape not in saved
    scales = layer.weight.SCB.clone()
    torch.nn.ModuleList([model]).to(torch.bfloat16).to(torch.float32)
    assert torch.equal(getattr(layer, quantized.SCALES).view(torch.float32), scales)
    assert (logits_of(model) - values).abs().max() < 0.2  # norms and embeddings were rounded


def logits_of(model: torch.nn.Module) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(input_ids=torch.arange(4)[None]).logits
    return found


def test_log_probs_do_not_depend_on_the_layout(base: Path, scheme: Any) -> None:
    engine = engine_of(configured(base, scheme))
    probed = engine.settle_layout(ProbeTrees(short=TREES[:2], long=TREES))
    assert (probed.layout, probed.notes) == ("packed", ())
    rows, packed = (engine.score_only(tree_batch(TREES, layout)) for layout in ("rows", "packed"))
    torch.testing.assert_close(rows, packed, rtol=0, atol=2e-5)


def test_a_model_in_bfloat16_is_compared_with_its_values_in_float32(base: Path, scheme: Any) -> None:
    probed = engine_of(replace(configured(base, scheme), dtype="bfloat16")).settle_layout(
        ProbeTrees(short=TREES[:2], long=TREES)
    )
    assert (probed.layout, probed.notes) == ("packed", ())


def test_gradients_of_the_adapter_are_those_on_a_base_with_the_same_values(base: Path, scheme: Any) -> None:
    config = configured(base, scheme)
    engine, twin = (
        engine_of(config),
        load_policy(replace(config, quantization=None), dtype=torch.float32, seed=0),
    )
    with torch.no_grad():
        sources = dict(engine.model.named_parameters())
        for name, weight in twin.named_parameters():
            weight.copy_(plain(sources[name]))
    other = Engine(world.start(config), twin, replace(config, quantization=None), OptimizationConfig())
    for _ in range(2):  # from the second step on both halves have a gradient
        for each in (engine, other):
            advance(each)
    expected = other.weights()
    for name, weight in engine.weights().items():
        torch.testing.assert_close(weight, expected[name], rtol=1e-3, atol=1e-5)


def test_the_scheme_and_its_library_are_part_of_the_identity(base: Path, scheme: Any, tmp_path: Path) -> None:
    config = configured(base, scheme)
    model = reference_model(config, ReferenceConfig())
    assert (model.quantization, model.lora) == (scheme, None)
    found = reference_identity(model, tmp_path)
    whole = reference_identity(replace(model, quantization=None), tmp_path)
    assert found.quantization is not None
    assert found.quantization.startswith(f"{scheme} bitsandbytes 0.")
    assert "quantization" not in whole.to_json()
    assert found.differences(whole) == [f"quantization: {found.quantization} -> None"]
    assert type(found).from_json(found.to_json()) == found
    newer = replace(found, quantization=f"{scheme} bitsandbytes 99.0")
    assert len({each.digest for each in (found, whole, newer)}) == 3
    assert policy_is_reference(config, found, tmp_path)
    assert not policy_is_reference(config, whole, tmp_path)


def test_a_checkpoint_holds_only_the_adapter_and_resumes_bit_for_bit(
    base: Path, scheme: Any, tmp_path: Path
) -> None:
    config = configured(base, scheme)
    engine = engine_of(config)
    advance(engine)
    folder = save_checkpoint(engine, Progress(step=1), RunFolder(tmp_path), 1, {})
    state = torch.load(folder / "engine.pt", weights_only=True)
    assert state["model"]
    assert all(".lora_" in name for name in state["model"])
    advance(engine)
    resumed = engine_of(config, seed=9)
    load_checkpoint(resumed, folder, folder)
    advance(resumed)
    found, wanted = resumed.weights(), engine.weights()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize("kind", [{}, {"dora": True}])
def test_both_exports_are_the_trained_policy(
    base: Path, scheme: Any, kind: dict[str, Any], tmp_path: Path
) -> None:
    config = configured(base, scheme, **kind)
    engine = engine_of(config)
    advance(engine)
    advance(engine)
    for export in ("adapter", "merged"):
        exporting = configured(base, scheme, **kind, export=export)
        weights, tokenizer = engine.weights(), load_tokenizer(config)
        export_trained(exporting, engine.model, weights, tokenizer, tmp_path / export, "card")
    ended = logps_of(engine)
    adapter = ModelConfig(name_or_path=str(tmp_path / "adapter"), dtype="float32", quantization=scheme)
    torch.testing.assert_close(logps_of(reference_of(adapter)), ended, rtol=0, atol=2e-5)
    merged = ModelConfig(name_or_path=str(tmp_path / "merged"), dtype="float32")
    torch.testing.assert_close(logps_of(reference_of(merged)), ended, rtol=0, atol=5e-5)
    stored = load_file(tmp_path / "merged" / "model.safetensors")
    assert {weight.dtype for weight in stored.values()} == {torch.float32}
    assert "quantization_config" not in (tmp_path / "merged" / "config.json").read_text()
    going_on = replace(adapter, lora=LoraConfig(start="continue"))
    torch.testing.assert_close(logps_of(engine_of(going_on)), ended, rtol=0, atol=2e-5)


def test_weights_are_counted_as_what_they_stand_for(base: Path, scheme: Any) -> None:
    config = configured(base, scheme)
    packed, whole = load_model(config), load_model(replace(config, quantization=None))
    assert num_elements(packed.parameters()) == num_elements(whole.parameters())
    assert work_of(packed) == work_of(whole)
    names = {name for name, weight in packed.named_parameters() if weight.dtype in (torch.uint8, torch.int8)}
    expected = {id(weight) for weight in packed_weights(whole.requires_grad_(False))}
    assert names == {name for name, weight in whole.named_parameters() if id(weight) in expected}
    assert len(names) == 14
    stored = sum(
        weight.nbytes + sum(part.nbytes for part in parts(weight))
        for name, weight in packed.named_parameters()
        if name in names
    )
    counted = sum(packed_bytes(weight, scheme) for weight in packed_weights(whole))
    assert stored == pytest.approx(
        counted, rel=0.25 if scheme == "nf4" else 0
    )  # small weights round scales up


def parts(weight: Tensor) -> list[Tensor]:
    held: Any = weight  # by bitsandbytes
    if weight.dtype == torch.int8:
        return [held.SCB]
    return [held.quant_state.absmax, held.quant_state.state2.absmax]


def test_without_bitsandbytes_the_error_is_one_line_with_the_remedy(
    base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quantized, "find_spec", lambda name: None)
    for refused in (check_policy, load_model):
        with pytest.raises(UserError, match=r"model\.quantization: nf4; .* need bitsandbytes.*pip install"):
            refused(configured(base))  # type: ignore[operator]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"lora": None}, "such weights are not trained: set model.lora.rank"),
        ({"compile": True, "quantization": "int8"}, "not been tried with model.quantization: int8"),
        ({"compile": True, "offload_activations": True}, "not been tried with model.offload_activations"),
        ({"lora": LoraConfig(start="merge")}, "quantized weights cannot hold the sum"),
        ({"reference": "zero3"}, "reference.sharding: zero3; quantized weights cannot be sharded"),
    ],
)
def test_what_cannot_work_is_refused(base: Path, options: dict[str, Any], said: str) -> None:
    sharding = options.pop("reference", "auto")
    config = Config(
        model=replace(configured(base), **options),
        data=DataConfig(train="d"),
        reference=ReferenceConfig(sharding=sharding),
    )
    assert any(said in problem for problem in problems(config))


def test_a_model_that_is_quantized_already_is_not_quantized_again(base: Path, tmp_path: Path) -> None:
    load_model(configured(base)).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"model\.quantization: nf4; .* has quantized weights already"):
        check_policy(replace(configured(base), name_or_path=str(tmp_path)), local=True)


def test_zero_3_is_refused_before_a_model_is_loaded(base: Path, scheme: Any) -> None:
    environment = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}
    check_launcher(environment, trained=replace(configured(base, scheme), quantization=None))
    check_launcher(environment)  # nothing is trained
    check_launcher(environment | {"ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"}, trained=configured(base, scheme))
    with pytest.raises(UserError, match=rf"model\.quantization: {scheme}; ZeRO-3 cannot shard"):
        check_launcher(environment, trained=configured(base, scheme))
    moved = replace(configured(base, scheme), quantization=None, offload_activations=True)
    with pytest.raises(UserError, match=r"model\.offload_activations: .* under ZeRO-3"):
        check_launcher(environment, trained=moved)
    compiled = ModelConfig(name_or_path="m", compile=True)
    with pytest.raises(UserError, match=r"model\.compile: true; .* under ZeRO-3.*: leave it out"):
        check_launcher(environment, trained=compiled)


def test_the_commands_agree(
    base: Path, scheme: Any, pairs_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--model.name_or_path", str(base), "--data.train", str(pairs_file)]
    arguments += ["--data.test", str(pairs_file), "--data.cache_dir", str(tmp_path / "tokenized")]
    arguments += ["--model.quantization", scheme, "--model.lora.rank", "4", "--model.dtype", "float32"]
    arguments += ["--run_dir", str(tmp_path / "run"), "--reference.cache_dir", str(tmp_path / "cache")]
    arguments += ["--train.max_steps", "2", "--evaluate.num_prompts", "0", "--evaluate.watched_prompts", "0"]
    for export in ("adapter", "merged"):
        more = [*arguments, "--model.lora.export", export, "--run_dir", str(tmp_path / export)]
        for words in (["precompute-ref"], ["train"], ["evaluate"]):
            assert run([*words, *more]) == 0, "".join(capsys.readouterr())
