"""What `load_model` and `load_tokenizer` refuse, adapters on their base, and dropout removed everywhere."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, LlamaConfig, PretrainedConfig
from unit.model.local_model import Edited, model_config

from dpo.config import ModelConfig
from dpo.errors import UserError
from dpo.model import adapter as adapter_module
from dpo.model.authors import remove_noise
from dpo.model.files import adapter_files, base_of, num_parameters, raw_config
from dpo.model.load import load_model
from dpo.model.lora import check_policy
from dpo.model.tokenizer import load_tokenizer

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning:transformers")  # peft calls it by an old name
IDS = torch.tensor([[5, 6, 7, 8]])


def test_a_model_is_loaded_on_the_cpu_without_dropout_in_evaluation_mode(tiny_model: Path) -> None:
    assert raw_config(model_config(tiny_model))["resid_pdrop"] == 0.1
    model = load_model(model_config(tiny_model))
    assert not model.training
    dropouts = [module.p for module in model.modules() if isinstance(module, torch.nn.Dropout)]
    assert dropouts
    assert set(dropouts) == {0.0}
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert {parameter.device.type for parameter in model.parameters()} == {"cpu"}


def test_the_weights_have_the_requested_dtype(tiny_model: Path) -> None:
    config = ModelConfig(name_or_path=str(tiny_model))
    assert load_model(config).dtype == torch.bfloat16
    assert load_model(config, dtype=torch.float32).dtype == torch.float32


def without_a_weight(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights["transformer.ln_f.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def test_a_missing_weight_is_an_error_and_never_random(edited: Edited) -> None:
    with pytest.raises(UserError, match=r"model\.name_or_path: .*transformer\.ln_f\.weight"):
        load_model(edited(without_a_weight))


@pytest.mark.parametrize(
    "change",
    [
        lambda folder: (folder / "model.safetensors").unlink(),
        lambda folder: (folder / "model.safetensors").write_bytes(b"cut off"),
        lambda folder: (folder / "config.json").write_text("{"),
        lambda folder: (folder / "config.json").write_text('{"model_type": "no_such_type"}'),
        lambda folder: (folder / "config.json").write_text('{"model_type": "t5"}'),
    ],
    ids=["no weights", "damaged weights", "broken config", "unknown type", "not a causal model"],
)
def test_what_cannot_be_loaded_is_refused(edited: Edited, change: Callable[[Path], Any]) -> None:
    with pytest.raises(UserError, match=r"model\.name_or_path: .*edited"):
        load_model(edited(change))


def test_a_folder_with_a_tokenizer_alone_has_it(tiny_model: Path, tmp_path: Path) -> None:
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(tmp_path)
    assert not (tmp_path / "config.json").exists()
    assert load_tokenizer(ModelConfig(name_or_path=str(tmp_path))).vocab_size > 0


def test_a_folder_without_a_tokenizer_is_refused(edited: Edited) -> None:
    def remove(folder: Path) -> None:
        for path in folder.glob("tokenizer*"):
            path.unlink()

    with pytest.raises(UserError, match=r"model\.name_or_path: .*tokenizer"):
        load_tokenizer(edited(remove))


def test_a_tokenizer_needs_eos_and_pads_with_it_where_it_has_no_padding(
    edited: Edited, tiny_model: Path
) -> None:
    tokenizer = load_tokenizer(model_config(tiny_model))
    assert tokenizer.pad_token_id == tokenizer.eos_token_id is not None

    def without_eos(folder: Path) -> None:
        file = folder / "tokenizer_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"eos_token": None}))

    with pytest.raises(UserError, match=r"model\.name_or_path: .*EOS"):
        load_tokenizer(edited(without_eos))


def test_every_dropout_rate_is_removed_whatever_its_name_nested_configs_included() -> None:
    class Nested(PretrainedConfig):
        pass

    config = GPT2Config(embd_pdrop=0.1, attn_pdrop=0.2, resid_pdrop=0.3, summary_first_dropout=0.4)
    rates = ("hidden_dropout_prob", "attention_dropout", "layerdrop", "resid_dropout", "ffn_dropout_rate")
    for name in rates:
        setattr(config, name, 0.25)
    config.inner = Nested()
    config.inner.attention_probs_dropout_prob = 0.5
    config.layer_norm_epsilon, config.dropout_schedule_name = 0.125, "cosine"
    remove_noise(config)
    for name in (*rates, "embd_pdrop", "attn_pdrop", "resid_pdrop", "summary_first_dropout"):
        assert getattr(config, name) == 0.0
    assert config.inner.attention_probs_dropout_prob == 0.0
    assert (config.layer_norm_epsilon, config.dropout_schedule_name) == (0.125, "cosine")


def test_removing_dropout_changes_nothing_else() -> None:
    before, config = LlamaConfig(attention_dropout=0.1).to_dict(), LlamaConfig(attention_dropout=0.1)
    remove_noise(config)
    assert config.to_dict() == before | {"attention_dropout": 0.0}


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


def test_without_peft_an_adapter_is_refused(adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adapter_module, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install peft"):
        load_model(ModelConfig(name_or_path=str(adapter)))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"model_type": "t5"}, "is a t5, of which transformers has no causal language model"),
        (
            {"quantization_config": {"quant_method": "gptq", "bits": 4}},
            "has quantized weights: .*pip install",
        ),
    ],
)
def test_what_has_no_causal_class_or_lacks_a_package_is_refused_by_its_config(
    edited: Edited, change: dict[str, Any], said: str
) -> None:
    def rewrite(folder: Path) -> None:
        file = folder / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | change))

    with pytest.raises(UserError, match=rf"model\.name_or_path: .*edited {said}"):
        check_policy(edited(rewrite), local=True)
