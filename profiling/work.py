"""What a typical program of each kernel does: how often its loops go round, and for what.

The static model finds the loops of a compiled kernel; which of them a program runs, and how often,
is known here, from the launch and the length of the rows (all the same in the report). Loops that
only clear the rows past the last sequence, or serve rows of other lengths, go round 0 times.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import ceil

from profiling.fake_driver import Launch
from profiling.static_model import Code, Cost, Loop, code


@dataclass(frozen=True)
class Work:
    """One launch on rows of one length.

    Attributes:
        programs: programs that serve rows; those that clear a tail are not counted.
        trips: how often each loop of a typical program goes round.
    """

    programs: int
    trips: tuple[float, ...]


def work(launch: Launch, length: int) -> Work:
    """What a launch does on rows of ``length`` rows.

    Raises:
        KeyError: a kernel that is not described here.
        ValueError: its code has other loops than the description expects.
    """
    return WORK[launch.kernel](launch, code(launch.compiled), length)


def cost(launch: Launch, length: int, *, cycles: bool = False) -> Cost:
    """What all warps of all programs of a launch issue."""
    done = work(launch, length)
    warps = launch.compiled.metadata.num_warps
    return code(launch.compiled).cost(done.trips, cycles=cycles) * (done.programs * warps)


def _short(launch: Launch, compiled: Code, length: int) -> Work:
    """A loop over queries for each number of tiles that hold the keys: more tiles, more work."""
    tiles = [launch.constants[f"TILE_{number}"] for number in range(3)]
    tiles = [tile for tile in tiles if tile]
    loops = sorted(_with_exponentials(compiled), key=lambda loop: loop.cost.exponentials)
    _expect(launch, compiled, len(loops) == len(tiles))
    fitting = next(count for count in range(1, 4) if sum(tiles[:count]) >= length)
    turns = ceil(length / launch.constants["BLOCK_M"])
    trips = _trips(compiled, {loops[fitting - 1]: turns})
    return Work(launch.arguments["count"] * launch.arguments["heads"], trips)


def _long(launch: Launch, compiled: Code, length: int) -> Work:
    """A loop over full blocks of the others, then one for the last block, which may be short."""
    block = "BLOCK_M" if launch.kernel == "long_backward_keys" else "BLOCK_N"
    loops = _with_exponentials(compiled)
    _expect(launch, compiled, len(loops) == 2)
    full, rest = divmod(length, launch.constants[block])
    trips = _trips(compiled, {loops[0]: full, loops[1]: 1 if rest else 0})
    rows = launch.arguments["count"] * launch.arguments["heads"]
    return Work(rows * launch.arguments["blocks"], trips)


def _key_factors(launch: Launch, compiled: Code, length: int) -> Work:
    """No loop: a factor of dropout's hash for every key row."""
    return Work(launch.programs, _trips(compiled, {}))


def _textbook(launch: Launch, compiled: Code, length: int) -> Work:
    """One loop, over keys or queries, of which every program runs all blocks."""
    over_queries = launch.kernel == "flash_backward_keys"
    loops = _with_exponentials(compiled)
    _expect(launch, compiled, len(loops) == 1)
    turns = ceil(length / launch.constants["BLOCK_M" if over_queries else "BLOCK_N"])
    return Work(launch.programs, _trips(compiled, {loops[0]: turns}))


def _pool_forward(launch: Launch, compiled: Code, length: int) -> Work:
    loops = _with_exponentials(compiled)
    _expect(launch, compiled, len(loops) == 1)
    turns = ceil(length / launch.constants["BLOCK_ROWS"])
    return Work(launch.programs, _trips(compiled, {loops[0]: turns}))


def _pool_backward(launch: Launch, compiled: Code, length: int) -> Work:
    """A loop over scores, then one over the program's share of the rows."""
    loops = [loop for loop in _with_exponentials(compiled) if loop.depth == 0]
    _expect(launch, compiled, len(loops) == 2)
    turns = ceil(length / launch.constants["BLOCK_ROWS"])
    shares = launch.arguments["shares"]
    trips = {loops[0]: turns, loops[1]: ceil(turns / shares)}
    for loop in compiled.loops:
        if loop not in trips and loop.head in loops[1].body:
            trips[loop] = ceil(launch.constants["DIM"] / launch.constants["BLOCK_DIM"])
    return Work(launch.arguments["count"] * shares, _trips(compiled, trips))


def _with_exponentials(compiled: Code) -> list[Loop]:
    return [loop for loop in compiled.loops if loop.cost.exponentials]


def _trips(compiled: Code, known: dict[Loop, float]) -> tuple[float, ...]:
    return tuple(known.get(loop, 0) for loop in compiled.loops)


def _expect(launch: Launch, compiled: Code, condition: bool) -> None:
    if not condition:
        found = "\n".join(map(str, compiled.loops))
        raise ValueError(f"{launch.kernel} on {compiled.architecture} has the loops\n{found}")


WORK: dict[str, Callable[[Launch, Code, int], Work]] = {
    "flash_forward": _textbook,
    "flash_backward_keys": _textbook,
    "flash_backward_queries": _textbook,
    "short_forward": _short,
    "short_backward": _short,
    "long_key_factors": _key_factors,
    "long_forward": _long,
    "long_backward_queries": _long,
    "long_backward_keys": _long,
    "pool_forward": _pool_forward,
    "pool_backward": _pool_backward,
}
"""A kernel's name -> what it does."""
