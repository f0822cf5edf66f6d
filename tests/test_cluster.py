"""A run on a Ray cluster: what it needs, how its processes are started, watched and started again. test_cluster_runs.py trains there."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import pytest

from bbopd.cli.main import main
from bbopd.cluster.access import SERVER_NAME, ClusterAccess
from bbopd.cluster.driver import Programs, run_on_cluster
from bbopd.cluster.engines import FOLDER, LOCK, want_engines
from bbopd.cluster.host import Host, Place
from bbopd.cluster.hosts import connected, look
from bbopd.cluster.needs import Node, check_room, missing_of, needs_of, nodes_of
from bbopd.cluster.ranks import LOST, Verdict, describe, environments, judge
from bbopd.cluster.servers import backoff_seconds
from bbopd.config import ClientTlsConfig, RunConfig
from bbopd.config_file import load_config, parse_config
from bbopd.errors import ClusterError, ConfigError, TeacherError
from bbopd.rpc.security import ClientAccess, ServerAccess, Token
from bbopd.rpc.server import start_server
from bbopd.teachers.fake import FakeBackend
from bbopd.teachers.remote import RemoteTeacher
from tests.cli_runs import write_config
from tests.loop_rig import run_config
from tests.ray_nodes import two_nodes
from tests.tiny_models import save_folder, tiny_llama, tiny_tokenizer
from tests.waiting import PATIENCE


def config_of(folder: Path, **cluster) -> RunConfig:
    return run_config(folder, cluster=cluster)


# ------------------------------------------------------------ what is needed, and what is there


def test_what_does_not_fit_is_refused_with_what_is_there() -> None:
    nodes = [Node("10.0.0.1", 4, 2), Node("10.0.0.2", 4, 2)]
    fits = config_of(Path("run"), ranks=4)
    check_room(needs_of(fits, nodes), nodes, 0)
    assert [need.gpus for need in needs_of(fits, nodes)] == [1, 1, 1], "where there are GPUs, each process gets one"
    with pytest.raises(ConfigError) as caught:
        check_room(needs_of(config_of(Path("run"), ranks=5), nodes), nodes, 0)
    said = str(caught.value)
    assert "cluster.ranks 5 (1 CPUs and 1 GPUs each)" in said
    assert "10.0.0.1 has 4 CPUs and 2 GPUs; 10.0.0.2 has 4 CPUs and 2 GPUs" in said
    assert "Lower cluster.ranks or cluster.rank_needs, add nodes, or set cluster.wait" in said
    with pytest.raises(ConfigError, match=r"after 60 s \(cluster.wait\)"):
        check_room(needs_of(config_of(Path("run"), rank_needs={"cpus": 5, "gpus": 0}), nodes), nodes, 60.0)
    with pytest.raises(ConfigError, match="no node at all"):
        check_room(needs_of(fits, []), [], 0)


def test_the_example_fits_the_nodes_that_it_names() -> None:
    config = load_config(Path(__file__).parents[1] / "configs" / "ray.yaml")
    nodes = [Node("10.0.0.1", 64, 8), Node("10.0.0.2", 64, 8)]
    needs = needs_of(config, nodes)
    assert [(need.name, need.count) for need in needs] == [("rank", 8), ("teacher", 1), ("engine", 4)]
    check_room(needs, nodes, config.cluster.wait)
    with pytest.raises(ConfigError, match=r"cluster.engines 4 \(8 CPUs and 1 GPUs each\)"):
        check_room(needs, nodes[:1], config.cluster.wait)


def test_a_plan_says_where_the_processes_would_be(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = ray_file(tmp_path, ranks=3, engines=[1, 4], rank_needs={"cpus": 2}, engine_needs={"cpus": 1})
    assert main(["plan", str(file), "--nodes", "2", "--node-gpus", "3", "--node-cpus", "8"]) == 0
    said = capsys.readouterr().out
    assert "cluster   node 1 (8 CPUs and 3 GPUs): 3 ranks; 2 CPUs and 0 GPUs free" in said
    assert "          node 2 (8 CPUs and 3 GPUs): 1 teacher, 1 engine; 6 CPUs and 1 GPUs free" in said
    assert "room for 2 engines, of the 4 that cluster.engines allows" in said
    assert "machine   3 GPUs" in said
    assert "weights beside the run" not in said, "the teacher is on a GPU of its own"
    assert main(["plan", str(file), "--nodes", "1", "--node-gpus", "4", "--json"]) == 1
    told = json.loads(capsys.readouterr().out)["cluster"]
    assert not told["fits"]
    assert "cluster.ranks 3 (2 CPUs and 1 GPUs each)" in told["problem"]
    assert main(["plan", str(file), "--nodes", "2", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)["cluster"]
    assert [node["holds"] for node in told["nodes"]] == [{"rank": 3, "teacher": 1, "engine": 1}, {}]
    assert told["engines"] == {"room": 4, "most": 4}


def ray_file(folder: Path, **cluster) -> Path:
    """A run whose teacher and engines a cluster would start."""
    model = save_folder(folder / "model", tiny_llama(vocab_size=262), tiny_tokenizer())
    (folder / "corpus.txt").write_text("some text")
    file = write_config(folder, model, folder / "corpus.txt", rollouts={"engine": "vllm"}, cluster=cluster, student={"init": {}})
    return file


def test_only_living_nodes_count() -> None:
    told = [
        {"NodeManagerAddress": "a", "Alive": True, "Resources": {"CPU": 2.0}},
        {"NodeManagerAddress": "b", "Alive": False, "Resources": {"CPU": 8.0}},
    ]
    assert nodes_of(told) == [Node("a", 2.0, 0.0)]


def test_engines_need_vllm_and_an_order(tmp_path: Path) -> None:
    assert config_of(tmp_path, ranks=1).cluster.engines == (0, 0)
    with pytest.raises(ValueError, match=r"rollouts.engine=vllm"):
        config_of(tmp_path, engines=2)
    vllm = {"engine": "vllm"}
    assert run_config(tmp_path, rollouts=vllm, cluster={"engines": 2}).cluster.engines == (2, 2)
    for engines in ([3, 2], [0, 2]):
        with pytest.raises(ValueError, match="how many to begin with"):
            run_config(tmp_path, rollouts=vllm, cluster={"engines": engines})
    with pytest.raises(ConfigError, match=r"unknown key cluster.rank \(value 2\): did you mean cluster.ranks"):
        parse_config({"student": {"model": "m"}, "cluster": {"rank": 2}}, (), RunConfig, "run.yaml")


# ------------------------------------------------------------ ranks


def test_ranks_are_numbered_as_torchrun_would() -> None:
    places = [Place("n1", "10.0.0.1", ("0",)), Place("n1", "10.0.0.1", ("3",)), Place("n2", "10.0.0.2", ("1",))]
    found = environments(places, 1234)
    assert [(one["RANK"], one["LOCAL_RANK"], one["LOCAL_WORLD_SIZE"]) for one in found] == [
        ("0", "0", "2"),
        ("1", "1", "2"),
        ("2", "0", "1"),
    ]
    assert {(one["WORLD_SIZE"], one["MASTER_ADDR"], one["MASTER_PORT"]) for one in found} == {("3", "10.0.0.1", "1234")}
    assert [one["CUDA_VISIBLE_DEVICES"] for one in found] == ["0,3", "0,3", "1"]
    assert "CUDA_VISIBLE_DEVICES" not in environments([Place("n1", "10.0.0.1", ())], 1)[0]


@pytest.mark.parametrize(
    ("statuses", "has_trained", "verdict"),
    [
        ([0, 0], False, Verdict.FINISHED),
        ([130, 0], True, Verdict.STOPPED),
        ([8, 137], False, Verdict.AGAIN),
        ([8, LOST], False, Verdict.AGAIN),
        ([137, 8], True, Verdict.AGAIN),
        ([8, 8], True, Verdict.AGAIN),
        ([2, 8], True, Verdict.FAILED),
        ([8, 2], True, Verdict.FAILED),
        ([7, 0], True, Verdict.FAILED),
        ([3, 0], True, Verdict.AGAIN),
        ([3, 0], False, Verdict.FAILED),
        ([8, 1], False, Verdict.FAILED),
        ([6, 8], True, Verdict.AGAIN),
    ],
)
def test_what_follows_from_how_ranks_end(statuses: list[int], has_trained: bool, verdict: Verdict) -> None:
    assert judge(statuses, has_trained=has_trained) is verdict


def test_restarts_say_who_was_the_cause() -> None:
    assert describe([8, 137]) == "rank 1 was ended by signal SIGKILL"
    assert describe([LOST, 3]) == "rank 0 is lost with its node, rank 1 ended with exit status 3"
    assert describe([8, 8]) == "rank 0 ended with exit status 8"
    assert [backoff_seconds(2.0, restarts) for restarts in (0, 1, 4, 30)] == [2.0, 4.0, 32.0, 60.0]


# ------------------------------------------------------------ a process and what has started it


def ward(*command: str, grace: float = 30.0) -> subprocess.Popen[str]:
    words = [sys.executable, "-m", "bbopd.cluster.ward", str(os.getpid()), str(grace)]
    return subprocess.Popen([*words, sys.executable, "-c", *command], stdout=subprocess.PIPE, text=True)


@pytest.mark.parametrize(("ends", "status"), [("raise SystemExit(7)", 7), ("import os; os.kill(os.getpid(), 9)", 137)])
def test_a_ward_ends_as_its_process_does(ends: str, status: int) -> None:
    with ward(ends) as process:
        assert process.wait(PATIENCE) == status


@pytest.mark.parametrize("obeys", [True, False])
def test_a_process_does_not_outlive_what_has_started_it(obeys: bool) -> None:
    handler = "lambda *_: (print('asked', flush=True), sys.exit(5))" if obeys else "signal.SIG_IGN"
    program = f"import signal, sys, time; signal.signal(signal.SIGTERM, {handler}); print('ready', flush=True); time.sleep(600)"
    starter = '"$0" -m bbopd.cluster.ward $$ "$1" "$0" -c "$2" & read line'  # ends once it is told something
    words = ["sh", "-c", starter, sys.executable, str(600.0 if obeys else 0.5), program]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        said, _ = process.communicate("end\n", timeout=PATIENCE)  # until nobody is left who could say something
    assert said == ("asked\n" if obeys else "")


@pytest.mark.parametrize("obeys", [True, False])
def test_a_process_outlives_what_ray_ends_for_as_long_as_it_saves(obeys: bool) -> None:
    """Ray's worker kills its child once its driver is gone."""
    handler = "lambda *_: sys.exit(print('saved', flush=True))" if obeys else "signal.SIG_IGN"
    program = f"import signal, sys, time; signal.signal(signal.SIGTERM, {handler}); print('ready', flush=True); time.sleep(600)"
    with ward(program, grace=30.0 if obeys else 0.5) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.kill()
        assert process.stdout.read() == ("saved\n" if obeys else ""), "to the end of the last who could write here"


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 5), (signal.SIGUSR1, 137)])
def test_signals_reach_the_process(number: int, status: int) -> None:
    with ward(
        "import signal, sys, time; signal.signal(15, lambda *_: sys.exit(5)); print('ready', flush=True); time.sleep(600)"
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.send_signal(number)
        assert process.wait(PATIENCE) == status


def test_a_ward_that_is_killed_as_a_whole_takes_its_process_along() -> None:
    program = "import os, signal, time; signal.signal(15, signal.SIG_IGN); print(os.getppid(), flush=True); time.sleep(600)"
    with ward(program) as process:
        assert process.stdout is not None
        inner = int(process.stdout.readline())
        assert inner != process.pid
        process.kill()
        os.kill(inner, signal.SIGKILL)
        assert process.stdout.read() == "", "and with it the last who could write here"


# ------------------------------------------------------------ access


async def test_servers_of_a_cluster_let_in_who_has_its_certificate_and_token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    access, other = ClusterAccess.make(), ClusterAccess.make()
    for name, text in (("here.pem", access.certificate), ("other.pem", other.certificate)):
        (tmp_path / name).write_text(text)
    served = ServerAccess(access.certificate.encode(), access.key.encode(), None, (Token(access.token),))
    served.require_safe("10.0.0.1")
    server = await start_server(FakeBackend(97), access=served)
    for ca, token, is_in in (("here.pem", access.token, True), ("other.pem", access.token, False), ("here.pem", other.token, False)):
        monkeypatch.setenv("A_TOKEN", token)
        client = ClientAccess.read(ClientTlsConfig(ca=str(tmp_path / ca), server_name=SERVER_NAME), None, "A_TOKEN", "")
        with nullcontext() if is_in else pytest.raises(TeacherError):
            seconds = PATIENCE if is_in else 0.5
            teacher = await RemoteTeacher.connect(f"grpc://127.0.0.1:{server.port}", access=client, connect_timeout=seconds)
            await teacher.close()
    await server.stop(0.2)
    assert access.token not in repr(access)
    assert "PRIVATE" not in repr(access)


# ------------------------------------------------------------ real Ray: two nodes on this machine


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    with two_nodes(cpus=1) as nodes:
        yield nodes.address


def test_ranks_are_placed_on_both_nodes_and_start_again_until_they_finish(cluster: str, tmp_path: Path) -> None:
    config = config_of(tmp_path, ranks=2, backoff=0.1)
    (tmp_path / "endings").write_text("wait,kill\n8,8\n0,0\n")
    notes: list[str] = []
    assert run_on_cluster(config, cluster, notes.append, Programs(rank="tests.cluster_rank")) == 0
    found = [[json.loads(line) for line in (tmp_path / f"attempts-{rank}").read_text().splitlines()] for rank in range(2)]
    for one, other in zip(*found, strict=True):
        assert (one["RANK"], other["RANK"], one["WORLD_SIZE"]) == ("0", "1", "2")
        assert (one["LOCAL_WORLD_SIZE"], one["LOCAL_RANK"], other["LOCAL_RANK"]) == ("1", "0", "0"), "a node each"
        assert (one["MASTER_ADDR"], one["MASTER_PORT"]) == (other["MASTER_ADDR"], other["MASTER_PORT"])
    assert len(found[0]) == 3
    told = json.loads((tmp_path / "cluster.json").read_text())
    assert told["restarts"] == {"ranks": 2, "teachers": 0, "engines": 0}
    assert any("rank 1 was ended by signal SIGKILL: all ranks go on from the last checkpoint" in note for note in notes)
    assert "rank 0 in attempt 3" in "".join(notes)
    assert "rank 1 in attempt 1" in (tmp_path / FOLDER / "rank-1.log").read_text()
    assert not Path(f"/proc/{found[0][0]['pid']}").exists(), "the first rank was waiting, and has been ended"


def test_the_doctor_looks_at_the_cluster(cluster: str, tmp_path: Path) -> None:
    placed, missing = look(config_of(tmp_path, ranks=2), cluster)
    assert [dict(one.pieces) for one in placed] == [{"rank": 1}, {"rank": 1}]
    assert not missing
    with pytest.raises(ConfigError, match=r"no room for the run: it needs cluster.ranks 3"):
        look(config_of(tmp_path, ranks=3), cluster)
    with connected(cluster) as ray:
        holder = ray.remote(Host).options(num_cpus=1).remote()
        ray.get(holder.place.remote())
        nodes = nodes_of(ray.nodes())
        assert missing_of(needs_of(config_of(tmp_path, ranks=2), nodes), ray.available_resources()) == "2 CPUs, of which 1 are free"


@pytest.mark.slow
def test_a_cluster_that_is_too_small_and_ranks_that_always_die_are_said_so(cluster: str, tmp_path: Path) -> None:
    started = time.monotonic()
    with pytest.raises(ConfigError, match=r"no room for the run: it needs cluster.ranks 3 .* has 1 CPUs and 0 GPUs; .* has 1 CPUs"):
        run_on_cluster(config_of(tmp_path, ranks=3), cluster, print)
    assert time.monotonic() - started < 120, "and not waited for"
    (tmp_path / "endings").write_text("kill\n" * 2)
    config = config_of(tmp_path, ranks=1, max_restarts=1, backoff=0.1)
    with pytest.raises(ClusterError, match=r"rank 0 was ended by signal SIGKILL; the ranks have been started again 1 times"):
        run_on_cluster(config, cluster, print, Programs(rank="tests.cluster_rank"))
    (tmp_path / "endings").write_text("2\n" * 3)
    assert run_on_cluster(config, cluster, print, Programs(rank="tests.cluster_rank")) == 2
    assert len((tmp_path / "attempts-0").read_text().splitlines()) == 3, "an error with a name is not tried again"


@pytest.mark.slow
def test_a_lost_node_is_made_up_for_by_another(tmp_path: Path) -> None:
    (tmp_path / "endings").write_text("wait,wait\n0,0\n")
    notes: list[str] = []
    with two_nodes(cpus=1) as nodes:

        def show(text: str) -> None:
            notes.append(text)
            if "2 ranks on" in text and sum("2 ranks on" in note for note in notes) == 1:
                while not all((tmp_path / f"attempts-{rank}").exists() for rank in range(2)):
                    time.sleep(0.05)
                nodes.remove_node(next(iter(nodes.worker_nodes)))
                nodes.add_node(num_cpus=1, object_store_memory=80 * 2**20)

        config = config_of(tmp_path, ranks=2, backoff=0.1)
        assert run_on_cluster(config, nodes.address, show, Programs(rank="tests.cluster_rank")) == 0
    assert "is lost with its node" in "".join(notes)
    assert json.loads((tmp_path / "cluster.json").read_text())["restarts"]["ranks"] == 1


def test_what_no_run_can_have_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="Ray Client's address"), connected("ray://head:10001"):
        pass
    with pytest.raises(ConfigError, match="no run that a driver"):
        want_engines(tmp_path, 2)
    (tmp_path / FOLDER).mkdir()
    (tmp_path / FOLDER / LOCK).touch()
    with pytest.raises(ConfigError, match="no run that a driver"):
        want_engines(tmp_path, 2)
