"""Every mistake has its class, its message, and survives a trip through pickle."""

from __future__ import annotations

import pickle

import pytest
import torch
from tiny import Tiny, inputs

from dyncc import errors
from dyncc.outputs import writable_folder


def _subclasses() -> list[type[errors.DynccUsageError]]:
    return sorted(errors.DynccUsageError.__subclasses__(), key=lambda kind: kind.__name__)


@pytest.mark.parametrize("kind", _subclasses(), ids=lambda kind: kind.__name__)
def test_message_needs_facts_and_keeps_no_placeholder(kind: type[errors.DynccUsageError]) -> None:
    if kind is errors.PipelineSyntaxError:
        error = kind(problem="p", text="a b", position=1)
    else:
        names = {part.split("}")[0].split("!")[0] for part in kind.template.split("{")[1:]}
        error = kind(**{name: f"<{name}>" for name in names})
    assert "{" not in str(error)
    assert isinstance(error, errors.DynccError)
    assert kind.__doc__
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is kind
    assert str(copy) == str(error)


def test_a_missing_fact_is_a_bug_seen_at_once() -> None:
    with pytest.raises(KeyError):
        errors.UnknownPass(name="x")


def test_a_class_without_template_takes_its_message() -> None:
    error = errors.DynccUsageError("no such thing; do {this}")
    assert str(error) == "no such thing; do {this}"
    assert error.facts == {"problem": "no such thing; do {this}"}


def test_caret_stands_under_the_column() -> None:
    error = errors.PipelineSyntaxError(problem="expected a value", text="a{x=\n}", position=4)
    lines = str(error).splitlines()
    assert lines == ["pipeline syntax: expected a value at column 5", "  a{x= }", "      ^"]


def test_near_names_come_best_first_and_only_when_close() -> None:
    known = ["prune-tokens", "drop-repeat-kv"]
    assert errors.near("prune-tokenz", known) == "; did you mean 'prune-tokens'?"
    assert errors.near("quantise", known) == ""


def test_refusals_are_no_usage_errors() -> None:
    assert issubclass(errors.RefusedError, errors.DynccError)
    assert not issubclass(errors.RefusedError, errors.DynccUsageError)


def test_writable_folder_is_made_and_left_empty(tmp_path) -> None:
    folder = writable_folder(tmp_path / "a" / "b")
    assert folder.is_dir()
    assert list(folder.iterdir()) == []


def test_a_folder_below_a_file_is_not_writable(tmp_path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(errors.OutputNotWritable, match=r"cannot write to .*file/sub: Not a directory"):
        writable_folder(tmp_path / "file" / "sub")


@torch.no_grad()
def test_usage_errors_come_out_of_torch_compile_as_they_are() -> None:
    torch._dynamo.reset()
    model = Tiny(kind="encoder", layers=2).build()
    options = {"passes": "prune-tokens{layers=7}", "engine": "reference", "evidence": "off"}
    with pytest.raises(errors.LayerOutOfRange, match="layer 7 is out of range: the model's 2 layers are numbered 0 to 1") as raised:
        torch.compile(model, backend="dyncc", options=options)(*inputs(Tiny()))
    assert raised.type.__name__ == "LayerOutOfRange"
