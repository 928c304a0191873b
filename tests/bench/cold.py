"""From process start to weights in memory: image-generator against what else brings a weights file from a store.

    cargo build --release --bin image-generator --examples
    python3 tests/bench/cold.py --python .venv/bin/python --json cold.json
    python3 tests/bench/cold.py --quick

It makes a weights file of 700 MB, serves it on loopback, and starts every side once a round, all sides in turn:

fast     nginx on loopback: the limit is what two plain sockets can do (raw_sockets.rs)
cloud    a store with 30 ms to the first byte and 90 MB/s a connection (paced_store.rs)
cache    a second start, from the disk cache, against a plain read of the same file (plain_read.rs)
hundred  one hundred requests to a cold server: what crossed the wire, and the peak of its memory

Every side is a process of its own. Its time begins just before it is spawned and ends when its line "weights fetched"
(the others': "weights resident") arrives here; its processor time and its peak of memory are read from /proc at that
moment and, where it draws, once more at its first digit. What each side reports is checked: bytes, and how they were
verified. Before each start a helper takes and frees 3 GB, in huge pages and in small ones, for a virtual machine's
host supplies memory at its first touch, slowly: without it a read of 0.13 s takes 0.5 to 1.7 s, by chance.

On a machine that others use too, many short runs say more than one long one: with --append the figures of an
earlier run in the --json file count as well. Standard library only; the Python sides need requirements-cold.txt.
"""

import argparse
import json
import os
import re
import shutil
import signal
import socket
import statistics
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import harness
import stores
from harness import HERE, PNG_MAGIC

SECTIONS = ("fast", "cloud", "cache", "hundred")
LIMIT = "two raw sockets"
OURS = "image-generator"
CHUNKS = f"{OURS}, verified by chunks"
CLOUD_MB_PER_SECOND, CLOUD_FIRST_BYTE_MS = 90, 30
# What of the object's siblings lies beside it: the bucket.
PLAIN, CHUNKED, SUMMED = "plain", "chunks", "sha256"
# Small pages and huge ones, for each kind comes from free memory of its own; the huge ones last, for they go first.
TOUCH = """
import mmap, sys
mb = int(sys.argv[1])
small = b"\\1" * (mb * 2 // 3 << 20)
del small
for again in range(2):
    with mmap.mmap(-1, mb // 2 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as huge:
        huge.madvise(mmap.MADV_HUGEPAGE)
        for at in range(0, len(huge), 1 << 20):
            huge[at] = 1
"""


@dataclass
class Side:
    name: str
    section: str
    command: list[str]
    env: dict[str, str] = field(default_factory=dict)
    # What the line about the weights must say.
    expected: dict = field(default_factory=dict)
    draws: bool = False
    # Whether its lines come before it has the weights, as a service's do.
    logs: bool = True
    essential: bool = False
    before: Callable[[], None] = lambda: None


def arguments():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    release = os.path.join(harness.ROOT, "target", "release")
    p.add_argument("--release", default=release, help="folder of the binaries")
    p.add_argument("--python", help="a Python with requirements-cold.txt; without it the Python sides are left out")
    p.add_argument("--work", help="folder for the weights, the cache and temporary files, on a real disk; kept (default: a new one, removed)")
    p.add_argument("--rounds", type=int, default=5)
    p.add_argument("--sections", default=",".join(SECTIONS), help=f"of {', '.join(SECTIONS)}")
    p.add_argument("--sides", default="", help="only sides whose name has this regular expression")
    p.add_argument("--quick", action="store_true", help="one round of the essential sides")
    p.add_argument("--mb", type=float, default=700)
    p.add_argument("--dtype", choices=["f16", "f32"], default="f16")
    p.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="a variable for image-generator, such as RANGE_CONCURRENCY=64")
    p.add_argument("--touch-mb", type=int, default=3000, help="memory to take and free before each start")
    p.add_argument("--json", help="where every single figure goes")
    p.add_argument("--append", action="store_true", help="go on with what is in the --json file")
    return p.parse_args()


# ---- the object


