"""relu_linear_attention against a float64 formula written here, in both backends.

Triton runs on its CPU interpreter (see conftest.py): this tests arithmetic, masks and strides, not
what a GPU compiler makes of them.
"""

import math
import subprocess
import sys

import pytest
import torch

from linearsr.errors import OptionError
from linearsr.kernels import relu_linear_attention

BATCH, HEADS = 2, 3
BACKENDS = ["torch", "triton"]
on_cpu = pytest.mark.skipif(
    torch.get_default_device().type != "cpu", reason="about tensors on the CPU"
)


def projection(tokens, dim, seed=0, batch=BATCH, heads=HEADS):
    """Return one (B, N, 3 * H * D) projection, float32."""
    generator = torch.Generator(torch.get_default_device()).manual_seed(seed)
    return torch.randn(batch, tokens, 3 * heads * dim, generator=generator)


def upstream(tokens, dim, seed=1):
    generator = torch.Generator(torch.get_default_device()).manual_seed(seed)
    return torch.randn(BATCH, tokens, HEADS, dim, generator=generator)


def plain_formula(q, k, v):
    """Sana's formula in float64, with eps added to sums of magnitude one."""
    q, k = q.relu(), k.relu()
    q = q / q.detach().amax(dim=-1, keepdim=True).clamp_min(1e-300)
    k = k / k.detach().amax(dim=(1, 3), keepdim=True).clamp_min(1e-300)
    state = torch.einsum("bnhd,bnhe->bhde", k, v)
    denominator = torch.einsum("bnhd,bhd->bnh", q, k.sum(dim=1)) + 1e-15
    return torch.einsum("bnhd,bhde->bnhe", q, state) / denominator[..., None]


def run(attention, packed, grad):
    """Return the output and the gradients of q, k and v in float64; q, k, v are views of packed."""
    packed = packed.clone().requires_grad_()
    q, k, v = packed.unflatten(-1, (3, -1, grad.shape[-1])).unbind(2)
    out = attention(q, k, v)
    assert out.shape == grad.shape and out.dtype == packed.dtype
    out.backward(grad.to(packed.dtype))
    grads = packed.grad.double().unflatten(-1, (3, -1, grad.shape[-1])).unbind(2)
    return [out.detach().double(), *grads]


def with_backend(backend):
    return lambda q, k, v: relu_linear_attention(q, k, v, backend=backend)


def errors(results, truths, least_scale=0.0):
    """Return the largest error of each result, relative to the largest true value.

    least_scale is for one token: its output is v whatever q and k are, so their true gradients are
    zero, as differences of terms of order one.
    """
    assert all(x.isfinite().all() for x in results)
    return [
        ((x - truth).abs().max() / truth.abs().max().clamp_min(least_scale)).item()
        for x, truth in zip(results, truths, strict=True)
    ]


def rounding(tokens, dim=16):
    """Return the error of float32 sums over tokens and then channels, in any order.

    Rounding errors of n additions grow like sqrt(n) units (Higham and Mary, 2019); the largest of
    some thousand values lies within four deviations. 32 units are for all that is no sum.
    """
    unit = torch.finfo(torch.float32).eps / 2
    return (32 + 4 * math.sqrt(tokens + dim)) * unit


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dim", [16, 32, 64])
@pytest.mark.parametrize("tokens", [1, 63, 500])
def test_float32_matches_float64(tokens, dim, backend):
    packed, grad = projection(tokens, dim), upstream(tokens, dim)
    truths = run(plain_formula, packed.double(), grad.double())
    results = run(with_backend(backend), packed, grad)
    assert max(errors(results, truths, least_scale=float(tokens == 1))) < rounding(tokens, dim)


@pytest.mark.parametrize("dim", [16, 32, 64])
@pytest.mark.parametrize("tokens", [1, 63, 500])
def test_bfloat16_triton_rounds_no_worse_than_torch(tokens, dim):
    packed, grad = projection(tokens, dim).bfloat16(), upstream(tokens, dim).bfloat16()
    truths = run(plain_formula, packed.double(), grad.double())
    torch_errors, triton_errors = (
        errors(run(with_backend(backend), packed, grad), truths, least_scale=float(tokens == 1))
        for backend in BACKENDS
    )
    for triton_error, torch_error in zip(triton_errors, torch_errors, strict=True):
        assert torch_error < 0.01
        assert triton_error <= 2 * torch_error + 1e-5


