"""The compiled layer: widths, row lengths, what is kept and what is made again."""

import pytest
import torch

from aam_kernels import EncoderLayerWeights, encoder_layer
from tests.kernels.layers import FLOOR, errors, make_weights, problem, run

SHORT = (5, 0, 1, 33, 7)
ALL_LENGTHS = (0, 1, 2, 15, 16, 17, 31, 33, 64, 65, 101, 151, 257, 0)


def check(options, lengths, **shape):
    """Errors of at most twice math's, and the same bits with activations kept and made again."""
    x, offsets, weights, grad = problem(lengths, **shape)
    exact_x, *exact_weights = (t.detach().double().requires_grad_() for t in (x, *weights))
    exact_weights = EncoderLayerWeights(*exact_weights)
    exact = run(exact_x, offsets, exact_weights, grad.double(), impl="math", **options)
    of_math = errors(run(x, offsets, weights, grad, impl="math", **options), exact)
    allowed = (2 * torch.tensor(of_math) + FLOOR).tolist()
    made = run(x, offsets, weights, grad, impl="cpu", **options)
    kept = run(x, offsets, weights, grad, impl="cpu", recompute=False, **options)
    names = ("output", "x", *weights._fields)
    for name, most, ours in zip(names, allowed, errors(made, exact), strict=True):
        assert ours[0] <= most[0] and ours[1] <= most[1], (name, ours, most)
    for name, one, other in zip(names, made, kept, strict=True):
        assert torch.equal(one, other), name


@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
@pytest.mark.parametrize(
    ("dim", "heads", "hidden"),
    [
        (32, 4, 128), (48, 2, 100), (80, 5, 320), (128, 4, 512), (128, 1, 33), (160, 8, 640),
        (256, 2, 1), (96, 12, 17),
    ],
)  # fmt: skip
def test_widths(compiled, dim, heads, hidden, dropout_p):
    options = {"num_heads": heads, "dropout_p": dropout_p, "seed": 3}
    check(options, SHORT, dim=dim, ffn_dim=hidden)


def test_the_widest(compiled):
    check({"num_heads": 18, "dropout_p": 0.1, "seed": 3}, (3, 20), dim=1152, ffn_dim=4608)


@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
def test_row_lengths(compiled, dropout_p):
    options = {"num_heads": 2, "dropout_p": dropout_p, "seed": 3}
    check(options, ALL_LENGTHS, dim=32, ffn_dim=64)


def test_long_rows(compiled):
    check({"num_heads": 1, "dropout_p": 0.1, "seed": 3}, (4096, 1, 1000), dim=16, ffn_dim=16)


@pytest.mark.parametrize("heads", [1, 2, 4, 8])
def test_a_layer_without_dropout_ignores_the_seed(compiled, heads):
    # Nor may it be looked at: a 0-d tensor on a device would be waited for.
    from aam_kernels.encoder_layer import cpu

    x, offsets, weights, _ = problem(SHORT, dim=64, ffn_dim=64)
    unreadable = torch.empty((), dtype=torch.int64, device="meta")
    x, weights = x.detach(), EncoderLayerWeights(*(w.detach() for w in weights))
    output, _ = cpu.forward(x, offsets, weights, heads, 0.0, unreadable, 33, False)
    expected, _ = cpu.forward(x, offsets, weights, heads, 0.0, None, 33, False)
    assert torch.equal(output, expected)


@pytest.mark.parametrize("recompute", [True, False])
def test_what_is_kept_a_token(compiled, recompute):
    x, offsets, weights, _ = problem((101, 7, 151), dim=128, ffn_dim=512, extra=0)
    kept = []

    def pack(tensor):
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        encoder_layer(
            x, offsets, weights, num_heads=4, dropout_p=0.1, recompute=recompute, impl="cpu"
        )
    own = {t.untyped_storage().data_ptr() for t in (*weights, offsets)}
    found = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in kept}
    tokens = 259
    seed = 3 * 8  # and the first rows
    size = sum(nbytes for place, nbytes in found.items() if place not in own) - seed
    assert size == tokens * (512 if recompute else 512 + 4 * (5 * 128 + 512 + 4))
    assert size <= tokens * (512 if recompute else 5.2 * 1024)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_gradients_have_the_dtype_of_their_weights(compiled, dtype):
    from aam_kernels.encoder_layer import cpu

    torch.manual_seed(0)
    x, grad = torch.randn(2, 12, 32).unbind(0)
    offsets = torch.tensor([0, 5, 12], dtype=torch.int32)
    weights = make_weights(32, 48, dtype, grad=False)
    rounded = EncoderLayerWeights(*(w.float() for w in weights))
    nothing = [x.new_empty(0)] * 5
    needs = [True, *[True, False] * 6]
    found = cpu.backward(grad, x, offsets, weights, 2, 0.0, None, 7, nothing, needs)
    expected = cpu.backward(grad, x, offsets, rounded, 2, 0.0, None, 7, nothing, needs)
    for need, mine, true in zip(needs[1:], found[1:], expected[1:], strict=True):
        assert (mine is None) is not need
        assert mine is None or (mine.dtype == dtype and torch.equal(mine, true.to(dtype)))


@pytest.mark.parametrize(
    ("dim", "heads", "message"),
    [
        (24, 2, "a multiple of 16 and a head_dim of 8 to 128, got D = 24 and head_dim 12"),
        (16, 4, "got D = 16 and head_dim 4"),
        (144, 1, "got D = 144 and head_dim 144"),
    ],
)
def test_widths_that_are_refused(compiled, dim, heads, message):
    x, offsets, weights, grad = problem(SHORT, dim=dim, ffn_dim=20)
    with pytest.raises(ValueError, match=message):
        encoder_layer(x, offsets, weights, num_heads=heads, impl="cpu")
    found = run(x, offsets, weights, grad, num_heads=heads)
    expected = run(x, offsets, weights, grad, num_heads=heads, impl="sdpa")
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