class Object:
    """The weights file, in three buckets: alone, with a chunk manifest, with a SHA-256."""

    def __init__(self, a):
        self.name = f"large-{a.dtype}-{a.mb:g}.safetensors"
        self.www = os.path.join(a.work, "www")
        self.path = os.path.join(self.www, PLAIN, self.name)
        os.makedirs(os.path.dirname(self.path), exist_ok=True)
        if not os.path.exists(self.path):
            subprocess.run([sys.executable, os.path.join(HERE, "large_model.py"), "--out", self.path, "--mb", str(a.mb), "--dtype", a.dtype], check=True)
        for bucket in (CHUNKED, SUMMED):
            there = os.path.join(self.www, bucket, self.name)
            if not os.path.exists(there):
                os.makedirs(os.path.dirname(there), exist_ok=True)
                os.link(self.path, there)
        subprocess.run([os.path.join(a.release, "image-generator"), "pack", os.path.join(self.www, CHUNKED, self.name)], check=True, stdout=subprocess.DEVNULL)
        summed = subprocess.run(["sha256sum", self.path], check=True, capture_output=True, text=True).stdout
        with open(os.path.join(self.www, SUMMED, self.name + ".sha256"), "w") as f:
            f.write(summed.split()[0] + "  " + self.name + "\n")
        with open(self.path, "rb") as f:
            header = 8 + struct.unpack("<Q", f.read(8))[0]
        self.bytes = os.path.getsize(self.path)
        self.tensor_bytes = self.bytes - header

    def uri(self, bucket: str = PLAIN) -> str:
        return f"s3://{bucket}/{self.name}"


# ---- the sides


def service(a, object: Object, store: stores.Store, bucket: str, **more: str) -> dict[str, str]:
    return store.env() | {"HOST": "127.0.0.1", "MODEL_PRELOAD": "true", "MODEL_URI": object.uri(bucket)} | more | dict(s.split("=", 1) for s in a.set)


def ours(a, object: Object, store: stores.Store, section: str, bucket: str, name: str, verified: str, **more) -> Side:
    expected = {"bytes": object.bytes, "verified": verified, "origin": "store"}
    return Side(name, section, [os.path.join(a.release, "image-generator")], service(a, object, store, bucket), expected, draws=True, **more)


def raw(a, object: Object, store: stores.Store, section: str, name: str, connections: int) -> Side:
    command = [os.path.join(a.release, "examples", "raw_sockets"), store.address, f"/{PLAIN}/{object.name}", str(connections)]
    return Side(name, section, command, {}, {"bytes": object.bytes}, essential=True)


def python(a, object: Object, store: stores.Store, section: str, name: str, way: str, essential: bool = False, **more: str) -> list[Side]:
    if not a.python:
        return []
    env = store.env() | {"TMPDIR": a.temporary} | more
    return [Side(name, section, [a.python, os.path.join(HERE, "fetch_python.py"), way, object.uri()], env, {"bytes": object.tensor_bytes}, essential=essential)]


def fast(a, object: Object, store: stores.Store) -> list[Side]:
    s = "fast"
    sides = [
        raw(a, object, store, s, LIMIT, 2),
        ours(a, object, store, s, PLAIN, f"{OURS}, no digest", "length", essential=True),
        ours(a, object, store, s, CHUNKED, CHUNKS, "chunks", essential=True),
        ours(a, object, store, s, SUMMED, f"{OURS}, verified by SHA-256", "sha256"),
        *python(a, object, store, s, "AWS CRT + load_file", "crt"),
        *python(a, object, store, s, "Run:ai Model Streamer", "runai", essential=True),
        *python(a, object, store, s, "Run:ai Model Streamer, 32 connections", "runai", RUNAI_STREAMER_CONCURRENCY="32"),
        *python(a, object, store, s, "boto3 + load_file", "boto3", essential=True),
    ]
    if a.python:
        env = store.env() | {"TMPDIR": a.temporary, "MODEL_URI": object.uri()}
        sides.append(Side("Flask + PyTorch", s, [a.python, os.path.join(HERE, "flask_service.py")], env, draws=True, logs=False))
    return sides


def cloud(a, object: Object, store: stores.Store) -> list[Side]:
    s = "cloud"
    return [
        raw(a, object, store, s, "one GET", 1),
        ours(a, object, store, s, PLAIN, f"{OURS}, no digest", "length"),
        ours(a, object, store, s, CHUNKED, CHUNKS, "chunks", essential=True),
        *python(a, object, store, s, "Run:ai Model Streamer", "runai", essential=True),
        *python(a, object, store, s, "Run:ai Model Streamer, 32 connections", "runai", RUNAI_STREAMER_CONCURRENCY="32"),
        *python(a, object, store, s, "boto3 + load_file", "boto3"),
    ]


