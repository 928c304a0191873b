"""What start.py and warm.py share: the services under test, raw HTTP over a socket, and memory from /proc."""

import os
import socket
import statistics
import subprocess
import time
from dataclasses import dataclass, field

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(os.path.dirname(HERE))
PNG_MAGIC = b"\x89PNG\r\n\x1a\n"


@dataclass
class Side:
    """One service: how it is started. Each run gets a port of its own."""

    name: str
    command: list[str]
    env: dict[str, str] = field(default_factory=dict)
    draws: bool = True


def add_arguments(p):
    release = os.path.join(ROOT, "target", "release")
    p.add_argument("--binary", default=os.path.join(release, "image-generator"))
    p.add_argument("--bare", default=os.path.join(release, "examples", "bare_hyper"))
    p.add_argument("--python", help="a Python that has flask, torch, safetensors and pillow; without it the Flask service is left out")
    p.add_argument("--weights", default=os.path.join(ROOT, "src", "model", "mnist.safetensors"), help="what the Flask service loads")
    p.add_argument("--json", help="where every single figure goes")


def generator(a) -> Side:
    return Side("image-generator", [a.binary], {"HOST": "127.0.0.1", "LOG_LEVEL": "warn"})


def flask(a) -> Side:
    return Side("Flask + PyTorch", [a.python, os.path.join(HERE, "flask_service.py")], {"MODEL_PATH": a.weights})


def bare(a) -> Side:
    return Side("bare hyper", [a.bare], draws=False)


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


class Process:
    """A running side. `started` is the moment just before it was spawned."""

    def __init__(self, side: Side):
        self.port = free_port()
        # Nothing of this shell's settings reaches a side, except what programs need to run at all.
        env = {k: v for k, v in os.environ.items() if k in ("PATH", "HOME", "LANG", "LD_LIBRARY_PATH")}
        self.started = time.perf_counter()
        self.child = subprocess.Popen(side.command, env=env | side.env | {"PORT": str(self.port)}, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.child.kill()
        self.child.wait()

    def memory_mb(self, key: str) -> float:
        """VmRSS (now) or VmHWM (peak) of the process, in MB of a million bytes."""
        with open(f"/proc/{self.child.pid}/status") as f:
            line = next(line for line in f if line.startswith(key + ":"))
        return int(line.split()[1]) * 1024 / 1e6

    def connect(self, seconds_max: float = 120) -> socket.socket:
        """A connection as soon as there is one."""
        while True:
            s = socket.socket()
            try:
                s.connect(("127.0.0.1", self.port))
            except OSError:
                s.close()
                if self.child.poll() is not None:
                    raise SystemExit(f"{self.child.args[0]} ended with {self.child.returncode}") from None
                if time.perf_counter() - self.started > seconds_max:
                    raise SystemExit(f"{self.child.args[0]} does not listen after {seconds_max} s") from None
                time.sleep(0.0001)
                continue
            s.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            s.settimeout(seconds_max)
            return s

    def seconds(self) -> float:
        return time.perf_counter() - self.started


class Connection:
    """Requests one after the other, over one socket for as long as the server keeps it."""

    def __init__(self, process: Process):
        self.process, self.socket, self.rest = process, process.connect(), b""

    def request(self, path: str, body: bytes | None = None) -> bytes:
        """The body of a 200; anything else ends the benchmark."""
        head = f"{'POST' if body else 'GET'} {path} HTTP/1.1\r\nhost: localhost\r\n"
        if body:
            head += f"content-type: application/json\r\ncontent-length: {len(body)}\r\n"
        self.socket.sendall(head.encode() + b"\r\n" + (body or b""))
        received = self.rest
        while b"\r\n\r\n" not in received:
            received += self.receive()
        head, received = received.split(b"\r\n\r\n", 1)
        lines = head.decode("latin-1").lower().split("\r\n")
        if lines[0].split()[1] != "200":
            raise SystemExit(f"{path} was answered {lines[0]}: {received[:300]!r}")
        headers = dict(line.split(": ", 1) for line in lines[1:])
        if headers.get("transfer-encoding") == "chunked":
            received, length = self.chunks(received)
        else:
            length = int(headers["content-length"])
            while len(received) < length:
                received += self.receive()
            self.rest = received[length:]
        if headers.get("connection") == "close":
            self.close()
            self.socket, self.rest = self.process.connect(), b""
        return received[:length]

    def chunks(self, received: bytes) -> tuple[bytes, int]:
        """A body that comes in chunks, and its length."""
        body = b""
        while True:
            while b"\r\n" not in received:
                received += self.receive()
            line, received = received.split(b"\r\n", 1)
            size = int(line.split(b";")[0], 16)
            while len(received) < size + 2:
                received += self.receive()
            body, received = body + received[:size], received[size + 2 :]
            if size == 0:
                self.rest = received
                return body, len(body)

    def png(self, path: str, body: bytes | None = None) -> bytes:
        answer = self.request(path, body)
        if not answer.startswith(PNG_MAGIC):
            raise SystemExit(f"{path} was not answered by a PNG")
        return answer

    def receive(self) -> bytes:
        part = self.socket.recv(1 << 16)
        if not part:
            raise SystemExit("the server closed the connection before its answer was complete")
        return part

    def close(self):
        self.socket.close()


def machine() -> str:
    """The processor and how busy it is: figures of a busy machine are worth less."""
    with open("/proc/cpuinfo") as f:
        cpu = next((line.split(":", 1)[1].strip() for line in f if line.startswith("model name")), "unknown processor")
    return f"{len(os.sched_getaffinity(0))} x {cpu}; load average at the start {os.getloadavg()[0]:.1f}"


def number(value: float) -> str:
    """Three digits that count."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def summary(values: list[float]) -> str:
    """median (lowest to highest)"""
    if not values:
        return ""
    return f"{number(statistics.median(values))} ({number(min(values))} to {number(max(values))})"


def table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
