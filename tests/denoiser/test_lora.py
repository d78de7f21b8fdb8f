"""Experts on one base: they compute what merged weights do, and hold the base once."""

from __future__ import annotations

import threading
from copy import deepcopy

import pytest
import torch
from torch import Tensor

from linearsr.config import LINEARSR_1_6B, LoRAConfig, ModelConfig
from linearsr.denoiser import LinearSR
from linearsr.denoiser.lora import adapt, empty_adapters, layer_names, merge_
from linearsr.training import lora as training
from tests.helpers.lora import LORA, random_adapters, random_base


def bytes_of(*models: LinearSR) -> int:
    """Return the bytes of all tensors of models; tensors that they share count once."""
    storages = {}
    for model in models:
        for tensor in model.state_dict().values():
            storage = tensor.untyped_storage()
            storages[storage._cdata] = storage.nbytes()
    return sum(storages.values())


@torch.no_grad()
def run(model: LinearSR, config: ModelConfig, rows: int = 24) -> Tensor:
    torch.manual_seed(3)
    shape, dtype = config.denoiser, model.embed.weight.dtype
    latent = torch.randn(2, shape.latent_channels, rows, 20)
    picture = torch.randn(2, 3, 4 * rows, 80).to(dtype)
    tags = None if shape.tag_dim is None else torch.randn(2, 3, shape.tag_dim).to(dtype)
    condition = model.condition(picture, latent if shape.condition_latent else None, tags)
    return model(latent, torch.tensor([0.3, 0.8]), condition)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("strips", [True, False])
@pytest.mark.parametrize("tags", [False, True])
def test_an_expert_on_a_shared_base_has_the_bits_of_the_merged_one(
    small_config: ModelConfig,
    tagged_config: ModelConfig,
    dtype: torch.dtype,
    strips: bool,
    tags: bool,
) -> None:
    config = tagged_config if tags else small_config
    base, adapters = random_base(config).to(dtype), random_adapters(config, 1)
    shared, merged = adapt(base, adapters, LORA), merge_(deepcopy(base), adapters, LORA)
    shared.use_strips = merged.use_strips = strips
    result = run(shared, config)
    assert torch.equal(result, run(merged, config))
    change = (result - run(base, config)).abs().mean() / result.abs().mean()
    assert change > 0.02, "the adapters must matter in this test"


