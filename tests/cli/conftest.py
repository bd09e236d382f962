"""Time that is counted in FLOPs, so that what is chosen by measuring is the same at every run; a cache of its own."""

from __future__ import annotations

from collections.abc import Iterator
from weakref import WeakKeyDictionary

import pytest
from torch.utils.flop_counter import FlopCounterMode

from dspfx import pipeline
from dspfx.deploy import timing


@pytest.fixture(scope="module", autouse=True)
def _time_is_flops(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A call takes a microsecond and a nanosecond a FLOP; in runtimes other than eager no FLOP is seen."""
    known: WeakKeyDictionary[timing.Call, float] = WeakKeyDictionary()

    def seconds(call: timing.Call, repeats: int) -> float:
        if call not in known:
            with FlopCounterMode(display=False) as counter:
                call()
            known[call] = 1e-6 + 1e-9 * counter.get_total_flops()
        return known[call]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(timing, "_seconds", seconds)
        patch.setattr(pipeline, "NATIVE", ())  # whose FLOPs torch does not see
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield
