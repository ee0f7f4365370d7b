"""Takes several processes, one a host, and lets them train as one: they connect, agree, and one speaks for all."""

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
from jax._src import distributed  # its store of keys and values has no public name; Orbax takes it from here too
from jax.experimental import multihost_utils
from tqdm import tqdm

# Where a process that fails leaves word for the others, and where all of them meet before they end.
FAILURE, FAREWELL = "flax_transformer/failure", "flax_transformer/farewell"

# In seconds: how often a process looks whether another one failed, and how long one that has failed stays until all
# others have looked.
LOOK_INTERVAL, FAREWELL_TIMEOUT = 0.5, 10


@dataclasses.dataclass(frozen=True)
class Cluster:
    """How the processes of one training find each other.

    Attributes:
        address: host and port of process 0, e.g. "10.0.0.1:8476"; `None` where the cluster itself tells (Cloud TPU,
            Slurm, Open MPI, Kubernetes).
        num_processes: how many there are; `None` as above.
        process_id: this one's number, from 0; `None` as above.
    """

    address: str | None = None
    num_processes: int | None = None
    process_id: int | None = None

    def connect(self, timeout: int) -> None:
        """Waits for the other processes; must come before anything else that uses a device.

        A process that does not come ends this one inside jax, without an exception: what is awaited is printed first.

        Args:
            timeout: seconds to wait.

        Raises:
            ValueError: an address is there without the two numbers that belong to it, or nothing tells one.
        """
        given = (self.address, self.num_processes, self.process_id)
        if any(value is not None for value in given) and None in given:
            raise ValueError(
                f"coordinator address {self.address}, num_processes {self.num_processes}, process_id "
                f"{self.process_id}: give all three, or none where the cluster tells them"
            )
        if self.address is None:
            print(f"connecting to the other processes of this cluster, for at most {timeout} s", flush=True)
        else:
            print(
                f"connecting as process {self.process_id} of {self.num_processes} to {self.address}, for at most "
                f"{timeout} s",
                flush=True,
            )
        # It takes SIGTERM for itself, and forgets one that comes before the first step of a resumed training.
        jax.config.update("jax_enable_preemption_service", False)
        jax.distributed.initialize(self.address, self.num_processes, self.process_id, initialization_timeout=timeout)


def check_connected() -> None:
    """Raises ValueError where jax sees devices of other processes, and nobody has connected this one with them."""
    if jax.process_count() > 1 and not jax.distributed.is_initialized():
        raise ValueError(
            f"this process is one of {jax.process_count()} that share their devices, and was not connected with the "
            "others: give --distributed to all of them"
        )


def cluster_of_environment(environment: Mapping[str, str] = os.environ) -> Cluster | None:
    """The cluster that environment variables name, `None` where they name none.

    JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID name one; several hosts in TPU_WORKER_HOSTNAMES are a
    slice of Cloud TPU.
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
    """This process's number, from 0."""
    return jax.process_index()


def count() -> int:
    """The number of processes."""
    return jax.process_count()


def is_first() -> bool:
    """Whether this is the process that prints and writes."""
    return index() == 0


def say(line: str = "") -> None:
    """Prints a line, on the first process only."""
    if is_first():
        print(line, flush=True)


def wait(name: str) -> None:
    """Waits until every process has come here."""
    if count() > 1:
        multihost_utils.sync_global_devices(name)


def gather(value: Any) -> list[Any]:
    """The values of all processes, in their order; anything that JSON holds."""
    if count() == 1:
        return [value]
    text = np.frombuffer(json.dumps(value).encode(), np.uint8)
    lengths = multihost_utils.process_allgather(np.int32(len(text)))
    texts = multihost_utils.process_allgather(np.pad(text, (0, max(lengths) - len(text))))
    return [json.loads(text[:length].tobytes()) for text, length in zip(texts, lengths.tolist(), strict=True)]


@contextlib.contextmanager
def ending_together(program: str, *, unless: type[BaseException]) -> Iterator[None]:
    """Inside, an error of one process ends the others too, which would wait for it in jax for minutes.

    A process that dies without an error is noticed by jax, which then ends the others: process 0's death at once,
    another's after some 90 seconds.

    Args:
        program: is named to the user where another process failed.
        unless: an exception that all processes raise together, and that is none of their errors.
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
        with contextlib.suppress(Exception):  # another one failed before, or the store is gone with process 0
            reason = " ".join(f"{error}".split()) or type(error).__name__
            client.key_value_set(FAILURE, f"process {distributed.global_state.process_id} failed: {reason}")
        # Registered after jax's own, it runs before: jax would wait there for processes that are gone.
        atexit.register(_leave, client)
        raise
    finally:
        ended.set()
        watch.join()


class Peers:
    """The processes of one training, which agree through jax's store of keys and values where to stop.

    Costs nothing while nobody asks to stop, but for a look at the store now and then.
    """

    _made = itertools.count()  # the same on all processes: each training agrees under a name of its own

    def __init__(self) -> None:
        """All processes must make theirs for the same training, after they have connected."""
        self._client: Any = distributed.global_state.client
        self._name = f"flax_transformer/stop/{next(self._made)}"

    def ask(self) -> None:
        """Asks all of them to stop."""
        with contextlib.suppress(Exception):  # another one has asked before
            self._client.key_value_set(f"{self._name}/asked", "")

    def asked(self) -> bool:
        """Whether one of them has asked all to stop."""
        try:
            self._client.key_value_try_get(f"{self._name}/asked")
            return True
        except Exception:  # jax's way to say that there is no such key
            return False

    def post(self, position: int) -> None:
        """Tells the others where this one stands; only the first call counts."""
        with contextlib.suppress(Exception):  # it was told before
            self._client.key_value_set(f"{self._name}/{distributed.global_state.process_id}", str(position))

    def positions(self, ended: threading.Event) -> list[int] | None:
        """Where all of them stood when they posted; `None` if `ended` is set before all have."""
        found: list[int] = []
        while len(found) < distributed.global_state.num_processes and not ended.is_set():
            # One that does not answer is waited for: if it is gone, jax ends this process.
            with contextlib.suppress(Exception):
                value = self._client.blocking_key_value_get(f"{self._name}/{len(found)}", int(1000 * LOOK_INTERVAL))
                found.append(int(value))
        return found if len(found) == distributed.global_state.num_processes else None

    def leave(self, status: int) -> NoReturn:
        """Ends this process as soon as all of them come here, or after a while."""
        _leave(self._client, status, f"{self._name}/left")


def _watch(client: Any, ended: threading.Event, program: str) -> None:
    """Ends this process when another one has failed, whatever it waits for."""
    while not ended.wait(LOOK_INTERVAL):
        try:
            failure = client.key_value_try_get(FAILURE)
        except Exception:  # nobody has failed
            continue
        # The process ends inside: the progress bar, which gave way to the line, is not drawn again.
        with tqdm.external_write_mode(file=sys.stderr):
            with contextlib.suppress(OSError):  # the terminal is gone
                print(f"{program}: {failure}; this process ends with it", file=sys.stderr)
            _leave(client)


def _leave(client: Any, status: int = 1, farewell: str = FAREWELL) -> NoReturn:
    """Ends this process without jax's own way out, once all know why; process 0 goes last, since the store is its."""
    with contextlib.suppress(Exception):  # one that knows nothing of it is waited for no longer
        client.wait_at_barrier(farewell, FAREWELL_TIMEOUT * 1000)
    if distributed.global_state.process_id == 0:
        time.sleep(LOOK_INTERVAL)
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):  # the terminal is gone
            stream.flush()
    os._exit(status)
