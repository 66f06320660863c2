"""Chapter 05's view: one program of a blockwise FP8 product, step by step along K, and who else is at work with it.

What it teaches: the scales change with every step, so they belong inside the loop; a larger tile does more work for
each byte, until its sums no longer fit into registers; programs numbered in groups read less from memory.
"""

from collections.abc import Iterator
from html import escape
from typing import NamedTuple

from matplotlib.patches import Rectangle

from .explore import View, choice, doubling, explore, slider
from .style import BLACK, DARK, GREY, SKY, VERMILION, WHITE, YELLOW, Fill, Picture, ink, styled
from .svg import line, page, rectangle, text

M, N, K = 1024, 2048, 2048              # tokens, rows of the weight, numbers that are summed
TILE = 128                              # numbers along K that share a scale, and rows of the weight that do
STEPS = K // TILE
ORDERS = {"row by row": 1, "groups of 2 rows": 2, "groups of 4 rows": 4, "groups of 8 rows": 8}
REGISTERS = 2**18                       # bytes of registers that one multiprocessor has for all its programs
DONE, SHARED, LIVE = Fill(GREY), Fill(SKY, "-"), Fill(YELLOW, "x")


def stepper_state(**changes) -> dict:
    """The controls' values, some of them changed. Raises ValueError for a control that does not exist."""
    state = {"row": 3, "column": 5, "step": 6, "tile_m": 128, "tile_n": 128, "order": "row by row", "processors": 16}
    unknown = set(changes) - set(state)
    if unknown:
        raise ValueError(f"{', '.join(sorted(unknown))} is no control of the tile stepper; it has {', '.join(state)}")
    return state | changes


class Grid(NamedTuple):
    """How the result is cut into tiles, and in which order its programs are numbered."""

    rows: int
    columns: int
    group: int

    def number(self, row: int, column: int) -> int:
        """The program that computes a tile: in each group of rows, column by column."""
        first = row // self.group * self.group
        return first * self.columns + column * min(self.group, self.rows - first) + row - first

    def tiles(self, start: int, stop: int) -> Iterator[tuple[int, int]]:
        """Row and column of the tiles of programs `start` to `stop`."""
        for program in range(start, min(stop, self.rows * self.columns)):
            first = program // (self.group * self.columns) * self.group
            height = min(self.group, self.rows - first)
            inside = program - first * self.columns
            yield first + inside % height, inside // height


