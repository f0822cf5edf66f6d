"""Who is let in: real certificates, real tokens, real sockets; and that a token is nowhere to be read."""

from __future__ import annotations

import contextlib
import logging
import os
import subprocess
import sys

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from bbopd.cli.main import main
from bbopd.config import ClientTlsConfig, ServeConfig, ServerTlsConfig, TeacherConfig
from bbopd.errors import ConfigError, TeacherError
from bbopd.rpc.channel import open_channel
from bbopd.rpc.observe import JsonFormatter
from bbopd.rpc.security import ClientAccess, ServerAccess, Token, is_loopback, peer_host, read_tokens
from bbopd.rpc.server import start_server
from bbopd.teachers.fake import FakeBackend
from bbopd.teachers.remote import RemoteTeacher
from bbopd.types import Prompt, Rollout, Sampling, SignalSpec
from tests.certificates import make_certificates
from tests.fault_registry import fault
from tests.waiting import PATIENCE

VOCAB = 50
TOKEN = "correct-horse-battery-staple-7f3a"
OTHER = "another-token-of-another-team-11"


@pytest.fixture(scope="module")
def pem(tmp_path_factory):
    return make_certificates(tmp_path_factory.mktemp("certificates"))


@pytest.fixture
def token_file(tmp_path):
    path = tmp_path / "token"
    path.write_text(f"# team one\n{TOKEN}\n\n# team two\n{OTHER}\n")
    return path


@contextlib.asynccontextmanager
async def serving(pem, token_file=None, *, client_ca=False, tls=True, host="127.0.0.1", **options):
    section = ServerTlsConfig(
        certificate=str(pem / "server.pem"), key=str(pem / "server.key"), client_ca=str(pem / "ca.pem") if client_ca else None
    )
    config = ServeConfig(model="fake", host=host, tls=section if tls else None, token_file=token_file and str(token_file))
    server = await start_server(FakeBackend(VOCAB), host=host, access=ServerAccess.from_config(config), **options)
    try:
        yield server
    finally:
        await server.stop(0.2)


def client(pem, token=None, tmp_path=None, **fields):
    if token is not None:
        (tmp_path / "client-token").write_text(token)
    given = {name: str(pem / value) if name != "server_name" else value for name, value in fields.items()}
    tls = ClientTlsConfig(**given)
    return ClientAccess.from_config(
        TeacherConfig(target="grpc://localhost:1", tls=tls, token_file=token and str(tmp_path / "client-token"))
    )


async def ask(server, access, host="localhost", timeout=PATIENCE):
    """Everything that a run asks of a teacher, once; the sampled logprobs."""
    teacher = await RemoteTeacher.connect(f"grpc://{host}:{server.port}", access=access, connect_timeout=timeout)
    try:

        async def rollouts():
            yield Rollout("r", Prompt("p", (1, 2)), (3, 4, 5))

        async def prompts():
            yield Prompt("p", (1, 2))

        scored = [one async for one in teacher.score(rollouts(), SignalSpec("sampled"))]
        assert len([one async for one in teacher.complete(prompts(), Sampling(3))]) == 1
        return scored[0].signal.sampled
    finally:
        await teacher.close()


# ---------------------------------------------------------------- tokens and TLS on the wire


@pytest.mark.parametrize("token", [TOKEN, OTHER])
async def test_tls_and_the_right_token_get_everything(pem, token_file, tmp_path, token):
    async with serving(pem, token_file) as server:
        assert len(await ask(server, client(pem, token, tmp_path, ca="ca.pem"))) == 3


@fault("token missing, or wrong", "the server turns the call away before it reads a message; the client ends, naming `teacher.token_file`")
@pytest.mark.parametrize("token", [None, TOKEN[:-1] + "b", TOKEN + "x", TOKEN.upper(), "Bearer" * 4], ids=str)
async def test_no_token_and_wrong_ones_get_nothing(pem, token_file, tmp_path, token):
    async with serving(pem, token_file) as server:
        with pytest.raises(TeacherError, match=r"let nobody in \(UNAUTHENTICATED.*check teacher.token_file"):
            await ask(server, client(pem, token, tmp_path, ca="ca.pem"))


