"""Two machines, each with its torchrun, and a network between them that is slow, or fails for a while or for good.

The machines are network namespaces of this one, with host names of their own. Each has a cable to a switch, which is a
bridge in a third namespace. When a cable is pulled, one machine loses its carrier, and the other only receives nothing
more, as with a real switch.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from runs import BATCH, column, finish, metrics, start, weights, words

from minisobert.training import checkpoint

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
NODES = ["node1", "node2"]  # rank 0 and torchrun's store are on the first
OPTIONS = {"steps": 16, "checkpoint_every_tokens": 2 * BATCH, "micro_batch_rows": 2, "learning_rate": 1e-3}
TRAIN = f"""
import sys
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests")!r}]
import torch, train, runs
torch.set_num_threads(1)
runs.make_small()
sys.exit(train.main(sys.argv[1:]))
"""


class Network:
    def __init__(self):
        self.name = f"minisobert-{os.getpid()}"
        self.agents: dict[str, subprocess.Popen] = {}

    def make(self) -> None:
        for place in ["switch", *NODES]:
            _run("ip", "netns", "add", self.space(place))
        self.ip("link", "add", "bridge", "type", "bridge")
        self.ip("link", "set", "bridge", "up")
        for node in NODES:
            self.ip("link", "add", node, "type", "veth", "peer", "name", "eth0", "netns", self.space(node))
            self.ip("link", "set", node, "master", "bridge", "up")
            self.ip("address", "add", f"{address(node)}/24", "dev", "eth0", place=node)
            for interface in ("lo", "eth0"):
                self.ip("link", "set", interface, "up", place=node)
            _run(*self.inside(node), "true")

    def space(self, place: str) -> str:
        return f"{self.name}-{place}"

    def ip(self, *command: str, place: str = "switch") -> None:
        _run("ip", "-n", self.space(place), *command)

    def slow_down(self) -> None:
        """Limits the network to 8 Mbit/s, so that a step takes half a second."""
        for node in NODES:
            limit = "root tbf rate 8mbit burst 16kb latency 1s"
            _run("tc", "-n", self.space("switch"), "qdisc", "add", "dev", node, *limit.split())

    def pull(self, node: str) -> None:
        self.ip("link", "set", node, "down")

    def plug(self, node: str) -> None:
        self.ip("link", "set", node, "up")

    def train(self, script: Path, argv: list[str]) -> None:
        """Starts torchrun with one process on each machine. Their output is in NODE.log beside the script."""
        hosts = script.parent / "hosts"
        hosts.write_text("127.0.0.1 localhost\n" + "".join(f"{address(node)} {node}\n" for node in NODES))
        for node in NODES:
            name_it = 'echo "$0" > /proc/sys/kernel/hostname && mount --bind "$1" /etc/hosts && shift && exec "$@"'
            command = [
                *self.inside(node), "sh", "-c", name_it, node, hosts, sys.executable, "-m", "torch.distributed.run",
                "--nnodes=2", "--nproc-per-node=1", "--rdzv-backend=c10d", f"--rdzv-endpoint={NODES[0]}:29500",
                "--rdzv-id=test", script, *argv,
            ]  # fmt: skip
            environment = {**os.environ, "OMP_NUM_THREADS": "1"}
            with open(script.parent / f"{node}.log", "w") as log:
                self.agents[node] = subprocess.Popen(command, stdout=log, stderr=log, env=environment)

    def inside(self, node: str) -> list[str]:
        """A command that runs another on a machine. The machine has pids of its own too, since its processes may kill
        one another."""
        return ["ip", "netns", "exec", self.space(node), "unshare", "--uts", "--pid", "--fork", "--mount-proc"]

    def processes(self, node: str) -> list[int]:
        found = subprocess.run(["ip", "netns", "pids", self.space(node)], capture_output=True, text=True)
        return [int(pid) for pid in found.stdout.split()]

    def kill_all(self) -> None:
        for node in NODES:
            for pid in self.processes(node):
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        for agent in self.agents.values():
            agent.wait()

    def remove(self) -> None:
        for place in ["switch", *NODES]:
            with suppress(OSError):
                _run("ip", "netns", "delete", self.space(place))


def address(node: str) -> str:
    return f"10.77.0.{1 + NODES.index(node)}"


def _run(*command: str) -> None:
    """Runs a command. Raises OSError if it fails."""
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise OSError(f"{' '.join(command)}: {done.stderr.strip()}")


@pytest.fixture
def network() -> Iterator[Network]:
    made = Network()
    try:
        made.make()
        made.slow_down()
    except OSError as error:  # no root, no iproute2, or a kernel without one of these
        made.remove()
        pytest.skip(f"two machines cannot be made here: {error}")
    yield made
    made.kill_all()
    made.remove()


@pytest.fixture(scope="module")
def whole(corpus, tmp_path_factory):
    """An undisturbed run of two processes on one machine."""
    out = tmp_path_factory.mktemp("whole") / "run"
    assert finish(start(words(corpus, out, **OPTIONS), out.with_suffix(".log"), 2)) == [0, 0]
    return out


def is_the_same_as(out, whole) -> bool:
    ours, expected = weights(out), weights(whole)
    return torch.equal(column(out), column(whole)) and all(torch.equal(ours[name], expected[name]) for name in expected)


def said(folder: Path) -> dict[str, str]:
    return {node: (folder / f"{node}.log").read_text() for node in NODES}


def test_a_slow_network_that_fails_for_five_seconds_and_then_for_good(network, corpus, tmp_path, whole):
    """The run waits when the network fails for five seconds. When it fails for good, the run ends within --timeout, and
    continues when the network is back."""
    out, script = tmp_path / "run", tmp_path / "small.py"
    script.write_text(TRAIN)
    timeout = 25  # TCP doubles its wait before each repetition: on a busy machine one may come after 15 seconds
    argv = words(corpus, out, timeout=timeout, **OPTIONS)
    network.train(script, argv)
    until = time.monotonic() + 120
    while not checkpoint.steps(out / "checkpoints"):
        assert time.monotonic() < until and network.agents["node1"].poll() is None, said(tmp_path)
        time.sleep(0.05)
    network.pull("node2")
    time.sleep(1)
    before = len(metrics(out))
    time.sleep(4)
    assert len(metrics(out)) == before
    network.plug("node2")
    until = time.monotonic() + timeout
    while len(metrics(out)) < before + 2:
        assert time.monotonic() < until, said(tmp_path)
        time.sleep(0.05)

    network.pull("node2")
    until = time.monotonic() + timeout + 2  # more for the current step and a busy machine
    while not all("gave up waiting" in text for text in said(tmp_path).values()):
        assert time.monotonic() < until, said(tmp_path)
        time.sleep(0.05)
    on_first, on_second = said(tmp_path).values()
    assert "\nrank 1 (host node2) did not answer; rank 0 on node1 gave up waiting" in on_first
    assert "\ntorchrun's store on node1 does not answer; rank 1 on node2 gave up waiting" in on_second
    assert network.agents["node1"].wait(10) == 1
    # torchrun on the other machine has no rank any more, and waits for its store until the network is back
    assert not any(b"RANK=" in Path(f"/proc/{pid}/environ").read_bytes() for pid in network.processes("node2"))
    network.plug("node2")
    assert network.agents["node2"].wait(60) == 1
    assert len(metrics(out)) < OPTIONS["steps"]

    network.train(script, argv)
    assert [agent.wait(90) for agent in network.agents.values()] == [0, 0], said(tmp_path)
    assert "continuing after step" in said(tmp_path)["node1"]
    assert is_the_same_as(out, whole)
