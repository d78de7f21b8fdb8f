"""depthwise_gate and modulate against float64 formulas written here, in both backends.

Triton runs on its CPU interpreter (see conftest.py): this tests arithmetic, masks and strides, not
what a GPU compiler makes of them.
"""

import math

import pytest
import torch

from linearsr import kernels
from linearsr.errors import OptionError
from linearsr.kernels import depthwise_gate, modulate

BACKENDS = ["torch", "triton"]
on_cpu = pytest.mark.skipif(
    torch.get_default_device().type != "cpu", reason="about tensors on the CPU"
)
# B, H, W, C: single rows and columns, partial tiles, channels that fill no block.
SHAPES = [(1, 1, 1, 16), (3, 1, 7, 33), (1, 7, 2, 33), (1, 5, 9, 16), (3, 2, 1, 240)]


def normal(*shape, seed=0):
    return torch.randn(
        shape, generator=torch.Generator(torch.get_default_device()).manual_seed(seed)
    )


def gate_inputs(b, h, w, c):
    weight, bias = normal(2 * c, 1, 3, 3, seed=1), normal(2 * c, seed=2)
    return normal(b, h, w, 2 * c), weight, bias


def norm_inputs(b, h, w, c):
    return 3 * normal(b, h, w, c) + 2, normal(b, 1, 1, c, seed=1), normal(b, 1, 1, c, seed=2)


def plain_gate(hidden, weight, bias):
    b, h, w, c = hidden.shape
    padded = hidden.new_zeros(b, h + 2, w + 2, c)
    padded[:, 1:-1, 1:-1] = hidden
    taps = [(i, j) for i in range(3) for j in range(3)]
    products = [padded[:, i : i + h, j : j + w] * weight[:, 0, i, j] for i, j in taps]
    total = torch.stack(products).sum(0) + bias
    value, gate = total[..., : c // 2], total[..., c // 2 :]
    return value * gate * torch.sigmoid(gate)


def plain_modulate(x, shift, scale):
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt() * (1 + scale) + shift


CASES = [
    pytest.param(depthwise_gate, plain_gate, gate_inputs, id="gate"),
    pytest.param(modulate, plain_modulate, norm_inputs, id="modulate"),
]
both = pytest.mark.parametrize(("function", "plain", "inputs"), CASES)


def error(result, plain, tensors):
    """Return the largest error against float64, relative to the largest true value."""
    truth = plain(*(x.double() for x in tensors))
    assert result.shape == truth.shape and result.dtype == tensors[0].dtype
    assert result.isfinite().all()
    return ((result.double() - truth).abs().max() / truth.abs().max()).item()


def rounding(terms):
    """Return the bound on the error of sums of `terms` terms in float32, in any order."""
    return (16 + 4 * math.sqrt(terms)) * torch.finfo(torch.float32).eps / 2


@both
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_float32_matches_float64(function, plain, inputs, shape, backend):
    tensors = inputs(*shape)
    assert error(function(*tensors, backend=backend), plain, tensors) < rounding(shape[-1])


@both
@pytest.mark.parametrize("shape", SHAPES)
def test_bfloat16_triton_rounds_no_worse_than_torch(function, plain, inputs, shape):
    tensors = [x.bfloat16() for x in inputs(*shape)]
    by_torch, by_triton = (
        error(function(*tensors, backend=backend), plain, tensors) for backend in BACKENDS
    )
    assert by_torch < 0.03
    assert by_triton <= 2 * by_torch


@both
@pytest.mark.parametrize("backend", BACKENDS)
def test_wide_rows_match_float64(function, plain, inputs, backend):
    tensors = inputs(1, 1, 2, 5600)
    assert error(function(*tensors, backend=backend), plain, tensors) < rounding(5600)


@both
@pytest.mark.parametrize("backend", BACKENDS)
def test_any_strides_give_the_same_result(function, plain, inputs, backend):
    x, *others = inputs(2, 5, 3, 16)
    views = [
        x.repeat(1, 2, 1, 1)[:, :5],  # some rows of a picture
        x.repeat(1, 1, 2, 2)[:, :, :3, : x.shape[-1]],
        x.transpose(1, 2).contiguous().transpose(1, 2),
        x.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1),  # channels not innermost
    ]
    strided = [torch.stack([y, y], dim=-1)[..., 0] for y in others]
    for view in views:
        assert not view.is_contiguous() and torch.equal(view, x)
        result = function(view, *strided, backend=backend)
        assert error(result, plain, [x, *others]) < rounding(16)


@both
@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_is_propagated(function, plain, inputs, backend):
    x, *others = inputs(2, 7, 9, 16)
    x[1, 3, 8, 5] = float("nan")
    out = function(x, *others, backend=backend).isnan()
    assert torch.equal(out, plain(x, *others).isnan())
    assert out.any() and not out[0].any()


@both
def test_gates_far_from_zero_stay_finite(function, plain, inputs):
    tensors = inputs(1, 2, 2, 16)
    tensors[0].mul_(1e4)
    assert error(function(*tensors, backend="triton"), plain, tensors) < rounding(16)


@both
def test_results_repeat_bit_for_bit(function, plain, inputs):
    tensors = inputs(2, 5, 3, 33)
    first, second = (function(*tensors, backend="triton") for _ in range(2))
    assert torch.equal(first, second)


