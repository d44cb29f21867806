"""The kernels for rows of any length, interpreted: against float64, with poison and guard zones."""

import contextlib

import numpy as np
import pytest
import torch

from aam_kernels._problems import Problem, attention_problems
from aam_kernels._runtime.configurations import ARCHITECTURES, Configuration, forced
from aam_kernels._runtime.dropout import resolve_seed
from aam_kernels._runtime.grouping import Sequences
from aam_kernels._verification import check_problem
from aam_kernels.attention import reference
from aam_kernels.attention.triton import long
from aam_kernels.attention.triton.long_forward import slots_of
from tests.kernels.contract import CPU, offsets_of, oracle_attention
from tests.kernels.triton.interpreter import GuardZones, interpreting
from tests.kernels.triton.test_short_attention import check, draw, truth

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
KERNELS = ("long_forward", "long_backward_queries", "long_backward_keys")
ELSEWHERE = (
    "70,000 sequences",
    "length 4,096",
    "dropout, length 1,024",
    "equal lengths",
    "length one",
    *(f"head_dim {size}" for size in (8, 16, 40, 64, 80, 96)),
)
LENGTHS = (0, 1, 15, 16, 17, 63, 64, 65, 127, 128, 129, 255, 256, 257)


@contextlib.contextmanager
def configured(own=64, streamed=64, architecture="gfx942"):
    """Interprets the long kernels, for rows of every length, with one size of blocks."""
    with contextlib.ExitStack() as stack:
        for kernel in ("short_forward", "short_backward"):
            stack.enter_context(forced(kernel, None))
        for kernel in KERNELS:
            keys = kernel == "long_backward_keys"
            blocks = (streamed, own) if keys else (own, streamed)
            meta = dict(zip(("BLOCK_M", "BLOCK_N"), blocks, strict=True))
            stack.enter_context(forced(kernel, Configuration(meta, {"num_warps": 4})))
        stack.enter_context(interpreting(architecture))
        yield


def both(q, k, v, do, sequences, scale=0.25, dropout_p=0.0, seed=None, before=torch.nan):
    """Output, logsumexp and the three gradients, into tensors full of NaN."""
    output, lse = torch.full_like(q, before), torch.full(q.shape[:2], before)
    grads = tuple(torch.full_like(x, before) for x in (q, k, v))
    longest = sequences.max_length, sequences.max_key_length
    where = sequences, scale, dropout_p, seed, *longest
    long.forward(q, k, v, output, lse, *where)
    long.backward(do, q, k, v, output, lse, grads, *where)
    return output, lse, *grads


def true_lse(q, k, sequences, scale=0.25):
    doubles = q.double(), k.double(), k.double()
    return reference.forward(*doubles, sequences, scale, 0.0, None)[1]


@pytest.mark.parametrize(
    "problem", [p for p in attention_problems() if p.name not in ELSEWHERE], ids=lambda p: p.name
)
def test_contract(problem):
    with configured(128, 64):
        (done,) = check_problem(problem, ("triton",), torch.float32, CPU)
    assert done.failures == ()


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("head_dim", [8, 16, 24, 40, 64, 80, 96, 128])
def test_contract_of_half_dtypes(head_dim, dtype):
    problem = Problem(
        "attention",
        "",
        (1, 0, 129, 40),
        heads=1 + (head_dim == 24),
        head_dim=head_dim,
        key_lengths=(64, 7, 65, 0) if head_dim == 40 else None,
        dropout_p=0.2 if head_dim in (16, 64) else 0.0,
        tail=head_dim % 3,
    )
    with configured():
        (done,) = check_problem(problem, ("triton",), dtype, CPU)
    assert done.failures == ()


@pytest.mark.parametrize(
    ("lengths", "dtype", "dropout_p"),
    [
        ((4096, 5), torch.float32, 0.0),
        ((1024, 3), torch.bfloat16, 0.0),
        ((1024, 511), torch.float16, 0.1),
    ],
)
def test_contract_of_long_rows(lengths, dtype, dropout_p):
    problem = Problem("attention", "", lengths, heads=1, head_dim=16, dropout_p=dropout_p)
    with configured(512, 1024 if lengths[0] > 1024 else 128):
        (done,) = check_problem(problem, ("triton",), dtype, CPU)
    assert done.failures == ()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("blocks", [(64, 32), (128, 128)])
def test_every_length_in_one_call(blocks, dtype):
    q, k, v, do, sequences = draw(LENGTHS, dtype=dtype, tail=5)
    with configured(*blocks):
        output, lse, *grads = both(q, k, v, do, sequences)
    check((output, *grads), truth(q, k, v, do, LENGTHS), dtype)
    assert torch.allclose(lse.double(), true_lse(q, k, sequences), atol=1e-5)
    assert (output[-5:] == 0).all() and (lse[-5:] == -torch.inf).all()
    assert all((x[-5:] == 0).all() for x in grads)


