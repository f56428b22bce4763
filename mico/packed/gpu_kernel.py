"""The Triton kernel that multiplies packed weights: every mixture of widths, scales by group, masks, gathered channels.

The layout is described in gpu.py. Nothing here needs Triton before `gpu_kernel` is called. Suffixes stand for the part
that one program holds: R rows, K chunks of 32 columns, B batch; J is a place in the chunks.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

triton: Any = None  # both set when the kernel is first needed: importing them takes a second and needs Triton
tl: Any = None


@lru_cache(maxsize=1)
def gpu_kernel() -> Any:
    """The kernel. Triton resolves names through the globals of this file, which is why they are made global."""
    global triton, tl, _gpu_level, _gpu_rows, _gpu_segment  # type: ignore[name-defined]
    try:  # also because transformers refuses code shipped with a model whose plain imports are not installed
        import triton
        import triton.language as tl
    except ImportError as error:
        raise RuntimeError("Triton is not installed: pip install triton, or run without the GPU kernel") from error

    @triton.jit
    def _gpu_level(low, high, zero, J: tl.constexpr, BITS: tl.constexpr, HALVES: tl.constexpr):
        """float32 code of column J minus zero, exact, from the word it starts in and the one after.

        The bits of a code under the exponent of 2**23 are the float 2**23 + code: cheaper than a conversion. A code
        is left at its place in the word when that fits below the exponent, and scaled down with its power of two.
        """
        SHIFT: tl.constexpr = (J * BITS) % 32
        AT: tl.constexpr = 0 if SHIFT + BITS > 32 else (SHIFT - 16 if SHIFT + BITS > 23 else SHIFT)
        if SHIFT + BITS > 32:
            low = (low >> SHIFT) | (high << (32 - SHIFT))
        elif SHIFT + BITS > 23:
            low = low >> 16
        number = ((low & ((2**BITS - 1) << AT)) | 0x4B000000).to(tl.float32, bitcast=True)
        if AT == 0 and HALVES:
            return (number - 8388608.0) - zero
        return number * (1.0 / 2**AT) - (8388608.0 / 2**AT + zero)  # all exact: AT >= 1 leaves room for halves

    @triton.jit
    def _gpu_rows(row_R, width):
        """Offset of a row in blocks of 32 rows by `width` words."""
        return (row_R // 32).to(tl.int64) * (width * 32) + row_R % 32

    @triton.jit
    def _gpu_segment(
        total, chunk_K, live_K, row_R, live_R, batch_B, word_K, x, words, mask, scale, factor, zero, group, order,
        rows, channels, chunks, width, stride_b, stride_c,
        BITS: tl.constexpr, LEVELS: tl.constexpr, GATHER: tl.constexpr, PADDED: tl.constexpr, MASKED: tl.constexpr,
        FACTORED: tl.constexpr, ZEROS: tl.constexpr, DOT: tl.constexpr,
    ):  # fmt: skip
        """Adds the product of some chunks of one width to `total`: (R, B) with DOT, else (R, K), summed at the end."""
        live_RK = live_R[:, None] & live_K[None, :]
        padded = (rows + 31) // 32 * 32
        if FACTORED:
            factor_K = tl.load(factor + chunk_K, mask=live_K, other=0.0).to(tl.float32)
            scale_RK = tl.load(scale + row_R, mask=live_R, other=0.0).to(tl.float32)[:, None] * factor_K[None, :]
        else:
            group_K = tl.load(group + chunk_K, mask=live_K, other=0)
            place_RK = group_K[None, :] * padded + row_R[:, None]
            scale_RK = tl.load(scale + place_RK, mask=live_RK, other=0.0).to(tl.float32)
        if ZEROS == 1:
            group_K = tl.load(group + chunk_K, mask=live_K, other=0)
            place_RK = group_K[None, :] * padded + row_R[:, None]
            zero_RK = tl.load(zero + place_RK, mask=live_RK, other=0).to(tl.float32)
        elif ZEROS == 2:
            zero_RK = tl.load(zero + chunk_K, mask=live_K, other=0).to(tl.float32)[None, :]
        else:
            zero_RK = (LEVELS - 1) / 2
        if MASKED:
            place_RK = _gpu_rows(row_R, chunks)[:, None] + chunk_K[None, :] * 32
            keep_RK = tl.load(mask + place_RK, mask=live_RK, other=0)
        place_RK = _gpu_rows(row_R, width)[:, None] + word_K[None, :] * 32
        low_RK = tl.load(words + place_RK, mask=live_RK, other=0).to(tl.uint32, bitcast=True)
        high_RK = low_RK
        if not DOT:
            sum_RK = tl.zeros_like(total)
        for J in tl.static_range(32):
            if (J * BITS) % 32 + BITS > 32:
                high_RK = tl.load(words + place_RK + (J * BITS // 32 + 1) * 32, mask=live_RK, other=0)
                high_RK = high_RK.to(tl.uint32, bitcast=True)
            level_RK = _gpu_level(low_RK, high_RK, zero_RK, J, BITS, ZEROS == 0)
            if MASKED:
                level_RK = tl.where((keep_RK >> J) & 1 != 0, level_RK, 0.0)
            if GATHER:  # noqa: SIM108 - the kernel's language has no such expression for tensors
                channel_K = tl.load(order + J * chunks + chunk_K, mask=live_K, other=-1)
            else:
                channel_K = chunk_K * 32 + J
            real_K = live_K
            if PADDED:
                real_K = live_K & (channel_K >= 0) & (channel_K < channels)
            if DOT:
                place_KB = channel_K[:, None] * stride_c + batch_B[None, :] * stride_b
                x_KB = tl.load(x + place_KB, mask=real_K[:, None], other=0.0)
                total = tl.dot((level_RK * scale_RK).to(x_KB.dtype), x_KB, total)
            else:
                x_K = tl.load(x + batch_B * stride_b + channel_K * stride_c, mask=real_K, other=0.0)
                sum_RK += level_RK * x_K.to(tl.float32)[None, :]
            if (J + 1) * BITS // 32 > J * BITS // 32 and J < 31:  # the next code starts in the next word
                if (J * BITS) % 32 + BITS > 32:
                    low_RK = high_RK
                else:
                    low_RK = tl.load(words + place_RK + ((J + 1) * BITS // 32) * 32, mask=live_RK, other=0)
                    low_RK = low_RK.to(tl.uint32, bitcast=True)
        if not DOT:
            total += sum_RK * scale_RK
        return total

    @triton.jit
    def _gpu_product(
        x, words, mask, scale, factor, zero, group, order, table, bias, y,
        batch, rows, channels, chunks, width, stride_b, stride_c,
        SEGMENTS: tl.constexpr, GATHER: tl.constexpr, PADDED: tl.constexpr, MASKED: tl.constexpr,
        FACTORED: tl.constexpr, ZEROS: tl.constexpr, BIAS: tl.constexpr, DOT: tl.constexpr, BLOCK_R: tl.constexpr,
        BLOCK_K: tl.constexpr, BLOCK_B: tl.constexpr,
    ):  # fmt: skip
        """y = x W^T + bias for BLOCK_R rows; with n programs along axis 2 the share of every n-th step of chunks."""
        row_R = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
        live_R = row_R < (rows + 31) // 32 * 32
        if DOT:
            batch_B = tl.program_id(1) * BLOCK_B + tl.arange(0, BLOCK_B)
            total = tl.zeros((BLOCK_R, BLOCK_B), tl.float32)
        else:
            batch_B = tl.program_id(1)
            total = tl.zeros((BLOCK_R, BLOCK_K), tl.float32)
        for SEGMENT in tl.static_range(9):
            if (SEGMENTS >> SEGMENT) & 1:
                first, end = tl.load(table + SEGMENT * 3), tl.load(table + SEGMENT * 3 + 1)
                word = tl.load(table + SEGMENT * 3 + 2)
                for start in range(first + tl.program_id(2) * BLOCK_K, end, tl.num_programs(2) * BLOCK_K):
                    chunk_K = start + tl.arange(0, BLOCK_K)
                    total = _gpu_segment(
                        total, chunk_K, chunk_K < end, row_R, live_R, batch_B,
                        word + (chunk_K - first) * (2 if SEGMENT == 0 else SEGMENT),
                        x, words, mask, scale, factor, zero, group, order,
                        rows, channels, chunks, width, stride_b, stride_c,
                        2 if SEGMENT == 0 else SEGMENT, 3 if SEGMENT == 0 else 2**SEGMENT,
                        GATHER, PADDED, MASKED, FACTORED, ZEROS, DOT,
                    )  # fmt: skip
        own_R = row_R < rows
        share = y + tl.program_id(2).to(tl.int64) * batch * rows
        if DOT:
            if BIAS:
                total += tl.load(bias + row_R, mask=own_R, other=0.0).to(tl.float32)[:, None]
            place_RB = batch_B[None, :] * rows + row_R[:, None]
            own_RB = own_R[:, None] & (batch_B < batch)[None, :]
            tl.store(share + place_RB, total.to(y.dtype.element_ty), mask=own_RB)
        else:
            total_R = tl.sum(total, 1)
            if BIAS:
                total_R += tl.load(bias + row_R, mask=own_R, other=0.0).to(tl.float32)
            tl.store(share + batch_B * rows + row_R, total_R.to(y.dtype.element_ty), mask=own_R)

    return _gpu_product
