"""Lets several processes, usually one per host, train together: they connect, exchange values, and fail together."""

import atexit
import contextlib
import dataclasses
import itertools
import json
import os
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from typing import Any, NoReturn

import jax
import numpy as np
from jax._src import distributed  # its key-value store has no public name; Orbax imports it from here too
from jax.experimental import multihost_utils
from tqdm import tqdm

# The key under which a failing process says why, and the barrier at which all processes meet before they exit.
FAILURE, FAREWELL = "flax_transformer/failure", "flax_transformer/farewell"

# In seconds: how often a process checks whether another one has failed, and how long a failing process waits for the
# others to notice.
LOOK_INTERVAL, FAREWELL_TIMEOUT = 0.5, 10


@dataclasses.dataclass(frozen=True)
class Cluster:
    """How the processes of one training find each other.

    Attributes:
        address: host and port of process 0, e.g. "10.0.0.1:8476"; `None` where jax finds it itself (Cloud TPU, Slurm,
            Open MPI, Kubernetes).
        num_processes: the number of processes; `None` if `address` is.
        process_id: the number of this process, from 0; `None` if `address` is.
    """

    address: str | None = None
    num_processes: int | None = None
    process_id: int | None = None

    def connect(self, timeout: int) -> None:
        """Waits for the other processes and connects with them; call it before anything that uses a device.

        If another process does not connect in time, jax ends this one without an exception. So this first prints what
        it waits for.

        Args:
            timeout: seconds to wait.

        Raises:
            ValueError: only some of address, number of processes and process id are given, or jax finds no address.
        """
        given = (self.address, self.num_processes, self.process_id)
        if any(value is not None for value in given) and None in given:
            raise ValueError(
                f"coordinator address {self.address}, num_processes {self.num_processes}, process_id "
                f"{self.process_id}: give all three, or none of them where the cluster provides them"
            )
        if self.address is None:
            print(f"connecting to the other processes of this cluster, for at most {timeout} s", flush=True)
        else:
            print(
                f"connecting as process {self.process_id} of {self.num_processes} to {self.address}, for at most "
                f"{timeout} s",
                flush=True,
            )
        # jax's own handler of SIGTERM would replace ours and miss signals before the first step of a resumed training.
        jax.config.update("jax_enable_preemption_service", False)
        jax.distributed.initialize(self.address, self.num_processes, self.process_id, initialization_timeout=timeout)


def check_connected() -> None:
    """Raises ValueError if jax sees devices of other processes and this process was not connected with them."""
    if jax.process_count() > 1 and not jax.distributed.is_initialized():
        raise ValueError(
            f"this process is one of {jax.process_count()} that share their devices, but it was not connected with the "
            "others: give --distributed to all of them"
        )


