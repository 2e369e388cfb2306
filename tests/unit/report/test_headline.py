"""The headline: what is shown for which metrics, as cards and as lines."""

from typing import Any

from dpo.report.headline import headline, headline_cards

PAIRS = {"eval/loss": 0.5, "eval/rewards/accuracies": 0.9}
PAIRS |= {"eval/rewards/accuracies/low": 0.85, "eval/rewards/accuracies/high": 0.95}
KL: dict[str, Any] = {"kl/sequence": 2.0, "kl/sequence/low": 1.5, "kl/sequence/high": 2.5}
KL |= {"distinct_2/reference": 0.8, "distinct_2/policy": 0.6, "perplexity/policy_samples": 12.5}
KL |= {"distinct_texts/reference": 1.0, "distinct_texts/policy": 0.75}
SCORES = {"positive_share/reference": 0.25, "positive_share/policy": 0.75, "win_rate": 0.8}


def test_cards_show_what_was_measured() -> None:
    assert headline_cards({"eval/loss": 0.5}) == []
    assert [card.answer for card in headline_cards(PAIRS)] == ["90.0%"]
    answers = [card.answer for card in headline_cards(PAIRS | SCORES | KL)]
    assert answers == ["90.0%", "25% → 75%", "2.00 nats", "0.80 → 0.60"]


def test_lines_show_what_was_measured() -> None:
    assert headline(PAIRS) == "held-out loss 0.5000, reward accuracy 0.900 [0.850, 0.950]"
    lines = headline(PAIRS | SCORES | KL).splitlines()
    assert lines[1] == "scored positive: reference 25.0%, policy 75.0%; win rate 80.0%"
    assert lines[2].startswith("KL(policy || reference) 2.00 [1.50, 2.50] nats per sequence")
    assert len(headline(PAIRS | KL).splitlines()) == 2


def test_shares_name_their_number_and_few_prompts_are_warned_of() -> None:
    counts = {"eval/num_pairs": 12.0, "eval/num_prompts": 6.0, "samples/num_prompts": 64.0}
    lines = headline(PAIRS | SCORES | KL | counts).splitlines()
    assert lines[0].endswith("reward accuracy 0.900 [0.850, 0.950] of 12 pairs")
    assert lines[1].endswith("win rate 80.0% of 64 prompts")
    assert lines[-1].startswith("only 6 prompts: the intervals are rough")
    assert "of 12 pairs ranked correctly" in headline_cards(PAIRS | counts)[0].detail
    assert "rough" not in headline(PAIRS | KL | counts | {"eval/num_prompts": 50.0})


def test_a_kl_below_zero_is_explained() -> None:
    below = {"kl/sequence": -0.1, "kl/sequence/low": -0.3, "kl/sequence/high": 0.1}
    assert "never below 0" in headline(PAIRS | KL | below)
    assert "never below 0" in headline_cards(PAIRS | KL | below)[1].detail
    assert "never below 0" not in headline(PAIRS | KL)
