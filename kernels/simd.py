"""Explicit vectors inside Numba kernels.

A vector is 64 bytes, 16 float32 or 8 float64; where registers are narrower LLVM splits it. Loops that hold
their accumulators in such values run at the rate of the multiply-add units, which LLVM's own vectoriser does
not reach here: it cannot prove that the state, the inputs and the outputs do not overlap.
"""
# Numba and llvmlite ship no types.
# mypy: allow-untyped-defs, allow-untyped-calls, allow-untyped-decorators
# mypy: allow-subclassing-any, allow-any-generics

import ctypes
import hashlib
import itertools
import logging
import os
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import numba
import numba.extending
import torch
from llvmlite import ir  # type: ignore[import-untyped]
from numba import types
from numba.core import cgutils
from numba.extending import models, register_model

BYTES = 64

intrinsic: Any = numba.extending.intrinsic

# Not "fast": with nnan and ninf LLVM may assume that no decay is -inf and no input is NaN.
FASTMATH = {"contract", "reassoc", "nsz", "arcp"}


def jit(function: Callable[..., Any]) -> Any:
    """Compile a part of a kernel, which only other compiled functions call."""
    settings: dict[str, Any] = {"no_cpython_wrapper": True, "no_cfunc_wrapper": True}
    return numba.njit(fastmath=FASTMATH, error_model="numpy", nogil=True, **settings)(function)


def kernel(name: str) -> Callable[[Callable[..., Any]], "Launcher"]:
    """Compile what Python calls, ``function(first, last, *arguments)`` over the tasks first … last−1.

    The machine code is kept on disk where possible, and `Launcher` spreads the tasks over threads.
    """

    def decorate(function: Callable[..., Any]) -> Launcher:
        settings: dict[str, Any] = {"fastmath": FASTMATH, "error_model": "numpy", "nogil": True}
        try:
            compiled = numba.njit(cache=True, **settings)(function)
        except RuntimeError:  # no directory that Numba could write its cache to
            return Launcher(name, numba.njit(**settings)(function))
        # Numba looks only at the file of the kernel itself; a change in a file it calls would go unnoticed.
        cache_file = getattr(getattr(compiled, "_cache", None), "_cache_file", None)
        if cache_file is not None:
            cache_file._source_stamp = _source_stamp()
        return Launcher(name, compiled)

    return decorate


@cache
def _source_stamp() -> str:
    # Numba looks only at the kernel's own file; what it inlines lies in any that is made of these vectors.
    sources = [file.read_bytes() for file in sorted(Path(__file__).parent.rglob("*.py"))]
    return hashlib.sha256(b"".join(source for source in sources if b"simd" in source)).hexdigest()


class Launcher:
    """Runs a compiled kernel over independent tasks, on as many threads as PyTorch uses.

    The threads are Python's: the kernel holds no lock while it runs. Numba's own would have to be compiled
    for, a second time for every kernel, and some of its threading layers end the process when two threads
    call or when it forks.

    Args:
        name: what is being prepared, for the message at the first call.
        compiled: ``compiled(first, last, *arguments)`` does the tasks first … last−1.
    """

    def __init__(self, name: str, compiled: Callable[..., Any]) -> None:
        self.name = name
        self.compiled = compiled
        self.announced = False

    def __call__(self, tasks: int, *arguments: Any) -> None:
        """Run the kernel on tasks 0 … tasks−1."""
        if not self.announced:
            self.announced = True
            logging.getLogger("mainstem").info(
                "preparing %s: compiled in some seconds at the first use, then read from Numba's cache",
                self.name,
            )
        threads = min(torch.get_num_threads(), tasks)
        if threads <= 1 or sum(getattr(x, "size", 0) for x in arguments) < _WORTH_A_THREAD:
            self.compiled(0, tasks, *arguments)
            return
        # Sequences may differ in length, so that whoever is done takes the next piece.
        pieces = min(tasks, 4 * threads)
        bounds = [tasks * i // pieces for i in range(pieces + 1)]
        turn = itertools.count()
        elsewhere = _other_cores()

        def work() -> None:
            while (piece := next(turn)) < pieces:
                self.compiled(bounds[piece], bounds[piece + 1], *arguments)

        def help_out() -> None:
            if elsewhere:
                os.sched_setaffinity(0, elsewhere)
            work()

        helpers = [_pool(threads - 1).submit(help_out) for _ in range(threads - 1)]
        work()
        for helper in helpers:
            helper.result()


_WORTH_A_THREAD = 1 << 15
"""Numbers in all arrays of a call, below which waking a thread takes longer than the work."""


@cache
def _core_number() -> Callable[[], int] | None:
    if not sys.platform.startswith("linux"):
        return None
    return getattr(ctypes.CDLL(None), "sched_getcpu", None)


def _other_cores() -> set[int]:
    """Cores that this thread may run on but for the one it is on; none where the system does not tell.

    Linux likes to wake a thread on the core of whoever woke it, where the two would take turns while
    another core idles.
    """
    core_number = _core_number()
    return set() if core_number is None else os.sched_getaffinity(0) - {core_number()}


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="mainstem")


# A forked process has none of its parent's threads.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_pool.cache_clear)


class Vector(types.Type):
    """64 bytes of float32 or float64."""

    def __init__(self, dtype):
        self.dtype = dtype
        super().__init__(name=f"Vector({dtype})")


