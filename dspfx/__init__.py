"""dspfx: turns a trained convolutional network into a smaller one."""

from dspfx.config import BlockConfig, Budget, GateConfig, Inputs
from dspfx.coverage import coverage
from dspfx.deploy.benchmark import benchmark
from dspfx.deploy.export import export_onnx
from dspfx.deploy.export_openvino import export_openvino
from dspfx.deploy.export_pt2 import export_pt2
from dspfx.deploy.tensorrt import build_tensorrt
from dspfx.deploy.tensorrt_module import TensorRTModule
from dspfx.errors import DspfxError
from dspfx.estimate import estimate
from dspfx.graph.ops import register_rule
from dspfx.learner import GroupLearner
from dspfx.pipeline import lower, prepare, prune
from dspfx.plots import plot_tradeoff
from dspfx.profiler import profile
from dspfx.remap import remap_ema, remap_optimizer
from dspfx.selfcheck import selfcheck
from dspfx.stats_log import StatsLog
from dspfx.storage import load, read_compressed, save, write_compressed
from dspfx.unifier import Unifier, unify

__version__ = "0.1.0"
__all__ = [
    "BlockConfig",
    "Budget",
    "DspfxError",
    "GateConfig",
    "GroupLearner",
    "Inputs",
    "StatsLog",
    "TensorRTModule",
    "Unifier",
    "benchmark",
    "build_tensorrt",
    "coverage",
    "estimate",
    "export_onnx",
    "export_openvino",
    "export_pt2",
    "load",
    "lower",
    "plot_tradeoff",
    "prepare",
    "profile",
    "prune",
    "read_compressed",
    "register_rule",
    "remap_ema",
    "remap_optimizer",
    "save",
    "selfcheck",
    "unify",
    "write_compressed",
]
