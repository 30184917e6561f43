"""Facts about a kernel's machine code: its loops with tensor-core instructions, and their contents.

Text in, facts out: SASS as `nvdisasm -c` prints it, and the assembly that LLVM writes for AMD GPUs. Loops are the
natural loops of the control-flow graph: an edge to a block that dominates its source closes a loop. Blocks that wait
for a copy stand behind the function's end and jump back into a loop; the loop they spin in is a loop of its own and is
not counted with the loop around it.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

_TENSOR = re.compile(r"([HIQ]GMMA|[HIQD]MMA|UTC[A-Z]*MMA)\b")
_INSTRUCTION = re.compile(
    r"\s*/\*[0-9a-f]{4,}\*/\s+(?:@(?P<guard>!?U?P\w+)\s+)?(?P<opcode>[A-Z][\w.]*)(?P<rest>.*?)\s*;"
)
_LABEL = re.compile(r"\s*(?P<name>[.$\w]+):\s*$")
_TARGET = re.compile(r"`\((?P<label>[^)]+)\)")
_RESOURCES = re.compile(r"REG:(\d+) STACK:(\d+)")
_REGISTER = re.compile(r"\bR(\d+)")
_WAIT = re.compile(r"gsb0, 0x([0-9a-f]+)")
_JUMPS = {"BRA", "BRX", "JMP", "CALL", "WARPSYNC"}
_COPIES = {"LDGSTS", "UTMALDG", "UBLKCP"}
_MEMORY = {"LDG", "STG", "LDS", "STS", "LDSM", "STSM", "LDC", "LDCU", "ULDC", "LDGSTS", "LDL", "STL", "LD", "ST", "RED"}
_CONTROL = {
    "BRA", "BRX", "JMP", "CALL", "RET", "EXIT", "BSSY", "BSYNC", "WARPSYNC", "WARPGROUP", "BAR", "DEPBAR", "LDGDEPBAR",
    "NOP", "ELECT", "FENCE", "MEMBAR", "YIELD", "NANOSLEEP", "ERRBAR", "CCTL",
}  # fmt: skip
_MOVES = {"MOV", "PRMT", "SEL", "IMAD"}
"""Instructions that move loaded bits between registers; of IMAD only its MOV form."""


@dataclass(frozen=True, slots=True)
class Loop:
    """An innermost loop with tensor-core instructions.

    `products`: the tensor-core instructions, by name. `copies`: asynchronous copies from global to shared memory.
    `copied`: bytes that each thread copies from global to shared memory through registers; `gathered`: the part loaded
    32 bits at a time, which no tile of 16-bit numbers is. `waits`: waits for products in flight. `exponentials`, and
    `overlapped`: exponentials computed while products are in flight. `mix`: instructions by unit: "fma" (floating
    point, and integer products), "mufu" (exponentials and such), "alu" (integers, compares, conversions), "memory",
    "uniform" (one for all threads), "products", "control".
    """

    instructions: int = 0
    products: Mapping[str, int] = field(default_factory=dict)
    copies: int = 0
    copied: int = 0
    gathered: int = 0
    waits: int = 0
    barriers: int = 0
    local_loads: int = 0
    local_stores: int = 0
    exponentials: int = 0
    overlapped: int = 0
    mix: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class MachineCode:
    """The machine code of a kernel. `stack`: bytes per thread; `spilled`: registers; `products` as in `Loop`."""

    registers: int = 0
    stack: int = 0
    spilled: int = 0
    products: Mapping[str, int] = field(default_factory=dict)
    loops: tuple[Loop, ...] = ()


@dataclass(frozen=True, slots=True)
class Instruction:
    """One line of SASS: its guard (empty: none), its opcode with modifiers, its operands."""

    guard: str
    opcode: str
    operands: str

    @property
    def name(self) -> str:
        """The opcode without modifiers."""
        return self.opcode.partition(".")[0]

    @property
    def target(self) -> str:
        """The label of a jump; empty for other instructions."""
        match = _TARGET.search(self.operands) if self.name in _JUMPS else None
        return match["label"] if match else ""

    @property
    def goes_on(self) -> bool:
        """Whether control may continue with the next instruction."""
        if self.guard or self.name not in {"BRA", "BRX", "JMP", "EXIT", "RET"}:
            return True
        return self.name == "BRA" and ("DIV" in self.opcode or not self.operands.strip().startswith("`"))


def read_nvidia(sass: str, resources: str) -> MachineCode:
    """Read one kernel's facts from `nvdisasm -c` and `cuobjdump -res-usage`. Raises ValueError without a kernel."""
    resource_counts = _RESOURCES.search(resources)
    instructions, labels = _parse(sass)
    if resource_counts is None or not instructions:
        raise ValueError("no kernel in this machine code")
    bodies = [_judge([instructions[i] for i in body]) for body in tensor_loops(instructions, labels)]
    return MachineCode(int(resource_counts[1]), int(resource_counts[2]), 0, _products(instructions), tuple(bodies))


