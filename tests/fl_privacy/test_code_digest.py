"""The code digest: changes with the code and with nothing else."""

from pathlib import Path

from fl_privacy.code_digest import PACKAGES, code_digest, digest_of


def tree(root: Path) -> Path:
    for package in PACKAGES:
        (root / package).mkdir(parents=True)
        (root / package / "__init__.py").write_text(f"name = {package!r}\n")
    return root


def test_the_place_does_not_matter(tmp_path: Path) -> None:
    assert digest_of(tree(tmp_path / "a")) == digest_of(tree(tmp_path / "b"))


def test_content_and_names_of_python_files_matter(tmp_path: Path) -> None:
    root = tree(tmp_path)
    digests = [digest_of(root)]
    (root / "clients" / "new.py").write_text("")
    digests.append(digest_of(root))
    (root / "clients" / "new.py").rename(root / "clients" / "other.py")
    digests.append(digest_of(root))
    (root / "adversaries" / "__init__.py").write_text("changed = True\n")
    digests.append(digest_of(root))
    assert len(set(digests)) == len(digests)


def test_other_files_do_not_matter(tmp_path: Path) -> None:
    before = digest_of(tree(tmp_path))
    (tmp_path / "clients" / "notes.md").write_text("text")
    (tmp_path / "elsewhere.py").write_text("")
    assert digest_of(tmp_path) == before


def test_the_running_code_has_one() -> None:
    assert code_digest() == digest_of(Path(__file__).parents[2])
