"""Operators under torch's tracing and function transforms."""

import shutil

import pytest
import torch

from aam_kernels import attention, attention_pool, ragged_attention
from aam_kernels.attention import ops as attention_ops
from aam_kernels.pooling import ops as pooling_ops
from tests.kernels.contract import offsets_of

OFFSETS = offsets_of((3, 0, 4))
KEY_OFFSETS = offsets_of((2, 1, 0))


def qkv(total=8, total_key=None, requires_grad=False, **kwargs):
    sizes = (total, total_key or total, total_key or total)
    return [torch.randn(n, 2, 8, requires_grad=requires_grad, **kwargs) for n in sizes]


@pytest.mark.parametrize("case", ["self", "cross", "gaps", "dropout", "half", "strided"])
def test_opcheck_attention(case, impl):
    dtype = torch.bfloat16 if case == "half" else torch.float32
    query, key, value = qkv(8, 4 if case == "cross" else None, requires_grad=True, dtype=dtype)
    if case == "strided":
        packed = torch.randn(8, 3, 2, 8, requires_grad=True)
        query, key, value = packed.unbind(1)
    where = [
        OFFSETS,
        KEY_OFFSETS if case == "cross" else None,
        torch.tensor([2, 0, 3], dtype=torch.int32) if case == "gaps" else None,
        None,
        torch.tensor([5, 7, 9]) if case == "dropout" else None,
        4,
        -1,
        None,
        0.25 if case == "dropout" else 0.0,
        impl,
    ]
    torch.library.opcheck(attention_ops.ragged_attention, (query, key, value, *where))
    with torch.no_grad():
        output, lse = attention_ops.ragged_attention(query, key, value, *where)
        arguments = (torch.randn_like(output), query, key, value, output, lse, *where)
    detached = [x.detach() if isinstance(x, torch.Tensor) else x for x in arguments]
    torch.library.opcheck(attention_ops.ragged_attention_backward, tuple(detached))


def test_opcheck_pooling(impl):
    values, scores = torch.randn(8, 5, requires_grad=True), torch.randn(8, requires_grad=True)
    for lengths in (None, torch.tensor([2, 0, 3], dtype=torch.int32)):
        where = (OFFSETS, lengths, 4, impl)
        torch.library.opcheck(pooling_ops.attention_pool, (values, scores, *where))
        with torch.no_grad():
            pooled, lse = pooling_ops.attention_pool(values, scores, *where)
            grad = torch.randn_like(pooled)
        arguments = (grad, values.detach(), scores.detach(), pooled, lse, *where)
        torch.library.opcheck(pooling_ops.attention_pool_backward, arguments)


def compiled_nodes(function, arguments, backend_kwargs):
    """Runs compiled against eager with gradients; returns names of the operators traced."""
    names = []

    def forward_compiler(graph, example_inputs):
        names.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return graph

    from functorch.compile import make_boxed_func
    from torch._dynamo.backends.common import aot_autograd

    backend = aot_autograd(fw_compiler=lambda g, e: make_boxed_func(forward_compiler(g, e)))
    compiled = torch.compile(function, backend=backend, **backend_kwargs)
    leaves = [x for x in arguments if x.is_floating_point() and x.requires_grad]
    for scale in (1.0, 2.0):
        eager, traced = function(*arguments) * scale, compiled(*arguments) * scale
        assert torch.equal(eager, traced)
        for a, b in zip(
            torch.autograd.grad(eager.sum(), leaves),
            torch.autograd.grad(traced.sum(), leaves),
            strict=True,
        ):
            assert torch.equal(a, b)
    return names


FULL = {"fullgraph": True, "dynamic": True}


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_compile_keeps_one_node(impl, dropout_p):
    torch._dynamo.reset()

    def call(q, k, v, offsets, seed):
        return ragged_attention(q, k, v, offsets, dropout_p=dropout_p, seed=seed, impl=impl)

    arguments = (*qkv(requires_grad=True), OFFSETS, torch.tensor(3))
    names = compiled_nodes(call, arguments, FULL)
    assert names.count("aam_kernels.ragged_attention.default") == 1
    assert names.count("aam_kernels.ragged_attention_backward.default") == 1
    assert not [name for name in names if "softmax" in name or "mm" in name]


