"""Times the HTTP service beside the translator itself, on the same sentences, in one run.

    python benchmarks/serve.py --workdir=runs/quickstart --input=sentences.kn

starts the server on a free port of this machine, and measures in turn
1. `Translator.translate` of all sentences in this process, and of one sentence at a time;
2. clients (1, 8 and 64) that send one sentence each, the next one when the answer is there;
3. 8 such clients alone, and beside a request of 5,000 sentences.
`--soak=MINUTES` keeps 64 clients busy so long, and tells the server's memory every half minute.
"""

import argparse
import asyncio
import itertools
import json
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np

from flax_transformer.decoding.settings import BeamSearch
from flax_transformer.decoding.translator import Translator

CLIENTS = (1, 8, 64)
SMALL_CLIENTS = 8
BIG_REQUEST = 5000
REPORT_S = 30.0


def session() -> aiohttp.ClientSession:
    """A client with a connection of its own. aiohttp takes little time, which the server's cores lack otherwise."""
    return aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=3600))


class Load:
    """Clients of a server that send sentences in turn, and how long each of them waited.

    Attributes:
        latencies: seconds of each answer.
        errors: what was not answered with status 200, and how often.
    """

    def __init__(self, address: str, pair: tuple[str, str], sentences: Sequence[str]):
        """Takes the server's address, the languages, and the sentences."""
        self._address, (self._source, self._target), self._sentences = address, pair, sentences
        self.latencies: list[float] = []
        self.errors: dict[str, int] = {}

    async def translate(self, client: aiohttp.ClientSession, text: str) -> None:
        """Sends a text and waits for the answer."""
        started = time.perf_counter()
        fields = {"q": text, "source": self._source, "target": self._target}
        try:
            async with client.post(f"{self._address}/translate", json=fields) as answer:
                found = await answer.text()
            error = "" if answer.status == 200 else f"{answer.status} {found[:80]}"
        except (aiohttp.ClientError, TimeoutError) as failure:
            error = type(failure).__name__
        if error:
            self.errors[error] = self.errors.get(error, 0) + 1
        else:
            self.latencies.append(time.perf_counter() - started)

    async def run(self, clients: int, requests: Iterator[str]) -> float:
        """Lets clients send these texts in turn; returns how many sentences a second they got."""
        self.latencies, self.errors = [], {}
        started = time.perf_counter()

        async def work() -> None:
            async with session() as client:
                for text in requests:
                    await self.translate(client, text)

        await asyncio.gather(*(work() for _ in range(clients)))
        return len(self.latencies) / (time.perf_counter() - started)

    def report(self, name: str, rate: float, **more: Any) -> dict[str, Any]:
        """What was found: sentences a second, and how many milliseconds half, 95 % and 99 % waited at most."""
        waited = np.percentile(self.latencies, [50, 95, 99]) * 1000 if self.latencies else [np.nan] * 3
        found = {"name": name, "sentences_a_second": round(rate, 1), "answers": len(self.latencies)}
        found |= dict(zip(("p50_ms", "p95_ms", "p99_ms"), np.round(waited, 1).tolist(), strict=True))
        return found | more | ({"errors": self.errors} if self.errors else {})


def direct(translator: Translator, search: BeamSearch, sentences: Sequence[str], alone: int) -> list[dict[str, Any]]:
    """Times the translator itself: all sentences at once, and some one by one. The first calls compile."""
    translator.translate(sentences, search)
    for sentence in sentences[:alone]:
        translator.translate([sentence], search)
    started = time.perf_counter()
    translator.translate(sentences, search)
    rate = len(sentences) / (time.perf_counter() - started)
    waited = []
    for sentence in sentences[:alone]:
        started = time.perf_counter()
        translator.translate([sentence], search)
        waited.append(time.perf_counter() - started)
    p50, p95 = np.percentile(waited, [50, 95]) * 1000
    return [
        {"name": "translate", "sentences_a_second": round(rate, 1)},
        {"name": "translate one by one", "p50_ms": round(p50, 1), "p95_ms": round(p95, 1)},
    ]


