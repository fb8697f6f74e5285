"""Ranks in Ray actors: the same numbers as elsewhere, loud failures, restarts, and nothing left behind."""

import ast
import json
import math
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from commanding import PATIENCE, TESTS, command, config_of, environment, gone, job, until

from distattn.conf.schema import RayConfig
from distattn.errors import ConfigError, PeerLost, ServiceBusy, ServiceDead
from distattn.generate import Sampling
from distattn.jobs import find_job, prefill
from distattn.jobs.context import Context
from distattn.jobs.serve import labels_of
from distattn.launch import local, ray_cluster, ray_guard
from distattn.launch.ray_actor import Place
from distattn.launch.ray_group import Numbered, bundle_of, number_ranks, room
from distattn.launch.service import AttentionService, as_text, compose


def ray_config(*overrides: str) -> Any:
    return config_of("launcher=ray", "launcher.device=cpu", *overrides)


# Policies, without Ray


def at(node: str, gpu: int = -1, ip: str = "10.0.0.1") -> Place:
    return Place(node, ip, gpu, 1, "")


def test_ranks_are_numbered_node_by_node_and_gpu_by_gpu() -> None:
    places = [at("b", 1, "10.0.0.2"), at("a", 1), at("b", 0, "10.0.0.2"), at("a", 0)]
    assert number_ranks(places, "") == [Numbered(3, 0, 2), Numbered(1, 1, 2), Numbered(2, 0, 2), Numbered(0, 1, 2)]
    assert [rank.actor for rank in number_ranks(places, "b")] == [2, 0, 3, 1]
    uneven = [at("a"), at("b"), at("a")]
    assert number_ranks(uneven, "b") == [Numbered(1, 0, 1), Numbered(0, 0, 2), Numbered(2, 1, 2)]


def test_what_fits_where() -> None:
    bundle = bundle_of("cuda", {"memory": 4.0})
    assert bundle == {"CPU": 1, "GPU": 1, "memory": 4.0}
    nodes = [{"CPU": 8, "GPU": 2, "memory": 16.0}, {"CPU": 1, "GPU": 8, "memory": 100.0}, {"CPU": 64, "memory": 1e9}]
    assert room(nodes, bundle) == [2, 1, 0]
    assert bundle_of("cpu", {"CPU": 4}) == {"CPU": 4}


@pytest.mark.parametrize(
    ("resources", "message"),
    [
        ({"GPU": 2}, "resources_per_worker has GPU; expected launcher.device"),
        ({"tpu": 0}, "resources_per_worker.tpu is 0; expected a number above 0"),
        ({"tpu": math.nan}, "resources_per_worker.tpu is nan"),
    ],
)
def test_resources_that_cannot_be_meant(resources: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        bundle_of("cpu", resources)


def test_the_guard_ends_what_belongs_to_ray_and_nothing_else(tmp_path: Path) -> None:
    folder = tmp_path / "ray"
    folder.mkdir()
    guard = ray_guard.start("token", folder)
    mark = os.environ | {ray_guard.MARK: "token"}
    marked = subprocess.Popen(["sleep", "1000"], env=mark)
    stubborn = subprocess.Popen(["sh", "-c", "trap '' TERM INT HUP; sleep 1000; sleep 1000"], env=mark)
    with (folder / "log").open("w") as log:
        writing = subprocess.Popen(["sleep", "1000"], stdout=log)
    other = subprocess.Popen(["sleep", "1000"], env=os.environ | {ray_guard.MARK: "token2"})
    with (folder / "log").open():  # as the command itself, which has started the guard
        assert guard.stdin
        guard.stdin.close()
        assert guard.wait(PATIENCE) == 0
    assert [process.wait(1) for process in (marked, stubborn, writing)] == [-signal.SIGKILL] * 3
    assert other.poll() is None and not folder.exists()
    other.kill()
    other.wait()


def test_texts_of_requests() -> None:
    assert as_text(b"ab").tolist() == as_text([97, 98]).tolist() == as_text(torch.tensor([97, 98])).tolist() == [97, 98]
    assert labels_of(as_text(b"abc")).tolist() == [98, 99, -100]
    for wrong in ([[1, 2]], [256], [-1], [0.5]):
        with pytest.raises(ValueError, match="tokens has .*; expected"):
            as_text(wrong)  # type: ignore[arg-type]


def test_overrides_that_hydra_refuses() -> None:
    with pytest.raises(ConfigError, match="overrides are .*seq_lne"):
        compose(["seq_lne=5"])
    assert isinstance(compose(["seq_len=500"]).launcher, RayConfig)


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("ray://10.0.0.1:10001", "launcher.address is 'ray://10.0.0.1:10001'; expected auto or host:port"),
        ("127.0.0.1:1", "launcher.address is '127.0.0.1:1', where no cluster answers: .*refused"),
        ("127.0.0.1:gcs", "launcher.address is '127.0.0.1:gcs', where no cluster answers: invalid literal"),
    ],
)
def test_addresses_without_a_cluster(address: str, message: str) -> None:
    assert not ray.is_initialized()
    with pytest.raises(ConfigError, match=message), ray_cluster.joined(address, {}):
        pass


