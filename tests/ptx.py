"""Checks PTX as text: what neither nvcc nor ptxas refuses and no kernel of ours should have.

`faults` reads a module as nvcc writes it, and knows nothing of its source:

- traps, which stand where a GPU lacks an instruction: see FUSEDRNN_SM80 in csrc/cuda/primitives.h
- instructions that the module's target does not have
- local memory, calls, generic addresses in place of a state space, and atomics, by which sums would
  depend on the order of threads
- registers that are read and never written
- vectors whose offset is no multiple of their size
- barriers and products of a warp that only some of its threads may reach: after a branch, or in a
  loop, whose condition differs among threads
- mbarriers that are not initialised, fenced and armed before they are used, and cluster barriers of
  which an arrival has no wait
"""

from __future__ import annotations

import functools
import re
from collections import defaultdict
from collections.abc import Iterator
from typing import NamedTuple

REGISTER = re.compile(r"%(?:p|rs|rd|r|fd|f|h|hh|b)\d+\b|(?<![\w$%])p(?=[,;\s]|$)")
KERNEL = re.compile(
    r"^(?:\.visible |\.weak )?\.entry (\w+)\((.*?)\)\n((?:\.\w+ [^\n]*\n)*)\{\n(.*?)^\}",
    re.M | re.S,
)
LABEL = re.compile(r"(\$\w+):")
# How far a value may differ: not in a block; among warps, not in one; among lanes.
SAME, BY_WARP, BY_LANE = range(3)
# What every thread of a block, or of a warp, has to execute together.
OF_BLOCK = ("bar.sync", "bar.red", "barrier.sync.aligned", "barrier.cluster")
OF_WARP = ("mma.sync", "wmma", "ldmatrix", "stmatrix", "elect.sync", "setmaxnreg", "wgmma")
# Which GPUs have what: the rest is assembled for its target anyway.
NEEDS = {
    80: r"mma\.sync\.aligned\.m16n8k16|\.tf32\b|cp\.async\b|redux\.sync|cvt\.rn\.bf16",
    90: r"st\.async|mapa\b|barrier\.cluster|\.shared::cluster|mbarrier\.try_wait|%cluster_|"
    r"fence\.mbarrier_init|expect_tx|cp\.async\.bulk|elect\.sync|setmaxnreg|wgmma",
}
WRITES_NOTHING = (
    "st.", "bar.sync", "barrier.", "bra", "ret", "exit", "trap", "prefetch", "fence", "membar",
    "mbarrier.init", "mbarrier.inval", "mbarrier.arrive", "red.", "call", "bar.warp", "nanosleep",
)  # fmt: skip


class Instruction(NamedTuple):
    guard: str | None  # the register of @%p or @!%p
    opcode: str
    operands: str
    writes: tuple[str, ...]
    reads: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.opcode} {self.operands}"


def _instruction(text: str) -> Instruction | None:
    found = re.match(r"(?:@!?(%p\d+|p)\s+)?([a-z][\w.:]*)\s*(.*)$", text, re.S)
    if not found:
        return None
    guard, opcode, operands = found[1], found[2], " ".join(found[3].split())
    first = re.match(r"\{[^}]*\}|[^,]*", operands)
    head = "" if opcode.startswith(WRITES_NOTHING) or not first else first[0]
    if "[" in head:
        head = ""
    writes, reads = REGISTER.findall(head), REGISTER.findall(operands[len(head) :])
    return Instruction(
        guard, opcode, operands, tuple(writes), (*reads, *([guard] if guard else []))
    )


class Block:
    """Instructions without a branch or a label between them."""

    def __init__(self) -> None:
        self.code: list[Instruction] = []
        self.next: list[int] = []


