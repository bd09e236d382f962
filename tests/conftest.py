"""What holds for every test: one thread, a fixed seed, and markers that skip with a reason."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator

import pytest
import torch
from hypothesis import HealthCheck, settings

# Random networks (tests/test_random_networks.py): few of them, the same ones at every run; many with
# --hypothesis-profile=nightly, other ones every time.
_SLOW = (HealthCheck.too_slow, HealthCheck.data_too_large)
settings.register_profile("default_run", max_examples=50, derandomize=True, deadline=None, suppress_health_check=_SLOW)
settings.register_profile("nightly", max_examples=1000, deadline=None, print_blob=True, suppress_health_check=_SLOW)
settings.load_profile("default_run")


def pytest_configure() -> None:
    # The zoo's networks are too small to gain from threads, and sums in one order are the same on every machine.
    torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    skips: dict[str, pytest.MarkDecorator] = {}
    if not torch.cuda.is_available():
        skips["gpu"] = pytest.mark.skip(reason="needs a CUDA device")
    if importlib.util.find_spec("tensorrt") is None:
        skips["tensorrt"] = pytest.mark.skip(reason="needs TensorRT")
    for item in items:
        for name, skip in skips.items():
            if item.get_closest_marker(name) is not None:
                item.add_marker(skip)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="session")
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Costs that are measured in tests are kept for the session, and not in the user's cache folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield
