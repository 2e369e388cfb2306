"""The engine on one device: a step is that of one big batch."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from dpo.config import ModelConfig, OptimizationConfig
from dpo.data.trees import sequence_batch
from dpo.engine import world
from dpo.engine.engine import Engine
from dpo.errors import UserError
from dpo.model import compiled
from dpo.model.load import load_model
from dpo.model.probe_trees import trees_of


def tiny_engine(folder: Path, **options: object) -> Engine:
    model = ModelConfig(name_or_path=str(folder), dtype="float32")
    accelerator = world.start(model)
    settings = OptimizationConfig(**options)  # type: ignore[arg-type]
    return Engine(accelerator, load_model(model, dtype=torch.float32), model, settings)


def test_the_engine_says_what_it_is(tiny_model: Path) -> None:
    engine = tiny_engine(tiny_model)
    assert engine.kind == "one device"
    assert engine.description == "one device, 1 rank(s), cpu, float32"
    assert engine.num_parameters == sum(p.numel() for p in engine.model.parameters())


SEQUENCES = [
    (torch.arange(3, dtype=torch.int32).numpy(), torch.arange(4, 4 + n, dtype=torch.int32).numpy())
    for n in (2, 5, 3)
]


@pytest.mark.parametrize("max_grad_norm", [0.0, 1.0])
def test_accumulated_micro_batches_make_the_step_of_one_big_batch(
    tiny_model: Path, max_grad_norm: float
) -> None:
    engine = tiny_engine(tiny_model, max_grad_norm=max_grad_norm)
    for index, sequence in enumerate(SEQUENCES):
        loss = -engine.score(sequence_batch([sequence])).sum() / 10
        engine.accumulate(loss, last=index == 2)
    norm = engine.update(0.01)

    model = load_model(ModelConfig(name_or_path=str(tiny_model), dtype="float32"))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.0)
    total = torch.zeros(())
    for prompt, completion in SEQUENCES:
        ids = torch.cat([torch.from_numpy(prompt), torch.from_numpy(completion)]).long()
        logps = model(input_ids=ids[None]).logits[0].log_softmax(-1)
        at = torch.arange(len(prompt) - 1, len(ids) - 1)
        total = total - logps[at, ids[at + 1]].sum() / 10
    total.backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    expected_norm = math.sqrt(sum(float(gradient.double().square().sum()) for gradient in gradients))
    assert expected_norm > 1  # so that clipping matters
    if max_grad_norm:
        for gradient in gradients:
            gradient /= expected_norm
    optimizer.step()
    assert norm == pytest.approx(expected_norm, rel=1e-5)  # before clipping
    expected = model.state_dict()
    ids = torch.arange(20)[None]
    assert engine.weights().keys() == expected.keys()
    # Through the logits: Adam makes rounding errors of a gradient that is zero as large as any other step.
    with torch.no_grad():
        found, wanted = engine.model(ids).logits, model(ids).logits
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-3)


def test_the_launchers_accumulation_divides_nothing(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    norms = []
    for _ in range(2):
        engine = tiny_engine(tiny_model)
        engine.accumulate(-engine.score(sequence_batch(SEQUENCES)).sum(), last=True)
        norms.append(engine.update(0.0))
        monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    assert norms[0] == norms[1]


def test_an_update_leaves_no_gradient_for_the_next_step(tiny_model: Path) -> None:
    norms = []
    engine = tiny_engine(tiny_model)
    for _ in range(2):
        engine.accumulate(-engine.score(sequence_batch(SEQUENCES)).sum(), last=True)
        norms.append(engine.update(0.0))  # a learning rate of 0: the same gradient again
    assert norms[0] == norms[1]


def test_scoring_alone_builds_no_graph(tiny_model: Path) -> None:
    engine = tiny_engine(tiny_model)
    batch = sequence_batch(SEQUENCES)
    assert engine.score(batch).requires_grad
    assert not engine.score_only(batch).requires_grad
    assert torch.equal(engine.score_only(batch), engine.score(batch).detach())


def test_exported_weights_have_the_models_own_names_and_the_compute_type(tiny_model: Path) -> None:
    engine = tiny_engine(tiny_model)
    bare = load_model(ModelConfig(name_or_path=str(tiny_model), dtype="float32")).state_dict()
    found = engine.weights()
    assert found.keys() == bare.keys()
    assert all(torch.equal(found[name], bare[name]) for name in bare)


def test_weights_that_authors_freeze_are_exported_too(tiny_model: Path) -> None:
    model = ModelConfig(name_or_path=str(tiny_model), dtype="float32")
    loaded = load_model(model)
    loaded.transformer.wpe.weight.requires_grad_(False)  # as HRM-Text's first state
    engine = Engine(world.start(model), loaded, model, OptimizationConfig())
    engine.accumulate(-engine.score(sequence_batch(SEQUENCES)).sum(), last=True)
    engine.update(0.01)
    found = engine.weights()
    assert found.keys() == loaded.state_dict().keys()
    assert all(torch.equal(found[name], weight) for name, weight in loaded.state_dict().items())


def test_what_authors_keep_in_float32_is_exported_in_it(tiny_model: Path) -> None:
    engine = tiny_engine(tiny_model)
    engine._dtype = torch.bfloat16  # a process has one compute type
    engine.model._keep_in_fp32_modules_strict = {"ln_f", "h.*.ln_1.bias"}
    wide = {name for name, weight in engine.weights().items() if weight.dtype == torch.float32}
    assert wide == {
        f"transformer.{n}" for n in ("ln_f.weight", "ln_f.bias", "h.0.ln_1.bias", "h.1.ln_1.bias")
    }


@pytest.mark.parametrize("checkpointing", [False, True])
def test_what_models_do_at_random_in_training_never_happens(tiny_model: Path, checkpointing: bool) -> None:
    """PhiMoE draws its experts in training mode; only what recomputes activations is in that mode."""

    class Drawing(torch.nn.Module):
        def forward(self, hidden: torch.Tensor) -> torch.Tensor:
            return hidden + torch.rand_like(hidden) * self.training

    config = ModelConfig(name_or_path=str(tiny_model), dtype="float32", gradient_checkpointing=checkpointing)
    model = load_model(config)
    model.transformer.h[0].mlp = torch.nn.Sequential(model.transformer.h[0].mlp, Drawing())
    engine = Engine(world.start(config), model, config, OptimizationConfig())
    for _ in range(2):
        first, second = (engine.score(sequence_batch(SEQUENCES)) for _ in range(2))
        assert torch.equal(first, second)
        with engine.sampling_model() as sampled:
            assert not any(module.training for module in sampled.modules())
    assert {type(m).__name__ for m in model.modules() if m.training} == (
        {"GPT2Block", "GPT2Model"} if checkpointing else set()
    )


@pytest.mark.parametrize("copied", [False, True])
def test_saved_state_comes_back_also_when_training_went_on_before_it_was_written(
    tiny_model: Path, tmp_path: Path, copied: bool
) -> None:
    def step(engine: Engine) -> float:
        engine.accumulate(-engine.score(sequence_batch(SEQUENCES)).sum(), last=True)
        return engine.update(0.01)

    first = tiny_engine(tiny_model)
    step(first)
    write = first.save(tmp_path, copied=copied)
    if not copied:
        write()
    # Two more steps: the second of them shows whether the optimizer's state came along.
    norms = [step(first), step(first)]
    if copied:
        write()
    second = tiny_engine(tiny_model)
    second.load(tmp_path)
    assert norms == [step(second), step(second)]
    for name, weight in first.weights().items():
        assert torch.equal(weight, second.weights()[name])


def test_gradient_checkpointing_changes_no_gradient(tiny_model: Path) -> None:
    norms = []
    kinds: list[Any] = [False, True, "full", "selective"]
    for checkpointing in kinds:
        model = ModelConfig(
            name_or_path=str(tiny_model), dtype="float32", gradient_checkpointing=checkpointing
        )
        engine = Engine(world.start(model), load_model(model), model, OptimizationConfig())
        engine.accumulate(-engine.score(sequence_batch(SEQUENCES)).sum(), last=True)
        norms.append(engine.update(0.01))
        assert engine.model.is_activation_checkpointing is bool(checkpointing)
    assert norms == pytest.approx([norms[0]] * len(kinds), rel=1e-6)


def test_flex_attention_cannot_train_on_a_cpu_and_says_what_to_do(tiny_model: Path) -> None:
    config = ModelConfig(name_or_path=str(tiny_model), dtype="float32", attention="flex")
    with pytest.raises(UserError, match=r"model\.attention: flex; .* no backward pass on CPUs"):
        Engine(world.start(config), load_model(config), config, OptimizationConfig())


@pytest.mark.filterwarnings(
    "ignore:.*torch.jit.*:DeprecationWarning", "ignore:The .grad attribute:UserWarning"
)
def test_a_compiled_policy_resumes_with_the_same_bits(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiled, "BACKEND", "aot_eager")
    config = ModelConfig(name_or_path=str(tiny_model), dtype="float32", compile=True)

    def made() -> Engine:
        torch._dynamo.reset()  # as in a new process
        engine = Engine(world.start(config), load_model(config), config, OptimizationConfig())
        assert engine.settle_layout(trees_of((SEQUENCES[0][0], [ids for _, ids in SEQUENCES]))).notes == ()
        return engine

    def step(engine: Engine, number: int) -> float:
        engine.accumulate(-engine.score(sequence_batch(SEQUENCES[: number + 1])).sum(), last=True)
        return engine.update(0.01)

    first = made()
    step(first, 0)
    first.save(tmp_path)()
    norms = [step(first, 1), step(first, 2)]
    second = made()
    second.load(tmp_path)
    assert [step(second, 1), step(second, 2)] == norms
    plain = tiny_engine(tiny_model)
    assert [step(plain, number) for number in range(3)][1:] == pytest.approx(norms, rel=1e-4)
    assert first.weights().keys() == plain.weights().keys()
