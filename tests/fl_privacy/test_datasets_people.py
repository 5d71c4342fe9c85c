"""Sources of people: files and folders made up here, no real face among them."""

import logging
from pathlib import Path
from typing import Any, get_args
from urllib.error import URLError

import numpy as np
import pytest
import sklearn.datasets
import torch
from PIL import Image
from torchvision import datasets as published

from fl_privacy.component import ComponentError, create
from fl_privacy.datasets.adult import Adult, census_of
from fl_privacy.datasets.arrays import DatasetError, Split
from fl_privacy.datasets.attributed import AttributedDataset
from fl_privacy.datasets.celeba import CelebA
from fl_privacy.datasets.lfw import LFW
from fl_privacy.datasets.partitions import Consecutive
from fl_privacy.datasets.pictures import scores_table
from fl_privacy.datasets.pubfig import PubFig
from fl_privacy.protocols import Dataset

N, PEOPLE = 60, 15
PERSON = np.arange(N) % PEOPLE


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


@pytest.fixture(autouse=True)
def data_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FL_PRIVACY_DATA", str(tmp_path / "data"))
    return tmp_path / "data"


def marked(n: int, height: int = 8, width: int = 6) -> np.ndarray[Any, Any]:
    """Pictures that tell their number: the first channel holds it everywhere."""
    pictures = np.random.default_rng(1).integers(0, 256, (n, height, width, 3), dtype=np.uint8)
    pictures[..., 0] = np.arange(n)[:, None, None]
    return pictures


def numbers(inputs: torch.Tensor) -> torch.Tensor:
    return (255 * inputs[:, 0].mean((1, 2))).round().long()


@pytest.fixture
def celeba(tmp_path: Path, rng: np.random.Generator) -> str:
    """Sixty pictures of fifteen people; A and B at random, C the complement of A."""
    values = rng.integers(0, 2, (N, 3))
    values[:, 2] = 1 - values[:, 0]
    path = tmp_path / "celeba.npz"
    np.savez(
        path,
        images=marked(N),
        attributes=values.astype(np.uint8),
        attribute_names=np.array(["A", "B", "C"]),
        identity=(1000 + PERSON).astype(np.int32),
    )
    return str(path)


def people_of(source: AttributedDataset) -> list[set[int]]:
    """Clients, test, auxiliary."""
    test, auxiliary = (
        source.model_copy(update={"held_out": held_out}) for held_out in ("test", "auxiliary")
    )
    groups = (source.people("train"), test.people("test"), auxiliary.people("test"))
    return [set(people.tolist()) for people in groups]


def test_people_are_apart_and_every_sample_keeps_its_values(celeba: str) -> None:
    source = CelebA(path=celeba, main_task="A", properties=("B",))
    assert isinstance(source, Dataset)
    values = np.load(celeba)["attributes"]
    who = people_of(source)
    assert sum(map(len, who)) == len(set.union(*who)) == PEOPLE
    held = source.model_copy(update={"held_out": "auxiliary"})
    for samples, people in (
        (source.load("train"), source.people("train")),
        (source.load("test"), source.people("test")),
        (held.load("test"), held.people("test")),
    ):
        number = numbers(samples.inputs)
        assert samples.inputs.shape[1:] == source.task().input_shape == (3, 8, 6)
        assert people.tolist() == (1000 + PERSON[number]).tolist()
        assert samples.people is not None and samples.people.tolist() == people.tolist()
        assert samples.labels.tolist() == values[number, 0].tolist()
        assert samples.properties["B"].tolist() == values[number, 1].tolist()
        assert samples.properties["B"].dtype == torch.int64
        assert samples.people is not None and torch.equal(samples.people, people)
        assert samples.inputs.is_contiguous()


