"""Preference data from a policy's own continuations: sampled for each prompt, scored, and paired by score.

Runs as one process or under `accelerate launch`: sampling and scoring are spread over the ranks; rank 0 cuts
the prompts and writes the files. The samples do not depend on the number of ranks.
"""

import argparse
from collections import Counter
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from data_prep import samplers
from data_prep.files import PreferenceWriter, describe_arguments, describe_file
from data_prep.pairs import Groups, Texts, delta_groups, scored_groups, with_balanced_lengths
from data_prep.prompts import (
    Prompt,
    is_preference_folder,
    read_documents,
    ready_prompts,
    text_prompts,
)
from data_prep.samplers import SAMPLERS
from data_prep.splits import part_of
from dpo.config import ModelConfig
from dpo.data.fields import RowError
from dpo.data.pairing import DEFAULT_PAIRING, PAIRING_RULES
from dpo.data.records import TokenIds
from dpo.errors import UserError

if TYPE_CHECKING:  # torch and transformers take seconds to import, and `--help` must not
    from transformers import PreTrainedTokenizerBase

SUMMARY = (
    "Continuations sampled from a policy: that with the better score, or of the better model, is chosen."
)
NUM_PROMPTS = 1000
MINIMA = {
    "num_prompts": 1,
    "num_test_prompts": 0,
    "prompt_tokens": 1,
    "num_samples": 1,
    "completion_tokens": 1,
    "temperature": 0.01,
    "batch_size": 1,
    "min_margin": 0,
    "seed": 0,
    **samplers.MINIMA,
}

PromptIds = tuple[Prompt, tuple[TokenIds, ...]]
"""A prompt, and its token ids for each model."""


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
    add(
        "--rejected_model",
        metavar="MODEL",
        help="pair each continuation of --model, chosen, with one of this weaker model, rejected, instead of "
        "by score (arXiv 2507.06187)",
    )
    add(
        "--scorer",
        help="as evaluate.scorer: vader, hf:MODEL, ...; with --rejected_model it may be left out, else keeps "
        "the pairs whose chosen one scores higher",
    )
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
    add(
        "--balance_lengths",
        action="store_true",
        help="drop training pairs until the chosen one is as often longer, in characters, as it is shorter",
    )
    samplers.add_arguments(parser)


def run(args: argparse.Namespace) -> None:
    """Samples and scores on every rank; rank 0 writes the preference files. Raises UserError."""
    from dpo import distributed
    from dpo.evaluate.asked import Asked
    from dpo.evaluate.samples import texts_of
    from dpo.evaluate.scoring import load_scorer, score_over_ranks
    from dpo.model.files import check_model_path
    from dpo.model.tokenizer import load_tokenizer

    for name, minimum in MINIMA.items():
        value = getattr(args, name)
        if value is not None and not value >= minimum:
            raise UserError(f"--{name}: {value}; expected at least {minimum}")
    if args.fold and not is_preference_folder(args.input):
        raise UserError(
            "--fold: only prompts of a preference folder can be split into folds; give --num_test_prompts"
        )
    _check_pairing(args)
    samplers.check(args)
    names = [args.model, *([args.rejected_model] if args.rejected_model else [])]
    for name, option in zip(names, ("--model", "--rejected_model"), strict=False):
        check_model_path(name, option)
    distributed.start()
    models = [ModelConfig(name_or_path=name, dtype=args.dtype) for name in names]
    writer = _writer(args) if distributed.is_main() else None
    scorer = load_scorer(args.scorer) if args.scorer else None
    if writer is not None and scorer is not None and scorer.identity is not None:
        writer.describe(scorer_identity=scorer.identity)
    readers = [(model, load_tokenizer(model)) for model in models]
    prepared = distributed.from_main([] if writer is None else _prepare(args, readers, writer))
    prompts = [prompt for prompt, _ in prepared]
    texts = [
        SAMPLERS[args.sampler]([ids[index] for _, ids in prepared], model, tokenizer, args)
        for index, (model, tokenizer) in enumerate(readers)
    ]
    plain = texts_of([ids[0] for _, ids in prepared], readers[0][1])
    asked = [
        Asked(text, None if isinstance(prompt.content, str) else prompt.content)
        for prompt, text in zip(prompts, plain, strict=True)
        for _ in range(args.num_samples)
    ]
    flat = []
    if scorer is not None:
        flat = [score_over_ranks(scorer, asked, [*chain.from_iterable(by_model)]) for by_model in texts]
    if writer is None:
        return
    with writer:
        for prompt, group in _groups(prompts, texts, flat, args, writer.drops):
            writer.write(prompt.split, group)
    for name, scores in zip(names, flat, strict=False):
        assert scorer is not None
        by = f" by {name}" if len(names) > 1 else ""
        print(
            f"sampled {len(scores):,} continuations of {len(prompts):,} prompts{by}: mean score "
            f"{sum(scores) / len(scores):+.3f}, {sum(map(scorer.is_positive, scores)) / len(scores):.1%} "
            f"positive ({scorer.name})"
        )


