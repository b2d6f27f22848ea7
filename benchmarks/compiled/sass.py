"""Reads NVIDIA machine code (SASS) as `cuobjdump -sass -res-usage` prints it."""

import re
from collections.abc import Sequence

from fused_kd.devices import Device

from .profile import Instruction, Loop, Resources, main_loop_body

LINE = re.compile(r"/\*(?P<address>[0-9a-f]{4,})\*/\s+(?P<text>[^;]+?)\s*;")
USAGE = re.compile(r"REG:(?P<registers>\d+) STACK:(?P<stack>\d+)")
BRANCH = re.compile(r"\bBRA\b.*?\b0x(?P<target>[0-9a-f]+)$")
PREDICATE = re.compile(r"^@!?U?P\w+\s+")
PREDICATE_NAME = re.compile(r"\bU?P\d\b")
SETS_PREDICATE = re.compile(r"^(?P<opcode>U?(?:ISETP|PLOP3)\S*)\s+(?P<predicate>U?P\d)\b")
WIDTH = re.compile(r"\.(?:(?P<bits>256|128|64)|[US](?P<narrow>16|8))\b")
REGISTER = re.compile(r"\bR(\d+)\b")
# IADD3 R24, R24, 0x400, RZ; from Hopper on also VIADD and UIADD3, from Blackwell on with predicates in between.
STEP = re.compile(r"^[VU]?IADD\S*\s+(?P<register>U?R\d+), (?:U?PT, )*(?P=register), (?P<step>0x[0-9a-f]+)\b")

FMA = {"FADD", "FMUL", "FFMA", "FADD2", "FMUL2", "FFMA2", "FHADD", "FHFMA", "HADD2", "HMUL2", "HFMA2"}
CONVERT = {"F2F", "F2FP", "F2I", "I2F", "I2FP", "PRMT"}
# bfloat16 to float32 is a shift or a mask; float16 to float32 an addition to -0.
UNPACK = re.compile(r"^(SHF\.L\.U32 .*, 0x10,|IMAD\.(U32|SHL).*0x10000\b|LOP3.*0xffff0000\b|HADD2\.F32 )")
KIND_OF_OPCODE = {
    "MUFU": "mufu",
    **dict.fromkeys(FMA, "fma"),
    **dict.fromkeys(CONVERT, "convert"),
    **dict.fromkeys(("LDG", "LD"), "load"),
    **dict.fromkeys(("STG", "ST"), "store"),
    **dict.fromkeys(("LDS", "STS", "LDSM", "ATOMS"), "shared"),
    **dict.fromkeys(("LDL", "STL"), "local"),
    **dict.fromkeys(("SHFL", "REDUX", "CREDUX"), "shuffle"),
    **dict.fromkeys(("BAR", "SYNCS", "MEMBAR", "WARPSYNC", "UCGABAR_ARV", "UCGABAR_WAIT"), "barrier"),
    **dict.fromkeys(("BRA", "BRX", "JMP", "CALL", "RET", "EXIT", "BSSY", "BSYNC", "BREAK", "NOP", "DEPBAR"), "control"),
}

# A multiprocessor has four partitions, which give out registers in steps of 8 per thread.
PARTITIONS, REGISTER_STEP, MAX_PROGRAMS = 4, 8, 32
RESERVED_SHARED = 1024  # bytes of shared memory that a program takes besides its own


def instruction(text: str) -> Instruction:
    bare = PREDICATE.sub("", text)
    opcode = re.split(r"[.\s]", bare, maxsplit=1)[0]
    kind = "convert" if UNPACK.match(bare) else KIND_OF_OPCODE.get(opcode, "alu")
    return Instruction(text, kind, _width(bare) if kind in ("load", "store") else 0)


def _width(bare: str) -> int:
    match = WIDTH.search(bare.split()[0])
    return 4 if match is None else int(match["bits"] or match["narrow"]) // 8


def main_loop(sass: str) -> Loop:
    body = main_loop_body(*code_and_loops(sass))
    return Loop(body, _columns(body), _bytes_in_flight(body))


def code_and_loops(sass: str) -> tuple[list[Instruction], list[tuple[int, int]]]:
    """All instructions, and of every loop the first and the last index."""
    addresses, code = [], []
    for match in LINE.finditer(sass):
        addresses.append(int(match["address"], 16))
        code.append(instruction(match["text"]))
    return code, _backward_branches(addresses, code)


def _backward_branches(addresses: Sequence[int], code: Sequence[Instruction]) -> list[tuple[int, int]]:
    index = {address: i for i, address in enumerate(addresses)}
    branches = []
    for last, line in enumerate(code):
        match = BRANCH.search(line.text)
        if match and int(match["target"], 16) <= addresses[last]:
            branches.append((index[int(match["target"], 16)], last))
    return branches


def _columns(body: Sequence[Instruction]) -> int:
    """The step of the register that the branches of the loop depend on, whatever the unrolling."""
    compared = _compared_registers(body)
    steps = [match for line in body if (match := STEP.match(PREDICATE.sub("", line.text)))]
    counters = [int(match["step"], 16) for match in steps if match["register"] in compared]
    if len(counters) != 1:
        raise ValueError(f"expected one loop counter among {sorted(compared)}, found {len(counters)}")
    return counters[0]


def _compared_registers(body: Sequence[Instruction]) -> set[str]:
    deciding = {name for line in body if line.kind == "control" for name in PREDICATE_NAME.findall(line.text)}
    for line in reversed(body):
        match = SETS_PREDICATE.match(line.text)
        if match is None or match["predicate"] not in deciding:
            continue
        if "ISETP" in match["opcode"]:
            return set(re.findall(r"\bU?R\d+\b", line.text))
        # A copy, as from a uniform predicate; what the copy's name stood for before it does not matter.
        deciding = (deciding | set(PREDICATE_NAME.findall(line.text))) - {match["predicate"]}
    return set()


def _bytes_in_flight(body: Sequence[Instruction]) -> int:
    """Follows two iterations: a load is outstanding until an instruction names one of the registers it fills."""
    outstanding: dict[range, int] = {}
    most = 0
    for line in [*body, *body]:
        named = {int(number) for number in REGISTER.findall(line.text)}
        outstanding = {filled: size for filled, size in outstanding.items() if not named & set(filled)}
        if line.kind == "load":
            first = int(REGISTER.findall(line.text)[0])
            outstanding[range(first, first + max(1, line.bytes // 4))] = line.bytes
            most = max(most, sum(outstanding.values()))
    return most


def resources(usage: str, shared: int, device: Device, num_warps: int) -> Resources:
    match = USAGE.search(usage)
    if match is None:
        raise ValueError("cuobjdump printed no resource usage")
    registers, stack = int(match["registers"]), int(match["stack"])
    return Resources(registers, stack, shared, resident_warps(registers, shared, device, num_warps))


def resident_warps(registers: int, shared: int, device: Device, num_warps: int) -> int:
    of_warp = -(-registers // REGISTER_STEP) * REGISTER_STEP * device.warp_size
    warps_by_threads = device.threads // device.warp_size // PARTITIONS
    warps = PARTITIONS * min(warps_by_threads, device.registers // PARTITIONS // of_warp)
    programs_by_shared = device.shared_bytes // (shared + RESERVED_SHARED)
    return min(MAX_PROGRAMS, warps // num_warps, programs_by_shared) * num_warps
