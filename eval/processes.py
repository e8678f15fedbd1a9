"""Several processes that share one evaluation, and a folder that no other evaluation writes to. No tensors."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TypeVar

import torch
from torch import distributed

from vidllm.processing.video_reading_vidllm import VidLLMInputError


LOCK_FILE = ".lock"
# The slowest process may need days longer than the others; one that dies is noticed by the launcher.
_PATIENCE = timedelta(days=30)
SMALL_PARAMETERS = 200_000_000
Item = TypeVar("Item")


@dataclass(frozen=True)
class Processes:
    """Which of how many processes this is.

    Args:
        rank (`int`): From 0.
        count (`int`): How many there are.
        local_rank (`int`): On its machine, from 0.

    Source:
        Ours: they meet three times only, so that plain messages on the CPU serve every device.
    """

    rank: int = 0
    count: int = 1
    local_rank: int = 0

    @property
    def is_main(self) -> bool:
        """Whether this one checks, scores and writes results."""
        return self.rank == 0

    def share(self, items: Sequence[Item]) -> Sequence[Item]:
        """What of a list is this one's to do."""
        return items[self.rank :: self.count]

    def wait(self) -> None:
        """Go on when all have come here."""
        if self.count > 1:
            distributed.barrier()

    def from_main(self, number: float | None) -> float | None:
        """The main process's number, on every process."""
        if self.count == 1:
            return number
        told = torch.tensor([float("nan") if number is None else number], dtype=torch.float64)
        distributed.broadcast(told, 0)
        return None if bool(told.isnan()) else float(told)

    def device(self, device: str | None) -> str | None:
        """Where this one's model runs: of several GPUs its own, where nothing else was asked for."""
        if self.count == 1 or device not in (None, "cuda") or not torch.cuda.is_available():
            return device
        return f"cuda:{self.local_rank % torch.cuda.device_count()}"


def start_processes(expected: int | None = None) -> Processes:
    """Meet the processes that a launcher has started beside this one.

    Args:
        expected (`int`, *optional*): How many were asked for.

    Returns:
        `Processes`: one where no launcher has.

    Raises:
        VidLLMInputError: There are more or fewer than asked for.

    Source:
        Ours: `accelerate launch` and `torchrun` say it in the environment. `accelerate launch --cpu --num_processes 2` starts one process and
        says nothing; that must not pass for two.
    """
    rank, count = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if expected is not None and expected != count:
        raise VidLLMInputError(
            f"processes: wanted {expected}; the launcher started {count} (accelerate on CPUs wants --multi_gpu for several)"
        )
    if count > 1 and not distributed.is_initialized():
        distributed.init_process_group("gloo", timeout=_PATIENCE)
    return Processes(rank, count, int(os.environ.get("LOCAL_RANK", 0)))


@contextmanager
def alone_in(folder: Path, processes: Processes) -> Iterator[None]:
    """Keep other evaluations out of a folder while this one's processes are in it.

    Args:
        folder (`Path`): Made if it does not exist.
        processes (`Processes`): Those of this evaluation.

    Raises:
        VidLLMInputError: Another evaluation, or a process that an earlier one has left, is still at work there.

    Source:
        Ours: when a launcher is killed, the processes that it started go on; what they write must not meet what a resumed run writes. The
        system lifts the lock when a process ends, however it ends. Where it knows no such locks nothing is checked.
    """
    try:
        import fcntl
    except ImportError:
        processes.wait()
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / LOCK_FILE, "ab") as file:
        if processes.is_main:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise VidLLMInputError(
                    f"{folder}: another evaluation is at work there; wait for it or end it, or choose another --out"
                ) from None
            # All processes hold it together; the next evaluation wants it for itself.
            fcntl.flock(file, fcntl.LOCK_SH)
        processes.wait()
        fcntl.flock(file, fcntl.LOCK_SH)
        yield


@contextmanager
def steady_threads(model: torch.nn.Module) -> Iterator[None]:
    """Let a small model on the CPU compute in one thread; the number of threads is as it was afterwards.

    Args:
        model (`torch.nn.Module`): The model; one from `SMALL_PARAMETERS` on, or on another device, is left alone.

    Source:
        Ours: sums are rounded by how many threads share them, so that one process with all cores and several with one each would differ in the
        last digits. For small models one thread is also the fastest (vidllm-nano: 0.8 s per scene against 3.4 s with two on a busy machine). Of
        large ones on the CPU results agree to rounding, and byte for byte where `OMP_NUM_THREADS` is the same.
    """
    small = sum(tensor.numel() for tensor in model.state_dict().values()) < SMALL_PARAMETERS
    before = torch.get_num_threads()
    if model.device.type == "cpu" and small:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


__all__ = ["LOCK_FILE", "SMALL_PARAMETERS", "Processes", "alone_in", "start_processes", "steady_threads"]
