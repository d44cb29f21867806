"""The short-row kernels, interpreted: against float64, with poison and guard zones around."""

import contextlib
import dataclasses

import pytest
import torch

from aam_kernels._problems import Problem, attention_problems
from aam_kernels._runtime.configurations import Configuration, forced
from aam_kernels._runtime.dropout import resolve_seed
from aam_kernels._runtime.grouping import Sequences
from aam_kernels._verification import check_problem
from aam_kernels.attention.reference import backward as math_backward
from aam_kernels.attention.reference import forward as math_forward
from aam_kernels.attention.triton import backward, backward_into, forward, forward_into, short
from tests.kernels.contract import CPU, offsets_of, oracle_attention
from tests.kernels.triton.interpreter import GuardZones, interpreting

HALVES = (torch.bfloat16, torch.float16)
DTYPES = (torch.float32, *HALVES)
SLOW = ("length 4,096", "dropout, length 1,024", "70,000 sequences", "equal lengths")
IN_HALVES = ("unequal lengths", "dropout, cross", "head_dim 24")
PROBLEMS = [
    pytest.param(problem, dtype, id=f"{problem.name}, {dtype}".replace("torch.", ""))
    for problem in attention_problems()
    for dtype in DTYPES
    if problem.name not in SLOW and (dtype == torch.float32 or problem.name in IN_HALVES)
]
LENGTHS = (0, 1, 15, 16, 17, 31, 32, 33, 63, 64, 65, 101, 127, 128, 129, 150, 151, 152, 160)
LONGER = (192, 255, 256)
TILINGS = {160: (64, 64, 32), 256: (128, 64, 64)}
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}


@contextlib.contextmanager
def configured(tiles=(128, 32), block=16, architecture="gfx942"):
    """Interprets with one configuration of both kernels."""
    meta = {f"TILE_{n}": tile for n, tile in enumerate((*tiles, 0, 0)[:3])}
    chosen = Configuration({"BLOCK_M": block, **meta}, {"num_warps": 1})
    with (
        forced("short_forward", chosen),
        forced("short_backward", chosen),
        interpreting(architecture),
    ):
        yield


def draw(lengths, heads=1, head_dim=16, dtype=torch.float32, key_lengths=None, tail=0, size=1.0):
    """query, key, value, gradient of the output, Sequences."""
    generator = torch.Generator().manual_seed(7)
    rows = sum(lengths) + tail
    key_rows = rows if key_lengths is None else sum(key_lengths) + tail
    q, k, v, do = (
        (torch.randn(n, heads, head_dim, generator=generator) * factor).to(dtype)
        for n, factor in ((rows, size), (key_rows, size), (key_rows, 1.0), (rows, 1.0))
    )
    cross = key_lengths is not None
    sequences = Sequences(
        offsets_of(lengths),
        key_offsets=offsets_of(key_lengths) if cross else None,
        max_length=max(lengths),
        max_key_length=max(key_lengths if cross else lengths),
    )
    return q, k, v, do, sequences


def both(q, k, v, do, sequences, scale=0.25, dropout_p=0.0, seed=None):
    """Output, logsumexp and the three gradients."""
    output, lse = forward(q, k, v, sequences, scale, dropout_p, seed)
    return output, lse, *backward(do, q, k, v, output, lse, sequences, scale, dropout_p, seed)


def truth(q, k, v, do, lengths, key_lengths=None, scale=0.25):
    """Output and gradients by the oracle in float64."""
    rows, key_rows = sum(lengths), sum(key_lengths or lengths)
    leaves = [x[:n].double().requires_grad_() for x, n in ((q, rows), (k, key_rows), (v, key_rows))]
    output = oracle_attention(*leaves, lengths, key_lengths or lengths, scale)
    return output.detach(), *torch.autograd.grad(output, leaves, do[:rows].double())


def check(measured, expected, dtype):
    """Within a tolerance of the largest value."""
    for name, x, y in zip(("output", "dq", "dk", "dv"), measured, expected, strict=True):
        error = (x[: len(y)].double() - y).abs().max() / y.abs().max().clamp(min=1.0)
        assert error < TOLERANCE[dtype], (name, float(error))


