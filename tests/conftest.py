"""Setup shared by all tests: one thread, reproducible property tests, the directory of golden fixtures."""

import os

# oneDNN reads this when torch loads. Some virtual machines advertise AMX but trap on it, so a bfloat16 matrix
# product dies with "Illegal instruction". This instruction set is the widest one below AMX.
os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_FP16")

from collections.abc import Callable, Iterator
from hashlib import sha256
from pathlib import Path

import pytest
import torch
from hypothesis import settings

# Such small models run faster on one thread, and sums keep a fixed order.
torch.set_num_threads(1)

settings.register_profile("kvpo", deadline=None, max_examples=60, derandomize=True)
settings.load_profile("kvpo")


@pytest.fixture(scope="session")
def golden_file() -> Callable[[str], Path]:
    """Path of a named file computed by the public implementations, in $KVPO_GOLDEN or ../shared/golden.

    Skips the test if the file does not exist.
    """
    default = Path(__file__).resolve().parents[2] / "shared" / "golden"
    directory = Path(os.environ.get("KVPO_GOLDEN", default))

    def existing(name: str) -> Path:
        if not (directory / name).is_file():
            pytest.skip(f"{name} is not in {directory}; KVPO_GOLDEN names the directory of golden fixtures")
        return directory / name

    return existing


@pytest.fixture(autouse=True)
def own_cache(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Cache prompt embeddings per test, never in the user's cache."""
    name = sha256(request.node.nodeid.encode()).hexdigest()[:16]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KVPO_CACHE", str(tmp_path_factory.getbasetemp() / "caches" / name))
        yield


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base checkpoint with random weights for tests.tiny_world.tiny_config."""
    from tests.tiny_world import write_base

    path = tmp_path_factory.mktemp("base") / "base.safetensors"
    write_base(path)
    return path
