"""Recipes are checked whole before anything runs: keys, types, tables, names."""

from __future__ import annotations

from pathlib import Path

import pytest

from nano.errors import BadFileError, RequestError
from nano.recipe import read_recipe

GOOD = """
teacher = "org/model"
data = ["text.txt"]
heldout = "held.txt"
[[student]]
name = "a"
size = "150k"
profile = "low-end"
[distill]
steps = 7
[quantize]
method = "rtn"
[export]
formats = ["onnx"]
context = 64
[evaluate]
tokens = 100
"""


def written(folder: Path, text: str) -> Path:
    path = folder / "mine.toml"
    path.write_text(text)
    return path


def test_options_are_the_stages_own_dataclasses(tmp_path: Path) -> None:
    from distill.options import DistillOptions
    from export.options import ExportOptions
    from quantize.options import QuantizeOptions

    (tmp_path / "text.txt").write_text("x")
    recipe = read_recipe(written(tmp_path, GOOD))
    assert recipe.distill == DistillOptions(steps=7)
    assert recipe.quantize == QuantizeOptions(method="rtn")
    assert recipe.export == ExportOptions(context=64)
    assert recipe.formats == ("onnx",)
    assert recipe.evaluate.tokens == 100
    assert recipe.name == "mine"
    assert recipe.teacher == "org/model", "a hub id stands as it is"
    assert recipe.data == (str(tmp_path / "text.txt"),), "a path is relative to the recipe"


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("steps = 7", "step = 7", "did you mean 'steps'"),
        ("steps = 7", 'steps = "many"', "'steps'"),
        ('method = "rtn"', 'method = "magic"', "'method'"),
        ("[evaluate]", "[evalute]", "did you mean 'evaluate'"),
        ('formats = ["onnx"]', 'formats = ["gguf"]', "formats"),
        ('teacher = "org/model"', "", "teacher"),
        ('heldout = "held.txt"', "", "heldout"),
        ('name = "a"', 'name = "../a"', "plain name"),
        ('name = "a"', "", "'name'"),
        ("[[student]]", "[[students]]", "students"),
    ],
)
def test_a_mistake_is_named(tmp_path: Path, old: str, new: str, says: str) -> None:
    assert old in GOOD
    with pytest.raises(RequestError, match=says):
        read_recipe(written(tmp_path, GOOD.replace(old, new)))


def test_two_students_of_one_name(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="name of its own"):
        read_recipe(written(tmp_path, GOOD + '[[student]]\nname = "a"\nsize = "100k"\n'))


def test_missing_and_broken_files(tmp_path: Path) -> None:
    with pytest.raises(BadFileError, match="no such recipe"):
        read_recipe(tmp_path / "none.toml")
    with pytest.raises(BadFileError, match="not valid TOML"):
        read_recipe(written(tmp_path, "name = "))
