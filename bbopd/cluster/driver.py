"""``bbopd distill run.yaml --ray``: the run's processes started on the cluster, watched, and started again, until the run is over.

The driver trains nothing and holds no state of the run: the ranks do what they do under ``torchrun``, and go on from their checkpoints. How
often it had to help is in ``cluster.json``.
"""

from __future__ import annotations

import fcntl
import json
import os
import signal
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Any

from bbopd.cluster.access import SERVER_NAME, TOKEN_VARIABLE, ClusterAccess
from bbopd.cluster.engines import FOLDER, LOCK, Engines, Tell
from bbopd.cluster.host import Launch
from bbopd.cluster.hosts import Hosts, connected
from bbopd.cluster.ranks import INTERRUPTED, RankGroup, Verdict, describe, judge
from bbopd.cluster.record import ClusterRecord
from bbopd.cluster.scaling import Scaler
from bbopd.cluster.servers import Served, Server, backoff_seconds
from bbopd.config import RunConfig
from bbopd.errors import ClusterError, ConfigError
from bbopd.pipeline.folder import RunFolder

_POLL_S = 0.5
_PLACED_S = 120.0  # for actors to start in places that are held


@dataclass(frozen=True, slots=True)
class Programs:
    """The modules that the processes run, each with the arguments of the command that it stands for."""

    rank: str = "bbopd"
    teacher: str = "bbopd"
    engine: str = "bbopd"


def run_on_cluster(config: RunConfig, address: str, show: Tell, programs: Programs = Programs()) -> int:
    """Run ``config`` on Ray at ``address`` to its end, or on from where it stopped; returns the exit status of the first rank.

    ``show`` gets what the first rank prints, as it comes, and what the driver does, in lines.

    Raises
    ------
    ConfigError
        No Ray there, or not enough in it.
    ClusterError
        Processes died more often than ``cluster.max_restarts``, or what was there is there no more.
    """

    def tell(text: str) -> None:
        show(f"{text}\n")

    config = config.model_copy(update={"output": str(Path(config.output).absolute())})
    folder = RunFolder(Path(config.output))
    folder.refuse_finished()
    with ExitStack() as stack:
        place = _make_place(folder.root)
        stack.enter_context(_only_driver(place))
        ray = stack.enter_context(connected(address))
        stop = stack.enter_context(_stop_on_signals(tell))
        hosts = Hosts.reserve(ray, config, tell)
        stack.callback(hosts.release)
        driver = _Driver(config, hosts, folder, place, show, programs)
        stack.callback(driver.stop_servers)
        return driver.run(stop)


class _Stop:
    """Whether a person, or a scheduler, has asked for the end."""

    is_asked = False


