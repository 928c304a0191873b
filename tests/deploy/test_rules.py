"""Each check finds a deliberate mistake, and says what it is. Run by scripts/check-deploy, which sets DEPLOY_TOOLS."""

import json
import os
import shutil
import subprocess
import tempfile
import unittest
from pathlib import Path

import gcloud_flags
import rules
from rules import ROOT

DEPLOY = "scripts/deploy/"
SERVICE, GPU = "service.yaml", DEPLOY + "cloud-run/service-gpu.yaml"
RENDER, APP, SPACE = DEPLOY + "render/render.yaml", DEPLOY + "digitalocean/app.yaml", DEPLOY + "huggingface/README.md"
AWS, COMPOSE, UNIT = DEPLOY + "aws/template.yaml", DEPLOY + "compose/compose.yaml", DEPLOY + "systemd/image-generator.service"
ERRORS, LOG = DEPLOY + "cloud-run/alerts/errors.json", DEPLOY + "cloud-run/alerts/log.json"

# File, what stands there, what stands there by mistake, what the check says.
MISTAKES = [
    (SERVICE, "containerConcurrency", "containerConcurency", "'containerConcurency' was unexpected"),
    (SERVICE, "run.googleapis.com/startup-cpu-boost", "run.googleapis.com/cpu-boost", "cpu-boost is unknown"),
    (SERVICE, 'boost: "true"', 'boost: "yes"', "expected 'true' or 'false'"),
    (SERVICE, 'maxScale: "20"', "maxScale: 20", "20 is not of type 'string'"),
    (SERVICE, 'minScale: "0"', 'minScale: "21"', "minScale 21 is over maxScale 20"),
    (SERVICE, "memory: ${MEMORY}", "memory: 16Gi", "2 processors may not have 16Gi"),
    (SERVICE, "memory: ${MEMORY}", "memory: 256Mi", "second generation has 512 MiB"),
    (SERVICE, 'cpu: "${CPU}"', 'cpu: "3"', "no instance of 3 processors"),
    (SERVICE, 'cpu: "${CPU}"', 'cpu: "0.5"', "concurrency must be 1"),
    (SERVICE, "failureThreshold: 30", "failureThreshold: 300", "period x threshold is over 240"),
    (SERVICE, "timeoutSeconds: 1\n", "timeoutSeconds: 5\n", "time-out (5 s) is over its period (1 s)"),
    (SERVICE, "/health/startup", "/healthz", "no health path /healthz"),
    (SERVICE, "path: /health/live\n              port: 8080", "path: /health/live\n              port: 5000", "it asks at port 5000"),
    (SERVICE, "timeoutSeconds: 300", "timeoutSeconds: 60", "gives up after 60 s"),
    (SERVICE, "name: MODEL_URI", "name: MODEL_URL", "MODEL_URL is no variable"),
    (SERVICE, 'value: "8"', 'value: "10"', "SIGKILL comes 10 s after"),
    (SERVICE, "${IMAGE}", "${PICTURE}", "nothing fills in ${PICTURE}"),
    (SERVICE, "        - name: image-generator\n", "        - name: image-generator\n          tty: true\n", "'tty' was unexpected"),
    (SERVICE, "latestRevision: true", "latestRevision: yes please", "is not of type 'boolean'"),
    (GPU, "nvidia-l4", "nvidia-t4", "one nvidia-l4"),
    (GPU, 'cpu: "4"', 'cpu: "2"', "4 processors and 16Gi"),
    (GPU, 'cpu-throttling: "false"', 'cpu-throttling: "true"', "cpu-throttling to be off"),
    ("cloudbuild.yaml", "machineType", "machinetype", "'machinetype' was unexpected"),
    ("cloudbuild.yaml", "E2_HIGHCPU_8", "E2_HIGHCPU_9", "E2_HIGHCPU_9"),
    ("cloudbuild.yaml", "_CACHE: ", "_CASH: ", "_CACHE is used and not among"),
    ("cloudbuild.yaml", "- id: push", "- id: test", "two steps have the id test"),
    ("cloudbuild.yaml", "        done\n", "", "syntax error"),
    ("cloudbuild.yaml", "CLOUD_LOGGING_ONLY", "LEGACY", "needs logging"),
    ("cloudbuild.yaml", "${LOCATION}", "${REGION}", "${REGION} is nothing"),
    (ERRORS, "COMPARISON_GT", "GT", "'GT' is not one of"),
    (ERRORS, "request_count", "requests_count", "no such metric"),
    (ERRORS, '"SERVICE_NAME: answers', '"answers', "does not start with"),
    (LOG, "notificationRateLimit", "notificationRatelimit", "'notificationRatelimit' was unexpected"),
    (RENDER, "healthCheckPath", "healthcheckPath", "healthcheckPath is no field"),
    (RENDER, "plan: free", "plan: gratis", "plan is 'gratis'"),
    (RENDER, "maxShutdownDelaySeconds: 30", "maxShutdownDelaySeconds: 600", "expected 1 to 300"),
    (RENDER, 'value: "10000"', 'value: "5000"', "asks at port 10000"),
    (RENDER, 'value: "480"', "value: 480", "not in quotes"),
    (RENDER, 'value: "480"', 'value: "2000"', "has 512 MB"),
    (APP, "http_port: 8080", "http_port: 5000", "asks at port 5000"),
    (APP, "instance_size_slug: apps-s-1vcpu-1gb", "instance_size_slug: tiny", "instance_size_slug"),
    (APP, "drain_seconds: 10", "drain_seconds: 200", "200 is greater than the maximum"),
    (APP, "instance_count: 1", "autoscaling: {min_instance_count: 1, max_instance_count: 4, metrics: {cpu: {percent: 70}}}", "dedicated processors"),
    (APP, "        type: SECRET\n", "", "is no secret"),
    (APP, "rule: RESTART_COUNT", "rule: RESTARTS", "'RESTARTS' is not one of"),
    (SPACE, "app_port: 5000", "app_port: 7860", "the image listens on 5000"),
    (SPACE, "sdk: docker", "sdk: gradio", "sdk is not docker"),
    (SPACE, "colorTo: indigo", "colorTo: violet", "colorTo is 'violet'"),
    (SPACE, "pinned: false", "pined: false", "pined is no field"),
    (AWS, "StopTimeout: 30", "StopTimeout: 20", "SIGKILL comes 20 s after"),
    (AWS, "StopTimeout: 30", "StopTimeout: 300", "2 to 120"),
    (AWS, "StartPeriod: 10", "StartPeriod: 301", "expected 0 to 300"),
    (AWS, "[CMD, /usr/local/bin/image-generator, health]", "[CMD-SHELL, curl localhost]", "has no shell"),
    (AWS, "HealthCheckPath: /health/ready", "HealthCheckPath: /ready", "no health path /ready"),
    (AWS, "Action: s3:GetObject", "Action: s3:*", "may do more"),
    (AWS, "AssumeRolePolicyDocument:", "AssumeRolePolicyDocument: &role", "anchors"),
    (COMPOSE, "read_only: true\n    cap_drop", "readonly: true\n    cap_drop", "'readonly' does not match"),
    (COMPOSE, "    read_only: true\n    cap_drop", "    cap_drop", "not read-only"),
    (COMPOSE, "127.0.0.1:", "", "open to the world"),
    (COMPOSE, "stop_grace_period: 10s", "stop_grace_period: 5s", "SIGKILL comes 5 s after"),
    (COMPOSE, "  cache:\n  certificates", "  certificates", "volume cache is not declared"),
    (UNIT, "TimeoutStopSec=10", "TimeoutStopSec=5", "SIGKILL comes 5 s after"),
    (UNIT, "Environment=MODEL_CACHE_DIR", "Environment=CACHE_DIR", "CACHE_DIR is no variable"),
    (UNIT, "DynamicUser=yes", "User=root", "is root"),
    ("Dockerfile", "USER 65532:65532", "USER nonroot", "USER is no number"),
    ("Dockerfile", 'CMD ["/usr/local/bin/image-generator", "health"]', "CMD image-generator health", "HEALTHCHECK is not"),
    ("Dockerfile", "EXPOSE 5000", "EXPOSE 8080", "EXPOSE is not PORT"),
]