def read_amd(assembly: str) -> MachineCode:
    """Read the facts of one kernel from its assembly text and the counts that LLVM appends."""

    def number(key: str) -> int:
        match = re.search(rf"^\s*\.{key}:\s*(\d+)", assembly, re.MULTILINE)
        if match is None:
            raise ValueError(f"no {key} in this assembly")
        return int(match[1])

    products = len(re.findall(r"^\s*v_mfma_", assembly, re.MULTILINE))
    return MachineCode(
        registers=number("vgpr_count"),
        stack=number("private_segment_fixed_size"),
        spilled=number("vgpr_spill_count"),
        products={"MFMA": products} if products else {},
    )


def _parse(sass: str) -> tuple[list[Instruction], dict[str, int]]:
    """Return the instructions in order, and the instruction index of every label."""
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    for line in sass.splitlines():
        if match := _INSTRUCTION.match(line):
            instructions.append(Instruction(match["guard"] or "", match["opcode"], match["rest"]))
        elif match := _LABEL.match(line):
            labels[match["name"]] = len(instructions)
    return instructions, labels


def tensor_loops(instructions: Sequence[Instruction], labels: Mapping[str, int]) -> list[list[int]]:
    """Return the innermost loops with tensor-core instructions, as instruction indices without inner loops."""
    starts = _block_starts(instructions, labels)
    ends = [*starts[1:], len(instructions)]
    loops = _natural_loops(_edges(instructions, labels, starts))
    tensor = {n for n, a in enumerate(starts) if any(_TENSOR.match(x.opcode) for x in instructions[a : ends[n]])}
    bodies = []
    for body in loops:
        inside = [other for other in loops if other < body]
        if body & tensor and not any(other & tensor for other in inside):
            own_blocks = sorted(body.difference(*inside))
            bodies.append([i for n in own_blocks for i in range(starts[n], ends[n])])
    return sorted(bodies)


def _block_starts(instructions: Sequence[Instruction], labels: Mapping[str, int]) -> list[int]:
    after = {i + 1 for i, x in enumerate(instructions) if x.target or not x.goes_on or x.name in {"EXIT", "RET"}}
    return sorted(i for i in {0, *labels.values(), *after} if i < len(instructions))


def _edges(
    instructions: Sequence[Instruction], labels: Mapping[str, int], starts: Sequence[int]
) -> list[tuple[int, int]]:
    """Return the control-flow edges between blocks."""
    block = {start: n for n, start in enumerate(starts)}
    edges = []
    for n in range(len(starts)):
        end = starts[n + 1] if n + 1 < len(starts) else len(instructions)
        last = instructions[end - 1]
        if last.goes_on and end in block:
            edges.append((n, block[end]))
        if last.target and labels.get(last.target) in block:
            edges.append((n, block[labels[last.target]]))
    return edges


def _natural_loops(edges: Iterable[tuple[int, int]]) -> list[frozenset[int]]:
    """Return the natural loops of a graph entered at 0; loops with one header are merged."""
    import networkx as nx  # slow to import

    graph = nx.DiGraph(edges)
    graph.add_node(0)
    graph = graph.subgraph(nx.descendants(graph, 0) | {0})
    parents = nx.immediate_dominators(graph, 0)
    bodies: dict[int, set[int]] = {}
    for tail, header in graph.edges:
        if _dominates(parents, header, tail):
            inside = nx.ancestors(graph.subgraph(set(graph) - {header}), tail) if tail != header else set()
            bodies.setdefault(header, set()).update({header, tail}, inside)
    return [frozenset(body) for body in bodies.values()]


