"""What each service does once it is warm: latency of one digit, digits a second, memory while serving.

    cargo build --release --bin image-generator
    python3 tests/bench/warm.py --python .venv/bin/python --rounds 5

Both services run the whole time, and only one is asked at any moment; in each round they take turns. Asked for
are: one digit after the other on one connection; sheets of a hundred digits; single digits by 16 clients at a
time, each with a connection of its own. Every answer is looked at: anything but a PNG ends the benchmark.
Seeds never repeat, so no cache helps. Standard library only.
"""

import argparse
import itertools
import json
import statistics
import threading
import time

import harness
from harness import Connection, Process

FIGURES = {
    "latency_ms": "one digit, median, ms",
    "latency_p90_ms": "one digit, 90th percentile, ms",
    "sheet_per_s": "digits/s, sheets",
    "clients_per_s": "digits/s, clients at a time",
    "clients_ms": "one digit among clients, median, ms",
    "serving_mb": "memory while serving, MB",
    "peak_mb": "peak memory, MB",
}


def arguments():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    harness.add_arguments(p)
    p.add_argument("--rounds", type=int, default=5)
    p.add_argument("--digits", type=int, default=100, help="single digits a round")
    p.add_argument("--sheets", type=int, default=3, help="sheets of 100 a round")
    p.add_argument("--clients", type=int, default=16)
    p.add_argument("--digits-a-client", type=int, default=10)
    return p.parse_args()


def timed(connection: Connection, path: str, body: bytes | None = None) -> float:
    started = time.perf_counter()
    connection.png(path, body)
    return time.perf_counter() - started


def clients(process: Process, a, seeds) -> tuple[float, list[float]]:
    """Digits a second, and what each digit took."""
    connections = [Connection(process) for _ in range(a.clients)]
    times: list[float] = []
    failed: list[BaseException] = []
    barrier = threading.Barrier(a.clients + 1)

    def client(connection: Connection, mine: list[int]):
        barrier.wait()
        try:
            for seed in mine:
                times.append(timed(connection, f"/v1/digits/{seed % 10}?seed={seed}"))
        except BaseException as error:
            failed.append(error)

    shares = [list(itertools.islice(seeds, a.digits_a_client)) for _ in connections]
    threads = [threading.Thread(target=client, args=pair) for pair in zip(connections, shares)]
    for thread in threads:
        thread.start()
    barrier.wait()
    started = time.perf_counter()
    for thread in threads:
        thread.join()
    seconds = time.perf_counter() - started
    for connection in connections:
        connection.close()
    if failed:
        raise failed[0]
    return len(times) / seconds, times


def measure(process: Process, a, seeds) -> dict[str, float]:
    connection = Connection(process)
    singles = [timed(connection, f"/v1/digits/{seed % 10}?seed={seed}") for seed in itertools.islice(seeds, a.digits)]
    sheets = [timed(connection, "/v1/generate", json.dumps({"digits": "0123456789", "count": 10, "seed": seed * 1000}).encode()) for seed in itertools.islice(seeds, a.sheets)]
    connection.close()
    rate, among = clients(process, a, seeds)
    return {
        "latency_ms": statistics.median(singles) * 1e3,
        "latency_p90_ms": statistics.quantiles(singles, n=10)[-1] * 1e3,
        "sheet_per_s": 100 * len(sheets) / sum(sheets),
        "clients_per_s": rate,
        "clients_ms": statistics.median(among) * 1e3,
        "serving_mb": process.memory_mb("VmRSS"),
        "peak_mb": process.memory_mb("VmHWM"),
    }


def main():
    a = arguments()
    sides = [harness.generator(a)] + ([harness.flask(a)] if a.python else [])
    about = harness.machine()
    processes = {side.name: Process(side) for side in sides}
    runs: dict[str, list[dict]] = {side.name: [] for side in sides}
    seeds = itertools.count(1)
    try:
        for process in processes.values():
            connection = Connection(process)
            for seed in itertools.islice(seeds, 20):
                connection.png(f"/v1/digits/{seed % 10}?seed={seed}")
            connection.close()
        for i in range(a.rounds):
            for name in list(processes)[:: -1 if i % 2 else 1]:
                figures = measure(processes[name], a, seeds)
                runs[name].append(figures)
                print(f"round {i + 1}/{a.rounds}  {name}: " + "  ".join(f"{k} {v:.1f}" for k, v in figures.items()), flush=True)
    finally:
        for process in processes.values():
            process.__exit__()

    values = {name: {k: [r[k] for r in all_runs] for k in FIGURES} for name, all_runs in runs.items()}
    print(f"\n{about}; {a.rounds} rounds, {a.clients} clients; median (lowest to highest) of the rounds\n")
    ratios = len(runs) == 2
    rows = []
    for k, text in FIGURES.items():
        line = [text] + [harness.summary(v[k]) for v in values.values()]
        if ratios:
            ours, theirs = (statistics.median(v[k]) for v in values.values())
            # Above 1: image-generator does better.
            line.append(harness.number(ours / theirs if k.endswith("per_s") else theirs / ours) + " x")
        rows.append(line)
    print(harness.table([""] + list(runs) + (["better by"] if ratios else []), rows))
    if a.json:
        with open(a.json, "w") as f:
            json.dump({"machine": about, "runs": runs}, f, indent=1)


if __name__ == "__main__":
    main()
