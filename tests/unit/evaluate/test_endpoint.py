"""Sampling by a server: what it is asked, that another model is noticed, and answers that are cut.

The fake server holds a tiny model of ours, which it asks for the next token.
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fake_server import FakeServer, fails, serving
from tiny import make_tiny_model
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from dpo.errors import UserError
from dpo.evaluate.endpoint import Endpoint, check_model, connect, known_next, sample_endpoint, text_prompt
from dpo.evaluate.server import server_at

PROMPTS = ("the cat sat", "a good day", "we like films on the mat", "a bad")


class Rig:
    """A model, and a server with a model that may be another one."""

    def __init__(self, folder: Path) -> None:
        self.model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder).eval()
        self.tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder)
        self.prompts = [np.asarray(self.tokenizer(text).input_ids, np.int32) for text in PROMPTS]
        self.served = self.model
        self.chat_layout = self.text_alone = False
        self.fake = FakeServer(answer=self.answer)

    def answer(self, body: Mapping[str, Any]) -> Any:
        prompt = body["prompt"]
        if self.text_alone and not isinstance(prompt, str):
            raise ValueError("prompt: expected a string")
        ids = prompt if isinstance(prompt, list) else self.tokenizer(prompt).input_ids
        with torch.no_grad():
            logps = self.served(torch.tensor([ids])).logits[0, -1].log_softmax(-1)
        best = int(logps.argmax())
        text, logp = self.tokenizer.decode([best]), float(logps[best])
        logprobs: Any = {"tokens": [text], "token_logprobs": [logp]}
        if self.chat_layout:
            logprobs = {"content": [{"token": text, "logprob": logp}]}
        return {
            "choices": [{"text": text, "finish_reason": "stop", "logprobs": logprobs}],
            "usage": {"completion_tokens": 1},
        }

    def connect(self, name: str | None = None, **options: Any) -> Endpoint:
        server = server_at(self.fake.url, "--endpoint", first_wait=0.01, tries=2, **options)
        return connect(server, name, self.tokenizer, vocabulary=300, stop_ids=[0])

    def sample(self) -> list[list[tuple[str, bool]]]:
        drawn = sample_endpoint(
            self.connect(), self.prompts, num_samples=3, max_new_tokens=8, temperature=0.7, seed=5
        )
        return [[tuple(one) for one in several] for several in drawn]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def rig(folder: Path) -> Iterator[Rig]:
    made = Rig(folder)
    with serving(made.fake):
        yield made


def test_the_same_model_is_accepted(rig: Rig) -> None:
    known = known_next(rig.model, rig.tokenizer, rig.prompts)
    assert len(known) >= 8
    check_model(rig.connect(), known, 1e-4)
    rig.chat_layout = True
    check_model(rig.connect(), known, 1e-4)


def test_another_model_is_refused_also_one_that_is_close(rig: Rig) -> None:
    known = known_next(rig.model, rig.tokenizer, rig.prompts)
    rig.served = AutoModelForCausalLM.from_config(rig.model.config).eval()
    with pytest.raises(UserError, match=r"is not the one of --model: its log-probs differ by mean \d"):
        check_model(rig.connect(), known, 0.1)
    rig.served = AutoModelForCausalLM.from_config(rig.model.config).eval()
    rig.served.load_state_dict(rig.model.state_dict())
    with torch.no_grad():
        rig.served.transformer.ln_f.weight.mul_(1.1)
    with pytest.raises(UserError, match=r"expected a mean of at most 0\.01"):
        check_model(rig.connect(), known, 0.01)


def test_another_tokenizer_is_noticed_where_prompts_go_as_text(rig: Rig) -> None:
    known = known_next(rig.model, rig.tokenizer, rig.prompts)
    rig.text_alone = True
    endpoint = rig.connect()
    assert not endpoint.takes_ids
    assert [type(body["prompt"]) for body in rig.fake.asked] == [list, str, list]  # no waiting for a 500
    check_model(endpoint, known, 1e-4)
    assert {type(body["prompt"]) for body in rig.fake.asked[3:]} == {str}
    plain, rig.tokenizer = rig.tokenizer, _Shifted(rig.tokenizer)  # type: ignore[assignment]
    with pytest.raises(UserError, match="is not the one of --model"):
        check_model(replace(endpoint, tokenizer=plain), known, 0.1)


class _Shifted:
    def __init__(self, inner: PreTrainedTokenizerBase) -> None:
        self._inner = inner

    def __call__(self, text: str) -> Any:
        return self._inner("a" + text)

    def decode(self, ids: list[int]) -> str:
        return str(self._inner.decode(ids))


def test_a_server_that_is_not_well_for_a_moment_still_gets_token_ids(rig: Rig) -> None:
    rig.fake.faults.append(fails(503, "loading"))
    assert rig.connect().takes_ids


def test_a_server_without_log_probs_cannot_be_checked(rig: Rig) -> None:
    known = known_next(rig.model, rig.tokenizer, rig.prompts)
    endpoint = rig.connect()
    rig.fake.answer = lambda _: {"choices": [{"text": "x", "finish_reason": "stop", "logprobs": None}]}
    with pytest.raises(UserError, match="an answer without log-probs, by which"):
        check_model(endpoint, known, 0.1)
    with pytest.raises(UserError, match="no prompt keeps its tokens"):
        check_model(endpoint, [], 0.1)


def test_the_model_has_its_name_there(rig: Rig) -> None:
    assert rig.connect().model == rig.connect("policy").model == "policy"
    with pytest.raises(UserError, match="has no model mine; it has policy"):
        rig.connect("mine")
    rig.fake.models = ["a", "b"]
    with pytest.raises(UserError, match="has the models a, b; name one of them"):
        rig.connect()


def test_samples_are_asked_for_from_the_whole_distribution_each_with_its_seed(rig: Rig) -> None:
    first = rig.sample()
    asked = rig.fake.asked[1:]
    assert [len(several) for several in first] == [3] * 4
    assert first[0][0][1] is True
    assert len({body["seed"] for body in asked}) == 12
    assert {(body["top_k"], body["top_p"], body["min_p"], body["temperature"]) for body in asked} == {
        (300, 1.0, 0.0, 0.7)
    }
    rig.fake.asked.clear()
    rig.sample()
    assert sorted(body["seed"] for body in rig.fake.asked[1:]) == sorted(body["seed"] for body in asked)


@pytest.mark.parametrize(
    ("reason", "tokens", "outcome"),
    [
        ("length", 8, False),
        ("length", None, False),
        ("stop", 3, True),
        ("length", 3, "cut a continuation after 3 tokens; expected up to 8"),
        ("abort", 3, "finish_reason 'abort'; expected stop or length, after 2 tries"),
        (None, 8, "finish_reason None"),
    ],
)
def test_an_answer_that_is_cut_is_an_error(
    rig: Rig, reason: str | None, tokens: int | None, outcome: bool | str
) -> None:
    rig.fake.answer = lambda _: {
        "choices": [{"text": "x", "finish_reason": reason}],
        "usage": {"completion_tokens": tokens},
    }
    if isinstance(outcome, bool):
        assert rig.sample()[0][0] == ("x", outcome)
        return
    with pytest.raises(UserError, match=outcome):
        rig.sample()


def test_a_text_prompt_has_no_bos_that_the_server_adds_again(rig: Rig) -> None:
    ids = rig.prompts[0]
    assert text_prompt(ids, rig.tokenizer) == PROMPTS[0]
    adds_bos: Any = AutoTokenizer.from_pretrained(rig.tokenizer.name_or_path)
    adds_bos.backend_tokenizer.post_processor = _bos_first(adds_bos)
    with_bos = np.asarray(adds_bos(PROMPTS[0]).input_ids, np.int32)
    assert len(with_bos) == len(ids) + 1
    assert text_prompt(with_bos, adds_bos) == PROMPTS[0]
    assert len(known_next(rig.model, adds_bos, [with_bos])) >= 2


def _bos_first(tokenizer: PreTrainedTokenizerBase) -> Any:
    from tokenizers.processors import TemplateProcessing

    return TemplateProcessing(
        single=f"{tokenizer.bos_token} $A", special_tokens=[(tokenizer.bos_token, tokenizer.bos_token_id)]
    )
