"""What a training job is told besides its recipe: where things lie and what it may take."""

from __future__ import annotations

from pydantic import Field, field_validator

from linearsr.config import Config
from linearsr.storage.location import Location, locate, url
from linearsr.training.config import TrainConfig
from linearsr.training.data import DataConfig
from linearsr.training.recipes import Kind, Recipe


class ClusterConfig(Config):
    """Places and resources of a run. CPUs are Ray's logical ones: reservations, not limits."""

    data: str
    """Pictures or shards to train on; s3:// too."""
    validation: str
    """Pictures to validate on; s3:// too."""
    storage: str
    """Where runs go: a folder that all nodes see; s3:// too."""
    name: str = "linearsr"
    """The run's folder in the storage; an old one goes on."""
    workers: int = Field(default=1, ge=1)
    """Training workers."""
    gpu: bool = False
    """One GPU per worker (NCCL); without, CPU workers (gloo)."""
    worker_cpus: float = Field(default=0.5, gt=0)
    """Logical CPUs of each worker."""
    data_cpus: float = Field(default=0.25, gt=0)
    """Logical CPUs of each worker's data actor."""
    validation_cpus: float = Field(default=0.25, gt=0)
    """Logical CPUs of the validation task."""
    validation_gpus: float = Field(default=0.0, ge=0)
    """GPUs of the validation task."""
    # A knee is seen some checkpoints after it was passed, hence the minimum.
    keep: int | None = Field(default=None, ge=16)
    """How many of the latest checkpoints stay, all by default; the knee's always does."""
    max_failures: int = Field(default=3, ge=-1)
    """Worker failures to recover from, -1 for any number; nodes whose loss was announced are
    not counted."""
    patience: int | None = Field(default=None, ge=0)
    """End a stage this many checkpoints after its knee was confirmed; never by default."""

    @field_validator("data", "validation", "storage")
    @classmethod
    def _absolute(cls, path: str) -> str:
        """Workers have working folders of their own."""
        return url(locate(path))

    def gpus(self) -> float:
        """GPUs that one stage takes at once."""
        return self.workers * self.gpu + self.validation_gpus

    def cpus(self) -> float:
        """Logical CPUs that one stage takes at once."""
        return self.workers * (self.worker_cpus + self.data_cpus) + self.validation_cpus


class StageConfig(Config):
    """One stage of one model: everything a worker must know.

    start: a weights folder, bundled name or s3:// folder; None starts from random weights.
    expert: which of the start's experts is trained; None for pretraining the one model.
    """

    recipe: Recipe
    cluster: ClusterConfig
    kind: Kind
    expert: int | None = None
    start: str | None = None

    @property
    def train(self) -> TrainConfig:
        """This stage's own configuration."""
        return self.recipe.stage(self.kind, self.expert)

    @property
    def data(self) -> DataConfig:
        """The data that this stage is trained on."""
        return self.recipe.data_of(self.kind)

    @property
    def run(self) -> Location:
        """The folder of the run."""
        return locate(self.cluster.storage) / self.cluster.name
