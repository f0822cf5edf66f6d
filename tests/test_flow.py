"""Data sets that are read as they are drawn: the same draws however often a run stops, held out by content, bounded in memory."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

from bbopd.config import DataConfig
from bbopd.data.demo_text import demo_topics
from bbopd.data.draws import PromptStream, left_out
from bbopd.data.prompts import PromptSet, load_prompts
from bbopd.data.shards import BEGINNING, RowPlace, ShardedRows
from bbopd.errors import DataError
from bbopd.types import Prompt
from tests.loop_rig import Rig, run_config
from tests.tiny_models import tiny_tokenizer

TOKENIZER = tiny_tokenizer()
ROWS = 47  # of each of three shards


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_parquet(path: Path, rows: list[dict[str, Any]]) -> None:
    parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=10)


WRITERS: dict[str, Callable[[Path, list[dict[str, Any]]], None]] = {"jsonl": write_jsonl, "parquet": write_parquet}


def chat(shard: int, number: int) -> dict[str, Any]:
    question = {"role": "user", "content": f"question {number} of {shard}"}
    return {"messages": [question, {"role": "assistant", "content": "an answer"}] if number % 3 else [question]}


def write_shards(folder: Path, kind: str = "jsonl", row: Callable[[int, int], dict[str, Any]] = chat, shards: int = 3) -> str:
    folder.mkdir()
    for shard in range(shards):
        WRITERS[kind](folder / f"train-{shard}.{kind}", [row(shard, number) for number in range(ROWS)])
    return str(folder)


def load(*sources: Mapping[str, Any], **options: Any) -> PromptSet:
    config = DataConfig(prompts=tuple(sources), **{"prompt_tokens": 8, "response_tokens": 16, **options})
    return load_prompts(config, TOKENIZER, max_seq_len=128, eos_token_id=2)


@pytest.fixture
def streams() -> Iterator[Callable[..., PromptStream]]:
    """Opens streams, and closes them at the end."""
    opened: list[PromptStream] = []

    def open_stream(prompts: PromptSet, seed: int = 7, **options: Any) -> PromptStream:
        opened.append(PromptStream(prompts.train, seed, shares=prompts.shares, **options))
        return opened[-1]

    yield open_stream
    for stream in opened:
        stream.close()


def texts(prompts: list[Prompt]) -> list[str]:
    return [TOKENIZER.decode(list(prompt.token_ids)) for prompt in prompts]


def ids(prompts: list[Prompt]) -> set[str]:
    return {prompt.prompt_id for prompt in prompts}


# ---------------------------------------------------------------- places among rows


@pytest.mark.parametrize("kind", WRITERS)
def test_rows_go_on_from_any_place(tmp_path: Path, kind: str) -> None:
    folder = write_shards(tmp_path / "data", kind)
    source = DataConfig.model_validate({"prompts": [{"dataset": folder}]}).prompts[0]
    rows, order = ShardedRows(source), [2, 0, 1]
    reader = rows.read(order, BEGINNING)
    places, found = [reader.place], []
    for row in reader:
        found.append(row)
        places.append(reader.place)
    assert [name.split(":")[1:] for name, _, _ in found[:1] + found[-1:]] == [["2", "0"], ["1", str(ROWS - 1)]]
    assert len(found) == 3 * ROWS
    for start in (0, 1, 9, 10, 46, 47, 48, 100, 140, 141):
        place = RowPlace(**json.loads(json.dumps(dict(zip(("shards", "rows", "state"), _fields(places[start]), strict=True)))))
        again = rows.read(order, place)
        assert [row for row, _ in zip(again, range(25), strict=False)] == found[start : start + 25]
        again.close()


def _fields(place: RowPlace) -> tuple[Any, ...]:
    return place.shards, place.rows, place.state


# ---------------------------------------------------------------- draws


@pytest.mark.parametrize("buffer", [10, 1000])
def test_an_epoch_holds_every_document_that_is_not_held_out_once(tmp_path: Path, streams: Any, buffer: int) -> None:
    folder = write_shards(tmp_path / "data")
    held_out = ids(load({"dataset": folder}, held_out=0.2).held_out)  # all of them: the buffer is larger than the data
    prompts = load({"dataset": folder, "buffer": buffer}, held_out=0.2)
    assert 0 < len(ids(prompts.held_out) & held_out) == len(prompts.held_out)
    to_train = {f"{folder}:{shard}:{number}" for shard in range(3) for number in range(ROWS)} - held_out
    stream = streams(prompts)
    epochs = [[prompt.prompt_id for prompt in stream.next_prompts(len(to_train))] for _ in range(3)]
    assert all(set(epoch) == to_train for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    other = streams(prompts, seed=8).next_prompts(len(to_train))
    assert ids(other) == to_train
    assert [prompt.prompt_id for prompt in other] not in epochs
    labelled = stream.next_labelled(len(to_train))
    assert all(prompt.reference_ids for prompt in labelled)
    assert ids(labelled) == {name for name in to_train if int(name.rpartition(":")[2]) % 3}


@pytest.mark.parametrize("kind", WRITERS)
@pytest.mark.parametrize("near_duplicates", [None, 0.8])
def test_draws_go_on_from_any_position(tmp_path: Path, streams: Any, kind: str, near_duplicates: float | None) -> None:
    flowing = {"dataset": write_shards(tmp_path / "data", kind, shards=2), "buffer": 15, "weight": 3}
    sources = (flowing, {"demo": True, "limit": 30, "weight": 1})
    prompts = load(*sources, near_duplicates=near_duplicates)
    uninterrupted = streams(prompts)
    whole, positions = [], []
    for _ in range(40):
        positions.append(json.loads(json.dumps(uninterrupted.position)))
        whole.append((uninterrupted.next_prompts(5), uninterrupted.next_labelled(3)))
    for start in (0, 1, 7, 26):
        resumed = streams(load(*sources, near_duplicates=near_duplicates))
        resumed.position = positions[start]
        assert [(resumed.next_prompts(5), resumed.next_labelled(3)) for _ in range(7)] == whole[start : start + 7]
        resumed.position = json.loads(json.dumps(resumed.position))
        assert [(resumed.next_prompts(5), resumed.next_labelled(3)) for _ in range(7)] == whole[start + 7 : start + 14]
    assert len(json.dumps(positions[-1])) < 4000
    dropped = positions[20]  # a draw that was not booked is drawn again
    uninterrupted.position = dropped
    assert [(uninterrupted.next_prompts(5), uninterrupted.next_labelled(3)) for _ in range(20)] == whole[20:]
    assert {name: count for name, count in dropped.items() if name != "bookmarks"} == {"prompts": 100, "labelled": 60}
    without = streams(load(*sources, near_duplicates=near_duplicates))
    without.position = {"prompts": 100, "labelled": 60}  # the numbers alone say as much
    assert (without.next_prompts(5), without.next_labelled(3)) == whole[20]


def test_ranks_share_out_what_one_would_draw_and_their_number_may_change(tmp_path: Path, streams: Any) -> None:
    prompts = load({"dataset": write_shards(tmp_path / "data"), "buffer": 20})
    alone = texts(streams(prompts).next_prompts(120))
    first = [streams(prompts, rank=rank, world_size=4) for rank in range(4)]
    together = [texts(stream.next_prompts(15)) for stream in first]
    then = [streams(prompts, rank=rank, world_size=3) for rank in range(3)]
    for stream, other in zip(then, first[1:], strict=True):
        stream.position = other.position
    together_then = [texts(stream.next_prompts(20)) for stream in then]
    assert [text for parts in (together, together_then) for row in zip(*parts, strict=True) for text in row] == alone


def test_running_text_gives_one_window_of_each_document(tmp_path: Path, streams: Any) -> None:
    topics = [text for text in demo_topics().values() if len(text) > 600][:20]
    folder = tmp_path / "data"
    folder.mkdir()
    write_parquet(folder / "train.parquet", [{"text": text} for text in [*topics, "short", ""]])
    prompts = load({"dataset": str(folder)})
    stream = streams(prompts)
    count = len(topics) - len({prompt.source for prompt in prompts.held_out})
    epochs = [stream.next_prompts(count) for _ in range(6)]
    assert all(len({prompt.source for prompt in epoch}) == count for epoch in epochs)
    assert len({prompt.prompt_id for epoch in epochs for prompt in epoch}) > 3 * count  # others in every epoch
    stream.next_prompts(1)
    passed_over = left_out(stream.position)
    assert passed_over.pop("too_short") in (6, 7)  # it may be the first of the new epoch
    assert passed_over == {"empty": 6}


# ---------------------------------------------------------------- what is left out


def test_copies_and_near_duplicates_are_sought_among_the_last_documents(tmp_path: Path, streams: Any) -> None:
    original = [text[:1000] for text in demo_topics().values() if len(text) > 1000][:30]
    rows = [
        {"text": text}
        for number in range(0, 30, 10)
        for text in [*original[number : number + 10], *(one.upper() + "." for one in original[number : number + 10])]
    ]
    folder = tmp_path / "data"
    folder.mkdir()
    write_jsonl(folder / "train.jsonl", [*rows, *rows[-3:]])
    for threshold, least, most in ((None, 0, 0), (0.8, 15, 33)):
        stream = streams(load({"dataset": str(folder), "buffer": 7}, near_duplicates=threshold))
        while stream.position["bookmarks"]["prompts"]["0"]["epoch"] < 2:
            stream.next_prompts(1)
        counts = left_out(stream.position)  # of two epochs, in which the rows come in the same order
        assert counts.get("copy", 0) == 6 or threshold is not None
        assert 2 * least <= counts.get("near_duplicate", 0) <= 2 * most


def test_bad_rows_are_errors_or_counted_and_errors_name_the_row(tmp_path: Path, streams: Any) -> None:
    def row(shard: int, number: int) -> dict[str, Any]:
        return {"messages": []} if (shard, number) == (1, 30) else chat(shard, number)

    folder = write_shards(tmp_path / "data", row=row)
    stream = streams(load({"dataset": folder, "buffer": 20}))
    with pytest.raises(DataError, match=r"data shard 1 row 30: 'messages' must be a list"):
        stream.next_prompts(3 * ROWS)
    kept = streams(load({"dataset": folder, "buffer": 20, "bad_rows": "skip"}))
    kept.next_prompts(6 * ROWS)
    assert left_out(kept.position)["bad_row"] in (2, 3)  # two epochs, and a part
    with pytest.raises(DataError, match=r"dataset .*nowhere cannot be read: .*local file"):
        load({"dataset": str(tmp_path / "nowhere")})
    with pytest.raises(DataError, match="shard 0 row 0: no column 'body'; it has messages"):
        load({"dataset": folder, "column": "body"})


def test_a_source_that_gives_nothing_says_so(tmp_path: Path, streams: Any) -> None:
    prompts = load({"dataset": write_shards(tmp_path / "data"), "buffer": 200})
    (share,) = prompts.shares
    assert share.flow is not None
    nothing = replace(prompts, shares=(replace(share, flow=replace(share.flow, is_held_out=lambda document: True)),))
    with pytest.raises(DataError, match=r"nothing to train on in all of .*data \(left out: what is held out\)"):
        streams(nothing).next_prompts(1)
    unknown = write_shards(tmp_path / "unknown", row=lambda shard, number: {"prompt": f"question {number} of {shard}"})
    with pytest.raises(DataError, match="no prompt has a known continuation"):
        streams(load({"dataset": unknown})).next_labelled(1)
    with pytest.raises(ValueError, match="size is not known: give a weight to every one"):
        DataConfig.model_validate({"prompts": [{"demo": True}, {"dataset": "a"}]})


def test_a_limit_is_an_epoch(tmp_path: Path, streams: Any) -> None:
    folder = write_shards(tmp_path / "data")
    first = [f"{folder}:0:{number}" for number in range(ROWS)] + [f"{folder}:1:{number}" for number in range(60 - ROWS)]
    expected = set(first) - ids(load({"dataset": folder}).held_out)
    stream = streams(load({"dataset": folder, "limit": 60, "buffer": 25}))
    for _ in range(3):
        assert ids(stream.next_prompts(len(expected))) == expected


# ---------------------------------------------------------------- a run


async def test_a_run_that_stops_in_the_middle_of_a_flow_reaches_the_same_losses(tmp_path: Path, streams: Any) -> None:
    def row(shard: int, number: int) -> dict[str, Any]:
        return {"prompt": f"question {number} of {shard}", "response": f"the answer to {number}"}

    folder = write_shards(tmp_path / "data", row=row)

    def rig(name: str, **options: Any) -> Rig:
        return Rig(run_config(tmp_path / name), stream=streams(load({"dataset": folder, "buffer": 9})), **options)

    whole = rig("whole")
    assert await whole.run() == "finished"
    for step in (3, 8):  # in the cold start, and after it
        assert await rig("parts", at_step=(step, lambda rig: rig.stop.set())).run() == "stopped"
    last = rig("parts")
    assert last.resumed_from >= 8
    assert await last.run() == "finished"
    assert last.losses() == whole.losses()
    assert last.loop.state.position["bookmarks"]["prompts"]["0"]["block"] > 0


# ---------------------------------------------------------------- memory

_DRAW = """
import json, resource, sys
from bbopd.config import DataConfig
from bbopd.data.draws import PromptStream
from bbopd.data.prompts import load_prompts

def words(texts, **options):
    return {"input_ids": [[len(word) for word in text.split()] for text in texts]}

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

config = DataConfig(prompts=({"dataset": sys.argv[1], "buffer": 200},), prompt_tokens=8, response_tokens=16)
prompts = load_prompts(config, words, max_seq_len=128, eos_token_id=2)
stream = PromptStream(prompts.train, 0, shares=prompts.shares)
stream.next_prompts(200)
before = peak()
seen = {prompt.prompt_id.rpartition(":")[0] for prompt in stream.next_prompts(int(sys.argv[2]))}
stream.close()
print(json.dumps([len(seen), peak() - before]))
"""


def test_memory_is_bounded_however_much_is_read(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    with (folder / "train.jsonl").open("w") as file:
        for number in range(12_000):
            file.write(json.dumps({"text": f"{number} " + "words of a long document " * 400}) + "\n")
    size = (folder / "train.jsonl").stat().st_size / 2**20
    done = subprocess.run([sys.executable, "-c", _DRAW, str(folder), "10000"], capture_output=True, text=True, timeout=400, check=True)
    documents, grown = json.loads(done.stdout)
    assert documents == 10_000
    assert grown < size / 2, f"{grown:.0f} MB more for {size:.0f} MB read"
