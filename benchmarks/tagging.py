"""Count what the paper's tags cost: RAM, which names them, and Gemma 2, which embeds them.

    python -m benchmarks.tagging --measure

Parameters, bytes and operations are counted on tensors of the real sizes without content, so no
weights are needed. --measure also tags one picture with a RAM of this size and random weights, on
the CPU. DAPE is RAM with merged weights, so it costs the same. Prints a Markdown table.
"""

from __future__ import annotations

import sys
import time
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from linearsr.cli.flags import Parser
from linearsr.tags.ram import Ram

# RAM with Swin-L at 384 pixels: ram/configs/swin/config_swinL_384.json and q2l_config.json.
DEPTHS, HEADS, CHANNELS, WINDOW = (2, 2, 18, 2), (6, 12, 24, 48), 192, 12
TAGS, WORDS, WIDTH, HIDDEN, LAYERS = 4585, 512, 768, 3072, 2
# Tokens of five tags with their commas and the first token, and Sana's limit.
TOKENS = (11, 300)


class Cost(NamedTuple):
    """Costs of one call. weights: bytes. operations: additions and multiplications."""

    name: str
    parameters: int
    weights: int
    operations: int


def ram_shapes() -> dict[str, Tensor]:
    """Return tensors of RAM's checkpoint without content, those that decide the model's sizes."""
    shapes: dict[str, tuple[int, ...]] = {
        "visual_encoder.patch_embed.proj.weight": (CHANNELS, 3, 4, 4),
        "image_proj.weight": (WORDS, CHANNELS * 2 ** (len(DEPTHS) - 1)),
        "wordvec_proj.weight": (WIDTH, WORDS),
        "label_embed": (TAGS, WORDS),
        "fc.weight": (1, WIDTH),
    }
    for stage, (depth, heads) in enumerate(zip(DEPTHS, HEADS, strict=True)):
        for block in range(depth):
            name = f"visual_encoder.layers.{stage}.blocks.{block}.attn.relative_position_bias_table"
            shapes[name] = ((2 * WINDOW - 1) ** 2, heads)
    for number in range(LAYERS):
        layer = f"tagging_head.encoder.layer.{number}."
        for part, inner in (("query", WIDTH), ("key", WORDS), ("value", WORDS)):
            shapes[f"{layer}crossattention.self.{part}.weight"] = (WIDTH, inner)
        shapes[f"{layer}crossattention.output.dense.weight"] = (WIDTH, WIDTH)
        shapes[f"{layer}intermediate.dense.weight"] = (HIDDEN, WIDTH)
        shapes[f"{layer}output.dense.weight"] = (WIDTH, HIDDEN)
    return {name: torch.empty(shape) for name, shape in shapes.items()}


def ram_cost() -> Cost:
    """Return the cost of RAM for one picture, in float32."""
    with torch.device("meta"):
        model = Ram(ram_shapes()).eval()
        picture = torch.empty(1, 3, model.side, model.side)
        return _cost(f"RAM, Swin-L, one picture of {model.side}²", model, 4, picture)


def gemma_cost(tokens: int) -> Cost:
    """Return the cost of Gemma 2 2B for one list of tags, in bfloat16."""
    from transformers import Gemma2Config, Gemma2Model

    with torch.device("meta"):
        model = Gemma2Model(Gemma2Config()).eval()
        ids = torch.zeros(1, tokens, dtype=torch.long)
        return _cost(f"Gemma 2 2B, {tokens} tokens", model, 2, ids)


def _cost(name: str, model: nn.Module, size: int, *inputs: Tensor) -> Cost:
    parameters = sum(parameter.numel() for parameter in model.parameters())
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        model.to("meta")(*inputs)
    return Cost(name, parameters, parameters * size, counter.get_total_flops())


def measure() -> tuple[float, int]:
    """Return the CPU time that a RAM of random weights takes for a picture, and the peak in bytes.

    CPU time is in seconds, of all threads together. The peak is that of the whole process.
    """
    import resource

    torch.manual_seed(0)
    model = Ram(ram_shapes())
    with torch.no_grad():
        model.label_embed.normal_()
    model.eval()
    picture = torch.rand(1, 3, model.side, model.side)
    with torch.inference_mode():
        model(picture)
        start = time.process_time()
        model(picture)
        seconds = time.process_time() - start
    return seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> int:
    """Count, perhaps measure, print."""
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--measure", action="store_true", help="also tag a picture on the CPU")
    options = parser.parse_args()
    print("| | parameters | weights | operations |\n|---|---|---|---|")
    for cost in (ram_cost(), *map(gemma_cost, TOKENS)):
        print(
            f"| {cost.name} | {cost.parameters / 1e6:.0f} million | {cost.weights / 1e9:.2f} GB "
            f"| {cost.operations / 1e9:.0f} GFLOP |"
        )
    if options.measure:
        seconds, peak = measure()
        print(
            f"\nRAM of random weights, float32, {torch.get_num_threads()} threads: "
            f"{seconds:.1f} s of CPU time a picture, peak of the process {peak / 1e9:.2f} GB."
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
