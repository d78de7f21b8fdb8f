"""ESGF: four experts from the knee of pretraining, then each polished from its own knee.

    pretraining ─knee─▶ experts (four runs, side by side where there is room) ─knees─▶ fine-tuning
                ─knees─▶ perceptual (of all but the first, which goes on as it is)

`linearsr.distributed.train.knee` alone decides from which checkpoint a stage may start.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import ray
from ray.util import ActorPool
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from linearsr import weights
from linearsr.config import ModelConfig
from linearsr.distributed.models import local_folder
from linearsr.distributed.resources import capacity
from linearsr.distributed.train.config import ClusterConfig, StageConfig
from linearsr.distributed.train.data import notes_about
from linearsr.distributed.train.knee import last_checkpoint, read_knee, start_from_knee, summary
from linearsr.distributed.train.trainer import Outcome, check, train
from linearsr.errors import LinearSRError, OptionError
from linearsr.storage.location import Location, locate, url
from linearsr.training import export, perceptual
from linearsr.training.config import PerceptualConfig
from linearsr.training.ema import read_origin
from linearsr.training.recipes import Kind, Recipe
from linearsr.weights.bundle import expert_names


def check_stages(
    kinds: Sequence[Kind], recipe: Recipe, workers: int = 1, data: str | None = None
) -> None:
    """Check that recipe and machine can do all stages, before the first of them runs.

    data: the folder to train on, whose latents, if it has some, must fit each stage. Raises
    OptionError, MissingExtra or WeightsError for the first stage that they cannot do.
    """
    for kind in kinds:
        notes = None if data is None else notes_about(data, recipe.data_of(kind))
        if notes is not None:
            try:
                notes.check_recipe(recipe.model, recipe.data_of(kind))
            except OptionError as error:
                raise OptionError(f"{kind}: {error}") from error
        for expert in recipe.trained(kind):
            config = recipe.stage(kind, expert)
            recipe.data_of(kind).micro_batch(workers, config.accumulation)
            if isinstance(config, PerceptualConfig):
                perceptual.check(config)


def run_stage(
    kind: Kind,
    recipe: Recipe,
    cluster: ClusterConfig,
    before: Sequence[Location],
    *,
    anyway: bool = False,
    say: Callable[[str], None] = print,
) -> list[Outcome]:
    """Train every expert of one stage, each from the knee of the run before it.

    before: the pretraining run, or the runs of all experts. Each run gets a folder under
    `cluster.storage`/`cluster.name`. For an expert that the stage does not train, the outcome of
    the run before it is returned. Raises WeightsError where no knee is confirmed (unless `anyway`),
    and, after all runs have ended, LinearSRError naming the experts that failed.
    """
    starts = [start_from_knee(run, anyway=anyway) for run in before]
    model = recipe.model if len(starts) > 1 else export.single(recipe.model)
    provenance = {"stage": f"start of {kind}", "steps": json.dumps([step for _, step in starts])}
    start = locate(cluster.storage) / cluster.name / f"{kind}-start"
    write_bundle(start, model, [folder for folder, _ in starts], provenance)
    stages = stages_of(kind, recipe, cluster, start)
    check(stages[0])
    trained = dict(zip(recipe.trained(kind), _train_all(stages, say), strict=True))
    for expert in range(len(recipe.experts)):
        # An expert that goes on as it is, or the one model that all experts come from.
        at = expert if len(starts) > 1 else 0
        if expert not in trained:
            trained[expert] = Outcome(before[at], read_knee(before[at]), {}, starts[at])
    return [trained[expert] for expert in range(len(recipe.experts))]


def stages_of(
    kind: Kind, recipe: Recipe, cluster: ClusterConfig, start: Location
) -> list[StageConfig]:
    """Return a stage for each expert that is trained, each with a run of its own."""
    home, names = locate(cluster.storage) / cluster.name, expert_names(recipe.model)
    return [
        StageConfig(
            recipe=recipe,
            cluster=cluster.model_copy(
                update={"storage": url(home), "name": f"{kind}-{expert}-{names[expert]}"}
            ),
            kind=kind,
            expert=expert,
            start=url(start),
        )
        for expert in recipe.trained(kind)
    ]


class _Runner:
    """Waits for one training run after the other; the runs themselves take the resources."""

    def train(self, stage: StageConfig) -> tuple[StageConfig, Outcome | str]:
        """Train, and return the outcome, or the error as text: the other experts must go on."""
        try:
            return stage, train(stage)
        except LinearSRError as error:
            return stage, f"{stage.cluster.name}: {error}"


def _train_all(stages: list[StageConfig], say: Callable[[str], None]) -> list[Outcome]:
    """Run as many at once as the cluster has room for; outcomes are in the order of `stages`."""
    cluster = stages[0].cluster
    room = capacity(cluster.cpus(), cluster.gpus(), limit=len(stages))
    # A runner leads its run from the driver's node, which nobody takes away.
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    runner = ray.remote(num_cpus=0, scheduling_strategy=here)(_Runner)
    pool = ActorPool([runner.remote() for _ in range(room)])
    ended: dict[str, Outcome | str] = {}
    # Unordered: free resources must not wait for an earlier run that is still going.
    for stage, result in pool.map_unordered(lambda r, s: r.train.remote(s), stages):
        ended[stage.cluster.name] = result
        say(result if isinstance(result, str) else f"{result.run.name}: {summary(result.knee)}")
    failed = [result for result in ended.values() if isinstance(result, str)]
    if failed:
        raise LinearSRError("; ".join(failed))
    results = (ended[stage.cluster.name] for stage in stages)
    return [outcome for outcome in results if not isinstance(outcome, str)]


def write_bundle(
    target: Location,
    model: ModelConfig,
    checkpoints: Sequence[Location],
    provenance: dict[str, str],
) -> None:
    """Export checkpoints, one per expert, to a weights folder on storage.

    Adapters (LoRA) get the base of the weights that they were started from.
    """
    with tempfile.TemporaryDirectory() as temporary:
        folders = []
        for i, checkpoint in enumerate(checkpoints):
            folders.append(Path(temporary) / str(i))
            folders[-1].mkdir()
            for file in checkpoint.files():
                if file.name.startswith("ema-"):
                    (folders[-1] / file.name).write_bytes(file.read())
        bundle = Path(temporary) / "bundle"
        origins = [origin for origin in map(read_origin, folders) if origin is not None]
        export.bundle(
            bundle,
            model,
            folders,
            provenance,
            lambda: weights.load_base(local_folder(origins[0].source)),
        )
        locate(bundle).copy_to(target)


def export_outcomes(outcomes: Sequence[Outcome], recipe: Recipe, target: Location) -> None:
    """Publish runs as weights, each from its confirmed knee, or else from its last checkpoint.

    An expert that was not trained keeps the weights that the others were trained with.
    """
    chosen = [
        outcome.kept
        or (start_from_knee if outcome.knee.status == "confirmed" else last_checkpoint)(outcome.run)
        for outcome in outcomes
    ]
    experts = [
        {"run": outcome.run.name, "step": step, "knee": outcome.knee.status}
        for outcome, (_, step) in zip(outcomes, chosen, strict=True)
    ]
    provenance = {"experts": json.dumps(experts), "recipe": recipe.model_dump_json()}
    write_bundle(target, recipe.model, [folder for folder, _ in chosen], provenance)
