"""The GPU layout and its kernel against products in float64 of what `dequantize` gives.

Without a device the kernel runs in Triton's interpreter, which must be chosen before Triton is imported: one test
runs this file again in a process of its own. With a device the same cases run on it.
"""

from __future__ import annotations

import io
import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from benchmarks import gpu_kernel
from mico.packed import gpu
from mico.packed.bits import TERNARY, levels
from mico.packed.gpu import available, prepare_gpu, prepare_sparse24
from mico.packed.quantized import QuantizedWeight

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
WIDTHS = (1, TERNARY, 2, 3, 4, 5, 6, 7, 8)
MIXED = (3, 8, 2, TERNARY, 5, 4)
needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
EPSILON = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


KERNEL_CASES: list[str] = []


def on_kernel(test):
    """A test that launches the kernel: in the interpreter's process, or on a device."""
    KERNEL_CASES.append(f"{__file__}::{test.__name__}")
    if INTERPRETED:
        return test
    missing = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device; runs in the interpreter")
    return pytest.mark.gpu(missing(needs_triton(test)))


def case(
    rows: int, channels: int, bits_G: tuple[float, ...], *, factored: bool = True, masked: bool = False,
    zeros: str = "none", order: str = "runs", seed: int = 0,
) -> QuantizedWeight:  # fmt: skip
    """Random codes. With a mask row 1, the last row and group 0 are pruned altogether.

    zeros: none, rows (R, G), shared (1, G), or beyond (a zero that is no code). order: of the groups' channels.
    """
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> torch.Tensor:
        return torch.rand(shape, generator=generator)

    groups = len(bits_G)
    label_C = torch.arange(channels) * groups // channels
    if order == "permuted":
        label_C = label_C[torch.randperm(channels, generator=generator)]
    levels_G = torch.tensor([levels(bits) for bits in bits_G])
    codes_RC = (random(rows, channels) * levels_G[label_C]).to(torch.uint8)
    keep_RC = None
    if masked:
        keep_RC = random(rows, channels) > 0.5
        keep_RC[1], keep_RC[-1], keep_RC[:, label_C == 0] = False, False, False
        codes_RC = codes_RC * keep_RC
    zero_RG = None
    if zeros != "none":
        top = levels_G.clamp_max(255) if zeros != "beyond" else levels_G.new_full((groups,), 255)
        zero_RG = (random(1 if zeros == "shared" else rows, groups) * top).to(torch.uint8)
    row_scale_RG = (random(rows, 1 if factored else groups) * 0.02 + 0.01).half()
    group_scale_G = (random(groups) + 0.5).half() if factored else None
    return QuantizedWeight(codes_RC, row_scale_RG, group_scale_G, zero_RG, bits_G, label_C, keep_RC)


def on(device: str, quantized: QuantizedWeight, dtype: torch.dtype) -> gpu.GpuWeight:
    weight = prepare_gpu(quantized, device, dtype)
    assert weight is not None
    return weight


def check_product(quantized: QuantizedWeight, dtype: torch.dtype, batch: int, bias: bool = False) -> torch.Tensor:
    """The kernel's product, within what rounding weights (not for one row), sums and the output may cost."""
    rows, channels = quantized.codes_RC.shape
    generator = torch.Generator().manual_seed(batch)
    x_BC = torch.randn(batch, channels, generator=generator).to(dtype)
    bias_R = torch.randn(rows, generator=generator).to(dtype) if bias else None
    weight = on(DEVICE, quantized, dtype)
    y_BR = weight(x_BC.to(DEVICE), None if bias_R is None else bias_R.to(DEVICE)).cpu()
    exact_RC = quantized.dequantize().double()
    exact_BR, size_BR = x_BC.double() @ exact_RC.T, x_BC.double().abs() @ exact_RC.abs().T
    if bias_R is not None:
        exact_BR = exact_BR + bias_R.double()
    assert y_BR.dtype == dtype and y_BR.shape == (batch, rows)
    inner = 2.0**-24 * channels if batch == 1 else EPSILON[dtype] / 2
    rounding = EPSILON[dtype] * (2 if INTERPRETED else 1)  # the interpreter cuts bfloat16 off
    limit_BR = rounding * exact_BR.abs() + 2 * inner * size_BR + 1e-6
    gap_BR = (y_BR.double() - exact_BR).abs()
    assert bool((gap_BR <= limit_BR).all()), f"{(gap_BR / limit_BR).max():.3f} times the allowed error"
    if quantized.keep_RC is not None:
        for row in (~quantized.keep_RC).all(1).nonzero().flatten().tolist():
            assert torch.equal(
                y_BR[:, row], (torch.zeros(()) if bias_R is None else bias_R[row]).to(dtype).expand(batch)
            )
    return y_BR


