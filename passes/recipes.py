"""Published systems as settings of a pass: a recipe names the parts, and can be used wherever a pass name can.

`evit{keep=0.5}` is the pass of the recipe `evit` with its options, `keep` replaced.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal


@dataclass(frozen=True)
class Recipe:
    """A system: the pass it configures, the texts of that pass's options, and where it was published."""

    name: str
    pass_name: str
    options: Mapping[str, str]
    citation: str
    needs: Literal["training-free", "fitting", "trained weights"]
    note: str
    confidence: Literal["high", "medium", "low"]

    def __post_init__(self) -> None:
        object.__setattr__(self, "options", MappingProxyType(dict(self.options)))


EVIT = Recipe(
    name="evit",
    pass_name="prune-tokens",
    options={"keep": "0.7", "layers": "3,6,9", "score": "cls-attention", "site": "attention", "fuse": "true"},
    citation="Liang et al., Not All Patches are What You Need: Expediting Vision Transformers via Token Reorganizations, ICLR 2022",
    needs="training-free",
    note="made for encoders with a class token; the authors fine-tune for their best figures; dropped rows become one fused row",
    confidence="high",
)

PROMPTDISTILL = Recipe(
    name="promptdistill",
    pass_name="prune-tokens",
    options={"keep": "1024", "layers": "13", "score": "last-logits"},
    citation="Jin et al., PromptDistill: Query-based Selective Token Retention in Intermediate Layers for Efficient LLM Inference, 2025",
    needs="training-free",
    note="layer 13 of 32 and 1,024 rows are the paper's values for an 8B decoder; scores are the last token's raw q.k, mean over heads",
    confidence="high",
)

LAZYLLM = Recipe(
    name="lazyllm",
    pass_name="prune-tokens",
    options={"keep": "0.7,0.5,0.3", "layers": "25%,50%,75%", "score": "last-attention"},
    citation="Fu et al., LazyLLM: Dynamic Token Pruning for Efficient Long Context LLM Inference, 2024",
    needs="training-free",
    note="prefill only, without the revival of pruned tokens; three stages with falling keep, ratios as third parties report them",
    confidence="medium",
)

TOKENSELECT = Recipe(
    name="tokenselect",
    pass_name="select-kv",
    options={"budget": "2688", "score": "vote", "share": "layer", "sinks": "128", "recents": "512"},
    citation="Wu et al., TokenSelect: Efficient Long-Context Inference and Length Extrapolation for LLMs via Dynamic Token-Level KV Cache "
    "Selection, 2024",
    needs="training-free",
    note="decoding steps only: 2,048 voted keys between 128 first and 512 last ones; each step selects anew. With dyncc.KVCache, "
    "similar=0.9 is the authors' selection cache: a row goes on with its keys while its query is like the one that chose them",
    confidence="high",
)

SINK_WINDOW = Recipe(
    name="sink-window",
    pass_name="select-kv",
    options={"budget": "2048", "score": "recents", "share": "layer", "sinks": "4", "recents": "0"},
    citation="Xiao et al., Efficient Streaming Language Models with Attention Sinks, ICLR 2024",
    needs="training-free",
    note="StreamingLLM's choice of keys at their original positions; the cache stays whole, so memory is not bounded",
    confidence="high",
)

STREAMINGLLM = Recipe(
    name="streamingllm",
    pass_name="evict-kv",
    options={"budget": "2048", "score": "recents", "sinks": "4", "recents": "0", "every": "1"},
    citation="Xiao et al., Efficient Streaming Language Models with Attention Sinks, ICLR 2024",
    needs="training-free",
    note="the first 4 keys and the newest; at their original positions, where the authors count positions in the cache",
    confidence="high",
)

H2O = Recipe(
    name="h2o",
    pass_name="evict-kv",
    options={"budget": "1024", "score": "received", "recents": "512", "every": "1"},
    citation="Zhang et al., H2O: Heavy-Hitter Oracle for Efficient Generative Inference of Large Language Models, NeurIPS 2023",
    needs="training-free",
    note="half heavy hitters by attention received since they were read, half recent; what is dropped never comes back",
    confidence="high",
)

A2SF = Recipe(
    name="a2sf",
    pass_name="evict-kv",
    options={"budget": "1024", "score": "received", "decay": "0.95", "recents": "16"},
    citation="Jo and Shin, A2SF: Accumulative Attention Scoring with Forgetting Factor for Token Pruning in Transformer Decoder, 2024",
    needs="training-free",
    note="attention received, older rows counting less; chosen once, when the prompt ends",
    confidence="high",
)

