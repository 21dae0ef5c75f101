"""Option values: what is read, what is refused and with which words, and that texts round-trip."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dyncc import errors, options
from dyncc.options import Keep, Layers


@dataclass(frozen=True)
class Everything:
    keep: Keep = 0.7
    layers: Layers = Layers("3")
    site: Literal["layer", "attention"] = "layer"
    fuse: bool = False
    window: int = 32
    scale: float = 0.5
    fill: str = "carry"
    cap: int | None = None

    def __post_init__(self) -> None:
        options.settle(self)


def read(name: str, text: str) -> object:
    return options.convert(name, options.types_of(Everything)[name], text)


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("keep", "0.7", 0.7),
        ("keep", "1.0", 1.0),
        ("keep", "1024", 1024),
        ("keep", "0.7,0.5,64", (0.7, 0.5, 64)),
        ("layers", "3,6,9", Layers("3,6,9")),
        ("site", "attention", "attention"),
        ("fuse", "true", True),
        ("window", "-4", -4),
        ("scale", "2", 2.0),
        ("cap", "none", None),
        ("cap", "7", 7),
    ],
)
def test_texts_are_read_and_printed_back(name: str, text: str, value: object) -> None:
    got = read(name, text)
    assert got == value
    assert type(got) is type(value)
    assert read(name, options.show(got)) == value


@pytest.mark.parametrize("text", ["0", "0.0", "-3", "1.5", "nan", "inf", "0.7,2.5"])
def test_keep_out_of_range(text: str) -> None:
    with pytest.raises(errors.KeepOutOfRange, match="use a ratio above 0.0 up to 1.0, or a whole number of tokens"):
        read("keep", text)


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("keep", "lots", "expected a number"),
        ("site", "attentoin", r"choose one of layer, attention; did you mean 'attention'\?"),
        ("fuse", "yes", "expected true or false"),
        ("window", "1.5", "expected a whole number"),
        ("scale", "inf", "expected a finite number"),
        ("layers", "x", "write 3 or 3,6,9"),
        ("layers", "1:9:0", "names no layer"),
        ("layers", "5:5", "names no layer"),
        ("layers", "0:99999999", "names no layer"),
        ("layers", "6,3", "must rise"),
        ("layers", "3,50%", "not both"),
        ("layers", "120%", "names no layer"),
    ],
)
def test_bad_values_say_what_was_expected(name: str, text: str, words: str) -> None:
    with pytest.raises(errors.BadOptionValue, match=words):
        read(name, text)


def test_keep_of_one_asks_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(options, "_asked", set())
    with pytest.warns(UserWarning, match=r"keep=1 keeps 1 token; did you mean 1\.0\?"):
        assert read("keep", "1") == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert read("keep", "1") == 1
        assert read("keep", "1.0") == 1.0


def test_layers_resolve_against_the_depth() -> None:
    assert Layers("2:11:3").resolve(12) == (2, 5, 8)
    assert Layers("2:4").resolve(4) == (2, 3)
    assert Layers(" 3 , 6 ").resolve(7) == (3, 6)
    assert Layers("25%,50%,75%,100%").resolve(30) == (7, 15, 22, 29)
    assert len(Layers("2:11:3")) == 3
    with pytest.raises(errors.LayerOutOfRange, match="layer 13 is out of range: the model's 6 layers are numbered 0 to 5"):
        Layers("2,13").resolve(6)


def test_schedule_pairs_layers_with_keeps() -> None:
    assert Layers("3,6").schedule(0.5, 12) == ((3, 0.5), (6, 0.5))
    assert Layers("3,6").schedule((0.5, 64), 12) == ((3, 0.5), (6, 64))
    assert Layers("25%,50%,75%").schedule((0.7, 0.5, 0.3), 2) == ((0, 0.7), (1, 0.3))
    with pytest.raises(errors.BadOptionValue, match="3 values for 2 layers; give one for all or one per layer"):
        Layers("3,6").schedule((0.7, 0.5, 0.3), 12)


def test_passes_built_in_python_are_settled() -> None:
    built = Everything(keep=[0.5, 0.25], layers=[3, 6])  # type: ignore[arg-type]
    assert built.keep == (0.5, 0.25)
    assert built.layers == Layers("3,6")
    assert Everything(layers=4).layers == Layers("4")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("given_", "error"),
    [
        ({"keep": 0}, errors.KeepOutOfRange),
        ({"keep": True}, errors.KeepOutOfRange),
        ({"keep": "x"}, errors.KeepOutOfRange),
        ({"keep": (0.5, 0.5)}, errors.BadOptionValue),
        ({"site": "nowhere"}, errors.BadOptionValue),
        ({"window": "x"}, errors.BadOptionValue),
        ({"window": 1.5}, errors.BadOptionValue),
        ({"fill": "two words"}, errors.BadOptionValue),
    ],
)
def test_mistakes_in_python_are_usage_errors_too(given_: dict[str, object], error: type[Exception]) -> None:
    with pytest.raises(error):
        Everything(**given_)  # type: ignore[arg-type]


def test_unknown_engine_and_evidence() -> None:
    assert options.check_engine("reference") == "reference"
    with pytest.raises(errors.UnknownEngine, match=r"unknown engine 'inductr'; did you mean 'inductor'\?; choose one of auto"):
        options.check_engine("inductr")
    with pytest.raises(errors.UnknownEvidence, match="unknown evidence 'full'; choose one of off, numeric, timed"):
        options.check_evidence("full")


@given(st.floats(0, 1, exclude_min=True) | st.integers(2, 10**9))
def test_keep_round_trips(value: float | int) -> None:
    assert read("keep", options.show(value)) == value


@given(st.lists(st.integers(0, 99), min_size=1, max_size=5, unique=True), st.integers(100, 200))
def test_layer_lists_resolve_to_themselves(layers: list[int], depth: int) -> None:
    layers = sorted(layers)
    assert Layers(",".join(map(str, layers))).resolve(depth) == tuple(layers)
