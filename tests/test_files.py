"""A failing read is the file's failure, in one line; a failing write leaves what was there, and no trace."""

import json
import os

import pytest

from plumbing import files
from plumbing.files import InputError


def tree(folder) -> dict[str, str]:
    return {str(p.relative_to(folder)): p.read_text() for p in folder.rglob("*") if p.is_file()}


def test_reading_blames_the_file_in_one_line():
    with pytest.raises(InputError, match=r"^x\.bin: cannot be read \(header too long\)$"):
        with files.reading("x.bin"):
            raise RuntimeError("\n  header too long\nmany more\nlines")
    with pytest.raises(InputError, match="^no.json: cannot be read .No such file or directory.$"):
        files.read_json("no.json")
    with pytest.raises(InputError, match="^already clear$"), files.reading("x.bin"):
        raise InputError("already clear")
    with pytest.raises(KeyboardInterrupt), files.reading("x.bin"):  # no failure of the file's
        raise KeyboardInterrupt


@pytest.mark.parametrize("error", [RuntimeError("full"), InputError("full"), OSError(28, "full")])
def test_a_failed_write_leaves_the_old_file_and_no_trace(tmp_path, error):
    path = tmp_path / "new folder" / "x.txt"
    for before in ({}, {"new folder/x.txt": "old"}):
        if before:
            path.write_text("old")
        with pytest.raises(InputError, match="full"), files.writing(str(path)) as temporary:
            with open(temporary, "w") as file:
                file.write("half of the n")
            raise error
        assert tree(tmp_path) == before


def test_a_folder_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "model"

    def write(*names: str, fail: bool = False) -> None:
        with files.writing(str(path)) as temporary:
            os.makedirs(temporary)
            for name in names:
                with open(os.path.join(temporary, name), "w") as file:
                    file.write(name)
            if fail:
                raise OSError(28, "No space left on device")

    write("a", "b")
    with pytest.raises(InputError, match="model: cannot be written .No space left on device.$"):
        write("c", fail=True)
    assert tree(tmp_path) == {"model/a": "a", "model/b": "b"}
    write("c")
    assert tree(tmp_path) == {"model/c": "c"}


def test_a_folder_that_cannot_be_replaced_comes_back(tmp_path, monkeypatch):
    path = tmp_path / "model"
    path.mkdir()
    (path / "old").touch()

    def fail(*_):
        raise OSError("no")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(InputError, match="cannot be written"), files.writing(str(path)) as temporary:
        os.mkdir(temporary)
    assert [p.name for p in tmp_path.rglob("*")] == ["model", "old"]
    monkeypatch.undo()
    path.rename(tmp_path / "model.old")  # killed between the two renames
    with pytest.raises(KeyboardInterrupt), files.writing(str(path)):
        raise KeyboardInterrupt
    assert [p.name for p in tmp_path.rglob("*")] == ["model", "old"]


def test_what_a_killed_process_left_is_cleared_away(tmp_path):
    path = tmp_path / "x.json"
    (tmp_path / "x.json.unfinished").mkdir()
    (tmp_path / "x.json.unfinished/half").write_text("half")
    files.write_json(str(path), {"a": 1})
    assert os.listdir(tmp_path) == ["x.json"] and files.read_json(str(path)) == {"a": 1}


def test_what_cannot_be_written_is_said(tmp_path):
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(InputError, match="file/x.json: cannot be written"):
        files.write_json(str(tmp_path / "file/x.json"), {})
    with pytest.raises(InputError, match="x.json: cannot be written .*not JSON serializable"):
        files.write_json(str(tmp_path / "x.json"), {"a": object()})
    assert tree(tmp_path) == {"file": "not a folder"}


def test_lines_that_a_kill_cut_off_do_not_count(tmp_path):
    path = tmp_path / "rows.jsonl"
    files.write_jsonl(str(path), [{"step": 0}, {"step": 1}])
    whole = path.read_text()
    path.write_text(whole + '{"step": 2, "rew')
    assert files.read_jsonl(str(path), {"step": int}) == [{"step": 0}, {"step": 1}]
    path.write_text('{"step": 0, "rew\n' + whole)  # in the middle no kill has done it
    with pytest.raises(InputError, match="rows.jsonl row 1: cannot be read"):
        files.read_jsonl(str(path), {"step": int})
    path.write_text("\n \n")
    with pytest.raises(InputError, match="rows.jsonl: no rows"):
        files.read_jsonl(str(path))


MISFITS = [
    ([1], "expected an object with fields, got list"),
    ({}, "field 'name' is missing"),
    ({"name": 3, "value": 1}, "field 'name' should be str, got int"),
    ({"name": "a", "value": True}, "field 'value' should be a finite number, got 'True'"),
    ({"name": "a", "value": "7"}, "field 'value' should be a finite number, got '7'"),
    ({"name": "a", "value": float("nan")}, "field 'value' should be a finite number, got 'nan'"),
    ({"name": "a", "value": 10**400}, f"field 'value' should be a finite number, got '1{'0' * 39}'"),
    ({"name": "\ud83d", "value": 1}, "field 'name' holds half a surrogate pair, which no tokenizer reads"),
    ({"name": "a", "value": 1}, None),
    ({"name": "a", "value": -0.5, "more": None}, None),
]


@pytest.mark.parametrize("row, wrong", MISFITS)
def test_why_a_row_does_not_fit(tmp_path, row, wrong):
    assert files.schema_error(row, {"name": str, "value": float}) == wrong
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row) + "\n")
    if wrong:
        with pytest.raises(InputError, match="rows.jsonl row 1: ") as error:
            files.read_jsonl(str(path), {"name": str, "value": float})
        assert str(error.value).endswith(wrong)
