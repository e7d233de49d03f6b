"""Makes Triton's interpreter compute as a GPU does where it does not; for a process that runs with TRITON_INTERPRET=1.

bfloat16: the interpreter holds its bits in integers, and multiplies and adds those. Here a bf16 number is held as a
float32 one, rounded to nearest even by every operation that makes one, and is 16 bits in memory only.

Approximations: exp2 is ex2.approx.ftz on NVIDIA's chips and float32's `/` is div.full, each at most 2 ulp off; all
else (div_rn, sqrt_rn, log, float64, exp2(0), which the manuals of NVIDIA and AMD have as 1) is as exact as here. Each
result gets an error of its own out of that range, by a hash of its mantissa: the same input gives the same bits, and a
power of two changes nothing.

Products: NumPy's BLAS adds in an order that depends on the processor and on a tile's shape, and two kernels would see
two values of one logit. Here fused multiply-adds follow each other along k. They begin at zero in each tl.dot, so that
long sums are blocked as those of the CPU's eager are, which errors are compared with; a GPU's float32 goes on from the
sum so far, in its eager too (against the CPU's, Barlow Twins of 512 rows would have 2.1 times the error, for 2).

tf32x3: as Triton lowers it for NVIDIA's chips, and as an A100's matrix units add, whose error is the largest of those
that have TF32 (Khattak and Mikaitis, arXiv:2512.07004; Xie et al., arXiv:2511.10909): four products at a time to the
sum so far, all cut off below the 25th bit of the largest, and the sum below its own 24th. What is cut off adds up where
terms have one sign, so a tl.dot of many columns is less exact than float32; the sum goes on outside of the units.
"""

import numpy as np
import triton.language as tl
from triton._C.libtriton.ir import INPUT_PRECISION
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

BF16 = tl.bfloat16
ULPS = 2

_np_dtype, _fits = interpreter._get_np_dtype, interpreter._validate_np_data_size
_load, _store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store
_cast, _to_float, _bitcast = (
    getattr(InterpreterBuilder, name) for name in ("cast_impl", "create_fp_to_fp", "create_bitcast")
)
_binary, _unary, _absolute = InterpreterBuilder.binary_op, InterpreterBuilder.unary_op, InterpreterBuilder.create_fabs


def to_bits(x: np.ndarray) -> np.ndarray:
    """float32 to bfloat16's 16 bits, to nearest even; a NaN stays one"""
    bits = np.array(x, np.float32, order="C").view(np.uint32)
    rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
    return np.where(np.isnan(x), 0x7FC0, rounded).astype(np.uint16)


