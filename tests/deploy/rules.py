"""Checks the platforms' files: official schemas, and what those let pass.

    python tests/deploy/rules.py                 # every file
    python tests/deploy/rules.py service.yaml    # some
    python tests/deploy/rules.py railway GRAPH   # what .railway/railway.ts evaluates to, as JSON

Needs PyYAML and jsonschema. A rule states a limit of a platform that its schema does not, or that two files agree: every
variable is one that the service reads, every health path one that it answers, and it is drained before it is killed.
"""

import json
import re
import subprocess
import sys
from pathlib import Path

import jsonschema
import yaml

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent

# Read by the stores, not by config.rs.
CREDENTIALS = {"AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_REGION", "AWS_ENDPOINT_URL", "HF_TOKEN", "HF_ENDPOINT"}
PLACEHOLDERS = {
    "SERVICE": "image-generator",
    "SERVICE_ACCOUNT": "image-generator-run@project.iam.gserviceaccount.com",
    "IMAGE": "europe-west1-docker.pkg.dev/project/image-generator/image-generator:1",
    "MODEL_URI": "gs://project-image-generator-models/0123/model.safetensors",
    "MODEL_SHA256": "0" * 64,
    "PROJECT": "project",
    "CPU": "2",
    "MEMORY": "1Gi",
    "SECRETS": "",
    "NAMES": "",
}


def variables() -> dict[str, str]:
    """Every variable that the service reads, with its default."""
    text = (ROOT / "src/config.rs").read_text()
    return dict(re.findall(r'variable\(\s*"([A-Z0-9_]+)",\s*"([^"]*)"', text))


def health_paths() -> set[str]:
    return set(re.findall(r'"(/health/[a-z]+)"', "".join(p.read_text() for p in (ROOT / "src/server").glob("*.rs"))))


def schema(name: str, value) -> list[str]:
    document = json.loads((HERE / "schemas" / f"{name}.json").read_text())
    validator = jsonschema.validators.validator_for(document, jsonschema.Draft202012Validator)(document)
    return [f"{'.'.join(map(str, e.absolute_path)) or 'top'}: {e.message[:300]}" for e in validator.iter_errors(value)]


class Environment:
    """The variables that a file sets, and what must hold between them and the platform's own times."""

    def __init__(self, values: dict):
        self.values = {k: str(v) for k, v in values.items() if v is not None}

    def problems(self, port: int | None, grace_secs: float, request_secs: float | None = None) -> list[str]:
        known, found = variables(), []
        for name in self.values:
            if name not in known and name not in CREDENTIALS:
                found.append(f"{name} is no variable of the service")
        if port is not None and self.seconds("PORT", known) != port:
            found.append(f"the platform asks at port {port}, the service listens on {self.values.get('PORT', known['PORT'])}")
        drain = self.seconds("DRAIN_SECS", known)
        if drain >= grace_secs:
            found.append(f"SIGKILL comes {grace_secs:g} s after SIGTERM, and DRAIN_SECS is {drain:g}")
        if request_secs is not None and self.seconds("REQUEST_TIMEOUT_SECS", known) >= request_secs:
            found.append(f"the platform gives up after {request_secs:g} s, and REQUEST_TIMEOUT_SECS is {self.seconds('REQUEST_TIMEOUT_SECS', known):g}")
        return found

    def seconds(self, name: str, known: dict[str, str]) -> float:
        try:
            return float(self.values.get(name) or known[name])
        except ValueError:
            return -1


def path_problems(path: str | None) -> list[str]:
    return [] if path in health_paths() else [f"the service answers no health path {path}"]


# ---- Cloud Run, Knative ----

# Where each annotation may stand (run.v1, revision 20261031), those that this project could want.
SERVICE_ANNOTATIONS = {"run.googleapis.com/" + n for n in (
    "binary-authorization", "custom-audiences", "default-url-disabled", "description", "ingress", "invoker-iam-disabled",
    "launch-stage", "maxScale", "minScale", "scalingMode", "manualInstanceCount")}
REVISION_ANNOTATIONS = {"autoscaling.knative.dev/maxScale", "autoscaling.knative.dev/minScale"} | {"run.googleapis.com/" + n for n in (
    "container-dependencies", "cpu-throttling", "encryption-key", "execution-environment", "gpu-zonal-redundancy-disabled",
    "health-check-disabled", "network-interfaces", "secrets", "sessionAffinity", "startup-cpu-boost", "vpc-access-connector",
    "vpc-access-egress")}
