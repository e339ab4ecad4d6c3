"""A real server under what the manifests impose: their user, a read-only root, no capabilities, their settings."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from urllib.request import urlopen

import pytest

from d2o_client import Client
from tests.e2e.processes import PATIENCE, end
from tests.k8s.conftest import K8S, ROOT
from tests.k8s.kustomize import Manifest, find, render
from tests.k8s.test_manifests import container, pod, variables

OWN_MOUNTS = ["unshare", "--mount", "--propagation", "private"]


def can_mount() -> bool:
    if os.geteuid() != 0 or not (shutil.which("unshare") and shutil.which("setpriv")):
        return False
    tried = subprocess.run([*OWN_MOUNTS, "mount", "-t", "tmpfs", "none", "/mnt"], capture_output=True, check=False)
    return tried.returncode == 0


pytestmark = pytest.mark.skipif(not can_mount(), reason="needs to be root and to mount")


@pytest.fixture(scope="module")
def demo() -> list[Manifest]:
    return render(K8S / "overlays" / "cpu-demo")


@pytest.fixture(scope="module")
def environment(demo: list[Manifest]) -> dict[str, str]:
    """The container's variables, with a tiny model and with ports that are free here."""
    with socket.socket() as first, socket.socket() as second:
        for free in (first, second):
            free.bind(("127.0.0.1", 0))
        ports = {"PORT": first.getsockname()[1], "METRICS_PORT": second.getsockname()[1]}
    own = {"MODEL": "random:tiny-llama", "DTYPE": "float32"} | {name: str(port) for name, port in ports.items()}
    image = {"HOME": "/home/d2o", "PATH": os.environ["PATH"]}
    return variables(demo) | image | {f"D2O_SERVE_{name}": value for name, value in own.items()}


# A root file system of what the server needs to read and what it may write; arguments: root, folders to show.
BUILD_ROOT = """
set -e
root=$1
mount -t tmpfs -o mode=755 none "$root"
shift
show() {
    mkdir -p "$root${1%/*}"
    if [ -L "$1" ]; then
        cp -P "$1" "$root$1"
    elif [ -d "$1" ]; then
        mkdir -p "$root$1"
        mount --bind "$1" "$root$1"
        mount -o remount,bind,ro "$root$1"
    fi
}
for folder in /usr /bin /lib /lib64 /etc; do show "$folder"; done
mkdir "$root/dev" "$root/proc"
mount --rbind /dev "$root/dev"
mount --rbind /proc "$root/proc"
"""


def confined(demo: list[Manifest], environment: dict[str, str], *arguments: str) -> list[str]:
    """The command that runs Python as the pod's container would."""
    user = pod(demo)["securityContext"]
    steps = [BUILD_ROOT]
    for mount in container(demo)["volumeMounts"]:
        # As the kubelet makes an emptyDir: root's, and the group's to write.
        options = f"mode=2775,gid={user['fsGroup']}"
        steps.append(f'mkdir -p "$root{mount["mountPath"]}"')
        steps.append(f'mount -t tmpfs -o {options} none "$root{mount["mountPath"]}"')
    # After the volumes: this checkout may lie below one of them.
    steps.append('for folder in "$@"; do show "$folder"; done')
    steps.append('mount -o remount,ro "$root"')
    drop = ["setpriv", f"--reuid={user['runAsUser']}", f"--regid={user['runAsGroup']}", f"--groups={user['fsGroup']}"]
    drop += ["--no-new-privs", "--bounding-set=-all", "--inh-caps=-all"]
    given = ["env", "--ignore-environment", "--chdir=/home/d2o"]
    given += [f"{key}={value}" for key, value in environment.items()]
    steps.append('exec chroot "$root" ' + shlex.join([*drop, *given, sys.executable, *arguments]))
    return [*OWN_MOUNTS, "bash", "-c", "\n".join(steps), "confined", "/mnt", str(ROOT), sys.prefix, sys.base_prefix]


@pytest.fixture(scope="module")
def server(
    demo: list[Manifest], environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[subprocess.Popen[str]]:
    log = tmp_path_factory.mktemp("container") / "log"
    with log.open("w") as file:
        process = subprocess.Popen(
            confined(demo, environment, "-m", "d2o_server"), stdout=subprocess.PIPE, stderr=file, text=True
        )
    try:
        assert process.stdout is not None
        assert " is listening on 0.0.0.0:" in process.stdout.readline(), log.read_text()
        yield process
    finally:
        end(process)


@pytest.fixture
def client(server: subprocess.Popen[str], environment: dict[str, str]) -> Iterator[Client]:
    with Client(f"127.0.0.1:{environment['D2O_SERVE_PORT']}") as connected:
        yield connected


def test_it_answers(client: Client) -> None:
    answer = client.generate("x", max_new_tokens=4, ignore_end_of_text=True)
    assert answer.usage.completion_tokens == 4


def test_it_runs_without_rights(server: subprocess.Popen[str]) -> None:
    status = dict(
        line.split(":\t", 1) for line in Path(f"/proc/{server.pid}/status").read_text().splitlines() if ":\t" in line
    )
    assert {status["Uid"], status["Gid"]} == {"\t".join(["10001"] * 4)}
    assert {int(status[name], 16) for name in ("CapPrm", "CapEff", "CapBnd")} == {0}
    assert status["NoNewPrivs"] == "1"


def test_it_can_write_where_the_pod_has_volumes_and_nowhere_else(
    demo: list[Manifest], environment: dict[str, str]
) -> None:
    folders = ("/", "/etc", "/home/d2o", "/home/d2o/.cache", "/tmp", str(ROOT))
    program = "import os, sys; print(*[path for path in sys.argv[1:] if os.access(path, os.W_OK)])"
    command = confined(demo, environment, "-c", program, *folders)
    assert subprocess.check_output(command, text=True).split() == ["/home/d2o/.cache", "/tmp"]


def test_the_health_check_runs_under_the_same_constraints(
    server: subprocess.Popen[str], demo: list[Manifest], environment: dict[str, str]
) -> None:
    command = confined(demo, environment, "-m", "d2o_server.healthcheck")
    assert subprocess.run(command, capture_output=True, text=True, check=True).stderr == ""


def test_it_has_the_metrics_that_the_autoscaler_asks_for(
    server: subprocess.Popen[str], environment: dict[str, str]
) -> None:
    scaler = find(render(K8S / "overlays" / "gpu"), "ScaledObject", "d2o-serve")
    queries = " ".join(trigger["metadata"]["query"] for trigger in scaler["spec"]["triggers"])
    with urlopen(f"http://127.0.0.1:{environment['D2O_SERVE_METRICS_PORT']}/metrics") as answer:
        scraped = answer.read().decode()
    names = set(re.findall(r"\bd2o_\w+", queries))
    assert names == {"d2o_pages", "d2o_requests_waiting"}
    for name in names:
        assert re.search(rf"^{name}[{{ ]", scraped, re.MULTILINE), name
    (wanted,) = re.findall(r'state=~"([a-z|]+)"', queries)
    states = set(re.findall(r'^d2o_pages{[^}]*state="(\w+)"', scraped, re.MULTILINE))
    assert {*wanted.split("|"), "free"} == states


def test_sigterm_ends_it_in_good_order(server: subprocess.Popen[str], client: Client) -> None:
    stream = client.stream("x", max_new_tokens=200, ignore_end_of_text=True)
    next(stream)
    server.send_signal(signal.SIGTERM)
    assert stream.result().usage.completion_tokens == 200
    assert server.wait(PATIENCE) == 0