def test_largest_head_dim_matches_float64_over_several_chunks():
    packed, grad = projection(300, 128, batch=1, heads=1), upstream(300, 128)[:1, :, :1]
    truths = run(plain_formula, packed.double(), grad.double())
    assert max(errors(run(with_backend("triton"), packed, grad), truths)) < rounding(300, 128)


def test_results_repeat_bit_for_bit():
    packed, grad = projection(300, 16), upstream(300, 16)
    first, second = (run(with_backend("triton"), packed, grad) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_any_strides_give_the_same_result(backend):
    packed, grad = projection(20, 16), upstream(20, 16)
    truths = run(plain_formula, packed.double(), grad.double())

    def transposed(q, k, v):  # heads before tokens; v with D not innermost
        q, k = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k))
        v = v.transpose(1, 3).contiguous().transpose(1, 3)
        assert v.stride(-1) != 1 and q.stride(1) < q.stride(2)
        return relu_linear_attention(q, k, v, backend=backend)

    assert max(errors(run(transposed, packed, grad), truths)) < rounding(20)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("expanded_from", [(1, 1, 1, 1), (1, 20, 1, 16)])
def test_expanded_output_gradient_matches_float64(expanded_from, backend):
    grad = upstream(20, 16)[tuple(slice(n) for n in expanded_from)].expand(BATCH, 20, HEADS, 16)
    packed = projection(20, 16)
    truths = run(plain_formula, packed.double(), grad.double())
    assert max(errors(run(with_backend(backend), packed, grad), truths)) < rounding(20)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("q_scale", [1e36, 1e25, 1e-25])
@pytest.mark.parametrize("k_scale", [1e25, 1e-25])
def test_extreme_magnitudes_match_float64(q_scale, k_scale, dtype, backend):
    scales = torch.tensor([q_scale, k_scale, 1e4]).repeat_interleave(HEADS * 16)
    packed, grad = (projection(70, 16) * scales).to(dtype), upstream(70, 16).to(dtype)
    truths = run(plain_formula, packed.double(), grad.double())
    limit = rounding(70) if dtype == torch.float32 else 0.01
    assert max(errors(run(with_backend(backend), packed, grad), truths)) < limit


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_without_positive_values_match_float64(backend):
    packed, grad = projection(20, 16), upstream(20, 16)
    q, k, _ = packed.unflatten(-1, (3, HEADS, 16)).unbind(2)
    q[0, 5].abs_().neg_()  # one query of every head
    k[1, :, 2].abs_().neg_()  # all keys of one head
    truths = run(plain_formula, packed.double(), grad.double())
    results = run(with_backend(backend), packed, grad)
    assert max(errors(results, truths)) < rounding(20)
    assert results[0][0, 5].count_nonzero() == results[0][1, :, 2].count_nonzero() == 0


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("scale", [1.0, 1e-25])
def test_queries_that_meet_no_key_give_zero_and_finite_gradients(scale, backend):
    packed, grad = projection(20, 16), upstream(20, 16)
    q, k, _ = packed.unflatten(-1, (3, HEADS, 16)).unbind(2)
    q.abs_().mul_(scale)[..., :8] = -1
    k.abs_().mul_(scale)[..., 8:] = -1
    results = run(with_backend(backend), packed, grad)
    assert results[0].count_nonzero() == 0
    assert all(x.isfinite().all() for x in results)


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_is_propagated(backend):
    q, k, v = projection(20, 16).unflatten(-1, (3, HEADS, 16)).unbind(2)
    q[0, 3, 0, 1] = k[1, 7, 2, 4] = float("nan")
    out = relu_linear_attention(q, k, v, backend=backend)
    assert out[0, 3, 0].isnan().all() and out[1, :, 2].isnan().all()
    assert out[0, 4:].isfinite().all() and out[1, :, :2].isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_relu_linear_attention_matches_diffusers_sana(backend):
    attention_processor = pytest.importorskip("diffusers.models.attention_processor")
    torch.manual_seed(0)
    module = attention_processor.Attention(
        query_dim=48,
        heads=3,
        dim_head=16,
        processor=attention_processor.SanaLinearAttnProcessor2_0(),
    )
    x = torch.randn(2, 40, 48)
    q, k, v = (f(x).unflatten(-1, (3, 16)) for f in (module.to_q, module.to_k, module.to_v))
    ours = module.to_out[0](relu_linear_attention(q, k, v, backend=backend).flatten(2))
    torch.testing.assert_close(ours, module(x), rtol=1e-5, atol=1e-6)


