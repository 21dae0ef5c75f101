"""Published systems that choose or drop keys of a cache, as settings of `select-kv` and `evict-kv`."""

from __future__ import annotations

from dyncc.pipeline import Recipe

SELECTION = (
    Recipe(
        name="tokenselect",
        means="select-kv{budget=2688 score=vote share=layer sinks=128 recents=512}",
        citation="Wu et al., TokenSelect: Efficient Long-Context Inference and Length Extrapolation for LLMs via Dynamic Token-Level KV "
        "Cache Selection, 2024",
        note="decoding steps only: 2,048 voted keys between 128 first and 512 last ones; each step selects anew. With dyncc.KVCache, "
        "similar=0.9 is the authors' selection cache: a row goes on with its keys while its query is like the one that chose them",
        confidence="high",
    ),
    Recipe(
        name="sink-window",
        means="select-kv{budget=2048 score=recents share=layer sinks=4 recents=0}",
        citation="Xiao et al., Efficient Streaming Language Models with Attention Sinks, ICLR 2024",
        note="StreamingLLM's choice of keys at their original positions; the cache stays whole, so memory is not bounded",
        confidence="high",
    ),
    Recipe(
        name="quest",
        means="select-kv{budget=1024 score=bound share=head page=16 sinks=4 recents=1 dense=2}",
        citation="Tang et al., Quest: Query-Aware Sparsity for Efficient Long-Context LLM Inference, ICML 2024",
        note="pages of 16 keys by what q.k cannot exceed in them; the first 2 layers read all; the page of the first 4 keys is always "
        "read, which the authors leave to its bound; dyncc.KVCache keeps the bounds of pages. share=any page=8 slack=0.35 is ours: the "
        "heads of a group read the same pages, those that matter most to any of them",
        confidence="high",
    ),
    Recipe(
        name="louiskv",
        means="select-kv{budget=1024 score=mean share=group page=16 sinks=4 recents=32 similar=0.7 cosine=heads compare=step}",
        citation="Wu et al., LouisKV: Efficient KV Cache Retrieval for Long Input-Output Sequences, ICLR 2026",
        note="pages by their mean, chosen anew where a step's queries turn from those of the step before; the authors cluster the "
        "prompt's keys by k-means, cut what is generated at those turns, calibrate the threshold for each model, and hold the keys in "
        "another memory: here pages are 16 keys that follow each other, the threshold is theirs for one model, and all keys stay; for "
        "dyncc.KVCache",
        confidence="medium",
    ),
    Recipe(
        name="actqkv",
        means="select-kv{budget=2048 score=vote share=layer sinks=4 recents=64 density=true}",
        citation="Xiao et al., Activation-aware Probe-Query: Effective Key-Value Retrieval for Long-Context LLMs Inference, 2025",
        note="decoding steps only, where a window is one token and so its own probe: 2,048 voted keys a layer on average, more for "
        "layers whose votes were spread wider at the step before; the formula is ours, after summaries of the paper; prompts, for which "
        "the authors weigh queries by their activation bias, read all; for dyncc.KVCache",
        confidence="low",
    ),
    Recipe(
        name="hisa",
        means="select-kv{budget=2048 score=mean share=group page=64 beam=128 sinks=4 recents=1}",
        citation="Xu et al., HISA: Efficient Hierarchical Indexing for Fine-Grained Sparse Attention, 2026",
        note="pages of 64 by their mean, then the best keys of 128 of them; made for models with a trained indexer, whose place the mean "
        "of q.k over a group of heads takes here; 4 sinks always stay, since the mean of their page does not show them",
        confidence="medium",
    ),
    Recipe(
        name="hip",
        means="select-kv{budget=512 score=middle share=head page=64 branch=2 beam=256 sinks=4 recents=1 dense=3}",
        citation="Lee et al., A Training-free Sub-quadratic Cost Transformer Model Serving Framework With Hierarchically Pruned "
        "Attention, 2024",
        note="spans by the key in their middle, halved from 64 keys to 2; the authors' first spans grow with the length, and they choose "
        "anew every 8 steps only; a key that its neighbours do not resemble may be missed, so 4 sinks always stay",
        confidence="medium",
    ),
    Recipe(
        name="fasa",
        means="select-kv{budget=256 score=pairs share=head pairs=16 sinks=0 recents=0}",
        citation="Wang et al., FASA: Frequency-Aware Sparse Attention, ICLR 2026",
        needs="fitting",
        note="16 of the 64 rotary pairs of a head of width 128; file= takes what dyncc.calibrate_pairs found for the model on a few texts",
        confidence="high",
    ),
    Recipe(
        name="tidaldecode",
        means="select-kv{budget=256 score=logits share=head sinks=0 recents=0 dense=2 layers=2,9 full=true}",
        citation="Yang et al., TidalDecode: Fast and Accurate LLM Decoding with Position Persistent Sparse Attention, ICLR 2025",
        note="layers 0 and 1 read all; layer 2 and the correction layer 9 read all and choose for those behind them",
        confidence="high",
    ),
)
"""Steps that read some keys of a cache that stays whole."""

