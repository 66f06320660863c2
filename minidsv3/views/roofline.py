"""What kernels reach, beside what the machine allows: a roofline of those that multiply, shares of the floor of all.

Both are drawn from `results/kernels.json`, which `python -m minidsv3 bench kernels` writes. The floor of an entry is
the longer of two times: its bytes at the speed of a large copy, its FLOPs at the speed of a large product, both
measured in the same run.
"""

from typing import NamedTuple

from .style import BLACK, BLUE, DARK, GREY, ORANGE, VERMILION, WHITE, Fill, Picture, ink, styled

OURS = "minidsv3"
FP8, BF16 = Fill(BLUE), Fill(ORANGE, "/")
LETTERS = {"fp8_gemm": "P", "fp8_grouped_gemm": "G", "mla_attention": "A"}      # what the roofline shows


class Entry(NamedTuple):
    """One line of the stored table in units of people."""

    operation: str
    shape: str
    backward: bool
    intensity: float | None             # FLOP for each byte that must be moved; None: there is nothing to multiply
    tflops: float | None                # of ours
    floor: float                        # milliseconds
    ours: float
    peers: dict[str, float]

    @property
    def fraction(self) -> float:
        """How much of what the machine allows is reached: floor over time."""
        return self.floor / self.ours

    @property
    def best_peer(self) -> str | None:
        return min(self.peers, key=self.peers.get) if self.peers else None

    @property
    def name(self) -> str:
        return self.operation.replace("_", " ") + (", forward + backward" if self.backward else "")


def entries(stored: dict) -> list[Entry]:
    """The stored lines that have a time of ours; a peer that failed has words in place of a number, and is left out."""
    found = []
    for line in stored["entries"]:
        times = {name: ms for name, ms in line["ms"].items() if isinstance(ms, (int, float))}
        if OURS not in times:
            continue
        ours, flops = times.pop(OURS), line["flops"]
        floor = line["bytes"] / stored["ceilings"]["copy_gb_s"] / 1e6
        if flops:
            floor = max(floor, flops / ceiling(stored, line["operation"]) / 1e9)
        found.append(Entry(line["operation"], line["shape"], line["pass"] != "forward",
                           flops / line["bytes"] if flops else None, flops / ours / 1e9 if flops else None, floor, ours,
                           times))
    return found


def ceiling(stored: dict, operation: str) -> float:
    """TFLOPS of a large product in the numbers that the operation multiplies."""
    return stored["ceilings"]["fp8_tflops" if operation.startswith("fp8") else "bf16_tflops"]


def ridge(stored: dict, operation: str = "fp8_gemm") -> float:
    """FLOP a byte from which on the machine waits for arithmetic."""
    return ceiling(stored, operation) * 1e3 / stored["ceilings"]["copy_gb_s"]


def product_intensity(tokens: float, N: int = 7168, K: int = 16384) -> float:
    """FLOP a byte of an FP8 product with a BF16 result, its scales included."""
    blocks = K / 128
    moved = (tokens + N) * K + 4 * blocks * (tokens + N / 128) + 2 * tokens * N
    return 2 * tokens * N * K / moved


@styled
def roofline(stored: dict) -> Picture:
    """TFLOPS over FLOP a byte of the stored forward passes of `LETTERS`, under the two roofs of the machine."""
    found = [entry for entry in entries(stored) if entry.operation in LETTERS and not entry.backward]
    turn = ridge(stored)
    picture = Picture(10, 5.8, "TFLOPS over FLOP a byte on log axes, under a slope set by memory and flat roofs set by "
                      f"arithmetic, which meet at {turn:.0f} FLOP a byte for FP8. Letters are kernels, bars the best "
                      "other implementation; few tokens lie on the slope, many under the roof.")
    axes = picture.add_axes((0.08, 0.11, 0.9, 0.76))
    low = min(10.0, *(entry.intensity / 1.5 for entry in found))
    high = 1.5 * max(entry.intensity for entry in found)
    _roofs(axes, stored, low, high)
    for entry in found:
        _mark(axes, entry)
    axes.set(xscale="log", yscale="log", xlim=(low, high), xlabel="FLOP for each byte that must be moved",
             ylabel="TFLOPS", ylim=(min(entry.tflops for entry in found) / 2, 1.6 * stored["ceilings"]["fp8_tflops"]))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(lambda value, _: f"{value:,g}")
    axes.minorticks_off()
    _key(axes, found)
    _tokens(axes, low, high)
    return picture


