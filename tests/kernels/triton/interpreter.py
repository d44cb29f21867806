"""Runs Triton kernels on CPU tensors with numpy, in a process that can also compile them.

`interpreting` is a context in which every launch of a ``@triton.jit`` kernel is interpreted: one
program after the other, each operation by numpy, which makes the *semantics* of a kernel testable
against float64 without a GPU. It stands on Triton 3.7's own interpreter and differs from it:

* It is a context, not ``TRITON_INTERPRET=1`` at import: the same kernels compile before and after.
  Launches and calls of device functions are caught in ``JITFunction`` itself, so no module has to
  be patched; ``triton.language`` is patched for the length of a launch and always restored.
* bfloat16 is right. Triton's interpreter adds, multiplies and compares the *bit patterns*, and
  truncates on the way down. Here operations compute in float32 and round to nearest even, as
  compiled code does.
* ``fma`` rounds once, integers wrap without a second, 64-bit evaluation, ``~`` works on unsigned
  integers, ``erf`` is vectorised, float arguments are float32 as in compiled code.
* Every access is checked: it must lie inside a tensor that the launch was given (Triton's own
  would corrupt the heap), and no program may touch what another program of the launch has written.
* `torch.empty` is poisoned (NaN, largest integers), so nothing can rely on fresh memory being 0.
* The operations of `aam_kernels` serve CPU tensors with ``impl="triton"`` inside.

What it cannot show: races within a program, ``input_precision``, warps, stages, shared memory.
Set OPENBLAS_NUM_THREADS=1: products here are small and threads cost five times what they save.
"""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import importlib
import inspect
from collections.abc import Callable, Iterator
from types import FunctionType
from typing import Any
from unittest import mock

import numpy as np
import torch
import triton.language as tl
from torch import Tensor
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter as upstream
from triton.runtime.jit import JITFunction

from aam_kernels._runtime import configurations, dispatch
from profiling.fake_driver import driving

Handle = upstream.TensorHandle
OPERATIONS = ("attention", "pooling", "encoder_layer")
_COMPARISONS = {
    np.less, np.less_equal, np.greater, np.greater_equal, np.equal, np.not_equal,
}  # fmt: skip


class OutOfBounds(AssertionError):
    """A program read or wrote outside every tensor that the launch was given."""


class Race(AssertionError):
    """A program touched an element that another program of the same launch writes."""


