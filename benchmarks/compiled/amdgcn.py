"""Reads AMD machine code (CDNA) from the assembly text that Triton keeps of a kernel."""

import re
from collections.abc import Sequence

from .profile import Instruction, Loop, Resources, main_loop_body

LABEL = re.compile(r"^(\.LBB\w+):")
BRANCH = re.compile(r"^s_(?:c?branch)\S* (?P<target>\.LBB\w+)")
MEMORY = re.compile(r"^(?:global|buffer|flat)_(?P<way>load|store)_(?P<type>\w+)")
BYTES = {"dwordx4": 16, "dwordx3": 12, "dwordx2": 8, "dword": 4, "ushort": 2, "sshort": 2, "short": 2, "ubyte": 1}
WAIT = re.compile(r"vmcnt\((\d+)\)")
# s_addk_i32 s37, 0x800 or s_add_i32 s37, s37, 0x800
STEP = re.compile(r"^s_addk?_[iu]32 (?P<register>s\d+), (?:(?P=register), )?(?P<step>0x[0-9a-f]+|\d+)$")

KIND_OF_OPCODE = [  # the first pattern that matches
    ("shuffle", re.compile(r"^(ds_b?permute|ds_swizzle|v_readlane|v_writelane|v_permlane)|_dpp\b|\b(row_|quad_perm)")),
    ("barrier", re.compile(r"^s_barrier")),
    ("shared", re.compile(r"^ds_")),
    ("local", re.compile(r"^scratch_")),
    ("mufu", re.compile(r"^v_(exp|log|rcp|rsq|sqrt|sin|cos)_f")),
    ("convert", re.compile(r"^(v_cvt|v_perm_b32|v_\w+_sdwa|v_lsh[lr]rev_b32\S* \S+ 16,|v_and_b32\S* \S+ 0xffff0000)")),
    ("fma", re.compile(r"^v_(pk_)?(add|sub|subrev|mul|fma|fmac|mac|mad)_(mix_)?f(16|32)")),
    ("control", re.compile(r"^s_(c?branch|waitcnt|nop|endpgm|sleep)")),
]

SIMDS = 4  # of a compute unit


def instruction(text: str) -> Instruction:
    if memory := MEMORY.match(text):
        return Instruction(text, memory["way"], _width(memory["type"]))
    return Instruction(text, next((kind for kind, pattern in KIND_OF_OPCODE if pattern.search(text)), "alu"))


def _width(operand_type: str) -> int:
    return BYTES[operand_type.split("_")[0]]  # short_d16_hi fills the upper half of a register


def main_loop(assembly: str) -> Loop:
    body = main_loop_body(*code_and_loops(assembly))
    return Loop(body, _columns(body), _bytes_in_flight(body))


def code_and_loops(assembly: str) -> tuple[list[Instruction], list[tuple[int, int]]]:
    """All instructions, and of every loop the first and the last index."""
    code: list[Instruction] = []
    label_at: dict[str, int] = {}
    branches = []
    for line in assembly.splitlines():
        if label := LABEL.match(line):
            label_at[label[1]] = len(code)
        text = " ".join(line.split(";")[0].split())
        if not line.startswith(("\t", " ")) or not text or text.startswith("."):
            continue
        branch = BRANCH.match(text)
        if branch and branch["target"] in label_at:
            branches.append((label_at[branch["target"]], len(code)))
        code.append(instruction(text))
    return code, branches


def _columns(body: Sequence[Instruction]) -> int:
    """The step of the register that is compared for the loop's end, whatever the unrolling."""
    compared = {r for line in body if line.text.startswith("s_cmp") for r in re.findall(r"\bs\d+\b", line.text)}
    steps = [match for line in body if (match := STEP.match(line.text))]
    counters = [int(match["step"], 0) for match in steps if match["register"] in compared]
    if len(counters) != 1:
        raise ValueError(f"expected one loop counter, found {len(counters)} among {[m.group() for m in steps]}")
    return counters[0]


def _bytes_in_flight(body: Sequence[Instruction]) -> int:
    """Follows two iterations: `s_waitcnt vmcnt(n)` leaves the n youngest loads and stores outstanding."""
    outstanding: list[int] = []
    most = 0
    for line in [*body, *body]:
        if line.kind in ("load", "store"):
            outstanding.append(line.bytes if line.kind == "load" else 0)
            most = max(most, sum(outstanding))
        elif wait := WAIT.search(line.text):
            outstanding = outstanding[max(0, len(outstanding) - int(wait[1])) :]
    return most


def resources(assembly: str, shared: int, num_warps: int) -> Resources:
    def figure(name: str) -> int:
        match = re.search(rf"{re.escape(name)}:\s+(\d+)", assembly)
        if match is None:
            raise ValueError(f"the assembly does not say {name}")
        return int(match[1])

    warps = SIMDS * figure("; Occupancy")
    spill = figure(".vgpr_spill_count") + figure(".sgpr_spill_count") + figure("; ScratchSize")
    return Resources(figure("; TotalNumVgprs"), spill, shared, warps // num_warps * num_warps)
