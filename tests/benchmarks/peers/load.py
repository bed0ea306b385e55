"""Sends requests over a few kept connections, and tells how long it took.

    python -m tests.benchmarks.peers.load PORT CLIENTS FILE

FILE holds the requests as they go over the wire, pickled. Prints JSON: `seconds` for all of them, `bad` answers by
status, `p50` and `p99` of one in milliseconds. A process of its own, and little of one: it is not what is measured.
"""

from __future__ import annotations

import asyncio
import json
import pickle
import sys
import time
from collections import Counter
from pathlib import Path


async def main(port: int, clients: int, requests: list[bytes]) -> None:
    times: list[float] = []
    bad: Counter[str] = Counter()
    left = iter(requests)

    async def client() -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        for request in left:
            began = time.perf_counter()
            writer.write(request)
            head = await reader.readuntil(b"\r\n\r\n")
            _, known, rest = head.lower().partition(b"content-length: ")
            if known:
                await reader.readexactly(int(rest.partition(b"\r\n")[0]))
            elif b"chunked" in head:
                while length := int(await reader.readuntil(b"\r\n"), 16):
                    await reader.readexactly(length + 2)
                await reader.readexactly(2)
            times.append(time.perf_counter() - began)
            if (status := head[9:12]) >= b"300":
                bad[status.decode()] += 1
        writer.close()

    began = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(clients)))
    took = time.perf_counter() - began
    times.sort()
    p50, p99 = (1000 * times[int(len(times) * part)] for part in (0.5, 0.99))
    sys.stdout.write(json.dumps({"seconds": took, "bad": bad, "p50": p50, "p99": p99}))


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1]), int(sys.argv[2]), pickle.loads(Path(sys.argv[3]).read_bytes())))
