"""A tiny reward model, trained on pairs with transformers alone."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch.nn.functional import logsigmoid
from transformers import AutoTokenizer, GPT2Config, GPT2ForSequenceClassification

TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
Dialogues = Sequence[tuple[str, str, str]]
"""Prompt, chosen, rejected."""


def train_reward_model(folder: Path, tokenizer_of: Path, pairs: Dialogues, *, steps: int) -> Path:
    """Fits -log sigmoid(r(chosen) - r(rejected)) on all pairs at once, and saves model and tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_of)
    tokenizer.chat_template, tokenizer.pad_token = TEMPLATE, tokenizer.eos_token
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=len(tokenizer),
        n_positions=64,
        n_embd=32,
        n_layer=2,
        n_head=2,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        num_labels=1,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = GPT2ForSequenceClassification(config)
    texts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}], tokenize=False
        )
        for prompt, *answers in pairs
        for answer in answers
    ]
    inputs = tokenizer(texts, padding=True, padding_side="right", return_tensors="pt")
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(steps):
        rewards = model(**inputs).logits[:, 0]
        loss = -logsigmoid(rewards[0::2] - rewards[1::2]).mean()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
