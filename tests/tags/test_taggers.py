"""The choice of tags, the default tagger on photographs, and the command."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Literal

import pytest
import torch
from PIL import Image

from linearsr import cli
from linearsr.errors import LinearSRError, OptionError
from linearsr.tags import load_tagger
from linearsr.tags.base import Tag, Tagger, TaggerConfig
from linearsr.tags.imagenet import CLASSES, groups
from linearsr.tags.views import MAX_VIEWS, combine_views, square_views
from linearsr.tags.vocabulary import Vocabulary
from tests.helpers.pictures import photo

NAMES = ["cat", "cup", "grass"]


# Choice of tags


def test_tags_above_their_thresholds_come_best_first_up_to_max_tags() -> None:
    scores = torch.tensor([0.6, 0.9, 0.7])
    assert Vocabulary(NAMES, TaggerConfig(), 0.65).select(scores) == [
        Tag("cup", pytest.approx(0.9)),
        Tag("grass", pytest.approx(0.7)),
    ]
    assert [t.name for t in Vocabulary(NAMES, TaggerConfig(max_tags=1), 0.65).select(scores)] == [
        "cup"
    ]
    assert Vocabulary(NAMES, TaggerConfig(), 0.95).select(scores) == []


def test_vocabulary_threshold_precedes_config_and_tagger_default(tmp_path: Path) -> None:
    scores, own = torch.tensor([0.6, 0.6, 0.6]), [0.5, 0.7, 0.5]

    def said(**fields: object) -> list[str]:
        return [
            tag.name for tag in Vocabulary(NAMES, TaggerConfig.parse(**fields), own).select(scores)
        ]

    assert said() == ["cat", "grass"]
    assert said(threshold=0.55) == NAMES
    vocabulary = tmp_path / "words.txt"
    vocabulary.write_text("# mine\ncup\n\ngrass\t0.65\n")
    assert said(vocabulary=str(vocabulary)) == []
    assert said(vocabulary=str(vocabulary), threshold=0.55) == ["cup"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "UTF-8"),
        (b"\xff\xfe", "UTF-8"),
        (b"\n# no names\n", "no names"),
        (b"cat\tmuch\n", "words.txt:1"),
        (b"cat\ncup\t1.5\n", "words.txt:2"),
        (b"cup\nyeti\ngras\n", "does not know yeti, gras; check the spelling"),
        (b"a\nb\nc\nd\ne\nf\n", r"know a, b, c, d, e, \.\.\.;"),
    ],
)
def test_bad_vocabulary_line_is_named(tmp_path: Path, content: bytes | None, message: str) -> None:
    path = tmp_path / "words.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(OptionError, match=message):
        Vocabulary(NAMES, TaggerConfig(vocabulary=str(path)), 0.5)


@pytest.mark.parametrize("fields", [{"threshold": 1.5}, {"max_tags": 0}, {"kind": "oracle"}])
def test_bad_config_field_is_named(fields: dict[str, object]) -> None:
    with pytest.raises(OptionError, match=next(iter(fields))):
        TaggerConfig.parse(**fields)


def test_square_views_cover_the_picture_and_overlap() -> None:
    picture = torch.arange(90.0).expand(3, 20, 90)
    views = square_views(picture)
    assert all(view.shape == (3, 20, 20) for view in views)
    starts = [int(view[0, 0, 0]) for view in views]
    assert starts[0] == 0 and starts[-1] == 70
    assert all(0 < b - a <= 10 for a, b in pairwise(starts))
    assert [v.shape for v in square_views(picture.mT)] == [v.shape for v in views]
    assert len(square_views(torch.zeros(3, 8000, 10))) == MAX_VIEWS
    assert len(square_views(picture[:, :, :40], 2.0)) == 1 and len(square_views(picture, 2.0)) > 1


def test_one_view_alone_does_not_decide() -> None:
    scores = torch.tensor([[0.9, 0.2], [0.1, 0.8], [0.1, 0.8]])
    torch.testing.assert_close(combine_views(scores), torch.tensor([0.5, 0.8]))
    torch.testing.assert_close(combine_views(scores[:1]), scores[0])


# ImageNet


@pytest.fixture(scope="module")
def tagger() -> Tagger:
    return load_tagger(TaggerConfig())


def _names(tags: list[Tag]) -> set[str]:
    return {tag.name for tag in tags}


def test_groups_contain_existing_classes_only() -> None:
    known = groups()
    assert len({group.name for group in known}) == len(known) > 400
    assert all(0 <= i < CLASSES for group in known for i in group.classes)
    assert all(0 < group.threshold < 1 for group in known)
    dogs = next(group for group in known if group.name == "dog")
    assert len(dogs.classes) == 118


def test_group_names_match_timm_class_names() -> None:
    """Class numbers that are off by one would give the names of neighbouring classes."""
    from timm.data import ImageNetInfo

    info = ImageNetInfo()
    single = [g for g in groups() if len(g.classes) == 1]
    descriptions = [info.index_to_description(g.classes[0], detailed=True).lower() for g in single]
    same = sum(group.name.lower() in text for group, text in zip(single, descriptions, strict=True))
    assert same > 0.85 * len(single)


@pytest.mark.parametrize("shrink", [1, 4])
@pytest.mark.parametrize(
    ("name", "tag"),
    [
        ("chelsea", "cat"),
        ("coffee", "cup"),
        ("camera", "tripod"),
        ("stereo_motorcycle", "motorcycle"),
    ],
)
def test_objects_are_named_at_full_and_low_resolution(
    tagger: Tagger, name: str, tag: str, shrink: int
) -> None:
    assert tag in _names(tagger(photo(name, shrink)))


@pytest.mark.parametrize(
    "name", ["astronaut", "brick", "gravel", "moon", "page", "hubble_deep_field"]
)
@pytest.mark.parametrize("shrink", [1, 4])
def test_unknown_objects_are_not_named(tagger: Tagger, name: str, shrink: int) -> None:
    assert tagger(photo(name, shrink)) == []


@pytest.mark.parametrize("size", [(1, 1), (2, 3), (8000, 10), (10, 8000), (3, 1)])
def test_noise_of_any_size_gets_no_tags(tagger: Tagger, size: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(0)
    assert tagger(torch.rand(3, 1, 1, generator=generator).expand(3, *size)) == []
    assert tagger(torch.rand(3, *size, generator=generator)) == []


def test_cat_at_the_end_of_a_panorama_is_named(tagger: Tagger) -> None:
    cat = photo("chelsea", 2)
    wall = photo("brick")[:, : cat.shape[1], :].repeat(1, 1, 3)
    panorama = torch.cat([wall[:, :, :900], cat], dim=2)
    assert _names(tagger(panorama)) == {"cat"}
    assert _names(tagger(panorama.mT.flip(1))) <= {"cat"}  # portrait, and the cat on its side


def test_lower_threshold_and_vocabulary_restrict_names(tmp_path: Path) -> None:
    words = tmp_path / "words.txt"
    words.write_text("coffee\nsoup\n")
    config = TaggerConfig(vocabulary=str(words), threshold=0.0)
    assert [tag.name for tag in load_tagger(config)(photo("coffee"))] == ["coffee", "soup"]


def test_imagenet_tagger_refuses_a_model() -> None:
    with pytest.raises(LinearSRError, match="its own model"):
        load_tagger(TaggerConfig(source="/some/model"))


@pytest.mark.parametrize("kind", ["imagenet", "zero-shot"])
def test_taggers_other_than_ram_refuse_an_adapter(kind: Literal["imagenet", "zero-shot"]) -> None:
    with pytest.raises(OptionError, match=f"the {kind} tagger takes no adapter"):
        load_tagger(TaggerConfig(kind=kind, adapter="dape.pth"))


def test_command_continues_after_a_picture_the_tagger_fails_on(
    pictures: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Odd:
        calls = 0

        def __call__(self, picture: torch.Tensor) -> list[Tag]:
            self.calls += 1
            if self.calls == 1:
                raise TypeError("odd")
            return [Tag("thing", 0.5)]

    monkeypatch.setattr("linearsr.tags.load_tagger", lambda *_: Odd())
    assert cli.main(["tag", str(pictures)]) == 1
    output = capsys.readouterr()
    assert "chelsea/photo.png: TypeError: odd" in output.err and "thing 0.50" in output.out


# The command


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    for name in ("chelsea", "gravel"):
        pixels = (photo(name, 2) * 255).byte().permute(1, 2, 0).numpy()
        (tmp_path / name).mkdir()
        Image.fromarray(pixels).save(tmp_path / name / "photo.png")
    return tmp_path


def test_command_prints_tags(pictures: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["tag", str(pictures)]) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith(f"{pictures / 'chelsea' / 'photo.png'}: cat 0.9")
    assert second == f"{pictures / 'gravel' / 'photo.png'}: no tags"


def test_command_prints_json(pictures: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["tag", "--json", "--max-tags", "1", str(pictures / "chelsea")]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["file"].endswith("photo.png")
    assert [tag["name"] for tag in answer["tags"]] == ["cat"]


def test_command_names_bad_files_and_tags_the_rest(
    pictures: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (pictures / "bad.png").write_bytes(b"no picture")
    (pictures / "empty").mkdir()
    inputs = [pictures, pictures / "empty", pictures / "gone.png"]
    assert cli.main(["tag", *map(str, inputs)]) == 1
    output = capsys.readouterr()
    assert len(output.out.splitlines()) == 2
    errors = output.err.splitlines()
    assert len(errors) == 3
    for name, line in zip(("bad.png", "empty", "gone.png"), errors, strict=True):
        assert name in line


@pytest.mark.parametrize(
    "options",
    [
        ["--threshold", "2"],
        ["--tagger", "ram"],
        ["--vocabulary", "/nowhere"],
        ["--max-tags", "0"],
        ["--tagger-model", "clip"],
        ["--tagger-adapter", "dape.pth"],
    ],
)
def test_command_refuses_bad_options(
    pictures: Path, options: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["tag", str(pictures), *options]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