def _llvm(dtype):
    element = ir.FloatType() if dtype == types.float32 else ir.DoubleType()
    return ir.VectorType(element, BYTES * 8 // dtype.bitwidth)


@register_model(Vector)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, dmm, fe_type):
        super().__init__(dmm, fe_type, _llvm(fe_type.dtype))


def _address(context, builder, array_type, array, index):
    return builder.gep(context.make_array(array_type)(context, builder, array).data, [index])


def _call(builder, name, result, args, **keywords):
    vector = args[-1].type
    suffix = "f32" if isinstance(vector.element, ir.FloatType) else "f64"
    signature = ir.FunctionType(result, [x.type for x in args])
    function = cgutils.get_or_insert_function(builder.module, signature, f"{name}.v{vector.count}{suffix}")
    return builder.call(function, args, **keywords)


@intrinsic
def load(typingctx, array, index):
    """Vector at ``index`` numbers from the start of a contiguous array; bounds are not checked."""

    def codegen(context, builder, signature, args):
        dtype = signature.args[0].dtype
        address = _address(context, builder, signature.args[0], *args)
        return builder.load(builder.bitcast(address, _llvm(dtype).as_pointer()), align=dtype.bitwidth // 8)

    return Vector(array.dtype)(array, types.intp), codegen


@intrinsic
def prefetch(typingctx, array, index):
    """Ask for the cache line at ``index`` numbers from the start of an array, which may lie outside it."""

    def codegen(context, builder, signature, args):
        byte = ir.IntType(8).as_pointer()
        number = ir.IntType(32)
        address = builder.bitcast(_address(context, builder, signature.args[0], *args), byte)
        kind = ir.FunctionType(ir.VoidType(), [byte, number, number, number])
        function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
        builder.call(function, [address, number(0), number(3), number(1)])
        return context.get_dummy_value()

    return types.void(array, types.intp), codegen


@intrinsic
def store(typingctx, array, index, value):
    """Write ``value`` at ``index`` numbers from the start of a contiguous array."""

    def codegen(context, builder, signature, args):
        dtype = signature.args[0].dtype
        address = _address(context, builder, signature.args[0], *args[:2])
        builder.store(args[2], builder.bitcast(address, _llvm(dtype).as_pointer()), align=dtype.bitwidth // 8)
        return context.get_dummy_value()

    return types.void(array, types.intp, value), codegen


def _repeat(builder, value, vector):
    blank = ir.Constant(vector, ir.Undefined)
    first = builder.insert_element(blank, value, ir.Constant(ir.IntType(32), 0))
    lanes = ir.Constant(ir.VectorType(ir.IntType(32), vector.count), [0] * vector.count)
    return builder.shuffle_vector(first, blank, lanes)


@intrinsic
def splat(typingctx, array, index):
    """Vector of copies of ``array[index]``."""

    def codegen(context, builder, signature, args):
        value = builder.load(_address(context, builder, signature.args[0], *args))
        return _repeat(builder, value, _llvm(signature.args[0].dtype))

    return Vector(array.dtype)(array, types.intp), codegen


@intrinsic
def repeat(typingctx, value):
    """Vector of copies of one number."""

    def codegen(context, builder, signature, args):
        return _repeat(builder, args[0], _llvm(signature.args[0]))

    return Vector(value)(value), codegen


@intrinsic
def zeros(typingctx, array):
    """Vector of zeros of the type of ``array``."""

    def codegen(context, builder, signature, args):
        return ir.Constant(_llvm(signature.args[0].dtype), None)

    return Vector(array.dtype)(array), codegen


@intrinsic
def fma(typingctx, x, y, z):
    """``x · y + z`` with one rounding."""

    def codegen(context, builder, signature, args):
        return _call(builder, "llvm.fma", args[0].type, args)

    return x(x, x, x), codegen


@intrinsic
def fnma(typingctx, x, y, z):
    """``z − x · y`` with one rounding."""

    def codegen(context, builder, signature, args):
        return _call(builder, "llvm.fma", args[0].type, [builder.fneg(args[0]), args[1], args[2]])

    return x(x, x, x), codegen


@intrinsic
def mul(typingctx, x, y):
    """``x · y``."""

    def codegen(context, builder, signature, args):
        return builder.fmul(*args)

    return x(x, x), codegen


@intrinsic
def add(typingctx, x, y):
    """``x + y``."""

    def codegen(context, builder, signature, args):
        return builder.fadd(*args)

    return x(x, x), codegen


@intrinsic
def sub(typingctx, x, y):
    """``x − y``."""

    def codegen(context, builder, signature, args):
        return builder.fsub(*args)

    return x(x, x), codegen


@intrinsic
def where_nonzero(typingctx, x, y):
    """``y`` in the lanes where ``x`` is not zero, zero in the others."""

    def codegen(context, builder, signature, args):
        nothing = ir.Constant(args[0].type, None)
        return builder.select(builder.fcmp_unordered("!=", args[0], nothing), args[1], nothing)

    return x(x, x), codegen


@intrinsic
def total(typingctx, x):
    """Sum of the lanes, always in the same order."""

    def codegen(context, builder, signature, args):
        element = args[0].type.element
        zero = ir.Constant(element, 0.0)
        return _call(builder, "llvm.vector.reduce.fadd", element, [zero, args[0]], fastmath=("reassoc",))

    return x.dtype(x), codegen
