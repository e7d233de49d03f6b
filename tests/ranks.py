"""Real processes in a gloo group, started once for many tests."""

import datetime
import multiprocessing
import os
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from sslops import _C

PATIENCE = 60  # seconds; a rank that takes longer hangs


def _serve(rank: int, world: int, store: str, pipe: Any) -> None:
    torch.set_num_threads(1)
    if isa := os.environ.get("SSLOPS_TEST_ISA"):  # as conftest.py
        _C.set_isa(isa)
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=world, timeout=datetime.timedelta(seconds=PATIENCE)
    )
    while (call := pipe.recv()) is not None:
        function, arguments = call
        try:
            pipe.send((True, function(rank, world, *arguments)))
        except Exception:
            pipe.send((False, traceback.format_exc()))
    dist.destroy_process_group()


class Ranks:
    """`ranks(function, *arguments)`: what function(rank, world, *arguments) returns, on each rank."""

    def __init__(self, world: int, folder: Path) -> None:
        context = multiprocessing.get_context("spawn")
        self.world = world
        self._pipes, self._processes = [], []
        for rank in range(world):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, world, str(folder / "store"), theirs), daemon=True)
            process.start()
            self._pipes.append(ours)
            self._processes.append(process)

    def __call__(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        for pipe in self._pipes:
            pipe.send((function, arguments))
        answers = []
        for rank, pipe in enumerate(self._pipes):
            if not pipe.poll(2 * PATIENCE):
                self.stop()
                raise AssertionError(f"rank {rank} hangs in {function.__name__}")
            answers.append(pipe.recv())
        failed = [f"rank {rank}:\n{text}" for rank, (fine, text) in enumerate(answers) if not fine]
        assert not failed, "\n".join(failed)
        return [answer for _, answer in answers]

    def stop(self) -> None:
        for process, pipe in zip(self._processes, self._pipes, strict=True):
            if process.is_alive():
                pipe.send(None)
                process.join(10)
            process.kill()