def test_reference_gradients_match_finite_differences():
    q, k, v = projection(5, 3).double().unflatten(-1, (3, HEADS, 3)).unbind(2)
    inputs = [x.clone().requires_grad_() for x in (q, k, v)]
    assert torch.autograd.gradcheck(relu_linear_attention, inputs)


def test_reference_compiles_in_one_graph():
    q, k, v = projection(20, 16).unflatten(-1, (3, HEADS, 16)).unbind(2)
    compiled = torch.compile(relu_linear_attention, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(q, k, v), relu_linear_attention(q, k, v))


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_does_not_narrow_the_sums(backend):
    q, k, v = projection(63, 16).unflatten(-1, (3, HEADS, 16)).unbind(2)
    with torch.autocast(torch.get_default_device().type, torch.bfloat16):
        out = relu_linear_attention(q, k, v, backend=backend)
    assert torch.equal(out, relu_linear_attention(q, k, v, backend=backend))


@on_cpu
def test_auto_backend_is_torch_on_cpu():
    q, k, v = projection(7, 12).unflatten(-1, (3, HEADS, 12)).unbind(2)  # a D that Triton refuses
    auto = relu_linear_attention(q, k, v)
    assert torch.equal(auto, relu_linear_attention(q, k, v, backend="torch"))


@pytest.mark.parametrize(
    ("shape", "dtype", "options", "message"),
    [
        ((1, 4, 2, 16), torch.float32, {"backend": "cuda"}, "unknown backend 'cuda'"),
        ((1, 4, 2, 16), torch.float32, {"eps": -1.0}, "eps"),
        ((1, 4, 2, 16), torch.float32, {"eps": float("nan")}, "eps"),
        ((1, 4, 2, 24), torch.float32, {"backend": "triton"}, "16, 32, 64 or 128 channels, not 24"),
        ((1, 4, 2, 8), torch.float32, {"backend": "triton"}, "not 8"),
        ((1, 4, 2, 256), torch.float32, {"backend": "triton"}, "not 256"),
        ((1, 4, 2, 16), torch.float64, {"backend": "triton"}, "not torch.float64"),
    ],
)
def test_options_out_of_range_are_refused(shape, dtype, options, message):
    x = torch.ones(shape, dtype=dtype)
    with pytest.raises(OptionError, match=message):
        relu_linear_attention(x, x, x, **options)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("k", "message"),
    [
        (torch.ones(1, 5, 2, 16), "one shape"),
        (torch.ones(4, 2, 16), "one shape"),
        (torch.ones(1, 4, 2, 16, dtype=torch.bfloat16), "one dtype"),
        (torch.ones(1, 4, 2, 16, device="meta"), "one device"),
    ],
)
def test_inputs_that_differ_are_refused(k, message, backend):
    x = torch.ones(1, 4, 2, 16)
    with pytest.raises(ValueError, match=message):
        relu_linear_attention(x, k, x, backend=backend)


@pytest.mark.parametrize(
    "x",
    [torch.ones(4, 2, 16), torch.ones(1, 0, 2, 16), torch.ones(1, 4, 2, 16, dtype=torch.float16)],
)
def test_inputs_out_of_contract_are_refused(x):
    with pytest.raises(ValueError, match="q, k and v must share one"):
        relu_linear_attention(x, x, x)


def python(code, **environment):
    command = [sys.executable, "-c", code]
    return subprocess.run(
        command, check=False, capture_output=True, text=True, env=environment, timeout=120
    )


@on_cpu
def test_import_does_not_load_triton():
    code = "import sys, linearsr.kernels; assert 'triton' not in sys.modules"
    result = python(code, PYTHONPATH=":".join(sys.path), TRITON_INTERPRET="1")
    assert result.returncode == 0, result.stderr


@on_cpu
def test_triton_refuses_cpu_tensors_outside_the_interpreter():
    code = (
        "import torch, linearsr.kernels as k\n"
        "x, m, options = torch.ones(1, 4, 2, 16), torch.ones(1, 1, 1, 16), {'backend': 'triton'}\n"
        "for call in (\n"
        "    lambda: k.relu_linear_attention(x, x, x, **options),\n"
        "    lambda: k.modulate(x, m, m, **options),\n"
        "    lambda: k.depthwise_gate(x, torch.ones(16, 1, 3, 3), torch.ones(16), **options),\n"
        "):\n"
        "    try: call()\n"
        "    except k.OptionError as error: print(error)"
    )
    result = python(code, PYTHONPATH=":".join(sys.path))
    assert result.stdout.count("takes CUDA tensors, not cpu ones") == 3, result.stderr
