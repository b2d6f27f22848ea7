"""The contributor's kit: targets, hooks, workflows and metadata name what exists, and state each version once."""

import importlib.util
import re
from pathlib import Path

import pytest

import fused_kd
from benchmarks.versions import PAIRS

yaml = pytest.importorskip("yaml")
tomllib = pytest.importorskip("tomllib", reason="Python 3.10 has none")
ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
MAKEFILE = re.findall(r"^([a-z]+):(?! *=).*\n((?:\t.*\n)*)", (ROOT / "Makefile").read_text(), re.MULTILINE)
TARGETS = {target: [line.strip() for line in recipe.splitlines()] for target, recipe in MAKEFILE}
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
READ_ONLY = {"contents": "read"}


def steps(workflow: Path) -> list[dict]:
    return [step for job in yaml.safe_load(workflow.read_text())["jobs"].values() for step in job["steps"]]


def matrix(workflow: str, job: str, name: str) -> list[str]:
    return yaml.safe_load((ROOT / ".github/workflows" / workflow).read_text())["jobs"][job]["strategy"]["matrix"][name]


def named_wrongly(command: str) -> list[str]:
    """Return the targets, modules and extras of a command that do not exist, and its program if it is none of ours."""
    program, *words = command.split()
    wrong = [] if program in {"make", "pip", "pre-commit", "python", "twine", "fused-kd"} else [program]
    if program == "make":
        wrong += [word for word in words if word not in TARGETS]
    modules = re.findall(r"-m (benchmarks\S+)", command)
    wrong += [module for module in modules if importlib.util.find_spec(module) is None]
    extras = [extra for found in re.findall(r"\[([a-z,]+)\]", command) for extra in found.split(",")]
    return wrong + [extra for extra in extras if extra not in EXTRAS]


def test_contributing_names_targets_that_exist():
    named = set(re.findall(r"`make ([a-z]+)`", (ROOT / "CONTRIBUTING.md").read_text()))
    assert named - set(TARGETS) == set()
    assert {"test", "lint", "types", "docs", "bench", "gpu", "check"} - named == set()


@pytest.mark.parametrize("target", ["lint", "types", "test", "slow", "gate", "docs", "rehearse"])
def test_the_project_s_ci_runs_what_a_target_runs(target):
    script = (ROOT / ".ci" / "run").read_text()
    commands = [line.removeprefix("python ").partition(" build/")[0] for line in TARGETS[target]]
    commands = [command for command in commands if not command.startswith("mkdir")]
    assert commands
    assert f"make {target}" in script or [command for command in commands if command not in script] == []


def test_hooks_run_what_the_extra_dev_installs():
    programs = {"ruff": "ruff==", "mypy": "mypy=="}  # of pre-commit-hooks are the others
    for repository in yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]:
        assert repository["repo"] == "local"
        for hook in repository["hooks"]:
            wanted = programs.get(hook["entry"].split()[0], "pre-commit-hooks")
            assert hook["language"] == "system"
            assert "additional_dependencies" not in hook
            assert [requirement for requirement in EXTRAS["dev"] if requirement.startswith(wanted)], hook["id"]


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda workflow: workflow.name)
def test_a_workflow_reads_only_and_runs_commands_that_exist(workflow):
    parsed = yaml.safe_load(workflow.read_text())
    assert parsed["permissions"] == READ_ONLY
    assert [job for job in parsed["jobs"].values() if job.get("permissions", READ_ONLY) != READ_ONLY] == []
    assert "concurrency" in parsed
    actions = [step["uses"] for step in steps(workflow) if "uses" in step]
    assert [action for action in actions if not re.fullmatch(r"actions/[a-z-]+@v\d+", action)] == []
    commands = [line for step in steps(workflow) for line in step.get("run", "").splitlines()]
    assert {command: named_wrongly(command) for command in commands if named_wrongly(command)} == {}


def test_workflows_run_the_releases_that_are_named():
    tested = {f"Programming Language :: Python :: {python}" for python in matrix("tests.yml", "tests", "python")}
    assert len(tested) >= 3
    assert tested - set(PROJECT["classifiers"]) == set()
    assert set(matrix("versions.yml", "pair", "torch")) - {pair.torch for pair in PAIRS} == set()


@pytest.mark.parametrize(
    "form", sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml")), ids=lambda form: form.name
)
def test_a_form_has_what_the_host_asks_for(form):
    parsed = yaml.safe_load(form.read_text())
    assert {"name", "description", "body"} <= set(parsed)
    questions = [part for part in parsed["body"] if part["type"] != "markdown"]
    assert len({part["id"] for part in questions}) == len(questions)
    assert all(part["attributes"]["label"] for part in questions)


def test_the_citation_is_of_this_release():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert str(citation["version"]) == fused_kd.__version__
    assert citation["license"] == PROJECT["license"]
    assert [author["name"] for author in citation["authors"]] == [author["name"] for author in PROJECT["authors"]]
