"""The lm-eval tasks that mico ships, and what is said of tasks that are unknown or cannot be made."""

from __future__ import annotations

import importlib
import json
import random
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

lm_eval = pytest.importorskip("lm_eval")

from lm_eval.tasks import TaskManager  # noqa: E402

from mico.console import Console  # noqa: E402
from mico.data import embedded_corpus  # noqa: E402
from mico.errors import UserError  # noqa: E402
from mico.loading import load_model  # noqa: E402
from mico.metrics import harness, harness_tasks  # noqa: E402
from mico.metrics.harness import check_tasks, run_tasks  # noqa: E402
from mico.metrics.harness_tasks import OWN_TASKS, load_tasks  # noqa: E402
from mico.metrics.tasks import documentation  # noqa: E402

LIBRARY = {name: SimpleNamespace(kind=SimpleNamespace(name="TASK"), cfg={}) for name in ("hellaswag", "arc_easy")}


@pytest.fixture(autouse=True)
def _small_library(monkeypatch):
    """lm-eval's index of its own tasks takes seconds to read."""
    monkeypatch.setattr(harness_tasks, "_library", lambda: LIBRARY)


@pytest.fixture(scope="module")
def questions():
    return documentation.questions("test", documentation.QUESTIONS)


def plain(text: str) -> str:
    return " ".join(text.split())


# --- what is asked --------------------------------------------------------------------------------------------------


def test_every_answer_follows_its_context_and_no_other_does(questions):
    held_out = [plain(text) for text in embedded_corpus("test").documents]
    for asked in questions:
        right = asked["choices"][asked["answer"]]
        assert any(f"{asked['context']} {right}" in text for text in held_out)
        for wrong in set(asked["choices"]) - {right}:
            assert any(wrong in text for text in held_out)
            assert not any(f"{asked['context']} {wrong}" in text for text in held_out)


def test_nothing_that_was_calibrated_on_is_asked(questions):
    calibration = [plain(text) for text in embedded_corpus("train").documents]
    everything = "\n".join(calibration)
    asked = [f"{one['context']} {one['choices'][one['answer']]}" for one in questions]
    for passage in [*asked, *map(plain, documentation.passages())]:
        words = passage.split(" ")
        assert not any(" ".join(words[start : start + 12]) in everything for start in range(0, len(words) - 12, 12))
    for example in documentation.questions("train", documentation.EXAMPLES):
        assert any(example["context"] in text for text in calibration)


def test_neither_length_nor_place_gives_the_answer_away(questions):
    assert all(len(set(map(len, asked["choices"]))) == 1 for asked in questions)
    assert all(len(set(asked["choices"])) == documentation.ANSWERS for asked in questions)
    places = Counter(asked["answer"] for asked in questions)
    expected = len(questions) / documentation.ANSWERS
    chi_square = sum((places[place] - expected) ** 2 / expected for place in range(documentation.ANSWERS))
    assert chi_square < 16.3  # 3 degrees of freedom, one in a thousand


def test_there_are_enough_questions_and_they_are_the_same_every_time(questions):
    assert len(questions) >= 200 and len(documentation.passages()) >= 40
    assert len({asked["topic"] for asked in questions}) >= 20
    assert max(Counter(asked["topic"] for asked in questions).values()) <= documentation.A_TOPIC
    state = random.getstate()
    assert documentation.questions.__wrapped__("test", documentation.QUESTIONS) == questions
    assert random.getstate() == state


def test_passages_are_those_of_the_evaluation_share_and_do_not_overlap():
    passages, documents = documentation.passages(), embedded_corpus("test").documents
    assert all(documentation.SHORTEST <= len(passage) <= documentation.DOCUMENT for passage in passages)
    for passage in passages:
        assert any(passage in text for text in documents)
    assert len(set(passages)) == len(passages)


def test_lm_eval_makes_both_tasks_from_the_folder_alone():
    loaded = TaskManager(include_defaults=False, include_path=str(OWN_TASKS)).load(["mico_choice", "mico_rolling"])
    choice, rolling = loaded["tasks"]["mico_choice"], loaded["tasks"]["mico_rolling"]
    asked = choice.eval_docs[0]
    assert choice.doc_to_text(asked) == asked["context"]
    assert choice.doc_to_choice(asked) == asked["choices"] and choice.doc_to_target(asked) == asked["answer"]
    choice.set_fewshot_seed(0)
    prompt = choice.fewshot_context(asked, 2)
    assert prompt.endswith(asked["context"]) and prompt.count("\n\n") == 2
    assert rolling.doc_to_target(rolling.eval_docs[0]) == documentation.passages()[0]


def test_the_questions_can_be_answered(monkeypatch):
    monkeypatch.setattr(harness, "_ASK_ENVIRONMENT", lambda: "a test")
    loaded = load_model("tiny-llama", device="cpu")
    found = run_tasks(loaded.model, loaded.tokenizer, ["mico_choice"], None, limit=20, console=Console())
    assert found["results"]["mico_choice"]["acc_mutual_info,none"] > 0.45  # chance: 0.25 ± 0.09


# --- what is said ---------------------------------------------------------------------------------------------------


def write(folder: Path, name: str, **described: object) -> Path:
    file = folder / f"{name}.yaml"
    file.write_text(yaml.safe_dump(dict(task=name, test_split="test", output_type="multiple_choice") | described))
    return file