# Processors and the memory that they may have, in MiB.
CLOUD_RUN_MEMORY = {1: (128, 4096), 2: (128, 8192), 4: (2048, 16384), 6: (4096, 24576), 8: (4096, 32768)}
GRACE_SECS = 10


def fill(text: str) -> str:
    return re.sub(r"\$\{([A-Z0-9_]+)\}", lambda m: PLACEHOLDERS.get(m[1], m[0]), text)


def mebibytes(quantity: str) -> float:
    number, unit = re.fullmatch(r"([0-9.]+)(Ki|Mi|Gi|M|G)", quantity).groups()
    return float(number) * {"Ki": 1 / 1024, "Mi": 1, "Gi": 1024, "M": 1e6 / 2**20, "G": 1e9 / 2**20}[unit]


def probe_problems(name: str, probe: dict, port: int) -> list[str]:
    found = path_problems(probe.get("httpGet", {}).get("path"))
    period, timeout = probe.get("periodSeconds", 10), probe.get("timeoutSeconds", 1)
    if probe["httpGet"].get("port", port) != port:
        found.append(f"it asks at port {probe['httpGet']['port']}, the container listens on {port}")
    if timeout > period:
        found.append(f"its time-out ({timeout} s) is over its period ({period} s)")
    if name == "startupProbe":
        if period * probe.get("failureThreshold", 3) > 240:
            found.append("period x threshold is over 240 s")
        if probe.get("initialDelaySeconds", 0) > 240:
            found.append("initialDelaySeconds is over 240")
    return [f"{name}: {p}" for p in found]


def cloud_run(text: str) -> list[str]:
    text = fill(text)
    service = yaml.safe_load(text)
    found = schema("cloud-run-service", service)
    left = re.search(r"\$\{\w+\}", re.sub(r"(?m)^ *#.*", "", text))
    if left:
        found.append(f"nothing fills in {left[0]}")
    if found:
        return found
    template = service["spec"]["template"]
    notes, spec = template["metadata"].get("annotations", {}), template["spec"]
    for allowed, given in ((SERVICE_ANNOTATIONS, service["metadata"].get("annotations", {})), (REVISION_ANNOTATIONS, notes)):
        found += [f"annotation {name} is unknown, or stands in the wrong place" for name in given if name not in allowed]
    for name, value in notes.items():
        if name.endswith(("cpu-boost", "throttling", "disabled")) and value not in ("true", "false"):
            found.append(f"annotation {name} is {value!r}, expected 'true' or 'false'")
        if name.endswith("Scale") and not value.isdecimal():
            found.append(f"annotation {name} is {value!r}, expected a number in quotes")
    low, high = (notes.get(f"autoscaling.knative.dev/{n}Scale", d) for n, d in (("min", "0"), ("max", "100")))
    if low.isdecimal() and high.isdecimal() and int(low) > int(high):
        found.append(f"minScale {low} is over maxScale {high}")
    if notes.get("run.googleapis.com/execution-environment") not in (None, "gen1", "gen2"):
        found.append("execution-environment is neither gen1 nor gen2")

    container = spec["containers"][0]
    limits, port = container["resources"]["limits"], container["ports"][0]["containerPort"]
    if not re.fullmatch(r"[0-9.]+", limits["cpu"]) or not re.fullmatch(r"[0-9.]+(Ki|Mi|Gi|M|G)", limits["memory"]):
        return [*found, f"resources: {limits} are no quantities of processors and memory"]
    processors, memory = float(limits["cpu"]), mebibytes(limits["memory"])
    if processors < 1:
        if spec.get("containerConcurrency") != 1:
            found.append("under one processor the concurrency must be 1")
    elif processors not in CLOUD_RUN_MEMORY:
        found.append(f"there is no instance of {processors:g} processors")
    elif not CLOUD_RUN_MEMORY[processors][0] <= memory <= CLOUD_RUN_MEMORY[processors][1]:
        found.append(f"{processors:g} processors may not have {limits['memory']}")
    if notes.get("run.googleapis.com/execution-environment") == "gen2" and memory < 512:
        found.append("the second generation has 512 MiB at least")
    if "nvidia.com/gpu" in limits:
        if limits["nvidia.com/gpu"] != "1" or spec.get("nodeSelector", {}).get("run.googleapis.com/accelerator") != "nvidia-l4":
            found.append("a GPU is one nvidia-l4, which the nodeSelector names")
        if processors < 4 or memory < 16384:
            found.append("an L4 needs 4 processors and 16Gi")
        if notes.get("run.googleapis.com/cpu-throttling") != "false":
            found.append("a GPU needs cpu-throttling to be off")
    elif "nodeSelector" in spec:
        found.append("the nodeSelector asks for a GPU, and the limits do not")
    if not 1 <= spec.get("containerConcurrency", 80) <= 1000:
        found.append("containerConcurrency is not within 1 to 1000")
    if not 1 <= spec.get("timeoutSeconds", 300) <= 3600:
        found.append("timeoutSeconds is not within 1 to 3600")
    for name in ("startupProbe", "livenessProbe", "readinessProbe"):
        if name in container:
            found += probe_problems(name, container[name], port)
    env = {e["name"]: e.get("value", "") for e in container.get("env", [])}
    if "PORT" in env:
        found.append("PORT is the platform's to set")
    # It gets the container's port as PORT.
    return found + Environment(env | {"PORT": port}).problems(port, GRACE_SECS, spec.get("timeoutSeconds", 300))