def _blocks(body: str) -> list[Block]:
    body = re.sub(r"//[^\n]*", "", body)
    blocks, labels, jumps = [Block()], {}, []
    for statement in body.split(";"):
        statement = statement.lstrip(" \t\n{}")
        while label := LABEL.match(statement):
            blocks.append(Block())
            blocks[-2].next.append(len(blocks) - 1)
            labels[label[1]] = len(blocks) - 1
            statement = statement[label.end() :].lstrip(" \t\n{}")
        instruction = None if statement.startswith(".") else _instruction(statement)
        if instruction is None:
            continue
        here = len(blocks) - 1
        blocks[here].code.append(instruction)
        kind = instruction.opcode.split(".")[0]
        if kind in ("bra", "ret", "exit", "trap"):
            blocks.append(Block())
            if kind == "bra":
                jumps.append((here, instruction.operands.strip()))
            if instruction.guard:
                blocks[here].next.append(here + 1)
    for here, label in jumps:
        blocks[here].next.append(labels[label])
    # No thread goes on behind a trap, and where it goes before does not matter.
    for block in blocks:
        ends = [bool(blocks[i].code) and blocks[i].code[-1].opcode == "trap" for i in block.next]
        if not all(ends):
            block.next = [i for i, end in zip(block.next, ends, strict=True) if not end]
    reached = {0}
    pending = [0]
    while pending:
        for there in blocks[pending.pop()].next:
            if there not in reached:
                reached.add(there)
                pending.append(there)
    for here, block in enumerate(blocks):
        if here not in reached and not any(i.opcode == "trap" for i in block.code):
            block.code, block.next = [], []
    return blocks


class Kernel:
    def __init__(self, body: str) -> None:
        self.blocks = _blocks(body)
        self.local = ".local" in body

    def instructions(self) -> Iterator[Instruction]:
        for block in self.blocks:
            yield from block.code

    def count(self, pattern: str) -> int:
        return sum(bool(re.match(pattern, i.opcode)) for i in self.instructions())


def _post_dominators(blocks: list[Block]) -> list[int]:
    """Of each block the first that all ways from it to the end pass; len(blocks): only the end."""
    end = len(blocks)
    before: list[list[int]] = [[] for _ in range(end + 1)]
    for i, block in enumerate(blocks):
        for j in block.next or [end]:
            before[j].append(i)
    order, seen, stack = [], {end}, [(end, iter(before[end]))]
    while stack:  # postorder of the reversed graph
        node, rest = stack[-1]
        for other in rest:
            if other not in seen:
                seen.add(other)
                stack.append((other, iter(before[other])))
                break
        else:
            order.append(node)
            stack.pop()
    rank = {node: i for i, node in enumerate(order)}
    found: dict[int, int] = {end: end}
    changed = True
    while changed:
        changed = False
        for node in reversed(order[:-1]):
            best = None
            for other in blocks[node].next or [end]:
                if other not in found:
                    continue
                if best is None:
                    best = other
                    continue
                while best != other:
                    while rank[best] < rank[other]:
                        best = found[best]
                    while rank[other] < rank[best]:
                        other = found[other]
            if best is not None and found.get(node) != best:
                found[node], changed = best, True
    return [found.get(i, end) for i in range(end)]


def _region(blocks: list[Block], start: int, stop: int) -> set[int]:
    """The blocks on ways from behind `start` to `stop`."""
    found: set[int] = set()
    stack = list(blocks[start].next)
    while stack:
        node = stack.pop()
        if node == stop or node in found:
            continue
        found.add(node)
        stack += blocks[node].next
    return found


def _own_level(i: Instruction) -> int:
    """How far what an instruction writes differs, whatever it reads."""
    if i.opcode.startswith("mov") and re.search(r"%tid\.[xyz]|%laneid", i.operands):
        return BY_LANE
    if i.opcode.startswith("mov") and "%warpid" in i.operands:
        return BY_WARP
    looks = r"ld\.(acquire|relaxed|volatile)|mbarrier\.(try|test)|atom|shfl|mma|match|activemask"
    if re.match(looks, i.opcode) or re.search(r"%globaltimer|%clock", i.operands):
        return BY_LANE
    return SAME


class Step(NamedTuple):
    """An instruction with what it defines, and the definitions that its operands may come from."""

    code: Instruction
    defines: tuple[int, ...]
    uses: tuple[int, ...]


