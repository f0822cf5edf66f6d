"""What travels between a run and its engine on another machine: pieces with checksums, and what is no message."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from bbopd.rollouts.vllm_messages import MessageError, pack_json, pack_pieces, unpack_json, unpack_piece


def test_pieces_hold_all_bytes_and_their_checksums():
    memory = torch.randint(0, 256, (3 * 2**20 + 17,), dtype=torch.uint8)
    other = torch.zeros_like(memory)
    for message in pack_pieces(memory):
        start, piece = unpack_piece(message, len(memory))
        other[start : start + len(piece)] = torch.frombuffer(bytearray(piece), dtype=torch.uint8)
    assert torch.equal(memory, other)
    message = bytearray(next(pack_pieces(memory)))
    for place in np.random.default_rng(1).integers(13, len(message), 50):
        message[place] ^= 1 << int(place) % 8
        with pytest.raises(MessageError, match="another checksum"):
            unpack_piece(bytes(message), len(memory))
        message[place] ^= 1 << int(place) % 8
    with pytest.raises(MessageError, match="of a window of 1000"):
        unpack_piece(bytes(message), 1000)
    with pytest.raises(MessageError, match="fewer than its header"):
        unpack_piece(b"W123", 1000)


def test_what_is_no_message_is_refused():
    assert unpack_json(pack_json({"op": "drain"})) == {"op": "drain"}
    for nonsense in (b"", b"J", b"J[1]", b"Jnull", b"X{}", b"J\xff\xfe"):
        with pytest.raises(MessageError):
            unpack_json(nonsense)
