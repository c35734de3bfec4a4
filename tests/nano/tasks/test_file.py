"""Task files: real sets as they are on disk, templates, and what is refused with which words."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from nano.capabilities import check_tasks
from nano.errors import BadFileError, RequestError
from nano.tasks.file import load_tasks, packaged_names
from nano.tasks.template import check_template, text_of, value_of

ROWS = [{"q": f"What is {n} + 1?", "a": n + 1, "names": ["x", "y"]} for n in range(20)]


def write(folder: Path, toml: str, rows: object = None) -> Path:
    path = folder / "my.toml"
    path.write_text(toml, encoding="utf-8")
    lines = "".join(json.dumps(row) + "\n" for row in ROWS)
    (folder / "rows.jsonl").write_text(lines if rows is None else str(rows), encoding="utf-8")
    return path


PLAIN = 'capability = "math"\nmetric = "exact"\ndata = "rows.jsonl"\nprompt = "Q: {q}\\nA:"\nanswer = "{a}"\n'


def test_a_file_of_rows_becomes_questions(tmp_path: Path) -> None:
    (task,) = load_tasks([str(write(tmp_path, PLAIN))])
    assert (task.name, task.capability, task.metric, len(task.questions)) == ("my", "math", "exact", 20)
    assert (task.questions[3].prompt, task.questions[3].answers) == ("Q: What is 3 + 1?\nA:", ("4",))
    check_tasks([task])


def test_examples_are_other_rows_drawn_by_the_seed(tmp_path: Path) -> None:
    (task,) = load_tasks([str(write(tmp_path, PLAIN + 'shots = 2\nlimit = 5\nheader = "Add."\n'))])
    head = {question.prompt.rsplit("Q: ", 1)[0] for question in task.questions}
    assert len(head) == 1, "the same examples for all"
    (text,) = head
    shown = [row for row in ROWS if f"Q: {row['q']}\nA: {row['a']}\n\n" in text]
    assert len(shown) == 2
    assert text.startswith("Add.\n\nQ: ")
    asked = [question.label for question in task.questions]
    assert len(asked) == 5
    assert not any(row["q"] in label for row in shown for label in asked)
    numbers = [int(label.split()[3]) for label in asked]
    assert numbers == sorted(numbers), "in the file's order"
    again = load_tasks([str(tmp_path / "my.toml")])[0]
    assert again == task
    other = load_tasks([str(write(tmp_path, PLAIN + "shots = 2\nlimit = 5\nseed = 1\n"))])[0]
    assert [q.label for q in other.questions] != asked
    assert len(load_tasks([str(tmp_path / "my.toml")], limit=3)[0].questions) == 3


def test_choices_in_both_forms(tmp_path: Path) -> None:
    base = 'capability = "c"\nmetric = "choice"\ndata = "rows.jsonl"\nprompt = "{q}"\n'
    (one,) = load_tasks([str(write(tmp_path, base + 'choices = "{names}"\nanswer = "y"\n'))])
    assert (one.questions[0].choices, one.questions[0].right) == ((" x", " y"), 1)
    form = base + 'choices = ["{a}", "no"]\ngold = "0"\ndelimiter = ""\nlength = "tokens"\n'
    (other,) = load_tasks([str(write(tmp_path, form))])
    assert (other.questions[4].choices, other.questions[4].right, other.length) == (("5", "no"), 0, "tokens")


def test_parts_and_computed_fields(tmp_path: Path) -> None:
    rows = (
        '{"kind": "b", "turns": [{"who": "A", "said": "hi"}, {"who": "B", "said": "yo"}], "more": [{"k": 1}, {"k": 2}]}'
    )
    toml = (
        'capability = "c"\nmetric = "exact"\ndata = "{part}.jsonl"\neach = ["more"]\n'
        'prompt = "{talk} {link} {each.k}"\nanswer = "{each.k}"\n'
        '[fields.talk]\nof = "{turns}"\neach = "{who}: {said}"\njoin = "; "\n'
        '[fields.link]\nof = "{kind}"\nmap = { b = "because" }\n'
        '[parts.rows]\n[parts.other]\ndata = "rows.jsonl"\nmetric = "f1"\n'
    )
    one, other = load_tasks([str(write(tmp_path, toml, rows))])
    assert [question.prompt for question in one.questions] == ["A: hi; B: yo because 1", "A: hi; B: yo because 2"]
    assert (one.name, one.metric, other.name, other.metric) == ("my/rows", "exact", "my/other", "f1")


@pytest.mark.parametrize(
    ("toml", "message"),
    [
        (PLAIN + "shot = 3\n", "value that cannot be"),
        (PLAIN + 'shotz = "3"\n', "key that is not known"),
        (PLAIN.replace('"exact"', '"best"'), "value that cannot be"),
        (PLAIN.replace('data = "rows.jsonl"\n', ""), "either data, a file, or dataset"),
        (PLAIN.replace("{q}", "{quest}"), "no such field"),
        (PLAIN.replace("{q}", "{names}"), "is a list"),
        (PLAIN.replace("{q}", "{q"), "stands alone"),
        (PLAIN.replace("{q}", "{q|shout}"), "filter that is not known"),
        (PLAIN.replace('"exact"', '"choice"'), "choices and gold"),
        (PLAIN.replace('"exact"', '"code"'), "tests, as the metric"),
        (PLAIN.replace('answer = "{a}"\n', ""), "an answer"),
        (PLAIN + "shots = 21\n", "fewer rows than examples"),
        (PLAIN + "shots = 20\n", "No row is left"),
        (PLAIN.replace("rows.jsonl", "none.jsonl"), "no such file of questions"),
        (PLAIN + 'columns = ["a", "b"]\n', "another number of columns"),
        (PLAIN + 'records = "rows"\n', "cannot be read"),
        (PLAIN + "max_new_tokens = 0\n", "of 1 or more"),
        (PLAIN + "fields = { x = { of = '{a}', map = { z = '1' } } }\n", "does not know a row's value"),
        (PLAIN.replace('"exact"', '"choice"') + 'choices = "{names}"\ngold = "7"\n', "not one of its choices"),
        (PLAIN.replace('"exact"', '"choice"') + 'choices = "{names}"\n', "none of its choices"),
        ("x = [", "not valid TOML"),
    ],
)
def test_what_cannot_be_is_told(toml: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(BadFileError) as refused:
        load_tasks([str(write(tmp_path, toml))])
    assert message in str(refused.value)
    assert str(tmp_path) in str(refused.value), "the file is named"


def test_names_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="arc-easy"):
        load_tasks(["arc-hard"])
    with pytest.raises(RequestError, match=r"--task-data DIR, a folder that holds arc_easy.jsonl"):
        load_tasks(["arc-easy"])
    with pytest.raises(RequestError, match="no such part"):
        load_tasks(["xcopa/xx"], tmp_path)
    with pytest.raises(RequestError, match="no parts"):
        load_tasks(["piqa/xx"], tmp_path)
    with pytest.raises(BadFileError, match="no such task file"):
        load_tasks([str(tmp_path / "none.toml")])


def test_templates() -> None:
    row = {"a": {"b": ["x", "Yes."]}, "n": 3, "code": "a\r\nb"}
    assert text_of("{{{n}}} {a.b.1|no_stop|lower_first}", row, "here") == "{3} yes"
    assert value_of("{a.b}", row, "here") == ["x", "Yes."]
    assert value_of("{a.b|lower}", row, "here") == ["x", "yes."]
    assert text_of("{a.b|lines}", row, "here") == "x\nYes."
    assert text_of("{code|no_returns}", row, "here") == "a\nb"
    check_template("{a} {{}}", "here")
    with pytest.raises(BadFileError, match=r"here: a\.c, at 'c'"):
        text_of("{a.c}", row, "here")


def test_a_saved_dataset(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_list(ROWS).save_to_disk(str(tmp_path / "saved"))
    path = write(tmp_path, PLAIN.replace('data = "rows.jsonl"', 'dataset = "saved"'))
    plain = load_tasks([str(write(tmp_path, PLAIN))])[0]
    path = write(tmp_path, PLAIN.replace('data = "rows.jsonl"', 'dataset = "saved"'))
    assert load_tasks([str(path)])[0].questions == plain.questions


# name: (tasks, questions, questions whose expected answer is checked below)
SETS = {
    "arc-easy": (1, 1188), "piqa": (1, 919), "winogrande": (1, 633), "nq-open": (1, 500), "gsm8k": (1, 250),
    "mgsm": (5, 5 * 247), "mbpp": (1, 500), "qmsum": (1, 272), "xcopa": (11, 1100), "bbh": (20, 2000),
}  # fmt: skip


@pytest.mark.parametrize("name", SETS)
def test_the_public_sets_as_they_are_on_disk(name: str, eval_data: Path) -> None:
    assert set(SETS) == set(packaged_names())
    tasks = load_tasks([name], eval_data)
    check_tasks(tasks)
    assert (len(tasks), sum(len(task.questions) for task in tasks)) == SETS[name]
    for task in tasks:
        assert all(q.prompt or q.contexts for q in task.questions)
        assert len({q.hash for q in task.questions}) >= 0.97 * len(task.questions)


def test_questions_of_the_public_sets_word_by_word(eval_data: Path) -> None:
    """One of each, put together by hand from its row."""
    tasks = {task.name: task for name in SETS for task in load_tasks([name], eval_data)}
    row = json.loads((eval_data / "arc_easy.jsonl").read_text(encoding="utf-8").splitlines()[7])
    question = tasks["arc-easy"].questions[7]
    assert question.prompt == row["query"] + "\nAnswer:"
    assert question.choices == tuple(" " + choice for choice in row["choices"])
    assert question.right == row["gold"]

    row = json.loads((eval_data / "winogrande.jsonl").read_text(encoding="utf-8").splitlines()[2])
    question = tasks["winogrande"].questions[2]
    assert question.contexts == tuple(row["context_options"])
    assert question.choices == (" " + row["continuation"],) * 2

    lines = (eval_data / "xcopa/it/val.it.jsonl").read_text(encoding="utf-8").splitlines()
    row = next(json.loads(line) for line in lines if '"question": "effect"' in line)
    question = next(q for q in tasks["xcopa/it"].questions if q.prompt.startswith(row["premise"][:-1]))
    assert question.prompt == row["premise"][:-1] + " quindi"
    assert question.choices[0] == " " + row["choice1"][0].lower() + row["choice1"][1:]

    question = tasks["gsm8k"].questions[0]
    assert question.prompt.count("#### ") == 5
    assert question.answers[0].lstrip("-").replace(".", "").isdigit()

    assert tasks["mbpp"].questions[0].prompt.count("[DONE]") == 3
    assert tasks["mbpp"].questions[0].prompt.endswith("[BEGIN]\n")
    assert all(len(question.tests) >= 3 for question in tasks["mbpp"].questions)

    first = json.loads((eval_data / "qmsum.val.jsonl").read_text(encoding="utf-8").splitlines()[0])
    turn = first["meeting_transcripts"][0]
    question = tasks["qmsum"].questions[0]
    assert question.prompt.startswith(f"Transcript of a meeting:\n{turn['speaker']}: {turn['content']}\n")
    assert question.prompt.endswith(f"\n\nQuestion: {first['general_query_list'][0]['query']}\nAnswer:")
    assert question.answers == (first["general_query_list"][0]["answer"],)

    line = (eval_data / "mgsm/mgsm_de.tsv").read_text(encoding="utf-8").splitlines()[0].split("\t")
    assert any(q.label == f"Frage: {line[0]}\nAntwort:" and q.answers == (line[1],) for q in tasks["mgsm/de"].questions)
    assert all(q.answers[0].startswith("(") for q in tasks["bbh/snarks"].questions)
    assert max(len(q.answers) for q in tasks["nq-open"].questions) > 3
