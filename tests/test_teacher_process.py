"""``bbopd serve`` as a process beside a run: it loads, answers, ends when told, and never outlives its parent."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from bbopd.cli.main import main
from bbopd.config import ServeConfig
from bbopd.errors import TeacherError
from bbopd.teachers.process import TeacherProcess
from bbopd.teachers.remote import RemoteTeacher
from bbopd.types import Prompt, Rollout, SignalSpec
from tests.waiting import PATIENCE, wait_until


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=100, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, max_position_embeddings=64
    )
    LlamaForCausalLM(config).save_pretrained(path)
    words = Tokenizer(WordLevel({f"w{number}": number for number in range(100)}, unk_token="w0"))
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w2").save_pretrained(path)
    return path


async def test_a_teacher_beside_the_run(folder, tmp_path):
    config = ServeConfig(model=str(folder), levels=("topk",), max_top_k=8)
    process = await TeacherProcess.start(config, tmp_path / "logs" / "teacher.log", timeout=240)
    try:
        assert process.alive
        assert os.getpgid(process.pid) == process.pid != os.getpgid(0), "Ctrl-C in the terminal does not reach it"
        teacher = await RemoteTeacher.connect(process.target)
        assert teacher.info.model == str(folder)
        assert [offer.level for offer in teacher.info.offers] == ["topk"]

        async def rollouts():
            yield Rollout("r", Prompt("p", (1, 2)), (3, 4, 5))

        scored = [one async for one in teacher.score(rollouts(), SignalSpec("topk", 1.0, 8))]
        assert scored[0].signal.ids.shape == (3, 8)
        await teacher.close()
    finally:
        process.stop(PATIENCE)
    assert not process.alive
    assert "stopped" in process.last_lines(), "SIGTERM was enough"
    process.stop()  # once more is harmless


async def test_one_that_cannot_start_says_why(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(TeacherError, match=r"ended with exit code 2; the end of .*teacher.log:\n(.|\n)*config.json"):
        await TeacherProcess.start(ServeConfig(model=str(tmp_path / "empty")), tmp_path / "teacher.log", timeout=120)


@pytest.mark.parametrize(
    ("log", "message"),
    [("file/teacher.log", "file: Not a directory|file: File exists"), ("full/teacher.log", "full/teacher.yaml: No space left on device")],
)
async def test_files_that_cannot_be_written_are_named_with_the_way_out(tmp_path, log, message):
    (tmp_path / "file").touch()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "teacher.yaml").symlink_to("/dev/full")
    with pytest.raises(TeacherError, match=rf"cannot start the teacher some/model: .*({message}); free some space there"):
        await TeacherProcess.start(ServeConfig(model="some/model"), tmp_path / log, timeout=5)


async def test_one_that_is_too_slow_is_ended(folder, tmp_path):
    with pytest.raises(TeacherError, match=r"was not ready after 0.2 s \(teacher.start_timeout\)"):
        await TeacherProcess.start(ServeConfig(model=str(folder)), tmp_path / "teacher.log", timeout=0.2)


_PARENT = """
import asyncio, os, signal, sys
from bbopd.config import ServeConfig
from bbopd.teachers.process import TeacherProcess
process = asyncio.run(TeacherProcess.start(ServeConfig(model=sys.argv[1]), sys.argv[2], timeout=240))
print(process.pid, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_it_ends_when_its_parent_is_killed(folder, tmp_path):
    parent = subprocess.run(
        [sys.executable, "-c", _PARENT, str(folder), str(tmp_path / "t.log")], capture_output=True, text=True, timeout=300
    )
    assert parent.returncode == -signal.SIGKILL, parent.stderr
    pid = int(parent.stdout)
    wait_until(lambda: not is_running(pid))


def is_running(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "nothing to serve: give a teacher.yaml, or --model"),
        (["--model", "x", "--host", "0.0.0.0"], "needs TLS and a token"),
        (["--model", "x", "--set", "max_topk=3"], "unknown key max_topk.*did you mean max_top_k"),
        (["--model", "x", "--port", "70000"], "port"),
        (["missing.yaml"], "cannot read missing.yaml"),
        (["--model", "./missing"], "there is no folder"),
    ],
)
def test_what_cannot_be_served_is_said(arguments, message, capsys):
    assert main(["serve", *arguments]) == 2
    assert pytest.raises(AssertionError, match=message).matches(AssertionError(capsys.readouterr().err))
