"""`PretrainedModel`: loading, saving and publishing, for every model of this package."""

from __future__ import annotations

import os
import tempfile
import warnings
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from huggingface_hub import HfApi, ModelHubMixin, hf_hub_download
from huggingface_hub import errors as hub_errors

from rxt_model.checkpoint.errors import CheckpointError, CheckpointWarning
from rxt_model.checkpoint.loading import LoadOptions, load_model
from rxt_model.checkpoint.protocol import Component, LoadableModule, OwnsBuffers
from rxt_model.checkpoint.reader import CONFIG_NAME, WEIGHTS_NAME
from rxt_model.checkpoint.saving import save_model

__all__ = ["Component", "OwnsBuffers", "PretrainedModel"]

Model = TypeVar("Model", bound="PretrainedModel")

_TOKENIZER_NAME = "tokenizer.json"


#: What can go wrong on the way to the hub. Its client has changed HTTP libraries several times; the base classes of its own
#: error are that library's, which connection failures derive from.
_NETWORK_ERRORS: tuple[type[BaseException], ...] = (
    hub_errors.HfHubHTTPError,
    *(base for base in hub_errors.HfHubHTTPError.__bases__ if base not in (Exception, BaseException)),
    OSError,
)
_PUBLISHING_ERRORS: tuple[type[BaseException], ...] = (*_NETWORK_ERRORS, hub_errors.HFValidationError)


