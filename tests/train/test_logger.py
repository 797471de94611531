import pytest

from llm_quest.errors import MissingError
from llm_quest.train.logger import LineLogger, NullLogger, ProgressBarLogger, TensorBoardLogger, make_logger
from tests.train.small import go


def test_without_a_terminal_there_is_one_line_per_event(capsys):
    go(4, show=make_logger(), log_every=2)
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(" rank 0 ")[1].split("  ")[0] for line in lines] == [
        "started: steps 4",
        "step 1/4",
        "step 2/4",
        "step 4/4",
        "finished: step 4",
    ]
    assert all(word in lines[2] for word in ("loss ", " tok/s", "lr ", "ETA 0:00:0"))


def test_the_bar_shows_a_run_and_steps_aside_for_events(capsys):
    go(3, show=ProgressBarLogger())
    said = capsys.readouterr().err
    assert "started: steps 3" in said
    assert "3/3" in said


def test_other_ranks_and_the_quiet_see_nothing():
    assert isinstance(make_logger(rank=1), NullLogger)
    assert isinstance(make_logger(quiet=True), NullLogger)
    assert isinstance(make_logger(), LineLogger)


def test_tensorboard_is_written_or_its_absence_names_the_remedy(tmp_path):
    try:
        import tensorboard  # noqa: F401
    except ImportError:
        with pytest.raises(MissingError, match="pip install 'llm-quest\\[tensorboard\\]'"):
            TensorBoardLogger(tmp_path, NullLogger())
        return
    go(3, show=TensorBoardLogger(tmp_path, NullLogger()))
    assert list(tmp_path.glob("events.out.*"))