def memory_mb(process: int) -> float:
    """The memory of a process that lies in the machine's memory now, in MB."""
    status = Path(f"/proc/{process}/status").read_text()
    return int(re.search(r"VmRSS:\s+(\d+) kB", status)[1]) / 1024


async def measure(load: Load, process: int, sentences: Sequence[str], options: argparse.Namespace) -> None:
    """Does what the beginning of this file says."""
    for clients in CLIENTS:
        count = min(len(sentences), options.requests * clients)
        requests = itertools.islice(itertools.cycle(sentences), count)
        await load.run(clients, itertools.islice(itertools.cycle(sentences), clients))  # connections, first programs
        show(load.report(f"{clients} clients", await load.run(clients, requests)))
    count = options.requests * SMALL_CLIENTS
    small = itertools.islice(itertools.cycle(sentences), count)
    show(load.report("8 clients alone", await load.run(SMALL_CLIENTS, small)))
    big = Load(load._address, (load._source, load._target), sentences)
    text = "\n".join(itertools.islice(itertools.cycle(sentences), options.big))
    async with session() as client:
        started = time.perf_counter()
        task = asyncio.create_task(big.translate(client, text))
        await asyncio.sleep(1.0)  # it fills the slots
        beside: list[float] = []
        while not task.done() and len(beside) < count:
            await load.run(SMALL_CLIENTS, itertools.islice(itertools.cycle(sentences), SMALL_CLIENTS * 4))
            if not task.done():
                beside += load.latencies
        load.latencies = beside
        show(load.report(f"8 clients beside {options.big}", 0.0))
        await task
        seconds = time.perf_counter() - started
        show({"name": f"the request of {options.big}", "seconds": round(seconds, 1), "errors": big.errors})
    if options.soak:
        end, first = time.monotonic() + 60 * options.soak, None
        while time.monotonic() < end:
            until = time.monotonic() + REPORT_S
            requests = itertools.takewhile(lambda _, until=until: time.monotonic() < until, itertools.cycle(sentences))
            rate = await load.run(CLIENTS[-1], requests)
            memory = memory_mb(process)
            first = first or memory
            show(load.report("soak", rate, memory_mb=round(memory), growth=round(memory / first - 1, 4)))


def show(found: dict[str, Any]) -> None:
    """Prints what was found as a line of JSON."""
    print(json.dumps(found), flush=True)


def main() -> None:
    """Starts the server, measures, and ends it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", required=True)
    parser.add_argument("--input", required=True, help="sentences of the source language, one in each line")
    parser.add_argument("--pair", default="xx-yy", help="what to call the languages (default xx-yy)")
    parser.add_argument("--batch_tokens", type=int, default=1024)
    parser.add_argument("--beam_size", type=int, default=4)
    parser.add_argument("--requests", type=int, default=100, help="requests of each client (default 100)")
    parser.add_argument("--big", type=int, default=BIG_REQUEST, help="sentences of the big request (default 5000)")
    parser.add_argument("--soak", type=float, default=0.0, metavar="MINUTES")
    options = parser.parse_args()
    sentences = [line for line in Path(options.input).read_text(encoding="utf-8").splitlines() if line.strip()]
    source, target = options.pair.split("-")
    search = BeamSearch(beam_size=options.beam_size)
    translator = Translator.from_workdir(options.workdir, batch_tokens=options.batch_tokens)
    for found in direct(translator, search, sentences, options.requests):
        show(found)
    translator.close()
    command = [sys.executable, "-m", "flax_transformer", "serve", f"--model={options.pair}={options.workdir}"]
    command += ["--port=0", "--compile_all", f"--batch_tokens={options.batch_tokens}"]
    command += [f"--beam_size={options.beam_size}", "--deadline_s=3600"]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        started = time.perf_counter()
        address = next(found[1] for line in server.stdout or () if (found := re.match(r"ready: (\S+)", line)))
        show({"name": "ready", "seconds": round(time.perf_counter() - started, 1)})
        asyncio.run(measure(Load(address, (source, target), sentences), server.pid, sentences, options))
    finally:
        server.terminate()
        server.wait(60)


if __name__ == "__main__":
    main()
