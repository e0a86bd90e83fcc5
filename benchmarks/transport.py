"""What the retrying back ends cost and save, against plain Anymail: ratios in one run.

    python benchmarks/transport.py

Sends through Mandrill's back end to a local ESP in a process of its own, over TLS. "One by one" is a back end for each
message, as Django's ``send_mail()`` has it; "held open" is one for all. The round trip is simulated by a relay that
holds every byte back for half of it, and the first one of a connection for a whole one more, as TCP's handshake would.
Wall and CPU times are this process's, per send; each ratio is the median over rounds in which both sides take turns.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.pop(0)  # this folder, whose queue.py would hide the standard library's
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the checkout, installed or not

import argparse
import asyncio
import os
import statistics
import subprocess
import threading
import time
import types
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, NamedTuple

from anymail_retry.testing import LocalEsp, SpawnedEsp


class Cost(NamedTuple):
    """Of one send, in seconds."""

    wall: float
    cpu: float


# --- what is compared ---


def configure(esp: SpawnedEsp) -> None:
    """A site as small as can be, without the queue."""
    settings = types.ModuleType("benchmark_settings")  # a module, as sites have it: it is read at every send
    vars(settings).update(SECRET_KEY="benchmark", INSTALLED_APPS=["anymail"], USE_TZ=True, ANYMAIL=esp.settings())
    sys.modules[settings.__name__] = settings
    os.environ["DJANGO_SETTINGS_MODULE"] = settings.__name__
    os.environ.update(esp.environ)
    import django

    django.setup()


def back_ends() -> tuple[Any, Any]:
    """Plain Anymail's, and ours."""
    import anymail.backends.mandrill

    from anymail_retry.backends.mandrill import EmailBackend

    return anymail.backends.mandrill.EmailBackend, EmailBackend


def send(backend: Any) -> None:
    from django.core.mail import EmailMessage

    message = EmailMessage("Subject", "Body", "from@example.com", ["to@example.com"])
    assert backend.send_messages([message]) == 1


def one_by_one(backend: Any, **options: Any) -> Callable[[], None]:
    return lambda: send(backend(**options))


@contextmanager
def held_open(backend: Any, **options: Any) -> Iterator[Callable[[], None]]:
    held = backend(**options)
    held.open()
    try:
        yield lambda: send(held)
    finally:
        held.close()


# --- measuring ---


def measure(action: Callable[[], None], times: int) -> Cost:
    wall, cpu = time.perf_counter(), time.process_time()
    for _ in range(times):
        action()
    return Cost((time.perf_counter() - wall) / times, (time.process_time() - cpu) / times)


def take_turns(actions: dict[str, Callable[[], None]], rounds: int, times: int) -> dict[str, list[Cost]]:
    for action in actions.values():
        measure(action, 5)  # warm
    costs: dict[str, list[Cost]] = {name: [] for name in actions}
    for turn in range(rounds):
        names = list(actions) if turn % 2 else list(reversed(actions))
        for name in names:
            costs[name].append(measure(actions[name], times))
    return costs


def ratio(costs: dict[str, list[Cost]], ours: str, theirs: str, what: str) -> float:
    pairs = zip(costs[ours], costs[theirs], strict=True)
    return statistics.median(getattr(mine, what) / getattr(other, what) for mine, other in pairs)


def throughput(action: Callable[[], None], threads: int, times: int) -> float:
    """Sends per second by so many threads."""
    start = threading.Barrier(threads + 1)

    def work() -> None:
        start.wait()
        for _ in range(times):
            action()

    with ThreadPoolExecutor(threads) as pool:
        done = [pool.submit(work) for _ in range(threads)]
        start.wait()
        began = time.perf_counter()
        for future in done:
            future.result()  # raises what a send raised
        return threads * times / (time.perf_counter() - began)


# --- a simulated round trip ---