def cache(a, object: Object, store: stores.Store) -> list[Side]:
    s = "cache"
    dir, first = os.path.join(a.work, "cache"), os.path.join(a.work, "cache-first")
    binary = os.path.join(a.release, "image-generator")
    shutil.rmtree(dir, ignore_errors=True)
    second = service(a, object, store, PLAIN, MODEL_CACHE_DIR=dir)
    # An orderly end: the entry appears when the model is ready.
    filled = Running(Side("", s, [binary], second))
    filled.line("model ready")
    filled.stop(signal.SIGTERM)
    files = [os.path.join(parent, name) for parent, _, names in os.walk(dir) for name in names]
    entries = [f for f in files if f.endswith(".json")]
    weights = [f for f in files if f.endswith(".safetensors")]
    if len(entries) != 1 or len(weights) != 1:
        raise SystemExit(f"the first start left {files} in the cache")
    os.sync()
    return [
        Side("plain read", s, [os.path.join(a.release, "examples", "plain_read"), weights[0]], {}, {"bytes": object.bytes}, essential=True),
        Side(f"{OURS}, from the cache", s, [binary], second, {"bytes": object.bytes, "origin": "cache"}, draws=True, essential=True),
        Side(
            f"{OURS}, first start, filling the cache",
            s,
            [binary],
            service(a, object, store, PLAIN, MODEL_CACHE_DIR=first),
            {"bytes": object.bytes, "origin": "store"},
            draws=True,
            before=lambda: shutil.rmtree(first, ignore_errors=True),
        ),
    ]


# ---- one run


class Running:
    """A side that was started just now."""

    def __init__(self, side: Side, seconds_max: float = 120):
        self.side, self.port, self.lines = side, harness.free_port(), []
        env = {k: v for k, v in os.environ.items() if k in ("PATH", "HOME", "LANG", "LD_LIBRARY_PATH")}
        env |= side.env | {"PORT": str(self.port)}
        self.errors = tempfile.TemporaryFile()
        self.started = time.perf_counter()
        self.child = subprocess.Popen(side.command, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors)
        self.timer = threading.Timer(seconds_max, self.child.kill)
        self.timer.start()

    def ms(self) -> float:
        return (time.perf_counter() - self.started) * 1e3

    def line(self, *messages: str) -> tuple[float, dict]:
        """When the next line with one of those messages came, and what it says."""
        for text in self.child.stdout:
            at = self.ms()
            try:
                line = json.loads(text)
            except ValueError:
                continue
            self.lines.append(line)
            if line.get("message") in messages:
                return at, line
        self.failed("it ended before it said " + " or ".join(messages))

    def failed(self, why: str):
        self.errors.seek(0)
        raise SystemExit(f"{self.side.name}: {why}\n{self.lines}\n{self.errors.read().decode()[-2000:]}")

    def used(self) -> dict[str, float]:
        """Processor time and peak of memory until now."""
        with open(f"/proc/{self.child.pid}/stat") as f:
            user, system = f.read().rsplit(")", 1)[1].split()[11:13]
        with open(f"/proc/{self.child.pid}/status") as f:
            peak = next(int(line.split()[1]) for line in f if line.startswith("VmHWM"))
        return {"cpu_s": (int(user) + int(system)) / os.sysconf("SC_CLK_TCK"), "peak_mb": peak * 1024 / 1e6}

    def digit(self, into: dict):
        """Asks for a digit as soon as there is a port."""
        while True:
            with socket.socket() as s:
                try:
                    s.connect(("127.0.0.1", self.port))
                    s.sendall(b"GET /v1/digits/7?seed=1 HTTP/1.1\r\nhost: bench\r\nconnection: close\r\n\r\n")
                    answer = b"".join(iter(lambda: s.recv(1 << 16), b""))
                except ConnectionRefusedError:
                    if self.child.poll() is not None:
                        return
                    time.sleep(0.0002)
                    continue
            into["digit_ms"] = self.ms()
            into["answer"] = answer
            return

    def stop(self, how: signal.Signals = signal.SIGKILL):
        self.timer.cancel()
        self.child.send_signal(how)
        self.child.stdout.read()
        self.child.wait()


def touch(mb: int):
    if mb:
        subprocess.run([sys.executable, "-c", TOUCH, str(mb)], check=True)