@pytest.mark.parametrize("held_out", ["test", "auxiliary"])
def test_properties_are_told_as_they_are_loaded(celeba: str, held_out: str) -> None:
    source = create("datasets", f"celeba(path={celeba!r}, properties=('B',), main_task='A')")
    source = source.model_copy(update={"held_out": held_out})
    for split in get_args(Split):
        told, loaded = source.property_values(split), source.load(split).properties
        assert list(told) == list(loaded) == ["B"]
        assert torch.equal(told["B"], loaded["B"])


def test_who_is_where_depends_on_seed_and_shares_alone(celeba: str) -> None:
    source = CelebA(path=celeba, main_task="A")
    for same in (
        CelebA(path=celeba, main_task="B"),
        CelebA(path=celeba, main_task="A", properties=("B",)),
        CelebA(path=celeba, main_task="A", held_out="auxiliary"),
    ):
        assert people_of(same) == people_of(source)
    assert people_of(CelebA(path=celeba, main_task="A", seed=1)) != people_of(source)
    assert len(people_of(CelebA(path=celeba, main_task="A", shares=(0.2, 0.4, 0.4)))[0]) == 3


def test_task_is_that_of_the_clients_whoever_is_held_out(celeba: str) -> None:
    source = CelebA(path=celeba, main_task="A")
    task = source.task()
    normalized = task.normalize(source.load("train").inputs)
    assert torch.allclose(normalized.mean((0, 2, 3)), torch.zeros(3), atol=1e-5)
    assert task == source.model_copy(update={"held_out": "auxiliary"}).task()
    assert (task.classes, task.class_names) == (2, ("not A", "A"))
    with pytest.raises(DatasetError, match="indices of the test split"):
        source.load("test", torch.tensor([N]))


def test_a_secret_that_the_task_gives_away_is_refused(celeba: str) -> None:
    with pytest.raises(ComponentError, match="'A' is the main task 'A' itself"):
        create("datasets", f"celeba(path={celeba!r}, main_task='A', properties=('B', 'A'))")
    complement = CelebA(path=celeba, main_task="A", properties=("C",))
    for ask in (complement.prepare, complement.task, lambda: complement.load("train")):
        with pytest.raises(DatasetError, match=r"'C' is the main task, or its complement"):
            ask()
    with pytest.raises(DatasetError, match=r"no attribute 'D'.*attributes: A, B, C"):
        CelebA(path=celeba, main_task="A", properties=("D",)).prepare()


def test_the_start_tells_people_and_phi(celeba: str, caplog: pytest.LogCaptureFixture) -> None:
    source = CelebA(path=celeba, main_task="A", properties=("B",))
    values = np.load(celeba)["attributes"]
    with caplog.at_level(logging.INFO, "flwr"):
        source.prepare()
    assert "clients 9 people with 36 samples" in caplog.text
    expected = np.corrcoef(values[:, 0], values[:, 1])[0, 1]
    assert f"Property B: phi to the main task {expected:+.3f} (n = 60)" in caplog.text
    assert source.relations()["B"].value == pytest.approx(expected)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ("main_task=('A',)", "two or more different"),
        ("main_task=('A', 'A')", "two or more different"),
        ("properties=('A', 'A')", "twice"),
        ("main_task=('A', 'B'), properties=('B',)", "'B' is the main task"),
        ("shares=(0.5, 0.2, 0.2)", "add up to 1"),
        ("shares=(1.0, 0.0, 0.0)", "greater than 0"),
        ("path='faces.npz'", "absolute path"),
        ("held_out='train'", "held_out"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings: str, message: str) -> None:
    with pytest.raises(ComponentError, match=message):
        create("datasets", f"celeba({settings})")


def test_size_and_limit_change_pictures_and_their_number(celeba: str) -> None:
    source = CelebA(path=celeba, main_task="A", size=(4, 5), limit=45)
    assert source.task().input_shape == (3, 4, 5)
    inputs = torch.cat([source.load("train").inputs, source.load("test").inputs])
    assert int(numbers(inputs).max()) < 45  # the first channel is constant: resizing keeps it
    assert len(source.table().person) == 45