@contextmanager
def relay(esp: SpawnedEsp, round_trip: float) -> Iterator[str]:
    """The ESP's URL, so many seconds away."""
    command = [sys.executable, __file__, "--relay", str(esp.port), "--round-trip", str(round_trip * 1000)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        port = int(process.stdout.readline())
        yield esp.url.replace(f":{esp.port}", f":{port}")
    finally:
        process.communicate()  # the end of its standard input is the end of it


async def run_relay(port: int, round_trip: float) -> None:
    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        to_reader, to_writer = await asyncio.open_connection("127.0.0.1", port)
        await asyncio.gather(
            delayed(reader, to_writer, round_trip / 2, first=round_trip), delayed(to_reader, writer, round_trip / 2)
        )

    async def delayed(
        reader: asyncio.StreamReader, writer: asyncio.StreamWriter, delay: float, first: float = 0.0
    ) -> None:
        loop = asyncio.get_running_loop()
        due = loop.time() + first
        while data := await reader.read(65536):
            due = max(due + 1e-6, loop.time())  # strictly later: the loop does not keep the order of equal times
            loop.call_at(due + delay, writer.write, data)
        loop.call_later(delay, writer.close)

    server = await asyncio.start_server(connected, "127.0.0.1", 0)
    print(server.sockets[0].getsockname()[1], flush=True)
    await asyncio.to_thread(sys.stdin.read)
    os._exit(0)  # whatever is still on its way


# --- the table ---


def row(what: str, value: float, target: str, reached: bool) -> bool:
    print(f"  {what:<66} {value:>6.2f}   {target:<8} {'' if reached else 'missed'}")
    return reached


def at_most(what: str, value: float, target: float) -> bool:
    return row(what, value, f"<= {target:.2f}", value <= target)


def milliseconds(costs: dict[str, list[Cost]]) -> None:
    for name, taken in costs.items():
        wall, cpu = (statistics.median(getattr(cost, what) for cost in taken) * 1000 for what in ("wall", "cpu"))
        print(f"    {name:<40} {wall:>8.2f} ms wall   {cpu:>6.2f} ms CPU")


def run(args: argparse.Namespace) -> bool:
    reached = []
    with LocalEsp.spawn("mandrill", keep_bodies=False) as esp:
        configure(esp)
        plain, ours = back_ends()

        print(f"Loopback, {args.rounds} rounds of {args.sends} sends")
        with held_open(plain) as plain_held, held_open(ours) as ours_held:
            costs = take_turns(
                {
                    "Anymail, one by one": one_by_one(plain),
                    "ours, one by one": one_by_one(ours),
                    "Anymail, held open": plain_held,
                    "ours, held open": ours_held,
                },
                args.rounds,
                args.sends,
            )
        milliseconds(costs)
        wall = ratio(costs, "ours, one by one", "Anymail, one by one", "wall")
        reached += [at_most("wall, one by one: ours / Anymail", wall, 0.42)]
        cpu = ratio(costs, "ours, held open", "Anymail, held open", "cpu")
        reached += [at_most("CPU, held open: ours / Anymail", cpu, 1.05)]
        cpu = ratio(costs, "ours, one by one", "Anymail, held open", "cpu")
        reached += [at_most("CPU: ours one by one / Anymail held open", cpu, 1.45)]

        print(f"\nRound trip of {args.round_trip:g} ms, {args.rounds} rounds of {args.far_sends} sends")
        with relay(esp, args.round_trip / 1000) as url:
            actions = {"Anymail": one_by_one(plain, api_url=url), "ours": one_by_one(ours, api_url=url)}
            costs = take_turns(actions, args.rounds, args.far_sends)
        milliseconds(costs)
        reached += [at_most("wall, one by one: ours / Anymail", ratio(costs, "ours", "Anymail", "wall"), 0.36)]

        print(f"\n{args.threads} threads, one by one, {args.rounds} rounds of {args.threads * args.thread_sends} sends")
        rates: dict[str, list[float]] = {"Anymail": [], "ours": []}
        for _ in range(args.rounds):
            rates["Anymail"].append(throughput(one_by_one(plain), args.threads, args.thread_sends))
            before = esp.counts.connections
            rates["ours"].append(throughput(one_by_one(ours), args.threads, args.thread_sends))
            sockets = esp.counts.connections - before
        for name, taken in rates.items():
            print(f"    {name:<40} {statistics.median(taken):>8.0f} sends a second")
        print(f"    {'connections opened by ours, last round':<40} {sockets:>8}")
        faster = statistics.median(mine / other for mine, other in zip(rates["ours"], rates["Anymail"], strict=True))
        reached += [row("throughput: ours / Anymail", faster, ">= 1.00", faster >= 1)]
    return all(reached)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=7, help="of each measurement (default: 7)")
    parser.add_argument("--sends", type=int, default=150, help="in a round on loopback (default: 150)")
    parser.add_argument("--far-sends", type=int, default=10, help="in a round with the round trip (default: 10)")
    parser.add_argument("--thread-sends", type=int, default=20, help="of each thread in a round (default: 20)")
    parser.add_argument("--threads", type=int, default=32, help="(default: 32)")
    parser.add_argument("--round-trip", type=float, default=20, help="in milliseconds (default: 20)")
    parser.add_argument("--relay", type=int, help=argparse.SUPPRESS)  # be the relay to this port
    args = parser.parse_args()
    if args.relay:
        asyncio.run(run_relay(args.relay, args.round_trip / 1000))
        return 0
    return 0 if run(args) else 1


if __name__ == "__main__":
    sys.exit(main())
