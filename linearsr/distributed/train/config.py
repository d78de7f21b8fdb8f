"""The configuration of a training job besides its recipe: paths and resources."""

from __future__ import annotations

from pydantic import Field, field_validator

from linearsr.config import Config, LoRAConfig
from linearsr.distributed.train.shards import Wanted
from linearsr.storage.location import Location, locate, url
from linearsr.training.config import TrainConfig
from linearsr.training.data import DataConfig
from linearsr.training.recipes import Kind, Recipe


class ClusterConfig(Config):
    """Paths and resources of a run. CPUs are Ray's logical ones: reservations, not limits."""

    data: str
    """Folder of pictures or shards to train on, local or s3://."""
    validation: str
    """Folder of pictures to validate on, local or s3://."""
    storage: str
    """Folder that all nodes see, local or s3://, for the runs' results."""
    name: str = "linearsr"
    """Name of the run and of its folder in the storage; an existing run is continued."""
    workers: int = Field(default=1, ge=1)
    """Number of training workers."""
    gpu: bool = False
    """Reserve one GPU for each worker (NCCL); by default, workers use CPUs (gloo)."""
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
    """Number of latest checkpoints to keep, by default all; the knee's is always kept."""
    max_failures: int = Field(default=3, ge=-1)
    """Number of worker failures to recover from, -1 for any number. A node that is taken away after
    a notice to Ray, such as KubeRay's for spot instances, does not count."""
    patience: int | None = Field(default=None, ge=0)
    """Number of checkpoints that a stage goes on for once its knee is confirmed; by default, it
    does all its steps."""

    @field_validator("data", "validation", "storage")
    @classmethod
    def _absolute(cls, path: str) -> str:
        """Make paths absolute: workers have working folders of their own."""
        return url(locate(path))

    def gpus(self) -> float:
        """Return the number of GPUs that one training run reserves, validation included."""
        return self.workers * self.gpu + self.validation_gpus

    def cpus(self) -> float:
        """Return the number of logical CPUs that one training run reserves, validation included."""
        return self.workers * (self.worker_cpus + self.data_cpus) + self.validation_cpus


class StageConfig(Config):
    """One training stage of one model: everything that a worker must know.

    expert: number of the expert that is trained; None in pretraining, where there is one model.
    start: weights folder, bundled name or s3:// folder; None for random weights.
    """

    recipe: Recipe
    cluster: ClusterConfig
    kind: Kind
    expert: int | None = None
    start: str | None = None

    @property
    def train(self) -> TrainConfig:
        """Return this stage's steps, rates and losses, which the recipe holds."""
        return self.recipe.stage(self.kind, self.expert)

    @property
    def lora(self) -> LoRAConfig | None:
        """Return the shape of the adapters that this stage trains, if it trains only those."""
        return self.recipe.lora_of(self.kind)

    @property
    def data(self) -> DataConfig:
        """Return the configuration of this stage's training pairs."""
        return self.recipe.data_of(self.kind)

    @property
    def wanted(self) -> Wanted:
        """Return what this stage takes from shards with latents."""
        return Wanted(self.recipe.model, self.train.pixels)

    @property
    def run(self) -> Location:
        """Return the folder of the run."""
        return locate(self.cluster.storage) / self.cluster.name
