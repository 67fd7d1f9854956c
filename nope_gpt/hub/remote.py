"""The Hugging Face Hub: what is uploaded, and its refusals, which become our errors."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from nope_gpt.errors import MissingError, NetworkError, UsageError
from nope_gpt.files.writing import writing


@contextmanager
def contacting(kind: str, repo_id: str, hint: str) -> Iterator[None]:
    """Turn what the Hub or the network refuses into an error that says what to do.

    Args:
        kind: "model" or "data set".
        repo_id: Its id.
        hint: What to do without a network.

    Raises:
        MissingError: There is no such repository, or it asks for a login.
        NetworkError: The Hub cannot be reached.
        CapacityError: The disk of the library's cache is full.
        NopeError: The cache cannot be written.
    """
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        HTTPError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    folder = "datasets/" if kind == "data set" else ""
    where = f"https://huggingface.co/{folder}{repo_id}"

    def unreachable(error: Exception) -> NetworkError:
        said = " ".join(str(error).split())  # In a line.
        return NetworkError(f"the Hub cannot be reached: {said}", where=where, hint=hint)

    try:
        yield
    except GatedRepoError:
        raise MissingError(
            f"this {kind} asks you to accept its terms", where=where, hint="hf auth login"
        ) from None
    except RevisionNotFoundError:
        raise MissingError(
            f"this {kind} has no such revision", where=where, hint="leave the revision out"
        ) from None
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise MissingError(
            f"there is no such directory here and no such {kind} on the Hub "
            f"({type(error).__name__})",
            where=repo_id,
            hint=f"check the name; a private {kind} needs `hf auth login`",
        ) from None
    except LocalEntryNotFoundError as error:  # An EntryNotFoundError too, in name only.
        raise unreachable(error) from None
    except EntryNotFoundError as error:
        raise MissingError(f"this {kind} lacks a file: {error}", where=where) from None
    except HfHubHTTPError as error:
        if error.response.status_code not in (401, 403):
            raise unreachable(error) from None
        raise MissingError(
            f"the Hub does not let you read this {kind} ({error.response.status_code})",
            where=where,
            hint="hf auth login",
        ) from None
    except (OfflineModeIsEnabled, HTTPError, OSError) as error:
        if isinstance(error, OSError) and (error.filename or error.errno == errno.ENOSPC):
            with writing(Path(error.filename or "~/.cache/huggingface")):
                raise
        raise unreachable(error) from None


def upload(path: Path, repo_id: str, **options: Any) -> str:
    """Upload a model directory to the Hub, making the repository if need be.

    Args:
        path: The directory.
        repo_id: OWNER/NAME.
        options: `token`, `private`, and what `huggingface_hub.upload_folder` takes.

    Returns:
        The address of the commit.

    Raises:
        UsageError: The repository cannot have that name, or is public and was to be private.
        NetworkError: The Hub cannot be reached, or refuses; the directory stays.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HTTPError

    refuse_name(repo_id)
    private = options.pop("private", None)
    api = HfApi(token=options.pop("token", None))
    try:
        api.create_repo(repo_id, exist_ok=True, private=private)
        if private and not api.repo_info(repo_id).private:
            raise UsageError(
                "this repository is there already, and is public",
                where=repo_id,
                hint="make it private in its settings, or choose another name",
            )
        return str(api.upload_folder(repo_id=repo_id, folder_path=path, **options))
    except HfHubHTTPError as error:
        status = error.response.status_code
        refused = f"the Hub does not let you write here ({status})"
        raise NetworkError(
            refused if status in (401, 403) else f"the upload failed: {error}",
            where=repo_id,
            hint="hf auth login, then try again",
        ) from None
    except (HTTPError, OSError, RuntimeError) as error:  # The last of a file that did not arrive.
        raise NetworkError(
            f"the upload failed: {error}", where=repo_id, hint="hf auth login, then try again"
        ) from None


def refuse_name(repo_id: str) -> None:
    """Refuse what cannot be the name of a repository.

    Raises:
        UsageError: It cannot; says why.
    """
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        reason = str(error).rstrip(".")
        raise UsageError(f"{repo_id!r} cannot be a repository: {reason}") from None
