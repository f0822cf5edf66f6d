"""Tasks on tiny models: likelihoods against the dense model, choices against a count by hand, and what cannot be asked is said."""

from __future__ import annotations

import asyncio
import json
import math
from contextlib import AsyncExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from bbopd.errors import BbopdError, ConfigError, DataError, ModelError
from bbopd.evaluate.results import Row, comparisons, run_task
from bbopd.evaluate.services import Services
from bbopd.evaluate.subject import Subject
from bbopd.evaluate.tasks.judged import Judged, check_rivals
from bbopd.evaluate.tasks.load import load_tasks
from bbopd.pipeline.folder import RunFolder
from bbopd.rollouts.hf import HFEngine
from bbopd.teachers.hf import HFBackend
from bbopd.teachers.local import LocalTeacher
from bbopd.types import Completion, Offer, Prompt, TeacherInfo
from tests.tiny_models import tiny_llama, tiny_tokenizer

TOKENIZER = tiny_tokenizer()
VOCAB = len(TOKENIZER)


def make_subject(seed: int = 1, positions: int = 96) -> Subject:
    model = tiny_llama(VOCAB, seed=seed, max_positions=positions)
    return Subject(f"model {seed}", model, TOKENIZER, engine=HFEngine(model, eos_token_ids=(2,), pad_token_id=0), vocab_size=VOCAB)


def write_task(folder: Path, rows: list[dict[str, Any]], **config: Any) -> str:
    data = folder / f"{config.get('task', 'rows')}.data.jsonl"
    data.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    path = folder / f"{config.get('task', 'rows')}.yaml"
    path.write_text(yaml.safe_dump({"data": data.name, **config}), encoding="utf-8")
    return str(path)


class NoServices(Services):
    """For tasks that ask nobody."""

    def __init__(self) -> None:
        super().__init__(RunFolder(Path("nowhere")), AsyncExitStack(), None)  # type: ignore[arg-type]


def measured(name: str, subject: Subject | None = None) -> Row:
    (task,) = load_tasks([name])
    return asyncio.run(run_task(task, subject or make_subject(), NoServices()))


def dense_nats(model: Any, context: list[int], continuation: list[int]) -> tuple[float, bool]:
    ids = torch.tensor([[*context, *continuation]])
    with torch.no_grad():
        logprobs = model(input_ids=ids).logits[0, len(context) - 1 : -1].double().log_softmax(-1)
    target = torch.tensor(continuation)
    return float(logprobs.gather(1, target[:, None]).sum()), bool((logprobs.argmax(-1) == target).all())


QUESTIONS = [
    {"question": f"which of these is the thing {n}?", "options": ["in", f"a café, {n * 7}", "the other one there"], "key": n % 3}
    for n in range(15)
]
ASKED = {"prompt": "Q: {{question}}\nA:", "choices": "options", "answer": "{{key}}"}


def test_likelihoods_are_those_of_the_dense_model() -> None:
    """Also of equal contexts that are read once, of one long enough to be cut, and of the likeliest continuation."""
    subject = make_subject()
    model = subject.model
    context = tuple(range(5, 40))
    with torch.no_grad():
        best = int(model(input_ids=torch.tensor([context])).logits[0, -1].argmax())
    long = tuple(int(token) for token in torch.randint(3, VOCAB, (120,)))
    pairs = [(context, (7, 8, 9)), (context, (best,)), (context, (50,)), ((0,), (4, 5)), (long, (6, 7))]
    subject.begin()
    found = subject.likelihoods(pairs)
    cut = [(before[-(97 - len(after)) :], after) for before, after in pairs]
    expected = [dense_nats(model, list(before), list(after)) for before, after in cut]
    assert [one.nats for one in found] == pytest.approx([nats for nats, _ in expected], rel=1e-5)
    assert [one.is_greedy for one in found] == [greedy for _, greedy in expected]
    assert found[1].is_greedy
    assert subject.truncated == 1
    with pytest.raises(DataError, match="no likelihood"):
        subject.likelihoods([(context, ())])
    with pytest.raises(DataError, match="longer than the 96 positions"):
        subject.likelihoods([((0,), long)])


