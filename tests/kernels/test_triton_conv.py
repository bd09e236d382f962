"""The GPU kernel computes what the reference does: in triton's interpreter here, on the hardware where there is one.

The interpreter needs TRITON_INTERPRET=1 before triton is imported, so it runs in a process of its own: this file as a
program, which prints the errors of all cases as JSON.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from torch import Tensor

from dspfx.errors import ConfigError, InputError
from dspfx.kernels.gpu_layout import DTYPES, LEAST, RUN, lay_out
from dspfx.kernels.structure import Structure, output_shape, pack, reference
from dspfx.kernels.triton_conv import CANDIDATES, GpuConv, group_conv2d, is_available, prepare_gpu
from dspfx.plans import Group
from tests.kernels.test_structure import UNEVEN, calls, check_refusal, packed_call

ROOT = Path(__file__).resolve().parents[2]
EPS = {dtype: torch.finfo(dtype).eps for dtype in DTYPES}
WIDE = (Group(tuple(range(129, -1, -1)), tuple(range(0, 140, 2))), Group((131,), tuple(range(3, 20))))  # > a block
RUNS = (
    Group((*range(8, 16), *range(32, 48)), (*range(16, 32), *range(8))),
    Group(tuple(range(8)), (8, 9, *range(10, 16))),
)


def case(
    o: int, c: int, groups: tuple[Group, ...], size: tuple[int, ...] = (1, 7, 6), **options: Any
) -> dict[str, Any]:
    """The arguments of a call, as `tests.kernels.test_structure.calls` makes them; 3x3 with padding 1 by default."""
    generator = torch.Generator().manual_seed(o * 1000 + c)
    kernel = options.pop("kernel", (3, 3))
    call: dict[str, Any] = {"stride": (1, 1), "padding": (1, 1), "dilation": (1, 1), "activation": "none"} | options
    structure = Structure(o, c, kernel, groups)
    shape = output_shape((size[0], c, *size[1:]), structure, call["stride"], call["padding"], call["dilation"])

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    call |= {"input": random(size[0], c, *size[1:]), "weight": random(o, c, *kernel), "groups": groups}
    call["bias"] = random(o) if call.pop("has_bias", True) else None
    call["residual"] = random(*shape) if call.pop("has_residual", False) else None
    return call


CASES = {
    "3x3": case(6, 4, UNEVEN),
    "batch of 3, stride 2x1": case(6, 4, UNEVEN, (3, 9, 7), stride=(2, 1), activation="relu"),
    "5x5, padding 2, residual": case(6, 4, UNEVEN, (2, 6, 6), kernel=(5, 5), padding=(2, 2), has_residual=True),
    "1x1": case(6, 4, UNEVEN, (2, 5, 5), kernel=(1, 1), padding=(0, 0), has_residual=True, activation="relu6"),
    "1x1, stride 2": case(6, 4, UNEVEN, (2, 5, 6), kernel=(1, 1), padding=(0, 0), stride=(2, 2)),
    "1x1, padded": case(6, 4, UNEVEN, (1, 3, 2), kernel=(1, 1), padding=(1, 2), activation="silu"),
    "1x3, dilation 1x2": case(6, 4, UNEVEN, kernel=(1, 3), padding=(0, 1), dilation=(1, 2), activation="hardswish"),
    "2x3, padding beyond the image": case(6, 4, UNEVEN, (1, 2, 1), kernel=(2, 3), padding=(3, 4), dilation=(2, 1)),
    "one filter, one channel": case(1, 1, (Group((0,), (0,)),), has_bias=False),
    "no group": case(3, 2, (), has_residual=True, activation="relu"),
    "nothing but residual": case(3, 2, (Group((0, 1, 2), ()),), has_bias=False, has_residual=True),
    "more than a block": case(132, 140, WIDE, (1, 5, 3), kernel=(1, 3), padding=(0, 1)),
    "runs of eight": case(48, 32, RUNS, (2, 4, 5), has_residual=True, activation="relu"),
}
FORMS = ("contiguous", "channels_last", "channels_last in", "slice")


def ulps(call: dict[str, Any], dtype: torch.dtype, form: str, device: str = "cpu", **options: Any) -> float:
    """The largest error in units of the dtype's eps, times the sum of the absolute values that each output sums up."""
    exact: dict[str, Any] = {name: x.to(dtype).double() if isinstance(x, Tensor) else x for name, x in call.items()}
    wanted = reference(**packed_call(exact))
    magnitudes = {name: x.abs() if isinstance(x, Tensor) else x for name, x in exact.items()} | {"activation": "none"}
    packed, structure = pack(exact["weight"].to(device, dtype), exact["groups"])
    ours: dict[str, Any] = {name: x for name, x in exact.items() if name not in ("weight", "groups")}
    ours = {name: x.to(device, dtype) if isinstance(x, Tensor) else x for name, x in ours.items()}
    x = ours["input"]
    if form == "slice":  # of a larger image, in a larger batch
        n, c, h, w = x.shape
        whole = torch.full((n + 1, c + 1, h + 2, w + 3), torch.nan, dtype=dtype, device=device)
        whole[1:, 1:, 1 : h + 1, 2 : w + 2] = x
        ours["input"] = whole[1:, 1:, 1 : h + 1, 2 : w + 2]
    elif form != "contiguous":
        ours["input"] = x.contiguous(memory_format=torch.channels_last)
    conv = prepare_gpu(packed, structure, options.pop("allow_tf32", False))
    is_last = form == "channels_last"
    y = conv(**ours, channels_last=is_last, **options)
    assert y.dtype == dtype
    assert y.is_contiguous(memory_format=torch.channels_last if is_last else torch.contiguous_format)
    error = (y.cpu().double() - wanted).abs() / reference(**packed_call(magnitudes)).clamp(min=1e-30)
    return float(error.max()) / EPS[dtype]


