"""Measured figures beside the modelled ones of the simulator: the error of the model."""

from typing import Any, NamedTuple

from fused_kd.testing.peers import OURS

from .context import GPU
from .stages.fast import ONE_LAUNCH, TWO_LAUNCHES
from .subjects import TEMPERATURE

CHIPS = ("A100", "H100", "H200", "B200")
LIKE = {"H200": "H100"}  # they differ in memory alone, and times are compared as multiples of each one's own floor
NAMED = {"fla fused KL": "fla KL kernel"}  # in `benchmarks.modelled`, where heads are left out: here

KERNEL = "the one-launch kernel, times the floor"
MOVED = {ONE_LAUNCH: "one launch, bytes of memory per pair", TWO_LAUNCHES: "two launches, bytes of memory per pair"}
Key = tuple[str, int, float]  # figure, V, T


class Comparison(NamedTuple):
    figure: str
    vocabulary: int
    temperature: float
    measured: float
    modelled: float

    @property
    def error(self) -> float:
        """The model's excess over what was measured, as a share of that."""
        return self.modelled / self.measured - 1


def comparisons(run: dict[str, Any], modelled: dict[str, Any], one_launch: dict[str, Any]) -> list[Comparison]:
    """The figures that a run of `benchmarks.gpu` shares with the records of the two scripts that model them."""
    chip = chip_of(run)
    if chip is None:
        return []
    known = of_model(modelled, one_launch, LIKE.get(chip, chip).lower())
    return [Comparison(*key, value, known[key]) for key, value in of_run(run).items() if key in known]


def chip_of(run: dict[str, Any]) -> str | None:
    """The chip of a run's device, if it is one that is modelled."""
    name = next((r["name"] for r in results(run, "machine") if r["figure"] == "device"), "")
    return next((chip for chip in CHIPS if chip in name), None)


def results(run: dict[str, Any], stage: str) -> list[dict[str, Any]]:
    return list(run["stages"].get(stage, {"results": []})["results"])


def of_run(run: dict[str, Any]) -> dict[Key, float]:
    steps = [result for result in results(run, "fast") if "times_the_floor" in result]
    floors = {result["vocabulary"]: result["floor_seconds"] for result in steps}
    found: dict[Key, float] = {}
    for r in results(run, "plans"):
        if r["plan"] == "auto" and "seconds" in r and r["vocabulary"] in floors:
            found[KERNEL, r["vocabulary"], TEMPERATURE] = r["seconds"] / floors[r["vocabulary"]]
    for r in steps:
        found[_step(r["subject"]), r["vocabulary"], r["temperature"]] = r["times_the_floor"]
    for r in results(run, "l2"):
        if "bytes_per_pair" in r:
            name = ONE_LAUNCH if len(r["kernels"]) == 1 else TWO_LAUNCHES
            found[MOVED[name], r["vocabulary"], TEMPERATURE] = r["bytes_per_pair"]
    return found


def of_model(modelled: dict[str, Any], one_launch: dict[str, Any], chip: str) -> dict[Key, float]:
    found: dict[Key, float] = {}
    for r in one_launch["results"]:
        if (r["chip"], r["rows"]) == (chip, GPU.rows):
            at = r["vocab_size"], r["temperature"]
            found[(KERNEL, *at)] = found[(_step(ONE_LAUNCH), *at)] = r["times_the_floor"]
            found[(MOVED[ONE_LAUNCH], *at)] = r["bytes_a_pair"]
    for r in modelled["results"]:
        if r["chip"] == chip and r["peer"] != OURS and "times_the_floor" in r:
            at = r["vocab_size"], 1.0 if r["computes"].endswith("T = 1") else TEMPERATURE
            found[(_step(NAMED.get(r["peer"], r["peer"])), *at)] = r["times_the_floor"]
            if r["peer"] in MOVED:
                found[(MOVED[r["peer"]], *at)] = r["bytes_a_pair"]
    return found


def _step(subject: str) -> str:
    return f"a step of {subject}, times the floor"
