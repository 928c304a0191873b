"""Runs the built image as strictly as the platforms do, and says what was seen. Called by tests/deploy/container.

Everything listens on loopback addresses. Weights come from nginx, which stands in for a bucket without signatures.
"""

import argparse
import http.client
import json
import os
import shutil
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
PORT, STORE_PORT = 18080, 18081
STRICT = ["--network=host", "--no-healthcheck", "--read-only", "--read-only-tmpfs=false", "--cap-drop=ALL",
          "--security-opt=no-new-privileges", "--pids-limit=256"]
STORE = {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{STORE_PORT}", "AWS_ALLOW_HTTP": "true", "AWS_SKIP_SIGNATURE": "true", "AWS_REGION": "local"}
NAME = "image-generator-test"
failures = []


def podman(*arguments: str, check: bool = True) -> str:
    result = subprocess.run(["podman", *arguments], capture_output=True, text=True)
    if check and result.returncode:
        raise SystemExit(f"podman {' '.join(arguments)}: {result.stderr}")
    return (result.stdout + ("" if check else result.stderr)).strip()


def see(what: str, right: bool, seen: object = ""):
    print(f"{'ok    ' if right else 'NOT OK'} {what}{f': {seen}' if seen != '' else ''}", flush=True)
    if not right:
        failures.append(what)


def get(path: str, timeout: float = 120) -> tuple[int, dict, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", PORT, timeout=timeout)
    try:
        connection.request("GET", path)
        answer = connection.getresponse()
        return answer.status, {k.lower(): v for k, v in answer.getheaders()}, answer.read()
    finally:
        connection.close()


def first_answer(path: str) -> tuple[int, dict, bytes]:
    """As soon as the port is open."""
    deadline = time.monotonic() + 60
    while True:
        try:
            return get(path)
        except ConnectionRefusedError:
            if time.monotonic() > deadline:
                raise SystemExit(f"nothing listens: {podman('logs', NAME, check=False)}") from None
            time.sleep(0.001)


class Container:
    def __init__(self, image: str, memory: str = "512m", cpus: str = "1", env: dict | None = None, options: tuple = (), start: bool = True):
        podman("rm", "--force", "--time=0", NAME, check=False)
        variables = [f"--env={k}={v}" for k, v in ({"PORT": PORT, "HOST": "127.0.0.1"} | (env or {})).items()]
        podman("create", f"--name={NAME}", *STRICT, f"--memory={memory}", f"--memory-swap={memory}", f"--cpus={cpus}", *variables, *options, image)
        if start:
            self.start()

    def start(self) -> float:
        started = time.monotonic()
        podman("start", NAME)
        return started

    def state(self, key: str) -> str:
        return podman("inspect", NAME, "--format", "{{.State.%s}}" % key)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        podman("rm", "--force", "--time=0", NAME, check=False)


def is_picture(answer: tuple) -> bool:
    return answer[0] == 200 and answer[2].startswith(b"\x89PNG\r\n\x1a\n")


def sizes(image: str):
    size = int(podman("image", "inspect", image, "--format", "{{.Size}}"))
    packed = subprocess.run(f"podman save {image} | gzip -6 | wc -c", shell=True, capture_output=True, text=True).stdout
    see("the image is under 40 MB, weights included", size < 40e6, f"{size / 1e6:.1f} MB, {int(packed) / 1e6:.1f} MB packed")


def strictness(image: str):
    with Container(image) as c:
        answer = first_answer("/v1/digits/7?seed=7")
        see("512 MB, one processor, read-only: it draws a digit", is_picture(answer), answer[1].get("server-timing"))
        status = dict(line.split(":\t", 1) for line in Path(f"/proc/{c.state('Pid')}/status").read_text().splitlines() if ":\t" in line)
        see("it is not root and has no capabilities", status["Uid"].split()[0] == "65532" and int(status["CapEff"], 16) == 0,
            f"uid {status['Uid'].split()[0]}, capabilities {status['CapEff']}")
        see("there is no shell", subprocess.run(["podman", "exec", NAME, "/bin/sh", "-c", "true"], capture_output=True).returncode != 0)
        command = json.loads(podman("image", "inspect", image, "--format", "{{json .HealthCheck.Test}}") or "null")
        see("HEALTHCHECK is the binary itself", bool(command) and command[0] == "CMD", " ".join(command or []))
        see("it says healthy", subprocess.run(["podman", "exec", NAME, *command[1:]], capture_output=True).returncode == 0)
        # Beside the server, without the engine's own time for exec.
        root = f"/proc/{c.state('Pid')}/root"
        runs = []
        for _ in range(20):
            begin = time.monotonic()
            subprocess.run([f"{root}{command[1]}", "health"], env={"PORT": str(PORT), "HOST": "127.0.0.1"}, check=True)
            runs.append(time.monotonic() - begin)
        see("a health check takes little", statistics.median(runs) < 0.1, f"{statistics.median(runs) * 1e3:.1f} ms")
        unhealthy = subprocess.run(["podman", "exec", "--env=PORT=1", NAME, *command[1:]], capture_output=True, text=True)
        see("and unhealthy where nothing listens", unhealthy.returncode == 1, unhealthy.stderr.strip().splitlines()[0])
        memory = Path(f"/proc/{c.state('Pid')}/status").read_text().split("VmRSS:")[1].split("kB")[0]
        see("its memory afterwards", True, f"{int(memory) / 1024:.0f} MiB")


def drains(image: str):
    with Container(image) as c:
        is_picture(first_answer("/v1/digits/1"))
        answers = []
        request = threading.Thread(target=lambda: answers.append((*post_sheet(200), time.monotonic())))
        request.start()
        time.sleep(0.3)
        begin = time.monotonic()
        podman("stop", "--time=10", NAME)
        took = time.monotonic() - begin
        request.join()
        see("SIGTERM: an answer in flight is finished first", bool(answers) and is_picture(answers[0]) and answers[0][3] > begin,
            f"{len(answers[0][2])} bytes, {answers[0][3] - begin:.2f} s after it")
        see("it ends by itself, with exit code 0", c.state("ExitCode") == "0" and took < 10, f"{took:.2f} s")
    with Container(image) as c:
        first_answer("/health/live")
        begin = time.monotonic()
        podman("stop", "--time=10", NAME)
        see("SIGTERM: idle, it ends at once", c.state("ExitCode") == "0", f"{time.monotonic() - begin:.2f} s")


def post_sheet(count: int):
    connection = http.client.HTTPConnection("127.0.0.1", PORT, timeout=60)
    connection.request("POST", "/v1/generate", json.dumps({"digits": "0", "count": count}), {"content-type": "application/json"})
    answer = connection.getresponse()
    return answer.status, dict(answer.getheaders()), answer.read()


def too_large(image: str):
    with Container(image, "512m", env=STORE | {"MODEL_URI": "s3://models/large.safetensors"}) as c:
        status, _, body = first_answer("/v1/digits/7")
        problem = json.loads(body)
        see("a model larger than the limit is refused in words", status == 507, f"{status} {problem.get('detail')}")
        see("and nothing is killed", c.state("Running") == "true" and c.state("OOMKilled") == "false" and get("/health/live")[0] == 200)


def where_weights_are(image: str, work: Path):
    # Not the built-in ones: these draw colours.
    models = work / "models"
    models.mkdir(exist_ok=True)
    shutil.copy(ROOT / "tests/golden/small.safetensors", models)
    with Container(image, options=(f"--volume={models}:/app/models:ro",)):
        answer = first_answer("/v1/digits/red")
        see("weights in a volume at /app/models", is_picture(answer) and answer[1]["x-model"] != "mnist", answer[1].get("x-model"))
    (work / "environment").write_text("".join(f"{k}={v}\n" for k, v in STORE.items()))
    build = ["build", "--pull=never", "--format=docker", "--network=host", "--layers", "--build-arg=MODEL_URI=s3://models/small.safetensors"]
    podman(*build, "--target=baked", f"--secret=id=environment,src={work / 'environment'}", f"--tag={image}-baked", str(ROOT))
    with Container(f"{image}-baked"):
        answer = first_answer("/v1/digits/red")
        see("weights in the image (--target baked), fetched while it was built", is_picture(answer) and answer[1]["x-model"] != "mnist", answer[1].get("x-model"))
    podman(*build, "--target=download", f"--tag={image}-download", str(ROOT))
    with Container(f"{image}-download", env=STORE):
        answer = first_answer("/v1/digits/red")
        see("weights in a bucket (--target download)", is_picture(answer) and answer[1]["x-model"] != "mnist", answer[1].get("x-model"))


def cold_starts(image: str, rounds: int):
    large = STORE | {"MODEL_URI": "s3://models/large.safetensors"}
    for what, memory, cpus, env, path in (
        ("start to first answer of /health/live, 512 MB, 1 processor", "512m", "1", {}, "/health/live"),
        ("start to first digit, built-in weights, 512 MB, 1 processor", "512m", "1", {}, "/v1/digits/7?seed=7"),
        ("start to first digit, built-in weights, 512 MB, 2 processors", "512m", "2", {}, "/v1/digits/7?seed=7"),
        ("start to first digit, 700 MB from a store, 1 GB, 1 processor", "1g", "1", large, "/v1/digits/7?seed=7"),
        ("start to first digit, 700 MB from a store, 1 GB, 2 processors", "1g", "2", large, "/v1/digits/7?seed=7"),
    ):
        times, timing, good = [], "", True
        for _ in range(rounds):
            with Container(image, memory, cpus, env, start=False) as c:
                started = time.monotonic()
                starting = threading.Thread(target=c.start)
                starting.start()
                answer = first_answer(path)
                times.append(time.monotonic() - started)
                starting.join()
                good &= answer[0] == 200 and (path.startswith("/health") or is_picture(answer))
                timing = answer[1].get("server-timing", "")
        times = [t * 1e3 for t in sorted(times)]
        see(what, good, f"{statistics.median(times):.0f} ms ({times[0]:.0f}-{times[-1]:.0f}) {timing}")


def store(work: Path, large: Path) -> subprocess.Popen:
    folder = work / "nginx"
    (folder / "www/models").mkdir(parents=True, exist_ok=True)
    for name, source in (("large.safetensors", large), ("small.safetensors", ROOT / "tests/golden/small.safetensors")):
        target = folder / "www/models" / name
        target.unlink(missing_ok=True)
        target.symlink_to(source.resolve())
    (folder / "www").chmod(0o755)
    temporary = "".join(f"{n}_temp_path {folder}/{n};" for n in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi"))
    (folder / "nginx.conf").write_text(
        f"user root; daemon off; worker_processes 2; pid {folder}/pid; error_log {folder}/error.log; events {{ worker_connections 1024; }}\n"
        f"http {{ access_log off; sendfile on; {temporary}\n"
        f"server {{ listen 127.0.0.1:{STORE_PORT}; location / {{ root {folder}/www; }} }} }}\n")
    return subprocess.Popen(["nginx", "-c", str(folder / "nginx.conf")])


def main():
    p = argparse.ArgumentParser()
    p.add_argument("--image", required=True)
    p.add_argument("--work", type=Path, required=True)
    p.add_argument("--large", type=Path, required=True)
    p.add_argument("--rounds", type=int, default=5)
    a = p.parse_args()
    print(f"load of the machine: {os.getloadavg()[0]:.1f} on {os.cpu_count()} processors; the store serves {a.large.stat().st_size:,} bytes", flush=True)
    server = store(a.work.resolve(), a.large)
    try:
        sizes(a.image)
        strictness(a.image)
        drains(a.image)
        too_large(a.image)
        where_weights_are(a.image, a.work)
        cold_starts(a.image, a.rounds)
    finally:
        server.terminate()
        server.wait()
        podman("rm", "--force", "--time=0", NAME, check=False)
    print(f"{len(failures)} failed" if failures else "all as it should be")
    sys.exit(bool(failures))


if __name__ == "__main__":
    main()
