"""Tables of rows as prompts: Parquet, chat sets, JSONL; what is left out, and counted; long prompts; near-duplicates."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

from bbopd.config import DataConfig
from bbopd.data.demo_text import demo_topics
from bbopd.data.prompts import PromptSet, load_prompts
from bbopd.errors import DataError
from bbopd.types import Prompt
from tests.tiny_models import tiny_tokenizer

EOS = 2
TOKENIZER = tiny_tokenizer()


def load(*sources: Mapping[str, Any], max_seq_len: int = 512, max_new_tokens: int = 1, **options: Any) -> PromptSet:
    config = DataConfig(prompts=tuple(sources), **{"prompt_tokens": 8, "response_tokens": 16, **options})
    return load_prompts(config, TOKENIZER, max_seq_len=max_seq_len, eos_token_id=EOS, max_new_tokens=max_new_tokens)


def every(prompts: PromptSet) -> dict[str, Prompt]:
    return {prompt.prompt_id: prompt for prompt in prompts.train + prompts.held_out}


def text_of(prompt: Prompt) -> tuple[str, str | None]:
    response = None if prompt.reference_ids is None else TOKENIZER.decode(list(prompt.reference_ids))
    return TOKENIZER.decode(list(prompt.token_ids)), response


def write_parquet(path: Path, rows: list[dict[str, Any]]) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=2)
    return str(path)


def write_lines(path: Path, records: list[Any]) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


CHAT = [{"role": "user", "content": "Hi?"}, {"role": "assistant", "content": "Hello."}]
ASKED = "<|im_start|>user\nHi?<|im_end|>\n<|im_start|>assistant\n"


# ---------------------------------------------------------------- Parquet and its columns


def test_parquet_files_of_a_folder(tmp_path: Path) -> None:
    for name in ("b", "a"):
        write_parquet(tmp_path / "set" / f"{name}.parquet", [{"text": f"{name} running text number {i} " * 3, "url": i} for i in range(5)])
    found = every(load({"parquet": str(tmp_path / "set")}))
    assert {key.rsplit(":", 1)[0] for key in found} == {f"{name}.parquet:{i}" for name in "ab" for i in range(5)}
    start = text_of(found["a.parquet:3:0"])
    assert "".join(part or "" for part in start) == "a running text number 3 a"
    assert found["a.parquet:3:0"].source == f"{tmp_path}/set/a.parquet row 3"
    limited = every(load({"parquet": str(tmp_path / "set"), "limit": 3}))
    assert {key.rsplit(":", 1)[0] for key in limited} == {f"a.parquet:{i}" for i in range(3)}


@pytest.mark.parametrize(
    ("row", "column"),
    [
        ({"messages": CHAT, "text": "unused"}, None),
        ({"conversations": [{"from": "human", "value": "Hi?"}, {"from": "gpt", "value": "Hello."}]}, None),
        ({"dialogue": CHAT, "prompt": "unused"}, "dialogue"),
        ({"prompt": [CHAT[0]], "completion": [CHAT[1]]}, None),
        ({"messages": [CHAT[0]], "response": "Hello."}, None),
    ],
)
def test_chats_in_the_forms_that_data_sets_have(tmp_path: Path, row: dict[str, Any], column: str | None) -> None:
    other = json.loads(json.dumps(row).replace("Hi?", "Bye?"))
    path = write_parquet(tmp_path / "chats.parquet", [row, other])
    found = every(load({"parquet": path, "column": column}))
    assert text_of(found["chats.parquet:0"]) == (ASKED, "Hello.<|im_end|>")
    assert text_of(found["chats.parquet:1"])[0] == ASKED.replace("Hi", "Bye")
    assert every(load({"jsonl": write_lines(tmp_path / "chats.jsonl", [row, other]), "column": column})).keys() == {
        "chats.jsonl:1",
        "chats.jsonl:2",
    }


def test_a_column_of_raw_prompts_and_one_of_text(tmp_path: Path) -> None:
    path = write_parquet(
        tmp_path / "a.parquet", [{"prompt": f"q{i}", "response": None if i else "yes", "body": "xyz"[i] * 60} for i in range(3)]
    )
    found = every(load({"parquet": path}))
    assert [text_of(found[f"a.parquet:{i}"]) for i in range(3)] == [("q0", "yes<|im_end|>"), ("q1", None), ("q2", None)]
    bodies = every(load({"parquet": path, "column": "body"}))
    assert text_of(bodies["a.parquet:1:0"]) == ("y" * 8, "y" * 16)


def test_tables_that_cannot_be_used_are_named(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", [{"url": i} for i in range(3)])
    with pytest.raises(
        DataError, match=r"a.parquet row 0: expected an object with either 'prompt'.*or 'text'; it has url: set data.prompts.column"
    ):
        load({"parquet": path})
    with pytest.raises(DataError, match=r"a.parquet row 0: column 'url' holds int, not text"):
        load({"parquet": path, "column": "url"})
    with pytest.raises(DataError, match=r"a.parquet row 0: no column 'body'; it has url"):
        load({"parquet": path, "column": "body"})
    (tmp_path / "b.parquet").write_bytes(b"not a table")
    with pytest.raises(DataError, match=r"cannot read .*b.parquet as Parquet: .*magic bytes"):
        load({"parquet": str(tmp_path / "b.parquet")})
    with pytest.raises(DataError, match=r"cannot read .*none.parquet as Parquet: .*No such file"):
        load({"parquet": str(tmp_path / "none.parquet")})
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"empty holds no .parquet file"):
        load({"parquet": str(tmp_path / "empty")})


# ---------------------------------------------------------------- what is left out


def test_bad_and_empty_rows_are_skipped_where_that_is_asked_for_and_counted(tmp_path: Path) -> None:
    records = [{"messages": CHAT}, {"messages": CHAT[1:]}, {"messages": []}, {"prompt": "good"}, {"prompt": "also"}]
    path = write_lines(tmp_path / "mixed.jsonl", records)
    with pytest.raises(DataError, match=r"mixed.jsonl:2: 'messages' must end with the question"):
        load({"jsonl": path})
    kept = load({"jsonl": path, "bad_rows": "skip"})
    assert (set(every(kept)), kept.skipped) == ({f"mixed.jsonl:{i}" for i in (1, 4, 5)}, {"bad_row": 2})
    table = write_parquet(tmp_path / "a.parquet", [{"text": text} for text in (None, "", "some text " * 8, "  ", "more of it " * 8)])
    kept = load({"parquet": table})
    assert ({key.rsplit(":", 1)[0] for key in every(kept)}, kept.skipped) == ({"a.parquet:2", "a.parquet:4"}, {"empty": 3})
    with pytest.raises(DataError, match=r"nothing to train on in data.prompts .*\(left out: bad_row 2\)"):
        load({"jsonl": write_lines(tmp_path / "bad.jsonl", records[1:3]), "bad_rows": "skip"})


def test_long_prompts_are_skipped_or_lose_their_beginning(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", [{"prompt": "short"}, {"prompt": "brief"}, {"prompt": "0123456789" * 6, "response": "x" * 60}])
    with pytest.raises(DataError, match=r"has 60 tokens, 40 fit .*set data.long_prompts to skip or truncate"):
        load({"jsonl": path}, max_seq_len=64, max_new_tokens=24)
    kept = load({"jsonl": path}, max_seq_len=64, max_new_tokens=24, long_prompts="skip")
    assert (set(every(kept)), kept.skipped) == ({"a.jsonl:1", "a.jsonl:2"}, {"long_prompt": 1})
    cut = every(load({"jsonl": path}, max_seq_len=64, max_new_tokens=24, long_prompts="truncate"))["a.jsonl:3"]
    assert text_of(cut) == ("0123456789" * 4, "x" * 24)


def test_near_duplicates_of_documents_are_left_out_wherever_they_come_from(tmp_path: Path) -> None:
    texts = [text[:1500] for text in demo_topics().values() if len(text) > 1500][:8]
    first = write_lines(tmp_path / "a.jsonl", [{"prompt": text, "response": "one"} for text in texts])
    again = [{"text": text.upper().replace("  ", " \n ") + " Etc."} for text in texts[:5]] + [
        {"text": "quite another text " * 20},
        {"text": "b c d" * 30},
    ]
    second = write_parquet(tmp_path / "b.parquet", again)
    sources = ({"jsonl": first}, {"parquet": second})
    assert load(*sources, max_seq_len=4000).skipped == {}
    found = load(*sources, max_seq_len=4000, near_duplicates=0.8)
    assert found.skipped == {"near_duplicate": 5}
    assert {key.rsplit(":", 1)[0] for key in every(found)} == {"a.jsonl", "b.parquet:5", "b.parquet:6"}
    assert load(*sources, max_seq_len=4000, near_duplicates=0.8).fingerprint == found.fingerprint