EVICTION = (
    Recipe(
        name="streamingllm",
        means="evict-kv{budget=2048 score=recents sinks=4 recents=0 every=1}",
        citation="Xiao et al., Efficient Streaming Language Models with Attention Sinks, ICLR 2024",
        note="the first 4 keys and the newest; at their original positions, where the authors count positions in the cache",
        confidence="high",
    ),
    Recipe(
        name="h2o",
        means="evict-kv{budget=1024 score=received recents=512 every=1}",
        citation="Zhang et al., H2O: Heavy-Hitter Oracle for Efficient Generative Inference of Large Language Models, NeurIPS 2023",
        note="half heavy hitters by attention received since they were read, half recent; what is dropped never comes back",
        confidence="high",
    ),
    Recipe(
        name="a2sf",
        means="evict-kv{budget=1024 score=received decay=0.95 recents=16}",
        citation="Jo and Shin, A2SF: Accumulative Attention Scoring with Forgetting Factor for Token Pruning in Transformer Decoder, 2024",
        note="attention received, older rows counting less; chosen once, when the prompt ends",
        confidence="high",
    ),
    Recipe(
        name="keyformer",
        means="evict-kv{budget=1024 score=received recents=307 temperature=1.0 seed=0 every=1}",
        citation="Adnan et al., Keyformer: KV Cache Reduction through Key Tokens Selection for Efficient Generative Inference, MLSys 2024",
        note="as h2o, with seeded Gumbel noise before the softmax; recents are 30 % of the budget; the temperature does not rise",
        confidence="high",
    ),
    Recipe(
        name="snapkv",
        means="evict-kv{budget=1024 score=window window=32 pool=7 recents=32}",
        citation="Li et al., SnapKV: LLM Knows What You are Looking for Before Generation, NeurIPS 2024",
        note="attention of the prompt's last rows, chosen once, when it ends; one choice a key head, where the authors' code copies heads",
        confidence="high",
    ),
    Recipe(
        name="dapq",
        means="evict-kv{budget=1024 score=ahead window=32 pool=7 recents=0}",
        citation="Tian et al., Where Matters More Than What: Decoding-aligned KV Cache Compression via Position-aware Pseudo Queries, 2026",
        note="32 rows behind the prompt ask in the answer's place; they repeat the prompt's last tokens at positions that count on, and "
        "nothing of them is kept; pooled as in snapkv",
        confidence="medium",
    ),
    Recipe(
        name="lookaheadkv",
        means="evict-kv{budget=1024 score=ahead recents=0}",
        citation="Ahn et al., LookaheadKV: Fast and Accurate KV Cache Eviction by Glimpsing into the Future without Generation, ICLR 2026",
        needs="trained weights",
        note="file= takes trained embeddings of rows behind the prompt and adapters that act on those rows alone (dyncc.save_lookahead); "
        "without a file the rows are the prompt's last tokens, as in dapq",
        confidence="high",
    ),
    Recipe(
        name="trim-kv",
        means="evict-kv{budget=512 score=fade recents=0 every=128}",
        citation="Bui et al., Cache What Lasts: Token Retention for Memory-Bounded KV Cache in LLMs (TRIM-KV), 2025",
        needs="trained weights",
        note="file= takes a trained gate for each attention (dyncc.save_gates), by which keys fade with their age; 512 keys and 128 "
        "between two evictions are the authors' values",
        confidence="high",
    ),
    Recipe(
        name="attention-gate",
        means="evict-kv{budget=1024 score=gate recents=1}",
        citation="Zeng et al., In-context KV-Cache Eviction for LLMs via Attention-Gate, 2024",
        needs="trained weights",
        note="file= takes a trained gate for each attention (dyncc.save_attention_gates), a small attention over the whole prompt; every "
        "key head keeps the same number, the best by its gate, where the authors keep those above one half; the prompt itself reads all "
        "its keys, and what is generated stays",
        confidence="medium",
    ),
    Recipe(
        name="tova",
        means="evict-kv{budget=1024 score=window window=1 recents=0 every=1}",
        citation="Oren et al., Transformers are Multi-State RNNs, EMNLP 2024",
        note="the keys that the last token attends to most; one choice a key head",
        confidence="medium",
    ),
)
"""Caches that keep some keys."""
