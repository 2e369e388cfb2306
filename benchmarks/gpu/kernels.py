"""The prepared run, part B: the speed and the noise of single pieces.

    python -m benchmarks.gpu.kernels [--rehearse]

The mask, attention in each layout, the output projection, a block without and with compilation, and how far
each layout's log-probs in bfloat16 are from rows alone.
"""

import sys
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import create_block_mask

from benchmarks.gpu.report import Report, device, options
from benchmarks.gpu.work import batch_of, configs, groups_of, peak_bytes, random_model, seconds_of
from dpo.data.key_blocks import key_blocks
from dpo.data.records import TokenizedGroup
from dpo.data.trees import Layout, Tree, TreeBatch, tree_batch
from dpo.model.attention import TreeAttention, dense_masks, mask_function, tree_attention
from dpo.model.projection import TokenLogProbs, kernels_on
from dpo.model.scorer import SequenceScorer


def main() -> int:
    """Runs every section and returns the exit status."""
    given = options("kernels", __doc__)
    report = Report("kernels", given.rehearse, given.output, given.seconds)
    report.section("mask", partial(mask, report))
    report.section("attention", partial(attention, report))
    report.section("projection", partial(projection, report))
    report.section("blocks", partial(blocks, report))
    report.section("noise", partial(noise, report))
    return report.finish()


def mask(report: Report) -> None:
    """FlexAttention's mask from lengths, against its own way."""
    for tokens in (512,) if report.rehearse else (16_384, 65_536):
        batch = batch_of(groups_of(tokens, 600), "flex", device())
        width = batch.input_ids.shape[1]
        report.number(
            f"blocks of {width:,} tokens on the host",
            1e3 * seconds_of(lambda b=batch, w=width: key_blocks(b.trees, w, None)),  # type: ignore[misc]
            "ms",
            high=20,
        )
        report.number(
            f"mask of {width:,} tokens on the device",
            1e3 * seconds_of(lambda b=batch: TreeAttention(batch=b).block_mask(None)),  # type: ignore[misc]
            "ms",
            high=5,
        )
        if tokens <= 16_384:
            visible = mask_function(batch, None)
            made = partial(create_block_mask, visible, None, None, width, width, device=device().type)
            report.number(f"create_block_mask of {width:,} tokens", 1e3 * seconds_of(made, repeats=1), "ms")
            report.number("its peak", peak_bytes(made) / 1e9, "GB", high=5)