@pytest.fixture(autouse=True)
def bfloat16_products(monkeypatch):
    """Triton's interpreter keeps bfloat16 as bit patterns, and its tl.dot multiplies the patterns: give it numbers."""
    if not INTERPRETED:
        return
    import numpy as np
    import triton.language as tl
    from triton.runtime import interpreter

    original = interpreter.InterpreterBuilder.create_dot

    def numbers(handle):
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        return interpreter.TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    def create_dot(self, a, b, d, *rest):
        return original(self, numbers(a), numbers(b), d, *rest)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", create_dot)


# --- layout, without Triton -----------------------------------------------------------------------------------------


@settings(max_examples=40)
@given(
    rows=st.integers(2, 70), channels=st.integers(6, 150),
    bits_G=st.lists(st.sampled_from(WIDTHS), min_size=1, max_size=6).map(tuple), factored=st.booleans(),
    masked=st.booleans(), zeros=st.sampled_from(("none", "rows", "shared", "beyond")),
    order=st.sampled_from(("runs", "permuted")), seed=st.integers(0, 99),
)  # fmt: skip
def test_dense_equals_dequantize(rows, channels, bits_G, factored, masked, zeros, order, seed):
    quantized = case(
        rows, channels, bits_G, factored=factored, masked=masked, zeros=zeros, order=order, seed=seed
    )  # fmt: skip
    weight = on("cpu", quantized, torch.bfloat16)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert torch.equal(weight.dense(dtype), quantized.dequantize(dtype))


def test_dense_in_parts_and_with_an_empty_group(monkeypatch):
    quantized = case(100, 90, (4, 3, 2), order="permuted")
    quantized = QuantizedWeight(
        quantized.codes_RC & 3, quantized.row_scale_RG, quantized.group_scale_G, None, quantized.bits_G,
        quantized.label_C.clamp_min(1),
    )  # fmt: skip
    monkeypatch.setattr(gpu, "_GPU_DENSE_WEIGHTS", 1)
    assert torch.equal(on("cpu", quantized, torch.float16).dense(torch.float32), quantized.dequantize())