@both
def test_gradients_match_finite_differences(function, plain, inputs):
    for batch in (1, 2):
        tensors = [x.double().requires_grad_() for x in inputs(batch, 2, 3, 2)]
        assert torch.autograd.gradcheck(function, tensors)


@both
def test_compiles_in_one_graph(function, plain, inputs):
    tensors = inputs(2, 5, 3, 16)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*tensors), function(*tensors))


@both
def test_triton_is_forward_only(function, plain, inputs):
    tensors = [x.requires_grad_() for x in inputs(1, 2, 3, 16)]
    with pytest.raises(OptionError, match="forward only"):
        function(*tensors, backend="triton")
    with torch.no_grad():
        function(*tensors, backend="triton")


class OnGPU(torch.Tensor):
    """A CPU tensor that claims to be on CUDA, which decides the choice of "auto"."""

    is_cuda = True


@pytest.fixture
def chosen(monkeypatch):
    """Return a list that grows by the name of each implementation that runs."""
    from linearsr.kernels import fused_ops as glue

    ran = []

    def spy(owner, backend, name):
        implementation = getattr(owner, f"{backend}_{name}")

        def note(*args):
            ran.append("torch" if backend == "reference" else backend)
            return implementation(*args)

        monkeypatch.setattr(owner, f"{backend}_{name}", note)

    for name in ("depthwise_gate", "modulate"):
        spy(kernels, "reference", name)
        spy(glue, "triton", name)
    return ran


@on_cpu
@both
def test_auto_is_triton_only_on_a_gpu_without_gradients_or_autocast(
    function, plain, inputs, chosen
):
    tensors = inputs(1, 2, 3, 16)
    on_gpu = [x.as_subclass(OnGPU) for x in tensors]
    learned = [x.clone().requires_grad_() for x in on_gpu]
    function(*tensors)
    function(*on_gpu)
    function(*learned)
    with torch.no_grad():
        function(*learned)
    with torch.autocast(torch.get_default_device().type, torch.bfloat16):
        function(*on_gpu)
    assert chosen == ["torch", "triton", "torch", "triton", "torch"]


@on_cpu
@both
def test_environment_chooses_the_backend_of_auto(function, plain, inputs, chosen, monkeypatch):
    tensors = inputs(1, 2, 3, 16)
    on_gpu = [x.as_subclass(OnGPU) for x in tensors]
    monkeypatch.setenv("LINEARSR_KERNELS", "torch")
    function(*on_gpu)
    function(*tensors, backend="triton")
    monkeypatch.setenv("LINEARSR_KERNELS", "triton")
    function(*tensors)
    function(*tensors, backend="torch")
    monkeypatch.setenv("LINEARSR_KERNELS", "")
    function(*tensors)
    assert chosen == ["torch", "triton", "triton", "torch", "torch"]
    monkeypatch.setenv("LINEARSR_KERNELS", "cuda")
    with pytest.raises(OptionError, match="unknown LINEARSR_KERNELS 'cuda'; choose one of auto, "):
        function(*tensors)


@both
def test_environment_does_not_change_training(monkeypatch, function, plain, inputs):
    monkeypatch.setenv("LINEARSR_KERNELS", "triton")
    x, one, two = inputs(1, 2, 3, 16)
    result = function(x.requires_grad_(), one, two)
    torch.testing.assert_close(result, plain(x, one, two))
    result.sum().backward()
    assert x.grad is not None


def test_environment_chooses_the_backend_of_attention(monkeypatch):
    x = torch.ones(1, 4, 2, 24)  # a D that Triton refuses
    monkeypatch.setenv("LINEARSR_KERNELS", "triton")
    with pytest.raises(OptionError, match="not 24"):
        kernels.relu_linear_attention(x, x, x)


@both
@pytest.mark.parametrize("backend", BACKENDS)
def test_inputs_out_of_contract_are_refused(function, plain, inputs, backend):
    x, one, two = inputs(2, 3, 4, 16)
    for broken, message in [
        ((x[0], one, two), "must be .B, H, W, "),
        ((x[:, :0], one, two), "no zero size"),
        ((x[..., 1:], one, two), "no zero size"),
        ((x, one[1:], two), "must be"),
        ((x, one, two[..., 1:]), "must be"),
        ((x.half(), one.half(), two.half()), "one dtype"),
        ((x, one.bfloat16(), two), "one dtype"),
        ((x, one, two.to("meta")), "one device"),
    ]:
        with pytest.raises(ValueError, match=message):
            function(*broken, backend=backend)


@both
def test_options_out_of_range_are_refused(function, plain, inputs):
    tensors = inputs(1, 2, 3, 16)
    with pytest.raises(OptionError, match="unknown backend 'cuda'"):
        function(*tensors, backend="cuda")
    with pytest.raises(OptionError, match=r"not torch\.float64"):
        function(*(x.double() for x in tensors), backend="triton")


@both
def test_autocast_may_mix_dtypes(function, plain, inputs):
    x, *others = inputs(2, 2, 3, 16)
    with torch.autocast(torch.get_default_device().type, torch.bfloat16):
        result = function(x.bfloat16(), *others)
    assert error(result.float(), plain, [x, *others]) < 0.03
