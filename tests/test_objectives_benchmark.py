"""The parts of ``benchmarks.objectives`` and ``benchmarks.adoption``: comparisons, grades, the teacher of other tokens, pages from rows."""

from __future__ import annotations

import itertools
import json
import math
import urllib.request

import numpy as np
import pytest
import torch

from bbopd.config import RunConfig
from bbopd.modeling import load_model, load_tokenizer
from bbopd.ops import linear_distill
from bbopd.types import FullTeacher, TopKTeacher
from benchmarks import adoption, objectives
from benchmarks.grader import grade, grading
from benchmarks.objective_measures import DIVERGENCES, Yardstick, compare, divergences, on_candidates
from benchmarks.objective_models import EXAMPLES, SYSTEM, forget_merges, with_examples
from tests.tiny_models import save_folder, tiny_llama, tiny_tokenizer

MACHINE = dict.fromkeys(("processor", "torch", "date", "command", "machine"), "here")


def test_a_change_is_paired_by_document():
    rng = np.random.default_rng(3)
    names = [f"d{number}" for number in range(50)]
    before = dict(zip(names, rng.normal(5, 3, 50), strict=True))
    after = {name: value - 0.3 + rng.normal(0, 0.1) for name, value in before.items()} | {"unknown": 9.0}
    found = compare(before, after)
    differences = np.array([after[name] - before[name] for name in names])
    assert (found.change, found.standard_error) == pytest.approx((differences.mean(), differences.std(ddof=1) / math.sqrt(50)))
    assert found.documents == 50
    assert found.verdict(lower_is_better=True) == "improved"
    assert found.verdict(lower_is_better=False) == "worse"
    balanced = {name: value + (-1) ** place for place, (name, value) in enumerate(before.items())}
    assert compare(before, balanced).verdict(lower_is_better=True) == "no difference"
    assert compare(before, before | {"d0": math.nan}).verdict(lower_is_better=True) == "diverged"


def test_divergences_are_those_that_runs_minimise():
    torch.manual_seed(5)
    hidden_ND, weight_VD = torch.randn(7, 8).double(), torch.randn(40, 8).double()
    teacher_NV = torch.randn(7, 40).double() * 3
    found = divergences(teacher_NV.log_softmax(dim=1), (hidden_ND @ weight_VD.T).log_softmax(dim=1))
    for name in DIVERGENCES:
        settings = {"temperature": 1.0, "ce_weight": 0.0, "kd_weight": 1.0, "divergence": name}
        expected = linear_distill(hidden_ND, weight_VD, FullTeacher(logits=teacher_NV), **settings).kd
        torch.testing.assert_close(found[name], expected.double(), rtol=1e-9, atol=1e-12)


def test_the_divergence_on_candidates_is_the_one_that_runs_minimise():
    torch.manual_seed(6)
    hidden_ND, weight_VD = torch.randn(7, 8).double(), torch.randn(40, 8).double()
    log_p_NV, log_q_NV = (torch.randn(7, 40).double() * 3).log_softmax(dim=1), (hidden_ND @ weight_VD.T).log_softmax(dim=1)
    ids_NK = log_q_NV.topk(5, dim=1).indices
    log_tail_N = torch.log1p(-log_p_NV.gather(1, ids_NK).exp().sum(dim=1))
    teacher = TopKTeacher(ids_NK, log_p_NV.gather(1, ids_NK), log_tail_N, 1.0)
    settings = {"temperature": 1.0, "ce_weight": 0.0, "kd_weight": 1.0, "divergence": "reverse_kl"}
    expected = linear_distill(hidden_ND, weight_VD, teacher, **settings).kd
    torch.testing.assert_close(on_candidates(log_p_NV, log_q_NV, 5), expected.double(), rtol=1e-9, atol=1e-12)