def _definitions(kernel: Kernel) -> list[list[Step]]:
    """The steps of each block. A register that is written in several places has as many
    definitions, and those that reach a place are found as compilers do it."""
    blocks = kernel.blocks
    of_register: dict[str, list[int]] = defaultdict(list)
    count = 0
    numbers: list[list[tuple[int, ...]]] = []  # of what each instruction of a block writes
    for block in blocks:
        numbers.append([])
        for i in block.code:
            numbers[-1].append(tuple(range(count, count + len(i.writes))))
            for register in i.writes:
                of_register[register].append(count)
                count += 1
    # Sets of definitions are the bits of a number, of registers that have several.
    mask = {r: sum(1 << n for n in ns) for r, ns in of_register.items() if len(ns) > 1}
    made, kept = [], []
    for block, own in zip(blocks, numbers, strict=True):
        gain, lose = 0, 0
        for i, ns in zip(block.code, own, strict=True):
            for register, n in zip(i.writes, ns, strict=True):
                if register in mask:
                    gone = mask[register] if not i.guard else 0
                    gain, lose = gain & ~gone | 1 << n, lose | gone
        made.append(gain), kept.append(~lose)
    entry = [0] * len(blocks)
    pending = list(range(len(blocks)))
    while pending:
        here = pending.pop()
        leaving = entry[here] & kept[here] | made[here]
        for there in blocks[here].next:
            if leaving & ~entry[there]:
                entry[there] |= leaving
                pending.append(there)
    found = []
    for here, block in enumerate(blocks):
        reach, steps = entry[here], []
        for i, ns in zip(block.code, numbers[here], strict=True):
            uses: list[int] = []
            for register in i.reads:
                own = of_register.get(register, [])
                uses += own if register not in mask else [n for n in own if reach >> n & 1]
            for register, n in zip(i.writes, ns, strict=True):
                if register in mask:
                    reach = reach & ~(mask[register] if not i.guard else 0) | 1 << n
            steps.append(Step(i, ns, tuple(uses)))
        found.append(steps)
    return found


def _divergence(kernel: Kernel) -> Iterator[str]:
    blocks, steps = kernel.blocks, _definitions(kernel)
    flat = not any(re.search(r"%tid\.[yz]", i.operands) for i in kernel.instructions())
    every = [step for block in steps for step in block]
    writers: dict[str, int] = defaultdict(int)
    users: dict[int, list[Step]] = defaultdict(list)
    thread_index: set[int] = set()
    for step in every:
        for register in step.code.writes:
            writers[register] += 1
        for definition in step.uses:
            users[definition].append(step)
        if step.code.opcode.startswith("mov") and "%tid.x" in step.code.operands:
            thread_index.update(step.defines)
    level: dict[int, int] = defaultdict(int)
    pending = list(every)

    def raise_to(definition: int, to: int) -> None:
        if to > level[definition]:
            level[definition] = to
            pending.extend(users[definition])

    def of_result(step: Step) -> int:
        i = step.code
        if i.opcode.startswith("bar.red"):
            return SAME
        to = max([_own_level(i), *(level[n] for n in step.uses)])
        amount = re.search(r", (-?\d+)$", i.operands)
        if to == BY_LANE and flat and amount and set(step.uses) <= thread_index:
            # The index of a thread by 32 is the same in a warp.
            if re.fullmatch(r"shr\.[usb]32", i.opcode) and int(amount[1]) >= 5:
                return BY_WARP
            if i.opcode == "and.b32" and int(amount[1]) & 31 == 0:
                return BY_WARP
        return to

    stop = _post_dominators(blocks)
    regions: dict[int, set[int]] = {}
    floor: dict[int, int] = {}  # of a block's last branch: how far its condition differs
    while pending:
        while pending:
            step = pending.pop()
            for definition in step.defines:
                raise_to(definition, of_result(step))
        for here, block in enumerate(blocks):
            if len(block.next) < 2:
                continue
            guard = block.code[-1].guard
            assert guard
            # The last of the uses: see Instruction.reads.
            condition = max(level[n] for n in steps[here][-1].uses)
            if condition <= floor.get(here, SAME):
                continue
            floor[here] = condition
            region = regions.setdefault(here, _region(blocks, here, stop[here]))
            for node in region:
                for step in steps[node]:
                    for register, definition in zip(step.code.writes, step.defines, strict=True):
                        # A loop that threads leave at different times, or one of two ways.
                        if here in region or writers[register] > 1:
                            raise_to(definition, condition)
    reported: set[str] = set()
    for here, condition in floor.items():
        for node in regions[here]:
            for i in blocks[node].code:
                together = i.opcode.startswith(OF_BLOCK) or (
                    i.opcode.startswith(OF_WARP) and condition == BY_LANE
                )
                if together and str(i) not in reported:
                    reported.add(str(i))
                    yield f"{i}: not all threads may get there, after {blocks[here].code[-1]}"
    for i in kernel.instructions():
        if i.guard and i.opcode.startswith((*OF_BLOCK, *OF_WARP)):
            yield f"{i}: has a condition"


