"""The finished model on the Hugging Face Hub: `train.push_to_hub`."""

from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled
from huggingface_hub.utils._validators import validate_repo_id

from dpo import terminal
from dpo.errors import UserError

CANNOT = (OSError, HfHubHTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled, ValueError)
"""What the hub's client raises where it cannot be reached, or where nobody is logged in."""


def check_repository(name: str) -> None:
    """Raises UserError, before anything is computed, if the model could not be uploaded in the end."""
    try:
        validate_repo_id(name)
        user = HfApi().whoami()["name"]
    except CANNOT as error:
        raise UserError(
            f"train.push_to_hub: {name}: {_reason(error)}; log in (hf auth login, or HF_TOKEN) where the hub "
            "can be reached, or leave it out"
        ) from error
    terminal.note(f"the model will be uploaded to {name}, as {user}")


def push(folder: Path, name: str, *, only: str | None = None) -> None:
    """Uploads a model's folder; a repository that does not exist is made, private.

    What fails is a warning with the command that does it by hand: the model is in its folder.

    Args:
        folder: The model, with its card.
        name: Of the repository, such as user/name.
        only: Upload the files of this name alone, such as a card that was written again.
    """
    try:
        hub = HfApi()
        hub.create_repo(name, private=True, exist_ok=True)
        hub.upload_folder(
            repo_id=name, folder_path=folder, allow_patterns=only, commit_message="Model trained with dpo"
        )
    except CANNOT as error:
        terminal.warning(
            f"train.push_to_hub: {name}: {_reason(error)}; the model is in {folder}, and this uploads it: "
            f"hf upload {name} {folder}"
        )
    else:
        terminal.note(f"uploaded {only or folder} to the hub as {name}")


def _reason(error: Exception) -> str:
    return " ".join((str(error).strip().splitlines() or [type(error).__name__])[0].split())