def grid_of(state: dict) -> Grid:
    return Grid(M // state["tile_m"], N // state["tile_n"], ORDERS[state["order"]])


def live_tile(state: dict) -> tuple[int, int]:
    """The tile that the sliders point at; large tiles are fewer, and the last is taken for one beyond."""
    grid = grid_of(state)
    return min(state["row"], grid.rows - 1), min(state["column"], grid.columns - 1)


def wave_of(state: dict) -> tuple[int, int]:
    """First program, and the first after it, of those that run together with the live one."""
    start = grid_of(state).number(*live_tile(state)) // state["processors"] * state["processors"]
    return start, start + state["processors"]


def runs(tiles) -> dict[int, list[tuple[int, int]]]:
    """Row of tiles -> stretches of neighbours, as first column and the column behind the last."""
    found: dict[int, list[tuple[int, int]]] = {}
    for row, column in sorted(tiles):
        stretches = found.setdefault(row, [])
        if stretches and stretches[-1][1] == column:
            stretches[-1] = stretches[-1][0], column + 1
        else:
            stretches.append((column, column + 1))
    return found


def memory_bytes(state: dict) -> int:
    """Bytes of codes that come from memory, if the programs of a wave walk along K in step: a tile that several of
    them need is read once and found in L2 by the others; the next wave reads again."""
    grid, total = grid_of(state), 0
    for start in range(0, grid.rows * grid.columns, state["processors"]):
        tiles = list(grid.tiles(start, start + state["processors"]))
        total += (len({row for row, _ in tiles}) * state["tile_m"]
                  + len({column for _, column in tiles}) * state["tile_n"]) * K
    return total


def tile_stepper_facts(state: dict) -> dict[str, int]:
    """Whole numbers behind the drawing."""
    grid, (row, column) = grid_of(state), live_tile(state)
    tile_m, tile_n = state["tile_m"], state["tile_n"]
    weight_scales = -(-tile_n // TILE)
    read = (tile_m + tile_n) * TILE + 4 * (tile_m + weight_scales)
    work = 2 * tile_m * tile_n * TILE
    programs = grid.rows * grid.columns
    return {"program": grid.number(row, column), "programs": programs, "step_bytes": read, "step_flops": work,
            "flops_a_byte": round(work / read), "accumulator_bytes": 4 * tile_m * tile_n,
            "activation_scales": tile_m, "weight_scales": weight_scales,
            "asked_bytes": programs * (tile_m + tile_n) * K, "memory_bytes": memory_bytes(state),
            "least_bytes": (M + N) * K, "waves": -(-programs // state["processors"])}


# ---- the drawing ----------------------------------------------------------------------------------------------------

UNIT = 0.2                              # pixels a number of M and N
DEPTH = 170 / K                         # and of K
LEFT, TOP = 256, 262                    # corner of C; A stands left of it, B above
A_LEFT, B_TOP = LEFT - 26 - K * DEPTH, TOP - 26 - K * DEPTH


def render_tile_stepper(state: dict) -> str:
    """A sentence and an SVG for one state of the controls. Pure: the same state gives the same string."""
    facts = tile_stepper_facts(state)
    sentence = _sentence(state, facts)
    parts = [*_matrices(), *_in_l2(state), *_result(state), *_live(state), *_numbers(state, facts),
             *_bytes(facts), _legend()]
    return f"<p>{escape(sentence)}</p>" + page("Tile stepper: " + sentence, 600, parts)


def _sentence(state: dict, facts: dict) -> str:
    (row, column), step = live_tile(state), state["step"]
    tile_m, tile_n = state["tile_m"], state["tile_n"]
    return (f"Program {facts['program']} of {facts['programs']}, step {step} of K: rows {row * tile_m} to "
            f"{(row + 1) * tile_m - 1} of A times rows {column * tile_n} to {(column + 1) * tile_n - 1} of the weight, "
            f"numbers {step * TILE} to {(step + 1) * TILE - 1} of each. It reads {facts['step_bytes']:,} bytes and "
            f"does {facts['flops_a_byte']} FLOP for each. All programs together need "
            f"{facts['memory_bytes'] / facts['least_bytes']:.1f} times the bytes of A and B from memory.")


def _matrices() -> list[str]:
    boxes = ((A_LEFT, TOP, K * DEPTH, M * UNIT), (LEFT, B_TOP, N * UNIT, K * DEPTH), (LEFT, TOP, N * UNIT, M * UNIT))
    drawn = [rectangle(*box, Fill(WHITE)) for box in boxes]
    return drawn + [
        text(A_LEFT, TOP - 44, "A: tokens", 14, bold=True), text(A_LEFT, TOP - 28, f"{M:,} x {K:,} codes", 12),
        text(LEFT, B_TOP - 8, f"B: the weight, {N:,} x {K:,} codes, K downwards", 14, bold=True),
        text(LEFT, TOP + M * UNIT + 18, f"C: the result, {M:,} x {N:,}", 14, bold=True)]


def _in_l2(state: dict) -> list[str]:
    """Tiles of A and B that the programs of this wave read in this step; what the live program had before is grey."""
    tiles = list(grid_of(state).tiles(*wave_of(state)))
    (row, column), step = live_tile(state), state["step"]
    x, y = A_LEFT + step * TILE * DEPTH, B_TOP + step * TILE * DEPTH
    drawn = []
    if step:
        drawn = [rectangle(A_LEFT, TOP + row * state["tile_m"] * UNIT, x - A_LEFT, state["tile_m"] * UNIT, DONE),
                 rectangle(LEFT + column * state["tile_n"] * UNIT, B_TOP, state["tile_n"] * UNIT, y - B_TOP, DONE)]
    for start, stop in runs((0, each) for each, _ in set(tiles))[0]:
        drawn.append(rectangle(x, TOP + start * state["tile_m"] * UNIT, TILE * DEPTH,
                               (stop - start) * state["tile_m"] * UNIT, SHARED))
    for start, stop in runs((0, each) for _, each in set(tiles))[0]:
        drawn.append(rectangle(LEFT + start * state["tile_n"] * UNIT, y, (stop - start) * state["tile_n"] * UNIT,
                               TILE * DEPTH, SHARED))
    return drawn


def _result(state: dict) -> list[str]:
    """Tiles that are finished, and those of the wave, as stretches of neighbours."""
    grid, (start, stop) = grid_of(state), wave_of(state)
    drawn = []
    for tiles, fill in ((grid.tiles(0, start), DONE), (grid.tiles(start, stop), SHARED)):
        for row, stretches in runs(tiles).items():
            drawn += [rectangle(LEFT + first * state["tile_n"] * UNIT, TOP + row * state["tile_m"] * UNIT,
                                (last - first) * state["tile_n"] * UNIT, state["tile_m"] * UNIT, fill)
                      for first, last in stretches]
    lines = [line(LEFT + i * state["tile_n"] * UNIT, TOP, LEFT + i * state["tile_n"] * UNIT, TOP + M * UNIT, 0.4)
             for i in range(1, grid.columns)]
    lines += [line(LEFT, TOP + i * state["tile_m"] * UNIT, LEFT + N * UNIT, TOP + i * state["tile_m"] * UNIT, 0.4)
              for i in range(1, grid.rows)]
    return drawn + lines


def _live(state: dict) -> list[str]:
    """The tiles of the live program, outlined, and beside them the scales in use."""
    (row, column), step = live_tile(state), state["step"]
    tall, wide = state["tile_m"] * UNIT, state["tile_n"] * UNIT
    x, y = A_LEFT + step * TILE * DEPTH, B_TOP + step * TILE * DEPTH
    top, left = TOP + row * tall, LEFT + column * wide
    drawn = [rectangle(x, top, TILE * DEPTH, tall, LIVE), rectangle(left, y, wide, TILE * DEPTH, LIVE),
             rectangle(left, top, wide, tall, LIVE)]
    drawn += [_outline(x, top, TILE * DEPTH, tall), _outline(left, y, wide, TILE * DEPTH),
              _outline(left, top, wide, tall)]
    scale = Fill(VERMILION)
    drawn.append(rectangle(x - 5, top, 4, tall, scale))
    first, last = column * state["tile_n"] // TILE, ((column + 1) * state["tile_n"] - 1) // TILE
    drawn += [rectangle(LEFT + block * TILE * UNIT + 1, y - 6, TILE * UNIT - 2, 5, scale)
              for block in range(first, last + 1)]
    return drawn


def _outline(x: float, y: float, width: float, height: float) -> str:
    corners = ((x, y), (x + width, y), (x + width, y + height), (x, y + height), (x, y))
    return "".join(line(*a, *b, 2.2, colour=BLACK) for a, b in zip(corners, corners[1:]))


PANEL = 690                             # where the numbers at the right begin


def _numbers(state: dict, facts: dict) -> list[str]:
    """What the live program does in this step, from the scales to its accumulator."""
    step, held = state["step"], facts["accumulator_bytes"]
    scales = facts["weight_scales"]
    share = held / REGISTERS
    words = [
        (f"step {step} of 0 to {STEPS - 1}", 15, True), (f"reads {facts['step_bytes']:,} bytes", 13, False),
        (f"does {facts['step_flops'] / 1e6:.2f} MFLOP:", 13, False),
        (f"{facts['flops_a_byte']} FLOP a byte", 15, True),
        ("1. tensor core: 128 products", 13, False), ("    summed in about 14 bits", 13, False),
        (f"2. x {facts['activation_scales']} scales of A, x {scales} of B", 13, False),
        ("3. added in FP32 (promotion)", 13, False)]
    drawn, y = [], 46
    for entry, size, bold in words:
        drawn.append(text(PANEL, y, entry, size, bold=bold))
        y += 24 if bold else 20
    drawn += [rectangle(PANEL + 12 * i, y, 12, 18, LIVE if i == step else DONE if i < step else Fill(WHITE))
              for i in range(STEPS)]
    drawn += [text(PANEL, y + 38, f"accumulator: {held // 1024} KB of {REGISTERS // 1024} KB", 13),
              text(PANEL, y + 56, "of registers" if share < 1 else "of registers: none left", 13, bold=share >= 1)]
    return drawn


def _bytes(facts: dict) -> list[str]:
    """Bars on one scale: what programs ask for, what comes from memory, what is there to be read at all."""
    drawn, most = [text(20, 518, "bytes read for all of C", 14, bold=True)], facts["asked_bytes"]
    rows = (("asked for by programs", facts["asked_bytes"], Fill(WHITE)),
            ("from memory, the rest from L2", facts["memory_bytes"], SHARED),
            ("A and B once", facts["least_bytes"], DONE))
    for i, (name, size, fill) in enumerate(rows):
        y = 530 + 22 * i
        drawn += [text(232, y + 13, name, 13, "end"), rectangle(242, y, max(430 * size / most, 2), 16, fill),
                  text(684, y + 13, f"{size / 2**20:,.0f} MiB, {size / facts['least_bytes']:.1f} times", 13)]
    return drawn


def _legend() -> str:
    items = ((LIVE, "this program"), (SHARED, "the others of its wave"), (DONE, "done"), (Fill(WHITE), "to come"),
             (Fill(VERMILION), "scales in use"))
    drawn = ""
    for i, (fill, words) in enumerate(items):
        drawn += rectangle(PANEL, 314 + 24 * i, 20, 15, fill) + text(PANEL + 28, 326 + 24 * i, words, 13)
    return drawn


def tile_stepper() -> View:
    """The view: which program, which step, how large its tiles are, how programs are numbered, how many run at once."""
    state = stepper_state()
    return explore(
        render_tile_stepper, tile_stepper_facts,
        row=slider("program: row of tiles, m", state["row"], 0, M // 32 - 1),
        column=slider("program: column of tiles, n", state["column"], 0, N // 32 - 1),
        step=slider("step along K (128 numbers each)", state["step"], 0, STEPS - 1),
        tile_m=doubling("rows of a tile", state["tile_m"], 32, 256),
        tile_n=doubling("columns of a tile", state["tile_n"], 32, 256),
        order=choice("programs are numbered", state["order"], list(ORDERS)),
        processors=doubling("programs at the same time", state["processors"], 4, 64))


# ---- the same on paper ----------------------------------------------------------------------------------------------


@styled
def tile_stepper_states(states: dict[str, dict]) -> Picture:
    """The result with its live wave, and the parts of A and B that this wave reads, for several states."""
    facts = {name: tile_stepper_facts(state) for name, state in states.items()}
    picture = Picture(11, 3.3, "For several settings, the tiles of the result that are done, those of the wave at "
                      "work, and the bands of A (left) and B (above) that this wave reads. " + "; ".join(
                          f"{name}: {each['memory_bytes'] / each['least_bytes']:.1f} times the bytes of A and B"
                          for name, each in facts.items()) + ".")
    for axes, (name, state) in zip(picture.subplots(1, len(states)), states.items()):
        _paper(axes, state)
        axes.text(N / 2, -BAND - 120, name, ha="center", va="bottom", fontsize=11, weight="bold")
        times = facts[name]["memory_bytes"] / facts[name]["least_bytes"]
        words = f"from memory {times:.1f} x (A + B)\n{facts[name]['flops_a_byte']} FLOP a byte in a step"
        axes.text(N / 2, M + 110, words, ha="center", va="top", fontsize=10.5)
    picture.subplots_adjust(left=0.01, right=0.99, top=1.0, bottom=0.0, wspace=0.08)
    return picture


BAND = 330                              # thickness of A and B in the still picture, in numbers of M and N


def _paper(axes, state: dict) -> None:
    grid, (start, stop), (row, column) = grid_of(state), wave_of(state), live_tile(state)
    tall, wide = state["tile_m"], state["tile_n"]
    wave = set(grid.tiles(start, stop))

    def box(x, y, width, height, fill, **more):
        axes.add_patch(Rectangle((x, y), width, height, facecolor=fill.colour, edgecolor=DARK, linewidth=0.5,
                                 hatch=fill.mark * 3, **more))

    for place in ((-BAND - 70, 0, BAND, M), (0, -BAND - 70, N, BAND), (0, 0, N, M)):
        box(*place, Fill(WHITE))
    for tiles, fill in ((grid.tiles(0, start), DONE), (wave, SHARED)):
        for r, c in tiles:
            box(c * wide, r * tall, wide, tall, fill)
    for r in {r for r, _ in wave}:
        box(-BAND - 70, r * tall, BAND, tall, SHARED)
    for c in {c for _, c in wave}:
        box(c * wide, -BAND - 70, wide, BAND, SHARED)
    box(column * wide, row * tall, wide, tall, Fill(YELLOW, "x"))
    for x, y, words in ((-BAND / 2 - 70, M * 0.88, "A"), (N * 0.94, -BAND / 2 - 70, "B"), (N * 0.94, M * 0.88, "C")):
        axes.text(x, y, words, ha="center", va="center", fontsize=12, weight="bold", color=ink(WHITE),
                  bbox=dict(facecolor=WHITE, edgecolor="none", pad=1.5))
    axes.set(xlim=(-BAND - 90, N + 20), ylim=(M + 420, -BAND - 260), aspect="equal")
    axes.axis("off")
