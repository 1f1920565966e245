"""Compiled code as text: its instructions, its loops, and how wide it touches global memory.

A loop is found as compilers define it: a branch back to a block that every path to the branch has passed. Backward branches
alone would not do, because code that is rarely needed is placed behind the rest and jumps back.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

__all__ = ["Access", "Code", "Instruction", "innermost_loops", "natural_loops", "read_amd", "read_nvidia"]

Place = tuple[str, int]


class Access(NamedTuple):
    """What one thread moves between registers (or shared memory) and global memory in one instruction."""

    is_load: bool
    bits: int


class Instruction(NamedTuple):
    """One instruction.

    Attributes:
        name: with its modifiers, ``LDG.E.128``.
        place: source file and line that it comes from.
        branches_to: the label that it may jump to.
        falls_through: whether the next instruction can follow.
        access: how it touches global memory, if it does.
    """

    name: str
    place: Place | None
    branches_to: str | None = None
    falls_through: bool = True
    access: Access | None = None


class Code(NamedTuple):
    """The instructions of a kernel in order, and the index of the instruction behind every label."""

    instructions: list[Instruction]
    labels: Mapping[str, int]


_NVIDIA_PLACE = re.compile(r'//## File "([^"]+)", line (\d+)')
_NVIDIA_INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]+\*/\s+(@!?\w+\s+)?([A-Z][\w.]*)\s*([^;]*);")
_NVIDIA_BRANCH_TARGET = re.compile(r"`\(([\w.$]+)\)")
_NVIDIA_ACCESSES = {"LDG": True, "LD": True, "LDGSTS": True, "STG": False, "ST": False}
_LABEL = re.compile(r"^([\w.$]+):")

_AMD_FILE = re.compile(r'^\s*\.file\s+(\d+)\s+(?:"([^"]*)"\s+)?"([^"]+)"')
_AMD_PLACE = re.compile(r"^\s*\.loc\s+(\d+)\s+(\d+)")
_AMD_INSTRUCTION = re.compile(r"^\s+([a-z]\w*)\s*([^;]*)")
_AMD_ACCESS = re.compile(r"(?:global|buffer|flat)_(load|store)_(?:lds_)?([a-z]+\d*(?:x\d)?)")
_AMD_BITS = {
    "ubyte": 8, "sbyte": 8, "byte": 8, "ushort": 16, "sshort": 16, "short": 16, "dword": 32, "dwordx2": 64, "dwordx3": 96,
    "dwordx4": 128,
}  # fmt: skip


def _nvidia_access(name: str) -> Access | None:
    base, *modifiers = name.split(".")
    # Triton asks for no load through the read-only path: those are tables of constants of the math library.
    if base not in _NVIDIA_ACCESSES or "CONSTANT" in modifiers:
        return None
    bits = 32
    for modifier in modifiers:
        if modifier in ("64", "128", "256"):
            bits = int(modifier)
        elif modifier in ("U8", "S8", "U16", "S16"):
            bits = int(modifier[1:])
    return Access(_NVIDIA_ACCESSES[base], bits)


def read_nvidia(text: str) -> Code:
    """Read the output of ``nvdisasm -c -g``."""
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    place: Place | None = None
    for line in text.splitlines():
        if match := _NVIDIA_PLACE.search(line):
            place = match[1], int(match[2])
        elif match := _LABEL.match(line):
            labels[match[1]] = len(instructions)
        elif match := _NVIDIA_INSTRUCTION.match(line):
            predicate, name, operands = match.groups()
            base = name.split(".")[0]
            target = _NVIDIA_BRANCH_TARGET.search(operands) if base in ("BRA", "JMP") else None
            # A branch has its condition in front of it or among its operands.
            always = predicate is None and not (target and operands[: target.start()].strip())
            leaves = base in ("BRA", "JMP", "EXIT", "RET", "BRX")
            instructions.append(
                Instruction(name, place, target and target[1], not (leaves and always), _nvidia_access(name))
            )
    return Code(instructions, labels)


def _amd_access(name: str) -> Access | None:
    match = _AMD_ACCESS.match(name)
    if match is None or match[2] not in _AMD_BITS:
        return None
    return Access(match[1] == "load", _AMD_BITS[match[2]])


def read_amd(text: str) -> Code:
    """Read assembly for an AMD GPU as LLVM writes it."""
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    files: dict[str, str] = {}
    place: Place | None = None
    for line in text.splitlines():
        if line.startswith(".Lfunc_end"):
            break
        if match := _AMD_FILE.match(line):
            files[match[1]] = f"{match[2]}/{match[3]}" if match[2] else match[3]
        elif match := _AMD_PLACE.match(line):
            place = files.get(match[1], ""), int(match[2])
        elif match := _LABEL.match(line):
            labels[match[1]] = len(instructions)
        elif match := _AMD_INSTRUCTION.match(line):
            name, operands = match[1], match[2].strip()
            target = operands if name == "s_branch" or name.startswith("s_cbranch") else None
            leaves = name in ("s_branch", "s_endpgm", "s_setpc_b64")
            instructions.append(Instruction(name, place, target, not leaves, _amd_access(name)))
    return Code(instructions, labels)


class _Block(NamedTuple):
    first: int
    end: int
    successors: tuple[int, ...]


def _blocks(code: Code) -> list[_Block]:
    """Basic blocks in order; successors are numbers of blocks."""
    count = len(code.instructions)
    leaders = {0}
    for index, instruction in enumerate(code.instructions):
        if instruction.branches_to is not None:
            leaders |= {code.labels.get(instruction.branches_to, count), index + 1}
        elif not instruction.falls_through:
            leaders.add(index + 1)
    starts = sorted(start for start in leaders if start < count)
    number = {start: block for block, start in enumerate(starts)}
    blocks = []
    for start, end in zip(starts, [*starts[1:], count], strict=True):
        last = code.instructions[end - 1]
        targets = [] if last.branches_to is None else [code.labels.get(last.branches_to, count)]
        if last.falls_through:
            targets.append(end)
        blocks.append(_Block(start, end, tuple(number[target] for target in targets if target < count)))
    return blocks


def _reverse_postorder(blocks: Sequence[_Block]) -> list[int]:
    order: list[int] = []
    seen = {0}
    stack = [(0, iter(blocks[0].successors))]
    while stack:
        block, rest = stack[-1]
        for following in rest:
            if following not in seen:
                seen.add(following)
                stack.append((following, iter(blocks[following].successors)))
                break
        else:
            order.append(block)
            stack.pop()
    return order[::-1]


def natural_loops(code: Code) -> list[frozenset[int]]:
    """The loops of the code that can be reached, each as the indices of its instructions.

    Example:
        >>> code = read_nvidia('''
        ...         /*0000*/  MOV R0, RZ ;
        ... .L_x_0:
        ...         /*0010*/  LDG.E.128 R4, [R2.64] ;
        ...         /*0020*/  @P0 BRA `(.L_x_0) ;
        ...         /*0030*/  EXIT ;''')
        >>> [sorted(loop) for loop in natural_loops(code)]
        [[1, 2]]
    """
    if not code.instructions:
        return []
    blocks = _blocks(code)
    order = _reverse_postorder(blocks)
    predecessors: dict[int, list[int]] = {block: [] for block in order}
    for block in order:
        for following in blocks[block].successors:
            predecessors[following].append(block)
    dominators: dict[int, set[int]] = {block: set(order) for block in order}
    dominators[0] = {0}
    changed = True
    while changed:
        changed = False
        for block in order[1:]:
            found = set.intersection(*(dominators[before] for before in predecessors[block])) | {block}
            changed |= found != dominators[block]
            dominators[block] = found
    bodies: dict[int, set[int]] = {}
    for block in order:
        for header in blocks[block].successors:
            if header in dominators[block]:
                body = bodies.setdefault(header, {header})
                open_ends = [block]
                while open_ends:
                    member = open_ends.pop()
                    if member not in body:
                        body.add(member)
                        open_ends += predecessors[member]
    return [
        frozenset(index for member in body for index in range(blocks[member].first, blocks[member].end))
        for body in bodies.values()
    ]


def innermost_loops(code: Code, matters: Callable[[Instruction], bool]) -> list[list[Instruction]]:
    """Loops with an instruction that matters and without a smaller loop that has one.

    Loops in which a thread waits for a barrier, or a math library shifts bits, hold nothing that matters.
    """
    loops = [
        loop for loop in natural_loops(code) if any(matters(code.instructions[index]) for index in loop)
    ]  # fmt: skip
    innermost = [loop for loop in loops if not any(other < loop for other in loops)]
    return [[code.instructions[index] for index in sorted(loop)] for loop in innermost]
