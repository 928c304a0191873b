"""Three models in a memory budget for two: what is loaded and unloaded when, and whether the budget holds.

    cargo build --release --bin image-generator
    python3 tests/bench/catalogue.py --seconds 60

Clients ask for digits of three models at random, the first most often, the third least. nginx on loopback serves the
weights; MAX_MEMORY_MB has room for two models and a little. The resident memory of the service is read every 50 ms.
Prints what was asked and answered, the most memory that was ever taken, and the trace of loads and unloads from the
service's own log. Ends with an error if the budget was ever exceeded, or an answer was not the digit that was asked for
by the model that was asked. Standard library only.
"""

import argparse
import collections
import http.client
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import threading
import time

import harness
import stores
from harness import HERE, PNG_MAGIC

NAMES = ("first", "second", "third")
POPULARITY = (5, 3, 2)
SAMPLE_SECONDS = 0.05
MIB = 1 << 20


def arguments():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--binary", default=os.path.join(harness.ROOT, "target", "release", "image-generator"))
    p.add_argument("--work", help="folder for the weights, kept (default: a new one, removed)")
    p.add_argument("--mb", type=float, default=700, help="of each model")
    p.add_argument("--spare-mib", type=int, default=96, help="what the budget has beyond two models")
    p.add_argument("--seconds", type=float, default=60)
    p.add_argument("--clients", type=int, default=6)
    p.add_argument("--seed", type=int, default=2026)
    p.add_argument("--trace", type=int, default=40, help="events of the trace to print")
    p.add_argument("--json", help="where all events, samples and requests go")
    return p.parse_args()


class Service:
    def __init__(self, a, url: str, budget_mib: int):
        self.port = harness.free_port()
        env = {k: v for k, v in os.environ.items() if k in ("PATH", "HOME", "LANG")}
        env |= {"PORT": str(self.port), "HOST": "127.0.0.1", "MODEL_URI": url, "MODEL_DEFAULT": NAMES[0], "MAX_MEMORY_MB": str(budget_mib)}
        self.started = time.perf_counter()
        self.child = subprocess.Popen([a.binary], env=env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE)
        self.events, self.samples, self.over = [], [], False
        self.threads = [threading.Thread(target=self.listen), threading.Thread(target=self.sample)]
        for thread in self.threads:
            thread.start()
        stores.wait_for_port(self.port, self.child)

    def seconds(self) -> float:
        return time.perf_counter() - self.started

    def listen(self):
        for line in self.child.stdout:
            self.events.append({"at": self.seconds()} | json.loads(line))

    def sample(self):
        page = os.sysconf("SC_PAGE_SIZE")
        while not self.over:
            with open(f"/proc/{self.child.pid}/statm") as f:
                self.samples.append((self.seconds(), int(f.read().split()[1]) * page))
            time.sleep(SAMPLE_SECONDS)

    def peak_bytes(self) -> int:
        """The kernel's own high-water mark, which sees what is between two samples. It is some pages behind: see `main`."""
        with open(f"/proc/{self.child.pid}/status") as f:
            return next(int(line.split()[1]) for line in f if line.startswith("VmHWM")) * 1024

    def stop(self):
        self.over = True
        self.threads[1].join()
        self.child.terminate()
        self.child.wait()
        self.threads[0].join()


def client(service: Service, number: int, a, requests: list[dict]):
    chance = random.Random(a.seed + number)
    connection = http.client.HTTPConnection("127.0.0.1", service.port, timeout=120)
    while service.seconds() < a.seconds:
        (name,) = chance.choices(NAMES, POPULARITY)
        begun = service.seconds()
        connection.request("GET", f"/v1/digits/{chance.randrange(10)}?model={name}&seed={chance.randrange(1000)}")
        response = connection.getresponse()
        body = response.read()
        right = response.status != 200 or body.startswith(PNG_MAGIC) and response.getheader("x-model") == name
        requests.append({"at": begun, "model": name, "seconds": service.seconds() - begun, "status": response.status, "right": right})
        time.sleep(chance.uniform(0, 0.3))