def test_merging_is_the_formula_of_the_paper(small_config: ModelConfig) -> None:
    base, adapters = random_base(small_config), random_adapters(small_config, 1)
    before = {k: v.double() for k, v in base.state_dict().items()}
    before = {k: v.clone() for k, v in before.items()}
    after = merge_(base, adapters, LORA).state_dict()
    changed = {f"{name}.weight" for name in layer_names(small_config.denoiser, LORA)}
    assert len(changed) == 2 * 4  # two blocks of four layers: this model has no tags
    for name, tensor in after.items():
        expected = before[name]
        if name in changed:
            layer = name.removesuffix(".weight")
            up, down = (adapters[f"{layer}.lora_{x}.weight"].double() for x in "BA")
            expected = expected + LORA.alpha / LORA.rank * up @ down
        torch.testing.assert_close(tensor.double(), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("tags", [False, True])
def test_what_peft_trains_is_what_the_bundle_computes(
    small_config: ModelConfig, tagged_config: ModelConfig, tags: bool
) -> None:
    """`cpu_block` would read the base's weights from peft's layers, so strips are off there."""
    config = tagged_config if tags else small_config
    base, adapters = random_base(config), random_adapters(config, 1)
    shared = adapt(base, adapters, LORA)
    trained = training.inject(deepcopy(base), LORA, adapters)
    expected = run(shared, config)
    torch.testing.assert_close(run(trained, config), expected, rtol=1e-3, atol=1e-4)
    names = {training.plain_name(name) for name in training.trained(trained)}
    assert names == adapters.keys() == empty_adapters(config.denoiser, LORA).keys()


def test_fresh_adapters_change_nothing_and_can_be_trained(small_config: ModelConfig) -> None:
    base = random_base(small_config)
    zeros = {k: torch.zeros_like(v) for k, v in random_adapters(small_config, 1).items()}
    for start in (None, zeros):
        trained = training.inject(deepcopy(base), LORA, start)
        expected = run(base, small_config)
        torch.testing.assert_close(run(trained, small_config), expected, rtol=1e-3, atol=1e-4)
        parameters = training.trained(trained)
        torch.manual_seed(0)
        latent, picture = torch.randn(1, 48, 8, 8), torch.randn(1, 3, 32, 32)
        v = trained(latent, torch.tensor([0.5]), trained.condition(picture, latent))
        v.square().mean().backward()
        moved = {name for name, p in parameters.items() if p.grad is not None and p.grad.any()}
        assert moved == {name for name in parameters if "lora_B" in name}
        assert all(p.grad is None for p in trained.parameters() if not p.requires_grad)


def test_experts_on_the_base_in_training_hold_only_their_adapters(
    small_config: ModelConfig,
) -> None:
    base = random_base(small_config)
    adapters = {n: random_adapters(small_config, n) for n in range(3)}
    model = training.inject(deepcopy(base), LORA, adapters[2])
    load = training.sharing(model, LORA, {**adapters, 0: None}.__getitem__)
    one = bytes_of(adapt(base, adapters[1], LORA)) - bytes_of(base)
    assert bytes_of(model, load(0), load(1)) == bytes_of(base) + 2 * one
    assert torch.equal(run(load(0), small_config), run(base, small_config))
    expected = run(adapt(base, adapters[1], LORA), small_config)
    assert torch.equal(run(load(1), small_config), expected)


def test_threads_run_experts_of_one_base_at_the_same_time(small_config: ModelConfig) -> None:
    base = random_base(small_config)
    experts = [adapt(base, random_adapters(small_config, n), LORA) for n in range(4)]
    picture, latent = torch.randn(1, 3, 64, 64), torch.randn(1, 48, 16, 16)

    @torch.no_grad()
    def step(model: LinearSR) -> Tensor:
        return model(latent, torch.tensor([0.5]), model.condition(picture, latent))

    alone = [step(expert) for expert in experts]
    assert all(not torch.equal(alone[0], other) for other in alone[1:])
    wrong: list[int] = []
    begin = threading.Barrier(4)

    def repeat(number: int) -> None:
        begin.wait()
        for _ in range(30):
            if not torch.equal(step(experts[number]), alone[number]):
                wrong.append(number)

    threads = [threading.Thread(target=repeat, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_compiled_blocks_of_all_experts_share_their_code(small_config: ModelConfig) -> None:
    base = random_base(small_config)
    experts = [adapt(base, random_adapters(small_config, n), LORA) for n in range(4)]
    plain = []
    for expert in experts:
        expert.use_strips = False
        plain.append(run(expert, small_config))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    for expert in experts:
        for block in expert.blocks:
            block.compile(backend="eager", dynamic=False, fullgraph=True)
    for expert, expected in zip(experts, plain, strict=True):
        torch.testing.assert_close(run(expert, small_config), expected)
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    torch._dynamo.reset()
    assert graphs == 1, "one for all blocks of all experts"


def test_four_experts_of_1_6b_take_one_base_and_four_adapters() -> None:
    """Counted on the "meta" device, in bfloat16; docs/guides/serving.md has the numbers."""
    with torch.device("meta"):
        base = LinearSR(LINEARSR_1_6B.denoiser).bfloat16()
    lora = LoRAConfig()
    adapters = empty_adapters(LINEARSR_1_6B.denoiser, lora)
    experts = [adapt(base, adapters, lora) for _ in range(4)]
    one = bytes_of(base)
    each = (bytes_of(*experts) - one) / 4
    assert one == pytest.approx(3.2e9, rel=0.01)
    assert each == 2 * sum(tensor.numel() for tensor in adapters.values())
    assert each == pytest.approx(0.0645e9, rel=0.01)
    assert 4 * one == pytest.approx(12.8e9, rel=0.01)
