"""What a month costs and how long requests wait: this service and the Flask one, behind an autoscaler that goes to zero,
against virtual machines that are always on.

    python3 scripts/deploy/sizing/simulate.py                    # prints the table
    python3 scripts/deploy/sizing/simulate.py --write            # into README.md and sizing.svg beside this file
    python3 scripts/deploy/sizing/simulate.py --ours.digits_per_s 300 --platform_s 1

Requests, of one digit each, come in visits: a Poisson process, three requests a visit on average, two seconds apart. An
instance shares its processors among what it draws (processor sharing, never faster than one digit alone). The autoscaler
starts an instance when a request finds none with room, and otherwise as many as keep the processors at 60 %; it ends
those that had nothing to do for 15 minutes. Each row ends after a number of requests, and is scaled to a month; a row
above one request a second begins with the instances that it needs. The same seed gives the same table. Standard library
only.
"""

import argparse
import heapq
import math
import random
from collections import deque
from dataclasses import dataclass, fields, replace
from pathlib import Path

HERE = Path(__file__).resolve().parent
MONTH_S = 30 * 86400

# List prices in US dollars of November 2026, region europe-west1 or us-central1, without discounts.
CLOUD_RUN_BY_REQUEST = {"processor_s": 0.000024, "gib_s": 0.0000025, "request": 0.40e-6}
CLOUD_RUN_FREE = {"processor_s": 180_000, "gib_s": 360_000, "request": 2_000_000}
CLOUD_RUN_BY_INSTANCE = {"processor_s": 0.000018, "gib_s": 0.000002}
# e2-standard-2: 2 processors, 8 GB.
MACHINE_MONTH = 0.067006 * 730


@dataclass(frozen=True)
class Service:
    """Measured on two processors; see the README's benchmarks."""

    name: str
    # From the start of the process to the end of its first digit.
    start_s: float
    digits_per_s: float
    one_digit_s: float
    memory_gib: float
    concurrency: int = 32
    processors: int = 2


OURS = Service("image-generator", 0.15, 400, 0.0025, 0.5)
LARGE = replace(OURS, name="image-generator, 700 MB in a bucket", start_s=0.9, memory_gib=1)
FLASK = Service("Flask + PyTorch", 1.6, 129, 0.032, 1)

RATES = [("10 a day", 10 / 86400), ("100 a day", 100 / 86400), ("1,000 a day", 1000 / 86400), ("10,000 a day", 10000 / 86400),
         ("1 a second", 1), ("10 a second", 10), ("100 a second", 100), ("1,000 a second", 1000), ("10,000 a second", 10000)]


@dataclass
class Traffic:
    requests: int = 20_000
    per_visit: float = 3
    apart_s: float = 2

    def arrivals(self, rate: float, rng: random.Random) -> tuple[list[float], float]:
        """Times of requests from 0 on, and where they end."""
        # Visits that began earlier are still going on at 0.
        end, visit, times = self.requests / rate, -10 * self.apart_s, []
        while (visit := visit + rng.expovariate(rate / self.per_visit)) < end:
            at = visit
            times.append(at)
            # A visit goes on with the probability that makes its mean per_visit.
            while rng.random() < 1 - 1 / self.per_visit:
                at += rng.expovariate(1 / self.apart_s)
                times.append(at)
        return sorted(t for t in times if 0 <= t < end), end


@dataclass
class Scaler:
    """Cloud Run's, in outline."""

    # From a request that finds no instance to the start of the process: Google's part, assumed.
    platform_s: float = 0.4
    utilization: float = 0.6
    idle_s: float = 900
    window_s: float = 10
    to_zero: bool = True


class Instance:
    """Processor sharing in virtual time: every request is one unit of work, all have the same share."""

    def __init__(self, ready: float, service: Service, now: float):
        self.ready, self.service, self.begun = ready, service, now
        self.queue: deque = deque()  # (virtual end, arrival)
        self.work, self.at, self.busy_since, self.busy_s = 0.0, ready, None, 0.0
        self.idle_since, self.version = ready, 0

    def speed(self) -> float:
        return min(1 / self.service.one_digit_s, self.service.digits_per_s / len(self.queue))

    def advance(self, now: float):
        if now > self.at:
            if self.queue:
                self.work += (now - self.at) * self.speed()
            self.at = now

    def add(self, arrival: float, now: float):
        self.advance(now)
        if self.busy_since is None:
            # Paid from the moment that it starts for a request.
            self.busy_since = now if now < self.ready else max(now, self.ready)
        self.queue.append((self.work + 1, arrival))
        self.version += 1

    def next_end(self) -> float:
        return self.at + max(0.0, self.queue[0][0] - self.work) / self.speed()

    def finish(self, now: float) -> float:
        self.advance(now)
        _, arrival = self.queue.popleft()
        self.version += 1
        if not self.queue:
            # Rounded up to 100 ms, as it is paid.
            self.busy_s += math.ceil((now - self.busy_since) * 10 - 1e-9) / 10
            self.busy_since, self.idle_since = None, now
        return arrival