class PretrainedModel(LoadableModule, ModelHubMixin, library_name="rxt-kernels", tags=["reactive-transformer"]):
    """Base class of everything that is loaded from, saved to, and published as a checkpoint.

    A checkpoint is a directory, or a repository on the Hugging Face hub, with `config.json` and `model.safetensors`. What
    a subclass provides is described in `rxt_model.checkpoint.protocol`.

    Example:
        >>> import tempfile
        >>> from rxt_model.config import MLMHeadConfig
        >>> from rxt_model.heads import MLMHead
        >>> directory = tempfile.mkdtemp()
        >>> MLMHead(MLMHeadConfig(embed_dim=4, vocab_size=6)).save_pretrained(directory)
        >>> MLMHead.from_pretrained(directory).config
        MLMHeadConfig(embed_dim=4, vocab_size=6)
    """

    @classmethod
    def from_pretrained(  # type: ignore[override]  # every argument is named here; the mixin swallows **kwargs
        cls: type[Model],
        pretrained_model_name_or_path: str | os.PathLike[str],
        *,
        tokenizer: Any = None,
        rope_layout: Literal["auto", "split", "interleaved"] = "auto",
        rope_angle_dtype: Literal["float32", "match"] | None = None,
        padding: Literal["mask", "dilute"] | None = None,
        memory_attention_variant: str | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | int | None = None,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        local_files_only: bool = False,
        force_download: bool = False,
    ) -> Model:
        """Loads a model; it is in evaluation mode and its memory is freshly drawn, never read from the file.

        Structure is inferred from the tensors first and the configuration second, so files of every published era
        load (spec section 3); the loaded model says what was found in its `config`.

        Args:
            pretrained_model_name_or_path: a local directory, which wins, or a hub id such as ``"owner/name"``.
            tokenizer: for full models, a tokenizer; None loads `tokenizer.json` from the same place if there is one, and
                False loads none.
            rope_layout: where rotated pairs are written (spec section 2.2). ``"auto"`` takes it from the file's
                metadata, or from its era, with a warning where the era is not certain.
            rope_angle_dtype: ``"float32"``, or ``"match"`` to round rotary angles to the model's type, as models trained
                in half precision saw them. None takes the file's own value, else ``"float32"``.
            padding: ``"mask"``, or ``"dilute"`` for parity with models trained with upstream's flash attention (spec
                section 2.5). None takes the file's own value, else ``"mask"``.
            memory_attention_variant: overrides the variant where the tensors allow more than one (spec section 2.12).
            dtype: floating point type to convert to; None keeps the file's.
            device: where to put the weights; None is torch's default device. "meta" checks the files and builds the
                model without reading any weights.
            revision: branch, tag or commit on the hub.
            token: hub access token, or True for the stored one.
            cache_dir: where downloads are kept.
            local_files_only: use downloaded files only, never the network.
            force_download: download even what is there.

        Returns:
            The model, weights bitwise as in the file (unless `dtype` converts them).

        Raises:
            CheckpointError: the files are absent, damaged, of another format or model, or contradict each other; the
                message names the file and the key. Nothing is returned half-loaded.
            ValueError, TypeError: an argument is none of the accepted values.

        Warns:
            CheckpointWarning: the model loads, by a rule that the files cannot prove (the message names the argument
                that overrides it), or its configuration has keys that are unknown here.
        """
        options = LoadOptions(
            rope_layout=rope_layout,
            rope_angle_dtype=rope_angle_dtype,
            padding=padding,
            memory_attention_variant=memory_attention_variant,
            dtype=dtype,
            device=None if device is None else torch.device(device),
        )
        options.check()
        is_full = cls.component in ("rxt_alpha", "rxt_beta")
        if tokenizer is not None and tokenizer is not False and not is_full:
            raise TypeError(f"tokenizer is given, and {cls.__name__} is a component, which has none: leave it out.")
        names = [CONFIG_NAME, WEIGHTS_NAME]
        optional = [_TOKENIZER_NAME] if is_full and tokenizer is None else []
        tokenizer = None if tokenizer is False else tokenizer
        directory = _local_directory(pretrained_model_name_or_path)
        if directory is None:
            directory = _download(
                str(pretrained_model_name_or_path),
                names,
                optional,
                revision=revision,
                token=token,
                cache_dir=None if cache_dir is None else os.fspath(cache_dir),
                local_files_only=local_files_only,
                force_download=force_download,
            )
        elif revision is not None:
            raise ValueError(
                f"revision is {revision!r}, but {directory} is a local directory and has no revisions: leave revision out."
            )
        if optional and (directory / _TOKENIZER_NAME).is_file():
            tokenizer = _load_tokenizer(directory / _TOKENIZER_NAME)
        model, notes = load_model(cls, directory, options, tokenizer=tokenizer)
        for note in notes:
            warnings.warn(note, CheckpointWarning, stacklevel=2)
        return model

    def save_pretrained(  # type: ignore[override]  # the mixin removes the old config.json first; this is atomic
        self,
        save_directory: str | os.PathLike[str],
        *,
        rope_layout: Literal["split", "interleaved"] | None = None,
        embedding: Literal["both", "once"] = "both",
    ) -> None:
        """Saves `config.json` and `model.safetensors` (and a full model's `tokenizer.json`, if it has a tokenizer).

        Both files are written under temporary names first, so a save that fails leaves the old ones intact. The
        memory state is never saved. `config.json` holds only keys that upstream's constructors know; what is this
        package's own (rotary layout, angle type, padding, memory attention variant) is metadata of the weights file.

        Args:
            save_directory: made if needed.
            rope_layout: convert the *saved* weights to this layout (`convert_rope_layout`), for example a model trained
                by an old release for a current one; None saves them as they are.
            embedding: a full model's embedding under ``"both"`` names (decoder and encoder), which is what upstream
                needs to load it right: with one name it draws the other at random and then shares that one (spec
                section 3.4). ``"once"`` saves vocabulary × width values; this package loads either.

        Raises:
            CheckpointError: the directory cannot be written, or the model is on the meta device.
            ValueError: an argument is none of the accepted values.

        Example:
            >>> model.save_pretrained("my-model")  # doctest: +SKIP
        """
        directory = Path(save_directory)
        if directory.exists() and not directory.is_dir():
            raise CheckpointError(f"{directory}: a directory is needed, and this is a file.")
        save_model(self, directory, rope_layout=rope_layout, embedding=embedding)
        tokenizer = getattr(self, "tokenizer", None)
        if tokenizer is not None:
            tokenizer.save(directory)

    def push_to_hub(  # type: ignore[override]  # every argument is named here
        self,
        repo_id: str,
        *,
        commit_message: str = "Upload model with rxt-kernels",
        private: bool | None = None,
        token: str | bool | None = None,
        branch: str | None = None,
        create_pr: bool = False,
        rope_layout: Literal["split", "interleaved"] | None = None,
    ) -> str:
        """Saves the model to a repository on the hub, which is made if needed, and returns the address of the commit.

        A model card is added only where the repository has none.

        Args:
            repo_id: ``"owner/name"``.
            commit_message: of the commit.
            private: visibility of a repository that is made; None is the account's default.
            token: hub access token, or True for the stored one.
            branch: to commit to; None is the default branch.
            create_pr: open a pull request instead of committing.
            rope_layout: as in `save_pretrained`.

        Raises:
            CheckpointError: the hub refused or could not be reached.
        """
        api = HfApi(token=token)
        try:
            repo_id = api.create_repo(repo_id=repo_id, private=private, exist_ok=True).repo_id
            with tempfile.TemporaryDirectory() as temporary:
                self.save_pretrained(temporary, rope_layout=rope_layout)
                if not api.file_exists(repo_id, "README.md", revision=branch):
                    self.generate_model_card().save(Path(temporary) / "README.md")
                commit = api.upload_folder(
                    repo_id=repo_id,
                    folder_path=temporary,
                    commit_message=commit_message,
                    revision=branch,
                    create_pr=create_pr,
                )
        except _PUBLISHING_ERRORS as error:
            raise CheckpointError(f"{repo_id}: the model cannot be published there ({_first_line(error)}).") from error
        return str(commit)