def cluster_of_environment(environment: Mapping[str, str] = os.environ) -> Cluster | None:
    """The cluster that the environment variables describe, or `None`.

    JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID describe one explicitly; several hosts in
    TPU_WORKER_HOSTNAMES mean a slice of Cloud TPU.
    """
    if address := environment.get("JAX_COORDINATOR_ADDRESS"):
        num_processes, process_id = (
            _number(name, environment.get(name)) for name in ("JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
        )
        return Cluster(address, num_processes, process_id)
    if "," in environment.get("TPU_WORKER_HOSTNAMES", ""):
        return Cluster()
    return None


def _number(name: str, value: str | None) -> int | None:
    if value is not None and not value.isdecimal():
        raise ValueError(f"{name} is {value!r}: set it to a number")
    return None if value is None else int(value)


def index() -> int:
    """The number of this process, from 0."""
    return jax.process_index()


def count() -> int:
    """The number of processes."""
    return jax.process_count()


def is_first() -> bool:
    """Whether this is process 0, the one that prints and writes files."""
    return index() == 0


def say(line: str) -> None:
    """Prints a line on process 0, and nothing on the others."""
    if is_first():
        print(line, flush=True)


def wait(name: str) -> None:
    """Waits until every process has called this function with the same name."""
    if count() > 1:
        multihost_utils.sync_global_devices(name)


def gather(value: Any) -> list[Any]:
    """Returns the values of all processes in their order; a value is anything that JSON can represent."""
    if count() == 1:
        return [value]
    text = np.frombuffer(json.dumps(value).encode(), np.uint8)
    lengths = multihost_utils.process_allgather(np.int32(len(text)))
    texts = multihost_utils.process_allgather(np.pad(text, (0, max(lengths) - len(text))))
    return [json.loads(text[:length].tobytes()) for text, length in zip(texts, lengths.tolist(), strict=True)]


@contextlib.contextmanager
def ending_together(program: str, *, unless: type[BaseException]) -> Iterator[None]:
    """Inside the `with` block, an error in one process ends all of them; otherwise they would wait in jax for minutes.

    If a process dies without raising an error, jax notices and ends the others: at once if it was process 0, otherwise
    after about 90 seconds.

    Args:
        program: the program's name, for the message of the processes that end because another one failed.
        unless: an exception that all processes raise together and that is not an error.
    """
    client = distributed.global_state.client
    if client is None:
        yield
        return
    ended = threading.Event()
    watch = threading.Thread(target=_watch, args=(client, ended, program), name="other processes", daemon=True)
    watch.start()
    try:
        yield
    except unless:
        raise
    except BaseException as error:
        with contextlib.suppress(Exception):  # another process failed earlier, or process 0 and its store are gone
            reason = " ".join(f"{error}".split()) or type(error).__name__
            client.key_value_set(FAILURE, f"process {distributed.global_state.process_id} failed: {reason}")
        # Registered after jax's exit handler, it runs before that one, which would wait for processes that are gone.
        atexit.register(_leave, client)
        raise
    finally:
        ended.set()
        watch.join()


class Peers:
    """Lets the processes of one training agree, through jax's key-value store, after which step to stop.

    While nobody asks to stop, it costs only an occasional look at the store.
    """

    _made = itertools.count()  # the same on all processes, so that each training has its own keys

    def __init__(self) -> None:
        """Every process must create one for the same training, after connecting."""
        self._client: Any = distributed.global_state.client
        self._name = f"flax_transformer/stop/{next(self._made)}"

    def ask(self) -> None:
        """Asks all processes to stop."""
        with contextlib.suppress(Exception):  # another process has already asked
            self._client.key_value_set(f"{self._name}/asked", "")

    def asked(self) -> bool:
        """Whether a process has asked all to stop."""
        try:
            self._client.key_value_try_get(f"{self._name}/asked")
            return True
        except Exception:  # how jax reports that the key does not exist
            return False

    def post(self, position: int) -> None:
        """Tells the others which step this process has reached; only the first call counts."""
        with contextlib.suppress(Exception):  # it was posted before
            self._client.key_value_set(f"{self._name}/{distributed.global_state.process_id}", str(position))

    def positions(self, ended: threading.Event) -> list[int] | None:
        """The steps that all processes have posted; `None` if `ended` is set before all have done so."""
        found: list[int] = []
        while len(found) < distributed.global_state.num_processes and not ended.is_set():
            # Wait for a process that does not answer: if it is gone, jax ends this one.
            with contextlib.suppress(Exception):
                value = self._client.blocking_key_value_get(f"{self._name}/{len(found)}", int(1000 * LOOK_INTERVAL))
                found.append(int(value))
        return found if len(found) == distributed.global_state.num_processes else None

    def leave(self, status: int) -> NoReturn:
        """Exits as soon as all processes have called this, or after a while."""
        _leave(self._client, status, f"{self._name}/left")


def _watch(client: Any, ended: threading.Event, program: str) -> None:
    """Ends this process when another one has failed, even while the main thread is waiting."""
    while not ended.wait(LOOK_INTERVAL):
        try:
            failure = client.key_value_try_get(FAILURE)
        except Exception:  # no process has failed
            continue
        # The process exits inside, so tqdm clears the progress bar for this line and does not draw it again.
        with tqdm.external_write_mode(file=sys.stderr):
            with contextlib.suppress(OSError):  # the terminal is gone
                print(f"{program}: {failure}; this process ends with it", file=sys.stderr)
            _leave(client)


def _leave(client: Any, status: int = 1, farewell: str = FAREWELL) -> NoReturn:
    """Exits without jax's exit handlers once all processes know why; process 0, which has the store, exits last."""
    with contextlib.suppress(Exception):  # do not wait any longer for a process that does not come
        client.wait_at_barrier(farewell, FAREWELL_TIMEOUT * 1000)
    if distributed.global_state.process_id == 0:
        time.sleep(LOOK_INTERVAL)
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):  # the terminal is gone
            stream.flush()
    os._exit(status)
