"""The command line in a shell: completion, ``--json``, colours, and exit statuses as they are documented."""

from __future__ import annotations

import io
import json
import os
import pty
import re
import select
import shutil
import subprocess
import time
import types
from pathlib import Path

import pytest

from bbopd import errors
from bbopd.cli import main as command_line
from bbopd.cli.main import build_parser, main
from bbopd.teachers.answer_store import AnswerStore

WITHOUT_RESULT = {"cluster scale", "serve", "sample-server", "completion", "cache"}  # `cache` has it in each of its actions


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def commands() -> dict[str, object]:
    (action,) = (action for action in build_parser()._actions if action.dest == "command")
    return action.choices


@pytest.fixture
def failing():
    """A command ``fail`` whose error is the one that is appended to the list that this gives."""
    raised: list[BaseException] = []

    def run(args: object) -> int:
        raise raised[0]

    command_line._COMMANDS["fail"] = (types.SimpleNamespace(add_arguments=lambda parser: None, run=run), "fail")
    yield raised
    del command_line._COMMANDS["fail"]


# ------------------------------------------------------------ completion


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_knows_every_command_in_a_script_that_the_shell_reads(shell, tmp_path, capsys):
    assert main(["completion", shell]) == 0
    script = tmp_path / f"bbopd.{shell}"
    script.write_text(capsys.readouterr().out)
    assert all(name in script.read_text() for name in commands() if " " not in name)
    if shutil.which(shell):
        read = subprocess.run([shell, "-n", str(script)], capture_output=True, text=True, check=False)
        assert (read.returncode, read.stderr) == (0, "")


def test_bash_completes_commands_flags_actions_and_files(tmp_path, capsys):
    main(["completion", "bash"])
    (tmp_path / "bbopd.bash").write_text(capsys.readouterr().out)
    (tmp_path / "mine.yaml").write_text("")

    def completed(*words: str) -> set[str]:
        at = f"COMP_WORDS=({' '.join(words)}); COMP_CWORD={len(words) - 1}"
        script = f'source bbopd.bash; {at}; _shtab_bbopd bbopd "{words[-1]}" "{words[-2]}"; printf "%s\\n" "${{COMPREPLY[@]}}"'
        done = subprocess.run(["bash", "-c", script], cwd=tmp_path, capture_output=True, text=True, check=True)
        return set(done.stdout.split())

    assert completed("bbopd", "do") == {"doctor"}
    assert completed("bbopd", "doctor", "--te") == {"--teacher-tokenizer"}
    assert completed("bbopd", "cache", "p") == {"prune"}
    assert completed("bbopd", "completion", "f") == {"fish"}
    assert completed("bbopd", "distill", "mi") == {"mine.yaml"}


def test_fish_completes_commands_flags_and_actions(tmp_path, capsys):
    if shutil.which("fish") is None:
        pytest.skip("fish is not installed")
    main(["completion", "fish"])
    (tmp_path / "bbopd.fish").write_text(capsys.readouterr().out)

    def completed(line: str) -> set[str]:
        script = f"source bbopd.fish; complete --do-complete '{line}'"
        environment = {**os.environ, "HOME": str(tmp_path)}
        done = subprocess.run(
            ["fish", "--no-config", "-c", script], cwd=tmp_path, capture_output=True, text=True, check=True, env=environment
        )
        return {line.split("\t")[0] for line in done.stdout.splitlines()}

    assert completed("bbopd do") == {"doctor"}
    assert completed("bbopd doctor --te") == {"--teacher-tokenizer"}
    assert completed("bbopd completion f") == {"fish"}
    assert "prune" in completed("bbopd cache p")


def test_zsh_completes_commands_flags_and_values(tmp_path, capsys):
    """At a terminal, which its completion needs: a key shows what the line has become."""
    if shutil.which("zsh") is None:
        pytest.skip("zsh is not installed")
    main(["completion", "zsh"])
    (tmp_path / "_bbopd").write_text(capsys.readouterr().out)
    (tmp_path / ".zshrc").write_text(
        f"fpath=({tmp_path} $fpath); autoload -U compinit; compinit -u -D\n"
        "show() { print -r -- \"<$BUFFER>\"; BUFFER= }; zle -N show; bindkey '^X' show; PS1='ready> '\n"
    )
    ours, theirs = pty.openpty()
    environment = {**os.environ, "HOME": str(tmp_path), "ZDOTDIR": str(tmp_path), "TERM": "dumb"}
    shell = subprocess.Popen(["zsh", "-d", "-i"], stdin=theirs, stdout=theirs, stderr=theirs, env=environment, start_new_session=True)
    os.close(theirs)

    def read_until(pattern: str) -> str:
        seen, deadline = "", time.monotonic() + 30
        while time.monotonic() < deadline:
            if select.select([ours], [], [], 0.1)[0]:
                seen += os.read(ours, 65536).decode(errors="replace")
            if found := re.search(pattern, seen):
                return found[0]
        raise AssertionError(f"{pattern} does not come; what came: {seen!r}")

    def completed(line: str) -> str:
        os.write(ours, f"{line}\t\x18".encode())
        return read_until("<[^<>]*>")

    try:
        read_until("ready> ")
        assert completed("bbopd doct") == "<bbopd doctor >"
        assert completed("bbopd doctor --teacher-tok") == "<bbopd doctor --teacher-tokenizer >"
        assert completed("bbopd completion f") == "<bbopd completion fish >"
    finally:
        shell.kill()
        shell.wait()
        os.close(ours)