def test_multiple_choice_takes_the_likeliest(tmp_path: Path) -> None:
    subject = make_subject()
    row = measured(write_task(tmp_path, QUESTIONS, task="choices", **ASKED), subject)
    right: dict[str, list[bool]] = {"acc": [], "acc_norm": [], "acc_bytes": []}
    for question in QUESTIONS:
        prompt = TOKENIZER.encode(f"Q: {question['question']}\nA:")
        texts = question["options"]
        nats = [dense_nats(subject.model, prompt, TOKENIZER.encode(f" {text}"))[0] for text in texts]
        for name, size in (("acc", lambda text: 1), ("acc_norm", len), ("acc_bytes", lambda text: len(text.encode()))):
            scaled = [one / size(text) for one, text in zip(nats, texts, strict=True)]
            right[name].append(scaled.index(max(scaled)) == question["key"])
    for name, values in right.items():
        assert row.measured.scores[name].table[:, 0].tolist() == [float(value) for value in values]
    assert row.speed.tokens > 15 * 20
    assert row.speed.latency_seconds is not None
    assert row.speed.latency_seconds > 0


def test_answers_by_text_by_number_and_by_letter(tmp_path: Path) -> None:
    rows = [{"q": "x", "a": "B. two", "n": 1, "w": "two"}] * 2
    fixed = {"prompt": "q", "choices": ["one", "two"]}
    subject = make_subject()
    numbers = [
        measured(write_task(tmp_path, rows, task=f"t{index}", **given), subject).measured.scores["acc"].estimate().value
        for index, given in enumerate(
            [fixed | {"answer": "w"}, fixed | {"answer": "n"}, fixed | {"answer": "{{ 'AB'.index(a[0]) }}"}, fixed | {"answer": "1"}]
        )
    ]
    assert len(set(numbers)) == 1
    with pytest.raises(DataError, match=r"t5.data.jsonl:1: answer 'B. two' is none of the choices \['one', 'two'\]"):
        load_tasks([write_task(tmp_path, rows, task="t5", **fixed, answer="a")])


def test_held_out_text_over_windows(tmp_path: Path) -> None:
    """Documents longer than the model's positions: every token once, given at least half a window before it."""
    texts = ["the naïve thing is in the café. " * 9, "short one"]
    subject = make_subject()
    row = measured(write_task(tmp_path, [{"body": text} for text in texts], task="held", text="body", window=32), subject)
    nats, tokens = 0.0, 0
    for text in texts:
        ids = [0, *TOKENIZER.encode(text, add_special_tokens=False)]
        tokens += len(ids) - 1
        done, begin = 1, 0
        while done < len(ids):
            end = min(begin + 32, len(ids))
            nats -= dense_nats(subject.model, ids[begin:done], ids[done:end])[0]
            done, begin = end, begin + 16
    found = row.measured.scores
    assert found["bits_per_byte"].estimate().value == pytest.approx(
        nats / math.log(2) / sum(len(text.encode()) for text in texts), rel=1e-5
    )
    assert found["perplexity"].estimate().value == pytest.approx(math.exp(nats / tokens), rel=1e-5)


