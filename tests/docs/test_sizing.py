"""The numbers of docs/guides/sizing.md are those of `benchmarks.sizing`, which count right."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks import sizing
from benchmarks.contestants import sana_of
from linearsr.cli import job
from linearsr.config import LINEARSR_1_6B, TINY
from linearsr.denoiser import blocks
from linearsr.training import count, plan
from linearsr.training.recipes import RECIPES

PAGE_FOLDER = Path(__file__).parents[2] / "docs" / "guides"
PAGE = (PAGE_FOLDER / "sizing.md").read_text()


@pytest.mark.parametrize("make", sizing.TABLES)
def test_sizing_tables_equal_the_counts(make: sizing.Table) -> None:
    assert make() in PAGE, "run `python -m benchmarks.sizing` and copy its tables"


def test_flops_of_a_forward_pass_equal_those_of_diffusers_sana() -> None:
    """Both have all 300 tokens, as Sana always has; our model adds the LR stem."""

    def theirs() -> Callable[[], object]:
        sana = sana_of(LINEARSR_1_6B.denoiser)
        inputs = torch.randn(1, 32, 32, 32), torch.randn(1, 300, 2304), torch.rand(1)
        return lambda: sana(*inputs)

    ours = sum(count.denoiser(LINEARSR_1_6B, 1024, 300))
    assert ours == pytest.approx(count.counted(theirs), rel=0.01)


def test_flops_of_a_backward_pass_are_twice_those_of_the_forward_pass(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Depthwise convolutions are left out: PyTorch counts their backward as if without groups."""

    def gate(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        passed, by = (hidden + weight[:, 0, 0, 0] + bias).chunk(2, dim=-1)
        return passed * by.sigmoid()

    def both() -> Callable[[], object]:
        inputs = count.forward(TINY, 128)
        return lambda: inputs.step(inputs.condition()).sum().backward()

    monkeypatch.setattr(blocks, "depthwise_gate", gate)
    monkeypatch.setattr(blocks.LinearAttention, "neighbours", lambda _, values: values)
    there = sum(count.denoiser.__wrapped__(TINY, 128))
    assert count.counted(both) == pytest.approx(plan.FORWARD_AND_BACKWARD * there, rel=0.05)


@pytest.mark.thorough
def test_plan_of_the_page_about_sana_is_that_of_the_command(
    capsys: pytest.CaptureFixture[str],
) -> None:
    page = (PAGE_FOLDER / "sana.md").read_text()
    command = next(line for line in page.splitlines() if line.startswith("linearsr job plan"))
    assert job.run("plan", command.split()[3:]) == 0
    assert capsys.readouterr().out in page


def test_pair_flops_include_decoding_only_for_the_expert_below_the_bound() -> None:
    recipe = RECIPES["sana_0_6b"]()
    decode = count.autoencoder(recipe.model.latent, 1024)[1]
    costs = [plan.pair_flops(plan.Run(recipe, "finetune", expert)) for expert in range(4)]
    assert [cost - costs[0] for cost in costs] == [0, 0, 0, 2 * decode]


def test_other_pages_link_to_the_sizing_numbers_and_do_not_repeat_them() -> None:
    for name in ("training", "datasets"):
        page = (Path(__file__).parents[2] / "docs" / "guides" / f"{name}.md").read_text()
        assert "sizing.md" in page and not re.search(r"32\.1 GB|67\.8", page)
