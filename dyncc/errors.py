"""One class per mistake a user can make; each message says what is wrong and what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import ClassVar


class DynccError(Exception):
    """Everything dyncc raises on purpose derives from this."""


class RefusedError(DynccError):
    """A pass refused, an engine fell back or a check failed while `strict` was asked for."""


class NotTaken(DynccError):
    """An engine does not take a graph; the message says why. Another engine runs it then, or it is refused under `strict`."""


class DynccUsageError(DynccError):
    """A mistake in a text, option, range, path or engine name: always raised, never swallowed.

    A subclass holds its message as `template`; the facts are given by keyword and stay readable on the error. With no
    template of its own a class takes its whole message as the one positional argument.

    >>> str(UnknownEngine(name="tensorrt", near="", known="auto, inductor, reference"))
    "unknown engine 'tensorrt'; choose one of auto, inductor, reference"
    """

    template: ClassVar[str] = "{problem}"

    def __init__(self, problem: str | None = None, /, **facts: object) -> None:
        if problem is not None:
            facts["problem"] = problem
        self.facts = facts
        super().__init__(self.template.format(**facts))

    def __reduce__(self) -> tuple[object, ...]:
        return _rebuild, (type(self), self.facts)


def _rebuild(kind: type[DynccUsageError], facts: dict[str, object]) -> DynccUsageError:
    return kind(**facts)


def near(name: str, known: Iterable[str]) -> str:
    """The words that suggest what was meant, or nothing.

    >>> near("prune-token", ["prune-tokens", "slice-last-token"])
    "; did you mean 'prune-tokens'?"
    >>> near("xyz", ["prune-tokens"])
    ''
    """
    matches = difflib.get_close_matches(name, sorted(known), n=3, cutoff=0.6)
    if not matches:
        return ""
    return "; did you mean " + " or ".join(repr(match) for match in matches) + "?"


class UnknownPass(DynccUsageError):
    """A pipeline names a pass or recipe that does not exist."""

    template = "unknown pass {name!r}{near} (`dyncc passes` lists all of them)"


class DuplicatePass(DynccUsageError):
    """Two passes or recipes claim one name."""

    template = "the name {name!r} is claimed by {first} and by {second}; rename one of them"


class UnknownOption(DynccUsageError):
    """A pass is given an option it does not have."""

    template = "{owner} has no option {name!r}{near} (its options: {known})"


class BadOptionValue(DynccUsageError):
    """An option's value has the wrong form."""

    template = "{option}={value} is not valid: {problem}"


class KeepOutOfRange(DynccUsageError):
    """`keep` is neither a ratio in (0, 1] nor a count of at least 1."""

    template = "keep={value} is out of range: use a ratio above 0.0 up to 1.0, or a whole number of tokens from 1 up"


class LayerOutOfRange(DynccUsageError):
    """A layer number that the model does not have."""

    template = "layer {layer} is out of range: the model's {count} layers are numbered 0 to {last}"


class PipelineSyntaxError(DynccUsageError):
    """A pipeline text that cannot be read; the message shows the place with a caret."""

    template = "pipeline syntax: {problem} at column {column}\n  {text}\n  {caret}"

    def __init__(self, *, problem: str, text: str, position: int) -> None:
        shown = "".join(" " if c.isspace() else c for c in text)
        super().__init__(problem=problem, text=shown, column=position + 1, caret=" " * position + "^")
        self._given = {"problem": problem, "text": text, "position": position}

    def __reduce__(self) -> tuple[object, ...]:
        return _rebuild, (type(self), self._given)


class UnknownEngine(DynccUsageError):
    """An engine name that dyncc does not know."""

    template = "unknown engine {name!r}{near}; choose one of {known}"


class UnknownEvidence(DynccUsageError):
    """An evidence level that dyncc does not know."""

    template = "unknown evidence {name!r}{near}; choose one of {known}"


class UnknownDevice(DynccUsageError):
    """A device that PyTorch does not have here, or on which nothing is computed."""

    template = "no device {name!r} here ({problem}); choose one of {known}"


class ModelNotFound(DynccUsageError):
    """MODEL names nothing that exists."""

    template = "model {name!r} not found: {problem}"


class FactoryRaised(DynccUsageError):
    """The user's factory, or the module it lives in, raised."""

    template = "{name} raised {error}"


class FactoryReturned(DynccUsageError):
    """The user's factory returned something that is not a model with inputs."""

    template = "{name} returned {got}; return (model, args), (model, args, kwargs) or (model, kwargs)"


class NotAPt2(DynccUsageError):
    """A `.pt2` file that torch.export cannot load, or that holds no example inputs."""

    template = "{path} is not a usable .pt2 program: {problem}"


class BadModelDirectory(DynccUsageError):
    """A folder that transformers cannot load as a model."""

    template = "cannot load a model from folder {path}: {problem}"


class OutputNotWritable(DynccUsageError):
    """A folder or file that dyncc was asked to write to and cannot."""

    template = "cannot write to {path}: {problem}"


class UnknownSetting(DynccUsageError):
    """An option of torch.compile's `options` that dyncc does not know."""

    template = "unknown option {name!r} for backend \"dyncc\"{near} (known: {known})"


