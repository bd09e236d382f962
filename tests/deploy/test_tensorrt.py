"""Engines: what is asked of TensorRT, written and refused (over a stand-in), and, where there is one, the GPU's."""

from __future__ import annotations

import copy
import importlib
import json
import re
import sys
import types
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import dspfx
from dspfx.deploy import tensorrt_build, tensorrt_file
from dspfx.deploy.agree import disagreement
from dspfx.deploy.runtimes import RUNTIMES
from dspfx.deploy.tensorrt_file import MAGIC, read_engine
from dspfx.errors import ConfigError, InputError, MismatchError, ModelError, RuntimeBuildError, StorageError
from tests.deploy import fake_tensorrt
from tests.deploy.test_export import ENTRIES, IMAGES, Applied, plain, small


@pytest.fixture
def asked() -> Iterator[dict[str, Any]]:
    with fake_tensorrt.installed() as found:
        yield found


@pytest.mark.parametrize("name", ["resnet_bottleneck", "siamese", "named_inputs", "dict_output"])
def test_an_engine_is_called_as_its_network_is(name: str, tmp_path: Path, asked: dict[str, Any]) -> None:
    network, entry, path = small(name), ENTRIES[name], tmp_path / "small.engine"
    built = dspfx.build_tensorrt(network, path, "fp32", entry.inputs(2), batch=(1, 2, 6))
    fast = dspfx.TensorRTModule(path)
    assert fast.batches == (1, 6)
    assert fast.metadata == built.metadata
    for batch in (1, 5, 5, 2):
        inputs = entry.inputs(batch, seed=batch)
        with torch.no_grad():
            expected = network(*inputs)
        found = fast(*inputs)
        assert type(found) is type(expected)
        assert disagreement(found, expected)[0] <= 1e-4
    assert asked["stream"] == 4711
    with pytest.raises(InputError, match=r"^this network was built for "):
        fast(*entry.inputs(2, 12, 12))


