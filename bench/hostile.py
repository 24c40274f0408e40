"""What hostile peers cost the others: the latency of a call, as usual and under each kind of attack.

Run with ``python -m bench.hostile``: one server process on loopback TCP, one client that calls without pause, and
the attackers in a process of their own. Prints a table; the ratio to the usual latency is what counts.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import multiprocessing
import os
import resource
import socket
import statistics
import struct
import time
from multiprocessing.connection import Client

from shmelim.channel import MSGPACK, ChannelClient, ChannelServer

SILENT = 500
PAUSE = 0.01
ROUNDS = 3


class Target:
    def echo_rpc(self, value=None):
        return value

    def _private_rpc(self):
        raise AssertionError("called")

    def public(self):
        raise AssertionError("called")


def serve(pipe, key):
    with ChannelServer(Target(), ("127.0.0.1", 0), key, service_name="bench") as server:
        pipe.send(server.address)
        pipe.recv()


def connect(address):
    return socket.create_connection(address, timeout=10)


def silent(address, _key, ready, stop):
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
    peers = [connect(address) for _ in range(SILENT)]
    ready.set()
    stop.wait()
    for peer in peers:
        peer.close()


def repeated(attack):
    """Make an attack every ten milliseconds until it is enough."""

    def run(address, key, ready, stop):
        attack(address, key)
        ready.set()
        while not stop.wait(PAUSE):
            with contextlib.suppress(OSError, EOFError):
                attack(address, key)

    return run


def garbage(address, _key):
    with connect(address) as peer:
        peer.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n" * 10)


def gigabyte(address, _key):
    with connect(address) as peer:
        peer.sendall(struct.pack("!i", 2**30) + b"x" * 1000)


def cut(address, _key):
    with connect(address) as peer:
        peer.sendall(struct.pack("!i", 16) + b"x" * 5)


def wrong_key(address, _key):
    with contextlib.suppress(multiprocessing.AuthenticationError):
        Client(address, authkey=os.urandom(32)).close()


def no_key(address, _key):
    with contextlib.suppress(EOFError, OSError):
        connection = Client(address)
        connection.send_bytes(MSGPACK.dumps([1, "echo_rpc", [], {}]))
        connection.recv_bytes()
        connection.close()


def methods(address, key):
    with ChannelClient(address, key) as client:
        for name in ("missing_rpc", "_private_rpc", "public", "__class__"):
            with contextlib.suppress(AttributeError):
                client.call(name)


ATTACKS = {
    f"{SILENT} silent peers": silent,
    "wrong key": repeated(wrong_key),
    "no key": repeated(no_key),
    "garbage": repeated(garbage),
    "1 GiB announced": repeated(gigabyte),
    "message cut": repeated(cut),
    "unknown and private methods": repeated(methods),
}


def latencies(client, seconds):
    found = []
    ends = time.perf_counter() + seconds
    while (began := time.perf_counter()) < ends:
        client.call("echo_rpc", (1,))
        found.append(time.perf_counter() - began)
    return found


def figures(found):
    """Median and 99th percentile."""
    ordered = sorted(found)
    return statistics.median(ordered), ordered[int(len(ordered) * 0.99)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=2.0, help="how long each is measured")
    options = parser.parse_args()
    logging.getLogger("shmelim").setLevel(logging.CRITICAL)
    context = multiprocessing.get_context("fork")
    key = os.urandom(32)
    here, there = context.Pipe()
    server = context.Process(target=serve, args=(there, key), daemon=True)
    server.start()
    address = here.recv()
    print("| attack | median | of the usual | p99 | of the usual |\n|---|---:|---:|---:|---:|")
    with ChannelClient(address, key) as client:
        latencies(client, options.seconds / 4)
        for name, attack in ATTACKS.items():
            quiet, attacked = [], []
            for _ in range(ROUNDS):  # in turns, since the machine's own speed wanders
                quiet += latencies(client, options.seconds / ROUNDS)
                ready, stop = context.Event(), context.Event()
                attacker = context.Process(target=attack, args=(address, key, ready, stop), daemon=True)
                attacker.start()
                if not ready.wait(60):
                    raise TimeoutError(f"{name} did not begin")
                attacked += latencies(client, options.seconds / ROUNDS)
                stop.set()
                attacker.join()
            (usual, usual_p99), (median, p99) = figures(quiet), figures(attacked)
            print(
                f"| {name} | {median * 1e6:.0f} µs | {median / usual:.2f} times "
                f"| {p99 * 1e6:.0f} µs | {p99 / usual_p99:.2f} times |"
            )
    here.send(None)
    server.join()


if __name__ == "__main__":
    main()