KEYFORMER = Recipe(
    name="keyformer",
    pass_name="evict-kv",
    options={"budget": "1024", "score": "received", "recents": "307", "temperature": "1.0", "seed": "0", "every": "1"},
    citation="Adnan et al., Keyformer: KV Cache Reduction through Key Tokens Selection for Efficient Generative Inference, MLSys 2024",
    needs="training-free",
    note="as h2o, with seeded Gumbel noise before the softmax; recents are 30 % of the budget; the temperature does not rise",
    confidence="high",
)

SNAPKV = Recipe(
    name="snapkv",
    pass_name="evict-kv",
    options={"budget": "1024", "score": "window", "window": "32", "pool": "7", "recents": "32"},
    citation="Li et al., SnapKV: LLM Knows What You are Looking for Before Generation, NeurIPS 2024",
    needs="training-free",
    note="attention of the prompt's last rows, chosen once, when it ends; one choice a key head, where the authors' code copies heads",
    confidence="high",
)

DAPQ = Recipe(
    name="dapq",
    pass_name="evict-kv",
    options={"budget": "1024", "score": "ahead", "window": "32", "pool": "7", "recents": "0"},
    citation="Tian et al., Where Matters More Than What: Decoding-aligned KV Cache Compression via Position-aware Pseudo Queries, 2026",
    needs="training-free",
    note="32 rows behind the prompt ask in the answer's place; they repeat the prompt's last tokens at positions that count on, and "
    "nothing of them is kept; pooled as in snapkv",
    confidence="medium",
)

LOOKAHEADKV = Recipe(
    name="lookaheadkv",
    pass_name="evict-kv",
    options={"budget": "1024", "score": "ahead", "recents": "0"},
    citation="Ahn et al., LookaheadKV: Fast and Accurate KV Cache Eviction by Glimpsing into the Future without Generation, ICLR 2026",
    needs="trained weights",
    note="file= takes trained embeddings of rows behind the prompt and adapters that act on those rows alone (dyncc.save_lookahead); "
    "without a file the rows are the prompt's last tokens, as in dapq",
    confidence="high",
)

TRIM_KV = Recipe(
    name="trim-kv",
    pass_name="evict-kv",
    options={"budget": "512", "score": "fade", "recents": "0", "every": "128"},
    citation="Bui et al., Cache What Lasts: Token Retention for Memory-Bounded KV Cache in LLMs (TRIM-KV), 2025",
    needs="trained weights",
    note="file= takes a trained gate for each attention (dyncc.save_gates), by which keys fade with their age; 512 keys and 128 between "
    "two evictions are the authors' values",
    confidence="high",
)

ATTENTION_GATE = Recipe(
    name="attention-gate",
    pass_name="evict-kv",
    options={"budget": "1024", "score": "gate", "recents": "1"},
    citation="Zeng et al., In-context KV-Cache Eviction for LLMs via Attention-Gate, 2024",
    needs="trained weights",
    note="file= takes a trained gate for each attention (dyncc.save_attention_gates), a small attention over the whole prompt; every key "
    "head keeps the same number, the best by its gate, where the authors keep those above one half; the prompt itself reads all its keys, "
    "and what is generated stays",
    confidence="medium",
)

TOVA = Recipe(
    name="tova",
    pass_name="evict-kv",
    options={"budget": "1024", "score": "window", "window": "1", "recents": "0", "every": "1"},
    citation="Oren et al., Transformers are Multi-State RNNs, EMNLP 2024",
    needs="training-free",
    note="the keys that the last token attends to most; one choice a key head",
    confidence="medium",
)

QUEST = Recipe(
    name="quest",
    pass_name="select-kv",
    options={"budget": "1024", "score": "bound", "share": "head", "page": "16", "sinks": "4", "recents": "1", "dense": "2"},
    citation="Tang et al., Quest: Query-Aware Sparsity for Efficient Long-Context LLM Inference, ICML 2024",
    needs="training-free",
    note="pages of 16 keys by what q.k cannot exceed in them; the first 2 layers read all; the page of the first 4 keys is always read, "
    "which the authors leave to its bound; dyncc.KVCache keeps the bounds of pages",
    confidence="high",
)

LOUISKV = Recipe(
    name="louiskv",
    pass_name="select-kv",
    options={
        "budget": "1024", "score": "mean", "share": "group", "page": "16", "sinks": "4", "recents": "32", "similar": "0.7",
        "cosine": "heads", "compare": "step",
    },
    citation="Wu et al., LouisKV: Efficient KV Cache Retrieval for Long Input-Output Sequences, ICLR 2026",
    needs="training-free",
    note="pages by their mean, chosen anew where a step's queries turn from those of the step before; the authors cluster the prompt's "
    "keys by k-means, cut what is generated at those turns, calibrate the threshold for each model, and hold the keys in another memory: "
    "here pages are 16 keys that follow each other, the threshold is theirs for one model, and all keys stay; for dyncc.KVCache",
    confidence="medium",
)