# In this process, with one Ray for all


@pytest.fixture(scope="module")
def embedded() -> Iterator[None]:
    launcher = ray_config("launcher.num_workers=2").launcher
    with ray_cluster.connected(launcher):
        yield
    assert not ray.is_initialized()


@pytest.fixture
def launch(embedded: None, tmp_path: Path) -> Callable[..., int]:
    def run(name: str, *overrides: str) -> int:
        config = ray_config("job=custom", f"job.name=trial_jobs:{name}", *overrides)
        return ray_cluster.launch(config, find_job(config.job.name), tmp_path)

    return run


SMALL = (
    *("seq_len=3000", "model.width=32", "model.hidden=48", "model.head_dim=16", "job.picture=false"),
    *("attention=window_global", "attention.reach=200"),
)


def test_the_same_numbers_as_local_ranks(embedded: None, tmp_path: Path) -> None:
    reports = {}
    for name in ("local", "ray"):
        config = config_of(f"launcher={name}", "launcher.device=cpu", "launcher.num_workers=2", *SMALL)
        if name == "local":
            assert local.launch(config, "cpu", 2, tmp_path / name) == 0
        else:
            assert ray_cluster.launch(config, find_job("prefill"), tmp_path / name) == 0
        reports[name] = json.loads((tmp_path / name / "report.json").read_text())
    for key in ("bits_per_byte", "max_error", "bytes_sent", "world_size"):
        assert reports["ray"][key] == reports["local"][key]
    assert reports["ray"]["world_size"] == 2