class InputMismatch(DynccUsageError):
    """A call of an optimized model does not fit what was captured."""

    template = "{problem}; {hint}"


class UnsupportedModel(DynccUsageError):
    """The model carries something that dyncc does not understand: hooks, shards, quantised weights, adapters."""

    template = "{what}, which dyncc does not understand; {hint}"


class BadCalibration(DynccUsageError):
    """`dyncc fit` or `dyncc.calibrate_pairs` was given a model or data that it cannot learn from."""

    template = "cannot calibrate: {problem}"


class NotFinite(DynccUsageError):
    """Calibration data makes the model give NaN or infinite numbers: nothing can be fitted on them."""

    template = "cannot fit: {where}, batch {batch} of the data gives NaN or infinite activations; leave it out, or mend the model"


class UnknownFit(DynccUsageError):
    """A plan of `dyncc fit` names a part that does not exist."""

    template = "unknown part {name!r} of a plan to fit{near}; choose from {known}"


class BadParameters(DynccUsageError):
    """Parameters that were given to be saved have unknown names or wrong shapes."""

    template = "cannot save these parameters: {problem}"


class BadParameterFile(DynccUsageError):
    """A file of fitted parameters that is missing, damaged, or made for another model."""

    template = "cannot take fitted parameters from {path}: {problem}; `dyncc fit` writes such files"


class BadPairFile(DynccUsageError):
    """A file of rotary pairs that is missing, damaged, or made for another model."""

    template = "cannot take rotary pairs from {path}: {problem}; dyncc.calibrate_pairs writes such files"


class BadWeights(DynccUsageError):
    """Weights that were given to be saved do not fit the model, or each other."""

    template = "cannot save these weights: {problem}"


class BadWeightFile(DynccUsageError):
    """A file of trained weights that is missing, damaged, or made for another model."""

    template = "cannot take weights from {path}: {problem}; {writer} writes such files"


class CacheNotServed(DynccUsageError, RuntimeError):
    """A `dyncc.KVCache` with passes was given to a model that dyncc did not compile, or whose attention it cannot follow."""

    template = "dyncc.KVCache({passes!r}) chooses keys by attention, {problem}"
    not_compiled: ClassVar[str] = (
        'which is done in a model that dyncc compiled only; call model.compile(backend="dyncc"). Where that was called, this call '
        "needed one more graph than torch._dynamo.config.recompile_limit allows: raise it"
    )


class BadCachePasses(DynccUsageError):
    """`dyncc.KVCache(passes=...)` was given passes that are no business of a cache."""

    template = "dyncc.KVCache {problem}, not {passes!r}; give other passes to torch.compile's options"


class PackageMissing(DynccUsageError, ImportError):
    """Something was asked for that needs a package which is not installed."""

    template = "{package} is needed {purpose} and is not installed; pip install {package}"


class NotAnArtefact(DynccUsageError):
    """A folder that `dyncc.load` was asked for and that `Optimized.save` did not write."""

    template = "{path} is not a dyncc artefact: {problem}; write one with dyncc.optimize(...).save(folder)"


class ArtefactTooNew(DynccUsageError):
    """An artefact in a format that this dyncc does not know."""

    template = "{path} has artefact format {found}, and this dyncc reads up to {known}; upgrade dyncc (it was written by dyncc {writer})"


class ArtefactTruncated(DynccUsageError):
    """A file of an artefact is missing or shorter than it was written."""

    template = "{path} is incomplete: {file} {problem}; copy the folder again, or save it again"


class ArtefactDamaged(DynccUsageError):
    """A file of an artefact is not what was written."""

    template = "{path} is damaged: {file} is not what was saved (wrong checksum); copy the folder again, or save it again"


class ArtefactEdited(DynccUsageError):
    """A text of an artefact was changed by hand: what is written there no longer belongs to the program beside it."""

    template = "{path} was edited: {file} is not what was saved (wrong checksum); restore it, or optimize and save again with another plan"


class ArtefactUnreadable(DynccUsageError):
    """An artefact is whole, but this torch, device or environment cannot take it."""

    template = "not loaded: {problem}; {hint}"


class UnknownOutputKind(DynccUsageError):
    """`dyncc convert` was given a name whose ending says nothing about what to write."""

    template = "cannot tell what to write to {path}: end it in .onnx, .pt2 or .aoti.pt2, or in nothing for a dyncc artefact folder"


class FileMismatch(DynccError):
    """A file that was written gives other outputs than the model it was written from. It was removed."""


class BadKernelSpec(DynccUsageError):
    """A kernel was asked for that cannot be generated."""

    template = "no kernel with {option}={value}: {problem}"


class NoGPU(DynccUsageError):
    """Kernels were to be timed on a machine that has nothing to run them on."""

    template = "no GPU that kernels are compiled for is seen here: run this where the model will run; --target compiles without one"


class UnknownTarget(DynccUsageError):
    """A kernel was asked for a device that the generator does not know."""

    template = "unknown target {name!r}{near}; choose one of {known}"
