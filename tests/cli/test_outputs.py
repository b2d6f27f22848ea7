"""Outputs are tried before the work, written beside their place and renamed; what cannot be written is one line."""

import json

import pytest

from fused_kd.cli import arguments, main, outputs
from fused_kd.cli.errors import UserError
from fused_kd.testing import accuracy

from .processes import shell

SIZES = ["--vocab-size", "300", "--student-hidden", "8", "--teacher-hidden", "9"]


def fails(*command):
    try:
        return main(command)
    except SystemExit as end:  # argparse's own
        return end.code


@pytest.fixture
def idle(monkeypatch):
    """No command may come to work."""

    def worked(*given, **options):
        pytest.fail("it worked first")

    monkeypatch.setattr("fused_kd.cli.plan._step", worked)
    if pytest.importorskip("matplotlib"):
        monkeypatch.setattr("fused_kd.cli.benchmarking.measure.copy_bandwidth", worked)
    with accuracy.checking(accuracy.cases(), worked):
        yield


@pytest.mark.parametrize("command", ["check", "bench", "plan"])
@pytest.mark.parametrize("place", ["/proc/x.json", "/sys/x.json", "folder", "file/x.json", "none/x.json", "n" * 300])
def test_a_file_that_cannot_be_written_is_refused_before_the_work(command, place, idle, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    assert fails(command, "--json", place) == 2
    error = capsys.readouterr().err
    assert "argument --json: " in error.splitlines()[-1]
    assert "cannot write" in error or "expected a file in a folder that exists" in error
    assert {path.name for path in tmp_path.iterdir()} == {"folder", "file"}


@pytest.mark.parametrize("place", ["/proc", "/proc/plots", "/sys", "file", "file/plots"])
def test_a_folder_that_cannot_be_written_is_refused_before_the_work(place, idle, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    assert main(["bench", "--device", "cpu", "--output", place]) == 2
    error = capsys.readouterr().err
    assert error.startswith("fused-kd bench: --output: cannot ")
    assert error.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_trial_leaves_nothing(tmp_path):
    file = tmp_path / "x.json"
    assert arguments.new_file(str(file)) == file
    assert list(tmp_path.iterdir()) == []
    file.write_text("before")
    arguments.new_file(str(file))
    assert file.read_text() == "before"
    arguments.folder(tmp_path / "a" / "b")
    assert [path.name for path in tmp_path.rglob("*")] == ["x.json", "a", "b"]


def test_a_disk_that_is_full_when_the_work_is_done_is_one_line(capsys):
    assert main(["plan", *SIZES, "--json", "/dev/full"]) == 2
    captured = capsys.readouterr()
    assert "planned, not measured" in captured.out
    assert captured.err == "fused-kd plan: cannot write /dev/full: No space left on device\n"


def test_a_write_that_fails_leaves_what_was_there(tmp_path):
    file, folder = tmp_path / "file", tmp_path / "folder"
    file.write_text("before")
    folder.mkdir()
    (folder / "part").write_text("before")

    def fail(path, error):
        with outputs.written_beside(path) as place:
            place.write_text("half")
            raise error

    with pytest.raises(UserError, match=r"cannot write .*file: No space left on device"):
        fail(file, OSError(28, "No space left on device"))
    with pytest.raises(RuntimeError, match="a bug"):
        fail(folder, RuntimeError("a bug"))
    assert file.read_text() == (folder / "part").read_text() == "before"
    assert len(list(tmp_path.iterdir())) == 2


def test_a_block_that_writes_nothing_leaves_what_was_there(tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "old").touch()
    with pytest.raises(UserError, match="cannot write"), outputs.written_beside(folder):
        pass
    assert [path.name for path in tmp_path.rglob("*")] == ["folder", "old"]


def test_a_folder_takes_the_place_of_a_folder_and_a_link_stays_a_link(tmp_path):
    folder, file, link = tmp_path / "folder", tmp_path / "file", tmp_path / "link"
    folder.mkdir()
    (folder / "old").touch()
    with outputs.written_beside(folder) as place:
        place.mkdir()
        (place / "new").touch()
    assert [path.name for path in folder.iterdir()] == ["new"]
    link.symlink_to(file)
    with outputs.written_beside(link) as place:
        place.write_text("new")
    assert link.is_symlink()
    assert file.read_text() == "new"
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    assert arguments.new_file(str(loop)) == loop


def test_a_pipe_is_written_itself():
    result = shell('"$@" --json >(cat >&2) >/dev/null', "plan", *SIZES)
    assert json.loads(result.stderr)["command"] == "fused-kd plan"


@pytest.mark.parametrize(
    ("command", "option", "value", "expected"),
    [
        ("plan", "--tokens", "9" * 400, "expected a whole number of at most 9223372036854775807, got '99999"),
        ("plan", "--tokens", "9" * 5000, "expected a whole number of at most 9223372036854775807, got '99999"),
        ("plan", "--vocab-size", "1" + "0" * 40, "expected a whole number of at most 9223372036854775807"),
        ("plan", "--reserved", "1e300", "expected a number of GB of at least 0 and at most 9223372037, got '1e300'"),
        ("plan", "--workspace-bytes", "9" * 400, "expected a number of bytes such as 512000000, 512MB or 1.5GB, got"),
        ("plan", "--workspace-bytes", "9" * 300 + "GB", "expected a number of bytes such as"),
        ("bench", "--seconds", "1e400", "expected a finite number above 0, got '1e400'"),
        ("bench", "--seconds", "9" * 400, "expected a finite number above 0, got '9999"),
    ],
)
def test_an_absurd_number_is_one_line(command, option, value, expected, capsys):
    assert fails(command, *(SIZES if command == "plan" else []), option, value) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert expected in error
    assert len(error) < 200


def test_the_largest_numbers_have_a_plan(capsys):
    most = str(arguments.MOST)
    sizes = [word if word.startswith("-") else most for word in SIZES]
    assert main(["plan", *sizes, "--tokens", most, "--reserved", "9e9"]) == 0
    assert main(["bench", "--device", "cpu", "--part", "sweeps", "--device", f"cuda:{most}0"]) == 2