ACTQKV = Recipe(
    name="actqkv",
    pass_name="select-kv",
    options={"budget": "2048", "score": "vote", "share": "layer", "sinks": "4", "recents": "64", "density": "true"},
    citation="Xiao et al., Activation-aware Probe-Query: Effective Key-Value Retrieval for Long-Context LLMs Inference, 2025",
    needs="training-free",
    note="decoding steps only, where a window is one token and so its own probe: 2,048 voted keys a layer on average, more for layers "
    "whose votes were spread wider at the step before; the formula is ours, after summaries of the paper; prompts, for which the authors "
    "weigh queries by their activation bias, read all; for dyncc.KVCache",
    confidence="low",
)

HISA = Recipe(
    name="hisa",
    pass_name="select-kv",
    options={
        "budget": "2048", "score": "mean", "share": "group", "page": "64", "beam": "128", "sinks": "4", "recents": "1",
    },
    citation="Xu et al., HISA: Efficient Hierarchical Indexing for Fine-Grained Sparse Attention, 2026",
    needs="training-free",
    note="pages of 64 by their mean, then the best keys of 128 of them; made for models with a trained indexer, whose place the mean of "
    "q.k over a group of heads takes here; 4 sinks always stay, since the mean of their page does not show them",
    confidence="medium",
)

FASA = Recipe(
    name="fasa",
    pass_name="select-kv",
    options={"budget": "256", "score": "pairs", "share": "head", "pairs": "16", "sinks": "0", "recents": "0"},
    citation="Wang et al., FASA: Frequency-Aware Sparse Attention, ICLR 2026",
    needs="fitting",
    note="16 of the 64 rotary pairs of a head of width 128; file= takes what dyncc.calibrate_pairs found for the model on a few texts",
    confidence="high",
)

HIP = Recipe(
    name="hip",
    pass_name="select-kv",
    options={
        "budget": "512", "score": "middle", "share": "head", "page": "64", "branch": "2", "beam": "256", "sinks": "4", "recents": "1",
        "dense": "3",
    },
    citation="Lee et al., A Training-free Sub-quadratic Cost Transformer Model Serving Framework With Hierarchically Pruned "
    "Attention, 2024",
    needs="training-free",
    note="spans by the key in their middle, halved from 64 keys to 2; the authors' first spans grow with the length, and they choose anew "
    "every 8 steps only; a key that its neighbours do not resemble may be missed, so 4 sinks always stay",
    confidence="medium",
)

TIDALDECODE = Recipe(
    name="tidaldecode",
    pass_name="select-kv",
    options={
        "budget": "256", "score": "logits", "share": "head", "sinks": "0", "recents": "0", "dense": "2", "layers": "2,9", "full": "true",
    },
    citation="Yang et al., TidalDecode: Fast and Accurate LLM Decoding with Position Persistent Sparse Attention, ICLR 2025",
    needs="training-free",
    note="layers 0 and 1 read all; layer 2 and the correction layer 9 read all and choose for those behind them",
    confidence="high",
)

CALM = Recipe(
    name="calm",
    pass_name="exit-early",
    options={"layers": "25%,50%,75%", "score": "margin", "threshold": "0.9", "decay": "4.0", "steps": "512"},
    citation="Schuster et al., Confident Adaptive Language Modeling, NeurIPS 2022",
    needs="training-free",
    note="margin of the two best tokens; score=saturation is the paper's second score. The threshold decays with the tokens read, which a "
    "graph knows, where the paper counts those written. Steps take and return their past (dyncc.decoding.Decode): "
    "caches that are written in place are refused",
    confidence="high",
)

JEI_DNN = Recipe(
    name="jei-dnn",
    pass_name="exit-early",
    options={"layers": "25%,50%,75%", "score": "gate", "threshold": "0.5"},
    citation="Regol et al., Jointly-Learned Exit and Inference for a Dynamic Neural Network, ICLR 2024",
    needs="trained weights",
    note="file= takes trained gates (dyncc.save_parameters), and maps in front of the model's head, where the authors' exits have heads of "
    "their own; the sharpened distribution is p^2 / sum p^2",
    confidence="medium",
)

STOP_EXIT = Recipe(
    name="stop-exit",
    pass_name="exit-early",
    options={"layers": "25%,50%,75%", "score": "controller", "threshold": "0.9"},
    citation="Sun et al., When Neural Code Completion Models Size up the Situation: Attaining Cheaper and Faster Completion through "
    "Dynamic Model Inference, ICSE 2024",
    needs="trained weights",
    note="file= takes a trained controller; stop= and end= let rows stop, with the end-of-text token as their only choice, where the "
    "authors return a flag; they also leave the first token alone",
    confidence="high",
)

