"""What XLA's dumps of a program for a GPU say: its units of work (thunks), its loops, and its machine code.

`parse` reads the thunks of a program, `loops_of` what is known about its loops, `machine_code` its PTX. None of them
needs the CUDA plugin.
"""

import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class Loop:
    """What XLA says about a loop.

    Attributes:
        trips: Number of turns; None if it is found while the loop runs, so that the host waits before every turn.
        turns: Turns to count where XLA does not know their number.
        functions: The functions in which it was traced, as file:function, the outermost first.
    """

    trips: int | None
    functions: list[str]
    turns: int = 1

    @property
    def is_over_steps(self) -> bool:
        """Whether its turns are steps of chains, or stretches of them, rather than part of a step."""
        own = [name for name in self.functions if name.startswith("pmcmc/") and not name.startswith("pmcmc/_")]
        return bool(own) and own[-1].split("/")[1] in ("recurrence", "warmup", "random")


@dataclass(frozen=True)
class Work:
    """What a sequence of thunks asks for.

    Attributes:
        launches: Kernels, copies and library calls.
        enqueues: Times that the host hands something to the card: a launch, or a graph of any number of them.
        waits: Times that the host waits for the card, to learn whether a loop goes on or which branch is taken.
    """

    launches: float = 0.0
    enqueues: float = 0.0
    waits: float = 0.0

    def __add__(self, other: "Work") -> "Work":
        return Work(self.launches + other.launches, self.enqueues + other.enqueues, self.waits + other.waits)

    def __sub__(self, other: "Work") -> "Work":
        return self + other * -1

    def __mul__(self, times: float) -> "Work":
        return Work(self.launches * times, self.enqueues * times, self.waits * times)


@dataclass
class Thunk:
    """One unit of work of the host, and those within it.

    Attributes:
        kind: XLA's name of the kind; the word of the heading for the parts of loops and conditionals.
        number: XLA's number of the thunk.
        indent: Indentation of its line.
        inner: What it holds, in order.
        loop: What is known about a loop.
        in_graph: Whether it is part of a graph that the host enqueues at once (a command buffer).
    """

    kind: str
    number: int = 0
    indent: int = -2
    inner: list["Thunk"] = field(default_factory=list)
    loop: Loop = Loop(None, [])
    in_graph: bool = False

    def part(self, kind: str) -> "Thunk":
        """Return the condition or the body of a loop."""
        return next((thunk for thunk in self.inner if thunk.kind == kind), Thunk(kind))

    def loops(self) -> Iterator["Thunk"]:
        """Yield the loops in this thunk that are in no other loop."""
        for thunk in self.inner:
            if thunk.kind == "kWhile":
                yield thunk
            else:
                yield from thunk.loops()

    def every(self) -> Iterator["Thunk"]:
        """Yield all thunks within, this one first."""
        yield self
        for thunk in self.inner:
            yield from thunk.every()

    def work(self) -> Work:
        """Return what one run of this thunk asks for."""
        if self.kind == "kWhile":
            turns = self.loop.turns if self.loop.trips is None else self.loop.trips
            return self.turn() * turns + self.check()
        if self.kind == "kConditional":
            return max((branch.work() for branch in self.inner), key=lambda work: work.launches) + self._wait()
        if self.kind in NO_WORK or self.inner:
            graph = Work(enqueues=1) if self.kind == "kCommandBuffer" and not self.in_graph else Work()
            return sum((thunk.work() for thunk in self.inner), graph)
        return Work(1, 0 if self.in_graph else 1)

    def turn(self) -> Work:
        """Return what one turn of a loop asks for."""
        return self.check() + self.part("body").work()

    def check(self) -> Work:
        """Return what it takes to find whether a loop goes on: nothing where the number of turns is known."""
        return Work() if self.loop.trips is not None else self.part("condition").work() + self._wait()

    def _wait(self) -> Work:
        """Return the wait for a decision, which a graph takes by itself."""
        return Work(waits=0 if self.in_graph else 1)


# Kinds and parts that ask for nothing themselves.
NO_WORK = ("kAsyncDone", "program", "condition", "body")
_LINE = re.compile(r"^(\s*)(\d+): (k\w+)")
_HEADING = re.compile(r"^(\s*)(condition|body|\w*branch\w*)\b[^:]*:\s*$")


def parse(text: str) -> Thunk:
    """Return the tree of the thunks that XLA has written down.

    Headings name the parts of a loop or conditional, two columns to the right of it; only "condition" stands at the
    margin, directly below its loop.
    """
    path = [Thunk("program")]
    for line in text.splitlines():
        if found := _LINE.match(line):
            indent, thunk = len(found[1]), Thunk(found[3], int(found[2]), len(found[1]))
        elif found := _HEADING.match(line):
            indent = path[-1].indent + 2 if found[2] == "condition" else len(found[1])
            thunk = Thunk(found[2], 0, indent)
        else:
            continue
        while path[-1].indent >= indent:
            path.pop()
        thunk.in_graph = path[-1].in_graph or path[-1].kind == "kCommandBuffer"
        path[-1].inner.append(thunk)
        path.append(thunk)
    return path[0]


