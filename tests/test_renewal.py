"""Certificates and tokens that change while a server runs: real certificates, real tokens, a real process."""

from __future__ import annotations

import asyncio
import logging
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import grpc
import pytest

import bbopd.rpc.teacher_pb2_grpc as teacher_pb2_grpc
from bbopd.config import ServeConfig, ServerTlsConfig
from bbopd.errors import ConfigError, TeacherError
from bbopd.rpc.channel import open_channel
from bbopd.rpc.codec import encode_item
from bbopd.rpc.renewal import AccessRenewal
from bbopd.rpc.security import LiveAccess, ServerAccess, Token
from bbopd.rpc.server import start_server
from bbopd.teachers.fake import FakeBackend
from tests.certificates import make_certificates, replace_file
from tests.fault_registry import fault
from tests.test_security import OTHER, TOKEN, VOCAB, ask, client
from tests.test_server import WANT, next_answer, open_stream, rollout, status_of
from tests.waiting import PATIENCE, until

_SERVE = """
import sys
from pathlib import Path
from bbopd.config import ServeConfig
from bbopd.rpc.run_server import serve, set_up_logs
from bbopd.teachers.fake import FakeBackend
set_up_logs("text")
config = ServeConfig.model_validate_json(sys.argv[1])
serve(FakeBackend(50), config, ready_file=Path(sys.argv[2]))
"""


@pytest.fixture(scope="module")
def old(tmp_path_factory):
    return make_certificates(tmp_path_factory.mktemp("old"))


@pytest.fixture(scope="module")
def new(tmp_path_factory):
    return make_certificates(tmp_path_factory.mktemp("new"))


@pytest.fixture
def config(old, tmp_path):
    """A server's own files, beside those that clients know."""
    for name in ("server.pem", "server.key"):
        shutil.copy(old / name, tmp_path / name)
    (tmp_path / "tokens").write_text(f"{TOKEN}\n{OTHER}\n")
    tls = ServerTlsConfig(certificate=str(tmp_path / "server.pem"), key=str(tmp_path / "server.key"))
    return ServeConfig(model="fake", port=0, tls=tls, token_file=str(tmp_path / "tokens"))


def rotate(config: ServeConfig, pem: Path) -> None:
    replace_file(Path(config.tls.certificate), (pem / "server.pem").read_bytes())
    replace_file(Path(config.tls.key), (pem / "server.key").read_bytes())


@fault("certificate and token replaced while the server runs (SIGHUP)", "new ones hold at once; a call with a token taken out is ended")
async def test_a_process_reads_its_certificates_and_tokens_again(config, old, new, tmp_path):
    ready, log = tmp_path / "address", tmp_path / "log"
    with log.open("wb") as output:
        process = subprocess.Popen([sys.executable, "-c", _SERVE, config.model_dump_json(), str(ready)], stderr=output)
    try:
        await until(ready.exists, 2 * PATIENCE)
        port = int(ready.read_text().rpartition(":")[2])
        server, target = SimpleNamespace(port=port), f"grpc://localhost:{port}"
        assert len(await ask(server, client(old, TOKEN, tmp_path, ca="ca.pem"))) == 3
        kept, ended = (open_channel(target, client(old, token, tmp_path, ca="ca.pem")) for token in (OTHER, TOKEN))
        async with kept, ended:
            stays, leaves = [await open_stream(teacher_pb2_grpc.TeacherServiceStub(channel)) for channel in (kept, ended)]
            rotate(config, new)
            replace_file(Path(config.token_file), f"# the first one is taken out\n{OTHER}\n".encode())
            process.send_signal(signal.SIGHUP)
            await until(lambda: "were read again" in log.read_text())
            assert await status_of(leaves) == (grpc.StatusCode.UNAUTHENTICATED, "the token of this call is not valid any more")
            await stays.write(encode_item(1, rollout(1), WANT))
            assert (await next_answer(stays)).chunk.request_id == 1, "a connection that is open stays, and so does its call"
            stays.cancel()
        assert len(await ask(server, client(new, OTHER, tmp_path, ca="ca.pem"))) == 3
        with pytest.raises(TeacherError, match="cannot reach a teacher"):
            await ask(server, client(old, OTHER, tmp_path, ca="ca.pem"), timeout=0.5)
        with pytest.raises(TeacherError, match="UNAUTHENTICATED"):
            await ask(server, client(new, TOKEN, tmp_path, ca="ca.pem"))
        process.send_signal(signal.SIGTERM)
        assert process.wait(PATIENCE) == 0
    finally:
        process.kill()
        process.wait()


@fault(
    "a certificate renewed without its key, or a token file that is empty", "says so and keeps what it had; the next change is another try"
)
async def test_files_that_change_are_read_and_unusable_ones_change_nothing(config, old, new, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    server = await start_server(FakeBackend(VOCAB), access=ServerAccess.from_config(config))
    renewal = AccessRenewal(config, server.renew_access, poll=0.02)
    watching = asyncio.create_task(renewal.run())

    def said(text: str) -> bool:
        return any(text in record.getMessage() for record in caplog.records)

    try:
        replace_file(Path(config.tls.certificate), (new / "server.pem").read_bytes())
        await until(lambda: said("are no pair of PEM files"))
        assert len(await ask(server, client(old, TOKEN, tmp_path, ca="ca.pem"))) == 3
        replace_file(Path(config.tls.key), (new / "server.key").read_bytes())
        await until(lambda: said("were read again"))
        assert len(await ask(server, client(new, TOKEN, tmp_path, ca="ca.pem"))) == 3
        replace_file(Path(config.token_file), b"# none\n")
        await until(lambda: said("holds no token"))
        Path(config.token_file).unlink()
        await until(lambda: said("No such file"))
        assert len(await ask(server, client(new, TOKEN, tmp_path, ca="ca.pem"))) == 3
        assert sum("stay as they were" in record.getMessage() for record in caplog.records) == 3, "each is said once"
    finally:
        watching.cancel()
        await server.stop(0.2)


def test_what_a_server_wants_of_its_clients_does_not_change_while_it_runs():
    token = (Token(TOKEN),)
    live = LiveAccess(ServerAccess(b"certificate", b"key", None, token))
    for other, name in (
        (ServerAccess(None, None, None, token), "tls"),
        (ServerAccess(b"c", b"k", b"ca", token), "tls.client_ca"),
        (ServerAccess(b"c", b"k"), "tokens"),
    ):
        with pytest.raises(ConfigError, match=f"^{name}: .* changes at a restart only"):
            live.renew(other)
    live.renew(ServerAccess(b"c", b"k", None, (Token(OTHER),)))
    assert live.now.token_of([("authorization", f"Bearer {TOKEN}")]) is None


def test_a_token_counts_for_the_same_client_wherever_it_stands():
    access = ServerAccess(tokens=(Token(TOKEN), Token(OTHER)))
    found = access.token_of([("authorization", f"Bearer {OTHER}")])
    assert found is not None
    assert found.name == Token(OTHER).name != Token(TOKEN).name
    assert OTHER[:8] not in found.name
