"""Files: one clear line for what a user's file gets wrong, and nothing that is half-written.

    reading(path)     around a library that reads a user's file: whatever it raises is the file's failure
    writing(path)     a temporary name that becomes `path` when the block is through, or leaves no trace
    check_writable    whether anything can be written to a folder, asked before the work
    fingerprint       whether data are still the same
    read_*, write_*   JSON and JSON lines, for every script
    schema_error      why a row's fields are not what is needed

It needs no torch. An InputError is the user's input failing, and `run` of runs.py
prints it as one line. Every other exception is a bug of this repository and keeps its traceback.
"""

import hashlib
import json
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress


class InputError(ValueError):
    """The user's input cannot be used: the message says what, where and what to do."""


def reason(error: BaseException, line: int = 0) -> str:
    """The useful words of a library's exception, in one line: an OSError's reason, else its first line. Of a
    checkpoint's error it is the last one (`line` -1), below the tracebacks of all ranks."""
    lines = list(filter(str.strip, str(error).splitlines())) or [type(error).__name__]
    return (getattr(error, "strerror", None) or lines[line]).strip()[:240]


@contextmanager
def reading(path: str) -> Iterator[None]:
    """Inside, a library reads the user's file or folder `path`. Keep the block to that: a bug of ours in it
    would be blamed on the file."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # parsers raise whatever they like for a damaged file
        raise InputError(f"{path}: cannot be read ({reason(error)})") from None


@contextmanager
def writing(path: str) -> Iterator[str]:
    """Yield a temporary name beside `path`, for a file or a folder. It is renamed to `path` when the block
    ends and removed when it fails, so that whoever looks finds the old one or the new one, whole."""
    temporary, old = f"{path}.unfinished", f"{path}.old"

    def put_back() -> None:
        """What a failed or killed process left: the old one to its place, the new one away."""
        remove(temporary)
        if os.path.lexists(old) and not os.path.lexists(path):
            os.rename(old, path)
        remove(old)

    try:
        put_back()
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
        yield temporary
        if os.path.isdir(temporary) and os.path.exists(path):  # only files can be replaced in one go
            os.rename(path, old)
        os.replace(temporary, path)
        remove(old)
    except BaseException as error:
        put_back()
        if isinstance(error, InputError) or not isinstance(error, Exception):
            raise
        # a full disk has many names: OSError, SafetensorError, RuntimeError
        raise InputError(f"{path}: cannot be written ({reason(error)})") from None


def check_writable(folder: str) -> None:
    """Raise InputError now, and not after hours of work, if no file can be written to a folder."""
    try:
        os.makedirs(folder, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise InputError(f"{folder}: cannot be written ({reason(error)})") from None


def remove(path: str) -> None:
    """Remove a file or a folder, if it is there. A folder leaves its name at once: no kill leaves half of it
    there. What cannot be deleted (NFS keeps a file that is open) stays in `.removed` beside it, and goes with
    a later one."""
    if os.path.isdir(path) and not os.path.islink(path):
        away = os.path.join(os.path.dirname(path), ".removed")
        with suppress(OSError):
            os.makedirs(away, exist_ok=True)
            os.rename(path, os.path.join(away, os.path.basename(path)))
        shutil.rmtree(away, ignore_errors=True)
        shutil.rmtree(path, ignore_errors=True)
    elif os.path.lexists(path):
        os.remove(path)


def fingerprint(path: str) -> str | None:
    """Of a file: a hash of its size and of its first and last MiB, cheap for any size; of a folder: of its
    files. None for what is not there, such as a name on the hub."""
    digest, mib = hashlib.sha256(), 2**20
    if not os.path.exists(path):
        return None
    with reading(path):
        for name in sorted(os.listdir(path)) if os.path.isdir(path) else [""]:
            file_path = os.path.join(path, name) if name else path
            if os.path.isfile(file_path):
                with open(file_path, "rb") as file:
                    size = file.seek(0, os.SEEK_END)
                    digest.update(f"{name} {size} ".encode("utf-8", "surrogateescape"))
                    for start in (0, max(size - mib, 0)):
                        file.seek(start)
                        digest.update(file.read(mib))
    return digest.hexdigest()


# ------------------------------------------------------------------------------ JSON


def read_json(path: str):
    with reading(path), open(path, encoding="utf-8-sig") as file:
        return json.load(file)


def write_json(path: str, value) -> None:
    with writing(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
        json.dump(value, file, indent=2)


def read_jsonl(path: str, fields: dict | None = None) -> list[dict]:
    """The rows of a file that a script wrote; `fields` as in `schema_error`. Half a last line, which a killed
    run leaves, does not count. Raises InputError if there is no row, or one that does not fit."""
    rows = []
    with reading(path), open(path, encoding="utf-8-sig") as file:
        lines = file.readlines()
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                with reading(f"{path} row {number}"):
                    rows.append(json.loads(line))
            except InputError:
                if number == len(lines) and not line.endswith("\n"):
                    break
                raise
            if wrong := schema_error(rows[-1], fields or {}):
                raise InputError(f"{path} row {number}: {wrong}")
    if not rows:
        raise InputError(f"{path}: no rows")
    return rows


def write_jsonl(path: str, rows: Iterable[dict]) -> None:
    with writing(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


SURROGATE = re.compile("[\ud800-\udfff]")


def schema_error(row, fields: dict) -> str | None:
    """Why a row does not have these fields, or None. Kinds: str, bool, int, and float for a finite number."""
    if not isinstance(row, dict):
        return f"expected an object with fields, got {type(row).__name__}"
    for field, kind in fields.items():
        if field not in row:
            return f"field {field!r} is missing"
        value = row[field]
        if kind is float:
            if type(value) not in (int, float) or not abs(value) <= sys.float_info.max:
                return f"field {field!r} should be a finite number, got {str(value)[:40]!r}"
        elif type(value) is not kind:  # `is`: True is an int, and is no response id
            return f"field {field!r} should be {kind.__name__}, got {type(value).__name__}"
        if kind is str and SURROGATE.search(value):
            return f"field {field!r} holds half a surrogate pair, which no tokenizer reads"
    return None