@dataclass
class Result:
    p50_s: float
    p99_s: float
    cold_share: float
    instances: float
    instances_max: int
    cost_month: float


def simulate(service: Service, rate: float, traffic: Traffic, scaler: Scaler, seed: int) -> Result:
    arrivals, span = traffic.arrivals(rate, random.Random(f"{seed} {rate}"))
    steady = max(1, math.ceil(rate / (scaler.utilization * service.digits_per_s)))
    live: list[Instance] = []
    if not scaler.to_zero or rate > 1:
        live = [Instance(0.0, service, 0.0) for _ in range(steady)]
    ended_s = ended_busy_s = 0.0
    latencies, cold, instances_max = [], 0, len(live)
    recent: deque = deque()
    ends: list = []  # (time, number, instance, version)
    number = 0

    def push(instance: Instance):
        nonlocal number
        number += 1
        heapq.heappush(ends, (instance.next_end(), number, instance, instance.version))

    def run_until(limit: float):
        while ends and ends[0][0] <= limit:
            at, _, instance, version = heapq.heappop(ends)
            if version != instance.version:
                continue
            latencies.append(at - instance.finish(at))
            if instance.queue:
                push(instance)

    for now in arrivals:
        run_until(now)
        if scaler.to_zero:
            kept = []
            for instance in live:
                if not instance.queue and now - instance.idle_since > scaler.idle_s:
                    ended_s += instance.idle_since + scaler.idle_s - instance.begun
                    ended_busy_s += instance.busy_s
                else:
                    kept.append(instance)
            live = kept
            recent.append(now)
            while recent[0] < now - scaler.window_s:
                recent.popleft()
            wanted = math.ceil(len(recent) / scaler.window_s / (scaler.utilization * service.digits_per_s)) if rate > 1 and now > scaler.window_s else 0
            while len(live) < wanted:
                live.append(Instance(now + scaler.platform_s + service.start_s, service, now))
        # The least busy one that is ready; one that is on its way only when all others are full.
        room = [i for i in live if len(i.queue) < service.concurrency]
        chosen = min(room, key=lambda i: (i.ready > now, len(i.queue))) if room else None
        if chosen is None and scaler.to_zero:
            chosen = Instance(now + scaler.platform_s + service.start_s, service, now)
            live.append(chosen)
        elif chosen is None:
            chosen = min(live, key=lambda i: len(i.queue))
        cold += chosen.ready > now
        chosen.add(now, now)
        push(chosen)
        instances_max = max(instances_max, len(live))
    run_until(math.inf)

    scale = MONTH_S / span
    alive_s = ended_s + sum(min(span, i.idle_since + scaler.idle_s) - i.begun for i in live)
    busy_s = ended_busy_s + sum(i.busy_s for i in live)
    if scaler.to_zero:
        by_request = {"processor_s": busy_s * scale * service.processors, "gib_s": busy_s * scale * service.memory_gib, "request": len(arrivals) * scale}
        by_instance = {"processor_s": alive_s * scale * service.processors, "gib_s": alive_s * scale * service.memory_gib}
        cost = min(sum(max(0, used - CLOUD_RUN_FREE[k]) * CLOUD_RUN_BY_REQUEST[k] for k, used in by_request.items()),
                   sum(used * CLOUD_RUN_BY_INSTANCE[k] for k, used in by_instance.items()))
    else:
        cost = len(live) * MACHINE_MONTH
    latencies.sort()
    return Result(latencies[len(latencies) // 2], latencies[int(len(latencies) * 0.99)], cold / len(arrivals), alive_s / span, instances_max, cost)


# ---- what is shown ----

def milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:,.0f}"


def dollars(cost: float) -> str:
    return "0" if cost < 0.005 else f"{cost:,.2f}" if cost < 10 else f"{cost:,.0f}"


def table(rows: list) -> str:
    head = ("| requests | service | instances (most) | cold | p50, ms | p99, ms | Cloud Run, $ a month | always on, $ a month | its p99, ms |\n"
            "| --- | --- | --- | --- | --- | --- | --- | --- | --- |\n")
    return head + "".join(
        f"| {label} | {s.name} | {r.instances:,.2f} ({r.instances_max}) | {r.cold_share:.2%} | {milliseconds(r.p50_s)} | {milliseconds(r.p99_s)} | {dollars(r.cost_month)} | {dollars(v.cost_month)} | {milliseconds(v.p99_s)} |\n"
        for label, _, s, r, v in rows)


COLOURS = {"image-generator": "#0b6e4f", "image-generator, 700 MB in a bucket": "#7a5c00", "Flask + PyTorch": "#a4161a"}


def svg(rows: list) -> str:
    width, height, left, top, gap = 900, 380, 70, 40, 90
    panel = (width - 2 * left - gap) / 2
    bottom = height - 90
    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" font-family="sans-serif" font-size="12" fill="#222">'
             f'<rect width="{width}" height="{height}" fill="#fff"/>']
    rates = sorted({rate for _, rate, *_ in rows})
    names = {rate: label for label, rate, *_ in rows}

    def draw(x0: float, title: str, low: float, high: float, unit, lines: list):
        x = lambda rate: x0 + (math.log10(rate) - math.log10(rates[0])) / (math.log10(rates[-1]) - math.log10(rates[0])) * panel  # noqa: E731
        y = lambda value: bottom - (math.log10(max(value, low)) - math.log10(low)) / (math.log10(high) - math.log10(low)) * (bottom - top)  # noqa: E731
        parts.append(f'<text x="{x0}" y="{top - 16}" font-weight="bold">{title}</text>')
        for power in range(round(math.log10(low)), round(math.log10(high)) + 1):
            parts.append(f'<line x1="{x0}" x2="{x0 + panel}" y1="{y(10**power):.1f}" y2="{y(10**power):.1f}" stroke="#ddd"/>'
                         f'<text x="{x0 - 6}" y="{y(10**power) + 4:.1f}" text-anchor="end">{unit(power)}</text>')
        for rate in rates[::2]:
            parts.append(f'<text x="{x(rate):.1f}" y="{bottom + 18}" text-anchor="middle" font-size="10">{names[rate]}</text>')
        for colour, dash, points in lines:
            path = " ".join(f"{x(rate):.1f},{y(value):.1f}" for rate, value in points)
            parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"{dash and " stroke-dasharray=" + chr(34) + dash + chr(34)}/>')

    def lines(of, dashed_of):
        made = []
        for name, colour in COLOURS.items():
            mine = [(rate, r, v) for _, rate, s, r, v in rows if s.name == name]
            made.append((colour, "", [(rate, of(r)) for rate, r, _ in mine]))
            if "700" not in name:
                made.append((colour, "3 4", [(rate, dashed_of(v)) for rate, _, v in mine]))
        return made

    draw(left, "US dollars a month (at the bottom: nothing)", 0.1, 1e5, lambda p: f"{10.0**p:g}" if p > -1 else "0", lines(lambda r: r.cost_month, lambda v: v.cost_month))
    draw(left + panel + gap, "p99, ms", 1, 1e4, lambda p: f"{10**p:,}", lines(lambda r: r.p99_s * 1e3, lambda v: v.p99_s * 1e3))
    for i, (name, colour) in enumerate(COLOURS.items()):
        parts.append(f'<line x1="{left + i * 270}" x2="{left + 24 + i * 270}" y1="{height - 34}" y2="{height - 34}" stroke="{colour}" stroke-width="2"/>'
                     f'<text x="{left + 30 + i * 270}" y="{height - 30}">{name}</text>')
    parts.append(f'<text x="{left}" y="{height - 10}" fill="#555">solid: Cloud Run, to zero; dotted: machines that are always on</text></svg>\n')
    return "".join(parts)