def test_what_is_asked_of_tensorrt(tmp_path: Path, asked: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    network, path = plain(), tmp_path / "small.engine"
    dspfx.build_tensorrt(network, path, "fp32", IMAGES, batch=(1, 4, 16), workspace=1 << 20, aux_streams=2)
    assert asked["flags"] == 1 << fake_tensorrt.NetworkDefinitionCreationFlag.STRONGLY_TYPED
    assert asked["cleared"] == [fake_tensorrt.BuilderFlag.TF32]
    assert asked["WORKSPACE"] == 1 << 20
    assert asked["config"].max_aux_streams == 2
    assert asked["profile"] == {"input0": ((1, 3, 8, 8), (4, 3, 8, 8), (16, 3, 8, 8))}
    asked.clear()
    monkeypatch.setattr(fake_tensorrt, "__version__", "11.4.0")
    built = dspfx.build_tensorrt(network, path, "fp16", IMAGES)
    assert asked["flags"] == 0  # there are no other networks
    assert "cleared" not in asked
    assert "WORKSPACE" not in asked
    assert built.precision == built.metadata["dspfx.precision"] == "fp16"


def test_shapes_are_set_only_where_they_change_and_outputs_are_new(tmp_path: Path, asked: dict[str, Any]) -> None:
    path = tmp_path / "small.engine"
    dspfx.build_tensorrt(plain(), path, "fp32", IMAGES)
    fast = dspfx.TensorRTModule(path)
    asked.clear()
    asked["profile"] = {}
    first, second = fast(IMAGES), fast(IMAGES)
    assert asked["shapes set"] == 1  # so that the second call can be captured
    assert first.data_ptr() != second.data_ptr()
    assert torch.equal(first, second)
    transposed = IMAGES.transpose(2, 3).contiguous().transpose(2, 3)
    assert torch.equal(fast(transposed), first)
    fast(IMAGES[:1])
    assert asked["shapes set"] == 2
    assert copy.deepcopy(fast) is fast


def test_the_file_says_what_it_is_for(
    tmp_path: Path, asked: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    path, network = tmp_path / "small.engine", dspfx.lower(plain(), IMAGES, tune=None)
    built = dspfx.build_tensorrt(network, path, "fp32", verbose=True)
    assert capsys.readouterr().out.splitlines()[-1] == str(built)
    kind = "TensorRT engine on tensorrt 10.99.0, NVIDIA Fake, fp32, any batch (compared at 1, 8, 32)"
    assert str(built).startswith(f"{path}: {kind}, differs from its ONNX file by ")
    metadata, engine = read_engine(path)
    machine = {"tensorrt.version": "10.99.0", "gpu.name": "NVIDIA Fake", "gpu.capability": "9.0"}
    assert {key: metadata[key] for key in machine} == machine
    assert len(metadata["dspfx.plan"]) == 64
    assert metadata["dspfx.engine_batch"] == "1,8,32"
    assert (metadata["dspfx.compared"], metadata["dspfx.tolerance"]) == ("onnxruntime", "1.000e-04")
    assert float(metadata["dspfx.max_error"]) == pytest.approx(built.max_error, rel=1e-3)
    importlib.import_module("onnx").load_from_string(engine)  # the bare engine, which is an ONNX file here
    assert list(tmp_path.iterdir()) == [path]


def test_an_onnx_file_keeps_its_precision(tmp_path: Path, asked: dict[str, Any]) -> None:
    file, path = tmp_path / "small.onnx", tmp_path / "small.plan"
    for precision in ("fp32", "fp16", "int8"):
        calibration = [IMAGES] if precision == "int8" else None
        dspfx.export_onnx(plain(), file, IMAGES, precision=precision, calibration=calibration, verbose=False)
        assert dspfx.build_tensorrt(file, path).precision == precision
    message = (
        f"precision is 'fp32', and {file} is in int8, which an engine takes over; export it so: dspfx.export_onnx("
        f"small, {str(file)!r}, precision='fp32')."
    )
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        dspfx.build_tensorrt(file, path, "fp32")


def test_a_foreign_file_is_known_by_its_weights(tmp_path: Path, asked: dict[str, Any]) -> None:
    file, path = tmp_path / "foreign.onnx", tmp_path / "foreign.engine"
    for precision, network in (("fp32", plain()), ("fp16", plain().half())):
        images = IMAGES.to(next(network.parameters()).dtype)
        torch.onnx.export(network, (images,), file, dynamo=True, verbose=False, external_data=False)
        if precision == "fp32":
            built = dspfx.build_tensorrt(file, path)
            assert built.precision == "fp32"
            assert built.max_error != built.max_error
            assert str(built).endswith(", fp32, not compared: the ONNX file does not say how it is called")
            fast = dspfx.TensorRTModule(path)
            for wrong in (IMAGES[:, :, :4], IMAGES[0]):
                with pytest.raises(InputError, match=r"^the engine does not take input of shape \[.*\]; build"):
                    fast(wrong)
            with pytest.raises(InputError, match=r"^the engine takes 1 tensors and got 2\.$"):
                fast(IMAGES, IMAGES)
            found = fast(IMAGES)
            assert disagreement(found, network(IMAGES).detach())[0] <= 1e-5
        else:
            assert importlib.import_module("dspfx.deploy.tensorrt").precision_of(file) == "fp16"


def test_the_timing_cache_is_used_and_kept(tmp_path: Path, asked: dict[str, Any]) -> None:
    cache, path = tmp_path / "timings.cache", tmp_path / "small.engine"
    for expected in (b"+", b"++"):
        dspfx.build_tensorrt(plain(), path, "fp32", IMAGES, timing_cache=cache)
        assert cache.read_bytes() == expected
    for useless in (b"of another GPU", b"no cache"):
        cache.write_bytes(useless)
        dspfx.build_tensorrt(plain(), path, "fp32", IMAGES, timing_cache=cache)
        assert cache.read_bytes() == b"+"


@pytest.fixture
def old(tmp_path: Path) -> Iterator[Path]:
    """A file in the way, that has to be as it was after every error."""
    path = tmp_path / "old.engine"
    path.write_bytes(b"old")
    yield path
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_every_error_of_the_parser_is_told_with_its_node(old: Path, asked: dict[str, Any]) -> None:
    network = Applied(lambda y: y.long().bitwise_xor(3).bitwise_xor(5).float())
    with pytest.raises(RuntimeBuildError) as caught:
        dspfx.build_tensorrt(network, old, "fp32", IMAGES)
    first, *lines = str(caught.value).splitlines()
    assert first == "TensorRT 10.99.0 refuses network.onnx:"
    assert len(lines) == 2
    place = "[UNSUPPORTED_NODE, parseNode in ModelImporter.cpp:7]"
    assert lines[1] == f"node 1 'node_BitwiseXor_1' (BitwiseXor): no importer, says 1 {place}"


def test_what_is_not_built_says_why(old: Path, asked: dict[str, Any]) -> None:
    message = "TensorRT 10.99.0 builds no engine of network.onnx; it says:\nno tactic for node_Conv_0"
    with pytest.raises(RuntimeBuildError, match=f"^{re.escape(message)}$"):
        dspfx.build_tensorrt(plain(), old, "fp32", IMAGES, aux_streams=13)


def test_other_numbers_are_refused(old: Path, asked: dict[str, Any]) -> None:
    asked["wrong"] = 0.01
    message = (
        "the engine of network.onnx differs from it on ONNX Runtime by 1.0e-02 of the largest value of output 0, and "
        "1.0e-04 is allowed; give a higher precision, or tolerance=... if that is good enough."
    )
    with pytest.raises(MismatchError, match=f"^{re.escape(message)}$"):
        dspfx.build_tensorrt(plain(), old, "fp32", IMAGES)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch": (4, 2, 8)}, "batch is (4, 2, 8); give (smallest, usual, largest) in this order, at least 1."),
        ({"batch": (0, 2, 8)}, "batch is (0, 2, 8); give (smallest, usual, largest) in this order, at least 1."),
        ({"workspace": -1}, "workspace is -1; give None or an integer of at least 0."),
        ({"aux_streams": True}, "aux_streams is True; give None or an integer of at least 0."),
        ({"precision": "fp8"}, "precision is 'fp8'; give one of 'fp32', 'fp16', 'bf16', 'int8'."),
    ],
)
def test_settings_are_checked(options: Any, message: str, old: Path, asked: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        dspfx.build_tensorrt(plain(), old, **{"precision": "fp32", "example_inputs": IMAGES, **options})


def test_gates_and_free_images_are_refused(old: Path, asked: dict[str, Any]) -> None:
    with pytest.raises(ModelError, match="lower first"):
        dspfx.build_tensorrt(dspfx.prepare(plain(), IMAGES), old)
    message = (
        "x has the shape [-1, 3, -1, 8], where -1 is free; only the batch, the first size, may be: export the network "
        "for one image size."
    )
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        tensorrt_build.batch_profile({"x": (-1, 3, -1, 8)}, (1, 1, 1))


def test_another_gpu_or_version_is_refused(
    tmp_path: Path, asked: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "small.engine"
    dspfx.build_tensorrt(plain(), path, "fp32", IMAGES)
    with fake_tensorrt.installed(gpu="NVIDIA Other"):
        message = (
            f"{path} was built where gpu.name is 'NVIDIA Fake', and here it is 'NVIDIA Other'; an engine runs on the "
            f"GPU and the version it was built on: build it here from the same ONNX file, dspfx.build_tensorrt("
            f'"network.onnx", {str(path)!r}).'
        )
        with pytest.raises(MismatchError, match=f"^{re.escape(message)}$"):
            dspfx.TensorRTModule(path)
    monkeypatch.setattr(fake_tensorrt, "__version__", "10.100.0")
    with pytest.raises(
        MismatchError, match=r"built where tensorrt\.version is '10\.99\.0', and here it is '10\.100\.0'"
    ):
        dspfx.TensorRTModule(path)


def test_batches_and_tensors_that_do_not_fit(tmp_path: Path, asked: dict[str, Any]) -> None:
    path = tmp_path / "small.engine"
    dspfx.build_tensorrt(plain(), path, "fp32", IMAGES, batch=(2, 2, 4))
    fast = dspfx.TensorRTModule(path)
    message = "input0 has a batch of 5, and the engine was built for 2 to 4; split it, or build with batch=(2, ..., 5)."
    with pytest.raises(InputError, match=f"^{re.escape(message)}$"):
        fast(torch.zeros(5, 3, 8, 8))
    with pytest.raises(InputError, match="has a batch of 1, and the engine was built for 2 to 4"):
        fast(torch.zeros(1, 3, 8, 8))
    message = (
        "input0 is torch.float32 on meta, and the engine takes torch.float32 on the GPU; move or convert it with "
        ".to(...)."
    )
    with pytest.raises(InputError, match=f"^{re.escape(message)}$"):
        fast(IMAGES.to("meta"))


def test_files_that_are_no_engine(tmp_path: Path, asked: dict[str, Any]) -> None:
    path = tmp_path / "small.engine"
    with pytest.raises(StorageError, match=r"small\.engine cannot be read \(.*\); give a file of dspfx\.build_tensor"):
        dspfx.TensorRTModule(path)
    dspfx.build_tensorrt(plain(), path, "fp32", IMAGES)
    whole = path.read_bytes()
    for content in (b"", b"ftrt" * 100, whole[:40]):
        path.write_bytes(content)
        with pytest.raises(StorageError, match=r"is no engine of dspfx\.build_tensorrt, or a part of one"):
            dspfx.TensorRTModule(path)
    path.write_bytes(whole[:12] + b"?" + whole[13:])
    with pytest.raises(StorageError, match=r"small\.engine is damaged: Expecting value"):
        dspfx.TensorRTModule(path)
    metadata, _ = read_engine_of(whole)
    text = json.dumps(metadata).encode()
    path.write_bytes(MAGIC + len(text).to_bytes(4, "little") + text + b"of another version")
    message = f"TensorRT does not take the engine in {path}:\nthe tag does not match"
    with pytest.raises(RuntimeBuildError, match=f"^{re.escape(message)}$"):
        dspfx.TensorRTModule(path)


def read_engine_of(content: bytes) -> tuple[dict[str, str], bytes]:
    length = int.from_bytes(content[8:12], "little")
    return json.loads(content[12 : 12 + length]), content[12 + length :]


def test_it_is_a_runtime(asked: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    for package in ("tensorrt", "openvino"):
        assert package in RUNTIMES
    message = "tensorrt runs on cuda here, and the network is on cpu; move it and the inputs with .to('cuda')."
    with pytest.raises(InputError, match=f"^{re.escape(message)}$"):
        dspfx.benchmark({"dense": plain()}, IMAGES, runtime="tensorrt")
    monkeypatch.setitem(RUNTIMES, "tensorrt", replace(RUNTIMES["tensorrt"], devices=("cpu",)))
    found = dspfx.benchmark({"dense": plain(), "other": plain()}, IMAGES, runtime="tensorrt", rounds=2)
    assert "tensorrt 10.99.0" in found.setting
    assert asked["profile"]["input0"] == ((1, 3, 8, 8), (2, 3, 8, 8), (4, 3, 8, 8))


def test_lower_compares_whole_engines(
    tmp_path: Path, asked: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setitem(RUNTIMES, "tensorrt", replace(RUNTIMES["tensorrt"], devices=("cpu",)))
    network = plain()
    with torch.no_grad():
        for value in next(network.children()).parameters():
            value[::2] = 0
    lowered = dspfx.lower(network, IMAGES, runtime="tensorrt", tune="measure")
    contest = lowered.meta["contest"]
    assert {"dense", "dead channels removed"} <= set(contest.results)
    assert "tensorrt 10.99.0" in contest.setting
    assert [file.name.split("-")[:2] for file in (tmp_path / "dspfx").iterdir()] == [["costs", "eager"]]
    with torch.no_grad():
        assert disagreement(lowered(IMAGES), network(IMAGES))[0] <= 1e-5


def test_without_tensorrt_or_a_gpu(old: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    start = (
        r"^TensorRT cannot be imported \(ModuleNotFoundError: .*\); run: pip install tensorrt-cu13, or tensorrt-cu12"
    )
    for call in (lambda: dspfx.build_tensorrt(plain(), old), lambda: dspfx.TensorRTModule(old)):
        with pytest.raises(ConfigError, match=start):
            call()
    monkeypatch.setitem(sys.modules, "tensorrt", types.SimpleNamespace(__version__="8.6.1"))
    message = "TensorRT 8.6.1 is too old for dspfx; run: pip install --upgrade tensorrt-cu13"
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        dspfx.build_tensorrt(plain(), old)
    monkeypatch.setitem(sys.modules, "tensorrt", fake_tensorrt)
    monkeypatch.setattr(tensorrt_file, "_gpu", lambda: None)
    message = "build_tensorrt needs an NVIDIA GPU, and PyTorch sees none (torch.cuda.is_available() is False)."
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        dspfx.build_tensorrt(plain(), old)


def _tensorrt_missing() -> str:
    try:
        tensorrt_build.load_tensorrt()
    except ConfigError as error:
        return str(error)
    return "" if torch.cuda.is_available() else "there is no GPU"


needs_tensorrt = pytest.mark.skipif(bool(_tensorrt_missing()), reason=_tensorrt_missing() or "TensorRT is there")


@pytest.mark.tensorrt
@needs_tensorrt
@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16", "int8"])
def test_engines_on_the_gpu_equal_the_network(precision: str, tmp_path: Path) -> None:
    network, path = plain(), tmp_path / "small.engine"
    calibration = [IMAGES] if precision == "int8" else None
    dspfx.build_tensorrt(network, path, precision, IMAGES, calibration=calibration, timing_cache=tmp_path / "t.cache")
    assert (tmp_path / "t.cache").stat().st_size > 0
    fast = dspfx.TensorRTModule(path)
    for batch in (1, 2, 7):
        images = IMAGES[:1].expand(batch, 3, 8, 8).contiguous()
        with torch.no_grad():
            expected = network(images)
        allowed = dspfx.deploy.exported.TOLERANCES[precision]
        assert disagreement(fast(images.cuda()).cpu(), expected)[0] <= allowed


@pytest.mark.tensorrt
@needs_tensorrt
def test_a_call_is_captured_in_a_cuda_graph(tmp_path: Path) -> None:
    network, path = plain(), tmp_path / "small.engine"
    dspfx.build_tensorrt(network, path, "fp32", IMAGES)
    fast, images = dspfx.TensorRTModule(path), IMAGES.cuda()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        fast(images)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = fast(images)
    images.mul_(2)
    graph.replay()
    with torch.no_grad():
        assert disagreement(found.cpu(), network(2 * IMAGES))[0] <= 1e-4


@pytest.mark.tensorrt
@needs_tensorrt
def test_the_real_parser_names_its_nodes(tmp_path: Path) -> None:
    network = Applied(lambda y: y.long().bitwise_xor(3).float())
    with pytest.raises(RuntimeBuildError, match=r"refuses network\.onnx:\nnode \d+ .*\(BitwiseXor\): "):
        dspfx.build_tensorrt(network, tmp_path / "small.engine", "fp32", IMAGES)


@pytest.mark.tensorrt
@needs_tensorrt
def test_benchmark_runs_engines() -> None:
    images = torch.randn(4, 3, 32, 32, device="cuda")
    found = dspfx.benchmark({"a": plain().cuda(), "b": nn.Conv2d(3, 8, 3).cuda()}, images, runtime="tensorrt", rounds=3)
    assert all(result.median_ms > 0 for result in found.values())