def knative(text: str) -> list[str]:
    return schema("knative-service", yaml.safe_load(fill(text)))


def alert_policy(text: str) -> list[str]:
    policy = json.loads(text)
    found = schema("alert-policy", policy)
    if not policy.get("displayName", "").startswith("SERVICE_NAME: "):
        found.append("displayName does not start with `SERVICE_NAME: `, by which the script finds it again")
    metrics = {"request_count", "request_latencies", "container/memory/utilizations", "container/instance_count"}
    for condition in policy.get("conditions", []):
        threshold = condition.get("conditionThreshold", {})
        for text in filter(None, (threshold.get("filter"), threshold.get("denominatorFilter"))):
            name = re.search(r'metric\.type = "run\.googleapis\.com/([^"]+)"', text)
            if not name or name[1] not in metrics:
                found.append(f"there is no such metric: {text}")
            if 'resource.labels.service_name = "SERVICE_NAME"' not in text:
                found.append(f"a filter is not about this service: {text}")
        if "conditionMatchedLog" in condition and "notificationRateLimit" not in policy.get("alertStrategy", {}):
            found.append("a policy about log lines needs a notificationRateLimit")
    return found


def cloud_build(text: str) -> list[str]:
    build = yaml.safe_load(text)
    found = schema("cloud-build", build) + schema("cloud-build-schemastore", build)
    own, used = set(build.get("substitutions", {})), set(re.findall(r"\$\{?(_[A-Z0-9_]+)", text))
    builtin = {"PROJECT_ID", "PROJECT_NUMBER", "LOCATION", "BUILD_ID", "COMMIT_SHA", "SHORT_SHA", "TRIGGER_NAME"}
    found += [f"{name} is used and not among the substitutions" for name in sorted(used - own)]
    found += [f"{name} is a substitution that nothing uses" for name in sorted(own - used)]
    found += [f"${{{name}}} is nothing that Cloud Build knows" for name in sorted(set(re.findall(r"(?<!\$)\$\{([A-Z]\w*)\}", text)) - builtin)]
    ids = [step.get("id") for step in build.get("steps", [])]
    found += [f"two steps have the id {i}" for i in {i for i in ids if ids.count(i) > 1}]
    for step in build.get("steps", []):
        found += [f"step {step.get('id')} waits for {w}, which does not come before it" for w in step.get("waitFor", [])
                  if w != "-" and w not in ids[: ids.index(step.get("id"))]]
        if step.get("entrypoint") == "bash" and step["args"][-2:-1] == ["-euc"]:
            bash = subprocess.run(["bash", "-n"], input=step["args"][-1].replace("${_", "${A_"), capture_output=True, text=True)
            if bash.returncode:
                found.append(f"step {step.get('id')}: {bash.stderr.strip()}")
    if build.get("options", {}).get("logging") not in ("CLOUD_LOGGING_ONLY", "NONE") and "logsBucket" not in build:
        found.append("a build account of one's own needs logging: CLOUD_LOGGING_ONLY, or a bucket")
    return found