def told(event: dict) -> str | None:
    """A line of the trace."""
    message, model = event["message"], event.get("model")
    if message == "weights fetched":
        return f"{model} fetched in {event['fetch_ms']} ms"
    if message == "model ready":
        return f"{model} ready, the process takes {event['resident_mb']} MiB"
    if message == "a model was unloaded to make room":
        return f"{model} unloaded for {event['for_model']}"
    if message.startswith("waits for room"):
        return f"{model} waits for room"
    return message if event["severity"] in ("WARNING", "ERROR") else None


def report(a, service: Service, requests: list[dict], peak: int, budget_mib: int, weights: int) -> str:
    trace = [(e["at"], text) for e in service.events if (text := told(e))]
    ready = sum(e["message"] == "model ready" for e in service.events)
    unloaded = sum(e["message"] == "a model was unloaded to make room" for e in service.events)
    statuses = collections.Counter(r["status"] for r in requests)
    taken = sorted(r["seconds"] * 1e3 for r in requests if r["status"] == 200)
    at = lambda share: f"{harness.number(taken[min(int(share * len(taken)), len(taken) - 1)])} ms" if taken else ""
    highest = max(rss for _, rss in service.samples)
    rows = [
        ["a model's weights", f"{weights / MIB:.0f} MiB"],
        ["budget (MAX_MEMORY_MB)", f"{budget_mib} MiB"],
        [f"most memory, {len(service.samples)} samples", f"{highest / MIB:.0f} MiB"],
        ["most memory, by the kernel (VmHWM)", f"{peak / MIB:.0f} MiB"],
        ["requests", ", ".join(f"{n:,} answered {status}" for status, n in sorted(statuses.items()))],
        ["of each model", ", ".join(f"{name} {sum(r['model'] == name for r in requests):,}" for name in NAMES)],
        ["a digit: median, 90 %, 99 %, longest", f"{at(0.5)}, {at(0.9)}, {at(0.99)}, {at(1)}"],
        ["loads", str(ready)],
        ["unloads", str(unloaded)],
    ]
    lines = [f"{seconds:8.3f} s  {text}" for seconds, text in trace[: a.trace]]
    if len(trace) > a.trace:
        lines.append(f"... and {len(trace) - a.trace} more")
    return f"{harness.table(['', ''], rows)}\n\n" + "\n".join("    " + line for line in lines)


def main():
    a = arguments()
    work = os.path.abspath(a.work) if a.work else tempfile.mkdtemp(prefix="catalogue-", dir=harness.ROOT)
    folder = os.path.join(work, "catalogue")
    os.makedirs(folder, exist_ok=True)
    about = harness.machine()
    try:
        for i, name in enumerate(NAMES):
            path = os.path.join(folder, name + ".safetensors")
            if not os.path.exists(path):
                make = [sys.executable, os.path.join(HERE, "large_model.py"), "--out", path, "--mb", str(a.mb), "--seed", str(a.seed + i)]
                subprocess.run(make, check=True)
            subprocess.run([a.binary, "pack", path], check=True, stdout=subprocess.DEVNULL)
        weights = os.path.getsize(path)
        budget_mib = 2 * -(-weights // MIB) + a.spare_mib
        requests: list[dict] = []
        with stores.Nginx(work) as store:
            service = Service(a, f"http://{store.address}/catalogue/", budget_mib)
            clients = [threading.Thread(target=client, args=(service, i, a, requests)) for i in range(a.clients)]
            for thread in clients:
                thread.start()
            for thread in clients:
                thread.join()
            peak = service.peak_bytes()
            service.stop()
        print(f"{about}\n{a.clients} clients for {a.seconds:.0f} s\n\n{report(a, service, requests, peak, budget_mib, weights)}")
        if a.json:
            with open(a.json, "w") as f:
                json.dump({"machine": about, "budget_mib": budget_mib, "events": service.events, "samples": service.samples, "requests": requests}, f, indent=1)
        if max(peak, *(rss for _, rss in service.samples)) > budget_mib * MIB:
            raise SystemExit("the budget was exceeded")
        if wrong := [r for r in requests if not r["right"]]:
            raise SystemExit(f"{len(wrong)} answers were not what was asked for, such as {wrong[0]}")
    finally:
        if not a.work:
            shutil.rmtree(work, ignore_errors=True)


if __name__ == "__main__":
    main()