def _roofs(axes, stored: dict, low: float, high: float) -> None:
    copy = stored["ceilings"]["copy_gb_s"] / 1e3
    for operation, name, colour, dashes in (("fp8_gemm", "FP8", BLUE, "-"), ("bf16", "BF16", ORANGE, "--")):
        top, turn = ceiling(stored, operation), ridge(stored, operation)
        axes.plot([low, turn, high], [low * copy, top, top], color=colour, linestyle=dashes, linewidth=2, zorder=1,
                  label=f"{name}: {copy:.1f} TB/s, then {top:,.0f} TFLOPS; ridge at {turn:.0f}")
        axes.plot([turn, turn], [1e-3, top], color=colour, linestyle=":", linewidth=1.2, zorder=1)


def _mark(axes, entry: Entry) -> None:
    """Ours as a letter, joined to a bar at the best peer's speed."""
    shape, fill = _look(entry.operation)
    if entry.best_peer:
        peer = entry.tflops * entry.ours / entry.peers[entry.best_peer]
        axes.plot([entry.intensity] * 2, [entry.tflops, peer], color=DARK, linewidth=1, zorder=2)
        axes.plot(entry.intensity, peer, "_", color=BLACK, markersize=13, markeredgewidth=2.2, zorder=3)
    axes.plot(entry.intensity, entry.tflops, shape, color=fill.colour, markersize=13, markeredgecolor=BLACK, zorder=4)
    axes.text(entry.intensity, entry.tflops, LETTERS[entry.operation], ha="center", va="center_baseline", fontsize=9,
              weight="bold", color=ink(fill.colour), zorder=5)


def _look(operation: str) -> tuple[str, Fill]:
    """Round and blue for what multiplies in FP8, square and orange for BF16."""
    return ("o", FP8) if operation.startswith("fp8") else ("s", BF16)


def _key(axes, found: list[Entry]) -> None:
    for operation in dict.fromkeys(entry.operation for entry in found):
        shape, fill = _look(operation)
        axes.plot([], [], shape, color=fill.colour, markeredgecolor=BLACK, markersize=9,
                  label=f"{LETTERS[operation]}: {operation.replace('_', ' ')}")
    axes.plot([], [], "_", color=BLACK, markersize=13, markeredgewidth=2.2, label="the best other implementation")
    axes.legend(frameon=False, loc="upper left")


def _tokens(axes, low: float, high: float) -> None:
    """The same axis in tokens of the product with W^O."""
    above = axes.twiny()
    marks = [tokens for tokens in (8, 16, 32, 64, 128, 256, 512, 1024, 4096) if low < product_intensity(tokens) < high]
    above.set(xscale="log", xlim=(low, high), xlabel="tokens M of an FP8 product with a weight of 7,168 x 16,384")
    above.set_xticks([product_intensity(tokens) for tokens in marks], [f"{tokens:,}" for tokens in marks])
    above.minorticks_off()
    above.spines["top"].set_visible(True)


@styled
def fractions(stored: dict) -> Picture:
    """For each operation at its largest stored size, the share of the machine's limit that it reaches, and the best
    peer's."""
    rows = largest(entries(stored))
    tall = 0.28 * len(rows) + 1.0
    picture = Picture(10, tall, "For each operation at its largest size a bar: how much of the machine's limit it "
                      "reaches; a diamond marks the best other implementation. " + "; ".join(
                          f"{entry.name} {entry.fraction:.0%}" for entry in rows) + ".")
    axes = picture.add_axes((0.27, 0.5 / tall, 0.38, 1 - 0.6 / tall))
    for row, entry in enumerate(rows):
        fill = Fill(GREY) if entry.tflops is None else _look(entry.operation)[1]
        axes.barh(row, entry.fraction, 0.66, color=fill.colour, edgecolor=BLACK, hatch=fill.mark * 2, linewidth=0.7)
        words = f"{entry.ours:.3g} ms"
        if entry.best_peer:
            peer = entry.peers[entry.best_peer]
            axes.plot(entry.floor / peer, row, "D", color=WHITE, markeredgecolor=VERMILION, markeredgewidth=2,
                      markersize=7)
            words += f"; {entry.best_peer} {peer:.3g}"
        axes.text(1.29, row, words, va="center", fontsize=9.5, clip_on=False)
    axes.axvline(1, color=DARK, linewidth=1.2, linestyle="--")
    axes.set(yticks=range(len(rows)), ylim=(len(rows) - 0.4, -0.6), xlim=(0, 1.25), xlabel="share of the limit")
    axes.set_yticklabels([entry.name for entry in rows], fontsize=9.5)
    axes.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0", "25 %", "50 %", "75 %", "100 %"])
    return picture


def largest(found: list[Entry]) -> list[Entry]:
    """Of each operation and pass the entry whose floor is longest."""
    best: dict[str, Entry] = {}
    for entry in found:
        if entry.name not in best or entry.floor > best[entry.name].floor:
            best[entry.name] = entry
    return list(best.values())
