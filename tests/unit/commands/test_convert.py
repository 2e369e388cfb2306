"""`dpo convert`: a file in, a file out, and what cannot be read."""

from pathlib import Path

import pytest

from dpo.cli.main import run

TRL = "model_name_or_path: m\ndataset_name: d\nlearning_rate: 5e-7\nbeta: 0.2\npush_to_hub: true\n"


def test_a_file_becomes_one_of_ours(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    theirs, ours = tmp_path / "theirs.yaml", tmp_path / "new" / "ours.yaml"
    theirs.write_text(TRL)
    assert run(["convert", str(theirs), "--num_gpus", "4", "--output", str(ours)]) == 0
    said = capsys.readouterr().out
    assert "beta: 0.2 -> loss.beta: 0.2" in said
    assert "learning_rate: 5e-07 -> train.learning_rate: 5e-07" in said  # YAML reads it as text
    assert said.index("not mapped") < said.index("push_to_hub: True")
    assert "x 4 GPU(s) -> train.pairs_per_step: 32" in said
    assert f"dpo check --config {ours}" in said
    assert "theirs.yaml" in ours.read_text()
    assert run(["convert", str(theirs), "--output", str(ours)]) == 2
    assert "is there already" in capsys.readouterr().err


def test_what_the_file_does_not_say_is_to_be_filled_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "x.yaml").write_text("beta: 0.1\n")
    monkeypatch.chdir(tmp_path)
    assert run(["convert", "x.yaml"]) == 0
    assert "fill in" in (said := capsys.readouterr().out)
    assert "model.name_or_path, data.train: the file does not say" in said
    assert (tmp_path / "x_dpo.yaml").is_file()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, "No such file"),
        ("a: [", "not YAML"),
        ("- a\n", "expected keys and values, got list"),
        ("train: {seed: 1}\n", "has a section train, as our own files have"),
    ],
)
def test_what_is_no_file_of_theirs_is_refused(
    tmp_path: Path, text: str | None, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "x.yaml"
    if text is not None:
        file.write_text(text)
    assert run(["convert", str(file), "--output", str(tmp_path / "y.yaml")]) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "y.yaml").exists()


@pytest.mark.parametrize("arguments", [["a", "b"], ["a.yaml", "--num_gpus", "0"], ["--output", "x"]])
def test_a_command_line_that_is_wrong(arguments: list[str]) -> None:
    assert run(["convert", *arguments]) == 2