def cached() -> float:
    """The worst error of calls between which the weight, and then the structure, changes in place."""
    call = case(6, 4, UNEVEN)
    x, bias = call["input"].float(), call["bias"].float()
    packed, structure = pack(call["weight"].float(), UNEVEN)
    errors = []
    for change in (None, None, packed, structure):
        if change is packed:
            packed.mul_(3)
        elif change is structure:
            structure.copy_(pack(call["weight"], (UNEVEN[0], *UNEVEN[1:3], Group((2,), (2,))))[1])
        y = group_conv2d(x, packed, bias, structure, padding=(1, 1))
        wanted = reference(x.double(), packed.double(), bias.double(), structure, padding=(1, 1))
        errors.append(float((y - wanted).abs().max() / wanted.abs().max()))
    return max(errors) / EPS[torch.float32]


def interpret() -> dict[str, Any]:
    """What the interpreter finds: errors in eps by case, and a message."""
    found: dict[str, Any] = {}
    for name, call in CASES.items():
        for form in FORMS:
            found[f"{name}, {form}"] = ulps(call, torch.float32, form)
        found[f"{name}, float16"] = ulps(call, torch.float16, "contiguous")
    for blocks in CANDIDATES:
        found[f"{blocks}"] = ulps(CASES["more than a block"], torch.float32, "contiguous", blocks=blocks)
    found["random"] = []

    @settings(max_examples=40, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(calls())
    def any_call(call: dict[str, Any]) -> None:
        found["random"].append(ulps(call, torch.float32, FORMS[len(found["random"]) % len(FORMS)]))

    any_call()
    found["cached"] = cached()
    nan = case(6, 4, UNEVEN, activation="relu")
    nan["input"][0, 1, 3, 3] = torch.nan  # read by filters 4 and 0
    nan["input"][0, 0] = torch.inf  # read by none; index lists are padded with it
    packed, structure = pack(nan["weight"].float(), UNEVEN)
    y = group_conv2d(nan["input"].float(), packed, None, structure, padding=(1, 1), activation="relu6")
    found["NaN"] = [bool(plane.isnan().any()) for plane in y[0]]
    found["empty batch"] = list(group_conv2d(torch.zeros(0, 4, 5, 5), packed, None, structure).shape)
    try:
        group_conv2d(nan["input"].bfloat16(), packed.bfloat16(), None, structure)
    except InputError as error:
        found["bfloat16"] = str(error)
    return found


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    pytest.importorskip("triton", minversion="3.9")  # older interpreters fail on today's numpy
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton"))
    command = [sys.executable, "-W", "error", "-m", "tests.kernels.test_triton_conv"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", CASES)
def test_it_is_the_reference(interpreted: dict[str, Any], name: str, form: str) -> None:
    assert interpreted[f"{name}, {form}"] < 4


@pytest.mark.parametrize("name", CASES)
def test_half_precision_is_rounded_once(interpreted: dict[str, Any], name: str) -> None:
    assert interpreted[f"{name}, float16"] < 0.6  # half a unit, and what float32 sums add


@pytest.mark.parametrize("blocks", CANDIDATES)
def test_every_size_of_blocks_is_right(interpreted: dict[str, Any], blocks: Any) -> None:
    assert interpreted[f"{blocks}"] < 4


def test_random_calls(interpreted: dict[str, Any]) -> None:
    assert len(interpreted["random"]) >= 40
    assert max(interpreted["random"]) < 4


def test_a_weight_or_structure_that_changed_is_laid_out_again(interpreted: dict[str, Any]) -> None:
    assert interpreted["cached"] < 8


def test_activations_keep_nan_and_only_readers_get_it(interpreted: dict[str, Any]) -> None:
    assert interpreted["NaN"] == [True, False, False, False, True, False]


def test_empty_batches_launch_nothing(interpreted: dict[str, Any]) -> None:
    assert interpreted["empty batch"] == [0, 6, 3, 3]


def test_the_interpreter_refuses_what_it_gets_wrong(interpreted: dict[str, Any]) -> None:
    assert interpreted["bfloat16"] == (
        "triton's interpreter (TRITON_INTERPRET=1) multiplies the bits of bfloat16 as integers; run in another dtype, "
        "or without it."
    )


def test_layout_is_as_documented() -> None:
    weight = torch.arange(1.0, 6 * 4 * 2 + 1).view(6, 4, 1, 2)
    packed, structure = pack(weight, UNEVEN)
    layout = lay_out(packed, Structure.read(structure))
    assert layout.channels.tolist() == [1, 3, 2, *[0] * 13, 2, *[0] * 15]
    assert layout.filters.tolist() == [4, 0, 3, 1, 2, 5]
    assert {size: tiles.tolist() for size, tiles in layout.tiles.items()} == {
        16: [[0, 3, 16, 16, 16, 0, 2], [16, 1, 16, 16 + 512, 16, 2, 1], [0, 0, 0, 0, 0, 3, 3]]
    }
    assert (layout.most_channels, layout.run, layout.filter_run) == (16, 1, 1)
    assert not layout.weight[:LEAST].any()
    panel = layout.weight[16 : 16 + 512].view(2, 16, 16)
    for tap in range(2):
        assert torch.equal(panel[tap, :3, :2], weight[[4, 0]][:, [1, 3, 2], 0, tap].T)
    assert layout.weight.count_nonzero() == 2 * (2 * 3 + 1)
    assert len(layout.weight) == 16 + 2 * 512


def test_blocks_fit_the_groups_and_the_registers() -> None:
    packed, structure = pack(torch.randn(132, 140, 1, 1), WIDE)
    exact, rounded, half = (
        prepare_gpu(*args).candidates()
        for args in ((packed, structure), (packed, structure, True), (packed.half(), structure))
    )
    assert rounded == half == list(CANDIDATES)
    assert exact == [b for b in CANDIDATES if b.channels < 64]
    assert prepared(CASES["3x3"]).candidates() == [b for b in CANDIDATES if b.filters == b.channels == 16]


def test_tiles_split_wide_groups_and_stand_in_order_of_work() -> None:
    layout = lay_out(*_packed(132, 140, (WIDE[1], WIDE[0])))
    assert list(layout.tiles) == [16, 32, 64, 128]
    assert layout.tiles[64][:, 1:].tolist() == [
        [70, 128, 16, 256, 0, 64],
        [70, 128, 16 + 64, 256, 64, 64],
        [70, 128, 16 + 128, 256, 128, 2],
        [17, 64, 16 + 128 * 256, 128, 130, 1],
        [0, 0, 0, 0, 131, 1],
    ]
    assert layout.filters[-1] == 130  # in no group
    assert layout.most_channels == 64


@pytest.mark.parametrize(
    ("groups", "run", "filter_run"),
    [
        (RUNS, RUN, RUN),
        ((Group(RUNS[0].filters, (17, 16, *RUNS[0].channels[2:])), RUNS[1]), 1, RUN),
        ((Group(RUNS[0].filters, tuple(range(1, 9))), RUNS[1]), 1, RUN),
        ((Group(RUNS[0].filters, tuple(range(12))), RUNS[1]), 1, RUN),
        ((Group(tuple(range(9)), RUNS[0].channels),), RUN, 1),
        (RUNS[:1], RUN, RUN),
        ((Group(tuple(range(1, 9)), RUNS[0].channels),), RUN, 1),
    ],
)
def test_runs_are_recognised(groups: tuple[Group, ...], run: int, filter_run: int) -> None:
    layout = lay_out(*_packed(48, 32, groups))
    assert (layout.run, layout.filter_run) == (run, filter_run)


def _packed(o: int, c: int, groups: tuple[Group, ...]) -> tuple[Tensor, Structure]:
    packed, structure = pack(torch.randn(o, c, 1, 1), groups)
    return packed, Structure.read(structure)


def test_what_does_not_fit_is_refused() -> None:
    packed, structure = pack(torch.randn(6, 4, 3, 3, dtype=torch.float64), UNEVEN)
    message = "the packed weight is torch.float64; the GPU kernel takes torch.float32, torch.float16, torch.bfloat16."
    with check_refusal(InputError, message):
        prepare_gpu(packed, structure)
    with check_refusal(
        InputError,
        "the packed weight has shape (62,), and its structure needs [63]; give the two that one call of pack made.",
    ):
        prepare_gpu(packed[1:].float(), structure)
    large = Structure(2048, 2048, (32, 32), (Group(tuple(range(2048)), tuple(range(2048))),))
    message = (
        "a group of 2048 filters and 2048 channels has 4294967296 padded weights; the GPU kernel takes 2147483647. "
        "Split it into groups of fewer filters."
    )
    with check_refusal(InputError, message):
        lay_out(torch.empty(large.weights, device="meta"), large)


@pytest.fixture
def conv() -> GpuConv:
    return prepare_gpu(*pack(torch.randn(6, 4, 3, 3), UNEVEN))


def test_tensors_on_a_cpu_are_refused(conv: GpuConv) -> None:
    pytest.importorskip("triton", minversion="3.9")  # older interpreters fail on today's numpy
    with check_refusal(InputError, "the input is on cpu; the GPU kernel needs it, and the weight, on a CUDA device."):
        conv(torch.randn(1, 4, 5, 5))
    with check_refusal(InputError, "the input has shape (1, 3, 5, 5); this convolution reads [N, 4, H, W]."):
        conv(torch.randn(1, 3, 5, 5))
    message = (
        "the packed weight is 1-D, torch.float32 and on cpu, the input 4-D, torch.float16 and on cpu; convert one of "
        "them with .to(...)."
    )
    with check_refusal(InputError, message):
        conv(torch.randn(1, 4, 5, 5).half())


def test_without_triton_it_imports_and_says_what_is_missing(conv: GpuConv, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.delitem(sys.modules, "dspfx.kernels.triton_kernel", raising=False)
    assert not is_available()
    message = r"the GPU kernel needs the package triton, which cannot be imported (.*triton.*); run: pip install triton"
    with pytest.raises(ConfigError, match=f"^{message.replace('(', '[(]').replace(')', '[)]')}$"):
        conv(torch.randn(1, 4, 5, 5))
    program = "import sys; sys.modules['triton'] = None; import dspfx.kernels.triton_conv as t; print(t.is_available())"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stdout == "False\n", done.stderr


def test_available_means_a_cuda_device() -> None:
    pytest.importorskip("triton", minversion="3.9")  # older interpreters fail on today's numpy
    assert is_available() == torch.cuda.is_available()


@pytest.mark.skipif(is_available(), reason="there is a CUDA device")
def test_benchmark_says_what_it_needs() -> None:
    command = [sys.executable, "-m", "benchmarks.gpu_conv"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    message = "benchmarks.gpu_conv needs triton and a CUDA device, and one of them is missing here.\n"
    assert (done.returncode, done.stdout, done.stderr) == (1, "", message)


# Without a GPU the kernel still compiles to the code of one, down to its machine code.
TYPES = {torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16"}


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    triton = pytest.importorskip("triton", minversion="3.9")  # older interpreters fail on today's numpy
    compiler, backends = pytest.importorskip("triton.compiler"), pytest.importorskip("triton.backends.compiler")
    from dspfx.kernels.triton_kernel import conv_kernel

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))

    def compile_for(capability: int, dtype: torch.dtype, run: int, precision: str = "ieee") -> str:
        """PTX of a 3x3 convolution on channels_last (of runs) or contiguous tensors, 64 x 64 x 32 blocks."""
        b, is_last = CANDIDATES[0], run > 1
        fixed: dict[str, Any] = {
            "KERNEL_H": 3,
            "KERNEL_W": 3,
            "STRIDE_H": 1,
            "STRIDE_W": 1,
            "PADDING_H": 1,
            "PADDING_W": 1,
        }
        fixed |= {"DILATION_H": 1, "DILATION_W": 1, "FLAT": False, "RUN": run, "FILTER_RUN": run, "HAS_BIAS": True}
        fixed |= {"HAS_RESIDUAL": True, "ACTIVATION": "hardswish", "PRECISION": precision, "COLUMNS": 7}
        fixed |= {"BLOCK_M": b.pixels, "BLOCK_N": b.filters, "BLOCK_K": b.channels}
        fixed |= {"x_c": 1, "y_c": 1} if is_last else {"x_w": 1, "y_p": 1}  # triton fixes what is 1
        pointers = dict.fromkeys(("x", "weight", "bias", "residual", "y"), TYPES[dtype])
        pointers |= {"tiles": "*i64", "channels": "*i32", "filters": "*i32"}
        names = conv_kernel.arg_names
        signature = {name: "constexpr" if name in fixed else pointers.get(name, "i32") for name in names}
        even = {*pointers, "area", "pixels", "x_n", "x_c", "x_h", "x_w", "y_n", "y_c", "y_p"} - set(fixed)
        attributes = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if name in even}
        constants = {(names.index(name),): value for name, value in fixed.items()}
        source = compiler.ASTSource(conv_kernel, signature, constants, attributes)
        options = {"num_warps": b.warps, "num_stages": b.stages, "enable_fp_fusion": True}
        done = triton.compile(source, target=backends.GPUTarget("cuda", capability, 32), options=options)
        assert len(done.asm["cubin"]) > 1000
        return str(done.asm["ptx"])

    return compile_for


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("capability", [80, 90])
def test_half_precision_compiles_to_tensor_cores(compiled: Any, capability: int, dtype: torch.dtype) -> None:
    ptx = compiled(capability, dtype, 1)
    assert re.search("mma.*f32.*(f16|bf16)", ptx)


def test_float32_is_exact_unless_asked(compiled: Any) -> None:
    exact, rounded = compiled(80, torch.float32, 1), compiled(80, torch.float32, 1, "tf32")
    assert "fma.rn.f32" in exact
    assert not re.search(r"mma\.\S*tf32", exact)
    assert re.search(r"mma\.\S*tf32", rounded)


@pytest.mark.parametrize("capability", [80, 90])
def test_runs_are_read_and_written_in_vectors(compiled: Any, capability: int) -> None:
    runs, single = compiled(capability, torch.float16, RUN), compiled(capability, torch.float16, 1)
    narrow = r"ld\.global\S*\.b16|st\.global\S*\.b16"
    assert not re.search(narrow, runs)
    assert re.search(narrow, single)


class NoDevice:
    """What triton asks of a GPU before it compiles a call for it."""

    def get_current_target(self) -> Any:
        return importlib.import_module("triton.backends.compiler").GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return device


class Compiles:
    """In the kernel's place: compiles what it is launched with, and launches nothing."""

    def __init__(self, kernel: Any) -> None:
        self.kernel, self.sizes = kernel, list[int]()

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*args: Any, **options: Any) -> None:
            done = self.kernel.run(*args, grid=grid, warmup=True, **options)
            self.sizes.append(len(done.asm["cubin"]))

        return launch


@pytest.fixture
def compiling(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    pytest.importorskip("triton", minversion="3.9")  # older interpreters fail on today's numpy
    kernel, driver = (
        importlib.import_module(name) for name in ("dspfx.kernels.triton_kernel", "triton.runtime.driver")
    )
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr("dspfx.kernels.triton_conv._check_limits", lambda *_: None)
    monkeypatch.setattr(kernel, "IS_INTERPRETED", True)  # nothing to measure either
    monkeypatch.setattr(kernel, "conv_kernel", Compiles(kernel.conv_kernel))
    monkeypatch.setattr(driver.driver, "_active", NoDevice())  # its own reset looks for a GPU
    return kernel.conv_kernel


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["batch of 3, stride 2x1", "one filter, one channel", "no group", "runs of eight"])
def test_calls_compile_as_they_are_launched(compiling: Compiles, name: str, dtype: torch.dtype) -> None:
    call: dict[str, Any] = {key: x.to(dtype) if isinstance(x, Tensor) else x for key, x in CASES[name].items()}
    packed, structure = pack(call.pop("weight"), call.pop("groups"))
    prepare_gpu(packed, structure)(**call)
    assert len(compiling.sizes) == 1
    assert compiling.sizes[0] > 1000


# On a GPU.
TOLERANCE = {torch.float32: 4.0, torch.float16: 0.6, torch.bfloat16: 0.6}


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", CASES)
def test_gpu_is_the_reference(name: str, form: str, dtype: torch.dtype) -> None:
    assert ulps(CASES[name], dtype, form, "cuda", blocks=prepared(CASES[name]).candidates()[0]) < TOLERANCE[dtype]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("blocks", CANDIDATES)
def test_gpu_takes_every_size_of_blocks(blocks: Any, dtype: torch.dtype) -> None:
    assert ulps(CASES["more than a block"], dtype, "contiguous", "cuda", blocks=blocks) < TOLERANCE[dtype]


@pytest.mark.gpu
def test_gpu_tf32_is_near() -> None:
    error = ulps(CASES["3x3"], torch.float32, "contiguous", "cuda", allow_tf32=True)
    assert error < 2 * 2**-10 / EPS[torch.float32]  # both factors rounded to 10 bits


@pytest.mark.gpu
def test_gpu_tuned_and_captured() -> None:
    call = packed_call(CASES["runs of eight"])
    call = {name: x.half().cuda() if isinstance(x, Tensor) and name != "structure" else x for name, x in call.items()}
    y = group_conv2d(**call)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        again = group_conv2d(**call)
    again.zero_()
    graph.replay()
    assert torch.equal(again, y)
    torch.testing.assert_close(y, reference(**call), rtol=1e-2, atol=1e-2)


def prepared(call: dict[str, Any]) -> GpuConv:
    return prepare_gpu(*pack(call["weight"].float(), call["groups"]))


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps(interpret()))