def _local_directory(name: str | os.PathLike[str]) -> Path | None:
    """The directory a model name means, or None where it is a hub id."""
    if not isinstance(name, (str, os.PathLike)):
        raise TypeError(f"pretrained_model_name_or_path is a {type(name).__name__}; a directory or a hub id is needed.")
    text = os.fspath(name)
    path = Path(text).expanduser()
    if text and "\0" not in text and path.is_dir():
        return path
    if text and "\0" not in text and path.exists():
        raise CheckpointError(
            f"{path}: this is a file; give the directory that holds {CONFIG_NAME} and {WEIGHTS_NAME}."
        )
    looks_local = not isinstance(name, str) or text.startswith((".", "~")) or path.is_absolute() or "\\" in text
    if looks_local or text.count("/") != 1 or not text:
        raise CheckpointError(f"{text}: there is no such directory, and a hub id has the form 'owner/name'.")
    return None


def _download(
    hub_id: str,
    names: list[str],
    optional: list[str],
    *,
    revision: str | None,
    token: str | bool | None,
    cache_dir: str | None,
    local_files_only: bool,
    force_download: bool,
) -> Path:
    """The local snapshot directory of a hub repository, with the named files in it."""
    path = ""
    at = "" if revision is None else f" at revision {revision!r}"
    for name in (*names, *optional):
        try:
            path = hf_hub_download(
                hub_id,
                name,
                revision=revision,
                token=token,
                cache_dir=cache_dir,
                local_files_only=local_files_only,
                force_download=force_download,
            )
        except hub_errors.HFValidationError as error:
            raise CheckpointError(f"{hub_id}: there is no such directory, and it is not a hub id either.") from error
        except hub_errors.LocalEntryNotFoundError as error:
            if name in optional:
                continue
            why = "local_files_only is set" if local_files_only else "the hub could not be reached"
            raise CheckpointError(
                f"{hub_id}{at}: there is no such directory, {name} is not in the download cache, and {why}."
            ) from error
        except hub_errors.GatedRepoError as error:
            raise CheckpointError(f"{hub_id}: accept this repository's terms on the hub and pass token.") from error
        except hub_errors.RepositoryNotFoundError as error:
            raise CheckpointError(
                f"{hub_id}: there is no such directory, and no such hub repository that this login may read."
            ) from error
        except hub_errors.RevisionNotFoundError as error:
            raise CheckpointError(f"{hub_id}: the hub repository has no revision {revision!r}.") from error
        except hub_errors.EntryNotFoundError as error:
            if name in optional:
                continue
            raise CheckpointError(f"{hub_id}{at}: the hub repository has no {name}.") from error
        except _NETWORK_ERRORS as error:
            raise CheckpointError(f"{hub_id}{at}: {name} cannot be downloaded ({_first_line(error)}).") from error
        if name in names:
            directory = Path(path).parent
    if not all((directory / name).is_file() for name in names):
        raise CheckpointError(f"{hub_id}{at}: the hub repository changed while it was downloaded; try again.")
    return directory


def _load_tokenizer(path: Path) -> Any:
    from rxt_model.tokenizer import Tokenizer

    try:
        return Tokenizer.from_file(path)
    except (ValueError, OSError) as error:
        raise CheckpointError(
            f"{path}: the tokenizer cannot be loaded ({error}) Pass tokenizer= to use another one, or False for none."
        ) from error


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
