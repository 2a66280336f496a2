"""Uploads of processors and tokenizers, by the licence of the model that they belong to."""

from pathlib import Path
from typing import Any

from hfvlm.checks.files import NamedErrors
from hfvlm.presets.licences import check_origins


class Published(NamedErrors):
    """Keeps where it was loaded from and saved to; see `check_origins` for what an upload goes by."""

    # Set it once you have read the licence, where something else uploads, as `model.licence_accepted`.
    licence_accepted: bool = False
    origins: tuple[str, ...] = ()

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """Do as transformers'."""
        loaded = super().from_pretrained(*args, **kwargs)
        place = args[0] if args else kwargs.get("pretrained_model_name_or_path")
        (loaded[0] if isinstance(loaded, tuple) else loaded).add_origin(place)
        return loaded

    def add_origin(self, place: Any) -> None:
        """Add a folder, or a repository of the Hub, that holds what this belongs to."""
        place = str(Path(place).resolve()) if Path(place).is_dir() else str(place)
        self.origins = tuple(dict.fromkeys((*self.origins, place)))

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> Any:
        """Do as transformers'; with `push_to_hub`, as `push_to_hub`."""
        saved = super().save_pretrained(save_directory, *args, **kwargs)  # type: ignore[misc]
        self.add_origin(save_directory)
        return saved

    def push_to_hub(self, repo_id: str, *, accept_licence: bool = False, **kwargs: Any) -> Any:
        """Do as transformers', if the licence of the model that this belongs to allows it.

        Raises:
            LicenceError: it is non-commercial, special or unknown, and `accept_licence` is off.
        """
        before = self.origins, self.licence_accepted
        self.licence_accepted = self.licence_accepted or accept_licence
        try:
            self.check_licence()
            self.licence_accepted = True  # checked: the folder that is uploaded has the repository's card in it
            return super().push_to_hub(repo_id, **kwargs)  # type: ignore[misc]
        finally:
            self.origins, self.licence_accepted = before

    def check_licence(self, *places: Any) -> None:
        """Check the licences of all origins, and of further places."""
        if not self.licence_accepted:
            check_origins((*self.origins, *places))

    def _upload_modified_files(self, working_dir: Any, *args: Any, **kwargs: Any) -> Any:
        """Check the licence, too, where `save_pretrained` uploads what it wrote."""
        self.check_licence(working_dir)
        return super()._upload_modified_files(working_dir, *args, **kwargs)  # type: ignore[misc]