@pytest.mark.parametrize(
    "metadata",
    [
        [],
        [("authorization", TOKEN)],
        [("authorization", f"Basic {TOKEN}")],
        [("authorization", "Bearer ")],
        [("authorization", f"Bearer {TOKEN}"), ("authorization", "Bearer x")],
        [("x-authorization", f"Bearer {TOKEN}")],
        [("authorization-bin", b"Bearer " + TOKEN.encode())],
    ],
)
async def test_every_method_is_closed_without_a_token_before_a_message_is_read(pem, token_file, metadata):
    async with serving(pem, token_file) as server, open_channel(f"grpc://localhost:{server.port}", client(pem, ca="ca.pem")) as channel:
        for method in ("GetInfo", "Score", "Generate", "Nothing"):
            call = channel.stream_stream(f"/bbopd.v1.TeacherService/{method}")(metadata=metadata)
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await call.read()
            assert refused.value.code() is grpc.StatusCode.UNAUTHENTICATED
        call = channel.unary_unary("/bbopd.v1.TeacherService/GetInfo")(b"", metadata=[("authorization", f"Bearer {TOKEN}")])
        assert VOCAB in await call


async def test_health_is_asked_without_a_token_and_says_nothing_else(pem, token_file):
    async with serving(pem, token_file) as server, open_channel(f"grpc://localhost:{server.port}", client(pem, ca="ca.pem")) as channel:
        answer = await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())
        assert answer == health_pb2.HealthCheckResponse(status=health_pb2.HealthCheckResponse.SERVING)


@fault("plain client against TLS", "the client ends after the time to connect, naming `teacher.tls`")
async def test_a_plain_client_and_a_tls_server_do_not_meet(pem, token_file):
    async with serving(pem, token_file) as server:
        with pytest.raises(TeacherError, match=rf"cannot reach a teacher at grpc://localhost:{server.port}.*teacher.tls"):
            await ask(server, ClientAccess(), timeout=0.5)


@fault("TLS client against a plain server", "the client ends after the time to connect, naming `teacher.tls`")
async def test_a_tls_client_and_a_plain_server_do_not_meet(pem):
    async with serving(pem, tls=False) as server:
        with pytest.raises(TeacherError, match=r"cannot reach a teacher.*teacher.tls"):
            await ask(server, client(pem, ca="ca.pem"), timeout=0.5)


@fault("a server that shows another certificate", "the client does not talk to it")
async def test_a_server_that_the_authority_does_not_vouch_for_is_not_believed(pem, token_file, tmp_path):
    async with serving(pem, token_file) as server:
        for access in (client(pem, TOKEN, tmp_path, ca="stranger.pem"), client(pem, TOKEN, tmp_path)):
            with pytest.raises(TeacherError, match="cannot reach a teacher"):
                await ask(server, access, timeout=0.5)


async def test_the_name_in_the_certificate_counts_and_can_be_given(pem, token_file, tmp_path):
    async with serving(pem, token_file) as server:
        with pytest.raises(TeacherError, match="cannot reach a teacher"):
            await ask(server, client(pem, TOKEN, tmp_path, ca="ca.pem", server_name="elsewhere.example"), timeout=0.5)
        assert len(await ask(server, client(pem, TOKEN, tmp_path, ca="ca.pem", server_name="teacher.example"))) == 3


@fault("no client certificate where one is wanted", "the server does not talk to it")
async def test_mutual_tls(pem, token_file, tmp_path):
    async with serving(pem, token_file, client_ca=True) as server:
        own = {"certificate": "client.pem", "key": "client.key"}
        assert len(await ask(server, client(pem, TOKEN, tmp_path, ca="ca.pem", **own))) == 3
        for fields in ({}, {"certificate": "stranger.pem", "key": "stranger.key"}):
            with pytest.raises(TeacherError, match="cannot reach a teacher"):
                await ask(server, client(pem, TOKEN, tmp_path, ca="ca.pem", **fields), timeout=0.5)
        with pytest.raises(TeacherError, match="UNAUTHENTICATED"):
            await ask(server, client(pem, OTHER + "x", tmp_path, ca="ca.pem", **own))