def arguments() -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--seed", type=int, default=2026)
    p.add_argument("--write", action="store_true", help="into README.md and sizing.svg")
    for prefix, default in (("ours.", OURS), ("large.", LARGE), ("flask.", FLASK), ("", Scaler()), ("", Traffic())):
        for field in fields(default):
            value = getattr(default, field.name)
            if not isinstance(value, (str, bool)):
                p.add_argument(f"--{prefix}{field.name}", type=type(value) if prefix == "" else float, default=value, help=f"default: {value}")
    return p.parse_args()


def main():
    a = vars(arguments())
    services = [replace(s, **{f.name: type(getattr(s, f.name))(a[f"{prefix}.{f.name}"]) for f in fields(s) if f.name != "name"})
                for prefix, s in (("ours", OURS), ("large", LARGE), ("flask", FLASK))]
    scaler = Scaler(**{f.name: a[f.name] for f in fields(Scaler) if f.name in a})
    traffic = Traffic(**{f.name: a[f.name] for f in fields(Traffic)})
    rows = [(label, rate, s, simulate(s, rate, traffic, scaler, a["seed"]), simulate(s, rate, traffic, replace(scaler, to_zero=False), a["seed"]))
            for label, rate in RATES for s in services]
    text = table(rows)
    print(text, end="")
    if a["write"]:
        page = HERE / "README.md"
        before, rest = page.read_text().split("<!-- table -->\n")[::2]
        page.write_text(f"{before}<!-- table -->\n{text}<!-- table -->\n{rest}")
        (HERE / "sizing.svg").write_text(svg(rows))


if __name__ == "__main__":
    main()
