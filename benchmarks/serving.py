"""Parts of bench_serve: servers in processes of their own, clients in another, and work of token ids."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import itertools
import json
import multiprocessing
import random
import socket
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

import numpy as np
import torch

from batches import VOCABULARY
from radix_ops.serve._command import listener_at

context = multiprocessing.get_context("spawn")
LONGEST = 600  # seconds that a process may take to start, or to stop


class Options(NamedTuple):
    """How a model is made and run, the same in every process."""

    shape: str  # of bench_qwen3, or the model's name
    task: str  # embed or score
    device: str
    dtype: str
    layers: int | None
    threads: int
    token_budget: int | None


class Request(NamedTuple):
    """A request of a route, with how many inputs it holds."""

    path: str
    body: bytes
    count: int


def make_engine(options: Options, plain: bool) -> Any:
    """Return an engine of random weights at a real shape, or of a model by name."""
    import bench_qwen3
    from radix_ops.engine import Embedder, Scorer
    from radix_ops.models.qwen3 import Qwen3ForCausalLM

    torch.set_num_threads(options.threads)
    given = {"plain": plain, "token_budget": options.token_budget}
    kind: Any = {"embed": Embedder, "score": Scorer}[options.task]
    if options.shape not in bench_qwen3.SHAPES:
        return kind(options.shape, device=options.device, dtype=options.dtype, **given)
    dtype = getattr(torch, options.dtype)
    model: Any = bench_qwen3.make_model(options.shape, options.device, dtype, options.layers)
    if options.task == "score":
        with torch.device("meta"):
            whole = Qwen3ForCausalLM(bench_qwen3.config_of(options.shape, options.layers)).to(dtype)
        whole.model = model
        whole.lm_head.to_empty(device=options.device)
        with torch.no_grad():
            whole.lm_head.weight.normal_(std=0.02)
        model = whole.eval()
    return kind(model, _tokenizer(), **given)


def _tokenizer() -> Any:
    """Return a tokenizer, which an engine asks for and ids don't need."""
    import transformers
    from tokenizers import Tokenizer, models

    words = {"<e>": 0, "yes": 1, "no": 2}
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="<e>")), eos_token="<e>", model_max_length=40960
    )


def serve(options: Options, plain: bool, listener: socket.socket, pipe: Connection) -> None:
    """Serve until SIGTERM, as `radix-ops serve` does; say "ready" on the pipe."""
    from radix_ops.serve import BatchLimits, QueueLimits, Settings, create_app
    from radix_ops.serve._command import Uvicorn

    settings = Settings(names=("bench",), max_body=2**28, max_inputs=4096, request_timeout=300.0)
    app = create_app(make_engine(options, plain), settings, queue=QueueLimits(), batch=BatchLimits())
    app.state.server.start()
    app.state.server.batcher.wait_until_ready()
    pipe.send("ready")
    Uvicorn(app, settings).run(sockets=[listener])


def compute(options: Options, plain: bool, sequences: list[list[int]], pipe: Connection) -> None:
    """Compute all sequences offline whenever the pipe says so, and send back the seconds; None ends it."""
    engine = make_engine(options, plain)

    def run(chosen: list[list[int]]) -> None:
        if options.task == "embed":
            engine.embed([{"input_ids": ids} for ids in chosen])
        else:
            engine.score([{"context_ids": ids[:-1], "choices_ids": [ids[-1:]]} for ids in chosen])

    run(sequences[:8])
    pipe.send("ready")
    while (command := pipe.recv()) is not None:
        chosen = sequences if command == "all" else [sequences[command]]
        started = time.perf_counter()
        run(chosen)
        pipe.send(time.perf_counter() - started)


class Child:
    """A process of its own that says when it is ready."""

    def __init__(self, target: Callable, *arguments: Any):
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=target, args=(*arguments, theirs), daemon=True)
        self.process.start()
        assert self.pipe.poll(LONGEST), f"{target.__name__} is not ready"
        assert self.pipe.recv() == "ready"

    def ask(self, command: Any) -> float:
        self.pipe.send(command)
        return self.pipe.recv()

    def wait(self) -> int | None:
        """Wait for the end of the process and return its exit status."""
        self.process.join(LONGEST)
        return self.process.exitcode

    def stop(self) -> int | None:
        """Send SIGTERM, unless the process has ended, and return the exit status."""
        self.process.terminate()
        return self.wait()


class Server(Child):
    def __init__(self, options: Options, plain: bool):
        listener = listener_at("127.0.0.1", 0)
        self.port = listener.getsockname()[1]
        super().__init__(serve, options, plain, listener)
        listener.close()


class Answer(NamedTuple):
    """How a request went, in seconds; status 0 where the connection broke, -1 where it could not be made."""

    status: int
    latency: float
    computed: float
    count: int


