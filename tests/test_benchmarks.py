"""The benchmarks: the tables that they write, their limits, and their accuracy gate."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import skimage.data
import torch
from PIL import Image
from torch import Tensor

from benchmarks import __main__ as command
from benchmarks import ablation, attention, gate, tagging
from benchmarks.gate import GateError
from benchmarks.machine import Machine
from benchmarks.tables import Row, parts_table, row, table
from benchmarks.tags import HashedEncoder
from benchmarks.timing import Expected, in_turn
from linearsr.denoiser import cpu_block as strips
from linearsr.errors import OptionError
from linearsr.metrics import lpips

CPU = torch.device("cpu")


def run(monkeypatch: pytest.MonkeyPatch, output: Path, *arguments: str) -> int:
    """Run `python -m benchmarks` with small sizes in this process."""
    small = ["--device", "cpu", "--sides", "32", "64", "--rounds", "1", "--compiled-up-to", "0"]
    argv = ["benchmarks", *small, "--output", str(output), "--name", "here", *arguments]
    monkeypatch.setattr(sys, "argv", argv)
    return command.main()


@pytest.mark.thorough
def test_all_sections_are_measured_and_written(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert run(monkeypatch, tmp_path) == 0
    here = tmp_path / "here"
    page = (here / "README.md").read_text()
    for what in ("diffusers", "softmax attention", "Real-ESRGAN x4plus", "bicubic", "2 steps"):
        assert what in page
    for picture in ("attention.png", "forward-linearsr-tiny.png", "image.png"):
        assert (here / picture).read_bytes().startswith(b"\x89PNG") and picture in page
    for section in ("attention", "forward", "image", "gains"):
        numbers = json.loads((here / f"{section}.json").read_text())
        rows = [Row(**row) for row in numbers["rows"]]
        assert rows and all(row.seconds and row.seconds > 0 for row in rows)
        assert set(numbers["machine"]) == {"machine", "precision", "peak", "versions", "date"}


def test_measuring_one_section_keeps_the_others(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "image.md").write_text("## What was measured before")
    assert run(monkeypatch, tmp_path, "--only", "attention") == 0
    page = (tmp_path / "here" / "README.md").read_text()
    assert page.index("## The attention operator") < page.index("## What was measured before")


@pytest.mark.thorough
def test_a_numerically_wrong_implementation_is_not_timed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    right = strips.forward_

    def wrong(*arguments: Tensor) -> Tensor:
        return right(*arguments) * 1.05  # type: ignore[arg-type]

    monkeypatch.setattr(strips, "forward_", wrong)
    assert run(monkeypatch, tmp_path, "--only", "forward") == 1
    assert "refusing to time it: LinearSR" in capsys.readouterr().err
    assert not (tmp_path / "here" / "README.md").exists()


def one_after_the_other(q: Tensor, k: Tensor, v: Tensor, sums: torch.dtype) -> Tensor:
    """Linear attention that adds its tokens one by one, the order with the largest error."""
    query, key, value = (x.to(sums) for x in (q.relu(), k.relu(), v))
    state = torch.zeros(*q.shape[:1], *q.shape[2:], q.shape[-1], dtype=sums)
    total = torch.zeros(*q.shape[:1], *q.shape[2:], dtype=sums)
    for token in range(q.shape[1]):
        state += key[:, token, :, :, None] * value[:, token, :, None, :]
        total += key[:, token]
    below = torch.einsum("bnhd,bhd->bnh", query, total)
    return (torch.einsum("bnhd,bhde->bnhe", query, state) / below[..., None]).to(q.dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_accuracy_gate_allows_any_order_of_sums_but_no_lower_precision(dtype: torch.dtype) -> None:
    machine = Machine("any", CPU, dtype, threads=1, memory=0, peak=0.0)
    gate.check_operator(lambda q, k, v: one_after_the_other(q, k, v, torch.float32), machine)
    with pytest.raises(GateError, match="linear attention"):
        gate.check_operator(lambda q, k, v: one_after_the_other(q, k, v, torch.bfloat16), machine)


def test_run_beyond_the_limit_is_not_started() -> None:
    expected = Expected(limit=10)
    assert expected.within("a", 512)
    expected.record("a", 512, 2.0)
    assert expected.within("a", 1024) and not expected.within("a", 1024, power=2)
    assert not expected.within("a", 2048)


def test_timed_runs_take_turns_after_a_warm_up() -> None:
    order: list[str] = []
    timed = in_turn({name: lambda n=name: order.append(n) for name in "ab"}, CPU, rounds=2)
    assert "".join(order) == "aabb" + "abab"
    assert set(timed) == {"a", "b"}


def test_memory_is_that_of_the_call() -> None:
    def large() -> float:
        return float(torch.ones(30 * 2**20).sum())  # 120 MiB

    memory = in_turn({"large": large}, CPU, rounds=1)["large"].memory
    assert 100 * 2**20 < memory < 200 * 2**20


def test_out_of_memory_is_reported_and_the_others_are_timed() -> None:
    def fails() -> None:
        raise torch.OutOfMemoryError("no memory")

    timed, expected = in_turn({"a": fails, "b": lambda: None}, CPU, rounds=1), Expected(limit=10)
    assert row("a", 512, timed, expected).failure == "failed: OutOfMemoryError"
    assert row("b", 512, timed, expected).seconds is not None
    assert not expected.within("a", 1024)


def test_tables_mark_runs_over_the_limit() -> None:
    rows = [Row("theirs", 8, 2.0, 2**20), Row("ours", 8, 0.5, 2**20, 10**12), Row("x", 8)]
    text = table(rows, "theirs", peak=4e12)
    assert "| 8² | ours | 500.0 ms | 4.00x | 1 MiB | 2.000 | 50.0% |" in text
    assert "| 8² | x | over the limit |  |  |  |  |" in text
    parts = parts_table([Row("ours", 8, 1.0, parts={"steps": 0.75}), Row("x", 8)])
    assert parts.splitlines()[-1] == "| 8² | ours | 750.0 ms | 1.00 s |"


def test_slope_tells_linear_from_quadratic_cost() -> None:
    rows = [Row("a", side, side**2 / 1e6) for side in (1, 2, 4)]
    rows += [Row("b", side, side**4 / 1e6) for side in (1, 2, 4)]
    assert attention.slope(rows, "a") == pytest.approx(1)
    assert attention.slope(rows, "b") == pytest.approx(2)


TINY = {
    **{"width": 32, "depth": 1, "patch": 16, "batch": 2, "pretrain": 20, "checkpoints": 10},
    **{"expert": 2, "watched": 1, "judged": 1, "size": 32},
}


@pytest.fixture
def ablate(
    tmp_path: Path, lpips_trunk: Path, monkeypatch: pytest.MonkeyPatch, fresh_metrics: None
) -> Callable[..., None]:
    """Run a tiny `python -m benchmarks.ablation` in this process, into OUT of its folder."""
    photo = Image.fromarray(np.asarray(skimage.data.astronaut()))
    for name, left in (("photos/a.png", 0), ("data/b.png", 200), ("data/c.png", 300)):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        photo.crop((left, 0, left + 96, 96)).save(tmp_path / name)
    monkeypatch.setenv(lpips.TRUNK_VARIABLE, str(lpips_trunk))

    def run(**changes: int) -> None:
        sizes = [f"--{name}={value}" for name, value in {**TINY, **changes}.items()]
        folders = [f"--{name}={tmp_path / name}" for name in ("photos", "data", "out")]
        monkeypatch.setattr(sys, "argv", ["ablation", *folders, "--seeds=0", *sizes])
        ablation.main()

    return run


def test_an_interrupted_ablation_continues_and_gives_the_same_results(
    ablate: Callable[..., None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ablate()
    table = capsys.readouterr().out.split("\n\n", 1)[1]
    for arm in ablation.ARMS:
        assert f"| {arm.name} |" in table
    file = tmp_path / "out" / ablation.RESULTS
    lines = file.read_text().splitlines()
    judged = {r["part"]: r["values"] for r in map(json.loads, lines[1:])}
    assert len(lines) == 1 + len(ablation.ARMS) and json.loads(lines[0])["last"] == 20
    trained = [judged[arm.name]["psnr@4"] for arm in ablation.ARMS if arm.start == "knee"]
    assert len(set(trained)) == len(trained), "two arms are the same"
    second = ablation.ARMS[1].name
    kept = [line for line in lines if json.loads(line)["part"] != second]
    file.write_text("\n".join(kept) + "\n")
    ablate()
    again = [json.loads(line) for line in file.read_text().splitlines()[len(kept) :]]
    assert [r["part"] for r in again] == [second] and again[0]["values"] == judged[second]
    with pytest.raises(OptionError, match="take another --out"):
        ablate(depth=2)


def test_the_ablation_pairs_its_differences_by_seed(tmp_path: Path) -> None:
    results = ablation.Results(tmp_path, ablation.Setting())
    for seed, level in enumerate((20.0, 30.0)):
        results.add(seed, ablation.PRETRAIN, knee=300, last=900, status="candidate")
        for i, arm in enumerate(ablation.ARMS):
            values = dict.fromkeys(ablation.JUDGED, level + 0.5 * i + 0.1 * seed * (i == 2))
            results.add(seed, arm.name, values=values)
    text = ablation.report(results, range(2))
    names = [arm.name for arm in ablation.ARMS]
    assert "| 1 | 300 | candidate | 900 |" in text
    assert f"| {names[0]} | 25.0000 ± 5.0000 |" in text
    assert f"| {names[1]} | **+0.5000 ± 0.0000** |" in text
    assert f"| {names[2]} | **+1.0500 ± 0.0500** |" in text


def _cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    return torch.cosine_similarity(a, b, dim=0).item()


def test_hashed_tags_have_unit_variance_and_mask_what_is_missing() -> None:
    embeddings, mask = HashedEncoder(64)([("golden retriever", "grass"), (), ("sky",)])
    assert embeddings.shape == (3, 2, 64) and embeddings.dtype == torch.float32
    assert mask.tolist() == [[True, True], [False, False], [True, False]]
    torch.testing.assert_close(embeddings.square().mean(dim=-1), mask.float())


def test_hashed_embeddings_never_change() -> None:
    """Stored weights were trained on these numbers, so no version may change them."""
    embedding = HashedEncoder(8)([("cat",)]).embeddings[0, 0]
    expected = torch.tensor([0, 0, 0, -1, -1, 0, 0, 1]) * (8 / 3) ** 0.5
    torch.testing.assert_close(embedding, expected)


def test_hashed_tags_are_similar_only_if_spelt_alike() -> None:
    encode = HashedEncoder(256)
    cat, cats, dog, again = encode([("cat", "cats", "dog", " Cat ")]).embeddings[0]
    assert torch.equal(cat, again)
    assert _cosine(cat, cats) > 0.3 > abs(_cosine(cat, dog)) + 0.1


def test_hashed_encoder_needs_no_tags() -> None:
    embeddings, mask = HashedEncoder(8)([(), ("",)])
    assert embeddings.shape == (2, 1, 8) and not mask.any()


def test_the_costs_of_tags_are_those_of_their_page() -> None:
    page = (Path(__file__).parents[1] / "docs/guides/tags.md").read_text()
    for cost in (tagging.ram_cost(), tagging.gemma_cost(11)):
        counted = f"{cost.parameters / 1e6:.0f} million | {cost.weights / 1e9:.2f} GB "
        assert counted in page and f"| {cost.operations / 1e9:.0f} GFLOP |" in page


def test_operations_of_a_linear_layer_are_counted_twice_its_weights() -> None:
    cost = tagging._cost("", torch.nn.Linear(3, 5, bias=False), 4, torch.empty(2, 3, device="meta"))
    assert cost == ("", 15, 60, 2 * 2 * 15)
