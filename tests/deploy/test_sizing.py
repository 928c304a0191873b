"""What must hold of the simulation whatever its figures are."""

import random
import sys
import unittest
from dataclasses import replace

from rules import ROOT

sys.path.insert(0, str(ROOT / "scripts/deploy/sizing"))
import simulate  # noqa: E402
from simulate import FLASK, OURS, Scaler, Traffic  # noqa: E402

TRAFFIC, SCALER = Traffic(requests=2000), Scaler()


class Sizing(unittest.TestCase):
    def run_at(self, rate: float, service=OURS, scaler=SCALER, traffic=TRAFFIC):
        return simulate.simulate(service, rate, traffic, scaler, seed=1)

    def test_traffic_has_the_rate_that_it_is_given(self):
        for rate in (0.01, 100):
            times, end = Traffic(requests=50_000).arrivals(rate, random.Random(1))
            self.assertAlmostEqual(len(times) / end / rate, 1, delta=0.05)

    def test_the_same_seed_gives_the_same(self):
        self.assertEqual(self.run_at(0.001), self.run_at(0.001))

    def test_lone_requests_are_all_cold_and_wait_for_just_that(self):
        result = self.run_at(1e-6, traffic=replace(TRAFFIC, per_visit=1))
        self.assertGreater(result.cold_share, 0.99)
        self.assertAlmostEqual(result.p50_s, SCALER.platform_s + OURS.start_s + OURS.one_digit_s)
        self.assertEqual((result.cost_month, result.instances_max), (0, 1))

    def test_machines_that_are_always_on_are_never_cold_and_never_free(self):
        result = self.run_at(1e-6, scaler=replace(SCALER, to_zero=False))
        self.assertEqual(result.cold_share, 0)
        self.assertAlmostEqual(result.cost_month, simulate.MACHINE_MONTH)

    def test_instances_follow_the_throughput(self):
        ours, flask = self.run_at(10_000, traffic=Traffic(requests=20_000)), self.run_at(10_000, FLASK, traffic=Traffic(requests=20_000))
        self.assertAlmostEqual(flask.instances / ours.instances, OURS.digits_per_s / FLASK.digits_per_s, delta=0.2)
        self.assertGreater(flask.cost_month, 2 * ours.cost_month)

    def test_a_share_of_the_processors_is_never_more_than_all_of_them(self):
        # One instance, and requests faster than it draws: they take what it takes to draw them all.
        service = replace(OURS, digits_per_s=100, concurrency=10**9)
        instance = simulate.Instance(0, service, 0)
        for _ in range(200):
            instance.add(0, 0)
        while instance.queue:
            last = instance.next_end()
            instance.finish(last)
        self.assertAlmostEqual(last, 2)


if __name__ == "__main__":
    unittest.main()