INFORMED_ROUTING = Recipe(
    name="informed-routing",
    pass_name="route-tokens",
    options={"rate": "0.5", "fill": "affine", "score": "router", "rule": "count"},
    citation="Informed Routing in LLMs: Smarter Token-Level Computation for Faster Inference, 2025",
    needs="fitting",
    note="file= takes what `dyncc fit` (part `units`) wrote: surrogates of whole layers by reduced-rank ridge regression, and routers by "
    "ridge, where the authors train both; rule=threshold for models that answer at all positions",
    confidence="medium",
)

MIXTURE_OF_DEPTHS = Recipe(
    name="mixture-of-depths",
    pass_name="route-tokens",
    options={"rate": "0.125", "fill": "carry", "score": "router", "rule": "count", "weigh": "true"},
    citation="Raposo et al., Mixture-of-Depths: Dynamically allocating compute in transformer-based language models, 2024",
    needs="trained weights",
    note="file= takes trained routers (dyncc.save_parameters), layers= every second layer; 12.5 % of the tokens is the authors' capacity; "
    "keys and values are computed for all tokens, where the authors' layers see the chosen ones alone",
    confidence="medium",
)

DUO_LLM = Recipe(
    name="duo-llm",
    pass_name="route-tokens",
    options={"rate": "0.5", "site": "mlp", "fill": "small", "rule": "level"},
    citation="Alizadeh et al., Duo-LLM: A Framework for Studying Adaptive Computation in Large Language Models, 2024",
    needs="trained weights",
    note="file= takes small MLPs in the form of the model's own and a router of three logits for each layer (dyncc.save_parameters); rate= "
    "bounds how many tokens of a sequence take the big one, and the others that ask for it take the small one; attention runs for all",
    confidence="medium",
)

MIXTURE_OF_RECURSIONS = Recipe(
    name="mixture-of-recursions",
    pass_name="route-iterations",
    options={"keep": "1.0,0.67,0.34", "rule": "count", "combine": "add", "alpha": "0.1"},
    citation="Bae et al., Mixture-of-Recursions: Learning Dynamic Recursive Depths for Adaptive Token-Level Computation, 2025",
    needs="trained weights",
    note="expert choice in 3 recursions, file= takes a trained router for each (dyncc.save_parameters); rule=level alpha=1.0 is token "
    "choice, rule=threshold the authors' rule for decoding. Keys are those of the tokens that run; models whose recursions read the first "
    "one's keys are refused. The authors round capacities down",
    confidence="high",
)

ANIRA = Recipe(
    name="anira",
    pass_name="route-iterations",
    options={"keep": "0.5", "rule": "level", "combine": "replace"},
    citation="ANIRA, 2026: early and online decisions of per-token depth in a recurrent transformer",
    needs="trained weights",
    note="the early variant: a trained classifier of the state in front of the recurrent core says how often a token runs it; "
    "rule=threshold is the online one, a probability of going on each iteration. keep= bounds how many run; the formulas are ours, after "
    "summaries of the paper",
    confidence="low",
)

THINK_AT_HARD = Recipe(
    name="think-at-hard",
    pass_name="route-iterations",
    options={"keep": "0.25", "rule": "threshold", "threshold": "0.9", "combine": "replace"},
    citation="Think-at-Hard: Selective Latent Iterations to Improve Reasoning Language Models, 2025",
    needs="trained weights",
    note="for models that spell both iterations, adapters of the second one among them; other tokens keep their first state, and so their "
    "first logits. The decider is linear in that state, where the authors' reads four layers and logits; second logits take the place of "
    "the first, where theirs are added; a second iteration that reads keys of both is refused",
    confidence="low",
)

SKIPDECODE = Recipe(
    name="skipdecode",
    pass_name="drop-layers",
    options={"active": "1", "warm": "1"},
    citation="Del Corro et al., SkipDecode: Autoregressive Skip Decoding with Batching and Caching for Efficient LLM Inference, 2023",
    needs="training-free",
    note="one level: active= layers run, one at the bottom and the others at the top; dyncc.optimize_by_position makes a graph a level and "
    "takes the one of a token's position; the authors fine-tune",
    confidence="high",
)

RECIPES: tuple[Recipe, ...] = (
    EVIT, PROMPTDISTILL, LAZYLLM, TOKENSELECT, SINK_WINDOW, QUEST, LOUISKV, ACTQKV, HISA, HIP, FASA, TIDALDECODE, STREAMINGLLM, H2O, A2SF,
    KEYFORMER, SNAPKV, DAPQ, LOOKAHEADKV, TRIM_KV, ATTENTION_GATE, TOVA, CALM, JEI_DNN, STOP_EXIT, INFORMED_ROUTING,
    MIXTURE_OF_DEPTHS, DUO_LLM, MIXTURE_OF_RECURSIONS, ANIRA, THINK_AT_HARD, SKIPDECODE,
)
"""Every recipe; the tuple is the list that `dyncc passes` prints."""
