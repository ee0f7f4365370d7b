"""Checks that inputs and work directories are not overwritten, whatever names their files have."""

import os
import subprocess
import sys
import threading

import pytest

from flax_transformer.files import OWN_FOLDERS, check_inputs, check_output, expand, work_directory_of


@pytest.fixture
def text(tmp_path):
    (tmp_path / "text").write_text("one\n")
    return tmp_path / "text"


@pytest.fixture
def workdir(tmp_path):
    folder = tmp_path / "run"
    for name in OWN_FOLDERS:
        (folder / name / "5").mkdir(parents=True)
        (folder / name / "5" / "data").write_text("bytes")
    (folder / "config.json").write_text("{}")
    return folder


def hard(path, link):
    os.link(path, link)


@pytest.mark.parametrize("link", [hard, lambda path, link: os.symlink(path, link)])
def test_an_input_with_another_name_is_not_overwritten(text, tmp_path, link):
    link(text, tmp_path / "other")
    for name in ("other", "text", "./text", "x/../other"):
        (tmp_path / "x").mkdir(exist_ok=True)
        with pytest.raises(ValueError, match="--output is .*, which --target reads"):
            check_output("--output", f"{tmp_path}/{name}", [("--source", "none"), ("--target", str(text))])
    assert text.read_text() == "one\n"
    check_output("--output", str(tmp_path / "new"), [("--source", str(text))])


def test_an_input_that_does_not_exist_yet_cannot_be_the_output(tmp_path):
    with pytest.raises(ValueError, match="--source reads"):
        check_output("--output", str(tmp_path / "new"), [("--source", str(tmp_path / "x" / ".." / "new"))])


def test_an_output_needs_a_writable_folder(tmp_path, text):
    for path, message in ((tmp_path / "none" / "new", "there is no folder"), (tmp_path, "a folder: name a file in it")):
        with pytest.raises(ValueError, match=f"--output is .*{message}"):
            check_output("--output", str(path), [])
    check_output("--output", os.devnull, [("--input", os.devnull)])


@pytest.mark.parametrize(
    "name", ["config.json", "joint.model", "vocab.json", "not_finite_7.tsv", "checkpoints/new", "averaged/5/data"]
)
def test_the_files_of_a_work_directory_are_not_overwritten(workdir, name):
    with pytest.raises(ValueError, match=rf"which belongs to the work directory {workdir} .*: name another"):
        check_output("--output", str(workdir / name), [])


def test_the_files_of_a_work_directory_are_recognised_under_other_names(workdir, tmp_path):
    os.link(workdir / "checkpoints" / "5" / "data", tmp_path / "hard")
    os.symlink(workdir / "config.json", tmp_path / "soft")
    os.symlink(workdir, tmp_path / "link")
    for name in ("hard", "soft", "link/scores.json"):
        assert work_directory_of(str(tmp_path / name), [str(workdir)]) is not None, name


def test_a_user_s_own_file_in_a_work_directory_may_be_replaced(workdir):
    (workdir / "test.hyp").write_text("older")
    check_output("--output", str(workdir / "test.hyp"), [], [str(workdir)])
    check_output("--output", str(workdir.parent / "config.json"), [], [str(workdir)])


@pytest.mark.parametrize(
    "names", [("-", "-"), ("-", "/dev/stdin"), ("/dev/fd/0", "-"), ("/proc/self/fd/0", "/dev/stdin")]
)
def test_standard_input_can_be_only_one_input(names):
    with pytest.raises(ValueError, match=r"--source is .* and --target is .*standard input can be only one of them"):
        check_inputs([("--source", names[0]), ("--target", names[1])])


def test_a_pipe_can_be_only_one_input_and_a_file_several(tmp_path, text):
    os.mkfifo(tmp_path / "pipe")
    os.symlink(tmp_path / "pipe", tmp_path / "other")
    pipes = [("--input", str(tmp_path / "pipe")), ("--prefixes", str(tmp_path / "other"))]
    with pytest.raises(ValueError, match=r"one stream, which can be read only once"):
        check_inputs(pipes)
    os.mkfifo(tmp_path / "second")
    check_inputs([pipes[0], ("--prefixes", str(tmp_path / "second")), ("a", str(text)), ("b", str(text))])


PROGRAM = """
import sys
from flax_transformer.files import check_output
check_output("--output", sys.argv[1], [("--input", sys.argv[2])])
"""


def test_redirected_streams_are_recognised_by_their_files(text, tmp_path):
    def run(*arguments, **streams):
        done = subprocess.run([sys.executable, "-c", PROGRAM, *map(str, arguments)], stderr=subprocess.PIPE, **streams)
        return done.returncode, done.stderr.decode()

    with text.open() as given:
        status, said = run(text, "-", stdin=given)
    assert status and "--input reads" in said
    with text.open("a") as taken:
        status, said = run("-", text, stdout=taken)
        assert status and "standard output goes to the file that --input reads" in said
        assert run("-", tmp_path / "none", stdout=taken)[0] == 0


def test_a_tilde_means_the_home_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert expand("~/a") == f"{tmp_path}/a" and expand("a~b") == "a~b" and expand("-") == "-"
    (tmp_path / "a").write_text("one\n")
    with pytest.raises(ValueError, match="--source reads"):
        check_output("--output", "~/a", [("--source", str(tmp_path / "a"))])


def test_checking_a_pipe_reads_nothing_from_it(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    writer = threading.Thread(target=lambda: pipe.write_text("one\n"))
    writer.start()
    check_inputs([("--source", str(pipe)), ("--target", "-")])
    check_output("--output", str(tmp_path / "new"), [("--source", str(pipe))])
    assert pipe.read_text() == "one\n"
    writer.join()