# ---- the others ----

RENDER_SERVICE = {"type", "name", "runtime", "plan", "region", "branch", "repo", "dockerfilePath", "dockerContext", "dockerCommand",
                  "autoDeployTrigger", "buildFilter", "healthCheckPath", "maxShutdownDelaySeconds", "numInstances", "scaling",
                  "disk", "domains", "envVars", "image", "previews", "rootDir"}
RENDER_PLANS = {"free", "starter", "standard", "pro", "pro plus", "pro max", "pro ultra"}
RENDER_REGIONS = {"oregon", "ohio", "virginia", "frankfurt", "singapore"}


def render(text: str) -> list[str]:
    found = []
    for service in yaml.safe_load(text)["services"]:
        found += [f"{name} is no field of a service" for name in service if name not in RENDER_SERVICE]
        for name, allowed in (("type", {"web"}), ("runtime", {"docker"}), ("plan", RENDER_PLANS), ("region", RENDER_REGIONS),
                              ("autoDeployTrigger", {"commit", "checksPass", "off"})):
            if service.get(name) not in allowed:
                found.append(f"{name} is {service.get(name)!r}, expected {sorted(allowed)}")
        grace = service.get("maxShutdownDelaySeconds", 30)
        if not 1 <= grace <= 300:
            found.append(f"maxShutdownDelaySeconds is {grace}, expected 1 to 300")
        for name in ("dockerfilePath", "dockerContext"):
            if not (ROOT / service[name]).exists():
                found.append(f"{name}: there is no {service[name]}")
        if service["plan"] == "free" and ("disk" in service or "scaling" in service):
            found.append("the free plan has neither a disk nor scaling")
        for entry in service["envVars"]:
            if set(entry) - {"key", "value", "sync", "generateValue", "fromService", "fromDatabase"} or ("value" in entry) == ("sync" in entry):
                found.append(f"a variable is neither a value nor asked for: {entry}")
            if "value" in entry and not isinstance(entry["value"], str):
                found.append(f"{entry['key']}: the value is not in quotes")
        env = {e["key"]: e.get("value", "") for e in service["envVars"]}
        found += path_problems(service.get("healthCheckPath")) + Environment(env).problems(10000, grace)
        if service["plan"] == "free" and not 0 < float(env.get("MAX_MEMORY_MB") or 0) <= 512:
            found.append("the free plan has 512 MB, which MAX_MEMORY_MB must say")
    return found


def digitalocean(text: str) -> list[str]:
    app = yaml.safe_load(text)
    found = schema("digitalocean-app", app)
    if found:
        return found
    for service in app["services"]:
        env = {e["key"]: e.get("value", "") for e in service["envs"]}
        stop = service.get("termination", {})
        if stop.get("drain_seconds", 15) > 110 or stop.get("grace_period_seconds", 120) > 600:
            found.append("drain_seconds is 110 at most, grace_period_seconds 600")
        found += Environment(env).problems(service["http_port"], stop.get("grace_period_seconds", 120))
        for name in ("health_check", "liveness_health_check"):
            found += path_problems(service[name]["http_path"])
            if service[name]["timeout_seconds"] > service[name]["period_seconds"]:
                found.append(f"{name}: its time-out is over its period")
        if "autoscaling" in service and not service["instance_size_slug"].startswith("apps-d-"):
            found.append("scaling by itself takes dedicated processors (apps-d-...)")
        if "MODEL_CACHE_DIR" in env:
            found.append("the disk ends at 2 GiB and takes the container along: no MODEL_CACHE_DIR")
        found += [f"{e['key']} is no secret" for e in service["envs"] if re.search("SECRET|KEY|TOKEN", e["key"]) and e.get("type") != "SECRET"]
    return found


SPACE_FIELDS = {"title", "emoji", "colorFrom", "colorTo", "sdk", "app_port", "pinned", "license", "short_description",
                "startup_duration_timeout", "suggested_hardware", "models", "tags", "header", "fullWidth", "hf_oauth"}
SPACE_COLOURS = {"red", "yellow", "green", "blue", "indigo", "purple", "pink", "gray"}


