"""Find a checkpoint's folder by its name: on this disk, or by a download of huggingface_hub."""

import re
from pathlib import Path

_WANTED = "*.json", "model*.safetensors", "*.txt", "*.model", "*.jinja"
_UNWANTED = "*/*", "consolidated*"  # other formats and folders, which nobody here reads


def folder_of(name: str) -> Path:
    """Return the folder of a checkpoint.

    Args:
        name: a folder, or `organization/model` of the hub. Pickles are never downloaded.

    Raises:
        ValueError: when there is neither.
    """
    path = Path(name)
    if path.is_dir():
        return path
    if path.exists():
        raise ValueError(f"checkpoint {name}: a file. A checkpoint is a folder. Name its folder.")
    # What begins with a folder of this disk was meant to be on it.
    local = name.startswith(".") or Path(name.partition("/")[0]).is_dir()
    if local or not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        raise ValueError(
            f"checkpoint {name}: no such folder, and no name of the hub. Give a folder, or a name "
            "like openai-community/gpt2."
        )
    import huggingface_hub

    try:
        return Path(
            huggingface_hub.snapshot_download(
                name, allow_patterns=list(_WANTED), ignore_patterns=list(_UNWANTED)
            )
        )
    except Exception as error:  # of the network, the library, or the disk: none is a crash of ours
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(
            f"checkpoint {name}: no such folder, and the hub does not give it ({reason}). Give a "
            "folder, or look at the name and the connection."
        ) from error
