"""One training in several processes of this machine: data-parallel, through torch.distributed and accelerate."""

import multiprocessing
import os
import pickle
import socket
import threading
from collections.abc import Callable, Iterable
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

import torch
from torch import distributed

from compression.context import Context
from compression.errors import EdgepressError, Incompatible

Result = dict[str, float]


def in_processes(count: int, function: Callable[..., Result], *arguments: Any, context: Context, **parameters: Any) -> Result:
    """Call `function(*arguments, context=context, **parameters)` in `count` processes that train together.

    The processes communicate by gloo on a CPU, where each gets its share of this process's threads, and by NCCL on GPUs, one each.

    Args:
        count: Number of processes.
        function: Calls `train`, which divides batches among the processes: `batch_size` rows in each, gradients averaged over all targets.
            It is imported by its name, and its arguments are pickled.
        arguments: Its positional arguments.
        context: Device, seed and callbacks; only the first process reports.
        parameters: Its keyword arguments.

    Returns:
        The first process's result.

    Raises:
        Incompatible: There are more processes than GPUs.
        RuntimeError: A process was lost.
        Exception: What the function raised in one of the processes.
    """
    device = torch.device(context.device)
    if device.type == "cuda" and count > torch.cuda.device_count():
        raise Incompatible(f"{count} processes need a GPU each, and this machine has {torch.cuda.device_count()}", key="distributed")
    spawning = multiprocessing.get_context("spawn")
    environment = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port()), "WORLD_SIZE": str(count)}
    threads = max(1, torch.get_num_threads() // count)
    children: dict[Connection, BaseProcess] = {}
    try:
        for rank in range(count):
            ours, theirs = spawning.Pipe(duplex=False)
            ranked = environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            job = (theirs, ranked, threads, context.seed, context.device, function, arguments, parameters)
            children[ours] = spawning.Process(target=_child, args=job, daemon=True)
            children[ours].start()
            theirs.close()
        return _listen(children, context)
    finally:
        for child in children.values():
            child.kill()
            child.join()


def _listen(children: dict[Connection, BaseProcess], context: Context) -> Result:
    """Pass on the first process's reports until all are done; return its result."""
    reporting, results, open_pipes = next(iter(children)), {}, set(children)
    while open_pipes:
        for pipe in wait(list(open_pipes)):
            assert isinstance(pipe, Connection)
            try:
                kind, value = pipe.recv()
            except EOFError:
                children[pipe].join()
                kind, value = "error", RuntimeError("a process of the training was lost")
            if kind == "result":
                results[pipe] = value
                open_pipes.remove(pipe)
            elif kind == "error":
                raise _cause(value, children.values())
            elif pipe is reporting:
                getattr(context, kind)(*value)
    return results[reporting]


def _cause(error: Exception, children: Iterable[BaseProcess]) -> Exception:
    """Name the process that was lost: the others fail with errors of their own when it is gone."""
    lost = [child.exitcode for child in children if child.exitcode]
    if not lost or isinstance(error, EdgepressError):
        return error
    return RuntimeError(f"a process of the training ended with exit status {lost[0]}")


def _child(
    pipe: Connection,
    environment: dict[str, str],
    threads: int,
    seed: int,
    device: str,
    function: Callable[..., Result],
    arguments: tuple[Any, ...],
    parameters: dict[str, Any],
) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    os.environ.update(environment)
    torch.set_num_threads(threads)
    if torch.device(device).type == "cuda":
        torch.cuda.set_device(int(environment["LOCAL_RANK"]))
    else:
        os.environ["ACCELERATE_USE_CPU"] = "true"
    callbacks = {kind: lambda *values, kind=kind: pipe.send((kind, values)) for kind in ("progress", "metrics", "warn")}
    try:
        distributed.init_process_group("nccl" if torch.device(device).type == "cuda" else "gloo")
        result = function(*arguments, context=Context(seed=seed, device=device, **callbacks), **parameters)
    except BaseException as error:  # noqa: BLE001  (the parent raises it)
        pipe.send(("error", _portable(error)))
        return
    pipe.send(("result", result))
    distributed.destroy_process_group()


def _portable(error: BaseException) -> BaseException:
    """Return the error, or its type and message where the parent could not unpickle it."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # noqa: BLE001  (its class may raise anything)
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


def _end_with_parent() -> None:
    """End with a parent that is killed, instead of waiting for the other processes."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