def test_cross_lengths_and_empty_sides():
    lengths, key_lengths = (3, 0, 40, 7, 0, 200, 64), (5, 9, 0, 151, 0, 17, 129)
    q, k, v, do, sequences = draw(lengths, heads=2, key_lengths=key_lengths, tail=2)
    with configured():
        output, lse, *grads = both(q, k, v, do, sequences)
    check((output, *grads), truth(q, k, v, do, lengths, key_lengths), torch.float32)
    assert (output[3:43] == 0).all() and (lse[3:43] == -torch.inf).all()
    assert (grads[1][5:14] == 0).all() and (grads[2][5:14] == 0).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_large_scores(dtype, monkeypatch):
    # Scores around 1e3: one key takes nearly everything, the others underflow. Products of swapped
    # operands are the same bits on a GPU, but not in numpy's float32.
    exact = np.matmul
    monkeypatch.setattr(
        np, "matmul", lambda a, b: exact(a.astype(np.float64), b.astype(np.float64)).astype(a.dtype)
    )
    problem = Problem("attention", "", (40, 129, 7), heads=1)
    inputs = problem.inputs(dtype)
    q, k, v, do = (inputs[name] for name in ("query", "key", "value", "grad"))
    q *= 30.0
    sequences = Sequences(offsets_of(problem.lengths), max_length=129, max_key_length=129)
    with configured():
        results = both(q, k, v, do, sequences, 32**-0.5)
    doubles = [x.double() for x in (q, k, v)]
    expected = reference.forward(*doubles, sequences, 32**-0.5, 0.0, None)
    where = (sequences, 32**-0.5, 0.0, None)
    true_grads = reference.backward(do.double(), *doubles, *expected, *where)
    math = reference.forward(q, k, v, *where)
    math_grads = reference.backward(do, q, k, v, *math, *where)
    compared = zip(results, (*expected, *true_grads), (*math, *math_grads), strict=True)
    for number, (x, y, z) in enumerate(compared):
        error, of_math = ((t.double() - y).abs().mean() for t in (x, z))
        assert error <= (0.8 if dtype == torch.float32 else 1.5) * of_math + 1e-8, number


@pytest.mark.parametrize("scale", [-2.0, 0.0, 0.5])
def test_scales_of_any_sign(scale):
    lengths = (20, 0, 131)
    q, k, v, do, sequences = draw(lengths, size=3.0)
    with configured():
        output, lse, *grads = both(q, k, v, do, sequences, scale)
    check((output, *grads), truth(q, k, v, do, lengths, scale=scale), torch.float32)
    assert torch.allclose(lse.double(), true_lse(q, k, sequences, scale), atol=1e-5)


def test_scores_far_below_zero():
    # Keys past the end of a row would have a score of 0: far above all real ones here.
    q, k, v, do, sequences = draw((9, 140))
    q, k = q.abs() * 10, -k.abs() * 10
    with configured():
        output, _, *grads = both(q, k, v, do, sequences)
    check((output, *grads), truth(q, k, v, do, (9, 140)), torch.float32)


@pytest.mark.parametrize("cross", [False, True])
def test_dropout_is_that_of_math(cross):
    key_lengths = (70, 3, 0, 150) if cross else None
    q, k, v, do, sequences = draw((17, 0, 33, 151), heads=3, key_lengths=key_lengths, tail=1)
    seed = resolve_seed(-(1 << 40) + 3, 0.3, q.device)
    where = (sequences, 0.25, 0.3, seed)
    expected = reference.forward(q, k, v, *where)
    wanted = reference.backward(do, q, k, v, *expected, *where)
    with configured():
        output, lse, *grads = both(q, k, v, do, *where)
        unseeded = both(q, k, v, do, sequences)[0]
    assert torch.allclose(output, expected[0], atol=1e-5) and not torch.equal(output, unseeded)
    assert torch.allclose(lse, expected[1], atol=1e-5)
    assert all(torch.allclose(x, y, atol=2e-5) for x, y in zip(grads, wanted, strict=True))