class Mistakes(unittest.TestCase):
    def test_every_file_is_right(self):
        for name, check in rules.FILES.items():
            with self.subTest(name):
                self.assertEqual(check((ROOT / name).read_text()), [])

    def test_every_mistake_is_found(self):
        for name, right, wrong, said in MISTAKES:
            with self.subTest(f"{name}: {wrong}"):
                text = (ROOT / name).read_text()
                self.assertIn(right, text, "the file changed: this mistake can no longer be made")
                self.assertIn(said, "\n".join(rules.FILES[name](text.replace(right, wrong))))

    def test_every_file_has_a_mistake(self):
        made = {m[0].rsplit("/", 1)[0] for m in MISTAKES}
        self.assertLessEqual({n.rsplit("/", 1)[0] for n in rules.FILES}, made)


class Tools(unittest.TestCase):
    """The same for the checks that are programs of others."""

    def complaint(self, file: str, right: str, wrong: str, *command: str) -> str:
        if not shutil.which(command[0]):
            self.skipTest(f"there is no {command[0]}")
        text = (ROOT / file).read_text()
        self.assertIn(right, text)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, Path(file).name)
            path.write_text(text.replace(right, wrong))
            path.chmod(0o755)
            result = subprocess.run([*command, str(path)], capture_output=True, text=True)
        self.assertNotEqual(result.returncode, 0)
        return result.stdout + result.stderr

    def test_hadolint(self):
        self.assertIn("DL3025", self.complaint("Dockerfile", 'ENTRYPOINT ["/usr/local/bin/image-generator"]', "ENTRYPOINT image-generator", "hadolint"))

    def test_cfn_lint(self):
        for right, wrong, code in (('Memory: "4096"', 'Memory: "1024"', "E3047"), ("LogDriver: awslogs", "LogDriver: gelf", "E3"),
                                   ("!GetAtt Service.Name", "!GetAtt Service.Title", "E1010"), ("Cpu: ", "Cpus: ", "E3002")):
            self.assertIn(code, self.complaint(AWS, right, wrong, "cfn-lint"))

    def test_railway(self):
        tools = Path(os.environ.get("DEPLOY_TOOLS", ""), "railway")
        if not (tools / "node_modules").exists():
            self.skipTest("there are no types of Railway")
        file, check = DEPLOY + "railway/.railway/railway.ts", (str(ROOT / "tests/deploy/railway"), str(tools))
        self.assertIn("healthCheckPath", self.complaint(file, "healthcheckPath", "healthCheckPath", *check))
        self.assertIn("MODEL_URL is no variable", self.complaint(file, "MODEL_URI", "MODEL_URL", *check))
        self.assertIn("SIGKILL comes 10 s", self.complaint(file, "drainingSeconds: 30", "drainingSeconds: 10", *check))

    def test_shellcheck(self):
        self.assertIn("SC2086", self.complaint(DEPLOY + "cloud-run/deploy", '--region="$region"', "--region=$region", "shellcheck"))

    def test_the_stand_in_for_gcloud_has_the_flags_of_the_sdk(self):
        # The stand-in itself comes first in no PATH here. Another version of the SDK may have more flags, and not fewer.
        if not (tables := gcloud_flags.sdk_tables()):
            self.skipTest("there is no Google Cloud SDK")
        ours = json.loads(gcloud_flags.FILE.read_text())["commands"]
        for command, known in gcloud_flags.flags(tables, list(ours))["commands"].items():
            self.assertLessEqual(set(ours[command]), set(known), command)

    def test_systemd(self):
        self.assertIn("ProtectSystems", self.complaint(UNIT, "ProtectSystem=", "ProtectSystems=", "systemd-analyze", "verify"))


if __name__ == "__main__":
    unittest.main()
