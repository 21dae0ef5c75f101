"""Generate text with a language model compiled by dyncc: the exact passes keep the words the same.

    python examples/generate_smollm2.py --tokens 32

`model.compile(backend=...)` is the form to use: `torch.compile(model).generate()` compiles nothing. Every graph that dyncc lowered
has a report; generation needs one for the prompt and one or two for the steps after it.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch

import dyncc
from dyncc.models import load_smollm2

PROMPT = "A compiler pass is"


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Generate with the plain and the compiled model, print both texts, and return them with the number of graphs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompt", default=PROMPT)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--engine", default="auto")
    options = parser.parse_args(argv)
    model, tokenizer = load_smollm2()
    inputs = tokenizer(options.prompt, return_tensors="pt")
    plain = _generate(model, inputs, options.tokens)
    known = len(dyncc.reports())
    model.compile(backend="dyncc", options={"engine": options.engine})
    compiled = _generate(model, inputs, options.tokens)
    reports = dyncc.reports()[known:]
    for report in reports:
        applied = ", ".join(f"{rewrite.name} {rewrite.found} of {rewrite.expected}" for rewrite in report.rewrites if rewrite.applied)
        print(f"graph {report.number}: attention {report.found_attention} of {report.expected_attention}; {applied or 'no rewrite'}")
    print(tokenizer.decode(compiled))
    print(f"the same {len(compiled)} tokens as the plain model: {torch.equal(plain, compiled)}")
    return {"same": torch.equal(plain, compiled), "graphs": len(reports), "reports": reports}


@torch.inference_mode()
def _generate(model: Any, inputs: Any, tokens: int) -> torch.Tensor:
    generated: torch.Tensor = model.generate(**inputs, do_sample=False, max_new_tokens=tokens, min_new_tokens=tokens)[0]
    return generated


if __name__ == "__main__":
    main()
