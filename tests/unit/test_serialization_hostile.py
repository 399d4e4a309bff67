"""Serialization: chunks that somebody broke or made up are an error that says so, in bounded memory."""

from __future__ import annotations

import struct
import tracemalloc
from typing import Any

import cbor2
import pytest
from hypothesis import given
from hypothesis import strategies as st

from opsqueue.exceptions import DecompressionError, DeserializationError
from opsqueue.serialization import SerializationFormat, cbor, decode_chunk, encode_chunk, register_codec
from opsqueue.serialization import json as json_format
from opsqueue.serialization import msgpack as msgpack_format
from opsqueue.serialization.cbor_format import TAG
from opsqueue.serialization.compression import MAGIC, MAX_DECOMPRESSED_VARIABLE
from opsqueue.serialization.zstd_library import zstd

MIB = 1 << 20


def tagged(*content: Any) -> bytes:
    return cbor2.dumps([cbor2.CBORTag(TAG, list(content))])


def array(*content: Any) -> bytes:
    return tagged("opsqueue.ndarray", list(content))


BROKEN_CBOR = {
    "nothing": b"",
    "cut off": cbor2.dumps([1, "text"])[:-2],
    "deep lists": b"\x81" * MIB,
    "deep tags": b"\xc1" * MIB,
    "deep tags of ours": cbor2.dumps(cbor2.CBORTag(TAG, 0))[:-1] * 10_000,
    "a list of 2^62": b"\x9b" + struct.pack(">Q", 1 << 62),
    "lists of 2^24 in each other": (b"\x9b" + struct.pack(">Q", 1 << 24)) * 300,
    "a map of 2^40": b"\xbb" + struct.pack(">Q", 1 << 40),
    "a text of 2^40": b"\x7b" + struct.pack(">Q", 1 << 40),
    "bytes of 2^40": b"\x5b" + struct.pack(">Q", 1 << 40),
    "a number of 10^12 bits": cbor2.dumps([cbor2.CBORTag(5, [10**12, 3])]),
    "a reference to nothing": cbor2.dumps([cbor2.CBORTag(29, 5)]),
    "a date that is none": cbor2.dumps([cbor2.CBORTag(1, 1e300)]),
}

BROKEN_VALUES = {
    "an unknown name": tagged("os.system", "true"),
    "a name that is no text": tagged(5, 5),
    "no pair": cbor2.dumps([cbor2.CBORTag(TAG, 5)]),
    "no datetime": tagged("opsqueue.datetime", 5),
    "no decimal": tagged("opsqueue.decimal", "five"),
    "no array": array("<f8"),
    "an array of objects": array("|O", [1], b"x" * 8),
    "a field of objects": array({"names": ["a"], "formats": ["|O8"], "offsets": [0], "itemsize": 8}, [1], b"x" * 8),
    "a field outside": array({"names": ["a"], "formats": ["<f8"], "offsets": [99], "itemsize": 8}, [1], b"x" * 8),
    "a dtype by code": array("f8,(2)O", [1], b"x" * 8),
    "a shape of 2^40": array("<f8", [1 << 40], b"x" * 8),
    "a shape of 2^40 in no bytes": array("|S0", [1 << 40], b""),
    "a shape of 2^40 in no fields": array({"names": [], "formats": [], "offsets": [], "itemsize": 0}, [1 << 40], b""),
    "a field of no bytes, 2^31 times": array([["<f8", [0]], [1 << 31]], [1 << 31], b""),
    "a shape with 0": array("<f8", [0, 1 << 62, 1 << 62], b""),
    "a negative shape": array("<f8", [-1, -1], b"x" * 8),
    "65 dimensions": array("<f8", [1] * 65, b"x" * 8),
    "a shape of texts": array("<f8", ["1"], b"x" * 8),
}

BROKEN_OTHERS = {
    "json deep": (json_format, b"[" * MIB),
    "json cut off": (json_format, b"[1,"),
    "json no utf-8": (json_format, b'["\xff"]'),
    "msgpack deep": (msgpack_format, b"\x91" * MIB),
    "msgpack a list of 2^32": (msgpack_format, b"\xdd\xff\xff\xff\xff"),
    "msgpack a map of 2^32": (msgpack_format, b"\xdf\xff\xff\xff\xff"),
    "msgpack a text of 2^32": (msgpack_format, b"\xdb\xff\xff\xff\xff"),
    "msgpack nothing": (msgpack_format, b""),
    "msgpack a time that is none": (msgpack_format, b"\x91\xc7\x0c\xff" + b"\xff" * 12),
}


