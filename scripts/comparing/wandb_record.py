"""Reads the record of an offline run of W&B. The tests of tracking use this module too."""

import json
import struct
import zlib
from pathlib import Path


def read_wandb(folder):
    """Returns the protobuf records of an offline run. The reader of wandb 0.31 itself is written in Go.

    The file has the log format of LevelDB: blocks of 32 KiB that consist of parts. A part has a checksum, a length, a kind and
    data.
    """
    from wandb.proto import wandb_internal_pb2

    (path,) = Path(folder).glob("*.wandb")
    data = path.read_bytes()
    assert data[:4] == b":W&B"
    records, record, position = [], b"", 7
    while position + 7 <= len(data):
        room = 2**15 - position % 2**15
        if room < 7:
            position += room
            continue
        checksum, size, kind = struct.unpack_from("<IHB", data, position)
        part = data[position + 7 : position + 7 + size]
        assert checksum == zlib.crc32(bytes([kind]) + part)
        whole, first, last = kind == 1, kind == 2, kind == 4
        record = part if whole or first else record + part
        if whole or last:
            records.append(wandb_internal_pb2.Record.FromString(record))
        position += 7 + size
    return records


def history_of(records):
    """Returns the logged metrics, from which W&B draws its charts, as {step: {name: value}}."""
    steps = {}
    for record in records:
        if record.WhichOneof("record_type") == "history":
            row = steps.setdefault(record.history.step.num, {})
            for item in record.history.item:
                row[".".join(item.nested_key) or item.key] = json.loads(item.value_json)
    return steps
