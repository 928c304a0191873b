"""How long each service takes from process start to its first answer and to its first digit, and its memory.

    cargo build --release --example bare_hyper --bin image-generator
    python3 tests/bench/start.py --python .venv/bin/python --rounds 11 --flask-rounds 5

Each round starts every side twice: once for the first answer of /health/live, then, after half a second at rest,
idle memory; once for the first digit, asked for on the first connection there is, then ten more digits, then
memory while serving and the peak. Rounds of all sides interleave, so that what else the machine does falls on all
of them. Nothing is warmed but the page cache: --drop-first leaves the first round out, which fills it. Standard
library only.
"""

import argparse
import json
import statistics
import time

import harness
from harness import Connection, Process, Side

FIGURES = {
    "live_ms": "first answer, ms",
    "digit_ms": "first digit, ms",
    "idle_mb": "memory idle, MB",
    "serving_mb": "memory after digits, MB",
    "peak_mb": "peak memory, MB",
}


def arguments():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    harness.add_arguments(p)
    p.add_argument("--rounds", type=int, default=11)
    p.add_argument("--flask-rounds", type=int, default=5, help="it takes part in the first so many rounds")
    p.add_argument("--drop-first", action=argparse.BooleanOptionalAction, default=True)
    return p.parse_args()


def measure(side: Side) -> dict[str, float]:
    with Process(side) as process:
        connection = Connection(process)
        connection.request("/health/live")
        out = {"live_ms": process.seconds() * 1e3}
        time.sleep(0.5)
        out["idle_mb"] = process.memory_mb("VmRSS")
        if not side.draws:
            out["peak_mb"] = process.memory_mb("VmHWM")
            return out
    with Process(side) as process:
        connection = Connection(process)
        connection.png("/v1/digits/7")
        out["digit_ms"] = process.seconds() * 1e3
        for seed in range(10):
            connection.png(f"/v1/digits/{seed}?seed={seed}")
        out["serving_mb"] = process.memory_mb("VmRSS")
        out["peak_mb"] = process.memory_mb("VmHWM")
    return out


def main():
    a = arguments()
    sides = [harness.bare(a), harness.generator(a)] + ([harness.flask(a)] if a.python else [])
    about = harness.machine()
    runs: dict[str, list[dict]] = {side.name: [] for side in sides}
    skip = 1 if a.drop_first else 0
    for i in range(a.rounds + skip):
        # The order turns, so that no side always follows the same one.
        for side in sides[i % len(sides) :] + sides[: i % len(sides)]:
            if side.name.startswith("Flask") and i >= a.flask_rounds + skip:
                continue
            figures = measure(side)
            if i >= skip:
                runs[side.name].append(figures)
            print(f"round {i + 1 - skip}/{a.rounds}  {side.name}: " + "  ".join(f"{k} {v:.1f}" for k, v in figures.items()), flush=True)

    values = {name: {k: [r[k] for r in all_runs if k in r] for k in FIGURES} for name, all_runs in runs.items()}
    print(f"\n{about}; median (lowest to highest)\n")
    header = [""] + [f"{name}, {len(runs[name])} rounds" for name in runs]
    print(harness.table(header, [[text] + [harness.summary(values[name][k]) for name in runs] for k, text in FIGURES.items()]))
    print()
    for other in (name for name in runs if name != "image-generator"):
        parts = []
        for k, text in FIGURES.items():
            if values[other][k]:
                ratio = statistics.median(values[other][k]) / statistics.median(values["image-generator"][k])
                parts.append(f"{text.split(',')[0]} {harness.number(ratio)} x")
        print(f"{other} / image-generator: " + ", ".join(parts))
    if a.json:
        with open(a.json, "w") as f:
            json.dump({"machine": about, "runs": runs}, f, indent=1)


if __name__ == "__main__":
    main()