def _dominates(parents: Mapping[int, int | None], header: int, node: int) -> bool:
    at: int | None = node
    while at is not None and at != header:
        above = parents.get(at)
        at = None if above == at else above
    return at == header


def _judge(body: Sequence[Instruction]) -> Loop:
    names = Counter(x.name for x in body)
    exponentials = sum(x.opcode.startswith("MUFU.EX2") for x in body)
    copied = _copied(body)
    return Loop(
        instructions=len(body),
        products=_products(body),
        copies=sum(names[name] for name in _COPIES),
        copied=copied[False],
        gathered=copied[True],
        waits=sum(x.opcode.startswith("WARPGROUP.DEPBAR") for x in body),
        barriers=names["BAR"],
        local_loads=names["LDL"],
        local_stores=names["STL"],
        exponentials=exponentials,
        overlapped=_overlapped(body),
        mix=dict(sorted(Counter(map(unit_of, body)).items())),
    )


def unit_of(x: Instruction) -> str:
    """Return the unit that executes an instruction."""
    name = x.name
    if _TENSOR.match(x.opcode):
        return "products"
    if name.startswith(("FFMA", "FMUL", "FADD", "HFMA", "HMUL", "HADD", "IMAD", "FSWZADD")):
        return "fma"
    if name == "MUFU":
        return "mufu"
    if name in _MEMORY or name.startswith(("UTMA", "UBLK", "LDT", "STT", "UTC")):
        return "memory"
    if name in _CONTROL or name.startswith(("SYNCS", "UCGABAR")):
        return "control"
    return "uniform" if name.startswith("U") or name in {"R2UR", "S2UR"} else "alu"


def _products(instructions: Iterable[Instruction]) -> dict[str, int]:
    return dict(Counter(match[1] for x in instructions if (match := _TENSOR.match(x.opcode))))


def _overlapped(body: Sequence[Instruction]) -> int:
    """Count exponentials between a product and its wait. A wait for all but n groups leaves n groups in flight."""
    groups, is_open, count = 0, False, 0
    for _turn in (0, 1):  # in the first turn nothing is in flight at the start of the loop
        count = 0
        for x in body:
            if x.name.endswith("GMMA"):
                is_open = "gsb0" not in x.operands
                groups += not is_open
            elif x.opcode.startswith("WARPGROUP.DEPBAR"):
                left = _WAIT.search(x.operands)
                groups, is_open = min(groups, int(left[1], 16) if left else 0), False
            elif x.opcode.startswith("MUFU.EX2"):
                count += bool(groups or is_open)
    return count


def _copied(body: Sequence[Instruction]) -> dict[bool, int]:
    """Count the bytes that a thread loads and stores to shared memory unchanged, or moved within registers.

    True: loaded 32 bits at a time; False: otherwise.
    """
    loaded: dict[int, bool] = {}
    byte_counts: dict[bool, int] = {}
    for _turn in (0, 1):  # values loaded in one turn may be stored in the next
        byte_counts = {False: 0, True: 0}
        for x in body:
            registers = [int(n) for n in _REGISTER.findall(x.operands)]
            if x.name == "STS":
                if registers and registers[-1] in loaded:
                    byte_counts[loaded[registers[-1]]] += _bytes(x)
            elif registers and x.name not in {"ST", "STG", "BAR", "RED"}:
                _follow(x, registers, loaded)
    return byte_counts


def _follow(x: Instruction, registers: Sequence[int], loaded: dict[int, bool]) -> None:
    """Update the registers that hold loaded values after an instruction."""
    written = registers[0]
    if x.name == "LDG":
        size = _bytes(x)
        loaded.update(dict.fromkeys(range(written, written + max(size // 4, 1)), size == 4))
        return
    hands_on = x.name in _MOVES and (x.name != "IMAD" or "MOV" in x.opcode)
    sources = [register for register in registers[1:] if register in loaded]
    if hands_on and sources:
        loaded[written] = loaded[sources[0]]
    else:
        loaded.pop(written, None)


def _bytes(x: Instruction) -> int:
    modifiers = x.opcode.split(".")
    for name, size in (("128", 16), ("64", 8), ("U16", 2), ("S16", 2), ("U8", 1), ("S8", 1)):
        if name in modifiers:
            return size
    return 4
