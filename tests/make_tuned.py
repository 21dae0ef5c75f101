"""Writes the fastest forms of kernels on this machine's GPU into kernels/generator/tuned.json. Read the difference before you commit it.

Run it from the root of the repository on a machine with a GPU: `python tests/make_tuned.py`. It prints how much each gains.
"""

from __future__ import annotations

import json

from dyncc.kernels.generator import tune
from dyncc.kernels.generator.catalogue import tuned

GAIN = 1.05
"""How much faster a form must be: below, it may be chance."""


def main() -> None:
    found = tuned()
    for row in found:
        print(row)
    kept = {**tune.known(), str(tune.at_hand()): {row.name: row.form for row in found if row.before > GAIN * row.seconds}}
    parts = []
    for where, forms in sorted(kept.items()):
        lines = ",\n".join(f"  {json.dumps(name)}: {json.dumps(form)}" for name, form in sorted(forms.items()))
        parts.append(f"{json.dumps(where)}: {{\n{lines}\n}}")
    tune.FILE.write_text("{" + ",\n".join(parts) + "}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
