"""All programs of a launch side by side under Triton's interpreter, which by itself runs them one after the other:
for kernels whose programs wait for each other.

Each program is a forked process, the tensors are copied to memory that the processes share and back, and the
interpreter's atomics are real ones. So this shows what a protocol between programs does; but in the memory order of
the CPU, and with a barrier of the threads of a program that does nothing.

Internals of Triton, looked at in 3.6 and 3.7; `unavailable` says where they are not as expected.
"""

from __future__ import annotations

import functools
import inspect
import itertools
import multiprocessing
import os
import signal
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection, wait
from types import FrameType
from typing import Any

import torch
from quick_interpreter import patched_once_a_launch

GRACE = 2.0  # seconds from the moment when programs should end by themselves until they are killed
EXPECTED = {  # parameters of what is used
    "_patch_lang": ["fn"],
    "_implicit_cvt": ["arg"],
    "GridExecutor": ["fn", "arg_names", "grid", "pre_run_hooks"],
    "InterpretedFunction.run": ["self", "args", "grid", "warmup", "kwargs"],
    "InterpretedFunction.rewrite": ["self"],
    "interpreter_builder.set_grid_dim": ["nx", "ny", "nz"],
    "interpreter_builder.set_grid_idx": ["x", "y", "z"],
    "interpreter_builder.create_atomic_rmw": ["rmwOp", "ptr", "val", "mask", "sem", "scope"],
}


class ProgramError(RuntimeError):
    """A program raised or died; the others were ended."""


class _TimeUp(BaseException):
    """Not an Exception, of which the interpreter would make one of its own."""


def unavailable() -> str | None:
    """Why programs cannot run side by side here, or None."""
    try:
        from triton import knobs
        from triton.runtime import interpreter
    except ImportError as error:
        return f"no interpreter of Triton: {error}"
    if not knobs.runtime.interpret:
        return "the kernels are compiled: TRITON_INTERPRET is not 1"
    if "fork" not in multiprocessing.get_all_start_methods():
        return "processes cannot be forked here"
    for name, parameters in EXPECTED.items():
        found: Any = interpreter
        for part in name.split("."):
            found = getattr(found, part, None)
        if found is None or list(inspect.signature(found).parameters) != parameters:
            return f"triton.runtime.interpreter.{name} is not {name}({', '.join(parameters)}) in this Triton"
    return None


def launch(kernel: Any, grid: Any, *args: Any, timeout: float = 60.0, **keywords: Any) -> None:
    """kernel[grid](*args, **keywords), side by side. Launch options such as num_warps are dropped.

    Raises ProgramError, with the program's own traceback, or TimeoutError after so many seconds. Either way no
    process is left, and the tensors are as they were.
    """
    from triton.runtime import interpreter

    if reason := unavailable():
        raise RuntimeError(reason)
    function = kernel.rewrite()
    keywords = {name: value for name, value in keywords.items() if name in kernel.arg_names}
    named = inspect.getcallargs(function, *args, **keywords)
    copies: dict[int, tuple[torch.UntypedStorage, torch.UntypedStorage]] = {}
    builder = interpreter.interpreter_builder
    constexprs = interpreter.GridExecutor(function, kernel.arg_names, grid).constexprs
    with patched_once_a_launch():
        scope = interpreter._patch_lang(function)
        try:
            shared = {name: _shared(value, copies) for name, value in named.items()}
            converted = {
                name: value if name in constexprs else interpreter._implicit_cvt(value)
                for name, value in shared.items()
            }
            grid = tuple(grid(converted) if callable(grid) else grid)
            builder.set_grid_dim(*grid, *(1,) * (3 - len(grid)))
            _side_by_side(lambda: function(**converted), builder, f"{kernel.__name__}[{grid}]", grid, timeout)
        finally:
            scope.restore()
    for storage, copy in copies.values():
        storage.copy_(copy)