def measure(side: Side) -> dict[str, float]:
    side.before()
    running, out, drawn = Running(side), {}, {}
    drawer = threading.Thread(target=running.digit, args=(drawn,))
    if side.draws:
        drawer.start()
    if side.logs:
        listening = 0.0
        at, line = running.line("weights fetched", "weights resident", "listening")
        if line["message"] == "listening":
            listening = at
            at, line = running.line("weights fetched")
        used = running.used()
        wrong = {k: line.get(k) for k, v in side.expected.items() if line.get(k) != v}
        if wrong:
            running.failed(f"it says {wrong}, expected {side.expected}")
        # A service's load begins when it listens; the others say themselves when their imports were done.
        out = {"total_ms": at, "load_ms": line.get("load_ms", at - listening), **used}
    if side.draws:
        drawer.join()
        if PNG_MAGIC not in drawn.get("answer", b""):
            running.failed(f"it answered {drawn.get('answer', b'')[:300]!r}")
        used = running.used()
        out |= {"digit_ms": drawn["digit_ms"], "digit_cpu_s": used["cpu_s"], "digit_peak_mb": used["peak_mb"]}
    running.stop()
    return out


# ---- one hundred at once


def hundred(a, object: Object, store: stores.Nginx) -> dict[str, float]:
    """One hundred requests that find the server cold."""
    store.forget()
    side = Side("one hundred", "hundred", [os.path.join(a.release, "image-generator")], service(a, object, store, CHUNKED, MODEL_PRELOAD="false"))
    running = Running(side)
    running.line("listening")
    answers = [{} for _ in range(100)]
    threads = [threading.Thread(target=running.digit, args=(answer,)) for answer in answers]
    for thread in threads:
        thread.start()
    _, line = running.line("weights fetched")
    for thread in threads:
        thread.join()
    drawn = sum(PNG_MAGIC in answer.get("answer", b"") for answer in answers)
    used = running.used()
    running.stop()
    ranges = store.sent(f"/{CHUNKED}/{object.name}")
    fewest, most = stores.times_sent(ranges, object.bytes)
    return {
        "digits": drawn,
        "last_digit_ms": max(answer["digit_ms"] for answer in answers),
        "sent_bytes": sum(last + 1 - first for first, last in ranges),
        "fewest_times": fewest,
        "most_times": most,
        "requests": len(ranges),
        "peak_mb": used["peak_mb"],
    }


# ---- tables


def report(about: str, object: Object, runs: dict[str, list[dict]]) -> str:
    values = lambda key, k: [r[k] for r in runs.get(key, []) if k in r]
    middle = lambda key, k: statistics.median(values(key, k)) if values(key, k) else None
    out = [f"{about}\n{object.bytes:,} bytes; medians (lowest to highest)"]
    titles = {
        "fast": ("A fast store: nginx on loopback", LIMIT, CHUNKS),
        "cloud": (f"A store with {CLOUD_FIRST_BYTE_MS} ms to the first byte and {CLOUD_MB_PER_SECOND} MB/s a connection", "one GET", CHUNKS),
        "cache": ("From the disk cache", "plain read", f"{OURS}, from the cache"),
    }
    for section, (title, limit, us) in titles.items():
        keys = [k for k in runs if k.startswith(section + "/")]
        if not keys:
            continue
        header = ["", "rounds", "weights resident, ms", "load alone, ms", "CPU, s", "peak, MB", "first digit, ms", "peak by then, MB", f"/ {limit}", f"/ {us}"]
        rows = []
        for key in keys:
            what = "total_ms" if values(key, "total_ms") else "digit_ms"
            ratio = lambda to: harness.number(middle(key, what) / middle(f"{section}/{to}", what)) if middle(f"{section}/{to}", what) else ""
            figures = [harness.summary(values(key, k)) for k in ("total_ms", "load_ms", "cpu_s", "peak_mb", "digit_ms", "digit_peak_mb")]
            rows.append([key.split("/", 1)[1], str(len(runs[key])), *figures, ratio(limit), ratio(us)])
        out.append(f"{title}\n\n{harness.table(header, rows)}")
    if runs.get("hundred"):
        names = {
            "digits": "digits drawn",
            "sent_bytes": "bytes of the object that left the store",
            "fewest_times": "times that each byte left it, at least",
            "most_times": "and at most",
            "requests": "requests",
            "last_digit_ms": "last digit, ms",
            "peak_mb": "peak memory, MB",
        }
        rows = [[text, f"{v[0]:,}" if isinstance(v[0], int) and len(set(v)) == 1 else harness.summary(v)] for k, text in names.items() if (v := values("hundred", k))]
        out.append(f"One hundred requests to a cold server\n\n{harness.table(['', str(len(runs['hundred'])) + ' rounds'], rows)}")
    goals = [
        ("fast", f"{OURS}, no digest", LIMIT, "total_ms", "at most", 1.15),
        ("fast", CHUNKS, LIMIT, "total_ms", "at most", 1.35),
        ("fast", "boto3 + load_file", CHUNKS, "total_ms", "at least", 7),
        ("fast", "Flask + PyTorch", CHUNKS, "digit_ms", "at least", 7),
        ("fast", "Run:ai Model Streamer", CHUNKS, "total_ms", "at least", 5),
        ("fast", "Run:ai Model Streamer", CHUNKS, "load_ms", "at least", 2),
        ("fast", "AWS CRT + load_file", CHUNKS, "total_ms", "at least", 5),
        ("fast", "AWS CRT + load_file", CHUNKS, "load_ms", "at least", 2),
        ("cloud", "one GET", CHUNKS, "total_ms", "at least", 12),
        ("cloud", "Run:ai Model Streamer", CHUNKS, "total_ms", "at least", 5),
        ("cache", f"{OURS}, from the cache", "plain read", "total_ms", "at most", 1.2),
    ]
    rows = []
    for section, one, other, k, word, goal in goals:
        x, y = middle(f"{section}/{one}", k), middle(f"{section}/{other}", k)
        if x and y:
            met = x / y <= goal if word == "at most" else x / y >= goal
            rows.append([f"{section}: {one} / {other}, {k.removesuffix('_ms')}", f"{word} {goal} x", f"{x / y:.2f} x", "met" if met else "missed"])
    peak, peak_max = middle(f"fast/{CHUNKS}", "digit_peak_mb"), 1.05 * object.tensor_bytes / 1e6 + 64
    if peak:
        rows.append(["fast: peak memory by the first digit, MB", f"at most {peak_max:.0f}", f"{peak:.0f}", "met" if peak <= peak_max else "missed"])
    out.append(f"Goals\n\n{harness.table(['', 'goal', 'measured', ''], rows)}")
    return "\n\n".join(out)


