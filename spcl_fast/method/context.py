"""What the stages of a run share: its settings, its folder, its device and data, and the nets that finished stages left."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from pathlib import Path
from typing import Any

from .. import catalog
from ..config import Config
from ..config.load import all_settings
from ..data import ClassSet, Dataset
from ..data.build import UnlabelledError
from ..data.content import content_of, content_of_path
from ..errors import CheckpointError, DataError
from ..models import SegmentationModel
from ..runs import layout
from ..runs.checkpoint import Checkpoint
from ..runs.folder import Run
from ..runs.identity import CONTENT, INPUTS
from ..runs.tensorfile import read_tensors
from ..train.device import Precision, choose_device
from ..train.resume import load_modules
from ..train.signals import StopRequest
from .domains import Domains
from .nets import Nets


class Context:
    """One run. Stages share nothing but its folder; everything here is read from the settings or from that folder."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.run = Run(layout.folder_of(config))
        self.device = choose_device(config.loop.device)
        self.precision = Precision(self.device, config.loop.precision)
        self.domains = Domains(config)
        self.labels_checked: set[tuple[str, object]] = set()  # domains, and which of their labels
        self.stop = StopRequest()  # the run's own once it listens to signals

    @property
    def classes(self) -> ClassSet:
        return self.domains.classes

    @functools.cached_property
    def nets(self) -> Nets:
        return Nets(self.config, len(self.classes), self.device, self.precision)

    @functools.cached_property
    def evaluation_data(self) -> Dataset | None:
        """The target's labelled validation images, or None where it has none, which is logged once. Those that target.fold leaves out of
        training, where there is one.
        """
        split = self.config.target.val_split
        try:
            return self.domains.evaluated()
        except UnlabelledError:
            self.run.say(
                f"not evaluated: the target's {split!r} split has no labels, so there are pictures and no scores"
            )
        except DataError as error:
            self.run.say(f"not evaluated: the target's {split!r} split cannot be read with labels: {error}")
        return None

    @functools.cached_property
    def pictured(self) -> Dataset | None:
        """The target's images whose predictions the report shows: of those that are evaluated, else of those without labels."""
        dataset = self.evaluation_data
        for split in ("val", "train"):
            with contextlib.suppress(DataError):
                dataset = dataset or self.domains.dataset("target", split, labels=False)
        return None if dataset is None else self.domains.pictured(dataset)

    # --- stages ---------------------------------------------------------------------------------------------------------

    def settings(self, stage: catalog.Stage) -> Any:
        """The section of the settings that is the stage's own."""
        return getattr(self.config, stage.section)

    def inputs(self, stage: catalog.Stage) -> tuple[str, ...]:
        """The stages that this one starts from; the first one's net, if it starts from a net."""
        return catalog.inputs(stage, lambda name: self.run.done(name) is not None, self.setting)

    def setting(self, name: str) -> Any:
        """A setting by its dotted name."""
        value: Any = self.config
        for part in name.split("."):
            value = getattr(value, part)
        return value

    def identity(self, stage: catalog.Stage) -> dict[str, Any]:
        """What the stage's result depends on; the stages before it by the hash of theirs."""
        config = self.config
        labelled = catalog.depends_on_labelled(stage, config.target.fold)
        target = config.target if labelled else dataclasses.replace(config.target, labelled=None, fold=None)
        return {
            "source": config.source,
            "target": target,
            "model": config.model,
            "evaluate": self._picks(),
            stage.name: self.settings(stage),
            INPUTS: {name: (self.run.done(name) or {}).get("settings_sha256") for name in self.inputs(stage)},
            "run_seed": config.seed,
            CONTENT: self._contents(stage),
        }

    def _contents(self, stage: catalog.Stage) -> dict[str, str]:
        """By path setting of the identity, what lies there: data that were moved are the same data."""
        found = {f"{side}.root": self._content_of_images(side) for side in ("source", "target")}
        for key, setting in all_settings().items():
            section, _, rest = key.partition(".")
            if setting.about.path and section in ("source", "target", "model", stage.section) and rest != "root":
                path = self.setting(key)
                name = f"{stage.name if section == stage.section else section}.{rest}"
                found[name] = None if path is None else self._content_of_path(path)
        if catalog.depends_on_labelled(stage, self.config.target.fold) and self.domains.named_target is not None:
            found["target.labelled"] = self._content_of_labelled
        return {key: content for key, content in found.items() if content is not None}

    @functools.cached_property
    def _content_of_labelled(self) -> str:
        """Of all that are named: which of them are left out follows from them, the fold and the seed."""
        named = self.domains.named_target
        assert named is not None
        return content_of(named) or ", ".join(named.names)

    @functools.cache  # noqa: B019  lives as long as its run
    def _content_of_images(self, side: str) -> str | None:
        return content_of(self.domains.dataset(side, "train", labels=side == "source"))

    @functools.cache  # noqa: B019  lives as long as its run
    def _content_of_path(self, path: str) -> str | None:
        return content_of_path(Path(path))

    def _picks(self) -> dict[str, Any]:
        """Which of its nets a stage passes on and is evaluated by, and the settings by which it is picked."""
        evaluate = self.config.evaluate
        picks: dict[str, Any] = {"selection": evaluate.selection}
        if evaluate.selection != "last" and evaluate.window is not None:
            picks |= {"window": evaluate.window, "window_stride": evaluate.window_stride}
        return picks

    def checkpoint(self, stage: str) -> Checkpoint:
        checkpoint = self.run.checkpoints(stage).latest() if self.run.done(stage) else None
        if checkpoint is None:
            raise CheckpointError(
                f"stage {stage!r} is not finished in {self.run.folder}, and a later stage starts from it: do it first."
            )
        return checkpoint

    def model_of(self, stage: str, *, freeze_bn: bool | None = None) -> SegmentationModel:
        """The net that a finished stage left: its last, or the one that evaluate.selection picked."""
        model = self.nets.new(freeze_bn=freeze_bn, weights=False)
        load_modules(self.checkpoint(stage), {"model": model}, f"the stage {stage!r}")
        selected = self.run.path(stage, layout.SELECTED_WEIGHTS)
        if self.config.evaluate.selection != "last" and selected.is_file():
            model.load_state_dict(read_tensors(selected))
        return model
