"""The small check that an implementation passes before it is used on a device.

One or two problems for each kind of call (operation, dtype, `Case`): rows of length 0, 1 and up to
the class's bound and one less, NaN in every row that belongs to no sequence, dropout where the call
has it, forward and backward, twice. The truth is ``math`` in float64 on the CPU; what is allowed
comes from ``math`` in the dtype on the device. Implementations are called below the operators and
autograd, so nothing here asks for another check.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from aam_kernels._accuracy import compare, error
from aam_kernels._composed import widened
from aam_kernels._problems import Problem, offsets_of
from aam_kernels._runtime import trust
from aam_kernels._runtime.dispatch import implementation
from aam_kernels._runtime.dropout import resolve_seed
from aam_kernels._runtime.grouping import Sequences
from aam_kernels._runtime.trust import EDGES, Case

DROPOUT = 0.2
HEADS = 2
TAIL = 3
SLACK = 3.0
"""On so few rows the largest errors of two right implementations differ by more than twice."""
LARGE_LAYER = 1 << 28  # rows times weights of a matrix that a layer's truth may take on a CPU


def check(
    operation: str, impl: str, device: torch.device, dtype: torch.dtype, case: Case
) -> list[str]:
    """What of an implementation diverges on a device; empty when it is right."""
    bounds: tuple[int, ...] = (case.longest,)
    if case.longest < 0:
        bounds = (EDGES[-1],) if operation == "encoder_layer" else (EDGES[-2], EDGES[-1])
    for bound in bounds:
        failures = _check_problem(_problem(operation, case, bound), impl, device, dtype, case)
        if failures:
            return failures
    return []


def _check_problem(
    problem: Problem, impl: str, device: torch.device, dtype: torch.dtype, case: Case
) -> list[str]:
    inputs = problem.inputs(dtype, device)
    known = case.longest >= 0
    products = sum(problem.lengths) * max(x.numel() for x in inputs.values())
    layer = problem.operation == "encoder_layer"
    truth_device = device if layer and products > LARGE_LAYER else torch.device("cpu")
    math, module = (implementation(problem.operation, name) for name in ("math", impl))
    exact = {name: x.to(truth_device, torch.float64) for name, x in inputs.items()}
    truth, of_math = _run(math, problem, exact, known), _run(math, problem, inputs, known)
    allowed = {name: error(of_math[name], expected) for name, expected in truth.items()}
    # On the CPU: autograd on the device would wait for a backward pass that waits for this check.
    on_cpu = {name: x.cpu() for name, x in inputs.items()}
    allowed = widened(allowed, problem, on_cpu, truth)
    ignored = problem.ignored(device)
    for name, rows in ignored.items():
        inputs[name][rows] = float("nan")
    result, again = (_run(module, problem, inputs, known) for _ in range(2))
    failures = list(compare(result, truth, allowed, dtype, slack=SLACK).failures)
    if layer and not failures:
        kept = _run(module, problem, inputs, known, keep=True)
        found = compare(kept, truth, allowed, dtype, slack=SLACK).failures
        failures.extend(f"with activations kept: {failure}" for failure in found)
    different = [name for name, x in result.items() if not torch.equal(x, again[name])]
    if different:
        failures.append(f"repeated: {', '.join(different)} not bitwise equal")
    for name, rows in ignored.items():
        tensor = result["output"] if name == "grad" else result[f"grad {name}"]
        if not bool((tensor[rows] == 0).all()):
            failures.append(f"rows without a sequence are not 0: {name}")
    return failures


def _problem(operation: str, case: Case, bound: int) -> Problem:
    lengths: tuple[int, ...] = (bound, 0, 1, bound - 1, bound // 2)
    if bound == EDGES[-1]:
        lengths = (600, 0, 1, 257, 33)
    heads, head_dim = HEADS, case.width[0] if case.width else 32
    if operation == "pooling":
        heads = 1
    elif operation == "encoder_layer" and case.width:
        heads = case.width[1]
        head_dim //= heads
        lengths = lengths[:3]
    keys = (bound // 2, 5, 0, min(bound, lengths[0]), 1) if case.form == "cross" else None
    return Problem(
        operation,
        str(case),
        lengths,
        heads,
        head_dim,
        key_lengths=keys,
        dropout_p=DROPOUT if case.dropout else 0.0,
        tail=TAIL,
        padded=case.form == "gaps",
    )


def _run(
    module: ModuleType, problem: Problem, x: dict[str, Tensor], known: bool, keep: bool = False
) -> dict[str, Tensor]:
    """Output and gradients by an implementation's own functions."""
    device = x["grad"].device
    seed = resolve_seed(problem.seed, problem.dropout_p, device)
    longest = max(problem.lengths) if known else -1
    if problem.operation == "encoder_layer":
        return _run_layer(module, problem, x, seed, longest, keep)
    sequences = _sequences(problem, device, longest)
    if problem.operation == "pooling":
        pooled, lse = module.forward(x["values"], x["scores"], sequences)
        grads = module.backward(x["grad"], x["values"], x["scores"], pooled, lse, sequences)
        names: tuple[str, ...] = ("values", "scores")
        output = pooled
    else:
        names = ("query", "key", "value")
        qkv = _views(x) if problem.key_lengths is None else tuple(x[name] for name in names)
        how = (sequences, problem.head_dim**-0.5, problem.dropout_p, seed)
        output, lse = module.forward(*qkv, *how)
        grads = module.backward(x["grad"], *qkv, output, lse, *how)
    gradients = {f"grad {name}": grad for name, grad in zip(names, grads, strict=True)}
    return {"output": output, "lse": lse.nan_to_num(nan=float("nan"), neginf=0.0), **gradients}


def _run_layer(
    module: ModuleType,
    problem: Problem,
    x: dict[str, Tensor],
    seed: Tensor | None,
    longest: int,
    keep: bool,
) -> dict[str, Tensor]:
    from aam_kernels.encoder_layer.saved import nothing_saved
    from aam_kernels.encoder_layer.weights import EncoderLayerWeights

    weights = EncoderLayerWeights(*(x[name] for name in EncoderLayerWeights._fields))
    offsets = offsets_of(problem.lengths, x["x"].device)
    where = (x["x"], offsets, weights, problem.heads, problem.dropout_p, seed, longest)
    output, saved = module.forward(*where, keep)
    if saved is None:
        saved = nothing_saved(x["x"])
    grads = module.backward(x["grad"], *where, saved, [True] * 13)
    names = ("x", *EncoderLayerWeights._fields)
    gradients = {f"grad {name}": grad for name, grad in zip(names, grads, strict=True)}
    return {"output": output, **gradients}


def _sequences(problem: Problem, device: torch.device, longest: int) -> Sequences:
    if problem.padded:
        slots = max(problem.lengths) + problem.tail
        offsets = torch.arange(len(problem.lengths) + 1, device=device, dtype=torch.int32) * slots
        lengths = torch.tensor(problem.lengths, dtype=torch.int32, device=device)
        return Sequences(offsets, None, lengths, None, longest)
    offsets, keys = offsets_of(problem.lengths, device), problem.key_lengths
    if keys is None:
        return Sequences(offsets, max_length=longest)
    longest_key = max(keys) if longest >= 0 else -1
    return Sequences(offsets, offsets_of(keys, device), None, None, longest, longest_key)


def _views(x: dict[str, Tensor]) -> tuple[Any, ...]:
    """Query, key and value as a model has them: views of one (total, 3, heads, head_dim) tensor."""
    return torch.stack([x["query"], x["key"], x["value"]], 1).unbind(1)


trust.install(check)
