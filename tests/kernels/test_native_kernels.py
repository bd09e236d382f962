"""The native kernels against float64: single convolutions of random structure, chains, threads, forks."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from dspfx.errors import InputError, RuntimeBuildError
from dspfx.kernels import engine as engine_module
from dspfx.kernels import library as library_module
from dspfx.kernels.chain import Activation, Cat, Chain, Conv, Flatten, Linear, Map, Mean, Pool, Scale, Select
from dspfx.kernels.engine import Engine
from dspfx.kernels.library import FEATURES, Library, build_library, library_or_none, processor_features
from dspfx.kernels.structure import ACTIVATIONS
from dspfx.kernels.tiles import tiles_of
from tests.compare import error

pytestmark = pytest.mark.skipif(library_or_none() is None, reason="the native kernels need a C++ compiler")
ROUNDING = 3e-6  # of the largest output; sums of up to some thousand products in float32


def drawn(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator)


def grouped_weight(generator: torch.Generator, filters: int, channels: int, kernel: tuple[int, int]) -> Tensor:
    """Filters in up to five groups, each of which reads some channels, perhaps none."""
    groups = int(torch.randint(1, 6, (1,), generator=generator))
    reads = torch.rand(groups, channels, generator=generator) < torch.rand(groups, 1, generator=generator)
    owner = torch.randint(0, groups, (filters,), generator=generator)
    return drawn(generator, filters, channels, *kernel) * reads[owner][:, :, None, None]


@st.composite
def convolutions(draw: st.DrawFn) -> dict[str, object]:
    sizes = {name: draw(st.integers(1, most)) for name, most in (("filters", 40), ("channels", 20), ("batch", 3))}
    pairs = {
        "kernel": draw(st.tuples(st.integers(1, 5), st.integers(1, 5))),
        "stride": draw(st.tuples(st.integers(1, 3), st.integers(1, 3))),
        "padding": draw(st.tuples(st.integers(0, 4), st.integers(0, 4))),
        "dilation": draw(st.tuples(st.integers(1, 3), st.integers(1, 3))),
    }
    least = [
        max(d * (k - 1) + 1 - 2 * p, 1)
        for k, p, d in zip(*(pairs[n] for n in ("kernel", "padding", "dilation")), strict=True)
    ]
    image = tuple(draw(st.integers(n, n + 30)) for n in least)
    rest = {"activation": draw(st.sampled_from(sorted(ACTIVATIONS))), "adds": draw(st.booleans())}
    return (
        sizes | pairs | rest | {"image": image, "seed": draw(st.integers(0, 2**31)), "threads": draw(st.integers(1, 3))}
    )


@given(convolutions())
def test_any_convolution_equals_float64(case: dict) -> None:
    generator = torch.Generator().manual_seed(case["seed"])
    weight = grouped_weight(generator, case["filters"], case["channels"], case["kernel"])
    bias, x = drawn(generator, case["filters"]), drawn(generator, case["batch"], case["channels"], *case["image"])
    window = {name: case[name] for name in ("stride", "padding", "dilation")}
    exact = F.conv2d(x.double(), weight.double(), bias.double(), **window)
    residual = drawn(generator, *exact.shape)
    inputs = [x, residual] if case["adds"] else [x]
    layer = Conv(
        0, 2, weight.numpy(), bias.numpy(), **window,
        residual=1 if case["adds"] else None, activation=case["activation"],
    )  # fmt: skip
    unused = [] if case["adds"] else [Conv(0, 1, weight.numpy(), bias.numpy(), **window)]
    engine = Engine(Chain(len(inputs), (*unused, layer), (2,)))
    exact = ACTIVATIONS[case["activation"]](exact + residual.double() if case["adds"] else exact)
    for _ in range(2):  # the second call meets what the first one left in the workspace
        assert error([exact], engine(inputs, case["threads"])) <= ROUNDING


@given(st.integers(0, 2**31), st.booleans(), st.integers(1, 2), st.booleans(), st.integers(1, 3))
def test_any_pooling_equals_torch(seed: int, is_max: bool, stride: int, flag: bool, threads: int) -> None:
    """`flag` is ceil_mode, or count_include_pad."""
    generator = torch.Generator().manual_seed(seed)
    down, across = (int(n) for n in torch.randint(1, 5, (2,), generator=generator))
    kernel, padding = (down, across), (down // 2, int(torch.randint(0, across // 2 + 1, (1,), generator=generator)))
    size = [int(n) for n in torch.randint(4, 40, (2,), generator=generator)]
    x = drawn(generator, 2, 3, *size)
    if is_max:
        expected = F.max_pool2d(x.double(), kernel, (stride, stride + 1), padding, ceil_mode=flag)
    else:
        expected = F.avg_pool2d(x.double(), kernel, (stride, stride + 1), padding, count_include_pad=flag)
    pool = Pool(0, 1, is_max, kernel, (stride, stride + 1), padding, flag, is_max and flag)
    assert error([expected], Engine(Chain(1, (pool,), (1,)))([x], threads)) <= ROUNDING


@pytest.mark.parametrize("kind", ["silu", "sigmoid", "hardsigmoid", "hardswish", "relu6", "relu"])
def test_activations_are_exact_to_rounding_everywhere(kind: Activation) -> None:
    x = torch.cat([torch.linspace(-120, 120, 4001), torch.tensor([0.0, -0.0, 3e38, -3e38, torch.nan])]).view(
        1, 1, 1, -1
    )
    found = Engine(Chain(1, (Map(0, 1, np.ones(1, np.float32), np.zeros(1, np.float32), None, kind),), (1,)))([x])[0]
    expected = getattr(F, kind)(x.double())
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=1e-35, equal_nan=True)


def test_a_pooled_nan_stays_one() -> None:
    x = torch.randn(1, 1, 6, 6)
    x[0, 0, 2, 3] = torch.nan
    found = Engine(Chain(1, (Pool(0, 1, True, (3, 3), (2, 2), (1, 1)),), (1,)))([x])[0]
    assert torch.equal(found.isnan(), F.max_pool2d(x, 3, 2, 1).isnan())


def residual_chain(generator: torch.Generator) -> tuple[Chain, list[Tensor]]:
    """A chain in which planes are shared, reused and overwritten, and its parameters."""
    a, b, c = (drawn(generator, 12, n, k, k) for n, k in ((6, 3), (12, 3), (24, 1)))
    d, bias, scale = drawn(generator, 5, 12), drawn(generator, 12), drawn(generator, 12)
    layers = (
        Conv(0, 1, a.numpy(), bias.numpy(), (2, 2), (1, 1), activation="relu"),
        Conv(1, 2, b.numpy(), bias.numpy(), (1, 1), (1, 1), residual=1, activation="relu"),
        Select(2, 3, tuple(range(11, -1, -1))),
        Cat((3, 1), 4),
        Conv(4, 5, c.numpy(), bias.numpy()),
        Map(5, 11, scale.numpy(), bias.numpy(), second=2, activation="hardswish"),
        Mean(11, 12),
        Conv(12, 13, c[:, :12].numpy(), bias.numpy(), activation="sigmoid"),
        Scale(11, 13, 6),
        Pool(6, 7, True, (3, 3), (2, 2), (1, 1)),
        Mean(7, 8),
        Flatten(8, 9),
        Linear(9, 10, d.numpy(), bias[:5].numpy(), activation="relu6"),
    )
    return Chain(1, layers, (10, 5, 2)), [a, b, c, d, bias, scale]


def residual_oracle(parameters: list[Tensor], x: Tensor) -> list[Tensor]:
    a, b, c, d, bias, scale = (t.double() for t in parameters)
    one = F.relu(F.conv2d(x.double(), a, bias, 2, 1))
    two = F.relu(F.conv2d(one, b, bias, 1, 1) + one)
    five = F.conv2d(torch.cat([two.flip(1), one], 1), c, bias)
    six = F.hardswish(five * scale[:, None, None] + bias[:, None, None] + two)
    six = six * torch.sigmoid(F.conv2d(six.mean((2, 3), keepdim=True), c[:, :12], bias))
    return [F.relu6(F.linear(F.max_pool2d(six, 3, 2, 1).mean((2, 3)), d, bias[:5])), five, two]


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_a_chain_of_everything_equals_float64_at_every_size(threads: int) -> None:
    chain, parameters = residual_chain(torch.Generator().manual_seed(0))
    engine = Engine(chain)
    for batch, height, width in ((1, 17, 30), (3, 8, 8), (2, 64, 33), (1, 17, 30), (1, 1, 1), (4, 8, 8)):
        x = torch.randn(batch, 6, height, width)
        assert error(residual_oracle(parameters, x), engine([x], threads)) <= ROUNDING


def test_calls_at_the_same_time_do_not_meet() -> None:
    chain, parameters = residual_chain(torch.Generator().manual_seed(0))
    engine = Engine(chain)
    inputs = [torch.randn(2, 6, 24, 24) for _ in range(8)]
    expected = [residual_oracle(parameters, x) for x in inputs]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(5):
            found = list(pool.map(lambda x: engine([x], 2), inputs))
            assert max(error(a, b) for a, b in zip(expected, found, strict=True)) <= ROUNDING


def in_child(engine: Engine, x: Tensor, queue: multiprocessing.Queue) -> None:
    queue.put(engine([x], 2)[0].numpy())


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="there is no fork here")
@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork.*:DeprecationWarning")
def test_a_forked_process_has_threads_of_its_own() -> None:
    chain, parameters = residual_chain(torch.Generator().manual_seed(0))
    engine, x = Engine(chain), torch.randn(1, 6, 16, 16)
    engine([x], 2)
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=in_child, args=(engine, x, queue))
    child.start()
    found = torch.from_numpy(queue.get(timeout=60))
    child.join(60)
    assert child.exitcode == 0
    assert error(residual_oracle(parameters, x)[:1], [found]) <= ROUNDING


@pytest.mark.parametrize("features", ["AVX2", "portable"])
def test_every_set_of_instructions_computes_the_same(features: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if features != "portable" and features not in (processor_features(), *list(FEATURES)[1:]):
        pytest.skip(f"this processor has no {features}")
    other = Library(build_library(features))
    monkeypatch.setattr(engine_module, "library", lambda: other)
    chain, parameters = residual_chain(torch.Generator().manual_seed(0))
    x = torch.randn(2, 6, 31, 18)
    assert error(residual_oracle(parameters, x), Engine(chain)([x], 1)) <= ROUNDING


def test_old_sizes_are_forgotten() -> None:
    chain, _ = residual_chain(torch.Generator().manual_seed(0))
    engine = Engine(chain)
    for height in range(8, 8 + 2 * engine_module.KEPT):
        engine([torch.randn(1, 6, height, 8)])
    assert len(engine.loaded) == engine_module.KEPT


def test_images_that_are_too_small_are_refused() -> None:
    layer = Conv(0, 1, np.zeros((1, 3, 5, 5), np.float32), np.zeros(1, np.float32))
    with pytest.raises(InputError) as refused:
        Engine(Chain(1, (layer,), (1,)))([torch.zeros(1, 3, 4, 9)])
    assert str(refused.value) == "a Conv of this chain makes (1, 0, 5) of an image (3, 4, 9); give larger images."


def test_other_channels_are_refused() -> None:
    layer = Conv(0, 1, np.zeros((1, 3, 1, 1), np.float32), np.zeros(1, np.float32))
    with pytest.raises(InputError) as refused:
        Engine(Chain(1, (layer,), (1,)))([torch.zeros(1, 4, 9, 9)])
    assert str(refused.value) == "a convolution of this chain reads 3 channels and gets 4."


def test_what_fits_at_one_size_only_is_refused_at_others() -> None:
    """A convolution of stride 2 with a border, and a pooling: of 8 rows both make 4, of 7 one makes 4 and one 3."""
    weight, bias, none = np.zeros((2, 2, 3, 3), np.float32), np.zeros(2, np.float32), np.ones(2, np.float32)
    pool, conv = Pool(0, 1, True, (2, 2), (2, 2), (0, 0)), Conv(0, 2, weight, bias, (2, 2), (1, 1))
    for last in (
        Conv(0, 3, weight, bias, (2, 2), (1, 1), residual=1),
        Map(2, 3, none, none, second=1),
        Cat((2, 1), 3),
    ):
        engine = Engine(Chain(1, (pool, conv, last), (3,)))
        assert engine([torch.randn(1, 2, 8, 8)])[0].shape[2:] == (4, 4)
        with pytest.raises(InputError, match="of this chain joins"):
            engine([torch.randn(1, 2, 7, 8)])
    with pytest.raises(InputError, match="of this chain joins"):
        Engine(Chain(1, (pool, conv, Scale(2, 1, 3)), (3,)))([torch.randn(1, 2, 8, 8)])
    with pytest.raises(InputError, match="of this chain joins"):
        Engine(Chain(1, (Map(0, 1, none, none),), (1,)))([torch.randn(1, 3, 8, 8)])


def test_without_a_compiler_the_error_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler -O2")
    with pytest.raises(RuntimeBuildError) as refused:
        build_library("portable", tmp_path)
    assert str(refused.value) == (
        "the native kernels need a C++ compiler, and 'no-such-compiler -O2' is not there; install one (Debian: apt "
        "install g++), or name one in the environment variable CXX."
    )
    assert not list(tmp_path.iterdir())


def test_a_failing_compiler_shows_what_it_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = tmp_path / "broken"
    compiler.write_text("#!/bin/sh\necho 'no such flag' >&2\nexit 3\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    with pytest.raises(RuntimeBuildError) as refused:
        build_library("portable", tmp_path / "cache")
    assert str(refused.value) == f"{compiler} cannot compile the native kernels:\nno such flag"
    assert not list((tmp_path / "cache").iterdir())


def test_without_kernels_there_is_one_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> Library:
        raise RuntimeBuildError("there is no compiler.")

    monkeypatch.setattr(library_module, "library", missing)
    library_or_none.cache_clear()
    try:
        with pytest.warns(UserWarning, match=r"^there is no compiler\. Without them " + library_module.GAIN):
            assert library_or_none() is None
        assert library_or_none() is None  # warnings are errors here: there is no second one
    finally:
        library_or_none.cache_clear()


def test_tiles_are_the_groups_where_these_are_worth_it() -> None:
    pairs = np.zeros((8, 10), bool)
    pairs[[0, 2, 5], :4] = True
    pairs[[1, 3, 4, 6], 3:9] = True
    tiles = {(t.filters, t.channels) for t in tiles_of(pairs, 12)}
    assert tiles == {((0, 2, 5), (0, 1, 2, 3)), ((1, 3, 4, 6), (3, 4, 5, 6, 7, 8)), ((7,), ())}


def test_tiles_of_nearly_equal_filters_are_one() -> None:
    pairs = np.ones((8, 10), bool)
    pairs[range(8), range(8)] = False
    assert [(t.filters, t.channels) for t in tiles_of(pairs, 12)] == [(tuple(range(8)), tuple(range(10)))]


@given(st.integers(0, 2**31), st.integers(1, 40), st.integers(1, 20), st.integers(1, 12))
def test_tiles_hold_every_pair_and_every_filter_once(seed: int, filters: int, channels: int, most: int) -> None:
    pairs = (grouped_weight(torch.Generator().manual_seed(seed), filters, channels, (1, 1)) != 0).numpy()[:, :, 0, 0]
    tiles = tiles_of(pairs, most)
    assert sorted(o for t in tiles for o in t.filters) == list(range(filters))
    assert all(len(t.filters) <= most for t in tiles)
    assert all(
        pairs[o].nonzero()[0].tolist() == [c for c in t.channels if pairs[o, c]] for t in tiles for o in t.filters
    )


@pytest.mark.slow
def test_nothing_is_read_or_written_outside(tmp_path: Path) -> None:
    """The kernels under AddressSanitizer, in a process of their own."""
    flags = ("-fsanitize=address", "-g", "-O1")
    found = subprocess.run(["c++", "-print-file-name=libasan.so"], capture_output=True, text=True)
    if found.returncode or not Path(found.stdout.strip()).is_absolute():
        pytest.skip("the compiler has no AddressSanitizer")
    path = build_library(processor_features(), tmp_path, flags)
    environment = os.environ | {"LD_PRELOAD": found.stdout.strip(), "ASAN_OPTIONS": "detect_leaks=0"}
    command = [sys.executable, "-m", "tests.kernels.sanitized", str(path)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert run.returncode == 0, run.stderr[-3000:]
    assert run.stdout == "60 chains\n"
