"""What `e2p serve` adds to a request: prints one line of JSON, milliseconds.

    python benchmarks/gateway.py prefixes --user user-3 --rate 100

An engine that answers at once (a process of its own, which reads the body and does nothing else) is asked `rate` times
a second by itself, with the body that the gateway would make, and through the gateway (another process), in turns of a
few seconds. A request is sent when it is due, whether the one before has been answered or not. What the gateway's
median is above the other is what it adds: reading the request, template, tokens, soft token, embeddings, base64, and
the way there and back. `cpu_ms` is the gateway's processor time for a request, which a busy machine changes less.
"""

import asyncio
import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import tyro

from e2p_jax.export.client import EngineClient
from e2p_jax.export.prefix_reader import PrefixTable

TURN = 4.0  # seconds
MODELS = json.dumps({"object": "list", "data": [{"id": "model", "max_model_len": 1 << 20}]}).encode()
CHOICE = {"index": 0, "text": "so it is.", "finish_reason": "stop", "logprobs": None}
ANSWER = json.dumps({"id": "cmpl-1", "object": "text_completion", "created": 1, "choices": [CHOICE]}).encode()


async def read(reader: asyncio.StreamReader) -> tuple[bytes, bytes]:
    """Head and body of a request or an answer."""
    head = await reader.readuntil(b"\r\n\r\n")
    lines = head.lower().split(b"\r\n")
    size = next((int(line.split(b":")[1]) for line in lines if line.startswith(b"content-length")), 0)
    return head, await reader.readexactly(size)


def message(first: str, body: bytes) -> bytes:
    head = f"{first}\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    return head.encode() + body


def engine(pipe: Any) -> None:
    """Answers at once; sends its port first."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                head, _ = await read(reader)
                writer.write(message("HTTP/1.1 200 OK", ANSWER if head.startswith(b"POST") else MODELS))
        except (asyncio.IncompleteReadError, ConnectionError):
            writer.close()

    async def listen() -> None:
        server = await asyncio.start_server(answer, "127.0.0.1", 0, limit=1 << 26)
        pipe.send(server.sockets[0].getsockname()[1])
        await server.serve_forever()

    asyncio.run(listen())


def serve(table: Path, engine: str, *flags: str, stderr: int | None = None) -> tuple[subprocess.Popen[str], str]:
    """The gateway in a process of its own, and its address, once it listens."""
    command = [sys.executable, "-m", "e2p_jax", "serve", str(table), "--engine", engine, "--port", "0", *flags]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=stderr, text=True)
    assert process.stdout is not None
    return process, process.stdout.readline().strip()


async def ask(port: int, request: bytes, count: int, rate: float) -> list[float]:
    """Seconds that each of `count` requests took, over connections that are kept."""
    idle: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []

    async def one(due: float) -> float:
        await asyncio.sleep(due - time.perf_counter())
        began = time.perf_counter()
        reader, writer = idle.pop() if idle else await asyncio.open_connection("127.0.0.1", port)
        writer.write(request)
        head, _ = await read(reader)
        assert b" 200 " in head, head
        idle.append((reader, writer))
        return time.perf_counter() - began

    start = time.perf_counter() + 0.1
    took = await asyncio.gather(*(one(start + number / rate) for number in range(count)))
    for _, writer in idle:
        writer.close()
    return took


def cpu_seconds(pid: int) -> float:
    """Processor time of a process so far (Linux)."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def figures(seconds: list[float]) -> dict[str, float]:
    cuts = statistics.quantiles(seconds, n=100)
    return {name: round(1000 * cuts[at - 1], 2) for name, at in (("p50", 50), ("p90", 90), ("p99", 99))}


def main(table: tyro.conf.Positional[Path], /, user: str, words: int = 8, rate: float = 100.0, turns: int = 5) -> None:
    """Times the gateway beside the bare engine.

    Args:
      table: What `e2p prefixes` wrote.
      user: One of its users.
      words: Of the message.
      rate: Requests a second.
      turns: Of a few seconds, for each of the two.
    """
    messages = [{"role": "user", "content": " ".join(["pets"] * words)}]
    client = EngineClient(PrefixTable(table), "model")
    bare = client.vllm_completion(user, messages)
    chat = json.dumps({"user": user, "messages": messages, "max_tokens": 64, "temperature": 0}).encode()
    here, there = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(target=engine, args=(there,), daemon=True)
    process.start()
    port = here.recv()
    served, address = serve(table, f"http://127.0.0.1:{port}")
    ways = {
        "engine": (port, message("POST /v1/completions HTTP/1.1", json.dumps(bare).encode())),
        "gateway": (int(address.rsplit(":", 1)[1]), message("POST /v1/chat/completions HTTP/1.1", chat)),
    }
    took: dict[str, list[float]] = {name: [] for name in ways}
    try:
        for at, request in ways.values():
            asyncio.run(ask(at, request, 20, rate))  # to warm up
        used = cpu_seconds(served.pid)
        for _ in range(turns):
            for name, (at, request) in ways.items():
                took[name] += asyncio.run(ask(at, request, int(rate * TURN), rate))
        used = (cpu_seconds(served.pid) - used) / len(took["gateway"])
    finally:
        served.terminate()
        served.wait()
        process.terminate()
    said: dict[str, Any] = {name: figures(seconds) for name, seconds in took.items()}
    said["added_ms"] = round(said["gateway"]["p50"] - said["engine"]["p50"], 2)
    said |= {"cpu_ms": round(1000 * used, 2), "rate": rate}
    said |= {"load": round(os.getloadavg()[0], 1), "cores": os.cpu_count()}
    sizes = {"prompt_tokens": len(client.embeddings(user, messages)), "width": client.table.shape[1]}
    print(json.dumps(said | sizes | {"body_bytes": len(ways["engine"][1])}))


if __name__ == "__main__":
    tyro.cli(main)