def frames(hlo: str) -> dict[int, list[str]]:
    """Return the functions, as file:function, by the number of a stack frame of an HLO module."""
    tables: dict[str, dict[int, str]] = {name: {} for name in _TABLES}
    table: dict[int, str] = {}
    for line in hlo.splitlines():
        table = tables.get(line, table)
        key, _, text = line.partition(" ")
        if key.isdigit():
            table[int(key)] = text
    root = str(Path(__file__).parents[1]) + os.sep

    def place(number: int) -> str:
        text = tables["FileLocations"][number]
        file = tables["FileNames"][_number("file_name_id", text)].strip('"').removeprefix(root)
        return f"{file}:{tables['FunctionNames'][_number('function_name_id', text)]}".replace('"', "")

    stacks: dict[int, list[str]] = {}
    for number, text in tables["StackFrames"].items():  # parents come first; their numbers count from 1 above
        above = stacks.get(_number("parent_frame_id", text) - 1, [])
        stacks[number] = [*above, place(_number("file_location_id", text))]
    return stacks


_TABLES = ("FileNames", "FunctionNames", "FileLocations", "StackFrames")


def _number(name: str, text: str) -> int:
    """Return a number that is given as name=number; 0 if it is not given."""
    found = re.search(rf"{name}=(\d+)", text)
    return int(found[1]) if found else 0


def loops_of(hlo: str) -> dict[str, Loop]:
    """Return the loops of an HLO module by the name under which they are scheduled."""
    stacks, found = frames(hlo), {}
    for line in hlo.splitlines():
        if " while(" in line:
            trips, frame = re.search(r'known_trip_count":\{"n":"(\d+)"', line), re.search(r"stack_frame_id=(\d+)", line)
            name = re.search(r'scheduling_name="([^"]+)"', line)
            label = name[1] if name else line.split("=")[0].strip(" %")
            found[label] = Loop(int(trips[1]) if trips else None, stacks.get(int(frame[1]) if frame else 0, []))
    return found


def phases(root: Thunk) -> tuple[Work, Work | None, Work | None]:
    """Return the work of a step in the first loop over steps, of a step of repair, and of a visit in the first loop.

    Where lanes are not at the same step, what is called a step is a leapfrog of all lanes, and a visit is what is
    done when some of them have ended their steps. None stands for what a program does not have.
    """
    loops = [thunk for thunk in root.loops() if thunk.loop.is_over_steps]
    if not loops:
        return root.work(), None, None
    is_repair = lambda thunk: any("repair" in name for one in thunk.every() for name in one.loop.functions)
    repairs = [thunk for thunk in loops[1:] if is_repair(thunk)]
    step, visit = _step(loops[0])
    return step, _step(repairs[0])[0] if repairs else None, visit


def _step(outer: Thunk) -> tuple[Work, Work | None]:
    """Return the work of a step in a loop, and of a turn around the loop within whose length is not known."""
    inner = [thunk for thunk in outer.loops() if thunk.loop.is_over_steps]
    for thunk in inner:
        if thunk.loop.trips is None:
            return _step(thunk)[0], outer.turn() - thunk.work()
    return outer.turn() * (1 / (_num_steps(inner[0]) if inner else 1)), None


def _num_steps(stretch: Thunk) -> int:
    """Return the number of steps in a loop of known length, which may hold another one."""
    inner = [thunk for thunk in stretch.loops() if thunk.loop.is_over_steps]
    return (stretch.loop.trips or 1) * (_num_steps(inner[0]) if inner else 1)


@dataclass(frozen=True)
class Code:
    """What the PTX of a program contains.

    Attributes:
        tf32: Tensor-core instructions on TF32 operands.
        swaps: Atomic operations by compare-and-swap, which additions of float32 numbers become in a loop.
    """

    tf32: int
    swaps: int


def machine_code(texts: Iterable[str], hlo: str) -> Code:
    """Count instructions in PTX; a product left to a library counts as one of TF32 where its precision is the default.

    Args:
        texts: PTX of the kernels.
        hlo: The optimised program.
    """
    tf32, swaps = 0, 0
    for text in texts:
        tf32 += len(re.findall(r"\bw?g?mma\S*\.tf32", text))
        swaps += len(re.findall(r"\batom\S*\.cas\b", text))
    products = re.findall(r"= f32\[.*custom_call_target=\"__cublas.*", hlo) + re.findall(r"= \(f32\[.*__cublas.*", hlo)
    return Code(tf32 + sum('"operand_precision":["DEFAULT"' in line for line in products), swaps)
