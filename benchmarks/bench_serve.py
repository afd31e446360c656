"""`radix-ops serve` over HTTP on token ids: folded against --plain and against the engine offline.

Servers, clients and offline engines are processes of their own, with the same random weights at a real shape (--shape),
or a model by name. Prompts are those of --data, or made ones: 8 documents of 64 tokens behind a query of 160. Each time
over (--repeats) they have other ids, so nothing is shared between times.

closed    16 clients, each asking for 64 prompts at a time: prompts a second, folded, plain and offline, by turns
idle      one prompt at a time: the latency beyond the engine's own time
open      requests of 8 prompts arrive independently, at shares of the closed loop's rate: latencies
rerank    requests of 10 items of 300 tokens, 120 of them shared in a request (or by all), scored by two labels'
          tokens: the most items a second whose p99 is within 500 ms, and the share of the offline engine's
overload  ten times the closed loop's rate, then SIGTERM: memory, statuses, and requests that were lost
"""

from __future__ import annotations

import os
import time
from pathlib import Path

import harness
import serving
from bench_qwen3 import SHAPES
from serving import Child, Clients, Options, Server, quantile

MODES = ("closed", "idle", "open", "rerank", "overload")
RATES = (0.3, 0.5, 0.7, 0.9, 1.1)  # of the closed loop's
WITHIN = 0.5  # seconds, of which the rerank case's p99 may be


def main() -> None:
    parser = harness.make_parser(__doc__, threads=2, rounds=3, devices=harness.DEVICES)
    parser.add_argument("--shape", default="0.6B", help=f"{', '.join(SHAPES)}, or a model's name (default: 0.6B)")
    parser.add_argument("--layers", type=int, help="the model's first layers alone")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=["closed", "idle", "open"])
    parser.add_argument("--data", type=Path, help="a .npz of real prompts, as tools/make_prompts.py makes it")
    parser.add_argument("--workload", default="msmarco_rerank_top8", help="of --data (default: msmarco_rerank_top8)")
    parser.add_argument("--groups", type=int, default=64, help="of prompts, such as queries, at most (default: 64)")
    parser.add_argument("--repeats", type=int, default=4, help="how often the prompts come (default: 4)")
    parser.add_argument("--clients", type=int, default=16, help="of the closed loop (default: 16)")
    parser.add_argument("--texts", type=int, default=64, help="of a request of the closed loop (default: 64)")
    parser.add_argument("--seconds", type=float, default=10.0, help="of each rate of an open loop (default: 10)")
    parser.add_argument("--token-budget", type=int, help="rows of a batch at most (default: from the free memory)")
    args = harness.parse(parser)
    dtype = "bfloat16" if args.device == "cuda" else "float32"
    options = Options(args.shape, "embed", args.device, dtype, args.layers, args.threads, args.token_budget)
    clients, rows = Clients(), list[dict[str, object]]()
    if set(args.modes) - {"rerank"}:
        rows += embedding_rows(args, options, clients)
    if "rerank" in args.modes:
        rows += rerank_rows(args, options._replace(task="score"), clients)
    clients.stop()
    harness.report(f"serve_{Path(args.shape).name}_{args.device}", rows, args.save)


def groups_of(args) -> list[list[list[int]]]:
    if args.data is None:
        return serving.made_prompts(args.groups * args.repeats, 8, 160, 64)
    return serving.real_prompts(args.data, args.workload, args.groups, args.repeats)


def embedding_rows(args, options: Options, clients: Clients) -> list[dict[str, object]]:
    groups = groups_of(args)
    prompts = [prompt for group in groups for prompt in group]
    large = [serving.embeddings(prompts[first : first + args.texts]) for first in range(0, len(prompts), args.texts)]
    small = [serving.embeddings(group) for group in groups]
    servers = {"folded": Server(options, False), "plain": Server(options, True)}
    rows: list[dict[str, object]] = []
    seconds = closed_loop(args, options, clients, servers, large, prompts, rows)
    rate = len(groups) / seconds["folded"]
    if "idle" in args.modes:
        rows += [idle(clients, server, name, prompts) for name, server in servers.items()]
    if "open" in args.modes:
        for share in RATES:
            for name, server in servers.items():
                with clients.opened(server.port, small, share * rate, args.seconds) as end:
                    elapsed, answers = end()
                row: dict[str, object] = {"case": f"open, {share:.1f} of the closed loop's rate", "server": name}
                rows.append(row | {"prompts/s": sum(a.count for a in answers) / elapsed} | latencies(answers))
    servers["plain"].stop()
    if "overload" in args.modes:
        rows.append(overload(args, clients, servers["folded"], small, 10 * rate))
    servers["folded"].stop()
    return rows