class _Connection:
    """A connection that stays open, with no more of HTTP than this needs."""

    def __init__(self, port: int):
        self._port, self._streams = port, None

    async def ask(self, request: Request) -> Answer:
        started, sent = time.perf_counter(), False
        try:
            if self._streams is None:
                self._streams = await asyncio.open_connection("127.0.0.1", self._port, limit=2**20)
            reader, writer = self._streams
            head = f"POST {request.path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: "
            writer.write(head.encode() + str(len(request.body)).encode() + b"\r\n\r\n" + request.body)
            await writer.drain()
            sent = True
            lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
            headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines[1:])}
            await reader.readexactly(int(headers["content-length"]))
            if headers.get("connection", "").lower() == "close":
                self.close()
            status = int(lines[0].split()[1])
            computed = float(headers.get("x-inference-time", "nan")) / 1000
            return Answer(status, time.perf_counter() - started, computed, request.count)
        except (OSError, asyncio.IncompleteReadError):
            self.close()
            return Answer(0 if sent else -1, time.perf_counter() - started, float("nan"), request.count)

    def close(self) -> None:
        if self._streams is not None:
            self._streams[1].close()
        self._streams = None


async def _closed(port: int, requests: list[Request], clients: int) -> tuple[float, list[Answer]]:
    """Let clients ask one request after another until all are answered; return the seconds of all."""
    waiting, answers = iter(requests), list[Answer]()

    async def client() -> None:
        connection = _Connection(port)
        for request in waiting:
            answers.append(await connection.ask(request))
        connection.close()

    started = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(clients)))
    return time.perf_counter() - started, answers


async def _open(
    port: int, requests: list[Request], rate: float, seconds: float, seed: int
) -> tuple[float, list[Answer]]:
    """Send requests as they arrive, so many a second on average and independently of each other, and await all."""
    chosen, free, answers, tasks = random.Random(seed), list[_Connection](), list[Answer](), set[asyncio.Task]()

    async def send(request: Request) -> None:
        connection = free.pop() if free else _Connection(port)
        answers.append(await connection.ask(request))
        free.append(connection)

    started, due, number = time.perf_counter(), 0.0, 0
    while (due := due + chosen.expovariate(rate)) < seconds:
        await asyncio.sleep(max(0.0, started + due - time.perf_counter()))
        task = asyncio.ensure_future(send(requests[number % len(requests)]))
        tasks.add(task)
        task.add_done_callback(tasks.discard)
        number += 1
    await asyncio.gather(*tasks)
    elapsed = time.perf_counter() - started
    for connection in free:
        connection.close()
    return elapsed, answers


def _client(pipe: Connection) -> None:
    """Run the loads that the pipe asks for."""
    pipe.send("ready")
    while (command := pipe.recv()) is not None:
        kind, *arguments = command
        pipe.send(asyncio.run((_closed if kind == "closed" else _open)(*arguments)))


class Clients(Child):
    """The process of all clients."""

    def __init__(self) -> None:
        super().__init__(_client)

    def closed(self, port: int, requests: list[Request], clients: int) -> tuple[float, list[Answer]]:
        self.pipe.send(("closed", port, requests, clients))
        return self.pipe.recv()

    @contextlib.contextmanager
    def opened(self, port: int, requests: list[Request], rate: float, seconds: float, seed: int = 0) -> Iterator[Any]:
        """Start a load; what is yielded returns its (seconds, answers) when it has ended."""
        self.pipe.send(("open", port, requests, rate, seconds, seed))
        yield self.pipe.recv


def quantile(answers: list[Answer], share: float) -> float:
    """Return the latency that so great a share of the answers of status 200 stays below."""
    found = [answer.latency for answer in answers if answer.status == 200]
    return float(np.quantile(found, share)) if found else float("nan")


def real_prompts(path: Any, workload: str, most: int, repeats: int) -> list[list[list[int]]]:
    """Return the first groups of a workload of --data, each a list of prompts, so many times over.

    Each time over has other ids, so that prompts share what they shared before and nothing with other times.
    """
    with np.load(path) as data:
        ids, ends, groups = (data[f"{workload}.{part}"] for part in ("ids", "cu", "group"))
    prompts = [ids[start:end].astype(np.int64) for start, end in itertools.pairwise(ends.tolist())]
    starts = [0, *(np.flatnonzero(np.diff(groups)) + 1).tolist(), len(prompts)]
    return [
        [((prompt + 7919 * time_) % VOCABULARY).tolist() for prompt in prompts[start:end]]
        for time_ in range(repeats)
        for start, end in itertools.islice(itertools.pairwise(starts), most)
    ]


def made_prompts(groups: int, count: int, shared: int, own: int, across: bool = False) -> list[list[list[int]]]:
    """Make groups of prompts that share `shared` tokens and have `own` more each; with `across` all groups share."""
    draw = functools.partial(np.random.default_rng(0).integers, 0, VOCABULARY)
    first = draw(shared).tolist()
    found = []
    for _ in range(groups):
        start = first if across else draw(shared).tolist()
        found.append([start + draw(own).tolist() for _ in range(count)])
    return found


def embeddings(prompts: list[list[int]]) -> Request:
    body = {"input": prompts, "encoding_format": "base64"}
    return Request("/v1/embeddings", json.dumps(body).encode(), len(prompts))


def scores(prompts: list[list[int]], shared: int) -> Request:
    """Return a request of two labels' probabilities behind the prompts, which share their first tokens."""
    query, items = prompts[0][:shared], [prompt[shared:] for prompt in prompts]
    body = {"query": query, "items": items, "label_token_ids": [9693, 2152], "apply_softmax": True}
    return Request("/v1/score", json.dumps(body).encode(), len(prompts))