def main():
    a = arguments()
    given = a.work
    a.work = os.path.abspath(given) if given else tempfile.mkdtemp(prefix="cold-", dir=harness.ROOT)
    a.temporary = os.path.join(a.work, "tmp")
    os.makedirs(a.temporary, exist_ok=True)
    wanted = a.sections.split(",")
    about = harness.machine()
    runs: dict[str, list[dict]] = {}
    if a.append and a.json and os.path.exists(a.json):
        with open(a.json) as f:
            runs = json.load(f)["runs"]
    try:
        object = Object(a)
        paced = os.path.join(a.release, "examples", "paced_store")
        with stores.Nginx(object.www) as nginx, stores.Paced(paced, object.www, CLOUD_MB_PER_SECOND, CLOUD_FIRST_BYTE_MS) as far:
            sides = fast(a, object, nginx) if "fast" in wanted else []
            sides += cloud(a, object, far) if "cloud" in wanted else []
            sides += cache(a, object, nginx) if "cache" in wanted else []
            sides = [s for s in sides if re.search(a.sides, s.name) and (s.essential or not a.quick)]
            for side in sides:
                runs.setdefault(f"{side.section}/{side.name}", [])
            rounds = 1 if a.quick else a.rounds
            for i in range(rounds):
                # The order turns, so that no side always follows the same one.
                at = i % max(len(sides), 1)
                for side in sides[at:] + sides[:at]:
                    touch(a.touch_mb)
                    figures = measure(side)
                    runs[f"{side.section}/{side.name}"].append(figures)
                    print(f"round {i + 1}/{rounds}  {side.section}: {side.name}: " + "  ".join(f"{k} {v:.4g}" for k, v in figures.items()), flush=True)
                if "hundred" in wanted and not a.sides:
                    touch(a.touch_mb)
                    runs.setdefault("hundred", []).append(hundred(a, object, nginx))
        print("\n" + report(about, object, runs))
        if a.json:
            with open(a.json, "w") as f:
                json.dump({"machine": about, "bytes": object.bytes, "runs": runs}, f, indent=1)
    finally:
        shutil.rmtree(a.temporary, ignore_errors=True)
        if not given:
            shutil.rmtree(a.work, ignore_errors=True)


if __name__ == "__main__":
    main()
