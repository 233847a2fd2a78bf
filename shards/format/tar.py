"""Plain tars whose bytes depend on their members' names and contents alone."""

from __future__ import annotations

import hashlib
import tarfile
from pathlib import Path


class TarWriter:
    """Writes USTAR members with fixed metadata (mode 0644, no owner, time 0), hashing on the way.

    Written by hand, member by member, as tarfile does not tell payload offsets or a hash.
    """

    def __init__(self, path: Path) -> None:
        self._file = open(path, "wb")  # noqa: SIM115  closed by `finish` or `abort`
        self._digest = hashlib.sha256()
        self.size = 0  # bytes so far

    def add(self, name: str, payload: bytes) -> int:
        """Append a member; returns the offset of its payload from the start of the tar."""
        info = tarfile.TarInfo(name)
        info.size = len(payload)
        info.mode = 0o644
        self._write(info.tobuf(tarfile.USTAR_FORMAT, "ascii", "strict"))
        offset = self.size
        self._write(payload)
        self._write(bytes(-len(payload) % tarfile.BLOCKSIZE))
        return offset

    def finish(self) -> str:
        """End the archive; returns its sha256 (hex)."""
        self._write(bytes(2 * tarfile.BLOCKSIZE))
        self._write(bytes(-self.size % tarfile.RECORDSIZE))
        self._file.close()
        return self._digest.hexdigest()

    def abort(self) -> None:
        self._file.close()

    def _write(self, data: bytes) -> None:
        self._file.write(data)
        self._digest.update(data)
        self.size += len(data)
