"""Every name that dspfx uses of TensorRT exists in the real bindings of both majors, and takes what it is given."""

from __future__ import annotations

import ast
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.deploy.tensorrt_bindings import FOLDER, WHEELS
from tests.deploy.tensorrt_contract import LIBRARIES, fits, signatures

ROOT = Path(__file__).resolve().parents[2]
SOURCES = sorted((ROOT / "dspfx" / "deploy").glob("tensorrt*.py"))
# What the bindings look for in the three libraries; nothing here is ever called for its result.
STAND_IN = """
#include <stddef.h>
void *createInferBuilder_INTERNAL(void *log, int version) { return NULL; }
void *createInferRuntime_INTERNAL(void *log, int version) { return NULL; }
void *createInferRefitter_INTERNAL(void *engine, void *log, int version) { return NULL; }
void *createNvOnnxParser_INTERNAL(void *network, void *log, int version) { return NULL; }
void *createNvOnnxParserRefitter_INTERNAL(void *refitter, void *log, int version) { return NULL; }
void *getPluginRegistry(void) { return NULL; }
void *getBuilderPluginRegistry(int capability) { return NULL; }
int getNvOnnxParserVersion(void) { return 0; }
_Bool initLibNvInferPlugins(void *log, const char *name) { return 1; }
void *getLogger(void) { return NULL; }
int getInferLibVersion(void) { return 0; }
"""
WRONG = """
def f(builder: api.Builder, engine: api.ICudaEngine):
    network: api.INetworkDefinition = builder.create_network(1)
    builder.create_networks(1)
    builder.create_network(1, 2)
    builder.create_network(flag=1)
    trt.MemoryPoolType.HEAP
    trt.Builders
    trt.OnnxParser(network)
    trt.OnnxParser(network, None).parse_from_file()
    engine.num_io_tensors = 3
    parser = trt.OnnxParser(network, None)
    parser.get_error(0).desc()
    (lambda: builder.reset_all())()
    [x for x in builder.missing]
    other: api.Missing = 3
"""
RIGHT = """
def f(trt, log):
    builder = trt.Builder(log)
    config = builder.create_builder_config()
    config.max_aux_streams = 2
    network = builder.create_network(flags=1)
    parser = trt.OnnxParser(network, log)
    error: api.ParserError = parser.get_error(0)
    return error.desc(), network.num_inputs.real, builder
"""
pytestmark = pytest.mark.skipif(
    not shutil.which("cc") or sys.platform != "linux", reason="the stand-in libraries need Linux and a C compiler"
)


@pytest.fixture(scope="module", params=WHEELS)
def major(request: pytest.FixtureRequest) -> int:
    found: int = request.param
    if not (FOLDER / str(found) / "tensorrt_bindings").is_dir():
        pytest.skip(f"no bindings of TensorRT {found}; python -m tests.deploy.tensorrt_bindings gets them")
    return found


@pytest.fixture(scope="module")
def libraries(major: int, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The three libraries that the bindings load, doing nothing."""
    folder = tmp_path_factory.mktemp("libraries")
    (folder / "stand_in.c").write_text(STAND_IN)
    for name in LIBRARIES:
        file = f"lib{name}.so.{major}"
        command = ["cc", "-shared", "-fPIC", f"-Wl,-soname,{file}", "-o", file, "stand_in.c"]
        subprocess.run(command, cwd=folder, check=True)
    return folder


def contract(major: int, libraries: Path, *sources: Path) -> dict[str, Any]:
    command = [sys.executable, "-m", "tests.deploy.tensorrt_contract", str(FOLDER / str(major)), str(libraries)]
    done = subprocess.run([*command, *map(str, sources)], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def test_every_name_exists_in_both_majors(major: int, libraries: Path) -> None:
    found = contract(major, libraries, *SOURCES)
    assert found["problems"] == []
    assert found["version"].startswith(f"{major}.")
    assert {
        *("Builder.create_network", "Builder.build_serialized_network", "OnnxParser.parse_from_file"),
        *("ParserError.node_name", "IBuilderConfig.max_aux_streams", "IOptimizationProfile.set_shape"),
        *("ITimingCache.serialize", "MemoryPoolType.WORKSPACE", "NetworkDefinitionCreationFlag.STRONGLY_TYPED"),
        *("Runtime.deserialize_cuda_engine", "ICudaEngine.get_tensor_profile_shape", "TensorIOMode.INPUT"),
        *("IExecutionContext.execute_async_v3", "DataType.BF16", "ILogger.Severity.ERROR", "BuilderFlag.TF32"),
    } <= set(found["uses"])
    assert len(found["uses"]) >= 50


def test_without_a_driver_it_does_not_start(major: int, libraries: Path) -> None:
    """The library's own code, over the real bindings, as far as it gets: the libraries make no builder."""
    found = contract(major, libraries)
    assert found["started"].startswith(f"RuntimeBuildError: TensorRT {found['version']} does not start (")
    assert "is it for this driver's CUDA? tensorrt-cu13 is for CUDA 13" in found["started"]


def test_wrong_uses_are_found(major: int, libraries: Path, tmp_path: Path) -> None:
    wrong = tmp_path / "wrong.py"
    wrong.write_text(WRONG)
    problems = [line.partition("wrong.py:")[2] for line in contract(major, libraries, wrong)["problems"]]
    # Line 2 names the function; every line from the fourth to the last but the twelfth is wrong.
    assert [int(line.partition(":")[0]) for line in problems] == [4, 5, 6, 7, 8, 9, 10, 11, 13, 14, 15, 16]
    assert problems[0] == "4: Builder.create_networks does not exist"
    assert problems[1].startswith("5: Builder.create_network takes [['self', 'flags']]: ")
    assert problems[7] == "11: ICudaEngine.num_io_tensors cannot be assigned to"
    assert problems[8] == "13: .desc of a result whose type the bindings do not tell; annotate it"


def test_the_stand_in_has_nothing_that_the_real_one_lacks(major: int, libraries: Path, tmp_path: Path) -> None:
    names = [
        f"trt.{owner.name}.{member.name}"
        for owner in ast.parse((ROOT / "tests/deploy/fake_tensorrt.py").read_text()).body
        if isinstance(owner, ast.ClassDef)
        for member in owner.body
        if isinstance(member, ast.FunctionDef) and not member.name.startswith("_")
    ]
    assert len(names) >= 30
    source = tmp_path / "names.py"
    source.write_text("\n".join(names))
    assert contract(major, libraries, source)["problems"] == []


def test_right_uses_are_not(major: int, libraries: Path, tmp_path: Path) -> None:
    right = tmp_path / "right.py"
    right.write_text(RIGHT)
    found = contract(major, libraries, right)
    assert found["problems"] == []
    assert "INetworkDefinition.num_inputs" in found["uses"]


def test_signatures_are_read_from_docstrings() -> None:
    overloads = "1. f(self: a.B, x: Tuple[int, int], y: s = <S.W: 2>) -> a.C\n\n2. f() -> int\n"
    doc = f"f(*args, **kwargs)\nOverloaded function.\n\n{overloads}"
    assert signatures(doc, "f") == [(["self", "x", "y"], 2, "a.C"), ([], 0, "int")]
    names = ["self", "x", "y"]
    assert [fits(names, 2, n, set()) for n in range(5)] == [False, False, True, True, False]
    assert fits(names, 2, 1, {"x", "y"})
    assert not fits(names, 2, 2, {"x"})