def _accesses(kernel: Kernel) -> Iterator[str]:
    for i in kernel.instructions():
        if not re.match(r"(ld|st|atom|red|prefetch)\b", i.opcode):
            continue
        if i.opcode.startswith(("atom", "red")):
            yield f"{i}: an atomic"
        if not re.search(r"\.(global|shared|param|const|local)\b", i.opcode):
            yield f"{i}: a generic address"
        wide = re.search(r"(?:\.v(\d))?\.[a-z](\d+)$", i.opcode)
        offset = re.search(r"\[[^\]]*\+(-?\d+)\]", i.operands)
        if wide and offset:
            size = int(wide[1] or 1) * int(wide[2]) // 8
            if int(offset[1]) % size:
                yield f"{i}: no multiple of {size} bytes"


def _registers(kernel: Kernel) -> Iterator[str]:
    written = {register for i in kernel.instructions() for register in i.writes}
    for i in kernel.instructions():
        for register in set(i.reads) - written:
            yield f"{i}: nothing writes {register}"


def _clusters(kernel: Kernel) -> Iterator[str]:
    count = kernel.count
    arrivals, waits = count(r"barrier\.cluster\.arrive"), count(r"barrier\.cluster\.wait")
    if arrivals != waits:
        yield f"{arrivals} arrivals at the cluster's barrier, {waits} waits"
    for i in kernel.instructions():
        if re.match(r"barrier\.cluster\.(arrive(?!\.release)|wait(?!\.acquire))", i.opcode):
            yield f"{i}: orders no memory"
        if i.opcode.startswith("mbarrier") and ".shared" not in i.opcode:
            yield f"{i}: not in shared memory"
        if i.opcode.startswith("st.async") and "complete_tx::bytes" not in i.opcode:
            yield f"{i}: nothing counts its bytes"
    stores, waits = count(r"st\.async"), count(r"mbarrier\.(try|test)_wait")
    if not stores and not waits:
        return
    for pattern, what in (
        (r"mbarrier\.init", "initialises an mbarrier"),
        (r"fence\.mbarrier_init|fence\.proxy\.async|fence\.acq_rel\.cluster", "fences it"),
        (r"barrier\.cluster\.wait", "tells the cluster of it"),
        (r"mbarrier\.arrive\.expect_tx|mbarrier\.expect_tx", "announces bytes"),
    ):
        if not count(pattern):
            yield f"stores that an mbarrier counts, but nothing {what}"
    if not stores or not waits:
        yield f"{stores} stores that an mbarrier counts, {waits} waits for it"


def _others(kernel: Kernel) -> Iterator[str]:
    if kernel.local:
        yield "local memory"
    may_trap = kernel.count(r"mbarrier\.(try|test)_wait")  # of which a wait may last too long
    for i in kernel.instructions():
        if i.opcode == "trap" and not may_trap:
            yield "trap"
        if i.opcode.startswith("call"):
            yield f"{i}: a call"
        if ".ftz" in i.opcode and i.opcode.startswith(("add", "mul", "fma", "sub", "mma")):
            yield f"{i}: takes small numbers for zero"


@functools.lru_cache(maxsize=4096)
def _of_kernel(body: str) -> tuple[str, ...]:
    """Of a kernel's text, which is the same for many targets."""
    kernel = Kernel(body)
    checks = (_others, _accesses, _registers, _clusters, _divergence)
    return tuple(fault for check in checks for fault in check(kernel))


def target(text: str) -> str:
    """For which GPUs a module is, such as sm_90a."""
    found = re.search(r"^\.target (\w+)", text, re.M)
    assert found, "no PTX"
    return found[1]


def kernels(text: str) -> list[str]:
    """The names of a module's kernels."""
    return [name for name, *_ in KERNEL.findall(text)]


def faults(text: str) -> list[str]:
    """What is wrong in a module, a line each."""
    found = KERNEL.findall(text)
    assert len(found) == len(re.findall(r"^(?:\.\w+ )?\.entry", text, re.M))
    lines = [f"{name}: {fault}" for name, *_, body in found for fault in _of_kernel(body)]
    capability = int(re.sub(r"\D", "", target(text)))
    for name, *_, body in found:
        for needed, instructions in NEEDS.items():
            newer = re.findall(instructions, body) if needed > capability else []
            lines += [f"{name}: {i} needs sm_{needed}" for i in dict.fromkeys(newer)]
    if functions := re.findall(r"^(?:\.visible |\.weak )?\.func[^\n]*", text, re.M):
        lines += [f"{function}: not inlined" for function in functions]
    return lines