def local(file: str) -> dict:
    asked = dict(doc_to_text="q", doc_to_choice=["yes", "no"], doc_to_target="a")
    return asked | dict(dataset_path="json", dataset_kwargs=dict(data_files=dict(test=file)))


@pytest.fixture
def rows(tmp_path, monkeypatch):
    """A data file in the working folder, named without its folder."""
    (tmp_path / "rows.jsonl").write_text("".join(f"{json.dumps(dict(q='Is it?', a=i % 2))}\n" for i in range(3)))
    monkeypatch.chdir(tmp_path)
    return "rows.jsonl"


def test_names_patterns_and_files_are_found(tmp_path, rows):
    file = write(tmp_path, "mine", **local(rows))
    named = ["mico_rolling", "mine"]
    assert list(load_tasks(named, str(tmp_path))["tasks"]) == named
    assert list(load_tasks(["mico_*", " mine "], str(tmp_path))["tasks"]) == ["mico_choice", *named]
    assert list(load_tasks([str(file)], None)["tasks"]) == ["mine"]
    assert check_tasks(["mine"], str(tmp_path)) is None


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["mico_choise"], r"--tasks mico_choise: unknown task: did you mean mico_choice\b.*\?"),
        (["hellaswog"], r"--tasks hellaswog: unknown task: did you mean hellaswag\?"),
        (["qqqqqqqq"], "--tasks qqqqqqqq: unknown task: `lm_eval ls tasks` lists all"),
        (["zzz_*"], r"--tasks zzz_\*: unknown task"),
        (["none.yaml"], "--tasks none.yaml: there is no such file"),
        ([" "], "--tasks: no name given: try mico_choice,mico_rolling"),
    ],
)
def test_an_unknown_name_is_told_with_the_nearest(names, message):
    with pytest.raises(UserError, match=message):
        check_tasks(names, None)


def test_a_folder_that_is_none_and_a_file_that_is_no_yaml_are_named(tmp_path):
    with pytest.raises(UserError, match=f"--include-path {tmp_path / 'absent'}: is not a folder"):
        check_tasks(["mico_choice"], str(tmp_path / "absent"))
    (tmp_path / "bad.yaml").write_text("task: bad\n  indented: [\n")
    with pytest.raises(UserError, match=r"--tasks bad: unknown task: .*bad.yaml cannot be read: "):
        check_tasks(["bad"], str(tmp_path))


def test_a_data_set_of_the_hub_is_named_with_the_remedy(tmp_path):
    write(tmp_path, "far", dataset_path="nobody/nothing", **dict(doc_to_text="q", doc_to_target="a"))
    message = r"task far: its data set nobody/nothing cannot be loaded \(.*\): check the network .* --include-path"
    with pytest.raises(UserError, match=message) as told:
        check_tasks(["far"], str(tmp_path), offline=True)
    assert "\n" not in str(told.value)


def test_the_member_of_a_group_that_cannot_be_loaded_is_named(tmp_path, rows):
    write(tmp_path, "near", **local(rows))
    write(tmp_path, "far", **local("absent.jsonl"))
    (tmp_path / "all.yaml").write_text(yaml.safe_dump(dict(group="all_of_them", task=["near", "far"])))
    message = f"task far: its data_files absent.jsonl cannot be read .*count from the working folder, {tmp_path}"
    with pytest.raises(UserError, match=message):
        check_tasks(["all_of_them"], str(tmp_path))


def test_a_description_that_does_not_fit_the_data_is_named(tmp_path, rows):
    write(tmp_path, "wrong", **local(rows) | dict(doc_to_target="{{absent}}"))
    with pytest.raises(UserError, match=r"task wrong: its description is wrong: .*: mend its YAML file"):
        check_tasks(["wrong"], str(tmp_path))


def test_tasks_that_run_code_or_show_images_are_refused(tmp_path, rows):
    write(tmp_path, "code", unsafe_code=True, **local(rows))
    write(tmp_path, "image", doc_to_image="q", **local(rows))
    with pytest.raises(UserError, match="--tasks code: runs code that the model writes"):
        check_tasks(["code"], str(tmp_path))
    with pytest.raises(UserError, match="--tasks image: shows images or sound"):
        check_tasks(["image"], str(tmp_path))


def test_a_task_asked_for_twice_is_refused(tmp_path, rows):
    write(tmp_path, "one", **local(rows))
    for group in ("a", "b"):
        (tmp_path / f"{group}.yaml").write_text(yaml.safe_dump(dict(group=f"group_{group}", task=["one"])))
    with pytest.raises(UserError, match="--tasks: lm-eval refuses: Duplicate task 'one'"):
        check_tasks(["group_a", "group_b"], str(tmp_path))


@pytest.mark.parametrize(
    ("missing", "imported"),
    [
        ("lm_eval.api.task", ["mico.metrics.harness_tasks"]),
        ("accelerate", ["mico.metrics.harness_model", "lm_eval.models.huggingface"]),
    ],
)
def test_a_missing_lm_eval_is_told_in_one_line(missing, imported, monkeypatch):
    for name in imported:
        package, _, module = name.rpartition(".")
        monkeypatch.delattr(importlib.import_module(package), module, raising=False)
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(UserError, match=rf"--tasks needs lm-eval .* \(.*{missing}.*\): pip install 'mico\[eval\]'"):
        check_tasks(["mico_choice"], None)
