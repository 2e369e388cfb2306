"""Preference data from a policy's own continuations: sampled for each prompt, scored, and paired by score.

Runs as one process or under `accelerate launch`: sampling and scoring are spread over the ranks; rank 0 cuts
the prompts and writes the files. The samples do not depend on the number of ranks.
"""

import argparse
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from data_prep.files import PreferenceWriter, describe_arguments, describe_file
from data_prep.prompts import (
    Prompt,
    is_preference_folder,
    read_documents,
    ready_prompts,
    text_prompts,
)
from data_prep.splits import part_of
from dpo.config import ModelConfig
from dpo.data.fields import RowError
from dpo.data.pairing import PAIRING_RULES, pairs_from_scores
from dpo.data.records import PreferenceGroup, TokenIds
from dpo.errors import UserError

if TYPE_CHECKING:  # torch and transformers take seconds to import, and `--help` must not
    from transformers import PreTrainedTokenizerBase

SUMMARY = "Continuations sampled from a policy and scored: the one with the better score is preferred."
NUM_PROMPTS = 1000
MINIMA = {
    "num_prompts": 1,
    "num_test_prompts": 0,
    "prompt_tokens": 1,
    "num_samples": 2,
    "completion_tokens": 1,
    "temperature": 0.01,
    "batch_size": 1,
    "min_margin": 0,
    "seed": 0,
}