def test_compile_pooling_and_padded(impl):
    torch._dynamo.reset()
    values, scores = torch.randn(8, 5, requires_grad=True), torch.randn(8, requires_grad=True)
    names = compiled_nodes(
        lambda v, s, o: attention_pool(v, s, o, impl=impl), (values, scores, OFFSETS), FULL
    )
    assert names.count("aam_kernels.attention_pool.default") == 1
    x = torch.randn(3, 5, 2, 8, requires_grad=True)
    lengths = torch.tensor([5, 0, 2], dtype=torch.int32)
    names = compiled_nodes(
        lambda x, n: attention(x, x, x, lengths=n, impl=impl), (x, lengths), FULL
    )
    assert names.count("aam_kernels.ragged_attention.default") == 1


def test_dynamic_shapes_do_not_recompile():
    torch._dynamo.reset()
    from torch._dynamo.testing import CompileCounterWithBackend

    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(
        lambda q, k, v, o: ragged_attention(q, k, v, o), backend=counter, **FULL
    )
    counts = []
    for lengths in ((3, 4, 4), (5, 1, 2, 6, 0), (9, 9, 9, 9, 1, 3)):
        query, key, value = qkv(sum(lengths))
        offsets = offsets_of(lengths)
        assert torch.equal(
            compiled(query, key, value, offsets), ragged_attention(query, key, value, offsets)
        )
        counts.append(counter.frame_count)
    assert counts[0] > 0 and len(set(counts)) == 1  # the first call compiles, no other


def test_a_drawn_seed_is_traced():
    torch._dynamo.reset()
    query, key, value = qkv()

    def call():
        return ragged_attention(query, key, value, OFFSETS, dropout_p=0.5)

    compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
    assert not torch.equal(compiled(), compiled())


@pytest.mark.skipif(shutil.which("g++") is None, reason="Inductor needs a C++ compiler")
def test_inductor():
    torch._dynamo.reset()
    query, key, value = qkv()

    def call(q, k, v):
        return ragged_attention(q, k, v, OFFSETS) * 2

    compiled = torch.compile(call, fullgraph=True)
    assert torch.equal(compiled(query, key, value), call(query, key, value))


def test_export_keeps_one_node(impl):
    class Attend(torch.nn.Module):
        def forward(self, q, k, v, offsets):
            output = ragged_attention(q, k, v, offsets, max_length=4, impl=impl)
            return attention_pool(output.flatten(1), output[:, 0, 0], offsets, impl=impl)

    arguments = (*qkv(), OFFSETS)
    rows = torch.export.Dim("rows", min=4, max=1 << 20)
    shapes = ({0: rows}, {0: rows}, {0: rows}, None)
    exported = torch.export.export(Attend(), arguments, dynamic_shapes=shapes)
    targets = [str(node.target) for node in exported.graph.nodes]
    assert targets.count("aam_kernels.ragged_attention.default") == 1
    assert targets.count("aam_kernels.attention_pool.default") == 1
    longer = (*qkv(11), OFFSETS)
    assert torch.equal(exported.module()(*longer), Attend()(*longer))