@pytest.mark.parametrize(("problem", "dtype"), PROBLEMS)
def test_contract(problem, dtype):
    if problem.head_dim != 32 or problem.padded:
        problem = dataclasses.replace(problem, heads=1)
    longest = max((*problem.lengths, *(problem.key_lengths or ())), default=0)
    with configured((16,) if longest <= 16 else (128, 32)):
        (done,) = check_problem(problem, ("triton",), dtype, CPU)
    assert done.failures == ()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("capacity", TILINGS)
def test_every_length_in_one_call(capacity, dtype):
    lengths = LENGTHS if capacity == 160 else LONGER
    q, k, v, do, sequences = draw(lengths, dtype=dtype, tail=5)
    with configured(TILINGS[capacity], block=32):
        output, lse, *grads = both(q, k, v, do, sequences)
    check((output, *grads), truth(q, k, v, do, lengths), dtype)
    _, expected = math_forward(*(x.double() for x in (q, k, v)), sequences, 0.25, 0.0, None)
    assert torch.allclose(lse.double(), expected, atol=1e-5)
    assert (output[-5:] == 0).all() and (lse[-5:] == -torch.inf).all()
    assert all((x[-5:] == 0).all() for x in grads)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_large_scores(dtype):
    # Scores around 1e3: one key takes nearly everything, the others underflow.
    lengths = (40, 129, 7)
    q, k, v, do, sequences = draw(lengths, head_dim=32, dtype=dtype, size=30.0)
    with configured():
        output, lse, *_ = both(q, k, v, do, sequences)
    expected = truth(q, k, v, do, lengths)[0]
    assert lse.isfinite().all() and (output.double() - expected).abs().max() < 0.02


@pytest.mark.parametrize("scale", [-0.3, 0.0, 2.0])
def test_scales_of_any_sign(scale):
    lengths = (20, 0, 131)
    q, k, v, do, sequences = draw(lengths)
    with configured():
        output, _, *grads = both(q, k, v, do, sequences, scale)
    check((output, *grads), truth(q, k, v, do, lengths, scale=scale), torch.float32)


def test_scores_far_below_zero():
    # Masked keys have a score of 0 in memory: far above all real ones here.
    q, k, v, do, sequences = draw((9, 140))
    q, k = q.abs() * 12, -k.abs() * 12
    with configured():
        output, _, *grads = both(q, k, v, do, sequences)
    check((output, *grads), truth(q, k, v, do, (9, 140)), torch.float32)


def test_cross_lengths_and_empty_sides():
    lengths, key_lengths = (3, 0, 40, 7, 0, 200, 64), (5, 9, 0, 151, 0, 17, 129)
    q, k, v, do, sequences = draw(lengths, heads=2, key_lengths=key_lengths, tail=2)
    with configured(block=32):
        output, lse, *grads = both(q, k, v, do, sequences)
    check((output, *grads), truth(q, k, v, do, lengths, key_lengths), torch.float32)
    assert (output[3:43] == 0).all() and (lse[3:43] == -torch.inf).all()
    assert (grads[1][5:14] == 0).all() and (grads[2][5:14] == 0).all()


