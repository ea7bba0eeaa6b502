"""Where a model is: a folder, a GGUF file, or the hub's. Known without loading torch."""

from pathlib import Path

from winnow.errors import UnusableModel
from winnow.gguf import SUFFIX
from winnow.gguf.header import is_gguf, model_files
from winnow.hub.reference import parse
from winnow.hub.store import local_model


def require_config(folder: Path) -> None:
    """Raise UnusableModel for a folder that is no model's."""
    if not (folder / "config.json").is_file():
        raise UnusableModel(f"model folder {folder} has no config.json")


def model_path(model: str | Path) -> Path:
    """The folder or GGUF file of a model; one of the hub is downloaded if it is not cached.

    Raises UnusableModel.
    """
    path = Path(model)
    if path.is_dir():
        return _gguf_in(path.resolve()) or path.resolve()
    if is_gguf(path):
        return path.absolute()  # links of the hub's cache lead to files with other names
    if path.exists():
        raise UnusableModel(f"model {model} is a file; a model is a folder or a GGUF file")
    if "://" in str(model):
        raise UnusableModel(
            f"model {model} is an address; Winnow reads folders, GGUF files and the hub's models, "
            "like org/name. Copy it into a folder first (the Helm chart does: model.fetch)"
        )
    if (hub_model := parse(str(model))) is None:
        raise UnusableModel(f"model folder {model} does not exist")
    return local_model(hub_model).path


def _gguf_in(folder: Path) -> Path | None:
    """The one GGUF file of a folder with nothing else to load; of several parts, the first.

    Raises UnusableModel if there are several models.
    """
    found = sorted(file for file in folder.glob(f"*{SUFFIX}") if "mmproj" not in file.name)
    if not found or (folder / "config.json").exists() or any(folder.glob("*.safetensors")):
        return None
    if {*found} <= {*model_files(found[0])}:
        return found[0]
    raise UnusableModel(
        f"model folder {folder} has {len(found)} GGUF files; name one of them: "
        f"{', '.join(file.name for file in found)}"
    )
