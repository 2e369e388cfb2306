"""A reference that is a PEFT adapter on a base: loaded by transformers and peft, never trained here."""

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from dpo.cli.main import run
from dpo.config import ModelConfig
from dpo.errors import UserError
from dpo.model import load as load_module
from dpo.model.files import adapter_files, base_of, num_parameters
from dpo.model.load import load_model

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning:transformers")  # peft asks it by an old name
IDS = torch.tensor([[5, 6, 7, 8]])


@pytest.fixture
def adapter(tiny_model: Path, tmp_path: Path) -> Path:
    torch.manual_seed(1)
    options = LoraConfig(
        r=4, target_modules=["c_attn"], init_lora_weights=False, task_type="CAUSAL_LM", fan_in_fan_out=True
    )
    base = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    get_peft_model(base, options).save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def test_an_adapter_loads_on_its_base(adapter: Path, tiny_model: Path) -> None:
    base = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    plain = base(IDS).logits.detach().clone()
    expected = PeftModel.from_pretrained(base, adapter)(IDS).logits
    logits = load_model(ModelConfig(name_or_path=str(adapter), dtype="float32"))(IDS).logits
    torch.testing.assert_close(logits, expected)
    assert (logits - plain).abs().max() > 0.1


def test_the_adapters_base_and_files_are_found(adapter: Path, tiny_model: Path) -> None:
    model, base = ModelConfig(name_or_path=str(adapter)), ModelConfig(name_or_path=str(tiny_model))
    assert base_of(model) == base
    assert base_of(base) == base
    assert [path.name for path in adapter_files(model)] == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    assert adapter_files(base) == []
    assert num_parameters(model) == num_parameters(base) > 0


def test_an_adapter_that_names_no_base_is_refused(adapter: Path) -> None:
    (adapter / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match="names no base model"):
        base_of(ModelConfig(name_or_path=str(adapter)))


def test_without_peft_an_adapter_is_refused_with_what_to_do(
    adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(load_module, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install peft"):
        load_model(ModelConfig(name_or_path=str(adapter)))


def test_an_adapter_is_not_trained(
    adapter: Path, pairs_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--model.name_or_path", str(adapter), "--data.train", str(pairs_file)]
    assert run(["check", "train", *arguments, "--run_dir", str(tmp_path / "run")]) == 2
    assert "is a PEFT adapter, and training does not go on with one" in capsys.readouterr().err


def test_the_number_of_parameters_is_that_of_the_loaded_model(tiny_model: Path) -> None:
    model = ModelConfig(name_or_path=str(tiny_model), dtype="float32")
    assert num_parameters(model) == load_model(model).num_parameters()
