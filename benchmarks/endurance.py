"""Many sends by threads and forks: how many sockets each process opens, and whether its memory grows.

    python benchmarks/endurance.py

A parent sends by threads, forks children, which inherit its pools, and goes on beside them. Each ``send_mail()`` makes
a back end of its own, as Django's does. Sockets are what ``/proc`` shows of each process, looked at every few
milliseconds (so this one is for Linux). Memory is its resident size after each fifth of the sends: in the first ones
threads and connections come to be, from the middle on it should stay.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.pop(0)  # this folder, whose queue.py would hide the standard library's
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the checkout, installed or not

import argparse
import gc
import json
import os
import threading
import traceback
import types
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import NamedTuple

from anymail_retry.testing import LocalEsp, SpawnedEsp

#: Sockets per host and process, and megabytes by which a process may grow.
SOCKETS, GROWTH = 64, 2.0


def configure(esp: SpawnedEsp) -> None:
    settings = types.ModuleType("benchmark_settings")
    vars(settings).update(SECRET_KEY="benchmark", INSTALLED_APPS=["anymail"], USE_TZ=True, ANYMAIL=esp.settings())
    sys.modules[settings.__name__] = settings
    os.environ["DJANGO_SETTINGS_MODULE"] = settings.__name__
    os.environ.update(esp.environ)
    import django

    django.setup()


def send() -> None:
    from django.core.mail import EmailMessage

    from anymail_retry.backends.mandrill import EmailBackend

    message = EmailMessage("Subject", "Body", "from@example.com", ["to@example.com"])
    assert EmailBackend().send_messages([message]) == 1


def sockets_to(port: int) -> set[str]:
    """This process's TCP sockets to a port of this machine, by inode."""
    inodes = set()
    for entry in os.scandir("/proc/self/fd"):
        try:
            target = os.readlink(entry.path)
        except FileNotFoundError:
            continue
        if target.startswith("socket:["):
            inodes.add(target[8:-1])
    wanted = f":{port:04X}"
    rows = (line.split() for line in Path("/proc/self/net/tcp").read_text().splitlines()[1:])
    return {row[9] for row in rows if row[2].endswith(wanted) and row[9] in inodes}


def megabytes() -> float:
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


@contextmanager
def watching(port: int) -> Iterator[list[int]]:
    """The largest number of sockets so far, without those that a fork left to this process."""
    largest = [0]
    inherited = sockets_to(port)
    over = threading.Event()

    def watch() -> None:
        while not over.wait(0.005):
            largest[0] = max(largest[0], len(sockets_to(port) - inherited))

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield largest
    finally:
        over.set()
        watcher.join()


class Seen(NamedTuple):
    """What one process saw; memory in megabytes, after each fifth of its sends."""

    sends: int = 0
    sockets: int = 0
    memory: Sequence[float] = (0.0,) * 5

    @property
    def growth(self) -> float:
        return self.memory[-1] - self.memory[2]


def work(port: int, sends: int, threads: int) -> Seen:
    """Send by threads."""
    memory = []
    with watching(port) as largest, ThreadPoolExecutor(threads) as pool:
        for _ in range(5):
            for done in [pool.submit(send) for _ in range(sends // 5)]:
                done.result()  # raises what a send raised
            memory.append(megabytes())
    return Seen(sends, largest[0], memory)


def run(sends: int, threads: int, forks: int) -> bool:
    each = sends // (forks + 1) // 5 * 5
    with LocalEsp.spawn("mandrill", keep_bodies=False) as esp:
        configure(esp)
        for _ in range(10):
            send()  # the parent has connections that its children inherit
        children = []
        for _ in range(forks):
            reading, writing = os.pipe()
            pid = os.fork()
            if pid == 0:
                os.close(reading)
                try:
                    os.write(writing, json.dumps(work(esp.port, each, threads)).encode())
                except BaseException:
                    traceback.print_exc()
                finally:
                    os._exit(0)  # nothing of the parent's is to be ended here
            os.close(writing)
            children.append((pid, reading))
        seen = [work(esp.port, each, threads)]
        for pid, reading in children:
            with open(reading) as pipe:
                output = pipe.read()
            os.waitpid(pid, 0)
            seen.append(Seen(*json.loads(output)) if output else Seen())
        accepted = len(esp.ledger)
    print(f"{sends} sends by {forks + 1} processes of {threads} threads\n")
    good = accepted == each * (forks + 1) + 10
    for place, process in enumerate(seen):
        name = f"child {place}" if place else "parent"
        fine = process.sends == each and 0 < process.sockets <= SOCKETS and process.growth <= GROWTH
        good &= fine
        memory = ", ".join(f"{size:.1f}" for size in process.memory)
        print(
            f"  {name:<8} {process.sends:>6} sends   {process.sockets:>3} sockets at most   {memory} MB"
            f"   {'' if fine else 'missed'}"
        )
    print(f"\n  accepted by the ESP: {accepted} of {each * (forks + 1) + 10}")
    print(f"  wanted: at most {SOCKETS} sockets each, growth from the third fifth on at most {GROWTH:g} MB, no error")
    return good


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--sends", type=int, default=10_000, help="by all processes together (default: 10000)")
    parser.add_argument("--threads", type=int, default=100, help="of each process (default: 100)")
    parser.add_argument("--forks", type=int, default=3, help="(default: 3)")
    args = parser.parse_args()
    return 0 if run(args.sends, args.threads, args.forks) else 1


if __name__ == "__main__":
    sys.exit(main())
