"""The Trainer's and PEFT's own ways to the Hub, with hfvlm's licence check and cards.

Models of hfvlm have both in their own `push_to_hub`; transformers' Trainer and PEFT upload by themselves.
"""

from collections.abc import Callable
from functools import wraps
from pathlib import Path
from types import ModuleType
from typing import Any

from hfvlm.presets.cards import complete_card
from hfvlm.presets.licences import check_model


def guard_trainer(module: ModuleType) -> None:
    """Have transformers' Trainer check the licence before it makes a repository or uploads, and complete its card."""
    trainer = module.Trainer
    trainer.init_hf_repo = _checking(trainer.init_hf_repo, lambda self: self.model)
    trainer.push_to_hub = _checking(trainer.push_to_hub, lambda self: self.model)
    write = trainer.create_model_card

    @wraps(write)
    def create_model_card(self: Any, *args: Any, **kwargs: Any) -> None:
        write(self, *args, **kwargs)
        if self.is_world_process_zero():
            name = kwargs.get("model_name") or self.hub_model_id or Path(self.args.output_dir).name
            _complete(self.model, Path(self.args.output_dir), name)

    trainer.create_model_card = create_model_card


def guard_peft(module: ModuleType) -> None:
    """Have PEFT check the licence of an adapter's base before it uploads, and complete its card."""
    tuned = module.PeftModel
    tuned.push_to_hub = _checking(tuned.push_to_hub, lambda self: self)
    write, upload = tuned.create_or_update_model_card, tuned._upload_modified_files

    @wraps(write)
    def create_or_update_model_card(self: Any, output_dir: str, *args: Any, **kwargs: Any) -> None:
        write(self, output_dir, *args, **kwargs)
        _complete(self, Path(output_dir), Path(output_dir).resolve().name)

    @wraps(upload)
    def upload_modified_files(self: Any, working_dir: Any, repo_id: str, *args: Any, **kwargs: Any) -> Any:
        _complete(self, Path(working_dir), repo_id)
        return upload(self, working_dir, repo_id, *args, **kwargs)

    tuned.create_or_update_model_card = create_or_update_model_card
    tuned._upload_modified_files = upload_modified_files


def model_of_ours(model: Any) -> Any:
    """Return the model of hfvlm inside what wraps it for training, or None."""
    while model is not None and not hasattr(type(model), "licence_accepted"):
        base = getattr(model, "get_base_model", None)
        inner = base() if callable(base) else getattr(model, "module", None)
        model = None if inner is model else inner
    return model


def _checking(method: Callable[..., Any], model_of: Callable[[Any], Any]) -> Callable[..., Any]:
    @wraps(method)
    def checked(self: Any, *args: Any, accept_licence: bool = False, **kwargs: Any) -> Any:
        if (model := model_of_ours(model_of(self))) is not None:
            check_model(model, accepted=accept_licence)
            model.licence_accepted = model.licence_accepted or accept_licence
        return method(self, *args, **kwargs)

    return checked


def _complete(model: Any, folder: Path, name: str) -> None:
    ours = model_of_ours(model)
    if ours is None or not (folder / "README.md").exists():
        return
    configs = getattr(model, "peft_config", None)
    adapter = None
    if configs and ours is not model:
        adapter = next(iter(configs.values())).to_dict() | {"auto_mapping": {"base_model_class": type(ours).__name__}}
    complete_card(folder / "README.md", ours.config, name, adapter)