async def test_a_wildcard_address_with_both_is_served(pem, token_file, tmp_path):
    async with serving(pem, token_file, host="0.0.0.0") as server:
        assert len(await ask(server, client(pem, TOKEN, tmp_path, ca="ca.pem"), host="127.0.0.1")) == 3


# ---------------------------------------------------------------- what is refused before anything is served


@fault("non-loopback bind without TLS or token", "the server does not start, and says what to set")
@pytest.mark.parametrize("host", ["0.0.0.0", "192.168.1.7", "example.org", "::", "127.0.0.1.example.org", ""])
async def test_beyond_loopback_without_tls_or_token_nothing_is_served(host, pem):
    certificate, key = (pem / "server.pem").read_bytes(), (pem / "server.key").read_bytes()
    for access, missing in (
        (None, r"set tls.certificate and tls.key \(PEM files\) and token_file or token_env"),
        (ServerAccess(tokens=(Token(TOKEN),)), r"set tls.certificate and tls.key \(PEM files\);"),
        (ServerAccess(certificate, key), "set token_file or token_env;"),
    ):
        with pytest.raises(ConfigError, match=f"needs TLS and a token: {missing}"):
            await start_server(FakeBackend(VOCAB), host=host, access=access)


def test_the_command_refuses_before_it_loads_a_model(capsys):
    assert main(["serve", "--model", "there/is-none", "--host", "0.0.0.0"]) == 2
    assert "set tls.certificate and tls.key (PEM files) and token_file or token_env" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("tls", "message"),
    [
        (("missing.pem", "server.key"), "tls.certificate .*missing.pem: No such file"),
        (("server.pem", "missing.key"), "tls.key .*missing.key: No such file"),
        (("server.pem", "client.key"), "are no pair of PEM files.*(?i:mismatch)"),
        (("server.key", "server.key"), "are no pair of PEM files"),
        (("server.pem", "locked.key"), "locked.key is encrypted"),
        (("server.pem", "server.key", "server.key"), "tls.client_ca .*server.key holds no PEM certificate"),
    ],
)
def test_certificates_that_cannot_be_used_are_named(pem, tls, message):
    if not (pem / "locked.key").exists():
        command = ["openssl", "pkey", "-in", "server.key", "-out", "locked.key", "-aes256", "-passout", "pass:secret"]
        subprocess.run(command, cwd=pem, check=True, capture_output=True)
    certificate, key, *ca = (str(pem / name) for name in tls)
    section = ServerTlsConfig(certificate=certificate, key=key, client_ca=ca[0] if ca else None)
    with pytest.raises(ConfigError, match=message):
        ServerAccess.from_config(ServeConfig(model="fake", tls=section))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "holds no token"),
        ("# only a comment\n", "holds no token"),
        ("short", "token 1 has 5 characters"),
        (f"{TOKEN}\nwith a space in the middle of it", "token 2 has 32 characters"),
        ("ключ-из-шестнадцати-букв", "printable ASCII"),
    ],
)
def test_a_file_without_a_proper_token_is_refused_and_never_shown(tmp_path, content, message):
    path = tmp_path / "token"
    path.write_text(content)
    with pytest.raises(ConfigError, match=message) as refused:
        read_tokens(str(path), None, "")
    assert not content or content not in str(refused.value)


def test_where_a_token_may_come_from(token_file, monkeypatch):
    monkeypatch.setenv("TEACHER_TOKEN", TOKEN)
    (token,) = read_tokens(None, "TEACHER_TOKEN", "teacher.")
    assert token.matches(read_tokens(str(token_file), None, "")[0])
    assert not token.matches(Token(OTHER))
    with pytest.raises(ConfigError, match=r"teacher\.token_env ABSENT holds no token"):
        read_tokens(None, "ABSENT", "teacher.")
    with pytest.raises(ConfigError, match="both set: keep one"):
        read_tokens(str(token_file), "TEACHER_TOKEN", "")
    with pytest.raises(ConfigError, match="No such file"):
        read_tokens(str(token_file) + "s", None, "")