def to_numbers(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def rounded(handle: TensorHandle) -> TensorHandle:
    """The result of an operation, as bf16 if it is one; that of a comparison has its operands' dtype"""
    if handle.dtype.scalar == BF16 and handle.data.dtype != np.bool_:
        handle.data = to_numbers(to_bits(handle.data))
    return handle


def load(self, ptrs, mask, other, *how):
    if ptrs.get_element_ty() != BF16:
        return _load(self, ptrs, mask, other, *how)
    others = np.zeros(ptrs.data.shape, np.uint16) if other is None else to_bits(other.data)
    bits = interpreter._interpreter.load(ptrs.data, mask.data, others, np.dtype(np.uint16))
    return TensorHandle(to_numbers(bits), BF16)


def store(self, ptrs, value, mask, *how):
    if value.dtype.scalar == BF16:
        value = TensorHandle(to_bits(value.data), tl.uint16)
    return _store(self, ptrs, value, mask, *how)


def cast(self, src, dst_type):
    if BF16 not in (src.dtype.scalar, dst_type.scalar):
        return _cast(self, src, dst_type)
    return rounded(TensorHandle(src.data.astype(_get_np_dtype(dst_type)), dst_type.scalar))


def to_float(self, src, dst_type, rounding_mode):
    if BF16 not in (src.dtype.scalar, dst_type.scalar):
        return _to_float(self, src, dst_type, rounding_mode)
    return cast(self, src, dst_type)


def bitcast(self, src, dst_type):
    if src.dtype.scalar == BF16:
        src = TensorHandle(to_bits(src.data), tl.uint16)
    if dst_type.scalar == BF16:
        return TensorHandle(to_numbers(src.data.view(np.uint16)), BF16)
    return _bitcast(self, src, dst_type)


def absolute(self, arg):
    return _unary(self, arg, np.abs) if arg.dtype.scalar == BF16 else _absolute(self, arg)


def _get_np_dtype(dtype):
    return np.dtype(np.float32) if dtype.scalar == BF16 else _np_dtype(dtype)


def near(x: np.ndarray) -> np.ndarray:
    """float32 x with an error of up to ULPS: of two parts, a table's and a rounding's. 0 and infinity are exact"""
    bits = np.array(x, np.float32, order="C").view(np.int32)
    hashed = (bits & 0x7FFFFF).astype(np.uint64) * 0x9E3779B97F4A7C15
    parts = [(hashed >> np.uint64(shift) & np.uint64(0xFFFF)).astype(np.float64) * 2.0**-16 for shift in (32, 48)]
    moved = (bits + np.rint(ULPS * (sum(parts) - 1)).astype(np.int32)).view(np.float32)
    size = np.abs(x)
    return np.where((size > 2.0**-125) & (size < 2.0**127), moved, x).astype(np.float32)


def exp2(self, arg):
    if arg.dtype.scalar != tl.float32:
        return rounded(_unary(self, arg, np.exp2))
    with np.errstate(over="ignore", under="ignore"):
        result = np.exp2(arg.data.astype(np.float64)).astype(np.float32)
    result = np.where(arg.data == 0, result, near(result))
    return TensorHandle(np.where(result < 2.0**-126, np.float32(0), result), tl.float32)


def divide(self, lhs, rhs):
    result = _binary(self, lhs, rhs, np.divide)
    if result.dtype.scalar == tl.float32:
        result.data = near(result.data)
    return rounded(result)


def cut(x: np.ndarray, bits: int) -> np.ndarray:
    """float64 numbers without the last so many of their 52 bits"""
    return (np.ascontiguousarray(x).view(np.int64) & -(1 << bits)).view(np.float64)


def to_tf32(x: np.ndarray) -> np.ndarray:
    """The nearest numbers of 11 bits, of two the longer"""
    return cut((np.ascontiguousarray(x).view(np.int64) + (1 << 41)).view(np.float64), 42)


def in_fours(left: np.ndarray, right: np.ndarray, total: np.ndarray) -> np.ndarray:
    """total + left right, as an A100's matrix units add float32, in float64"""
    for k in range(0, left.shape[-1], 4):
        terms = np.stack([*(left[..., n, None] * right[..., n, None, :] for n in range(k, k + 4)), total])
        last = cut(np.maximum(np.abs(terms).max(0), 2.0**-500), 52) * 2.0**-24
        total = cut(np.trunc(terms / last).sum(0) * last, 29)
    return total


def three_products(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """left right, of two TF32 parts each; small by small is left out, and NaN is what infinities have as small parts"""
    bigs = to_tf32(left), to_tf32(right)
    smalls = cut(left - bigs[0], 42), cut(right - bigs[1], 42)
    total = smalls[0] @ bigs[1] + bigs[0] @ smalls[1]  # exact: the last bits of what is 2^-11 of the result
    total, plain = in_fours(*bigs, cut(np.where(np.isnan(total), 0, total), 29)), bigs[0] @ bigs[1]
    return np.where(np.isfinite(plain), total, plain)


def dot(self, a, b, d, precision, *how):
    left, right = a.data.astype(np.float64), b.data.astype(np.float64)  # which holds a product of two float32
    total = np.zeros(d.data.shape, d.data.dtype)
    if precision == INPUT_PRECISION.TF32x3 and a.dtype.scalar == tl.float32:
        with np.errstate(invalid="ignore", over="ignore"):
            total = three_products(left, right).astype(total.dtype)
    else:
        for k in range(left.shape[-1]):
            total = (total + left[..., k, None] * right[..., k, None, :]).astype(total.dtype)
    return TensorHandle(total + d.data, d.dtype.scalar)


def install() -> None:
    """For all kernels of this process, from here on"""
    interpreter._get_np_dtype = _get_np_dtype
    interpreter._validate_np_data_size = lambda data, dtype: dtype.scalar == BF16 or _fits(data, dtype)
    for name, function in {
        "create_masked_load": load,
        "create_masked_store": store,
        "create_fp_to_fp": to_float,
        "create_bitcast": bitcast,
        "cast_impl": cast,
        "binary_op": lambda self, lhs, rhs, op: rounded(_binary(self, lhs, rhs, op)),
        "unary_op": lambda self, arg, op: rounded(_unary(self, arg, op)),
        "create_fabs": absolute,
        "create_exp2": exp2,
        "create_fdiv": divide,
        "create_dot": dot,
    }.items():
        setattr(InterpreterBuilder, name, function)