def test_grades_fall_with_every_word_and_come_over_http():
    grades = [grade("word " * count) for count in range(1, 40)]
    assert grades[0] == 10.0
    assert all(one > other for one, other in itertools.pairwise(grades[:30]))
    assert set(grades[29:]) == {grade("")} == {1.0}
    message = {"role": "user", "content": "Grade.\n<answer>\none two three\n</answer>\nscore: N"}
    with grading() as target:
        address = target.replace("openai://", "http://") + "/chat/completions"
        request = urllib.request.Request(address, json.dumps({"messages": [message]}).encode())
        with urllib.request.urlopen(request, timeout=60) as reply:
            found = json.load(reply)
    assert found["choices"][0]["message"]["content"] == f"score: {grade('one two three')}"


def test_forgotten_merges_leave_the_same_model_under_other_ids(tmp_path):
    tokenizer = tiny_tokenizer(merges=(("t", "h"), ("th", "e"), ("i", "n")))
    save_folder(tmp_path / "teacher", tiny_llama(len(tokenizer), seed=1), tokenizer)
    kept = tokenizer.convert_tokens_to_ids("the")  # what was learned after it goes
    forget_merges(tmp_path / "teacher", tmp_path / "other", kept + 1)
    other = load_tokenizer(tmp_path / "other")
    assert other.tokenize("the in") == ["the", "Ġ", "i", "n"]
    assert len(other) == len(tokenizer) - 1
    for text in ("the thing in there", "é 🙂"):
        assert other.decode(other(text)["input_ids"]) == text
    before, after = load_model(tmp_path / "teacher"), load_model(tmp_path / "other")
    tokens = other.tokenize("the th e")
    ids = [torch.tensor([known.convert_tokens_to_ids(tokens)]) for known in (tokenizer, other)]
    order = tokenizer.convert_tokens_to_ids(other.convert_ids_to_tokens(list(range(len(other)))))
    with torch.no_grad():
        expected, found = before(ids[0]).logits[..., order], after(ids[1]).logits
    torch.testing.assert_close(found, expected)
    assert after.config.eos_token_id == other.eos_token_id


def test_examples_stand_in_front_of_every_conversation():
    tokenizer = with_examples(tiny_tokenizer())
    said = tokenizer.apply_chat_template([{"role": "user", "content": 'What\'s a "map"?'}], add_generation_prompt=True, tokenize=False)
    assert said.startswith(f"<|im_start|>system\n{SYSTEM}<|im_end|>\n<|im_start|>user\n{EXAMPLES[0][0]}<|im_end|>\n")
    assert said.endswith('<|im_start|>user\nWhat\'s a "map"?<|im_end|>\n<|im_start|>assistant\n')
    assert adoption.has_style(EXAMPLES[0][1])


def test_all_measures_of_a_student_and_how_far_the_teacher_is_from_itself(tmp_path):
    """Whatever is measured of the teacher in the student's place is 0 where it is a divergence."""
    tokenizer = tiny_tokenizer()
    save_folder(tmp_path / "teacher", tiny_llama(len(tokenizer), seed=1, max_positions=256), tokenizer)
    save_folder(tmp_path / "student", tiny_llama(len(tokenizer), seed=2, max_positions=256), tokenizer)
    forget_merges(tmp_path / "teacher", tmp_path / "other_tokens", len(tokenizer) - 1)
    chats = [{"messages": [{"role": "user", "content": f"What is {number}?"}], "response": "more " * number} for number in range(1, 30)]
    (tmp_path / "questions.jsonl").write_text("".join(json.dumps(chat) + "\n" for chat in chats))
    yardstick = Yardstick(tmp_path)
    found, same = yardstick.measure(tmp_path / "student"), yardstick.measure(tmp_path / "teacher", ("text",))
    distances = [f"{where}_{name}" for where in ("text", "own") for name in (*DIVERGENCES, "candidates")] + ["mixed"]
    assert found.keys() == {*distances, "bits_per_byte", "own_aligned", "answer_bits_per_byte", "grade"}
    for name in distances:
        assert min(found[name].values()) > 1e-3
        assert max(map(abs, same[name].values())) < 1e-5
        assert len(found[name]) > 10, "documents"
    assert all(1 <= value <= 10 for value in found["grade"].values())
    assert all(5 < value < 15 for value in found["bits_per_byte"].values()), "near 8 bits of a byte for who knows nothing"
    assert all(math.isfinite(value) and value > 0 for name in ("own_aligned", "answer_bits_per_byte") for value in found[name].values())