# ------------------------------------------------------------ --json


def test_every_command_with_a_result_takes_json():
    assert {name for name, parser in commands().items() if "--json" not in parser.format_help()} == WITHOUT_RESULT
    (actions,) = (action for action in commands()["cache"]._actions if action.choices)
    assert all("--json" in action.format_help() for action in actions.choices.values())


def test_a_cache_is_told_in_json(tmp_path, capsys):
    path = tmp_path / "answers.db"
    AnswerStore(path).close()
    told = []
    for words in (["stats"], ["verify"], ["prune", "--older-than", "1"]):
        assert main(["cache", words[0], str(path), *words[1:], "--json"]) == 0
        told.append(json.loads(capsys.readouterr().out))
    assert told[0] == {"path": str(path), "bytes": path.stat().st_size, "kept": [], "unfinished": []}
    assert told[1:] == [{"right": 0, "dropped": 0}, {"removed": 0}]


# ------------------------------------------------------------ errors


@pytest.mark.parametrize(("settings", "is_coloured"), [({}, True), ({"NO_COLOR": "1"}, False), ({"TERM": "dumb"}, False)])
def test_errors_are_coloured_on_a_terminal_alone(settings, is_coloured, failing, monkeypatch, capsys):
    message = (
        "rollouts.engine is vllm: set rollouts.engine=hf, give --device, run `bbopd doctor`, or pip install 'bbopd[vllm]'; not run.yaml"
    )
    failing.append(errors.EngineError(message))
    assert main(["fail"]) == 6
    assert capsys.readouterr().err == f"bbopd fail: {message}\n"
    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    main(["fail"])
    written = terminal.getvalue()
    assert re.sub(r"\033\[[\d;]*m", "", written) == f"bbopd fail: {message}\n"
    to_type = re.findall(r"\033\[36m(.*?)\033\[0m", written)
    expected = ["rollouts.engine", "rollouts.engine=hf", "--device", "`bbopd doctor`", "pip install 'bbopd[vllm]'"]
    assert to_type == (expected if is_coloured else [])


def documented() -> dict[int, str]:
    page = (Path(__file__).parent.parent / "docs" / "cli.md").read_text()
    return {int(code): meaning for code, meaning in re.findall(r"^\| (\d+) \| (.*) \|$", page, re.MULTILINE)}


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (errors.BbopdError("x"), 1),
        (BrokenPipeError(), 1),
        (errors.ConfigError("x"), 2),
        (errors.ModelError("x"), 2),
        (errors.DataError("x"), 2),
        (errors.TeacherError("x"), 3),
        (errors.BadAnswerError("x"), 3),
        (errors.TrainingError("x"), 4),
        (errors.RolloutsRejectedError("x"), 4),
        (errors.CheckpointError("x"), 5),
        (OSError("x"), 5),
        (errors.EngineError("x"), 6),
        (errors.BudgetSpentError("x"), 7),
        (errors.RankError("x"), 8),
        (KeyboardInterrupt(), 130),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else str(value),
)
def test_every_error_has_the_status_that_is_documented(error, status, failing, capsys):
    failing.append(error)
    assert main(["fail"]) == status
    assert status in documented()
    assert len(capsys.readouterr().err.splitlines()) <= 1


def test_no_error_is_left_out_of_the_table(tmp_path):
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, errors.BbopdError)]
    assert {kind.exit_code for kind in kinds} | {0, 130} == set(documented())
    assert main(["plugins"]) == 0
    assert main(["doctor", str(tmp_path / "gone.yaml")]) == 1
    assert main(["distill", str(tmp_path / "gone.yaml")]) == 2
    with pytest.raises(SystemExit, match="2"):
        main(["no-such-command"])
