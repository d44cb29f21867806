"""`encoder_layer` as a torch operator: opcheck, compile, export, vmap, functorch."""

from __future__ import annotations

import pytest
import torch

from aam_kernels import EncoderLayerWeights, encoder_layer
from aam_kernels._runtime.dropout import resolve_seed
from aam_kernels.encoder_layer import ops
from aam_kernels.encoder_layer.saved import Saved
from tests.kernels.contract import require

WIDTH, HIDDEN, HEADS = 16, 20, 2
SHAPES = (
    (WIDTH,), (WIDTH,), (3 * WIDTH, WIDTH), (3 * WIDTH,), (WIDTH, WIDTH), (WIDTH,),
    (WIDTH,), (WIDTH,), (HIDDEN, WIDTH), (HIDDEN,), (WIDTH, HIDDEN), (WIDTH,),
)  # fmt: skip


@pytest.fixture
def problem():
    torch.manual_seed(0)
    x = torch.randn(9, WIDTH, requires_grad=True)
    weights = [(0.3 * torch.randn(shape)).requires_grad_() for shape in SHAPES]
    return x, torch.tensor([0, 4, 4, 9], dtype=torch.int32), weights


@pytest.mark.parametrize("recompute", [True, False])
@pytest.mark.parametrize("dropout_p", [0.0, 0.2])
def test_opcheck(problem, impl, dropout_p, recompute):
    x, offsets, weights = problem
    seed = resolve_seed(3, dropout_p, x.device)
    how = (HEADS, dropout_p, seed, 5, impl)
    torch.library.opcheck(ops.encoder_layer, (x, offsets, *weights, *how, recompute))
    plain = [weight.detach() for weight in weights]
    output, *saved = ops.encoder_layer(x.detach(), offsets, *plain, *how, recompute)
    needs = [True, False] * 6 + [True]
    arguments = (torch.ones_like(output), x.detach(), offsets, *plain, *saved, needs, *how)
    torch.library.opcheck(ops.encoder_layer_backward, arguments)


def test_compile_keeps_one_node_each_way(problem, impl):
    torch._dynamo.reset()
    x, offsets, weights = problem
    nodes = []

    def backend(graph, example_inputs):
        nodes.extend(str(n.target) for n in graph.graph.nodes if "aam_kernels" in str(n.target))
        return graph

    def layer(x, offsets, weights):
        w = EncoderLayerWeights(*weights)
        return encoder_layer(x * 2, offsets, w, num_heads=HEADS, max_length=9, impl=impl) + 1

    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend=backend)
    for rows in (9, 7):
        bounds = offsets.clamp(max=rows)
        part = x[:rows].detach().requires_grad_()
        out = compiled(part, bounds, weights)
        out.sum().backward()
        again = x[:rows].detach().requires_grad_()
        expected = layer(again, bounds, weights)
        expected.sum().backward()
        assert torch.equal(out, expected)
        assert torch.equal(part.grad, again.grad)
    assert set(nodes) == {"aam_kernels.encoder_layer.default"}
    assert len(nodes) <= 2


def test_export_keeps_one_node(problem, impl):
    x, offsets, weights = problem

    class Layer(torch.nn.Module):
        def forward(self, x, offsets, weights):
            w = EncoderLayerWeights(*weights)
            return encoder_layer(x, offsets, w, num_heads=HEADS, max_length=9, impl=impl)

    exported = torch.export.export(Layer(), (x.detach(), offsets, [w.detach() for w in weights]))
    names = [str(node.target) for node in exported.graph.nodes]
    assert names.count("aam_kernels.encoder_layer.default") == 1
    assert torch.equal(exported.module()(x, offsets, weights), Layer()(x, offsets, weights))


def test_vmap_over_rows_weights_and_both(problem, impl):
    x, offsets, weights = problem
    many = torch.stack([x.detach(), 2 * x.detach()])
    scales = torch.tensor([1.0, 3.0])

    def layer(x, scale):
        w = EncoderLayerWeights(*(scale * weight for weight in weights))
        return encoder_layer(x, offsets, w, num_heads=HEADS, dropout_p=0.2, seed=3, impl=impl)

    for x_dim, scale_dim in ((0, None), (None, 0), (0, 0)):
        arguments = many if x_dim == 0 else many[0], scales if scale_dim == 0 else scales[1]
        result = torch.vmap(layer, in_dims=(x_dim, scale_dim))(*arguments)
        expected = [
            layer(many[i] if x_dim == 0 else many[0], scales[i] if scale_dim == 0 else scales[1])
            for i in range(2)
        ]
        assert torch.equal(result, torch.stack(expected))


def test_gradients_of_each_example_through_vmap(problem, impl):
    x, offsets, weights = problem
    many = torch.stack([x.detach(), -x.detach()])

    def loss(qkv, x):
        w = EncoderLayerWeights(*(w.detach() for w in weights))._replace(qkv_weight=qkv)
        return encoder_layer(x, offsets, w, num_heads=HEADS, impl=impl).square().sum()

    qkv = weights[2].detach()
    result = torch.vmap(torch.func.grad(loss), in_dims=(None, 0))(qkv, many)
    for one, x_one in zip(result, many, strict=True):
        assert torch.equal(one, torch.func.grad(loss)(qkv, x_one))


def test_forward_mode_is_refused(problem):
    x, offsets, weights = problem

    def layer(x):
        return encoder_layer(x, offsets, EncoderLayerWeights(*weights), num_heads=HEADS)

    with pytest.raises(NotImplementedError, match="forward-mode"):
        torch.func.jvp(layer, (x.detach(),), (x.detach(),))


@pytest.mark.parametrize("impl", ["sdpa", "cpu"])
def test_with_recomputation_the_input_alone_is_kept(problem, impl):
    require(impl)
    x, offsets, weights = problem
    kept = {}
    for recompute in (True, False):
        sizes = []

        def pack(tensor, sizes=sizes):
            sizes.append(tensor)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            encoder_layer(
                x, offsets, EncoderLayerWeights(*weights), num_heads=HEADS, recompute=recompute,
                impl=impl,
            )  # fmt: skip
        own = {t.data_ptr() for t in (*weights, offsets)}
        kept[recompute] = sum(t.nbytes for t in sizes if t.data_ptr() not in own)
    assert kept[True] == 9 * 4 * WIDTH
    assert kept[False] == 9 * 4 * (6 * WIDTH + HIDDEN + HEADS)
    assert Saved._fields == ("qkv", "attended", "lse", "mid", "hidden_input")