def closed_loop(args, options, clients, servers, requests, prompts, rows) -> dict[str, float]:
    """Return the best seconds of each way, and add their rows."""
    ways = dict(servers)
    if "closed" in args.modes:
        for name, plain in (("offline folded", False), ("offline plain", True)):
            ways[name] = Child(serving.compute, options, plain, prompts)
    seconds: dict[str, float] = {}
    for _ in range(args.rounds):
        for name, way in ways.items():
            if name.startswith("offline"):
                taken = way.ask("all")
            else:
                taken, answers = clients.closed(way.port, requests, args.clients)
                assert {answer.status for answer in answers} == {200}
            seconds[name] = min(taken, seconds.get(name, taken))
    for name, way in ways.items():
        if name.startswith("offline"):
            way.stop()
    for name, taken in seconds.items() if "closed" in args.modes else ():
        row: dict[str, object] = {"case": "closed", "server": name, "seconds": taken, "prompts/s": len(prompts) / taken}
        row["times plain"] = seconds["offline plain" if "offline" in name else "plain"] / taken
        rows.append(row | {"of offline": None if "offline" in name else seconds[f"offline {name}"] / taken})
    return seconds


def idle(clients: Clients, server: Server, name: str, prompts: list[list[int]]) -> dict[str, object]:
    """Return how long single prompts take, and how much of it is not the engine's."""
    requests = [serving.embeddings([prompt]) for prompt in prompts[:64]]
    clients.closed(server.port, requests[:16], 1)
    _, answers = clients.closed(server.port, requests, 1)
    beyond = sorted(answer.latency - answer.computed for answer in answers)
    return {"case": "idle", "server": name} | latencies(answers) | {"ms beyond": 1000 * beyond[len(beyond) // 2]}


def latencies(answers: list[serving.Answer]) -> dict[str, object]:
    refused = sum(answer.status == 429 for answer in answers)
    lost = sum(answer.status not in (200, 429, 503) for answer in answers)
    found: dict[str, object] = {f"p{share} ms": 1000 * quantile(answers, share / 100) for share in (50, 90, 99)}
    return found | {"429": refused, "lost": lost}


def overload(args, clients: Clients, server: Server, requests: list[serving.Request], rate: float) -> dict[str, object]:
    """Offer ten times what can be served, and stop the server meanwhile; every accepted request must be answered."""
    before = memory_of(server)
    with clients.opened(server.port, requests, rate, args.seconds) as end:
        most, started = before, time.perf_counter()
        while time.perf_counter() - started < 0.8 * args.seconds:
            time.sleep(0.1)
            most = max(most, memory_of(server))
        server.process.terminate()
        elapsed, answers = end()
    refused = [answer for answer in answers if answer.status == -1]  # the port is closed
    reached = [answer for answer in answers if answer.status != -1]
    row: dict[str, object] = {"case": "overload, then SIGTERM", "server": "folded", "seconds": elapsed}
    row |= {"prompts/s": sum(a.count for a in reached if a.status == 200) / elapsed, "exit": server.wait()}
    row |= {"503": sum(answer.status == 503 for answer in reached), "not connected": len(refused)}
    return row | latencies(reached) | {"MB grown": (most - before) / 2**20}


def memory_of(server: Server) -> int:
    pages = Path(f"/proc/{server.process.pid}/statm").read_text().split()[1]
    return int(pages) * os.sysconf("SC_PAGE_SIZE")


def rerank_rows(args, options: Options, clients: Clients) -> list[dict[str, object]]:
    rows: list[dict[str, object]] = []
    for name, across in (("120 shared in a request", False), ("120 shared by all", True)):
        groups = serving.made_prompts(args.groups * args.repeats, 10, 120, 180, across)
        requests = [serving.scores(group, 120) for group in groups]
        # A choice is scored behind its prompt, and never read.
        offline = Child(serving.compute, options, False, [[*prompt, 0] for group in groups for prompt in group])
        best = min(offline.ask("all") for _ in range(args.rounds))
        offline.stop()
        capacity = 10 * len(groups) / best
        rows.append({"case": f"rerank, {name}", "server": "offline folded", "prompts/s": capacity})
        for way, plain in (("folded", False), ("plain", True)):
            server = Server(options, plain)
            clients.closed(server.port, requests, 16)
            found = most_within(args, clients, server, requests, capacity)
            rows.append(
                {"case": f"rerank, {name}", "server": way} | found | {"of offline": found["prompts/s"] / capacity}
            )
            server.stop()
    return rows


def most_within(args, clients, server, requests, capacity: float) -> dict[str, float]:
    """Return the highest rate, in steps of 5% of the capacity, at which 99 of 100 requests take no more than WITHIN."""
    best = {"prompts/s": float("nan")}
    for percent in range(95, 10, -5):
        with clients.opened(server.port, requests, percent / 100 * capacity / 10, args.seconds) as end:
            elapsed, answers = end()
        if quantile(answers, 0.99) <= WITHIN and all(answer.status == 200 for answer in answers):
            best = {"prompts/s": sum(answer.count for answer in answers) / elapsed} | latencies(answers)
            break
    return best


if __name__ == "__main__":
    main()
