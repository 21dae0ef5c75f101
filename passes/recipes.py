"""Published systems as settings of a pass: a recipe is a name for a pass with options, and can be used wherever a pass name can.

`evit{keep=0.5}` is the pass of the recipe `evit` with its options, `keep` replaced. Those of keys stand in recipes_of_keys.py.
"""

from __future__ import annotations

from dyncc.passes.recipes_of_keys import EVICTION, SELECTION
from dyncc.pipeline import Recipe

PRUNING = (
    Recipe(
        name="evit",
        means="prune-tokens{keep=0.7 layers=3,6,9 score=cls-attention site=attention fuse=true}",
        citation="Liang et al., Not All Patches are What You Need: Expediting Vision Transformers via Token Reorganizations, ICLR 2022",
        note="made for encoders with a class token; the authors fine-tune for their best figures; dropped rows become one fused row",
        confidence="high",
    ),
    Recipe(
        name="promptdistill",
        means="prune-tokens{keep=1024 layers=13 score=last-logits}",
        citation="Jin et al., PromptDistill: Query-based Selective Token Retention in Intermediate Layers for Efficient LLM Inference, "
        "2025",
        note="layer 13 of 32 and 1,024 rows are the paper's values for an 8B decoder; scores are the last token's raw q.k, mean over heads",
        confidence="high",
    ),
    Recipe(
        name="lazyllm",
        means="prune-tokens{keep=0.7,0.5,0.3 layers=25%,50%,75% score=last-attention}",
        citation="Fu et al., LazyLLM: Dynamic Token Pruning for Efficient Long Context LLM Inference, 2024",
        note="prefill only, without the revival of pruned tokens; three stages with falling keep, ratios as third parties report them",
        confidence="medium",
    ),
)
"""Prompts that lose tokens on their way."""

DEPTH = (
    Recipe(
        name="calm",
        means="exit-early{layers=25%,50%,75% score=margin threshold=0.9 decay=4.0 steps=512}",
        citation="Schuster et al., Confident Adaptive Language Modeling, NeurIPS 2022",
        note="margin of the two best tokens; score=saturation is the paper's second score. The threshold decays with the tokens read, "
        "which a graph knows, where the paper counts those written. Steps take and return their past (dyncc.decoding.Decode): caches "
        "that are written in place are refused",
        confidence="high",
    ),
    Recipe(
        name="jei-dnn",
        means="exit-early{layers=25%,50%,75% score=gate threshold=0.5}",
        citation="Regol et al., Jointly-Learned Exit and Inference for a Dynamic Neural Network, ICLR 2024",
        needs="trained weights",
        note="file= takes trained gates (dyncc.save_parameters), and maps in front of the model's head, where the authors' exits have "
        "heads of their own; the sharpened distribution is p^2 / sum p^2",
        confidence="medium",
    ),
    Recipe(
        name="stop-exit",
        means="exit-early{layers=25%,50%,75% score=controller threshold=0.9}",
        citation="Sun et al., When Neural Code Completion Models Size up the Situation: Attaining Cheaper and Faster Completion through "
        "Dynamic Model Inference, ICSE 2024",
        needs="trained weights",
        note="file= takes a trained controller; stop= and end= let rows stop, with the end-of-text token as their only choice, where the "
        "authors return a flag; they also leave the first token alone",
        confidence="high",
    ),
    Recipe(
        name="informed-routing",
        means="route-tokens{rate=0.5 fill=affine score=router rule=count}",
        citation="Informed Routing in LLMs: Smarter Token-Level Computation for Faster Inference, 2025",
        needs="fitting",
        note="file= takes what `dyncc fit` (part `units`) wrote: surrogates of whole layers by reduced-rank ridge regression, and "
        "routers by ridge, where the authors train both; rule=threshold for models that answer at all positions",
        confidence="medium",
    ),
    Recipe(
        name="mixture-of-depths",
        means="route-tokens{rate=0.125 fill=carry score=router rule=count weigh=true}",
        citation="Raposo et al., Mixture-of-Depths: Dynamically allocating compute in transformer-based language models, 2024",
        needs="trained weights",
        note="file= takes trained routers (dyncc.save_parameters), layers= every second layer; 12.5 % of the tokens is the authors' "
        "capacity; keys and values are computed for all tokens, where the authors' layers see the chosen ones alone",
        confidence="medium",
    ),
    Recipe(
        name="duo-llm",
        means="route-tokens{rate=0.5 site=mlp fill=small rule=level}",
        citation="Alizadeh et al., Duo-LLM: A Framework for Studying Adaptive Computation in Large Language Models, 2024",
        needs="trained weights",
        note="file= takes small MLPs in the form of the model's own and a router of three logits for each layer "
        "(dyncc.save_parameters); rate= bounds how many tokens of a sequence take the big one, and the others that ask for it "
        "take the small one; attention runs for all",
        confidence="medium",
    ),
    Recipe(
        name="mixture-of-recursions",
        means="route-iterations{keep=1.0,0.67,0.34 rule=count combine=add alpha=0.1}",
        citation="Bae et al., Mixture-of-Recursions: Learning Dynamic Recursive Depths for Adaptive Token-Level Computation, 2025",
        needs="trained weights",
        note="expert choice in 3 recursions, file= takes a trained router for each (dyncc.save_parameters); rule=level alpha=1.0 is "
        "token choice, rule=threshold the authors' rule for decoding. Keys are those of the tokens that run; models whose "
        "recursions read the first one's keys are refused. The authors round capacities down",
        confidence="high",
    ),
    Recipe(
        name="anira",
        means="route-iterations{keep=0.5 rule=level combine=replace}",
        citation="ANIRA, 2026: early and online decisions of per-token depth in a recurrent transformer",
        needs="trained weights",
        note="the early variant: a trained classifier of the state in front of the recurrent core says how often a token runs it; "
        "rule=threshold is the online one, a probability of going on each iteration. keep= bounds how many run; the formulas "
        "are ours, after summaries of the paper",
        confidence="low",
    ),
    Recipe(
        name="think-at-hard",
        means="route-iterations{keep=0.25 rule=threshold threshold=0.9 combine=replace}",
        citation="Think-at-Hard: Selective Latent Iterations to Improve Reasoning Language Models, 2025",
        needs="trained weights",
        note="for models that spell both iterations, adapters of the second one among them; other tokens keep their first state, and "
        "so their first logits. The decider is linear in that state, where the authors' reads four layers and logits; second "
        "logits take the place of the first, where theirs are added; a second iteration that reads keys of both is refused",
        confidence="low",
    ),
    Recipe(
        name="skipdecode",
        means="drop-layers{active=1 warm=1}",
        citation="Del Corro et al., SkipDecode: Autoregressive Skip Decoding with Batching and Caching for Efficient LLM Inference, 2023",
        note="one level: active= layers run, one at the bottom and the others at the top; dyncc.optimize_by_position makes a graph a "
        "level and takes the one of a token's position; the authors fine-tune",
        confidence="high",
    ),
)
"""Tokens that leave layers out."""

RECIPES: tuple[Recipe, ...] = (*PRUNING, *SELECTION, *EVICTION, *DEPTH)
"""Every recipe; the tuple is the list that `dyncc passes` prints."""