def test_what_a_ray_rank_sees_and_tells(launch: Callable[..., int], capfd: pytest.CaptureFixture[str]) -> None:
    assert launch("where", "+launcher.runtime_env.env_vars={TRIAL: '5', RANK: '7', MASTER_ADDR: '10.0.0.1'}") == 0
    out, err = capfd.readouterr()
    assert err == ""
    *lines, report = out.splitlines()
    zero, one = ast.literal_eval(report)
    threads = max(1, len(os.sched_getaffinity(0)) // 2)
    assert zero == {"local_rank": 0, "threads": threads, "interface": "lo", "stale": [], "variable": "5"}
    assert one == zero | {"local_rank": 1}
    assert {"[rank 0] looked", "[rank 1] looked", "[rank 0] printed", "[rank 1] printed"} <= {*lines}
    assert "looking: 100 %  sum=3.0" in lines


def test_the_first_error_is_on_top(launch: Callable[..., int], capfd: pytest.CaptureFixture[str]) -> None:
    assert launch("one_raises", "launcher.max_restarts=1") == 1
    err = capfd.readouterr().err.splitlines()
    assert err[0] == "distattn: rank 1 of 2 failed: ValueError: rank one is at fault"
    assert any("in one_raises" in line for line in err)
    assert re.match("distattn: rank 0 (failed: |was stopped)", err[-1])


def test_a_killed_actor_and_its_last_words(launch: Callable[..., int], capfd: pytest.CaptureFixture[str]) -> None:
    assert launch("one_is_killed", "+job.params.pause=1") == 1  # a thread of the rank takes what it prints
    err = capfd.readouterr().err
    assert "distattn: rank 1 of 2 was lost by Ray: The actor is dead because its worker process has died\n" in err
    assert "    The last lines that it printed:\n    last words\n" in err


@pytest.mark.parametrize("restarts", [pytest.param(0, marks=pytest.mark.full), 1])
def test_an_actor_that_ray_kills(
    restarts: int, launch: Callable[..., int], capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from distattn.launch import ray_group

    groups = []

    class Killing(ray_group.RayRanks):
        """Kills the second actor of the first group once both ranks have told their pid."""

        told = 0

        def poll(self, timeout: float) -> list[Any]:
            events = super().poll(timeout)
            Killing.told += str(events).count("pid ")
            if not groups and Killing.told == 2:
                groups.append(self)
                ray.kill(self._actors[1])
            return events

    monkeypatch.setattr(ray_group, "RayRanks", Killing)
    assert launch("waits_once", f"launcher.max_restarts={restarts}") == 1 - restarts
    out, err = capfd.readouterr()
    line = "distattn: rank 1 of 2 was lost by Ray: The actor is dead because it was killed by `ray.kill`"
    assert (f"{line}; restart 1 of 1" if restarts else line) in err.splitlines()
    assert ("done after 2 attempts" in out.splitlines()) == bool(restarts)
    pids = [int(text) for text in re.findall(r"\[rank \d\] pid (\d+)", out)]
    assert len(pids) == 2 * (1 + restarts)
    until(lambda: all(gone(pid) for pid in pids), f"the end of the actors {pids}")


def test_a_frozen_actor_is_ended(launch: Callable[..., int], capfd: pytest.CaptureFixture[str]) -> None:
    assert launch("one_freezes", "launcher.stop_timeout=0.5") == 1
    out, err = capfd.readouterr()
    assert "distattn: rank 1 of 2 failed: RuntimeError: the other is frozen" in err
    (pid,) = [int(text) for text in re.findall(r"\[rank \d\] pid (\d+)", out)]
    until(lambda: gone(pid), f"the end of the frozen actor {pid}")


def test_impossible_placement(embedded: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: Any) -> None:
    from distattn.launch.run import main

    monkeypatch.chdir(tmp_path)
    arguments = [*job("total"), "launcher=ray", "launcher.num_workers=2", "+launcher.resources_per_worker.nitrogen=3"]
    monkeypatch.setattr(sys, "argv", ["distattn", *arguments])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 2
    asked = "launcher=ray asks for 2 workers with 1 CPU, 3 nitrogen each, but the cluster has 1 node: "
    assert capfd.readouterr().err.startswith(f"distattn: {asked}{max(2, os.cpu_count() or 1)} CPU")


# The service


def expected_bits(tokens: bytes, config: Any) -> float:
    """Bits per byte by one rank in this process."""
    from dataclasses import replace

    from distattn.jobs.settings import model_config
    from distattn.model import Decoder

    config = replace(config, seq_len=len(tokens))
    plans = prefill.layer_plans(config, Context(0, 1, 0, torch.device("cpu"), None, Path()))
    x, labels = (torch.from_numpy(f(as_text(tokens))).unsqueeze(0) for f in (lambda x: x.copy(), labels_of))
    model = Decoder(model_config(config), config.seed)
    with torch.no_grad():
        return float(model.loss(model(x, plans), labels).double().sum()) / (len(tokens) - 1) / math.log(2)


ASKING = """
import sys
from distattn.launch.service import AttentionService
service = AttentionService.connect("trial", sys.argv[1])
print(repr(service.prefill(sys.argv[2].encode()).bits_per_byte), service.status().answered)
"""


def test_a_service(embedded: None, tmp_path: Path) -> None:
    overrides = ["launcher.device=cpu", "launcher.num_workers=2", *SMALL, f"output_dir={tmp_path}"]
    text = Path(prefill.__file__).read_bytes()[:1500]
    service = AttentionService.start(overrides, name="trial", max_queue=1)
    try:
        assert service.status().state == "ready"
        reading = service.prefill(text)
        assert reading.bits_per_byte == pytest.approx(expected_bits(text, compose(overrides)), abs=1e-5)
        assert reading.tokens == 1500 and reading.seconds > 0 <= reading.waited
        assert service.prefill(text).bits_per_byte == reading.bits_per_byte
        with pytest.raises(ValueError, match="there are 3,001 tokens; expected 129 to 3,000"):
            service.prefill(bytes(3001))
        written = service.generate([b"some text", b"other text"], Sampling(20, 0.8, seed=1))
        assert [(len(one.text), one.ended) for one in written.answers] == [(20, "length")] * 2
        assert service.generate(b"some text", Sampling(20, 0.8, seed=1)).answers == written.answers[:1]
        with pytest.raises(ConfigError, match="prompt 2 is empty"):
            service.generate([b"some text", b""])
        with pytest.raises(ConfigError, match="name is 'trial', which a service has already"):
            AttentionService.start(overrides, name="trial")
        with pytest.raises(ConfigError, match="name is 'other', but the cluster has no service of that name"):
            AttentionService.connect("other", None)

        letters = "abcd" * 100
        asked = subprocess.run(
            [sys.executable, "-c", ASKING, service.address, letters],
            env=environment(),
            capture_output=True,
            text=True,
            timeout=PATIENCE,
        )
        assert asked.returncode == 0, asked.stderr
        assert asked.stdout.split() == [repr(service.prefill(letters.encode()).bits_per_byte), "5"]

        # One is answered and one waits: a third is refused at once, and both end with the rank.
        freeze(service, signal.SIGSTOP)
        outcomes: list[BaseException | None] = []
        threads = [threading.Thread(target=lambda: outcomes.append(error_of(service, text))) for _ in range(2)]
        for thread in threads:
            thread.start()
        until(lambda: service.status().waiting == 1, "the second request")
        began = time.monotonic()
        with pytest.raises(ServiceBusy, match="1 requests wait already"):
            service.prefill(text)
        assert time.monotonic() - began < 5
        freeze(service, signal.SIGKILL)
        for thread in threads:
            thread.join(PATIENCE)
        assert [type(outcome) for outcome in outcomes] == [PeerLost, PeerLost]
        status = service.status()
        assert (status.state, status.waiting) == ("dead", 0) and "was lost by Ray" in status.reason
        with pytest.raises(ServiceDead, match="was lost by Ray"):
            service.prefill(text)
    finally:
        service.shutdown()
    with pytest.raises(ServiceDead):
        service.prefill(text)


def error_of(service: AttentionService, text: bytes) -> BaseException | None:
    try:
        service.prefill(text)
    except BaseException as error:
        return error
    return None


def freeze(service: AttentionService, number: int) -> None:
    """Send a signal to one of the ranks of the only group of ranks on this machine that this test has."""
    actors = [pid for pid in actor_pids() if not gone(pid)]
    assert len(actors) == 2, actors
    os.kill(actors[0], number)


def actor_pids() -> list[int]:
    """The rank actors that are descendants of this process."""
    return [pid for pid in descendants(os.getpid()) if b"RankActor" in cmdline(pid)]


def cmdline(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def descendants(pid: int) -> list[int]:
    parents: dict[int, list[int]] = {}
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
        parents.setdefault(parent, []).append(int(entry.name))
    found, queue = [], [pid]
    while queue:
        found += (more := parents.get(queue.pop(), []))
        queue += more
    return found


# Whole commands: each brings its own Ray to life, or is told of a cluster


@pytest.mark.parametrize(
    "number", [signal.SIGKILL, signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.full)]
)
def test_nothing_outlives_the_command(number: int, tmp_path: Path) -> None:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    process = subprocess.Popen(
        command(*job("waits"), "launcher=ray", "launcher.stop_timeout=1"),
        cwd=tmp_path,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    signal.signal(signal.SIGINT, before)
    with process:
        pids = pids_told(process, 2)
        everything = descendants(process.pid)
        assert set(pids) < set(everything)
        os.kill(pids[0], signal.SIGSTOP)  # it could not notice by itself
        (guard,) = [pid for pid in everything if b"ray_guard" in cmdline(pid)]
        folder = Path(cmdline(guard).split(b"\0")[-2].decode())
        assert folder.exists()
        os.killpg(process.pid, number) if number == signal.SIGINT else process.send_signal(number)
        _, err = process.communicate(timeout=PATIENCE)
        codes = {signal.SIGKILL: -signal.SIGKILL, signal.SIGINT: 130, signal.SIGTERM: 143}
        assert process.returncode == codes[signal.Signals(number)], err
        until(lambda: all(gone(pid) for pid in everything), "the end of all that the command started")
        assert not folder.exists()


def pids_told(process: subprocess.Popen[str], count: int) -> list[int]:
    """The pids that ranks log."""
    assert process.stdout
    pids: list[int] = []
    for line in process.stdout:
        pids += [int(text) for text in re.findall(r"\[rank \d\] pid (\d+)", line)]
        if len(pids) == count:
            return pids
    raise AssertionError(process.communicate()[1])


def test_a_lost_node_and_a_restart_on_another(tmp_path: Path) -> None:
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, connect=False, head_node_args={"num_cpus": 1, "include_dashboard": False})
    try:
        node = cluster.add_node(num_cpus=1)
        arguments = [
            *("launcher=ray", f"launcher.address={cluster.address}", "launcher.num_workers=2"),
            *("launcher.max_restarts=1", "launcher.place_timeout=120", f"output_dir={tmp_path}/out"),
            f"+launcher.runtime_env.working_dir={TESTS}",
        ]
        process = subprocess.Popen(
            command(*job("waits_once"), *arguments),
            cwd=tmp_path,
            env=environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        with process:
            first = pids_told(process, 2)
            cluster.remove_node(node, allow_graceful=False)  # its raylet is killed
            cluster.add_node(num_cpus=1)
            out, err = process.communicate(timeout=PATIENCE)
            assert process.returncode == 0, err
            assert re.search(r"distattn: rank \d of 2 was lost by Ray: .*; restart 1 of 1", err)
            assert out.splitlines()[-1] == "done after 2 attempts"
            second = [int(text) for text in re.findall(r"\[rank \d\] pid (\d+)", out)]
            assert len(second) == 2
            until(lambda: all(gone(pid) for pid in first + second), "the end of all actors")
    finally:
        cluster.shutdown()