@contextlib.contextmanager
def interpreting(architecture: str = "gfx942") -> Iterator[None]:
    """Interprets every launch inside, as for ``architecture`` (tables, rounding, precision)."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(driving(architecture))
        stack.enter_context(poisoned_memory())
        stack.enter_context(_serving_cpu())
        patch = mock.patch.multiple(
            upstream,
            interpreter_builder=_BUILDER,
            interpreter_semantic=TritonSemantic(_BUILDER),
            _get_np_dtype=_numpy_dtype,
        )
        stack.enter_context(patch)
        rewritten: dict[int, Callable[..., Any]] = {}

        def call(function: JITFunction, *args: Any, **kwargs: Any) -> Any:
            return _rewrite(function, rewritten)(*args, **kwargs)

        def run(kernel: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
            if not warmup:
                _launch(kernel, _rewrite(kernel, rewritten), grid, args, kwargs)

        stack.enter_context(mock.patch.object(JITFunction, "__call__", call))
        stack.enter_context(mock.patch.object(JITFunction, "run", run))
        yield


@contextlib.contextmanager
def poisoned_memory() -> Iterator[None]:
    """Fills what `torch.empty` and its relatives return with NaN or the largest integer."""
    before = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warn_only)


class GuardZones:
    """Puts tensors inside larger poisoned ones, and sees whether the surroundings stay untouched.

    ``place`` returns a view with the values of a tensor; around it, in every dimension, lie NaN
    (or the largest integers), so a kernel that reads too far shows it in its results.
    """

    def __init__(self, margin: int = 3) -> None:
        self.margin = margin
        self._placed: list[tuple[Tensor, Tensor, Tensor]] = []  # buffer, its copy, mask of the view

    def place(self, x: Tensor) -> Tensor:
        """A view with the values of ``x``; dimensions before the last get other strides."""
        sizes = [size + 2 * self.margin for size in x.shape]
        poison = float("nan") if x.is_floating_point() else torch.iinfo(x.dtype).max
        buffer = torch.full(sizes, poison, dtype=x.dtype)
        inside = tuple(slice(self.margin, self.margin + size) for size in x.shape)
        mask = torch.zeros(sizes, dtype=torch.bool)
        mask[inside] = True
        buffer[inside] = x
        self._placed.append((buffer, buffer.clone(), mask))
        return buffer[inside]

    def check(self) -> None:
        """Raises AssertionError when anything around a placed tensor has changed."""
        for buffer, before, mask in self._placed:
            untouched = torch.where(mask, before, buffer)
            if not torch.equal(_bits(untouched), _bits(before)):
                raise AssertionError(f"written around a tensor inside {tuple(buffer.shape)}")


def _bits(x: Tensor) -> Tensor:
    """The bytes, so that NaN equals NaN."""
    return x.contiguous().reshape(-1).view(torch.uint8)


@contextlib.contextmanager
def _serving_cpu() -> Iterator[None]:
    """Lets the triton implementation of every operation serve CPU tensors."""
    for operation in OPERATIONS:
        importlib.import_module(f"aam_kernels.{operation}.ops")
    before = {operation: dict(table) for operation, table in dispatch._REGISTRY.items()}
    for table in dispatch._REGISTRY.values():
        if "triton" in table:
            table["triton"] = dataclasses.replace(
                table["triton"], devices=("cpu",), auto_dtypes=(), available=lambda: True
            )
    try:
        yield
    finally:
        for operation, table in before.items():
            dispatch._REGISTRY[operation] = table


# Launching ------------------------------------------------------------------------------------


def _launch(
    kernel: JITFunction,
    function: Callable[..., Any],
    grid: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> None:
    """Runs the programs of a grid one after the other."""
    unknown = set(kwargs) - set(kernel.arg_names) - set(configurations.OPTIONS)
    if unknown:
        raise KeyError(f"{kernel.__name__}: neither parameters nor options: {sorted(unknown)}")
    meant = {name: value for name, value in kwargs.items() if name in kernel.arg_names}
    bound = inspect.getcallargs(kernel.fn, *args, **meant)
    sizes = grid(bound) if callable(grid) else grid
    sizes = (*sizes, *(1,) * (3 - len(sizes)))
    constants = {parameter.name for parameter in kernel.params if parameter.is_constexpr}
    _BUILDER.memory = _Memory(bound)
    _BUILDER.set_grid_dim(*sizes)
    with _patched_language(), np.errstate(all="ignore"):
        values = {
            name: value if name in constants else _as_argument(value)
            for name, value in bound.items()
        }
        for number, place in enumerate(np.ndindex(*sizes)):
            _BUILDER.set_grid_idx(*place)
            _BUILDER.memory.program = number
            function(**values)


def _as_argument(value: Any) -> Any:
    """A kernel argument as compiled code receives it: a pointer, a 32 or 64-bit scalar."""
    if isinstance(value, bool):
        return tl.tensor(Handle(np.array([value]), tl.int1), tl.int1)
    if isinstance(value, float):
        return tl.tensor(Handle(np.array([value], dtype=np.float32), tl.float32), tl.float32)
    if isinstance(value, Tensor) and value.device.type != "cpu":
        raise ValueError(f"interpreted kernels take CPU tensors, got one on {value.device}")
    return upstream._implicit_cvt(value)


@contextlib.contextmanager
def _patched_language() -> Iterator[None]:
    """Replaces the builtins of triton.language by interpreted ones."""
    scope = upstream._LangPatchScope()
    builder = _BUILDER
    try:
        for language in (tl, tl.core):
            upstream._patch_builtin(language, builder, scope)
            upstream._patch_lang_core(language, scope)
        upstream._patch_builtin(tl.math, builder, scope)
        upstream._patch_builtin(tl.tensor, builder, scope)
        upstream._patch_builtin(tl.core.tensor_descriptor_base, builder, scope)
        upstream._patch_lang_tensor(tl.tensor, scope)
        for name, member in list(vars(tl.tensor).items()):
            if isinstance(member, JITFunction):  # x.sum(0): not a method until it is a function
                scope.set_attr(tl.tensor, name, _method(member))
        yield
    finally:
        scope.restore()


def _method(function: JITFunction) -> Callable[..., Any]:
    return lambda self, *args, **kwargs: function(self, *args, **kwargs)


def _rewrite(function: JITFunction, rewritten: dict[int, Callable[..., Any]]) -> Callable[..., Any]:
    """The Python function in which every assigned value becomes a tensor.

    It gets a copy of its module's names, where Triton's own adds fifty names to the module.
    """
    found = rewritten.get(id(function))
    if found is None:
        tree = upstream.ASTTransformer().visit(ast.parse(function.src))
        ast.fix_missing_locations(tree)
        first_line = function.starting_line_number + _lines_of_decorators(function)
        ast.increment_lineno(tree, first_line - 1)
        code = compile(tree, inspect.getfile(function.fn), "exec")
        names = {
            **function.get_capture_scope(),
            "interpreter_semantic": upstream.interpreter_semantic,
        }
        exec(code, names)
        found = rewritten[id(function)] = names[function.fn.__name__]
        assert isinstance(found, FunctionType)
    return found


def _lines_of_decorators(function: JITFunction) -> int:
    lines = function.raw_src
    return next(n for n, line in enumerate(lines) if line.lstrip().startswith("def "))


# Memory ---------------------------------------------------------------------------------------


class _Memory:
    """The tensors of one launch: who may be touched, and who has written what."""

    def __init__(self, arguments: dict[str, Any]) -> None:
        self.program = 0
        self.synchronised = False  # atomics order programs in ways that this does not follow
        self._extents: list[tuple[int, int, int]] = []  # first byte, end, start of the storage
        self._writers: dict[int, np.ndarray] = {}
        self._sizes: dict[int, int] = {}
        tensors = [x for x in arguments.values() if isinstance(x, Tensor) and x.numel() > 0]
        for x in tensors:
            last = sum(
                (size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True)
            )
            storage = x.untyped_storage()
            end = x.data_ptr() + (last + 1) * x.element_size()
            self._extents.append((x.data_ptr(), end, storage.data_ptr()))
            self._sizes[storage.data_ptr()] = storage.nbytes()

    def read(self, addresses: np.ndarray, mask: np.ndarray, size: int) -> None:
        """Checks a load."""
        touched = self._touched(addresses, mask, size, "reads")
        if touched is not None and touched[0] in self._writers and not self.synchronised:
            writers = self._writers[touched[0]][touched[1]]
            if ((writers != self.program) & (writers >= 0)).any():
                raise Race(f"program {self.program} reads what another program writes")

    def write(self, addresses: np.ndarray, mask: np.ndarray, size: int) -> None:
        """Checks a store."""
        touched = self._touched(addresses, mask, size, "writes")
        if touched is None or self.synchronised:
            return
        storage, places = touched
        if storage not in self._writers:
            self._writers[storage] = np.full(self._sizes[storage] // size, -1, dtype=np.int32)
        writers = self._writers[storage]
        before = writers[places]
        if ((before != self.program) & (before >= 0)).any():
            raise Race(f"programs {before.max()} and {self.program} write the same element")
        writers[places] = self.program

    def _touched(
        self, addresses: np.ndarray, mask: np.ndarray, size: int, what: str
    ) -> tuple[int, np.ndarray] | None:
        chosen = addresses[np.broadcast_to(mask, addresses.shape)]
        if chosen.size == 0:
            return None
        low, high = int(chosen.min()), int(chosen.max()) + size
        for start, end, storage in self._extents:
            if start <= low and high <= end:
                return storage, (chosen - np.uint64(storage)).astype(np.int64) // size
        raise OutOfBounds(
            f"program {self.program} {what} {high - low} bytes from {low:#x}, which are not "
            f"inside one tensor of the launch"
        )


# Operations -----------------------------------------------------------------------------------

_find_numpy_dtype = upstream._get_np_dtype
_NUMPY_DTYPES: dict[str, np.dtype] = {}


def _numpy_dtype(x: Any) -> np.dtype:
    """Triton's own function builds a table on each of its many calls."""
    element = x.element_ty if isinstance(x, tl.block_type) else x
    found = _NUMPY_DTYPES.get(element.name)
    if found is None:
        found = _NUMPY_DTYPES[element.name] = _find_numpy_dtype(element)
    return found


