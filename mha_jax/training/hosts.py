"""One run over several processes, on one host or many: which of them am I, and what they decide together.

JAX is imported only where it is needed: drivers and stores ask who they are without paying for it.
"""

import dataclasses
import functools
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

from etils import epath

from mha_jax.specs import UserError
from mha_jax.training.watchdog import Watchdog

_VARIABLE = "MHA_JAX_GROUP"
_STOPPED = 75  # the scripts' exit code
_LONGEST_LINE = 2000  # bytes
_GRACE_SECONDS = 300.0  # to meet the others in, where the watchdog is off


@dataclasses.dataclass(frozen=True)
class Group:
    """The processes of one run. With `coordinator` None the cluster tells who they are (TPU pods, Slurm, Open MPI).

    `coordinator` is HOST:PORT of process 0. `watchdog_seconds`: how long a step may take; 0 for ever.

    Raises: UserError for an address without a port, and for a process_id that is not one of num_processes.
    """

    num_processes: int = 1
    process_id: int = 0
    coordinator: str | None = None
    watchdog_seconds: float = 600.0

    def __post_init__(self) -> None:
        if not 0 <= self.process_id < self.num_processes:
            raise UserError(
                f"--process_id={self.process_id} is none of {self.num_processes} processes; they are 0 to "
                f"{self.num_processes - 1}"
            )
        if self.watchdog_seconds < 0:
            raise UserError(f"--watchdog_seconds={self.watchdog_seconds} must be positive, or 0 for no watchdog")
        if self.coordinator is not None:
            _, colon, port = self.coordinator.rpartition(":")
            if not colon or not port.isdecimal() or not 0 < int(port) < 2**16:
                raise UserError(f"--coordinator={self.coordinator!r} must be HOST:PORT, the address of process 0")

    def environment(self) -> dict[str, str]:
        """What a child process finds its place by."""
        return {_VARIABLE: json.dumps(dataclasses.asdict(self))} if self.num_processes > 1 else {}

    def at(self, offset: int) -> "Group":
        """The same processes with another port: what is left of one run cannot meet the next one there."""
        if self.coordinator is None:
            return self
        host, _, port = self.coordinator.rpartition(":")
        return dataclasses.replace(self, coordinator=f"{host}:{int(port) + offset}")


_group = Group()
_watchdog: Watchdog | None = None


def enrol(group: Group) -> None:
    """Says which of the processes this one is; nothing is started."""
    global _group
    _group = group


def group() -> Group:
    return _group


def inherited(environment: Mapping[str, str] = os.environ) -> Group:
    """The place that a driver has given this process; alone where it has given none."""
    text = environment.get(_VARIABLE)
    return Group(**json.loads(text)) if text else Group()


def several() -> bool:
    return _group.num_processes > 1


def first() -> bool:
    """Whether this is the process that writes what is written once: status, metrics, tables. True for one alone."""
    return _group.process_id == 0


def named(file: str) -> str:
    """What this process calls a file of which each process has its own: log.txt, and log-1.txt of process 1."""
    stem, dot, ending = file.rpartition(".")
    return file if first() else f"{stem}-{_group.process_id}{dot}{ending}"


def join(directory: epath.Path, record: Callable[[str, int], None], should_stop: Callable[[], bool]) -> None:
    """Meets the other processes of a run, and watches them from now on. Comes before anything that touches a device.

    Where they do not come, or `should_stop` says so, this process ends here.

    Args: directory: of the run: heartbeats/ and stacks-<process>.txt are written there.
          record:    told, in one line, why this process is ended, and with which code, when another fails or does not
                     answer.
    """
    global _watchdog
    if not several():
        return
    limit = _group.watchdog_seconds
    _watchdog = Watchdog(directory, _group.process_id, _group.num_processes, limit, record)
    meet(record, should_stop)
    _watchdog.start()


