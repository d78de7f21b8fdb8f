"""ESGF: four experts from the knee of pretraining, then each polished from its own knee.

    pretraining ─knee─▶ experts (four runs, side by side where there is room) ─knees─▶ fine-tuning
                ─knees─▶ perceptual (of all but the first, which goes on as it is)

Which checkpoint a stage may start from is decided in `linearsr.distributed.train.knee` alone.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import ray
from ray.util import ActorPool
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from linearsr.config import ModelConfig
from linearsr.distributed.resources import capacity
from linearsr.distributed.train.config import ClusterConfig, StageConfig
from linearsr.distributed.train.knee import last_checkpoint, read_knee, start_from_knee, summary
from linearsr.distributed.train.trainer import Outcome, check, train
from linearsr.errors import LinearSRError
from linearsr.storage.location import Location, locate, url
from linearsr.training import export, perceptual
from linearsr.training.config import PerceptualConfig
from linearsr.training.recipes import Kind, Recipe
from linearsr.weights.bundle import expert_names


def check_stages(kinds: Sequence[Kind], recipe: Recipe) -> None:
    """Raise for a stage that the recipe or this machine cannot do, before those ahead of it run.

    Raises OptionError, MissingExtra or WeightsError.
    """
    for kind in kinds:
        for expert in recipe.trained(kind):
            train = recipe.stage(kind, expert)
            if isinstance(train, PerceptualConfig):
                perceptual.check(train)


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

    before: the pretraining run, or the four runs of the experts. Runs lie in a folder each under
    `cluster.storage`/`cluster.name`. An expert that the stage does not train has the outcome of the
    run before it. Raises WeightsError where no knee is confirmed (unless `anyway`), and
    LinearSRError naming the experts that failed, after all have ended.
    """
    trained = recipe.trained(kind)
    starts = [start_from_knee(run, anyway=anyway) for run in before]
    home = locate(cluster.storage) / cluster.name
    model = recipe.model if len(starts) > 1 else export.single(recipe.model)
    notes = {"stage": f"start of {kind}", "steps": json.dumps([step for _, step in starts])}
    start = home / f"{kind}-start"
    write_bundle(start, model, [folder for folder, _ in starts], notes)
    stages = [
        _stage(kind, recipe, cluster, i, name, home, start)
        for i, name in enumerate(expert_names(recipe.model))
        if i in trained
    ]
    check(stages[0])
    outcomes = dict(zip(trained, _train_all(stages, say), strict=True))
    return [
        outcomes[i] if i in outcomes else _kept(before, starts, i)
        for i in range(len(recipe.experts))
    ]


def _kept(
    before: Sequence[Location], starts: Sequence[tuple[Location, int | None]], expert: int
) -> Outcome:
    """The outcome of an expert that goes on as it is; that of the one model, if there is one."""
    at = expert if len(starts) > 1 else 0
    return Outcome(before[at], read_knee(before[at]), {}, starts[at])


def _stage(
    kind: Kind,
    recipe: Recipe,
    cluster: ClusterConfig,
    expert: int,
    name: str,
    home: Location,
    start: Location,
) -> StageConfig:
    place = cluster.model_copy(update={"storage": url(home), "name": f"{kind}-{expert}-{name}"})
    return StageConfig(recipe=recipe, cluster=place, kind=kind, expert=expert, start=url(start))


class _Runner:
    """Waits for one training run after the other; the runs themselves take the resources."""

    def train(self, stage: StageConfig) -> tuple[StageConfig, Outcome | str]:
        """An outcome, or what went wrong: one failed expert must not cost the others."""
        try:
            return stage, train(stage)
        except LinearSRError as error:
            return stage, f"{stage.cluster.name}: {error}"


def _train_all(stages: list[StageConfig], say: Callable[[str], None]) -> list[Outcome]:
    """As many at once as the cluster has room for; outcomes in the order of `stages`."""
    cluster = stages[0].cluster
    room = capacity(cluster.cpus(), cluster.gpus(), limit=len(stages))
    # A run is led from where its runner is: from the driver's node, which nobody takes away.
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    runner = ray.remote(num_cpus=0, scheduling_strategy=here)(_Runner)
    pool = ActorPool([runner.remote() for _ in range(room)])
    ended: dict[str, Outcome | str] = {}
    # Unordered: a place that is free must not wait for an earlier run that is still going.
    for stage, result in pool.map_unordered(lambda r, s: r.train.remote(s), stages):
        ended[stage.cluster.name] = result
        say(result if isinstance(result, str) else f"{result.run.name}: {summary(result.knee)}")
    failed = [result for result in ended.values() if isinstance(result, str)]
    if failed:
        raise LinearSRError("; ".join(failed))
    results = (ended[stage.cluster.name] for stage in stages)
    return [outcome for outcome in results if not isinstance(outcome, str)]


def write_bundle(
    target: Location, model: ModelConfig, checkpoints: Sequence[Location], notes: dict[str, str]
) -> None:
    """Export checkpoints, one per expert, to a weights folder on storage."""
    with tempfile.TemporaryDirectory() as temporary:
        folders = []
        for i, checkpoint in enumerate(checkpoints):
            folders.append(Path(temporary) / str(i))
            folders[-1].mkdir()
            for file in checkpoint.files():
                if file.name.startswith("ema-"):
                    (folders[-1] / file.name).write_bytes(file.read())
        bundle = Path(temporary) / "bundle"
        export.bundle(bundle, model, folders, notes)
        locate(bundle).copy_to(target)


def export_outcomes(outcomes: Sequence[Outcome], recipe: Recipe, target: Location) -> None:
    """Publish finished runs as weights: each one's confirmed knee, else its last checkpoint.

    Of an expert that was not trained, what the others were trained with.
    """
    chosen = [o.kept or _result(o) for o in outcomes]
    told = [
        {"run": o.run.name, "step": step, "knee": o.knee.status}
        for o, (_, step) in zip(outcomes, chosen, strict=True)
    ]
    notes = {"experts": json.dumps(told), "recipe": recipe.model_dump_json()}
    write_bundle(target, recipe.model, [folder for folder, _ in chosen], notes)


def _result(outcome: Outcome) -> tuple[Location, int | None]:
    if outcome.knee.status == "confirmed":
        return start_from_knee(outcome.run)
    return last_checkpoint(outcome.run)