def attention(report: Report) -> None:
    """One layer's attention, forward and backward, in the layouts of one row."""
    heads, key_heads, size, tokens = (4, 2, 16, 512) if report.rehearse else (32, 8, 64, 16_384)
    dtype = torch.bfloat16 if device().type == "cuda" else torch.float32
    groups, layer = groups_of(tokens, 600), _Layer(heads // key_heads)
    layouts: tuple[Layout, ...] = ("flex", "varlen", "packed")
    found: dict[str, float] = {}
    for layout in layouts:
        batch = batch_of(groups, layout, device())
        width = batch.input_ids.shape[1]
        with_gradient = layout != "flex" or device().type == "cuda"
        query, key, value = (
            torch.randn(1, number, width, size, dtype=dtype, device=device()).requires_grad_(with_gradient)
            for number in (heads, key_heads, key_heads)
        )
        run = partial(_one_layer, layer, query, key, value, batch)
        found[layout] = seconds_of(run)
        report.number(f"{layout}, {width:,} tokens, forward and backward", 1e3 * found[layout], "ms")
    dense = dense_attention(groups[: max(1, len(groups) // 4)], heads, size, dtype)
    report.number("a quarter of them under a dense mask", 1e3 * seconds_of(dense), "ms")
    report.number("packed over flex", found["packed"] / found["flex"], "x", low=2)
    report.number("varlen over flex", found["varlen"] / found["flex"], "x", high=2)


class _Layer(nn.Module):
    """What transformers' attention asks of a layer."""

    def __init__(self, queries_per_key: int) -> None:
        super().__init__()
        self.num_key_value_groups = queries_per_key


def _one_layer(layer: nn.Module, query: Tensor, key: Tensor, value: Tensor, batch: TreeBatch) -> None:
    outputs = tree_attention(layer, query, key, value, None, tree=TreeAttention(batch=batch))[0]
    if outputs.requires_grad:
        outputs.sum().backward()


def dense_attention(
    groups: Sequence[TokenizedGroup], heads: int, size: int, dtype: torch.dtype
) -> Callable[[], None]:
    """Attention of padded trees under an additive mask."""
    batch = batch_of(groups, "trees", device())
    config = next(iter(configs(rehearse=True).values()))
    shape = (batch.input_ids.shape[0], heads, batch.input_ids.shape[1], size)
    query, key, value = (
        torch.randn(shape, dtype=dtype, device=device(), requires_grad=True) for _ in range(3)
    )
    additive = dense_masks(batch, config, dtype)
    assert isinstance(additive, Tensor)

    def run() -> None:
        nn.functional.scaled_dot_product_attention(query, key, value, additive).sum().backward()

    return run


def projection(report: Report) -> None:
    """The sliced output projection, with Triton kernels where they run and without, against whole logits."""
    tokens, width, vocabulary = (64, 64, 600) if report.rehearse else (8192, 2048, 128_256)
    dtype = torch.bfloat16 if device().type == "cuda" else torch.float32
    head = nn.Linear(width, vocabulary, bias=False, dtype=dtype, device=device())
    hidden = torch.randn(tokens, width, dtype=dtype, device=device(), requires_grad=True)
    targets = torch.randint(vocabulary, (tokens,), device=device())
    config = next(iter(configs(rehearse=True).values()))
    sliced, without = TokenLogProbs(head, config), TokenLogProbs(head, config)
    without.kernels = False
    report.number("the Triton kernels are at hand", float(kernels_on(device()) is not None), "")

    def whole(states: Tensor, targets: Tensor) -> Tensor:
        return -nn.functional.cross_entropy(head(states).float(), targets, reduction="none")

    compiled = torch.compile(whole, backend="inductor" if device().type == "cuda" else "aot_eager")
    ways: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
        "sliced": sliced, "sliced, no kernels": without, "whole": whole, "whole, compiled": compiled,
    }  # fmt: skip
    useful = 3 * 2 * tokens * width * vocabulary
    for name, way in ways.items():

        def run(way: Callable[[Tensor, Tensor], Tensor] = way) -> None:
            way(hidden, targets).sum().backward()

        took = seconds_of(run)
        report.number(f"{name}, forward and backward", 1e3 * took, "ms")
        report.number(
            f"{name}, useful", useful / took / 1e12, "TFLOP/s", low=200 if name == "sliced" else None
        )
        report.number(
            f"{name}, peak above weights", peak_bytes(run) / 1e9, "GB", high=3 if name == "sliced" else None
        )


def blocks(report: Report) -> None:
    """The blocks of a model, eager and with each block compiled, forward and backward."""
    name, config = [*configs(rehearse=report.rehearse).items()][0 if report.rehearse else 1]
    config.num_hidden_layers = min(4, config.num_hidden_layers)
    dtype = torch.bfloat16 if device().type == "cuda" else torch.float32
    tokens = 512 if report.rehearse else 16_384
    found: dict[str, float] = {}
    for way in ("eager", "compiled"):
        model = random_model(config, dtype, device())
        if way == "compiled":
            for block in next(m for m in model.modules() if isinstance(m, nn.ModuleList)):
                block.compile(dynamic=True, backend="inductor" if device().type == "cuda" else "aot_eager")
        scorer = SequenceScorer(model, flex=device().type == "cuda")
        batch = batch_of(groups_of(tokens, config.vocab_size), scorer.layout, device(), scorer.windows)
        found[way] = seconds_of(lambda s=scorer, b=batch: s(b).sum().backward())  # type: ignore[misc]
        report.number(f"4 blocks of {name}, {way}", 1e3 * found[way], "ms")
    report.number("eager over compiled", found["eager"] / found["compiled"], "x", low=1.0)


def noise(report: Report) -> None:
    """How far each layout is from rows alone in bfloat16, root mean square in nats per token."""
    name, config = next(iter(configs(rehearse=report.rehearse).items()))
    scorer = SequenceScorer(random_model(config, torch.bfloat16, device()), flex=device().type == "cuda")
    group = groups_of(400, config.vocab_size, seed=1)[0]
    tree = group.prompt, group.completions

    @torch.no_grad()
    def logps(trees: Sequence[Tree], layout: Layout) -> Tensor:
        found: Tensor = scorer(tree_batch(trees, layout).to(device(), scorer.windows), per_token=True)
        return found.double()

    alone = torch.cat([logps([(tree[0], [own])], "rows") for own in tree[1]])
    for layout in scorer.layouts:
        difference = float((logps([tree], layout) - alone).square().mean().sqrt())
        report.number(f"{name}, {layout} against rows alone", difference, "nats", high=0.1, speed=False)


if __name__ == "__main__":
    sys.exit(main())
