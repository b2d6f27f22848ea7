"""Tables and help at the terminal's width: no word is lost, whatever it is."""

import re
import shlex

import pytest
import torch
from rich.cells import cell_len
from rich.console import Console
from rich.table import Table

from fused_kd.cli import check, layout, main, parser
from fused_kd.cli.planning import tables as planning
from fused_kd.cli.planning.paths import LossStep, ledgers
from fused_kd.testing import accuracy, linear_accuracy

COMMANDS = ["", "plan", "check", "bench", "distill"]
WIDTHS = [20, 40, 60, 80, 100, 120, 160]
STEP = LossStep(8192, 128_256, 2048, 4096)


def of_check(verbose):
    cases = [
        next(case for case in suite.cases() if (case.rows, case.student_dtype) == (rows, dtype))
        for suite in (accuracy, linear_accuracy)
        for rows in (1, 129)
        for dtype in (torch.float32, torch.bfloat16)
    ]
    errors = accuracy.Errors(
        loss=2.2e-8, loss_eager=2.9e-8, gradient=1e-8, gradient_eager=1e-9, misrounded=0.5, nan=False, off=True
    )
    return check._table([(case, errors) for case in cases], "cpu", verbose)


def of_bench(name):
    pytest.importorskip("matplotlib")
    from fused_kd.cli.benchmarking import comparison, measure, suite, tables

    sizes = "models", "Gemma 3 270M from 1B", "hidden", 512, 262_144, 640, 1152, "float32"
    spread = measure.Spread(0.123, 0.12, 0.13, 9)
    results = [
        suite.Result(*sizes, peer, "CE + soft CE", agrees=agrees, value_error=1.0, gradient_error=0.1, forward=spread,
                     backward=spread, both=spread, peak_bytes=10**9, bandwidth=2e9, joules=1.0)
        for peer, agrees in (("fused_kd", True), ("torchtune, chunked (CE + soft CE, T = 1)", False))
    ]  # fmt: skip
    if name == "times":
        return tables.time_table(results, 1e10)
    return comparison.table([comparison.Change(result, "memory, MB", 1.0, 2.0) for result in results])


TABLES = {
    "check": lambda: of_check(False),
    "check --verbose": lambda: of_check(True),
    "bench, times": lambda: of_bench("times"),
    "bench --compare": lambda: of_bench("comparison"),
    "plan, memory": lambda: planning._memory(STEP, ledgers(STEP)),
    "plan, cards": lambda: planning._cards(STEP, ledgers(STEP), 20 * 10**9),
    "plan, arrays": lambda: planning._arrays("eager PyTorch", ledgers(STEP)["eager PyTorch"]),
}


def words(table):
    texts = [str(text) for column in table.columns for text in (column.header, *column.cells)]
    return {word for text in (str(table.title), *texts) for word in text.split()}


def printed(table, width):
    console = Console(width=width)
    with console.capture() as capture:
        layout.print_table(console, table)
    return capture.get()


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", TABLES)
def test_every_word_of_a_table_is_whole_at_every_width(name, width):
    table = TABLES[name]()
    expected = words(table)
    out = printed(table, width)
    assert "…" not in out
    found = set(re.split(r"[\s│┃]+", out)) | set(re.split(r"[\s,:│┃]+", out))
    missing = {word for word in expected if word.rstrip(",:") not in {other.rstrip(",:") for other in found}}
    assert missing == set()
    for line in out.splitlines():
        assert cell_len(line) <= width or len(line.split()) == 1, line


@pytest.mark.parametrize("name", TABLES)
def test_a_table_that_fits_is_richs_own(name):
    console = Console(width=200)
    with console.capture() as capture:
        console.print(TABLES[name]())
    assert printed(TABLES[name](), 200) == capture.get()


