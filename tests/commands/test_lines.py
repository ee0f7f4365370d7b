import json
import os
import subprocess
import sys
import threading

import pytest

from flax_transformer.commands.lines import (
    count_lines,
    in_chunks,
    json_line,
    open_output,
    progress_bar,
    read_all,
)
from flax_transformer.data.lines import read_lines


@pytest.fixture
def write(tmp_path):
    def write(name, content):
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
        return str(tmp_path / name)

    return write


def test_text_that_is_not_utf_8_is_an_error_that_names_line_and_byte(write):
    with pytest.raises(ValueError, match=r"text:3: byte 2 of the line, 0xff, is not UTF-8: convert it"):
        count_lines(write("text", b"a\nb\nc\xff\n"))


def test_pairs_are_lines_of_the_same_number(write):
    short, long = write("short", "a\nb\n"), write("long", "1\n2\n3\n")
    assert [*read_all(short, short)] == [("a", "a"), ("b", "b")]
    for first, second in ((short, long), (long, short)):
        with pytest.raises(ValueError, match=r"short ends after line 2: line i of .* must belong to line i of .*"):
            [*read_all(first, second)]
        with pytest.raises(ValueError, match=r"has \d lines, .* has \d lines: line i of .* must belong to line i of"):
            count_lines(first, second)
    assert count_lines(long, long) == 3


@pytest.mark.skipif(sys.platform == "win32", reason="there are no named pipes")
def test_a_pipe_is_read_once(tmp_path):
    path = str(tmp_path / "pipe")
    os.mkfifo(path)
    assert count_lines(path) is None
    writer = threading.Thread(target=lambda: (tmp_path / "pipe").write_text("one\ntwo\n"))
    writer.start()
    assert [*read_lines(path)] == ["one", "two"]
    writer.join()


def test_chunks_have_every_item_once_including_those_before_an_error():
    assert [*in_chunks(range(7), 3)] == [[0, 1, 2], [3, 4, 5], [6]]
    assert [*in_chunks([], 3)] == []

    def failing():
        yield from range(5)
        raise ValueError("the sixth")

    seen = []
    with pytest.raises(ValueError, match="the sixth"):
        seen.extend(in_chunks(failing(), 3))
    assert seen == [[0, 1, 2], [3, 4]]


def test_an_output_replaces_the_existing_file(tmp_path, write):
    path = write("out", "a long line\n")
    with open_output(path) as file:
        file.write(b"short\n")
    assert (tmp_path / "out").read_bytes() == b"short\n"


def test_json_is_one_line_that_every_parser_accepts():
    fields = {"text": 'ಕನ್ನಡ\u2028 "a"\n', "scores": (-0.123456789, float("-inf")), "number": 3}
    line = json_line(fields)
    assert "\n" not in line and "ಕನ್ನಡ" in line
    assert json.loads(line) == fields | {"scores": [-0.123457, None]}


@pytest.mark.parametrize(("terminals", "beside", "shown"), [
    ({"stderr"}, "-", True),
    ({"stderr", "stdout"}, "out.txt", True),
    ({"stderr", "stdout"}, "-", False),
    (set(), "out.txt", False),
])  # fmt: skip
def test_progress_is_shown_on_a_terminal_that_does_not_show_the_output(monkeypatch, terminals, beside, shown):
    for name in ("stderr", "stdout"):
        monkeypatch.setattr(getattr(sys, name), "isatty", lambda name=name: name in terminals, raising=False)
    with progress_bar(3, beside=beside) as bar:
        assert bar.disable is not shown


def test_a_name_of_standard_output_does_not_empty_the_file_behind_it(tmp_path):
    program = (
        "from flax_transformer.commands.lines import open_output\nwith open_output('/dev/stdout') as f: f.write(b'b')"
    )
    (tmp_path / "out").write_bytes(b"a")
    with (tmp_path / "out").open("ab") as out:
        subprocess.run([sys.executable, "-c", program], stdout=out, check=True)
    assert (tmp_path / "out").read_bytes() == b"ab"