class _Driver:
    def __init__(self, config: RunConfig, hosts: Hosts, folder: RunFolder, place: Path, show: Tell, programs: Programs) -> None:
        self._config, self._hosts, self._folder, self._place, self._show = config, hosts, folder, place, show
        self._record = ClusterRecord(folder)
        self._access = ClusterAccess.make()
        (place / "certificate.pem").write_text(self._access.certificate, encoding="utf-8")
        self._programs = programs
        self._teachers = [self._teacher(number) for number in range(hosts.count("teacher"))]
        self._engines = Engines(config, hosts, place, self._engine, self._tell)
        scale = config.cluster.scale
        self._scaler = None if scale is None else Scaler(folder.root / "metrics.jsonl", scale, config.cluster.engines[1])
        launch = self._launch("rank-{rank}", programs.rank)
        own = {TOKEN_VARIABLE: self._access.token}
        self._ranks = RankGroup(hosts, replace(launch, arguments=("distill", str(place / "run.json"), "--plain"), environment=own))

    def run(self, stop: _Stop) -> int:
        """One attempt after another."""
        cluster, restarts = self._config.cluster, 0
        while True:
            targets = self._wait_for_servers(stop)
            self._wait_for_folder(stop)
            if stop.is_asked:
                return INTERRUPTED
            self._write_config(targets)
            before = self._trained()
            nodes = self._ranks.start(cluster.wait + _PLACED_S)
            self._tell(f"{len(nodes)} ranks on {', '.join(dict.fromkeys(nodes))}; logs in {self._place}")
            statuses = self._attend(targets, stop)
            verdict = judge(statuses, has_trained=self._trained() != before)
            if verdict is not Verdict.AGAIN:
                return next((status for status in statuses if status not in (0, 8)), 0) if statuses[0] else 0
            what = describe(statuses)
            if stop.is_asked or restarts >= cluster.max_restarts:
                raise ClusterError(
                    f"{what}; the ranks have been started again {restarts} times (cluster.max_restarts): see {self._place}; the same "
                    "command goes on from the last checkpoint"
                )
            delay = backoff_seconds(cluster.backoff, restarts)
            restarts += 1
            self._restarted(
                "ranks", f"{what}: all ranks go on from the last checkpoint in {delay:g} s ({restarts} of {cluster.max_restarts})"
            )
            time.sleep(delay)

    def stop_servers(self) -> None:
        for server in self._teachers:
            server.stop()
        self._engines.stop()
        if self._scaler is not None:
            self._scaler.close()

    # ------------------------------------------------------------ one attempt

    def _attend(self, targets: list[str], stop: _Stop) -> list[int]:
        """Look after everything until a rank has ended, then end the others; returns their exit statuses."""
        is_told = False
        while True:
            heard = self._ranks.hear()
            self._show(heard.text)
            failed = [status for status in heard.statuses if status]
            if failed or heard.statuses[0] == 0:
                return self._ranks.end(self._show)
            self._look_after_servers()
            self._scale()
            now = [server.target for server in self._teachers]
            if all(now) and now != targets:
                self._tell("the teacher is on another node now: all ranks go on from the last checkpoint with that")
                return self._ranks.end(self._show)
            if stop.is_asked and not is_told:
                self._ranks.terminate()
                is_told = True
            time.sleep(_POLL_S)

    def _look_after_servers(self) -> None:
        for server in self._teachers:
            server.look(lambda text: self._restarted("teachers", text))
        self._engines.look(lambda text: self._restarted("engines", text))

    def _scale(self) -> None:
        """Have more or fewer engines where what the run waits for asks for it."""
        if self._scaler is None:
            return
        now = self._engines.wanted
        wanted = self._scaler.wanted(now)
        if wanted == now:
            return
        window = self._scaler.last
        assert window is not None, "it has asked for the change"
        self._engines.want(wanted)
        way = "more" if wanted > now else "fewer"
        text = (
            f"{wanted} engines wanted instead of {now}: in {window.seconds:.0f} s the trainer waited {window.starved:.0f} s for answers to "
            f"be written, and engines had none to write for {window.idle:.0f} s"
        )
        self._show(f"{text}\n")
        self._record.scaled(way, text)

    def _wait_for_servers(self, stop: _Stop) -> list[str]:
        """Until every teacher answers, and an engine; the teachers' addresses. Raises `ClusterError` where that takes too long."""
        limit = self._config.teacher.start_timeout
        deadline = time.monotonic() + limit
        while not (self._engines.are_there and all(server.target for server in self._teachers)) and not stop.is_asked:
            if time.monotonic() > deadline:
                raise ClusterError(f"teachers and engines have not answered within {limit:g} s (teacher.start_timeout): see {self._place}")
            self._look_after_servers()
            time.sleep(_POLL_S)
        return [server.target for server in self._teachers]

    def _wait_for_folder(self, stop: _Stop) -> None:
        """Until nobody writes in the run's folder: ranks of a driver that was killed save, and end, by themselves."""
        limit = self._config.cluster.grace + 10.0
        deadline = time.monotonic() + limit
        is_told = False
        while not stop.is_asked:
            try:
                with self._folder.lock():
                    return
            except ConfigError as error:
                if time.monotonic() > deadline:
                    raise ClusterError(f"{error} (waited {limit:g} s for it)") from error
            if not is_told:
                self._tell("waiting for ranks of before to save and end")
                is_told = True
            time.sleep(_POLL_S)

    # ------------------------------------------------------------ what processes are started with

    def _teacher(self, number: int) -> Server:
        serve, cluster = self._config.teacher.serve, self._config.cluster
        assert serve is not None, "only then is there room for one"
        served = Served.teacher(serve, self._launch(f"teacher-{number}", self._programs.teacher), self._access)
        return Server(self._hosts, "teacher", number, served, max_restarts=cluster.max_restarts, backoff=cluster.backoff)

    def _engine(self, number: int) -> Server:
        cluster, trusts = self._config.cluster, self._config.student.trust_remote_code
        served = Served.engine(self._launch(f"engine-{number}", self._programs.engine), self._access, trust_remote_code=trusts)
        return Server(self._hosts, "engine", number, served, max_restarts=cluster.max_restarts, backoff=cluster.backoff)

    def _launch(self, name: str, module: str) -> Launch:
        log = str(self._place / f"{name}.log")
        return Launch(arguments=(), log=log, module=module, folder=os.getcwd(), grace=self._config.cluster.grace)

    def _write_config(self, targets: list[str]) -> None:
        """The run as the ranks read it: its servers are elsewhere."""
        data: dict[str, Any] = self._config.model_dump(mode="json")
        access = {"tls": {"ca": str(self._place / "certificate.pem"), "server_name": SERVER_NAME}, "token_env": TOKEN_VARIABLE}
        if targets:
            serve = data["teacher"]["serve"]
            own = {"tokenizer": serve["model"]} if self._config.objective.name == "aligned" and not data["teacher"]["tokenizer"] else {}
            data["teacher"] |= {"serve": None, "target": targets, **access, **own}
        if self._config.cluster.engines[0]:
            data["cluster"] |= {"engines": [0, 0], "scale": None}
            data["rollouts"] |= {"targets_file": str(self._engines.targets_file), **access}
        (self._place / "run.json").write_text(json.dumps(data, indent=1), encoding="utf-8")

    def _trained(self) -> int:
        """Bytes of the figures of all updates so far."""
        figures = self._folder.root / "metrics.jsonl"
        return figures.stat().st_size if figures.exists() else 0

    def _restarted(self, kind: str, text: str) -> None:
        self._show(f"{text}\n")
        self._record.restarted(kind, text)

    def _tell(self, text: str) -> None:
        self._show(f"{text}\n")
        self._record.note(text)


def _make_place(root: Path) -> Path:
    place = root / FOLDER
    try:
        place.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"cannot create the run's folder {root}: {error.strerror or error}; set output=") from error
    return place


@contextmanager
def _only_driver(place: Path) -> Iterator[None]:
    """Raises `ConfigError` where another driver has the run."""
    with (place / LOCK).open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ConfigError(f"another driver runs {place.parent}: wait for it, or set output= to another folder") from error
        yield


@contextmanager
def _stop_on_signals(tell: Tell) -> Iterator[_Stop]:
    """The first Ctrl-C or SIGTERM asks for a clean stop; the second ends the driver at once, and with it all processes by themselves."""
    stop = _Stop()

    def handle(number: int, frame: FrameType | None) -> None:
        if stop.is_asked:
            os._exit(INTERRUPTED)
        stop.is_asked = True
        tell("stopping after what is under way, with a checkpoint; Ctrl-C again leaves the processes to do so by themselves")

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