def test_a_narrow_table_is_a_record_per_row():
    table = Table(title="Peers, fastest first")
    for heading in ("", "time of a step, ms", "memory, MB"):
        table.add_column(heading)
    table.add_row("fused_kd", "1.5 ± 0.1", "12")
    table.add_row("with long numbers", "", "89 1 234 567")
    table.add_row("eager PyTorch", "9.5\n± 0.1", "")
    assert (
        printed(table, 24)
        == """\
Peers, fastest first

fused_kd
  time of a step, ms:
    1.5 ± 0.1
  memory, MB: 12

with long numbers
  memory, MB: 89
    1 234 567

eager PyTorch
  time of a step, ms:
    9.5, ± 0.1

"""
    )


def test_columns_is_followed_where_there_is_no_terminal(monkeypatch):
    assert layout.console(114).width == 114
    monkeypatch.setenv("COLUMNS", "40")
    assert layout.console(114).width == 40


def test_plan_at_40_columns(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "40")
    assert main(["plan", "--vocab-size", "128256", "--student-hidden", "2048", "--teacher-hidden", "4096"]) == 0
    out = capsys.readouterr().out
    assert max(map(cell_len, out.splitlines())) <= 40
    assert out.splitlines()[0].startswith("8 192 tokens, V = 128 256,")
    assert "Use linear_kd_loss: 8 chunks" in out


@pytest.mark.parametrize("width", [40, 80, 120])
@pytest.mark.parametrize("command", COMMANDS)
def test_help_is_as_wide_as_the_terminal(command, width, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "10000")
    with pytest.raises(SystemExit):
        main([*command.split(), "--help"])
    expected = capsys.readouterr().out.split()
    monkeypatch.setenv("COLUMNS", str(width))
    with pytest.raises(SystemExit):
        main([*command.split(), "--help"])
    out = capsys.readouterr().out
    assert out.split() == expected
    for line in out.splitlines():
        assert len(line) <= width or re.match(r" {2,4}\S", line), line  # an example or a formula
    assert max(map(len, out.splitlines())) > min(width, 110) - 12  # the main one has no long lines


def test_help_keeps_examples(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "40")
    with pytest.raises(SystemExit):
        main(["plan", "--help"])
    out = capsys.readouterr().out
    assert "\n  fused-kd plan --vocab-size 128256 --student-hidden 2048 --teacher-hidden 4096\n" in out


def help_of(command, width, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", str(width))
    with pytest.raises(SystemExit):
        main([*command.split(), "--help"])
    return capsys.readouterr().out


@pytest.mark.parametrize("command", COMMANDS)
def test_help_shows_two_examples_and_fits_the_terminal(command, monkeypatch, capsys):
    for width in (80, 100):
        out = help_of(command, width, monkeypatch, capsys)
        assert max(map(len, out.splitlines())) <= width
        examples = re.findall(r"^  (fused-kd .*)$", out.split("\nexamples:\n")[1], re.MULTILINE)
        assert len(examples) == 2
        for example in examples:
            words = shlex.split(example)[1:]
            assert words[: len(command.split())] == command.split()
            parser().parse_args(words)


@pytest.mark.parametrize("width", [26, 27, 30, 40])
def test_figures_are_cut_only_if_there_is_no_other_way(width):
    table = Table(title="Figures")
    table.add_column("peer by its name")
    table.add_column("a long heading", justify="right")
    table.add_row("eager PyTorch", "1 234 ± 12 ms")
    assert ("1 234 ± 12 ms" in printed(table, width)) == (width > 26)


@pytest.mark.parametrize("width", [30, 80, None])
def test_a_sentence_is_cut_between_words_and_in_a_file_it_is_one_line(width, monkeypatch, capsys):
    if width:
        monkeypatch.setenv("COLUMNS", str(width))
    sentence = (
        "Use linear_kd_loss: 8 chunks of 1 024 tokens, 3.29 GB at the peak [bold] where eager takes 26.9 GB. " * 3
    )
    layout.say(sentence.strip())
    lines = capsys.readouterr().out.splitlines()
    assert " ".join(lines) == sentence.strip()
    assert len(lines) == 1 if width is None else max(map(len, lines)) <= width
    assert not [line for line in lines if re.match(r"(024|GB)", line)]