@pytest.mark.parametrize("gaps", [False, True])
@pytest.mark.parametrize("dropout_p", [0.0, 0.25])
def test_nothing_around_the_tensors_is_touched(gaps, dropout_p):
    zones = GuardZones()
    heads, head_dim, room = 2, 24, (20, 160, 3, 33)
    lengths = (17, 129, 0, 32) if gaps else room
    qkv = zones.place(torch.randn(sum(room) + 2, 3, heads, head_dim))
    do = zones.place(torch.randn(sum(room) + 2, heads, head_dim))
    output = zones.place(torch.full_like(do, torch.nan))
    lse = zones.place(torch.full(do.shape[:2], torch.nan))
    grads = zones.place(torch.full(qkv.shape, torch.nan))
    offsets = zones.place(offsets_of(room))
    real = zones.place(torch.tensor(lengths, dtype=torch.int32)) if gaps else None
    outside = torch.ones(len(do), dtype=torch.bool)
    for first, length in zip(offsets_of(room).tolist(), lengths, strict=False):
        outside[first : first + length] = False
    qkv[outside] = torch.nan
    do[outside] = torch.nan
    where = (Sequences(offsets, lengths=real), 0.2, dropout_p, torch.tensor([5, 7, 9]), 160, 160)
    with configured():
        long.forward(*qkv.unbind(1), output, lse, *where)
        long.backward(do, *qkv.unbind(1), output, lse, grads.unbind(1), *where)
    zones.check()
    expected = reference.forward(*qkv.unbind(1), *where[:4])
    wanted = reference.backward(do, *qkv.unbind(1), *expected, *where[:4])
    for x, y in zip((output, lse, *grads.unbind(1)), (*expected, *wanted), strict=True):
        assert torch.allclose(x, y, atol=2e-5)
    for x in (output, *grads.unbind(1)):
        assert (x[outside] == 0).all()
    assert (lse[outside] == -torch.inf).all()


def test_longer_rows_than_promised_give_nan(monkeypatch):
    # The rows that the grid does not reach are NaN, and so are gradients that need them.
    monkeypatch.setattr(torch.Tensor, "new_empty", torch.Tensor.new_zeros)  # not the poison
    lengths = (5, 200, 7)
    q, k, v, do, sequences = draw(lengths, tail=1)
    with configured():
        right = both(q, k, v, do, sequences)
        results = both(
            q, k, v, do, sequences._replace(max_length=100, max_key_length=100), before=7.0
        )
    output, lse, dq, dk, dv = results
    for x in (output, lse, dq):
        assert x[5 + 128 : 205].isnan().all()
    assert torch.equal(output[: 5 + 128], right[0][: 5 + 128])
    assert dk[5:205].isnan().all() and dv[5:205].isnan().all()
    for x, y in zip(results, right, strict=True):
        assert torch.equal(x[:5], y[:5]) and torch.equal(x[205:], y[205:])


def test_one_query_row_without_keys_in_a_batch_of_one():
    q, k, v, do, sequences = draw((3,), key_lengths=(0,))
    with configured():
        output, lse, *grads = both(q, k, v, do, sequences)
    assert (output == 0).all() and (lse == -torch.inf).all() and (grads[0] == 0).all()


def test_nan_in_a_row_stays_there():
    lengths = (9, 70, 30)
    q, k, v, do, sequences = draw(lengths)
    k[40] = torch.nan
    with configured():
        output, lse, *grads = both(q, k, v, do, sequences)
    assert output[9:79].isnan().all() and lse[9:79].isnan().all()
    for x in (output, lse, *grads):
        assert not x[:9].isnan().any() and not x[79:].isnan().any()


def test_many_rows_in_the_tail_and_many_heads():
    for count in (1, 5):
        lengths = tuple(3 + n % 4 for n in range(count))
        q, k, v, do, sequences = draw(lengths, heads=3, tail=1100)
        with configured(16, 16):
            output, _, *grads = both(q, k, v, do, sequences)
        check((output, *grads), truth(q, k, v, do, lengths), torch.float32)
        assert all((x[sum(lengths) :] == 0).all() for x in (output, *grads))


def test_the_workspace_holds_every_sequence():
    # Each begins at a multiple of 16 and ends before the next one begins.
    generator = torch.Generator().manual_seed(3)
    for _ in range(50):
        lengths = torch.randint(0, 40, (9,), generator=generator)
        first = offsets_of(lengths.tolist())[:-1].long()
        begins = (first + 16 * torch.arange(9)) // 16 * 16
        ends = begins + lengths
        assert (ends[:-1] <= begins[1:]).all() and ends[-1] <= slots_of(int(lengths.sum()), 9)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_tables_serve_every_case(architecture):
    with interpreting(architecture):
        for dtype in DTYPES:
            for head_dim in (8, 32, 33, 128):
                query = torch.empty(0, 1, head_dim, dtype=dtype)
                for kernel in KERNELS:
                    assert long.configured(kernel, query, 1 << 20)


def test_a_hand_made_oracle_agrees():
    # Of `math` and of the kernels alike: row by row in plain torch.
    lengths, key_lengths = (70, 3), (20, 90)
    q, k, v, do, sequences = draw(lengths, heads=2, key_lengths=key_lengths)
    leaves = [x.double().requires_grad_() for x in (q, k, v)]
    expected = oracle_attention(*leaves, lengths, key_lengths, 0.25)
    wanted = torch.autograd.grad(expected, leaves, do.double())
    with configured(32, 16):
        output, _, *grads = both(q, k, v, do, sequences)
    check((output, *grads), (expected.detach(), *wanted), torch.float32)
