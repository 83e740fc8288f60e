"""Bad rows: named by file and line, put aside up to a share, and then the file is refused; the good ones stay."""

import json
from pathlib import Path

import pytest

from workbench.aside import LONGEST_ROW, Aside
from workbench.models import LM
from workbench.synthesis import synthesize
from workbench.synthesis.records import RecordError, load_data
from workbench.tasks import load_task

BAD: dict[str, tuple[bytes, str]] = {
    "broken JSON": (b'{"question": "1+1?", "answer": ', "not JSON"),
    "wrong fields": (b'{"frage": "1+1?", "antwort": "2"}', "no any of the usual question columns"),
    "an empty question": (b'{"question": "  ", "answer": "2"}', "is empty"),
    "an empty answer": (b'{"question": "1+1?", "answer": ""}', "the answer in column"),
    "a list": (b"[1, 2]", "expected an object"),
    "a million characters": (b'{"question": "' + b"x" * 10**6 + b'", "answer": "2"}', "bytes long"),
    "many characters": (b'{"question": "' + b"x" * (LONGEST_ROW + 1) + b'", "answer": "2"}', "characters"),
    "wrong encoding": ('{"question": "Wie groß?", "answer": "2"}'.encode("latin-1"), "not UTF-8"),
    "UTF-16": ('{"question": "1+1?", "answer": "2"}'.encode("utf-16-le"), "not JSON"),
    "another kind of answer": (b'{"question": "Who?", "answer": "many people"}', "needs one number"),
}


def lines(count: int) -> list[bytes]:
    return [json.dumps({"question": f"What is {i}+{i}?", "answer": str(2 * i)}).encode() for i in range(count)]


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_row_is_put_aside_with_file_and_line(kind: str, tmp_path: Path) -> None:
    raw, reason = BAD[kind]
    file = tmp_path / "rows.jsonl"
    good = lines(200)
    file.write_bytes(b"\n".join([*good[:120], raw, *good[120:]]))
    task = load_task("rows", path=file, split="train", kind="number")
    assert [(bad.file, bad.line) for bad in task.bad] == [(str(file), 121)]
    assert reason in task.bad[0].reason
    assert f"{file}, line 121" in task.bad[0].reason
    assert len(task.bad[0].text) <= 200
    assert [row["question"] for row in task.rows("train")] == [json.loads(line)["question"] for line in good]
    with pytest.raises(ValueError, match=r"1 of 201 rows can't be used.*line 121.*at most 0\.0% may be put aside"):
        load_task("rows", path=file, split="train", kind="number", max_bad=0.0)


def test_past_the_share_the_file_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_bytes(b"\n".join([*lines(10), *[b"{"] * 2]))
    with pytest.raises(
        ValueError, match=r"2 of 12 rows can't be used. First: .*line 11: not JSON.*16\.7%; at most 1\.0%"
    ):
        load_task("rows", path=file)
    assert len(load_task("rows", path=file, max_bad=0.2).bad) == 2
    with pytest.raises(ValueError, match="max_bad=2 is no share"):
        Aside(2)


def test_bad_rows_reach_the_folder_that_is_made_from_them(lab: LM, tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_bytes(b"\n".join([*lines(150), BAD["wrong encoding"][0]]))
    task = load_task("rows", path=file, split="train")
    synthesize(lab, task, n=3, out=tmp_path / "out", samples=1, max_new_tokens=8)
    (told,) = [json.loads(line) for line in (tmp_path / "out" / "bad_rows.jsonl").read_text().splitlines()]
    assert (told["file"], told["line"]) == (str(file), 151)


def test_bad_records_are_put_aside_too(tmp_path: Path) -> None:
    def record(answer: str) -> bytes:
        messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": answer}]
        return json.dumps({"messages": messages}).encode()

    broken = [b"{", b'{"messages": []}', record("x" * (LONGEST_ROW + 1)), "é".encode("latin-1"), b"3"]
    file = tmp_path / "records.jsonl"
    file.write_bytes(b"\n".join([record(str(i)) for i in range(95)] + broken))
    data = load_data(file, max_bad=0.05)
    assert len(data) == 95
    assert [bad.line for bad in data.bad] == [96, 97, 98, 99, 100]
    with pytest.raises(RecordError, match=r"5 of 100 rows can't be used. First: .*line 96: not JSON"):
        load_data(file)


def test_a_mended_file_leaves_no_bad_rows_behind(lab: LM, tmp_path: Path) -> None:
    file, out = tmp_path / "rows.jsonl", tmp_path / "out"
    for text, there in ((b"\n".join([*lines(150), b"{"]), True), (b"\n".join(lines(151)), False)):
        file.write_bytes(text)
        synthesize(lab, load_task("rows", path=file, split="train"), n=3, out=out, samples=1, max_new_tokens=4)
        assert (out / "bad_rows.jsonl").exists() == there