def huggingface(text: str) -> list[str]:
    match = re.match(r"---\n(.*?)\n---\n", text, re.S)
    if not match:
        return ["there is no front matter"]
    card = yaml.safe_load(match[1])
    found = [f"{name} is no field of a Space" for name in card if name not in SPACE_FIELDS]
    if card.get("sdk") != "docker":
        found.append("sdk is not docker")
    found += [f"{n} is {card.get(n)!r}, expected {sorted(SPACE_COLOURS)}" for n in ("colorFrom", "colorTo") if card.get(n) not in SPACE_COLOURS]
    if len(card.get("short_description", "")) > 60:
        found.append("short_description is longer than 60 characters")
    if not re.fullmatch(r"\d+[smh]|\d+", str(card.get("startup_duration_timeout", "30m"))):
        found.append("startup_duration_timeout is no time such as 30m")
    port = re.search(r"\bPORT=(\d+)", (ROOT / "Dockerfile").read_text())[1]
    if card.get("app_port", 7860) != int(port):
        found.append(f"app_port is {card.get('app_port', 7860)}, the image listens on {port}")
    return found


class CloudFormation(yaml.SafeLoader):
    """Reads !Ref and its like as what they stand beside."""


CloudFormation.add_multi_constructor("!", lambda loader, tag, node: {
    tag: loader.construct_scalar(node) if isinstance(node, yaml.ScalarNode) else loader.construct_sequence(node, deep=True)})


def aws(text: str) -> list[str]:
    if re.search(r"(?m)[:-] +[&*][a-z]\w*", text):
        return ["CloudFormation reads no anchors and aliases"]
    resources = yaml.load(text, CloudFormation)["Resources"]
    of = lambda kind: [r["Properties"] for r in resources.values() if r["Type"] == kind]  # noqa: E731
    found = []
    (task,), (targets,) = of("AWS::ECS::TaskDefinition"), of("AWS::ElasticLoadBalancingV2::TargetGroup")
    (container,) = task["ContainerDefinitions"]
    port = container["PortMappings"][0]["ContainerPort"]
    balancer = {a["Key"]: a["Value"] for a in of("AWS::ElasticLoadBalancingV2::LoadBalancer")[0]["LoadBalancerAttributes"]}
    if not 2 <= container["StopTimeout"] <= 120:
        found.append("StopTimeout is 2 to 120 on Fargate")
    env = {e["Name"]: e["Value"] for e in container["Environment"]}
    found += Environment(env).problems(port, container["StopTimeout"], float(balancer["idle_timeout.timeout_seconds"]))
    check = container["HealthCheck"]
    if check["Command"] != ["CMD", "/usr/local/bin/image-generator", "health"]:
        found.append("the image has no shell: the health check is CMD, the binary, health")
    for name, low, high in (("StartPeriod", 0, 300), ("Interval", 5, 300), ("Timeout", 2, 60), ("Retries", 1, 10)):
        if not low <= check[name] <= high:
            found.append(f"HealthCheck.{name} is {check[name]}, expected {low} to {high}")
    if not 21 <= task.get("EphemeralStorage", {}).get("SizeInGiB", 21) <= 200:
        found.append("EphemeralStorage is 21 to 200 GiB")
    if not container.get("ReadonlyRootFilesystem") or str(container.get("User", "0")).startswith("0"):
        found.append("the container is not read-only, or root")
    found += path_problems(targets["HealthCheckPath"])
    if targets["Port"] != port or of("AWS::ECS::Service")[0]["LoadBalancers"][0]["ContainerPort"] != port:
        found.append("the load balancer asks at another port than the container listens on")
    if targets["HealthCheckTimeoutSeconds"] >= targets["HealthCheckIntervalSeconds"]:
        found.append("the target group's time-out is not below its interval")
    for policy in of("AWS::IAM::Policy"):
        for statement in policy["PolicyDocument"]["Statement"]:
            if "*" in str(statement["Action"]) or statement["Resource"] == "*":
                found.append(f"a role may do more than it needs: {statement}")
    return found


