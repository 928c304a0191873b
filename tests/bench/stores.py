"""The stores that cold.py and catalogue.py fetch from: nginx, as fast as loopback is, and one as far away as a cloud's."""

import os
import pwd
import re
import shutil
import socket
import subprocess
import tempfile
import time

import harness

# What object stores and their clients want to be told; nginx looks at none of it.
CREDENTIALS = {
    "AWS_ACCESS_KEY_ID": "bench",
    "AWS_SECRET_ACCESS_KEY": "bench",
    "AWS_REGION": "us-east-1",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
}

CONFIG = """
daemon off;
worker_processes {processors};
{user}
pid {folder}/pid;
error_log {folder}/error.log;
events {{ worker_connections 1024; }}
http {{
    sendfile on;
    tcp_nopush on;
    keepalive_requests 100000;
    log_format bench '$status $body_bytes_sent "$http_range" $request_method $uri';
    access_log {folder}/access.log bench;
    client_body_temp_path {folder}/t1;
    proxy_temp_path {folder}/t2;
    fastcgi_temp_path {folder}/t3;
    uwsgi_temp_path {folder}/t4;
    scgi_temp_path {folder}/t5;
    server {{
        listen 127.0.0.1:{port};
        location / {{ root {www}; }}
    }}
}}
"""


class Store:
    """A store that runs as long as its `with`. Buckets are folders of `www`."""

    port: int
    child: subprocess.Popen

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    def env(self) -> dict[str, str]:
        """What image-generator, boto3 and Run:ai need to find it."""
        return CREDENTIALS | {
            "AWS_ENDPOINT": f"http://{self.address}",
            "AWS_ENDPOINT_URL": f"http://{self.address}",
            "AWS_ALLOW_HTTP": "true",
            "AWS_SKIP_SIGNATURE": "true",
            "RUNAI_STREAMER_S3_USE_VIRTUAL_ADDRESSING": "0",
        }

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.child.terminate()
        self.child.wait()


class Nginx(Store):
    def __init__(self, www: str):
        nginx = shutil.which("nginx", path=os.environ["PATH"] + ":/usr/sbin:/usr/local/sbin")
        if nginx is None:
            raise SystemExit("nginx is needed: apt-get install nginx-light")
        self.folder = tempfile.mkdtemp(prefix="nginx-")
        self.port = harness.free_port()
        # As root its workers would become nobody, who may not read a private folder.
        user = f"user {pwd.getpwuid(0).pw_name};" if os.getuid() == 0 else ""
        config = os.path.join(self.folder, "nginx.conf")
        with open(config, "w") as f:
            f.write(CONFIG.format(processors=len(os.sched_getaffinity(0)), user=user, folder=self.folder, port=self.port, www=os.path.abspath(www)))
        self.child = subprocess.Popen([nginx, "-e", os.path.join(self.folder, "error.log"), "-p", self.folder, "-c", config])
        wait_for_port(self.port, self.child)

    def __exit__(self, *_):
        super().__exit__()
        shutil.rmtree(self.folder, ignore_errors=True)

    def forget(self):
        """Empties the access log."""
        os.truncate(os.path.join(self.folder, "access.log"), 0)

    def sent(self, path: str) -> list[tuple[int, int]]:
        """First and last byte of each answer about `path` since the log was emptied."""
        time.sleep(0.2)
        ranges = []
        with open(os.path.join(self.folder, "access.log")) as f:
            for line in f:
                found = re.fullmatch(r'(\d+) (\d+) "(?:bytes=(\d+)-\d*|-)" GET (\S+)\n', line)
                if found and found[4] == path and found[1] in ("200", "206") and int(found[2]):
                    first = int(found[3] or 0)
                    ranges.append((first, first + int(found[2]) - 1))
        return ranges


class Paced(Store):
    """paced_store.rs: so much a connection."""

    def __init__(self, binary: str, www: str, mb_per_second: float, first_byte_ms: float):
        command = [binary, www, str(mb_per_second), str(first_byte_ms)]
        self.child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.port = int(self.child.stdout.readline())


def wait_for_port(port: int, child: subprocess.Popen):
    for _ in range(1000):
        with socket.socket() as s:
            if s.connect_ex(("127.0.0.1", port)) == 0:
                return
        if child.poll() is not None:
            break
        time.sleep(0.01)
    raise SystemExit(f"{child.args[0]} does not listen on port {port}")


def times_sent(ranges: list[tuple[int, int]], size: int) -> tuple[int, int]:
    """How often the bytes of an object were sent: the fewest and the most times for any of them."""
    edges = sorted([(first, 1) for first, _ in ranges] + [(last + 1, -1) for _, last in ranges] + [(0, 0), (size, 0)])
    depth, seen = 0, []
    for (at, change), (then, _) in zip(edges, edges[1:]):
        depth += change
        if then > at:
            seen.append(depth)
    return min(seen), max(seen)