def test_a_main_task_of_one_class_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "same.npz"
    ones = np.ones((N, 1), dtype=np.uint8)
    names = np.array(["A"])
    np.savez(path, images=marked(N), attributes=ones, attribute_names=names, identity=PERSON)
    with pytest.raises(DatasetError, match=r"2 or more classes of the main task 'A'.*got 1 in 36"):
        CelebA(path=str(path), main_task="A").prepare()
    with pytest.raises(DatasetError, match="missing attributes"):
        np.savez(tmp_path / "bare.npz", images=marked(N))
        CelebA(path=str(tmp_path / "bare.npz")).prepare()


@pytest.fixture
def torchvision_celeba(data_folder: Path, monkeypatch: pytest.MonkeyPatch) -> np.ndarray[Any, Any]:
    """Twenty aligned pictures and the published lists, without their checksums."""
    monkeypatch.setattr(published.CelebA, "file_list", [])
    folder = data_folder / "celeba"
    (folder / "img_align_celeba").mkdir(parents=True)
    names = [f"{i:06d}.jpg" for i in range(1, 21)]
    values = np.random.default_rng(3).choice([-1, 1], (20, 40))
    for i, name in enumerate(names):
        Image.new("RGB", (178, 218), (10 * i, 0, 0)).save(folder / "img_align_celeba" / name)
    lists = {"list_eval_partition": 1, "identity_CelebA": 1, "list_bbox_celeba": 4}
    for file, width in (lists | {"list_landmarks_align_celeba": 10}).items():
        head = [] if width == 1 else ["20", "x " * width]
        rows = [" ".join([name, *[str(i // 2)] * width]) for i, name in enumerate(names)]
        (folder / f"{file}.txt").write_text("\n".join([*head, *rows]) + "\n")
    head = ["20", " ".join(f"A{i}" for i in range(40)) + " "]
    rows = [f"{name}  {' '.join(map(str, row))}" for name, row in zip(names, values, strict=True)]
    (folder / "list_attr_celeba.txt").write_text("\n".join([*head, *rows]) + "\n")
    return values


def test_celeba_comes_from_torchvision(torchvision_celeba: np.ndarray[Any, Any]) -> None:
    source = CelebA(main_task="A3", properties=("A39",), limit=18)
    table = source.table()
    assert source.task().input_shape == (3, 64, 64)
    assert table.person.tolist() == [i // 2 for i in range(18)]
    assert table.attribute("A39").tolist() == (torchvision_celeba[:18, 39] > 0).astype(int).tolist()
    assert set(table.attributes) == {f"A{i}" for i in range(40)}
    red = table.inputs[:, 0].float().mean((1, 2))
    assert torch.allclose(red, 10.0 * torch.arange(18), atol=3)  # JPEG is not exact


def test_celeba_that_cannot_be_had_says_what_to_do(
    data_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def offline(*_: object) -> None:
        raise RuntimeError("no network")

    monkeypatch.setattr(published.CelebA, "download", offline)
    with pytest.raises(DatasetError, match=rf"{data_folder}/celeba.*gdown.*path.*no network"):
        CelebA().prepare()


@pytest.fixture
def lfw(tmp_path: Path, rng: np.random.Generator) -> Path:
    """Scores for every second picture, backwards, so that a row's number is not its picture's."""
    index = np.arange(0, N, 2)[::-1]
    scores = rng.normal(size=(len(index), 2)).astype(np.float32)
    path = tmp_path / "lfw.npz"
    np.savez(
        path,
        images=marked(N),
        person_id=PERSON.astype(np.int16),
        gender_male=np.where(np.arange(N) < 50, np.arange(N) // 3 % 2, -1).astype(np.int8),
        kumar_attributes=scores,
        kumar_index=index.astype(np.int32),
        kumar_names=np.array(["Male", "Smiling"]),
        facer_prob255=np.stack([np.arange(N) * 4], axis=1).astype(np.uint8),
        facer_valid=np.arange(N) != 7,
        facer_names=np.array(["Young"]),
    )
    return path


def test_scores_of_lfw_go_to_the_pictures_of_their_rows(lfw: Path) -> None:
    raw = np.load(lfw)
    source = LFW(path=str(lfw), properties=("Smiling",))
    for samples in (source.load("train"), source.load("test")):
        for i, label, smiling in zip(
            numbers(samples.inputs).tolist(),
            samples.labels.tolist(),
            samples.properties["Smiling"].tolist(),
            strict=True,
        ):
            rows = np.flatnonzero(raw["kumar_index"] == i)
            expected = int(raw["kumar_attributes"][rows[0], 1] > 0) if len(rows) else -1
            assert (label, smiling) == (raw["gender_male"][i], expected)
            assert i < 50
    young = source.table().attribute("facer:Young").tolist()
    assert young == [-1 if i == 7 else int(4 * i >= 128) for i in range(N)]


def test_scores_of_lfw_without_a_picture_are_refused(lfw: Path) -> None:
    raw = dict(np.load(lfw))
    np.savez(lfw, **{**raw, "kumar_index": raw["kumar_index"] * 0})
    with pytest.raises(DatasetError, match=r"kumar_index: expected different indices in 0\.\.59"):
        LFW(path=str(lfw)).prepare()


def write_people(folder: Path, size: tuple[int, int], name: str) -> None:
    """Six people with four pictures each; the table lists one more of each, and not the last."""
    lines = ["# PubFig Dataset v1.2 - made up", "#\tperson\timagenum\tMale\tEyes Open"]
    for p in range(6):
        person = f"First Last{p}"
        (folder / person.replace(" ", "_")).mkdir(parents=True)
        for i in (1, 2, 3, 12):
            color = (40 * p, 10 * i, 0)
            file = folder / person.replace(" ", "_") / name.format(person.replace(" ", "_"), i)
            Image.new("RGB", size, color).save(file)
        for i in (1, 2, 3, 4):
            lines.append(f"{person}\t{i}\t{p % 2 - 0.5}\t{[0.3, -0.1, 0.0, 9.9][i - 1]}")
    (folder / "pubfig_attributes.txt").write_text("\n".join(lines) + "\n")


@pytest.mark.parametrize("name", ["{1}.png", "{0}_{1:04d}.png"])
def test_pubfig_is_read_from_pictures_and_a_table(tmp_path: Path, name: str) -> None:
    write_people(tmp_path / "faces", (30, 30), name)
    source = PubFig(path=str(tmp_path / "faces"), properties=("Eyes Open",), size=(5, 7))
    table = source.table()
    assert source.task().input_shape == (3, 5, 7)
    assert len(table.person) == 18  # pictures 12 have no row, rows 4 no picture
    pictures = table.inputs[:, :2, 0, 0].tolist()
    assert pictures == [[40 * p, 10 * i] for p in range(6) for i in (1, 2, 3)]
    assert table.attribute("Male").tolist() == [p % 2 for p in range(6) for _ in range(3)]
    assert table.attribute("Eyes Open").tolist() == [1, 0, -1] * 6
    assert table.person.tolist() == [p for p in range(6) for _ in range(3)]


def test_pictures_are_read_once_for_all_processes(tmp_path: Path, data_folder: Path) -> None:
    write_people(tmp_path / "faces", (30, 30), "{1}.png")
    source = PubFig(path=str(tmp_path / "faces"))
    first = source.table().inputs
    (kept,) = (data_folder / "resized").glob("*.npy")
    assert np.array_equal(np.load(kept), first.permute(0, 2, 3, 1))
    written = kept.stat().st_mtime_ns
    assert torch.equal(fresh(PubFig(path=source.path)).table().inputs, first)
    assert kept.stat().st_mtime_ns == written
    changed = tmp_path / "faces" / "First_Last0" / "1.png"
    Image.new("RGB", (30, 30), (255, 255, 255)).save(changed)
    assert fresh(PubFig(path=source.path)).table().inputs[0].min() == 255


def fresh(source: PubFig) -> PubFig:
    """Reads again, as another process would."""
    from fl_privacy.datasets import pubfig

    pubfig._read.cache_clear()
    return source


def test_lfw_from_a_folder_keeps_the_faces(tmp_path: Path) -> None:
    write_people(tmp_path, (250, 250), "{0}_{1:04d}.png")
    (tmp_path / "pubfig_attributes.txt").rename(tmp_path / "lfw_attributes.txt")
    for path in tmp_path.glob("*/*.png"):
        picture = Image.new("RGB", (250, 250), (9, 9, 9))
        picture.paste((200, 100, 50), (78, 70, 172, 195))
        picture.save(path)
    table = LFW(path=str(tmp_path)).table()
    assert table.inputs.shape == (18, 3, 62, 47)
    assert torch.equal(
        table.inputs,
        torch.tensor([200, 100, 50], dtype=torch.uint8).view(1, 3, 1, 1).expand(18, 3, 62, 47),
    )


def test_folders_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    folder = tmp_path / "faces"
    write_people(folder, (30, 30), "{1}.png")
    table = folder / "pubfig_attributes.txt"
    with pytest.raises(DatasetError, match=r"1\.png: expected 172 x 195 pixels or more"):
        LFW(path=str(folder), attributes=str(table)).table()
    (folder / "First_Last0" / "1.png").write_text("text")
    with pytest.raises(DatasetError, match=r"Last0/1\.png: expected a picture"):
        PubFig(path=str(folder)).table()
    (folder / "First_Last0" / "01.jpg").write_text("text")
    with pytest.raises(DatasetError, match="are the same picture; remove one"):
        PubFig(path=str(folder)).table()
    with pytest.raises(DatasetError, match="of which none is there"):
        PubFig(path=str(tmp_path), attributes=str(table)).table()
    with pytest.raises(DatasetError, match="expected a table of attributes"):
        PubFig(path=str(tmp_path)).table()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("person,imagenum,Male\n", "expected a line '#', 'person', 'imagenum'"),
        ("#\tperson\timagenum\tMale\nA\t1\t0.5\t0.5\n", "line 2: 2 values for 1 attributes"),
        ("#\tperson\timagenum\tMale\nA\tone\t0.5\n", "line 2: invalid literal"),
    ],
)
def test_tables_of_another_format_are_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "t.txt").write_text(text)
    with pytest.raises(DatasetError, match=message):
        scores_table(tmp_path / "t.txt")


@pytest.fixture
def census(rng: np.random.Generator) -> dict[str, Any]:
    """Arrays of forty rows; education_num says the same as education."""
    n = {"train": 30, "test": 10}
    return {
        **{f"x_num_{s}": rng.integers(0, 90, (k, 3)).astype(np.int32) for s, k in n.items()},
        **{f"x_cat_{s}": rng.integers(0, 2, (k, 3)).astype(np.uint8) for s, k in n.items()},
        **{f"y_{s}": rng.integers(0, 2, k).astype(np.uint8) for s, k in n.items()},
        "num_names": np.array(["age", "education_num", "hours"]),
        "cat_names": np.array(["education", "sex", "work"]),
        "cat_education": np.array(["BSc", "MSc"]),
        "cat_sex": np.array(["Female", "Male"]),
        "cat_work": np.array(["?", "Private"]),
    }


@pytest.fixture
def adult(tmp_path: Path, census: dict[str, Any]) -> str:
    np.savez(tmp_path / "adult.npz", **census)
    return str(tmp_path / "adult.npz")


def test_inputs_of_adult_hold_neither_task_nor_property(adult: str, census: dict[str, Any]) -> None:
    def features(**settings: Any) -> int:
        return Adult(path=adult, **settings).task().input_shape[0]

    assert features() == 3 + 6
    assert features(properties=("sex=Male",)) == 3 + 4
    assert features(properties=("sex=Male",), properties_as_inputs=True) == 3 + 6
    assert features(main_task="sex=Male", properties_as_inputs=True) == 3 + 4
    assert features(properties=("education=BSc",)) == 2 + 4
    table = Adult(path=adult, properties=("sex=Male",)).table()
    age = np.concatenate([census["x_num_train"], census["x_num_test"]])[:, 0]
    assert table.inputs[:, 0].tolist() == pytest.approx((age - age.min()) / np.ptp(age))
    assert (float(table.inputs.min()), float(table.inputs.max())) == (0, 1)
    assert table.attribute("income").tolist() == [*census["y_train"], *census["y_test"]]
    sex = np.concatenate([census["x_cat_train"], census["x_cat_test"]])[:, 1]
    assert table.attribute("sex=Male").tolist() == sex.tolist()
    assert "work=?" not in table.attributes
    assert -1 in table.attribute("work=Private").tolist()


def test_equal_rows_of_adult_are_one_person(tmp_path: Path, census: dict[str, Any]) -> None:
    for name in ("x_num", "x_cat", "y"):
        census[f"{name}_test"][:] = census[f"{name}_train"][:10]
    np.savez(tmp_path / "twins.npz", **census)
    person = Adult(path=str(tmp_path / "twins.npz")).table().person
    assert torch.equal(person[:10], person[30:])
    assert len(set(person.tolist())) == 30


def test_a_frame_of_openml_gives_the_same_table(adult: str, census: dict[str, Any]) -> None:
    pandas = pytest.importorskip("pandas")
    rows = {
        k: np.concatenate([census[f"{k}_train"], census[f"{k}_test"]]) for k in ("x_num", "x_cat")
    }
    income = np.concatenate([census["y_train"], census["y_test"]])
    words = {
        str(name): census[f"cat_{name}"][rows["x_cat"][:, i]].astype(object)
        for i, name in enumerate(census["cat_names"])
    }
    words["work"][words["work"] == "?"] = np.nan
    frame = pandas.DataFrame(
        {name.replace("_", "-"): rows["x_num"][:, i] for i, name in enumerate(census["num_names"])}
        | {name: pandas.Categorical(values) for name, values in words.items()}
        | {"class": pandas.Categorical(np.where(income, ">50K", "<=50K"))}
    )
    made = census_of(frame)
    source = Adult(path=adult, properties=("sex=Male",))
    there = source.table()
    from fl_privacy.datasets.adult import _table

    again = _table(made, frozenset({"income", "sex"}))
    assert torch.equal(there.inputs, again.inputs)
    assert there.attributes.keys() == again.attributes.keys()
    assert all(torch.equal(v, again.attributes[k]) for k, v in there.attributes.items())


def test_adult_that_cannot_be_had_says_what_to_do(
    data_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def offline(*_: object, **__: object) -> None:
        raise URLError("no network")

    monkeypatch.setattr(sklearn.datasets, "fetch_openml", offline)
    with pytest.raises(DatasetError, match=rf"OpenML.*{data_folder}.*path.*no network"):
        Adult().prepare()


def test_consecutive_parts_share_one_person_at_each_border_at_most(celeba: str) -> None:
    source = CelebA(path=celeba, main_task="A")
    labels, people = source.labels("train"), source.people("train")
    parts = [Consecutive().indices(labels, i, 4, seed=0) for i in range(4)]
    assert torch.equal(torch.cat(parts), torch.arange(len(labels)))
    who = [set(people[part].tolist()) for part in parts]
    for i in range(4):
        for j in range(i):
            assert len(who[i] & who[j]) <= (i - j == 1)