@pytest.mark.parametrize("name", list(objectives.ARMS))
def test_every_arm_is_a_run_and_improves_something_that_is_measured(name, tmp_path):
    target = "openai://127.0.0.1:1/v1" if objectives.ARMS[name].teacher == "grader" else "grpc://127.0.0.1:1"
    config = RunConfig.model_validate(objectives.config_of(name, 1, tmp_path, target, 1e-4))
    assert config.objective.name in name
    assert config.train.total_steps == objectives.UPDATES
    measures = {f"{where}_{divergence}" for where in ("text", "own") for divergence in (*DIVERGENCES, "candidates")}
    assert objectives.ARMS[name].target in measures | {"bits_per_byte", "answer_bits_per_byte", "grade", "own_aligned", "mixed"}


@pytest.mark.parametrize("arm", list(adoption.ARMS))
def test_all_arms_of_the_game_have_the_same_tokens(arm, tmp_path):
    train = adoption.config_of(arm, 0, tmp_path, "grpc://127.0.0.1:1", tmp_path / "run").train
    given = train.labelled_tokens or train.cold_start_tokens + train.on_policy_tokens
    assert given == adoption.WARM_UP_TOKENS + adoption.GAME_TOKENS


def test_the_page_tells_own_measures_and_all_others():
    start = {"own_reverse_kl": {"a": 2.0, "b": 1.0, "c": 1.5}, "grade": {"q": 3.0, "r": 5.0, "s": 4.0}}
    values = {"own_reverse_kl": {"a": 1.5, "b": 0.6, "c": 1.0}, "grade": {"q": 3.1, "r": 4.9, "s": 4.0}}
    run = {"seed": 0, "values": values, "tokens": 4096, "seconds": 61.0, "learning_rate": 1e-4, **MACHINE}
    rows = objectives.rows_of([{"arm": "reverse_kl", **run}, {"arm": "verbal", **run}], start)
    page = objectives.table(rows)
    assert "| reverse_kl | KL(q‖p), own text | 0 | 1.500 | 1.033 | -0.467 ± 0.033 | 4,096 | 61 | improved |" in page
    assert "| verbal | mean grade, 1 to 10 | 0 | 4.000 | 4.000 | +0.000 ± 0.058 | 4,096 | 61 | no difference |" in page
    assert "| reverse_kl | **1.033** | 4.000 |" in page


def test_the_page_of_the_game_and_its_curves(tmp_path):
    def look(stage: str, tokens: int) -> dict:
        return {
            "stage": stage,
            "step": tokens,
            "tokens": tokens,
            "style_share": tokens / 100,
            "length": 20.0,
            "kl_from_start": 0.1,
            "samples": ["x"],
        }

    game = {"discriminator_margin": 1.5, "student_length_mean": 20.0, "teacher_length_mean": 12.0}
    updates = [{"step": step, "phase": "on_policy", "discriminator_accuracy": step / 100, **game} for step in range(1, 81)]
    looks = [look("start", 0), look("cold_start", 20), look("step", 50), look("end", 80)]
    run = {"arm": "gad", "seed": 0, "looks": looks, "updates": updates, "seconds": 400.0, **MACHINE}
    page = adoption.publish([run], tmp_path).read_text()
    back = (adoption.LAST - 1) / 200  # of accuracies that rise by 0.01 an update, their mean lies so far behind the last one
    assert f"| gad | 0 | after the warm-up | 20 | 20% | 20.0 | 0.10 | {0.2 - back:.2f} | 1.50 |  |" in page
    assert f"| gad | 0 | end | 80 | 80% | 20.0 | 0.10 | {0.8 - back:.2f} | 1.50 | 400 |" in page
    assert "| gad | 0 | start | 0 | 0% | 20.0 | 0.10 | – | – |  |" in page
    assert "have 12.0 tokens" in page
    assert "discriminator's accuracy" in (tmp_path / "here" / "adoption.svg").read_text()
    assert len((tmp_path / "here" / "adoption.csv").read_text().splitlines()) == 1 + len(looks) + len(updates)