@pytest.fixture(autouse=True)
def bounded_memory() -> Any:
    cbor.loads(cbor.dumps(()))
    tracemalloc.start()
    yield
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 64 * MIB


@pytest.mark.parametrize("data", BROKEN_CBOR.values(), ids=BROKEN_CBOR)
def test_broken_cbor_is_an_error_with_the_chunks_name(data: bytes) -> None:
    with pytest.raises(cbor2.CBORDecodeError) as caught:
        decode_chunk(data, cbor, name="chunk 3 of submission 17")
    assert caught.value.__notes__ == ["chunk 3 of submission 17 could not be decoded"]


@pytest.mark.parametrize("data", BROKEN_VALUES.values(), ids=BROKEN_VALUES)
def test_a_value_that_cannot_be_made_is_an_error_with_the_chunks_name(data: bytes) -> None:
    with pytest.raises(DeserializationError, match=r"^chunk 3 of submission 17: "):
        decode_chunk(data, cbor, name="chunk 3 of submission 17")


@pytest.mark.parametrize(("format_", "data"), BROKEN_OTHERS.values(), ids=BROKEN_OTHERS)
def test_broken_json_and_msgpack_are_an_error_with_the_chunks_name(format_: SerializationFormat, data: bytes) -> None:
    with pytest.raises(DeserializationError, match=r"^chunk 3 of submission 17: "):
        decode_chunk(data, format_, name="chunk 3 of submission 17")


@given(st.binary())
def test_any_bytes_are_a_sequence_or_an_error(data: bytes) -> None:
    for format_ in (cbor, json_format, msgpack_format):
        try:
            decode_chunk(data, format_)
        except (DeserializationError, cbor2.CBORDecodeError, AssertionError):
            continue


def test_an_unknown_name_says_what_to_do_and_calls_nothing() -> None:
    with pytest.raises(DeserializationError, match=r"'builtins.print'.*register"):
        cbor.loads(tagged("builtins.print", ["called"]))


def test_a_codec_that_fails_is_named() -> None:
    class Odd:
        pass

    register_codec(Odd, "odd", lambda odd: 1, lambda value: value.missing)
    with pytest.raises(DeserializationError, match=r"'odd'.*missing"):
        cbor.loads(cbor.dumps((Odd(),)))


def bomb(size: int) -> bytes:
    compressor = zstd.ZstdCompressor()
    blocks = [compressor.compress(bytes(MIB)) for _ in range(size // MIB)]
    return MAGIC + b"".join(blocks) + compressor.flush()


def test_a_bomb_is_an_error_in_bounded_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(MAX_DECOMPRESSED_VARIABLE, str(8 * MIB))
    small = bomb(1024 * MIB)
    assert len(small) < MIB
    with pytest.raises(DecompressionError, match=rf"^chunk 1: .* {8 * MIB} bytes.*{MAX_DECOMPRESSED_VARIABLE}"):
        decode_chunk(small, cbor, name="chunk 1")


def test_a_chunk_that_no_reader_would_take_is_not_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(MAX_DECOMPRESSED_VARIABLE, "100")
    with pytest.raises(Exception, match=r"over the limit of 100.*chunk_size"):
        encode_chunk(("x" * 100,), cbor, "zstd")


@pytest.mark.parametrize(
    ("chunk", "message"),
    [
        (MAGIC, "cut off|no zstd frame"),
        (MAGIC + b"hello", "no zstd frame"),
        (encode_chunk(("x" * 100,), cbor, "zstd")[:-3], "cut off"),
        (encode_chunk(("x" * 100,), cbor, "zstd") + b"\0", "1 bytes follow"),
        (bytes([*encode_chunk(("x" * 100,), cbor, "zstd")[:-1], 0]), "broken"),
    ],
    ids=["magic only", "no frame", "cut off", "more follows", "wrong checksum"],
)
def test_a_broken_frame_is_an_error_that_says_how(chunk: bytes, message: str) -> None:
    with pytest.raises(DecompressionError, match=message):
        decode_chunk(chunk, cbor)