def test_generation_is_greedy_and_cut_at_stops(tmp_path: Path) -> None:
    subject = make_subject()
    prompt = "Q: why?\nA:"
    ids = TOKENIZER.encode(prompt)
    with torch.no_grad():
        for _ in range(12):
            ids.append(int(subject.model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
    whole = TOKENIZER.decode(ids[-12:], skip_special_tokens=True)
    stop = next(character for character in whole[2:] if character.isprintable() and character not in whole[:2])
    rows = [{"prompt": prompt, "answer": ["nothing", whole]}, {"prompt": prompt + " no", "answer": "x"}]
    full = measured(write_task(tmp_path, rows, task="whole", prompt="prompt", answer="answer", max_new_tokens=12), subject)
    assert full.measured.notes["samples"][0]["answer"] == whole.strip()
    assert full.measured.scores["exact_match"].table[0, 0] == 1.0
    cut = measured(write_task(tmp_path, rows, task="cut", prompt="prompt", answer="answer", max_new_tokens=12, stop=[stop]), subject)
    assert cut.measured.notes["samples"][0]["answer"] == whole.partition(stop)[0].strip()
    assert cut.speed.tokens < full.speed.tokens, "a token that spells the stop ends the answer"


def test_files_of_rows_are_tasks_by_themselves(tmp_path: Path) -> None:
    (tmp_path / "mc.jsonl").write_text('{"prompt": "p", "choices": ["a", "b"], "answer": "b"}\n')
    (tmp_path / "qa.jsonl").write_text('{"prompt": "p", "answer": "b"}\n')
    (tmp_path / "held.jsonl").write_text('{"text": "some text"}\n')
    (tmp_path / "prose.txt").write_text("some text\n")
    names = ["mc.jsonl", "qa.jsonl", "held.jsonl", "prose.txt"]
    tasks = load_tasks([str(tmp_path / name) for name in names])
    assert [(task.info.name, task.info.kind, task.info.items) for task in tasks] == [
        ("mc", "multiple_choice", 1),
        ("qa", "generation", 1),
        ("held", "text", 1),
        ("prose", "text", 1),
    ]
    assert len({task.info.sha256 for task in tasks}) == 4
    held, prose = (measured(str(tmp_path / name)).measured.scores["bits_per_byte"].estimate().value for name in names[2:])
    assert held == pytest.approx(prose)


@pytest.mark.parametrize(
    ("files", "error", "said"),
    [
        ({"t.jsonl": ""}, DataError, r"t.jsonl holds no row"),
        ({"t.jsonl": '{"question": "q"}'}, DataError, r"t.jsonl:1: a JSONL file is a task .* this row has question"),
        ({"t.jsonl": "[1]"}, DataError, r"t.jsonl:1: a row is an object"),
        (
            {"t.yaml": "data: d.jsonl\nprompt: p\nchoices: c\n", "d.jsonl": "{}"},
            ConfigError,
            r"needs prompt, choices, answer: answer missing",
        ),
        ({"t.yaml": "data: d.jsonl\nprompt: p\nanswr: c\n"}, ConfigError, r"unknown key answr .*did you mean answer"),
        ({"t.yaml": "data: d.jsonl\nprompt: '{{x'\nanswer: a\n", "d.jsonl": '{"a": 1}'}, ConfigError, r"prompt '{{x' is no template"),
        (
            {"t.yaml": "data: d.jsonl\nprompt: q\nanswer: '{{ans}}'\n", "d.jsonl": '{"q": "1", "ans": "2"}\n{"q": "1"}'},
            DataError,
            r"d.jsonl:2: answer '{{ans}}' cannot be filled in \('ans' is undefined\); fields of this row: q",
        ),
        (
            {"t.yaml": "data: d.jsonl\nprompt: q\nanswer: a\n", "d.jsonl": '{"a": "2"}'},
            DataError,
            r"d.jsonl:1: prompt needs a field 'q'.* has a",
        ),
        ({"t.yaml": "data: none.jsonl\nprompt: q\nanswer: a\n"}, DataError, r"none.jsonl"),
        ({"t.yaml": "data: d.jsonl\nprompt: q\nanswer: a\nmetrics: [rouge]\n"}, ConfigError, r"metrics.0.*rougeL.*\(got 'rouge'\)"),
        ({}, ConfigError, r"cannot read task .*t.yaml"),
    ],
)
def test_tasks_that_cannot_be_asked_say_why(tmp_path: Path, files: dict[str, str], error: type[BbopdError], said: str) -> None:
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    with pytest.raises(error, match=said):
        load_tasks([str(tmp_path / next(iter(files), "t.yaml"))])


def test_two_tasks_need_two_names(tmp_path: Path) -> None:
    one = write_task(tmp_path, [{"a": "x"}], task="same", text="a")
    (tmp_path / "same.jsonl").write_text('{"text": "x"}')
    with pytest.raises(ConfigError, match=r"both task same: give one another name"):
        load_tasks([one, str(tmp_path / "same.jsonl")])


def test_a_model_that_answers_nothing_is_named(tmp_path: Path) -> None:
    """Its likeliest token after anything is the one that ends a text."""
    subject = make_subject()
    head = subject.model.get_output_embeddings()
    head.weight = torch.nn.Parameter(head.weight.detach().clone())
    subject.model.config.tie_word_embeddings = False
    norm = subject.model.model.norm
    with torch.no_grad():
        head.weight.zero_()
        head.weight[2] = 1.0
        norm.weight.fill_(1e-4)
        embedding = subject.model.model.embed_tokens.weight
        embedding.copy_(embedding.abs() + 5.0)
    with pytest.raises(ModelError, match=r"task rows: model 1 answered none of 1 prompts"):
        measured(write_task(tmp_path, [{"q": "x", "a": "y"}], prompt="q", answer="a"), subject)


def test_models_are_compared_on_the_same_items(tmp_path: Path) -> None:
    (task,) = load_tasks([write_task(tmp_path, QUESTIONS, task="choices", **ASKED)])
    rows = [asyncio.run(run_task(task, make_subject(seed), NoServices())) for seed in (1, 2, 1)]
    rows[2] = replace(rows[2], model="model 1 again")
    lines = [line for place, row in enumerate(rows) for line in comparisons(rows[:place], row)]
    found = {(line["first"], line["second"], line["metric"]): line for line in lines}
    assert len(found) == 9
    for metric in ("acc", "acc_norm", "acc_bytes"):
        values = [row.measured.scores[metric].table[:, 0] for row in rows]
        line = found["model 1", "model 2", metric]
        assert line["difference"] == pytest.approx(values[1].mean() - values[0].mean())
        assert line["mcnemar"]["first_only"] == int((values[0] > values[1]).sum())
        assert found["model 1", "model 1 again", metric]["p_value"] == 1.0


class LengthJudge:
    """A teacher in words that likes the longer answer."""

    info = TeacherInfo("length judge", 9, (Offer("text"),), takes_text=True)

    async def score(self, rollouts, want):
        raise NotImplementedError
        yield

    async def complete(self, prompts, sampling):
        async for prompt in prompts:
            first, second = (prompt.messages[0][1].split(f"<answer_{name}>\n")[1].split("\n</answer")[0] for name in "ab")
            yield Completion(prompt, (1,), "tie" if len(first) == len(second) else "A" if len(first) > len(second) else "B", "stop")


class JudgeAtHand(NoServices):
    async def judge(self, config, subject):
        return LengthJudge()


def test_judged_answers(tmp_path: Path) -> None:
    """A judge of length alone: the win rate says who is longer, the length-controlled one that there is no difference."""
    judge = {"target": "grpc://localhost:1"}
    rows = [{"q": f"say {n}", "rival": "x" * n} for n in range(24)]
    name = write_task(tmp_path, rows, task="judged", prompt="q", answer="rival", judge=judge, max_new_tokens=12)
    (task,) = load_tasks([name])
    row = asyncio.run(run_task(task, make_subject(), JudgeAtHand()))
    scores = row.measured.scores["win_rate_length_controlled"]
    longer = scores.table[:, 1]
    expected = (longer > 0).mean() + (longer == 0).mean() / 2
    assert row.measured.scores["win_rate"].estimate().value == pytest.approx(expected)
    assert scores.estimate().value == pytest.approx(0.5, abs=0.2)
    assert row.measured.notes["judge"] == "length judge"
    assert "<answer_a>" in row.measured.notes["judge_prompt"]
    (between,) = load_tasks([write_task(tmp_path, rows, task="between", prompt="q", judge=judge, max_new_tokens=12)])
    with pytest.raises(ConfigError, match="one model and no answer"):
        check_rivals([between], ["only"])
    assert isinstance(between, Judged)
    first, second = (asyncio.run(run_task(between, make_subject(seed), JudgeAtHand())) for seed in (1, 1))
    assert first.measured.notes == {"is_baseline": True}
    assert second.measured.scores["win_rate"].estimate().value == 0.5, "its own answers are as long"
    assert second.measured.notes["against"] == "model 1"


def test_prompt_is_made_once_per_context() -> None:
    subject = make_subject()
    assert subject.pair("a b ", "c") == subject.pair("a b", " c"), "spaces at the seam belong to the continuation"
    assert subject.pair("", "c") == ((0,), tuple(TOKENIZER.encode("c")))
    assert Prompt("x", *subject.exchange("hi", "there", chat=True, delimiter=" ")).reference_ids == (*TOKENIZER.encode("there"), 2)


class TeacherAtHand(NoServices):
    async def teacher(self, config):
        tokenizer = tiny_tokenizer()
        return LocalTeacher(HFBackend(tiny_llama(VOCAB, seed=1, max_positions=96), tokenizer, name="teacher"))


def test_agreement_with_a_teacher(tmp_path: Path) -> None:
    """Of the teacher's own weights none is missing; bits per byte are those of the answers alone."""
    rows = [{"q": f"what is {n}?", "a": f"the café {n * 31}"} for n in range(6)]
    serve = {"serve": {"model": "teacher"}}
    (task,) = load_tasks([write_task(tmp_path, rows, task="near", prompt="q", answer="a", teacher=serve, rollouts=3, max_new_tokens=8)])
    itself, other = (asyncio.run(run_task(task, make_subject(seed), TeacherAtHand())).measured for seed in (1, 2))
    for name in ("kl_held_out", "kl_rollouts", "reverse_kl_held_out", "reverse_kl_rollouts"):
        assert itself.scores[name].estimate().value < 1e-3 < 0.1 < other.scores[name].estimate().value
    assert itself.scores["top1_held_out"].estimate().value == 1.0
    model = tiny_llama(VOCAB, seed=2, max_positions=96)
    nats = sum(dense_nats(model, TOKENIZER.encode(row["q"]), TOKENIZER.encode(f" {row['a']}"))[0] for row in rows)
    size = sum(len(f" {row['a']}".encode()) for row in rows)
    assert other.scores["bits_per_byte"].estimate().value == pytest.approx(-nats / math.log(2) / size, rel=1e-5)
    assert len(other.scores["kl_rollouts"].items) == 3
    with pytest.raises(ConfigError, match="give a grpc:// target, or serve"):
        load_tasks([write_task(tmp_path, rows, task="api", prompt="q", answer="a", teacher={"target": "https://example.com/v1"})])
