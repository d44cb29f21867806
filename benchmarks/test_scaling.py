"""How the layer's speed depends on threads, on tokens, and on the processor it is compiled for."""

import pytest

from aam_kernels import available_impls
from benchmarks import machine
from benchmarks.comparison import Goal, Work
from benchmarks.kernels import layer_work
from benchmarks.machine import PEAK

pytestmark = pytest.mark.scaling
IMPL = available_impls("cpu")["encoder_layer"][0]
LAYER, MULTIPLY_ADDS = "benchmarks.kernels:layer_call", "benchmarks.machine:multiply_adds"


@pytest.fixture
def layers(own_process):
    """The layer in processes of their own, and the FMA peak of each; and the work of each."""

    def start(environments, lengths, **options):
        contestants, work = {}, {}
        executed = layer_work(lengths, backward=True, recompute=True)
        for name, environment in environments.items():
            contestants[name] = own_process(
                LAYER, environment=environment, lengths=lengths, dropout=0.1, **options
            )
            work[name] = executed
            if machine.native() is not None:
                peak = own_process(MULTIPLY_ADDS, environment=environment)
                contestants[f"{PEAK}, {name}"], work[f"{PEAK}, {name}"] = peak, Work(**peak())
        return contestants, work

    return start


def test_threads(compare, layers, timing):
    names = {f"{n} thread{'s' * (n > 1)}": {"OMP_NUM_THREADS": str(n)} for n in (1, 2)}
    contestants, work = layers(names, [151] * 64 if timing else [21] * 3, impl=IMPL)
    compare(
        f"layer, aam {IMPL}, recompute, dropout 0.1, forward+backward, on 1 and 2 threads",
        contestants,
        reference="1 thread",
        work=work,
        limits=False,
        goals=[
            Goal("2 threads", 1.9),
            Goal(f"{PEAK}, 2 threads", 1.9, over=f"{PEAK}, 1 thread", of="operations"),
        ],
    )


def test_variants(compare, layers, timing):
    """Each in a process that AAM_KERNELS_CPU holds to it, as a share of its own peak."""
    extension = machine.native()
    if extension is None:
        pytest.skip("the extension is not built")
    variants = extension.runnable()
    contestants, work = layers(
        {name: {"AAM_KERNELS_CPU": name} for name in variants},
        [151] * 64 if timing else [21] * 3, impl=IMPL,
    )  # fmt: skip
    compare(
        f"layer, aam {IMPL}, recompute, dropout 0.1, forward+backward, by variant",
        contestants,
        reference=variants[0],
        work=work,
        limits=False,
        goals=[
            Goal(name, goal, over=f"{PEAK}, {name}", of="operations")
            for name, goal in {"x86-64-v4": 0.6, "x86-64-v3": 0.7}.items()
        ],
    )


def test_tokens(compare, own_process, timing):
    """The time a token is the same in a batch of 10,000 tokens and of a million."""
    counts = {f"{n:,} tokens": n // 100 for n in (10_000, 100_000, 1_000_000)}
    if not timing:
        counts = {f"{n} tokens": n // 100 for n in (200, 400)}
    least, *_, most = counts
    compare(
        f"layer, aam {IMPL}, recompute, dropout 0.1, forward+backward, rows of 100 tokens",
        {
            name: own_process(LAYER, lengths=[100] * count, dropout=0.1, impl=IMPL)
            for name, count in counts.items()
        },
        reference=least,
        rounds=5,
        work={
            name: layer_work([100] * count, backward=True, recompute=True)
            for name, count in counts.items()
        },
        goals=[
            Goal(most, 0.9, over=least, of="operations"),
            Goal(least, 0.9, over=most, of="operations"),
        ],
    )
