"""Takes several processes, one a host, and lets them train as one: they connect, agree, and one speaks for all."""

import dataclasses
import json
import os
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils


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
        jax.distributed.initialize(self.address, self.num_processes, self.process_id, initialization_timeout=timeout)


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
