"""Writes kernels/generator/figures.json anew: what every shown kernel takes on every target. Read the difference before you commit it.

Run it from the root of the repository: `python tests/make_kernel_figures.py`. It prints what got worse.
"""

from __future__ import annotations

import json

from dyncc import verdicts
from dyncc.kernels.generator import figures
from dyncc.kernels.generator.compiled import compiled
from dyncc.kernels.generator.standard import STANDARD
from dyncc.kernels.generator.targets import TARGETS


def main() -> None:
    rows = {}
    for spec in STANDARD:
        for where in TARGETS:
            made = compiled(spec, where)
            rows[f"{made.name} {where}"] = {name: getattr(made, name) for name in figures.TOLD}
            if figures.FILE.exists() and figures.worse(made):
                print(f"{made.name} on {where}: {'; '.join(figures.worse(made))}")
    lines = [f"  {json.dumps(name)}: {json.dumps(row)}" for name, row in rows.items()]
    head = json.dumps(verdicts.version("triton"))
    figures.FILE.write_text(f'{{"triton": {head}, "kernels": {{\n' + ",\n".join(lines) + "\n}}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
