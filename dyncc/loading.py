"""MODEL on the command line -> a model with example inputs.

MODEL is `module:factory`, a `.pt2` file, or a folder that transformers can load. Nothing is ever unpickled.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import sys
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from dyncc.errors import FactoryRaised, FactoryReturned, ModelNotFound, NotAPt2, UnknownDevice, near

if TYPE_CHECKING:
    import torch

_FACTORY = re.compile(r"([A-Za-z_][\w.]*):([A-Za-z_]\w*)")
_ROOMS = frozenset({"passes", "kernels", "backends"})


class Loaded(NamedTuple):
    """A model and the inputs to call it with."""

    model: torch.nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


def load(name: str, device: str | None = None) -> Loaded:
    """The model that a MODEL text names, in eval mode unless it is a program of torch.export; with its inputs on `device`, if one is given.

    Raises:
        UnknownDevice: there is no such device.
    """
    place = None if device is None else check_device(device)
    loaded = _loaded(name, place)
    return loaded if place is None else moved(loaded, place)


def check_device(text: str) -> torch.device:
    """The device of that name; UnknownDevice where nothing can be computed on it."""
    import torch

    known = ", ".join(["cpu"] + ([torch.accelerator.current_accelerator().type] if torch.accelerator.is_available() else []))
    try:
        device = torch.device(text)
        torch.empty(0, device=device)
    except Exception as error:  # each kind of device has its own
        raise UnknownDevice(name=text, problem=(str(error).strip() or type(error).__name__).splitlines()[0], known=known) from error
    if device.type == "meta":
        raise UnknownDevice(name=text, problem="its tensors hold no numbers", known=known)
    return device


def moved(loaded: Loaded, device: torch.device) -> Loaded:
    """The model and its inputs on a device."""
    import torch
    from torch.utils import _pytree as pytree

    args, kwargs = pytree.tree_map_only(torch.Tensor, lambda x: x.to(device), (loaded.args, loaded.kwargs))
    return Loaded(loaded.model.to(device), args, kwargs)


def _loaded(name: str, place: torch.device | None) -> Loaded:
    factory = _FACTORY.fullmatch(name)
    path = Path(name).expanduser()
    if factory and not path.exists():
        return _from_factory(factory[1], factory[2])
    if not path.exists():
        raise ModelNotFound(name=name, problem="no such file or folder (MODEL is module:factory, a .pt2 file or a model folder)")
    if path.is_dir():
        from dyncc.folders import load_folder

        return Loaded(*load_folder(path))
    if path.suffix != ".pt2":
        raise ModelNotFound(name=name, problem="a file must be a .pt2 program saved by torch.export.save")
    return _from_pt2(path, place)


def _from_factory(module_name: str, function_name: str) -> Loaded:
    label = f"{module_name}:{function_name}"
    return _inputs(f"factory {label!r}", call_factory(label))


def call_factory(label: str) -> Any:
    """What the function of a text `module:function` returns.

    Raises:
        ModelNotFound: there is no such module or function.
        FactoryRaised: it, or the module, raised.
    """
    module_name, _, function_name = label.partition(":")
    with _importable(Path.cwd(), module_name.partition(".")[0]):
        function = getattr(_module(module_name, label), function_name, None)
        if not callable(function):
            known = [name for name in dir(sys.modules[module_name]) if name[0] != "_"]
            raise ModelNotFound(name=label, problem=f"module {module_name!r} has no function {function_name!r}{near(function_name, known)}")
        try:
            return function()
        except Exception as error:
            raise FactoryRaised(name=f"factory {label!r}", error=_told(error)) from error


def _module(module_name: str, label: str) -> Any:
    try:
        return importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if not error.name or not (module_name + ".").startswith(error.name + "."):
            raise FactoryRaised(name=f"module {module_name!r}", error=_told(error)) from error
        raise ModelNotFound(name=label, problem=f"no module {error.name!r} in this folder or environment") from error
    except Exception as error:
        raise FactoryRaised(name=f"module {module_name!r}", error=_told(error)) from error


def _told(error: BaseException) -> str:
    """The error in one line, with the place it came from."""
    frames = traceback.extract_tb(error.__traceback__)
    words = " ".join(str(error).split())
    place = f" ({Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {words}{place}" if words else f"{type(error).__name__}{place}"


class _Folder:
    """Finds modules in one folder, for names that `wanted` accepts."""

    def __init__(self, folder: Path, wanted: Any) -> None:
        self.folder, self.wanted = str(folder), wanted

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        return PathFinder.find_spec(name, [self.folder]) if path is None and self.wanted(name) else None


@contextmanager
def _importable(folder: Path, top: str) -> Iterator[None]:
    """Let the factory's module be imported from the folder first, and its neighbours last.

    The folder is not put on sys.path: dyncc's own `kernels` would then hide an installed package of that name.
    """
    own = (folder / "dyncc").is_dir()
    first = _Folder(folder, lambda name: name == top)
    last = _Folder(folder, lambda name: not (own and name in _ROOMS))
    sys.meta_path[:] = [first, *sys.meta_path, last]  # type: ignore[list-item]
    try:
        yield
    finally:
        sys.meta_path[:] = [finder for finder in sys.meta_path if finder not in (first, last)]


def _inputs(label: str, returned: Any) -> Loaded:
    import torch

    def refuse(got: str) -> FactoryReturned:
        return FactoryReturned(name=label, got=got)

    if not isinstance(returned, tuple) or len(returned) not in (2, 3):
        size = f" of {len(returned)}" if isinstance(returned, tuple) else ""
        raise refuse(f"a {type(returned).__name__}{size}")
    model, args, kwargs = returned if len(returned) == 3 else (*returned, {})
    if not isinstance(model, torch.nn.Module):
        raise refuse(f"a {type(model).__name__} as the model, not a torch.nn.Module")
    if len(returned) == 2 and isinstance(args, Mapping):
        args, kwargs = (), args
    if not isinstance(args, (tuple, list)):
        raise refuse(f"a {type(args).__name__} as the inputs")
    if not isinstance(kwargs, Mapping):
        raise refuse(f"a {type(kwargs).__name__} as the keyword inputs")
    return Loaded(model.eval(), tuple(args), dict(kwargs))


@contextmanager
def _no_pickles() -> Iterator[None]:
    """torch.load inside this block reads tensors only."""
    name = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        os.environ.pop(name)
        if before is not None:
            os.environ[name] = before


def load_program(path: Path) -> torch.export.ExportedProgram:
    """The program in a `.pt2` file, tensors read without unpickling anything else; NotAPt2 where there is none."""
    import zipfile

    import torch

    from dyncc.serialised import register_types

    if not zipfile.is_zipfile(path):
        raise NotAPt2(path=path, problem="it is not an archive; save one with torch.export.save(program, path)")
    try:
        with zipfile.ZipFile(path) as archive:
            for name in archive.namelist():
                if name.endswith("models/model.json"):
                    register_types(json.loads(archive.read(name)))
        with _no_pickles():
            return torch.export.load(path)
    except Exception as error:
        raise NotAPt2(path=path, problem=_told(error)) from error


def _from_pt2(path: Path, place: torch.device | None) -> Loaded:
    program = load_program(path)
    if program.example_inputs is None:
        raise NotAPt2(path=path, problem="it holds no example inputs; export it with the inputs that stand for real use")
    if place is not None:
        from torch.export.passes import move_to_device_pass

        program = move_to_device_pass(program, place)  # tensors that its graph makes are moved too
    args, kwargs = program.example_inputs
    return Loaded(program.module(), tuple(args), dict(kwargs or {}))