def _to_float32(bits: np.ndarray) -> np.ndarray:
    """bfloat16 bit patterns (uint16) as float32."""
    return (np.ascontiguousarray(bits).view(np.uint16).astype(np.uint32) << 16).view(np.float32)


def _to_bfloat16(x: np.ndarray) -> np.ndarray:
    """float32 to bfloat16 bit patterns (uint16), to nearest even."""
    bits = np.ascontiguousarray(x, dtype=np.float32).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(x), np.uint16(0x7FC0), rounded.astype(np.uint16))


def _is_bfloat16(x: Handle) -> bool:
    return x.dtype.scalar == tl.bfloat16


def _widened(x: Handle) -> Handle:
    """float32 for bfloat16, everything else as it is."""
    return Handle(_to_float32(x.data), tl.float32) if _is_bfloat16(x) else x


def _narrowed(x: Handle) -> Handle:
    return Handle(_to_bfloat16(x.data), tl.bfloat16)


class _Builder(upstream.InterpreterBuilder):
    """Triton's numpy builder with the corrections that the module's docstring lists."""

    memory: _Memory

    def __init__(self) -> None:
        super().__init__()
        # Overflow checks evaluate every integer operation twice; accesses are checked instead.
        self.options = dataclasses.replace(self.options, sanitize_overflow=False)
        # As the strictest compiler: 16 elements along the summed dimension of a 16-bit product.
        self.codegen_fns["min_dot_size"] = lambda left, right: (1, 1, 16)

    def create_masked_load(self, ptrs, mask, other, cache, eviction, is_volatile):
        size = _element_size(ptrs)
        self.memory.read(ptrs.data, mask.data, size)
        return super().create_masked_load(ptrs, mask, other, cache, eviction, is_volatile)

    def create_masked_store(self, ptrs, value, mask, cache, eviction):
        self.memory.write(ptrs.data, mask.data, _element_size(ptrs))
        return super().create_masked_store(ptrs, value, mask, cache, eviction)

    def create_atomic_rmw(self, *args):
        self.memory.synchronised = True
        return super().create_atomic_rmw(*args)

    def create_atomic_cas(self, *args):
        self.memory.synchronised = True
        return super().create_atomic_cas(*args)

    def get_bf16(self, value):
        return _narrowed(self.get_fp32(value))

    def get_all_ones_value(self, type):
        dtype = upstream._get_np_dtype(type)
        if dtype.kind == "u":
            return Handle(np.full(1, np.iinfo(dtype).max, dtype=dtype), type.scalar)
        return super().get_all_ones_value(type)

    def cast_impl(self, src, dst_type):
        source, target = src.dtype.scalar, dst_type.scalar
        if source == target:
            return src
        if tl.bfloat16 not in (source, target):
            return super().cast_impl(src, dst_type)
        wide = _widened(src)
        if target == tl.bfloat16:
            return _narrowed(Handle(wide.data.astype(np.float32), tl.float32))
        return super().cast_impl(wide, dst_type)

    def create_fp_to_fp(self, src, dst_type, rounding_mode):
        half = (tl.float16, tl.bfloat16, tl.float32)
        if src.dtype.scalar in half and dst_type.scalar in half:
            return self.cast_impl(src, dst_type)
        return super().create_fp_to_fp(src, dst_type, rounding_mode)

    def binary_op(self, lhs, rhs, op):
        if not _is_bfloat16(lhs):
            return super().binary_op(lhs, rhs, op)
        result = super().binary_op(_widened(lhs), _widened(rhs), op)
        return result if op in _COMPARISONS else _narrowed(result)

    def ternary_op(self, lhs, rhs, other, op):
        if op is np.where or not _is_bfloat16(other):  # a selection moves bits
            return super().ternary_op(lhs, rhs, other, op)
        return _narrowed(super().ternary_op(_widened(lhs), _widened(rhs), _widened(other), op))

    def unary_op(self, arg, op):
        if _is_bfloat16(arg):
            return _narrowed(super().unary_op(_widened(arg), op))
        return super().unary_op(arg, op)

    def create_fma(self, x, y, z):
        if x.dtype.scalar == tl.float32:  # a product of two float32 is exact in float64
            exact = x.data.astype(np.float64) * y.data + z.data
            return Handle(exact.astype(np.float32), tl.float32)
        return self.create_fadd(self.create_fmul(x, y), z)

    def create_rsqrt(self, arg):
        return self.unary_op(arg, lambda x: 1 / np.sqrt(x))

    def create_erf(self, arg):
        return self.unary_op(
            arg, lambda x: torch.erf(torch.from_numpy(x.astype(np.float64))).numpy().astype(x.dtype)
        )

    def create_dot(self, a, b, d, input_precision, max_num_imprecise_acc):
        left, right = (_widened(x).data for x in (a, b))
        if d.dtype.scalar != tl.float32:
            return super().create_dot(_widened(a), _widened(b), d, input_precision, 0)
        product = np.matmul(left.astype(np.float32), right.astype(np.float32))
        return Handle(product + d.data, tl.float32)


def _element_size(ptrs: Handle) -> int:
    return max(8, ptrs.get_element_ty().primitive_bitwidth) // 8


_BUILDER = _Builder()