def meet(record: Callable[[str, int], None] | None = None, should_stop: Callable[[], bool] | None = None) -> None:
    """`join` without the watchdog, for a process that only wants to see the devices of all."""
    import jax

    patience = _group.watchdog_seconds or _GRACE_SECONDS
    met = threading.Event()

    def wait() -> None:  # JAX itself would end the process, late and with a stack of its own
        deadline = time.monotonic() + patience
        while not met.wait(0.1):
            if should_stop and should_stop():
                os._exit(_STOPPED)
            if time.monotonic() > deadline:
                where = _group.coordinator or "the address that the cluster tells"
                line = f"not all {_group.num_processes} processes have met at {where} within {patience:g} s"
                if record:
                    record(line, 1)
                print(f"error: {line}", file=sys.stderr, flush=True)
                os._exit(1)

    threading.Thread(target=wait, daemon=True).start()
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.config.update("jax_enable_preemption_service", False)  # it takes SIGTERM away from us
    explicit = _group.coordinator is not None
    jax.distributed.initialize(
        _group.coordinator,
        _group.num_processes if explicit else None,
        _group.process_id if explicit else None,
        initialization_timeout=int(patience) + 60,
        heartbeat_timeout_seconds=int(2 * patience) + 60,  # the watchdog says more, and comes first
    )
    met.set()


def leave() -> None:
    """Waits until every process has done its work."""
    if not several():
        return
    import jax

    beat("done")
    jax.distributed.shutdown()
    if _watchdog is not None:
        _watchdog.stop()


def beat(doing: str | None = None) -> None:
    """A sign of progress for the watchdog, and what comes next, such as "step 37"."""
    if _watchdog is not None:
        _watchdog.beat(doing)


def fail(error: BaseException, line: str, code: int) -> None:
    """Where there are several processes, ends them all, this one now, and does not return; else does nothing.

    Args: line: what is told about the error, unless it only echoes the end of another process.
          code: with which all of them exit.
    """
    if _watchdog is not None:
        _watchdog.fail(line, code, echo=_is_echo(error))


def _is_echo(error: BaseException) -> bool:
    """Whether an error may come from another process's end: a collective that has lost its other side."""
    import jax

    return isinstance(error, jax.errors.JaxRuntimeError) or "Gloo" in str(error)


def barrier(name: str) -> None:
    """Returns when every process has come here."""
    if several():
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(name)


def from_first(value: int) -> int:
    """Process 0's value, on every process; what the others give is not looked at."""
    if not several():
        return value
    import numpy as np
    from jax.experimental import multihost_utils

    return int(multihost_utils.broadcast_one_to_all(np.int32(value)))


def line_from_first(mine: str) -> str:
    """Process 0's line, on every process; what the others give is not looked at."""
    import numpy as np
    from jax.experimental import multihost_utils

    text = np.zeros(_LONGEST_LINE, np.uint8)
    told = mine.encode()[:_LONGEST_LINE]
    text[: len(told)] = list(told)
    return np.asarray(multihost_utils.broadcast_one_to_all(text)).tobytes().rstrip(b"\0").decode(errors="ignore")


def on_host(tree: Any) -> Any:
    """Arrays that are spread over processes, whole on each; one process alone gets its arrays back as they are."""
    if not several():
        return tree
    from jax.experimental import multihost_utils

    return multihost_utils.process_allgather(tree, tiled=True)


class AgreedStop:
    """`should_stop` of all processes: true on all in the same call, once any has been asked to.

    The answer is that of the call before, so that asking never waits for the step on the devices.
    """

    def __init__(self, should_stop: Callable[[], bool]):
        self._should_stop = should_stop
        self._asked: Any = None

    def __call__(self) -> bool:
        if not several():
            return self._should_stop()
        before, self._asked = self._asked, settled(_any_of(self._should_stop()))
        return before is not None and bool(before)


def _any_of(mine: bool) -> Any:
    import jax
    import numpy as np
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    mesh = Mesh(np.asarray(jax.devices(), dtype=object), ("process",))
    split, whole = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in (("process",), ()))
    return _any(whole)(jax.make_array_from_callback((mesh.size,), split, lambda _: np.asarray([mine])))


@functools.cache
def _any(whole: Any) -> Any:
    import jax

    return jax.jit(lambda flags: flags.any(), out_shardings=whole)


def settled(tree: Any) -> Any:
    """The arrays, waited for where collectives must not overlap.

    With several CPU devices a process they hang (jax 0.10): each device may enter another one first.
    """
    if not several():
        return tree
    import jax

    overlaps = jax.default_backend() == "cpu" and jax.local_device_count() > 1
    return jax.block_until_ready(tree) if overlaps else tree