PromptIds = tuple[Prompt, TokenIds]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of this source."""
    add = parser.add_argument
    add(
        "input",
        metavar="INPUT",
        help="source of the prompts: a .txt, .txt.gz or .txt.xz file (one paragraph per line, an empty line "
        "between documents), a folder of such, a data set with a column `text` (.jsonl, .parquet, a hub "
        "name), or a preference folder, whose prompts and splits are kept",
    )
    add("--model", required=True, help="the policy that is sampled: a folder or a hub name")
    add(
        "--dtype",
        choices=("float32", "bfloat16"),
        default="bfloat16",
        help="compute dtype of the policy (default: bfloat16)",
    )
    add("--scorer", required=True, help="as evaluate.scorer: vader, hf:MODEL, ...")
    add(
        "--num_prompts",
        type=int,
        help=f"training prompts (default: {NUM_PROMPTS} from text, all of a preference folder)",
    )
    add(
        "--num_test_prompts",
        type=int,
        help="held-out prompts (default: test_fraction of num_prompts from text, all of a preference folder)",
    )
    add(
        "--part",
        type=part_of,
        metavar="K/N",
        help="only the K-th of N equal parts of the training prompts: the others are for other rounds",
    )
    add(
        "--train_only",
        action="store_true",
        help="hold out the same prompts, and do not sample them: they are in the folder of another round",
    )
    add(
        "--only_finished",
        action="store_true",
        help="leave out continuations that were cut at their longest length, and let EOS follow the others",
    )
    add("--prompt_tokens", type=int, default=64, help="length of a prompt from text, in tokens (default: 64)")
    add("--num_samples", type=int, default=4, help="continuations of each prompt (default: 4)")
    add("--completion_tokens", type=int, default=24, help="longest continuation, in tokens (default: 24)")
    add("--temperature", type=float, default=0.7, help="sampling temperature (default: 0.7)")
    add("--batch_size", type=int, default=64, help="sequences that a rank samples at once (default: 64)")
    add("--pairing", choices=PAIRING_RULES, default="best-vs-rest", help="how scores become pairs")
    add("--min_margin", type=float, default=0.0, help="scores that differ by no more make no pair")


def run(args: argparse.Namespace) -> None:
    """Samples and scores on every rank; rank 0 writes the preference files. Raises UserError."""
    from dpo import distributed
    from dpo.evaluate.samples import texts_of
    from dpo.evaluate.scoring import load_scorer, score_over_ranks
    from dpo.model.files import check_model_path
    from dpo.model.load import load_tokenizer

    for name, minimum in MINIMA.items():
        value = getattr(args, name)
        if value is not None and not value >= minimum:
            raise UserError(f"--{name}: {value}; expected at least {minimum}")
    if args.fold and not is_preference_folder(args.input):
        raise UserError(
            "--fold: only prompts of a preference folder can be split into folds; give --num_test_prompts"
        )
    check_model_path(args.model, "--model")
    distributed.start()
    model = ModelConfig(name_or_path=args.model, dtype=args.dtype)
    writer = _writer(args) if distributed.is_main() else None
    scorer = load_scorer(args.scorer)
    tokenizer = load_tokenizer(model)
    prepared = distributed.from_main([] if writer is None else _prepare(args, model, tokenizer, writer))
    texts = _continue(prepared, model, tokenizer, args)
    asked = texts_of([ids for _, ids in prepared for _ in range(args.num_samples)], tokenizer)
    flat = score_over_ranks(scorer, asked, [text for samples in texts for text in samples])
    if writer is None:
        return
    scores = [flat[start : start + args.num_samples] for start in range(0, len(flat), args.num_samples)]
    with writer:
        prompts = [prompt for prompt, _ in prepared]
        for prompt, group in _groups(prompts, texts, scores, args, writer.drops):
            writer.write(prompt.split, group)
    positive = sum(map(scorer.is_positive, flat)) / len(flat)
    print(
        f"sampled {len(flat):,} continuations of {len(prompts):,} prompts: "
        f"mean score {sum(flat) / len(flat):+.3f}, {positive:.1%} positive ({scorer.name})"
    )


def _writer(args: argparse.Namespace) -> PreferenceWriter:
    from dpo.data.text import text_files

    writer = PreferenceWriter(
        args.output,
        overwrite=args.overwrite,
        completions_are_complete=args.only_finished,
        source=describe_arguments(args),
    )
    path = Path(args.input)
    files = sorted(path.glob("*.parquet")) if is_preference_folder(args.input) else text_files(path)
    writer.sources.extend(describe_file(file) for file in files if file.is_file())
    return writer


def _prepare(
    args: argparse.Namespace,
    model: ModelConfig,
    tokenizer: "PreTrainedTokenizerBase",
    writer: PreferenceWriter,
) -> list[PromptIds]:
    """The prompts with their token ids, without those that leave no room for a continuation."""
    from dpo.data.tokenize import encode_prompt
    from dpo.model.files import max_positions

    if is_preference_folder(args.input):
        prompts = ready_prompts(args, writer.notes)
    else:
        num_train = args.num_prompts or NUM_PROMPTS
        num_test = args.num_test_prompts
        if num_test is None:
            num_test = round(args.test_fraction * num_train)
        prompts = text_prompts(
            read_documents(args.input, max_rows=args.max_rows, num_prompts=num_train + num_test),
            tokenizer,
            prompt_tokens=args.prompt_tokens,
            num_prompts=num_train,
            num_test_prompts=num_test,
            seed=args.seed,
        )
    train = [prompt for prompt in prompts if prompt.split == "train"]
    test = [prompt for prompt in prompts if prompt.split == "test" and not args.train_only]
    if args.part is not None:
        own = train[args.part.number - 1 :: args.part.of]
        if not own:
            raise UserError(f"--part: {args.part.of} parts of {len(train)} training prompts; give fewer")
        train = own
    positions = max_positions(model)
    prepared = []
    for prompt in [*train, *test]:
        try:
            ids = encode_prompt(prompt.content, tokenizer, key="--model")
        except RowError as fault:
            writer.notes.drop(fault.reason, f"a prompt: {fault}")
            continue
        if positions is not None and len(ids) + args.completion_tokens > positions:
            writer.drops["prompt_too_long"] += 1
        else:
            prepared.append((prompt, np.asarray(ids, dtype=np.int32)))
    if not prepared:
        raise UserError(
            f"input: no prompt of {args.input} leaves room for {args.completion_tokens} tokens within the "
            f"{positions} positions of {args.model}; dropped: {dict(writer.drops) or 'nothing'}"
        )
    return prepared


def _continue(
    prepared: Sequence[PromptIds],
    model: ModelConfig,
    tokenizer: "PreTrainedTokenizerBase",
    args: argparse.Namespace,
) -> list[list[str]]:
    """`num_samples` continuations of each prompt as text, on every rank; blank is one that is left out."""
    from dpo import distributed
    from dpo.evaluate.sampling import sample, stop_ids_of
    from dpo.model.load import load_model

    policy = load_model(model)
    policy.to(distributed.device())  # type: ignore[arg-type]
    samples = sample(
        policy,
        [ids for _, ids in prepared],
        num_samples=args.num_samples,
        max_new_tokens=args.completion_tokens,
        temperature=args.temperature,
        seed=args.seed,
        batch_size=args.batch_size,
        stop_ids=stop_ids_of(policy, tokenizer),
        progress="sample",
    )
    return [
        [
            str(tokenizer.decode(one.ids, skip_special_tokens=True))
            if one.finished or not args.only_finished
            else ""
            for one in several
        ]
        for several in samples
    ]


def _groups(
    prompts: Sequence[Prompt],
    texts: Sequence[Sequence[str]],
    scores: Sequence[Sequence[float]],
    args: argparse.Namespace,
    drops: Counter[str],
) -> Iterator[tuple[Prompt, PreferenceGroup]]:
    """The groups with a preference; identical continuations are merged, blank ones dropped."""
    for number, prompt in enumerate(prompts):
        scored = [pair for pair in zip(texts[number], scores[number], strict=True) if pair[0].strip()]
        score_of = dict(scored)
        pairs = pairs_from_scores(list(score_of.values()), args.pairing, args.min_margin) if score_of else ()
        if not pairs:
            few = "identical_continuations"
            if args.only_finished and sum(1 for text in texts[number] if text.strip()) < 2:
                few = "too_few_finished_continuations"
            drops[few if len(score_of) < 2 else "no_pair_above_margin"] += 1
            continue
        yield (
            prompt,
            PreferenceGroup(
                prompt=prompt.content,
                completions=tuple(score_of),
                pairs=pairs,
                scores=tuple(score_of.values()),
                reference_scores=tuple(score for _, score in scored),  # as often as they were drawn
                id=f"{prompt.split}-{number}",
            ),
        )