@contextmanager
def cooperative_launches(timeout: float = 60.0) -> Iterator[list[str]]:
    """Runs what is launched with launch_cooperative_grid=True side by side; yields the kernels' names, as launched."""
    from triton.runtime.interpreter import InterpretedFunction

    launched: list[str] = []
    one_after_the_other = InterpretedFunction.run

    @functools.wraps(one_after_the_other)
    def run(self: Any, *args: Any, grid: Any, warmup: bool, **keywords: Any) -> None:
        if warmup or not keywords.get("launch_cooperative_grid"):
            one_after_the_other(self, *args, grid=grid, warmup=warmup, **keywords)
            return
        launched.append(self.__name__)
        launch(self, grid, *args, timeout=timeout, **keywords)

    InterpretedFunction.run = run
    try:
        yield launched
    finally:
        InterpretedFunction.run = one_after_the_other


def _shared(value: Any, copies: dict[int, tuple[torch.UntypedStorage, torch.UntypedStorage]]) -> Any:
    """A tensor's twin in shared memory. Tensors of one storage stay such."""
    if isinstance(value, tuple) or type(value).__name__ == "TensorDescriptor":
        raise TypeError(f"side by side, an argument is a tensor or a number, got {type(value).__name__}")
    if not isinstance(value, torch.Tensor):
        return value
    storage = value.untyped_storage()
    if storage.data_ptr() not in copies:
        copies[storage.data_ptr()] = storage, storage.clone().share_memory_()
    copy = copies[storage.data_ptr()][1]
    with torch.no_grad():
        return value.new_empty(0).set_(copy, value.storage_offset(), value.size(), value.stride())


def _side_by_side(program: Callable[[], None], builder: Any, name: str, grid: tuple[int, ...], timeout: float) -> None:
    """Runs the program with every index of the grid, each in a process."""
    context = multiprocessing.get_context("fork")
    deadline = time.monotonic() + timeout
    processes, running, late = {}, {}, {}
    try:
        for index in itertools.product(*map(range, grid)):
            receiver, sender = context.Pipe(duplex=False)
            process = context.Process(target=_run, args=(program, builder, index, deadline, sender), daemon=True)
            process.start()
            sender.close()
            processes[index], running[receiver] = process, index
        while running:
            ready = wait(list(running), max(deadline + GRACE - time.monotonic(), 0))
            if not ready:
                break
            for receiver in ready:
                index = running.pop(receiver)
                with receiver:
                    try:
                        in_time, report = receiver.recv()
                    except EOFError:
                        processes[index].join()
                        report, in_time = f"it ended with exit code {processes[index].exitcode}\n", True
                if not in_time:
                    late[index] = report
                elif report:
                    raise ProgramError(f"program {index} of {name}: {report}")
        if late or running:
            waiting = sorted([*late, *running.values()])
            where = "".join(f"\nprogram {index} was here: {report}" for index, report in sorted(late.items())[:1])
            raise TimeoutError(f"programs {waiting} of {name} did not end in {timeout} s{where}")
    finally:
        for process in processes.values():
            process.kill()
        for process in processes.values():
            process.join()
        for receiver in running:
            receiver.close()


def _run(
    program: Callable[[], None], builder: Any, index: tuple[int, ...], deadline: float, sender: Connection
) -> None:
    """One program, in its process, where nothing of torch may run: its threads were not forked.

    Sends whether it ended in time, and its traceback if it did not end well.
    """

    def time_up(number: int, frame: FrameType | None) -> None:
        raise _TimeUp

    original = builder.create_atomic_rmw

    def atomic_rmw(*operands: Any) -> Any:
        """Programs that wait poll with atomics, and there are fewer processors than programs."""
        result = original(*operands)
        os.sched_yield()
        return result

    builder.create_atomic_rmw = atomic_rmw
    builder.set_grid_idx(*index, *(0,) * (3 - len(index)))
    in_time, report = True, ""
    try:
        # Its own alarm, so that it ends even where its parent is no more.
        signal.signal(signal.SIGALRM, time_up)
        signal.setitimer(signal.ITIMER_REAL, max(deadline - time.monotonic(), 1e-3))
        program()
    except BaseException as error:
        in_time, report = not isinstance(error, _TimeUp), traceback.format_exc()
    signal.setitimer(signal.ITIMER_REAL, 0)
    sender.send((in_time, report))