@pytest.mark.parametrize("cross", [False, True])
def test_vmap_folds_into_more_sequences(impl, cross):
    total_key = 4 if cross else 8
    query = torch.randn(5, 8, 2, 8)
    key, value = torch.randn(total_key, 5, 2, 8), torch.randn(total_key, 2, 8)  # value is shared

    def call(q, k, v):
        return ragged_attention(
            q, k, v, OFFSETS, key_offsets=KEY_OFFSETS if cross else None, impl=impl
        )

    batched = torch.vmap(call, in_dims=(0, 1, None))(query, key, value)
    looped = torch.stack([call(query[i], key[:, i], value) for i in range(5)])
    assert torch.allclose(batched, looped, atol=1e-6)
    assert (batched[:, 7:] == 0).all()

    def loss(q, k, v):
        return call(q, k, v).square().sum()

    grads = torch.vmap(torch.func.grad(loss, argnums=(0, 1, 2)), in_dims=(0, 1, None))(
        query, key, value
    )
    for i in range(5):
        single = torch.func.grad(loss, argnums=(0, 1, 2))(query[i], key[:, i], value)
        for a, b in zip(grads, single, strict=True):
            assert torch.allclose(a[i], b, atol=1e-5)


def test_vmap_over_offsets_and_padding(impl):
    query, key, value = qkv()
    offsets = torch.stack([OFFSETS, offsets_of((1, 1, 5))])
    batched = torch.vmap(lambda o: ragged_attention(query, key, value, o, impl=impl))(offsets)
    looped = torch.stack([ragged_attention(query, key, value, o, impl=impl) for o in offsets])
    assert torch.allclose(batched, looped, atol=1e-6)
    x = torch.randn(4, 3, 5, 2, 8)
    lengths = torch.tensor([5, 0, 2], dtype=torch.int32)
    batched = torch.vmap(lambda x: attention(x, x, x, lengths=lengths, impl=impl))(x)
    looped = torch.stack([attention(y, y, y, lengths=lengths, impl=impl) for y in x])
    assert torch.allclose(batched, looped, atol=1e-6)
    with pytest.raises(ValueError, match="vmap over seed"):
        torch.vmap(
            lambda s: ragged_attention(query, key, value, OFFSETS, dropout_p=0.1, seed=s, impl=impl)
        )(torch.tensor([1, 2]))


def test_vmap_pooling(impl):
    values, scores = torch.randn(5, 8, 6), torch.randn(8)
    batched = torch.vmap(lambda v, s: attention_pool(v, s, OFFSETS, impl=impl), in_dims=(0, None))(
        values, scores
    )
    looped = torch.stack([attention_pool(v, scores, OFFSETS, impl=impl) for v in values])
    assert torch.allclose(batched, looped, atol=1e-6)


def test_func_grad_equals_autograd(impl):
    query, key, value = qkv(requires_grad=True)

    def loss(q, k, v):
        output, lse = ragged_attention(q, k, v, OFFSETS, return_lse=True, impl=impl)
        return output.sin().sum() + lse[:7].detach().abs().nan_to_num(posinf=0).sum()

    expected = torch.autograd.grad(loss(query, key, value), (query, key, value))
    found = torch.func.grad(loss, argnums=(0, 1, 2))(*(x.detach() for x in (query, key, value)))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_forward_mode_raises_instead_of_zero(impl):
    query, key, value = qkv()
    values, scores = torch.randn(8, 5), torch.randn(8)

    def attend(q):
        return ragged_attention(q, key, value, OFFSETS, impl=impl)

    def pool(v):
        return attention_pool(v, scores, OFFSETS, impl=impl)

    for function, x in ((attend, query), (pool, values)):
        with pytest.raises(NotImplementedError, match="forward-mode"):
            torch.func.jvp(function, (x,), (x,))
        with pytest.raises(NotImplementedError, match="forward-mode"):
            torch.func.hessian(lambda t, f=function: f(t).sum())(x)
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(x, x)
            with pytest.raises(NotImplementedError, match="forward-mode"):
                function(dual)
            function(x)  # without a tangent nothing is lost
        assert torch.func.jacrev(function)(x).shape == (*function(x).shape, *x.shape)


def test_a_second_derivative_raises(impl):
    query, key, value = qkv(requires_grad=True)
    output = ragged_attention(query, key, value, OFFSETS, impl=impl)
    grad = torch.autograd.grad(output.square().sum(), query, create_graph=True)[0]
    with pytest.raises(RuntimeError, match="no autograd"):
        grad.sum().backward()