def compose(text: str) -> list[str]:
    # As compose does: ${NAME:-default} is the default.
    stack = yaml.safe_load(re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", text))
    found = schema("compose", stack)
    if found:
        return found
    service = stack["services"]["image-generator"]
    port = int(service["ports"][0].split(":")[-1])
    grace = float(service["stop_grace_period"].removesuffix("s"))
    found += Environment(service["environment"]).problems(port, grace)
    if not service.get("read_only") or service.get("cap_drop") != ["ALL"] or str(service.get("user", "0")).startswith("0"):
        found.append("the service is not read-only, has capabilities, or is root")
    if not service["ports"][0].startswith("127.0.0.1:"):
        found.append("the service's port is open to the world, past the proxy")
    for name, other in stack["services"].items():
        found += [f"{name} depends on {d}, which is no service" for d in other.get("depends_on", {}) if d not in stack["services"]]
        for volume in other.get("volumes", []):
            source = volume["source"] if isinstance(volume, dict) else volume.split(":")[0]
            if not source.startswith((".", "/")) and source not in stack.get("volumes", {}):
                found.append(f"{name}: volume {source} is not declared")
    return found


def systemd(text: str) -> list[str]:
    found, env = [], {}
    for value in re.findall(r"(?m)^Environment=(.*)$", text):
        env |= dict([value.split("=", 1)])
    stop = re.search(r"(?m)^TimeoutStopSec=(\d+)$", text)
    if "ExecStart=" in text:
        found += Environment(env).problems(None, float(stop[1]) if stop else 90)
        if "DynamicUser=yes" not in text or "ProtectSystem=strict" not in text:
            found.append("the service is root, or may change the system")
    elif not re.search(r"(?m)^ListenStream=5000$", text):
        found.append("the socket is not at the service's port")
    return found


def railway(graph: str) -> list[str]:
    resources = json.loads(graph)["resources"]
    found = []
    for service in (r for r in resources if r["type"] == "service"):
        deploy = service["deploy"]
        env = {k: v.get("value") for k, v in service["variables"].items()}
        port = next(iter(service["networking"]["serviceDomains"].values()))["port"]
        # A response in which nothing is sent is closed after 300 s.
        found += path_problems(deploy.get("healthcheckPath")) + Environment(env).problems(port, deploy.get("drainingSeconds") or 0, 300)
        if not deploy.get("sleepApplication"):
            found.append("it would never sleep")
    return found or ([] if resources else ["there is no service"])


def dockerfile(text: str) -> list[str]:
    found = []
    if text.startswith("# syntax="):
        found.append("a syntax line wants a registry even where everything else is at hand")
    last = text.split("AS service\n")[1]
    if not re.search(r"(?m)^USER \d+", last):
        found.append("USER is no number, which Kubernetes' runAsNonRoot needs")
    if not re.search(r'(?m)^HEALTHCHECK .*CMD \["/usr/local/bin/image-generator", "health"\]$', last):
        found.append("HEALTHCHECK is not the binary itself, and there is no shell")
    env = dict(re.findall(r"\b([A-Z][A-Z0-9_]*)=(\S+)", "".join(re.findall(r"(?m)^ENV (?:.*\\\n)*.*$", last))))
    found += [f"{n} is no variable of the service" for n in env if n not in variables()]
    if f"EXPOSE {env.get('PORT')}" not in text:
        found.append("EXPOSE is not PORT")
    return found


FILES = {
    "Dockerfile": dockerfile,
    "service.yaml": lambda text: cloud_run(text) + knative(text),
    "scripts/deploy/cloud-run/service-gpu.yaml": cloud_run,
    "cloudbuild.yaml": cloud_build,
    "scripts/deploy/render/render.yaml": render,
    "scripts/deploy/digitalocean/app.yaml": digitalocean,
    "scripts/deploy/huggingface/README.md": huggingface,
    "scripts/deploy/aws/template.yaml": aws,
    "scripts/deploy/compose/compose.yaml": compose,
    "scripts/deploy/systemd/image-generator.service": systemd,
    "scripts/deploy/systemd/image-generator.socket": systemd,
} | {str(p.relative_to(ROOT)): alert_policy for p in sorted((ROOT / "scripts/deploy/cloud-run/alerts").glob("*.json"))}


def main():
    if sys.argv[1:2] == ["railway"]:
        found = {"scripts/deploy/railway/.railway/railway.ts": railway(Path(sys.argv[2]).read_text())}
    else:
        found = {name: FILES[name]((ROOT / name).read_text()) for name in sys.argv[1:] or FILES}
    for name, problems in found.items():
        for problem in problems:
            print(f"{name}: {problem}", file=sys.stderr)
    sys.exit(any(found.values()))


if __name__ == "__main__":
    main()
