"""What holds for every test: offline, two threads, a seed per test, a throw-away cache for remote code."""

import atexit
import importlib.util
import os
import random
import shutil
import socket
import subprocess
import sys
import tempfile
import zlib
from pathlib import Path

import pytest


# Before transformers is imported: it reads these once.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("MPLBACKEND", "Agg")
os.environ.setdefault("OMP_NUM_THREADS", "2")
if "HF_MODULES_CACHE" not in os.environ:
    os.environ["HF_MODULES_CACHE"] = tempfile.mkdtemp(prefix="vidllm_modules_")
    atexit.register(shutil.rmtree, os.environ["HF_MODULES_CACHE"], ignore_errors=True)
elif "PYTEST_XDIST_WORKER" in os.environ:
    # two workers that copy the same code into one cache would trip over each other
    os.environ["HF_MODULES_CACHE"] = str(Path(os.environ["HF_MODULES_CACHE"]) / os.environ["PYTEST_XDIST_WORKER"])

LOOPBACK = {"localhost", "127.0.0.1", "::1", "0.0.0.0", ""}  # processes of one test talk to each other through it
connect, connect_ex, getaddrinfo = socket.socket.connect, socket.socket.connect_ex, socket.getaddrinfo


class NetworkError(OSError):
    """A test reached for the network."""


def refuse_unless_local(host) -> None:
    if isinstance(host, bytes):
        host = host.decode()
    if host is not None and host not in LOOPBACK and host != socket.gethostname():
        raise NetworkError(f"tests run offline; this one reached for {host!r}")


def local_connect(self, address):
    if self.family in (socket.AF_INET, socket.AF_INET6):
        refuse_unless_local(address[0])
    return connect(self, address)


def local_connect_ex(self, address):
    if self.family in (socket.AF_INET, socket.AF_INET6):
        refuse_unless_local(address[0])
    return connect_ex(self, address)


def local_getaddrinfo(host, *args, **kwargs):
    refuse_unless_local(host)
    return getaddrinfo(host, *args, **kwargs)


socket.socket.connect = local_connect
socket.socket.connect_ex = local_connect_ex
socket.getaddrinfo = local_getaddrinfo


def pytest_collection_modifyitems(items):
    """Tests marked `gpu` skip themselves where there is none."""
    on_gpu = [item for item in items if item.get_closest_marker("gpu")]
    if on_gpu:
        import torch

        if not torch.cuda.is_available():
            for item in on_gpu:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def seeded(request):
    """Every test starts from the same random state, alone or in a run, and leaves torch as it found it."""
    import numpy as np
    import torch

    seed = zlib.crc32(request.node.nodeid.encode()) % 2**31
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    torch.set_num_threads(min(2, int(os.environ["OMP_NUM_THREADS"])))
    dtype = torch.get_default_dtype()
    yield
    torch.set_default_dtype(dtype)
    torch.set_grad_enabled(True)


@pytest.fixture(scope="session")
def repository() -> Path:
    """Root of the source tree."""
    return Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def torchvision_absent() -> None:
    """For tests of the case without torchvision: the environment has none, so nothing needs hiding."""
    assert importlib.util.find_spec("torchvision") is None, (
        "this environment has torchvision, so the case without it cannot be tested; use the one `make install` makes"
    )


@pytest.fixture(scope="session")
def run_with_torchvision():
    """`run_with_torchvision(script, *arguments, cwd=None, env=None)`: a fresh process in which torchvision imports."""
    folder = Path(sys.prefix) / "torchvision_present"
    assert (folder / "torchvision").is_dir(), f"{folder.name} is missing from the environment: run `make install`"
    launcher = Path(__file__).parent / "contracts" / "torchvision_present.py"

    def run(script, *arguments, cwd=None, env=None, timeout=300) -> subprocess.CompletedProcess:
        return subprocess.run(
            [sys.executable, str(launcher), str(folder), str(script), *map(str, arguments)],
            capture_output=True,
            text=True,
            check=False,
            cwd=cwd or Path(script).parent,
            env={**os.environ, **(env or {})},
            timeout=timeout,
        )

    return run