def _check_pairing(args: argparse.Namespace) -> None:
    """Raises UserError where nothing says which continuation is preferred."""
    if args.rejected_model is None and args.num_samples < 2:
        raise UserError(f"--num_samples: {args.num_samples}; expected at least 2")
    if args.rejected_model is None and args.scorer is None:
        raise UserError("--scorer: none; expected one, such as vader, or --rejected_model")
    if args.rejected_model is not None and args.sampler == "endpoint" and args.serve is None:
        raise UserError(
            "--rejected_model: the server of --endpoint has one model; give --serve, or transformers"
        )
    if args.rejected_model is not None and args.pairing != DEFAULT_PAIRING:
        raise UserError(f"--pairing: {args.pairing}; with --rejected_model the models decide: leave it out")


def _groups(
    prompts: Sequence[Prompt],
    texts: Sequence[Texts],
    flat: Sequence[Sequence[float]],
    args: argparse.Namespace,
    drops: Counter[str],
) -> Groups:
    """The groups that are written."""
    number = args.num_samples
    scores = [[one[start : start + number] for start in range(0, len(one), number)] for one in flat]
    if args.rejected_model is None:
        groups = scored_groups(
            prompts,
            texts[0],
            scores[0],
            pairing=args.pairing,
            min_margin=args.min_margin,
            only_finished=args.only_finished,
            drops=drops,
        )
    else:
        both = (scores[0], scores[1]) if scores else None
        groups = delta_groups(prompts, texts[0], texts[1], both, min_margin=args.min_margin, drops=drops)
    return with_balanced_lengths(groups, args.seed, drops) if args.balance_lengths else groups


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
    readers: Sequence[tuple[ModelConfig, "PreTrainedTokenizerBase"]],
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
            readers[0][1],
            prompt_tokens=args.prompt_tokens,
            num_prompts=num_train,
            num_test_prompts=num_test,
            seed=args.seed,
        )
    train = [prompt for prompt in prompts if prompt.split == "train"]
    test = [prompt for prompt in prompts if prompt.split == "test" and not args.train_only]
    if args.part is not None:
        if len(train) < args.part.of:  # said in the first round, not after the others have been trained
            raise UserError(
                f"--part: {args.part.of} parts of {len(train)} training prompts; each part, a round of dpo "
                "rounds, needs at least one: give more prompts, or fewer rounds"
            )
        train = train[args.part.number - 1 :: args.part.of]
    limits = [max_positions(model) for model, _ in readers]
    room = min((limit for limit in limits if limit is not None), default=None)
    prepared: list[PromptIds] = []
    for prompt in [*train, *test]:
        try:
            ids = [encode_prompt(prompt.content, tokenizer, key="--model") for _, tokenizer in readers]
        except RowError as fault:
            writer.notes.drop(fault.reason, f"a prompt: {fault}")
            continue
        if room is not None and max(map(len, ids)) + args.completion_tokens > room:
            writer.drops["prompt_too_long"] += 1
        else:
            prepared.append((prompt, tuple(np.asarray(one, dtype=np.int32) for one in ids)))
    if not prepared:
        raise UserError(
            f"input: no prompt of {args.input} leaves room for {args.completion_tokens} tokens within the "
            f"{room} positions of the model; dropped: {dict(writer.drops) or 'nothing'}"
        )
    return prepared
