"""Draws README's pictures from results/: docs/train_nano.png, docs/kernels.png, and docs/model_map.png.

    python tools/readme_figures.py [runs/nano]

With the folder of a finished run its log and result are stored first; do that on the machine that trained it.
"""

import json
import sys
from pathlib import Path

from minidsv3 import ModelConfig
from minidsv3.bench import machine
from minidsv3.views.model_map import model_map
from minidsv3.views.overview import loss_curve
from minidsv3.views.roofline import fractions

ROOT = Path(__file__).resolve().parent.parent
STORED = ROOT / "results" / "train_nano.json"


def store(run: Path) -> None:
    """Keeps of each step what README and the course draw, beside the result and the machine."""
    log = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    result = json.loads((run / "result.json").read_text())
    del result["model"]
    steps = {name: [round(line[name], 4) for line in log] for name in ("tokens", "loss", "mtp", "seconds")}
    steps["max_violation"] = [[round(value, 3) for value in line["max_violation"]] for line in log]
    STORED.write_text(json.dumps({"command": "python -m minidsv3 train --preset nano", "machine": machine(),
                                  "result": result, "steps": steps}) + "\n")


def draw() -> None:
    run = json.loads(STORED.read_text())
    result, steps = run["result"], run["steps"]
    curve = loss_curve(steps["tokens"], steps["loss"], result["unigram_entropy"], ModelConfig.preset("nano").vocab_size,
                       result["held_out_loss"])
    (ROOT / "docs" / "train_nano.png").write_bytes(curve.png())
    kernels = json.loads((ROOT / "results" / "kernels.json").read_text())
    (ROOT / "docs" / "kernels.png").write_bytes(fractions(kernels).png())
    (ROOT / "docs" / "model_map.png").write_bytes(model_map(ModelConfig.preset("full")).png())


if __name__ == "__main__":
    if len(sys.argv) > 1:
        store(Path(sys.argv[1]))
    draw()