@pytest.mark.parametrize("cross", [False, True])
def test_dropout_is_that_of_math(cross):
    key_lengths = (70, 3, 0, 150) if cross else None
    lengths = (17, 0, 33, 151)
    q, k, v, do, sequences = draw(lengths, heads=3, key_lengths=key_lengths, tail=1)
    v = torch.eye(16).repeat(v.shape[0] // 16 + 1, 1)[: len(v), None].expand_as(v).contiguous()
    seed = resolve_seed(-(1 << 40) + 3, 0.3, q.device)
    expected, _ = math_forward(q, k, v, sequences, 0.25, 0.3, seed)
    with configured():
        output, _, *grads = both(q, k, v, do, sequences, 0.25, 0.3, seed)
        unseeded = both(q, k, v, do, sequences)[0]
    assert torch.allclose(output, expected, atol=1e-5) and not torch.equal(output, unseeded)
    wanted = math_backward(do, q, k, v, output, None, sequences, 0.25, 0.3, seed)
    assert all(torch.allclose(x, y, atol=2e-5) for x, y in zip(grads, wanted, strict=True))


@pytest.mark.parametrize("gaps", [False, True])
def test_nothing_around_the_tensors_is_touched(gaps):
    zones = GuardZones()
    heads, head_dim, room = 2, 24, (20, 160, 3, 33)
    lengths = (17, 129, 0, 32) if gaps else room
    qkv = zones.place(torch.randn(sum(room) + 2, 3, heads, head_dim))
    do = zones.place(torch.randn(sum(room) + 2, heads, head_dim))
    output = zones.place(torch.full_like(do, torch.nan))
    grads = zones.place(torch.full(qkv.shape, torch.nan))
    offsets = zones.place(offsets_of(room))
    real = zones.place(torch.tensor(lengths, dtype=torch.int32)) if gaps else None
    q, k, v = qkv.unbind(1)
    outside = torch.ones(len(do), dtype=torch.bool)
    for first, length in zip(offsets_of(room).tolist(), lengths, strict=False):
        outside[first : first + length] = False
    qkv[outside] = torch.nan
    do[outside] = torch.nan
    sequences = Sequences(offsets, lengths=real, max_length=160)
    with configured():
        lse = forward_into(output, q, k, v, sequences, 0.2, 0.0, None)
        backward_into(
            grads.unbind(1), do, q, k, v, output, lse, sequences, 0.2, 0.0, None
        )  # three slices of one tensor
        packed = (x[~outside] for x in (q, k, v, do))
        q, k, v, do = (x.contiguous() for x in packed)
        tight = Sequences(offsets_of(lengths), max_length=160)
        alone = both(q, k, v, do, tight, 0.2)
    zones.check()
    for x, y in ((output, alone[0]), *zip(grads.unbind(1), alone[2:], strict=True)):
        assert torch.equal(x[~outside], y) and (x[outside] == 0).all()
    assert torch.equal(lse[~outside], alone[1]) and (lse[outside] == -torch.inf).all()


def test_more_keys_than_promised_give_nan():
    lengths = (5, 161, 7)
    q, k, v, do, sequences = draw(lengths, tail=1)
    sequences = sequences._replace(max_length=160, max_key_length=160)
    with configured():
        output, lse, *grads = both(q, k, v, do, sequences)
    for x in (output, lse, *grads):
        assert x[5:166].isnan().all()
        assert not x[:5].isnan().any() and not x[166:].isnan().any()


def test_unknown_lengths_are_measured():
    # By the tables: a wrong length would choose tiles that do not hold the keys.
    lengths, key_lengths = (3, 150), (140, 7)
    for keys in (None, key_lengths):
        q, k, v, do, sequences = draw(lengths, key_lengths=keys, dtype=torch.bfloat16)
        with interpreting("gfx942"):
            known = both(q, k, v, do, sequences)
            unknown = sequences._replace(max_length=-1, max_key_length=-1)
            assert all(map(torch.equal, both(q, k, v, do, unknown), known))


def test_many_programs_and_heads():
    # More sequences than a group, and another number of left-over programs each time.
    for count in (1, 24, 47):
        lengths = tuple(n % 4 for n in range(count))
        q, k, v, do, sequences = draw(lengths, heads=2, tail=70)
        with configured((16,)):
            output, _, *grads = both(q, k, v, do, sequences)
        expected = truth(q, k, v, do, lengths) if sum(lengths) else None
        if expected:
            check((output, *grads), expected, torch.float32)
        assert all((x[sum(lengths) :] == 0).all() for x in (output, *grads))


def test_a_gradient_does_not_depend_on_the_tiles():
    q, k, v, do, sequences = draw((40, 101), dtype=torch.bfloat16)
    with configured((128,), block=32):
        one = both(q, k, v, do, sequences)
    with configured((64, 32, 16)):
        three = both(q, k, v, do, sequences)
    check(three[::2] + three[3:4], tuple(x.double() for x in one[::2] + one[3:4]), torch.bfloat16)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("architecture", ["gfx942", "sm_90"])
def test_tables_serve_the_usual_rows(architecture, dtype):
    problem = Problem("attention", "usual", (151, 101, 0, 33), heads=1, dropout_p=0.1)
    with interpreting(architecture):
        query = problem.inputs(dtype)["query"]
        assert short.forward_configuration(query, 151) and short.backward_configuration(query, 151)
        (done,) = check_problem(problem, ("triton",), dtype, CPU)
    assert done.failures == ()