def test_a_client_sends_no_token_in_plain_text_and_leaves_the_machine_only_with_tls(token_file, tmp_path):
    (tmp_path / "one").write_text(TOKEN)
    with pytest.raises(ConfigError, match="a token never travels in plain text"):
        ClientAccess.from_config(TeacherConfig(target="grpc://localhost:1", token_file=str(tmp_path / "one")))
    with pytest.raises(ConfigError, match="holds 2 tokens: a client has one"):
        ClientAccess.from_config(TeacherConfig(target="grpc://localhost:1", token_file=str(token_file), tls=ClientTlsConfig()))
    with pytest.raises(ConfigError, match=r"needs TLS and a token: set teacher.tls .*ssh -L 7070:localhost:7070 10.0.0.1"):
        open_channel("grpc://10.0.0.1:7070")
    with pytest.raises(ValueError, match="give both, or neither"):
        ClientTlsConfig(certificate="x.pem")
    with pytest.raises(ValueError, match="tls and tokens belong to target"):
        TeacherConfig(serve=ServeConfig(model="x"), token_env="TOKEN")


def test_loopback_and_peers():
    assert all(map(is_loopback, ("localhost", "127.0.0.1", "127.8.9.1", "::1")))
    assert not any(map(is_loopback, ("0.0.0.0", "::", "localhost.example.org", "10.0.0.1", "")))
    assert peer_host("ipv4:10.0.0.5:41234") == "10.0.0.5"
    assert peer_host("ipv6:%5B::1%5D:41234") == peer_host("ipv6:[::1]:9") == "[::1]"


# ---------------------------------------------------------------- what is never shown


async def test_no_log_and_no_repr_holds_a_token(pem, token_file, tmp_path, caplog, capfd):
    caplog.set_level(logging.DEBUG)
    wrong = TOKEN[:-4] + "evil"
    async with serving(pem, token_file) as server:
        access = client(pem, TOKEN, tmp_path, ca="ca.pem")
        await ask(server, access)
        with pytest.raises(TeacherError) as refused:
            await ask(server, client(pem, wrong, tmp_path, ca="ca.pem"))
        shown = [repr(access), str(refused.value), repr(ServerAccess.from_config(ServeConfig(model="m", token_file=str(token_file))))]
    refusals = [record.fields for record in caplog.records if record.getMessage() == "call refused"]
    assert [(fields["reason"], len(fields["client"])) for fields in refusals] == [("unauthenticated", 12)]
    shown += [JsonFormatter().format(record) for record in caplog.records]
    out, err = capfd.readouterr()
    everything = "\n".join([caplog.text, out, err, *shown])
    assert not any(secret in everything for secret in (TOKEN, OTHER, wrong, TOKEN[:12]))


_GRPC_TRACE = """
import asyncio, sys
from pathlib import Path
from bbopd.config import ClientTlsConfig
from bbopd.rpc.observe import JsonFormatter
from bbopd.rpc.security import ClientAccess
from bbopd.teachers.remote import RemoteTeacher
async def main():
    access = ClientAccess.read(ClientTlsConfig(ca=sys.argv[2]), sys.argv[3], None, "")
    teacher = await RemoteTeacher.connect(f"grpc://localhost:{sys.argv[1]}", access=access, connect_timeout=60)
    print("connected to", teacher.info.model)
    await teacher.close()
asyncio.run(main())
"""


async def test_a_client_process_shows_no_token_either(pem, token_file, tmp_path):
    import asyncio

    (tmp_path / "one").write_text(TOKEN)
    async with serving(pem, token_file) as server:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-c", _GRPC_TRACE, str(server.port), str(pem / "ca.pem"), str(tmp_path / "one")),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env={**os.environ, "GRPC_VERBOSITY": "INFO"},
        )
        out, _ = await asyncio.wait_for(process.communicate(), 2 * PATIENCE)
    assert b"connected to fake-50-0" in out
    assert TOKEN.encode() not in out