@pytest.mark.parametrize("bits", WIDTHS)
def test_words_are_the_documented_ones(bits):
    """Code j of a chunk at bits j * width, read with Python's integers."""
    quantized = case(33, 64, (bits,))
    weight, width = on("cpu", quantized, torch.bfloat16), 2 if bits == TERNARY else bits
    for row, chunk in ((0, 0), (31, 1), (32, 0)):
        words = weight.words_SWR[row // 32, chunk * width : (chunk + 1) * width, row % 32].tolist()
        stream = sum((word & 0xFFFFFFFF) << 32 * place for place, word in enumerate(words))
        codes = [stream >> j * width & (1 << width) - 1 for j in range(32)]
        assert codes == quantized.codes_RC[row, 32 * chunk : 32 * chunk + 32].tolist()


def test_memory_is_near_the_true_bits():
    """Whole chunks: codes, 16 bits a scale, 4 bytes a chunk; 1 bit a weight for a mask, none where zero is a code."""
    rows, channels, spare = 256, 512, 4 * 16 + 108  # chunks and the table
    plain = on("cpu", case(rows, channels, (3,), factored=False), torch.bfloat16)
    assert plain.order_JK is None and plain.nbytes == rows * channels * 3 // 8 + 2 * rows + spare
    masked = on("cpu", case(rows, channels, (3,), factored=False, masked=True), torch.bfloat16)
    assert masked.nbytes == plain.nbytes + rows * channels // 8
    on_grid = on("cpu", case(rows, channels, (3,), factored=False, masked=True, zeros="rows"), torch.bfloat16)
    assert on_grid.mask_SKR is None and on_grid.nbytes == plain.nbytes + rows
    permuted = on("cpu", case(rows, channels, (4, 2), order="permuted"), torch.bfloat16)
    assert permuted.order_JK is not None
    assert permuted.nbytes == rows * channels * 3 // 8 + 2 * rows + 2 * 16 + 4 * channels + spare


def test_what_cannot_be_prepared():
    assert prepare_gpu(QuantizedWeight(*[torch.ones(2, 4).half()] * 2, None, None, (16,), torch.zeros(4)), "cpu",
                       torch.float16) is None  # fmt: skip
    with pytest.raises(ValueError, match=r"float32.*bfloat16 or float16"):
        prepare_gpu(case(4, 8, (4,)), "cpu", torch.float32)


@pytest.mark.parametrize(
    "batch, rows, chunks", [(1, 64, 1), (1, 4096, 128), (1, 128256, 128), (2, 96, 400), (300, 1024, 32)]
)
def test_tiles_cover_the_processors_without_idle_programs(batch, rows, chunks):
    tile = gpu._gpu_tile(batch, rows, chunks, processors=132)
    assert tile.dot == (batch > 1) and (tile.batch >= 16) == tile.dot
    assert (tile.splits - 1) * tile.chunks < chunks and tile.splits <= 8
    assert tile.chunks == 16 or tile.chunks < 2 * chunks
    busy = -(-rows // tile.rows) * -(-batch // tile.batch) * tile.splits * tile.warps
    assert busy >= 132 * 4 or tile.splits == 8 or (tile.splits + 1) * tile.chunks > chunks


@pytest.mark.parametrize("batch", [1, 2, 17, 70])
def test_the_kernel_never_reads_beyond_the_activations(monkeypatch, batch):
    """Tiles of the batch are read whole: what is handed over must fill them."""
    calls = []

    class Recorder:
        def __getitem__(self, grid):
            return lambda *given, **constants: calls.append((grid, given, constants))

    monkeypatch.setattr(gpu, "gpu_kernel", Recorder)
    on("cpu", case(33, 64, (4,)), torch.float16)(torch.ones(batch, 64).half())
    ((grid, (x_BC, *_), constants),) = calls
    assert len(x_BC) == grid[1] * constants["BLOCK_B"] and x_BC[:batch].eq(1).all() and x_BC[batch:].eq(0).all()
    assert batch == 1 or x_BC.stride() == (1, len(x_BC))


def test_import_does_not_need_triton():
    source = "import sys; sys.modules['triton'] = None; import mico.packed.gpu as gpu; print(gpu.available())"
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


@pytest.mark.parametrize("pattern, dtype, match", [
    (None, torch.float16, "pattern None"), ((2, 4), torch.float32, "float32"), ((2, 4), torch.float16, "device cpu"),
])  # fmt: skip
def test_sparse24_refuses_what_it_cannot_hold(pattern, dtype, match):
    quantized = case(64, 64, (4,))
    quantized = QuantizedWeight(*list(vars(quantized).values())[:-1], pattern)
    with pytest.raises(ValueError, match=match):
        prepare_sparse24(quantized, "cpu", dtype)


# --- kernel ---------------------------------------------------------------------------------------------------------


@on_kernel
@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("batch", [1, 3])
def test_every_width(bits, batch):
    """Ragged rows and channels, one group."""
    check_product(case(33, 45, (bits,), seed=3), torch.bfloat16 if batch == 1 else torch.float16, batch)


OPTIONS = {
    "mico": dict(masked=True, order="permuted"),
    "on-grid": dict(factored=False, zeros="rows", masked=True),
    "off-grid": dict(factored=False, zeros="beyond", masked=True, order="permuted"),
    "shared": dict(zeros="shared"),
}


@on_kernel
@pytest.mark.parametrize("batch, dtype", [(1, torch.float16), (17, torch.bfloat16)])
@pytest.mark.parametrize("options", OPTIONS)
def test_mixed_groups(options, dtype, batch):
    check_product(case(34, 143, MIXED, **OPTIONS[options]), dtype, batch, bias=True)


@on_kernel
def test_rows_and_batches_of_several_tiles():
    check_product(case(70, 40, (3,), masked=True), torch.float16, 70, bias=True)


@on_kernel
def test_without_padding_or_gather():
    quantized = case(64, 128, (4, 4), factored=False, zeros="rows", masked=True)
    weight = on(DEVICE, quantized, torch.bfloat16)
    assert weight.order_JK is None and weight.mask_SKR is None
    check_product(quantized, torch.bfloat16, 1)
    check_product(quantized, torch.bfloat16, 20)


@on_kernel
@pytest.mark.parametrize("batch", [1, 5])
def test_programs_that_share_a_sum(monkeypatch, batch):
    """Many processors: 40 chunks are shared out, and the shares of the bias are one."""
    monkeypatch.setattr(gpu, "_gpu_processors", lambda device: 132)
    monkeypatch.setattr(gpu, "_GPU_MOST_WARPS", 4)
    quantized = case(40, 1280, (2, 3), masked=True, order="permuted")
    assert gpu._gpu_tile(batch, 40, 40, 132).splits >= 2
    check_product(quantized, torch.float16, batch, bias=True)


@on_kernel
def test_views_and_no_rows_at_all():
    """Activations that are a slice, or transposed; a batch of none."""
    quantized = case(33, 64, (4,))
    weight = on(DEVICE, quantized, torch.float16)
    wide_BC = torch.randn(6, 130, generator=torch.Generator().manual_seed(0)).half().to(DEVICE)
    expected_BR = weight(wide_BC[1:2, 1:65].contiguous())
    assert torch.equal(weight(wide_BC[1:2, 1:65]), expected_BR)
    assert torch.equal(weight(wide_BC[:, 1:65].T.contiguous().T[1:2]), expected_BR)
    assert weight(wide_BC[:0, :64]).shape == (0, 33)


@on_kernel
def test_large_batches_take_the_dense_weight():
    quantized = case(33, 64, (4, 2), order="permuted")
    x_BC = torch.randn(256, 64, generator=torch.Generator().manual_seed(0)).half().to(DEVICE)
    dense_RC = quantized.dequantize(torch.float16).to(DEVICE)
    assert torch.equal(on(DEVICE, quantized, torch.float16)(x_BC), torch.nn.functional.linear(x_BC, dense_RC))


@needs_triton
@pytest.mark.skipif(INTERPRETED or torch.cuda.is_available(), reason="the kernel's cases run in this process")
def test_cases_in_the_interpreter():
    """The tests above, in a process where Triton interprets."""
    assert available() is False
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *KERNEL_CASES]
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, env=environment, cwd=Path(__file__).parents[2], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed and int(passed[1]) >= 32 and "skipped" not in done.stdout, done.stdout[-500:]


@needs_triton
@pytest.mark.skipif(INTERPRETED, reason="nothing is compiled in the interpreter")
@pytest.mark.parametrize("batch, capability", [(1, 80), pytest.param(16, 90, marks=pytest.mark.slow)])
def test_compiles_for_devices_that_are_not_here(capability, batch):
    """What the interpreter lets pass may not compile: types, constants and layouts are only checked here."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    if "nvidia" not in triton.backends.backends:
        pytest.skip("this Triton has no NVIDIA compiler")
    quantized = case(64, 96, (3, TERNARY), masked=True, order="permuted")
    weight = on("cpu", quantized, torch.bfloat16)
    tile = gpu._gpu_tile(batch, 64, 4, processors=1)
    constants = gpu._gpu_constants(weight, tile, None)
    kernel = gpu.gpu_kernel()
    types = dict(x="*bf16", y="*bf16", words="*i32", mask="*i32", scale="*fp16", factor="*fp16", group="*i32",
                 order="*i32", table="*i32", bias=None, zero=None)  # fmt: skip
    signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in kernel.arg_names}
    values = {
        (place,): constants.get(name) for place, name in enumerate(signature) if signature[name] in ("constexpr", None)
    }
    signature = {name: kind or "constexpr" for name, kind in signature.items()}
    compiled = triton.compile(
        ASTSource(kernel, signature, values),
        target=GPUTarget("cuda", capability, 32),
        options=dict(num_warps=tile.warps, num_stages=1, enable_fp_fusion=True),
    )
    assert len(compiled.asm["cubin"]) > 0
    assert compiled.metadata.shared <= 48 * 1024, "must fit every device"


@pytest.mark.gpu
@pytest.mark.skipif(INTERPRETED or not torch.cuda.is_available(), reason="no CUDA device")
def test_sparse24_on_a_device():
    quantized = case(256, 512, (4,))
    keep_RC = torch.tensor([True, False, True, False]).repeat(256, 128)
    quantized = QuantizedWeight(*list(vars(quantized).values())[:-2], keep_RC, (2, 4))
    x_BC = torch.randn(32, 512).half()
    weight = prepare_sparse24(quantized, "cuda", torch.float16)
    y_BR = weight(x_BC.cuda(), None).cpu()
    exact_BR = x_BC.double() @ quantized.dequantize(torch.float16).double().T
    torch.testing.assert_close(y_BR.double(), exact_BR, rtol=2e-3, atol=2e-3)
    assert weight.nbytes < 0.6 * 2 * quantized.codes_RC.numel()


# --- benchmark ------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(torch.cuda.is_available(), reason="the benchmark would run")
def test_the_benchmark_says_in_one_line_that_it_needs_a_device():
    with pytest.raises(SystemExit, match=r"^gpu_kernel: needs a CUDA device and Triton[^\n]*$"):
        gpu_kernel.main([])


def test_the_benchmark_divides_by_the_copy_and_by_the_dense_product():
    measured = [
        gpu_kernel.Measured("dense bfloat16", 1, 10e-6, 2_000_000),
        gpu_kernel.Measured("4 bits", 1, 4e-6, 500_000),
    ]
    console = Console(width=110, record=True, file=io.StringIO())
    console.print(gpu_kernel.table(measured, 1_000_000, 250e9, "t"))
    line = next(line for line in console.export_text().splitlines() if "4 bits" in line)
    assert re.findall(r"[\d.]+", line) == ["4", "1", "0.500", "4.0", "125", "0.50", "2.50"]


@pytest.mark.parametrize("masked, pattern", [(False, False), (True, False), (True, True)])
def test_the_benchmark_measures_what_it_says(masked, pattern):
    quantized = gpu_kernel.weight(64, 128, (2, 8), masked, pattern)
    assert (quantized.codes_RC.amax(0) < torch.tensor([4, 256])[quantized.label_C]).all()
    kept = 1.0 if quantized.keep_RC is None else quantized.keep_RC.float().mean().item()
    assert abs(kept - (0.5 if masked else 1)) < 0.02 and (quantized.pattern == (2, 4)) == pattern
