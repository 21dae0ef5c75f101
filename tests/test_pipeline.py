"""Pipeline texts: parsing, building, printing back, and the mistakes a user can make in them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dyncc import errors, options, pipeline
from dyncc.options import Keep, Layers
from dyncc.passes.recipes import RECIPES
from dyncc.pipeline import Recipe

SCORES = ("auto", "cls-attention", "last-attention", "last-logits", "hidden-norm", "random")


@dataclass(frozen=True)
class Prune:
    name: ClassVar[str] = "prune"
    keep: Keep = 0.7
    layers: Layers = Layers("3")
    score: Literal["auto", "cls-attention", "last-attention", "last-logits", "hidden-norm", "random"] = "auto"
    fuse: bool = False
    window: int = 32


@dataclass(frozen=True)
class Tidy:
    name: ClassVar[str] = "tidy"


RECIPE = Recipe("half", "prune{keep=0.5 layers=25%,50%}", "Someone, 2020", "", "high")
REGISTRY = pipeline.Registry((("tidy", lambda: Tidy), ("prune", lambda: Prune)), (RECIPE,), ("tidy",))


def build(text: str | None) -> tuple[object, ...]:
    return pipeline.build(text, REGISTRY)


def test_no_text_is_exact_and_empty_text_is_nothing() -> None:
    assert build(None) == (Tidy(),)
    assert build("") == build(" , ") == ()


def test_names_options_and_separators() -> None:
    wanted = (Prune(keep=0.5, layers=Layers("3,6,9")), Tidy())
    assert build("prune{keep=0.5 layers=3,6,9} tidy") == wanted
    assert build("  prune { keep = 0.5\n layers = 3, 6 ,9 },tidy,") == wanted
    assert build("prune{keep=0.5, layers=3,6,9},\ttidy") == wanted


def test_calls_know_where_they_stand() -> None:
    text = " tidy, prune{keep=0.5} "
    assert [text[call.start : call.end] for call in pipeline.parse(text)] == ["tidy", "prune{keep=0.5}"]


def test_a_recipe_is_a_name_like_any_other() -> None:
    assert build("half") == (Prune(keep=0.5, layers=Layers("25%,50%")),)
    assert build("half{keep=64 fuse=true}") == (Prune(keep=64, layers=Layers("25%,50%"), fuse=True),)
    assert pipeline.render(build("half")) == "prune{keep=0.5 layers=25%,50%}"


def test_defaults_are_not_printed() -> None:
    assert pipeline.render((Prune(keep=0.7), Tidy())) == "prune tidy"


@pytest.mark.parametrize(
    ("text", "problem", "column"),
    [
        ("prune{", "this brace is never closed", 6),
        ("prune{keep=0.5 tidy", "expected '=' after 'tidy'", 20),
        ("prune{keep}", "expected '=' after 'keep'", 11),
        ("prune{keep=}", "expected a value for 'keep'", 12),
        ("prune{keep=1.0 keep=0.5}", "option 'keep' is given twice", 16),
        ("prune}", "unexpected '}'", 6),
        ("tidy{}tidy", "unexpected 't'", 7),
        ("{keep=0.5}", "expected the name of a pass", 1),
        ("tidy =", "expected the name of a pass", 6),
        ("prune{=0.5}", "expected the name of an option", 7),
    ],
)
def test_syntax_errors_point_at_the_column(text: str, problem: str, column: int) -> None:
    with pytest.raises(errors.PipelineSyntaxError) as caught:
        build(text)
    first, shown, caret = str(caught.value).splitlines()
    assert first == f"pipeline syntax: {problem} at column {column}"
    assert shown == f"  {text}"
    assert caret.index("^") == 2 + column - 1


@pytest.mark.parametrize(
    ("text", "error", "words"),
    [
        ("prun", errors.UnknownPass, r"unknown pass 'prun'; did you mean 'prune'\?"),
        ("zzz", errors.UnknownPass, r"unknown pass 'zzz' \(`dyncc passes` lists all of them\)"),
        ("prune{kep=0.5}", errors.UnknownOption, r"prune has no option 'kep'; did you mean 'keep'\? \(its options: keep, layers"),
        ("tidy{keep=0.5}", errors.UnknownOption, r"tidy has no option 'keep' \(its options: none\)"),
        ("prune{score=cls-atention}", errors.BadOptionValue, "did you mean 'cls-attention'"),
        ("prune{keep=0}", errors.KeepOutOfRange, "keep=0 is out of range"),
        ("half{keep=0.5,0.5,0.5}", errors.BadOptionValue, "3 values for 2 layers"),
    ],
)
def test_mistakes_name_what_was_meant(text: str, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        build(text)


def test_two_owners_of_one_name_clash() -> None:
    twice = (("tidy", lambda: Tidy), ("tidy", lambda: Prune))
    with pytest.raises(errors.DuplicatePass, match="'tidy' is claimed by a pass and by a pass"):
        pipeline.Registry(twice)
    with pytest.raises(errors.DuplicatePass, match="'half' is claimed by a recipe of prune and by a recipe of prune"):
        pipeline.Registry((), (RECIPE, RECIPE))


def test_the_shipped_registry_is_consistent() -> None:
    registry = pipeline.default_registry()
    assert registry.names()[:5] == ("fuse-attention", "simplify-mask", "slice-last-token", "drop-repeat-kv", "fuse-gated-attention")
    kinds = {
        "prune-tokens": {"evit", "promptdistill", "lazyllm"},
        "select-kv": {"tokenselect", "quest", "hisa", "hip", "fasa", "louiskv", "actqkv", "tidaldecode", "sink-window"},
        "evict-kv": {"streamingllm", "h2o", "a2sf", "keyformer", "snapkv", "dapq", "lookaheadkv", "trim-kv", "attention-gate", "tova"},
        "exit-early": {"calm", "jei-dnn", "stop-exit"},
        "drop-layers": {"skipdecode"},
        "route-tokens": {"informed-routing", "mixture-of-depths", "duo-llm"},
        "route-iterations": {"mixture-of-recursions", "anira", "think-at-hard"},
    }
    assert {kind: {r.name for r in RECIPES if r.pass_name == kind} for kind in kinds} == kinds and len(RECIPES) == 32
    assert all(recipe.pass_name in registry.names() and recipe.citation for recipe in RECIPES)
    assert set(registry.exact) <= set(registry.names())


words = st.from_regex(r"[a-z][a-z0-9-]{0,8}", fullmatch=True)
values = st.lists(st.from_regex(r"[a-z0-9.:%+-]{1,6}", fullmatch=True), min_size=1, max_size=3).map(",".join)
calls = st.builds(pipeline.Call, words, st.dictionaries(words, values, max_size=3))


@given(st.lists(calls, max_size=4))
def test_any_calls_print_and_parse_back(given_calls: list[pipeline.Call]) -> None:
    text = pipeline.unparse(given_calls)
    assert pipeline.parse(text) == tuple(given_calls)
    assert pipeline.unparse(pipeline.parse(text)) == text


@given(st.text(alphabet="ab{}=,. 1\n", max_size=30))
def test_any_text_parses_or_is_a_syntax_error(text: str) -> None:
    try:
        parsed = pipeline.parse(text)
    except errors.PipelineSyntaxError:
        return
    assert pipeline.parse(pipeline.unparse(parsed)) == parsed


keeps = st.floats(0.01, 1.0) | st.integers(2, 5000)
rising = st.lists(st.integers(0, 40), min_size=1, max_size=4, unique=True).map(sorted)
layer_lists = rising.map(lambda found: Layers(options.show(tuple(found))))
prunes = st.builds(Prune, keep=keeps, layers=layer_lists, score=st.sampled_from(SCORES), fuse=st.booleans(), window=st.integers(-5, 99))


@given(st.lists(prunes | st.just(Tidy()), max_size=4).map(tuple))
def test_any_passes_print_and_build_back(passes: tuple[object, ...]) -> None:
    text = pipeline.render(passes)
    assert build(text) == passes
    assert pipeline.render(build(text)) == text
