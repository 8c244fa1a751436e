"""Reads what W&B keeps of an offline run, as the tests of what is reported do too."""

import json
import struct
import zlib
from pathlib import Path


def read_wandb(folder):
    """The protobuf records of an offline run; wandb 0.31 itself has a reader in Go only.

    The file is LevelDB's log format: blocks of 32 KiB, in them parts of a checksum, a length, a kind and the data.
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
    """{step: {name: value}}, what the charts are drawn from."""
    steps = {}
    for record in records:
        if record.WhichOneof("record_type") == "history":
            row = steps.setdefault(record.history.step.num, {})
            for item in record.history.item:
                row[".".join(item.nested_key) or item.key] = json.loads(item.value_json)
    return steps
