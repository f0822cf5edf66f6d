"""Prompts from every kind of source: the right tokens, a split that nothing moves, draws that resume, errors that name the place."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from tokenizers.processors import TemplateProcessing

from bbopd.config import DataConfig
from bbopd.data.documents import Document
from bbopd.data.draws import PromptStream
from bbopd.data.prompts import PromptSet, load_prompts, split_documents
from bbopd.errors import DataError
from bbopd.types import Prompt
from tests.tiny_models import tiny_tokenizer

EOS = 2
TOKENIZER = tiny_tokenizer()


def load(
    source: Mapping[str, Any], tokenizer: Any = TOKENIZER, max_seq_len: int = 256, max_new_tokens: int = 1, **options: Any
) -> PromptSet:
    config = DataConfig(prompts=({**source},), **{"prompt_tokens": 8, "response_tokens": 16, **options})
    return load_prompts(config, tokenizer, max_seq_len=max_seq_len, eos_token_id=EOS, max_new_tokens=max_new_tokens)


def words(seed: int, count: int = 40) -> str:
    generator = random.Random(seed)
    return " ".join(generator.choice(["alpha", "the", "inner", "wind", "stone", "over", "them"]) for _ in range(count)) + f" {seed}"


def write_lines(path: Path, records: list[Any]) -> str:
    path.write_text("\n".join(json.dumps(record) for record in records) + "\n")
    return str(path)


def decode(ids: tuple[int, ...] | None) -> str:
    assert ids is not None
    return TOKENIZER.decode(list(ids))


def every(prompts: PromptSet) -> dict[str, Prompt]:
    found = {prompt.prompt_id: prompt for prompt in prompts.train + prompts.held_out}
    assert len(found) == len(prompts.train) + len(prompts.held_out)
    return found


# ---------------------------------------------------------------- running text


def test_windows_of_a_text_tile_it(tmp_path: Path) -> None:
    for index in range(6):
        (tmp_path / f"doc{index}.txt").write_text(words(index) + "\n")
    found = every(load({"text": str(tmp_path)}))
    for index in range(6):
        text = words(index)
        windows = [found[key] for key in sorted(found, key=lambda key: int(key.split(":")[1])) if key.startswith(f"doc{index}.txt:")]
        assert all(len(window.token_ids) == 8 and len(window.reference_ids or ()) == 16 for window in windows[:-1])
        assert 4 <= len(windows[-1].reference_ids or ()) <= 16
        joined = "".join(decode(window.token_ids) + decode(window.reference_ids) for window in windows)
        assert text.startswith(joined)
        assert len(TOKENIZER(text)["input_ids"]) - sum(len(w.token_ids + (w.reference_ids or ())) for w in windows) < 12
        assert all(EOS not in (window.reference_ids or ()) for window in windows)


def test_tokens_a_tokenizer_adds_stand_in_front_of_every_window(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|endoftext|> $A <|im_end|>", special_tokens=[("<|endoftext|>", 0), ("<|im_end|>", 2)]
    )
    for index in range(3):
        (tmp_path / f"{index}.txt").write_text(words(index))
    plain, framed = every(load({"text": str(tmp_path)}, prompt_tokens=8)), every(load({"text": str(tmp_path)}, tokenizer, prompt_tokens=9))
    assert {key: (0, *prompt.token_ids) for key, prompt in plain.items()} == {key: prompt.token_ids for key, prompt in framed.items()}
    assert {key: prompt.reference_ids for key, prompt in plain.items()} == {key: prompt.reference_ids for key, prompt in framed.items()}


def test_one_file_is_cut_at_blank_lines(tmp_path: Path) -> None:
    path = tmp_path / "all.txt"
    path.write_text("\n\n\n".join(f"{words(i)}\n\n{words(100 + i)}" for i in range(5)))
    found = every(load({"text": str(path)}))
    assert {key.rsplit(":", 1)[0] for key in found} == {f"all.txt:{i}" for i in range(5)}
    path.write_text("\n\n".join(words(i, 600) for i in range(8)))  # paragraphs alone: runs of about 8,000 characters
    assert len({key.rsplit(":", 1)[0] for key in every(load({"text": str(path)}))}) >= 3


# ---------------------------------------------------------------- JSONL


def test_jsonl_prompts_messages_and_responses(tmp_path: Path) -> None:
    path = write_lines(
        tmp_path / "data.jsonl",
        [
            {"prompt": "Once upon", "response": " a time"},
            {"prompt": "No answer known"},
            {"messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi?"}]},
            {"messages": [{"role": "user", "content": "Hi?"}, {"role": "assistant", "content": "Hello."}]},
            {"messages": [{"role": "user", "content": "Bye?"}], "response": "Goodbye."},
        ],
    )
    found = every(load({"jsonl": path}))
    once, unknown, system, hello, goodbye = (found[f"data.jsonl:{number}"] for number in range(1, 6))
    assert decode(once.token_ids) == "Once upon"
    assert once.reference_ids is not None
    assert (decode(once.reference_ids[:-1]), once.reference_ids[-1]) == (" a time", EOS)
    assert unknown.reference_ids is system.reference_ids is None
    assert decode(system.token_ids) == "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi?<|im_end|>\n<|im_start|>assistant\n"
    assert decode(hello.token_ids) == "<|im_start|>user\nHi?<|im_end|>\n<|im_start|>assistant\n"
    assert hello.reference_ids == (*TOKENIZER("Hello.")["input_ids"], EOS)
    assert goodbye.reference_ids == (*TOKENIZER("Goodbye.")["input_ids"], EOS)
    assert hello.source == f"{path}:4"


def test_a_response_that_does_not_fit_is_cut_without_eos(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", [{"prompt": f"q{i}", "response": "x" * 100} for i in range(3)])
    for prompt in every(load({"jsonl": path}, max_seq_len=50)).values():
        assert len(prompt.token_ids) + len(prompt.reference_ids or ()) == 50
        assert EOS not in (prompt.reference_ids or ())


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt": "x"', r"bad.jsonl:2: not JSON \(.*column"),
        ('["x"]', r"bad.jsonl:2: expected an object"),
        ('{"text": "x"}', r"bad.jsonl:2: expected an object with either 'prompt'"),
        ('{"prompt": "x", "messages": []}', r"bad.jsonl:2: expected an object with either"),
        ('{"prompt": ""}', r"bad.jsonl:2: 'prompt' must be a string"),
        ('{"prompt": "x", "response": 3}', r"bad.jsonl:2: 'response' must be a string"),
        ('{"messages": "x"}', r"bad.jsonl:2: 'messages' must be a list"),
        ('{"messages": [{"role": "user"}]}', r"bad.jsonl:2: each of 'messages' needs"),
        ('{"messages": [{"role": "assistant", "content": "x"}]}', r"bad.jsonl:2: 'messages' must end with the question"),
        (json.dumps({"prompt": "y" * 60}), r"bad.jsonl:2: the prompt has 60 tokens, 40 fit \(train.max_seq_len 64 less 24"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text('{"prompt": "fine"}\n' + line + '\n{"prompt": "fine too"}\n')
    with pytest.raises(DataError, match=message):
        load({"jsonl": str(path)}, max_seq_len=64, max_new_tokens=24)


def test_unusable_data_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"cannot read .*missing.jsonl: No such file"):
        load({"jsonl": str(tmp_path / "missing.jsonl")})
    (tmp_path / "latin.txt").write_bytes("caf\xe9".encode("latin-1"))
    with pytest.raises(DataError, match=r"latin.txt is not UTF-8 text \(byte 3\)"):
        load({"text": str(tmp_path / "latin.txt")})
    (tmp_path / "empty.txt").write_text("\n \n")
    with pytest.raises(DataError, match=r"nothing to train on in data.prompts \(.*empty.txt\)"):
        load({"text": str(tmp_path / "empty.txt")})
    with pytest.raises(DataError, match="nothing to"):
        load({"jsonl": write_lines(tmp_path / "one.jsonl", [{"prompt": "alone"}])})
    with pytest.raises(DataError, match=r"exceeds train\.max_seq_len 20"):
        load({"demo": True}, max_seq_len=20)
    without = tiny_tokenizer()
    without.chat_template = None
    path = write_lines(tmp_path / "chat.jsonl", [{"messages": [{"role": "user", "content": str(i)}]} for i in range(3)])
    with pytest.raises(DataError, match=r"chat.jsonl:\d: 'messages' need a chat template"):
        load({"jsonl": path}, without)


# ---------------------------------------------------------------- the demo's text


def test_demo_has_labelled_text_and_chat_on_both_sides() -> None:
    prompts = load({"demo": True}, prompt_tokens=64, response_tokens=128)
    for side in (prompts.train, prompts.held_out):
        assert sum(prompt.reference_ids is not None for prompt in side) >= 20
        assert sum(prompt.reference_ids is None for prompt in side) >= 2
    topics = [{prompt.prompt_id.rsplit(":", 1)[0] for prompt in side if prompt.reference_ids} for side in (prompts.train, prompts.held_out)]
    assert not topics[0] & topics[1]
    assert len({prompt.prompt_id.rsplit(":", 1)[0] for prompt in prompts.held_out[:16]}) >= 3  # the first ones come from several documents


# ---------------------------------------------------------------- the split


def test_the_split_depends_on_content_alone(tmp_path: Path) -> None:
    records = [{"prompt": words(i), "response": words(1000 + i)} for i in range(60)]
    held_out = []
    for seed in range(3):
        random.Random(seed).shuffle(records)
        prompts = load({"jsonl": write_lines(tmp_path / f"{seed}.jsonl", records)}, max_seq_len=2000, held_out=0.2)
        held_out.append({prompt.token_ids for prompt in prompts.held_out})
        assert not held_out[-1] & {prompt.token_ids for prompt in prompts.train}
    assert held_out[0] == held_out[1] == held_out[2]
    assert 3 <= len(held_out[0]) <= 24
    more = load(
        {"jsonl": write_lines(tmp_path / "more.jsonl", records + [{"prompt": f"new {i}"} for i in range(40)])},
        max_seq_len=2000,
        held_out=0.2,
    )
    assert held_out[0] <= {prompt.token_ids for prompt in more.held_out}


def test_copies_are_dropped_so_that_none_is_on_both_sides(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "copies.jsonl", [{"prompt": f"number {i % 10}"} for i in range(50)])
    assert sorted(decode(prompt.token_ids) for prompt in every(load({"jsonl": path})).values()) == [f"number {i}" for i in range(10)]


@pytest.mark.parametrize("count", [2, 3, 40])
@pytest.mark.parametrize("share", [1e-9, 0.5, 1 - 1e-9])
def test_neither_side_is_ever_empty(count: int, share: float) -> None:
    documents = [Document(name=str(i), where="", prompt=f"question {i}") for i in range(count)]
    train, held_out = split_documents(documents, share)
    assert train
    assert held_out
    assert {d.name for d in train} | {d.name for d in held_out} == {str(i) for i in range(count)}
    assert len(train) + len(held_out) == count


# ---------------------------------------------------------------- drawing


def numbered(count: int) -> list[Prompt]:
    return [Prompt(str(i), (i + 3,), reference_ids=(5,) if i % 3 == 0 else None) for i in range(count)]


def test_every_epoch_holds_every_prompt_once_in_its_own_order() -> None:
    stream = PromptStream(numbered(11), seed=4)
    epochs = [[prompt.prompt_id for prompt in stream.next_prompts(11)] for _ in range(4)]
    assert all(sorted(epoch, key=int) == [str(i) for i in range(11)] for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4
    labelled = [prompt.prompt_id for prompt in stream.next_labelled(8)]
    assert set(labelled[:4]) == set(labelled[4:]) == {"0", "3", "6", "9"}
    assert [p.prompt_id for p in PromptStream(numbered(11), seed=5).next_prompts(11)] != epochs[0]


@pytest.mark.parametrize("taken", [(0, 0), (3, 1), (11, 4), (25, 17)])
def test_a_stream_goes_on_from_its_position(taken: tuple[int, int]) -> None:
    stream = PromptStream(numbered(11), seed=1)
    for _ in range(taken[0]):
        stream.next_prompts(1)
    stream.next_labelled(taken[1])
    resumed = PromptStream(numbered(11), seed=1)
    resumed.position = json.loads(json.dumps(stream.position))
    assert resumed.next_prompts(30) == stream.next_prompts(30)
    assert resumed.next_labelled(30) == stream.next_labelled(30)


def test_streams_without_what_is_asked_say_so() -> None:
    with pytest.raises(DataError, match="no prompts"):
        PromptStream([], seed=0)
    stream = PromptStream([Prompt("a", (3,))], seed=0)
    assert stream.next_labelled(0) == []
    with pytest.raises(DataError, match="no prompt has a known continuation"):
        stream.next_labelled(1)
