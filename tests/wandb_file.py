"""What an offline run of wandb has written, read back: a LevelDB log whose records are protocol buffers."""

import json
import struct
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

BLOCK = 32768
HEADER = 7  # of the file: ':W&B', 0xBEE1, version; and of a chunk: checksum, length, kind
FULL, FIRST, MIDDLE, LAST = 1, 2, 3, 4


def _payloads(data: bytes) -> Iterator[bytes]:
    """Each record's bytes, put together from chunks that end at blocks. AssertionError: a checksum is wrong."""
    assert data[:4] == b":W&B"
    position, parts = HEADER, []
    while position + HEADER <= len(data):
        if BLOCK - position % BLOCK < HEADER:  # padding
            position += BLOCK - position % BLOCK
            continue
        checksum, length, kind = struct.unpack_from("<IHB", data, position)
        if position + HEADER + length > len(data):  # not written yet
            return
        chunk = data[position + HEADER : position + HEADER + length]
        assert checksum == zlib.crc32(bytes([kind]) + chunk)
        position += HEADER + length
        parts.append(chunk)
        if kind in (FULL, LAST):
            yield b"".join(parts)
            parts = []
        else:
            assert kind in (FIRST, MIDDLE), kind


class OfflineRun:
    """An offline run of a run folder.

    Attributes:
        start: name, id, group and job type.
        history: what was logged, a dict a call.
        config: what it was last.
        summary: last values; nested ones as dicts.
        files: folder of its pictures and tables.
        is_whole: it has an exit record.
    """

    def __init__(self, run_folder: Path):
        """Another process writes the file, at times after `finish` has returned: it is waited for."""
        [path] = run_folder.glob("wandb/offline-run-*/*.wandb")
        self.files, deadline_s = path.parent / "files", time.monotonic() + 30
        self._read(path)
        while not self.is_whole and time.monotonic() < deadline_s:
            time.sleep(0.1)
            self._read(path)

    def _read(self, path: Path) -> None:
        from wandb.proto.wandb_internal_pb2 import Record  # pyright: ignore[reportMissingImports]

        self.start, self.config, self.history, self.summary, self.is_whole = {}, {}, [], {}, False
        for payload in _payloads(path.read_bytes()):
            record = Record()
            record.ParseFromString(payload)
            match record.WhichOneof("record_type"):
                case "run":
                    run = record.run
                    self.start = {"name": run.display_name, "id": run.run_id, "group": run.run_group,
                                  "job_type": run.job_type}  # fmt: skip
                    self.config = _values(run.config.update)
                case "config":
                    self.config |= _values(record.config.update)
                case "history":
                    self.history.append(_values(record.history.item))
                case "summary":
                    self.summary |= _values(record.summary.update)
                case "exit":
                    self.is_whole = True


def _values(items: Any) -> dict[str, Any]:
    """Nested names are joined by dots."""
    return {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in items}
