import pytest

from llm_quest.train.optimizers import SCHEDULE_SHAPES, make_lr_schedule, scale_schedule_after


def test_every_shape_warms_up_to_one_and_ends_at_its_floor():
    for shape in SCHEDULE_SHAPES:
        rate = make_lr_schedule(100, warmup_steps=10, shape=shape, min_lr_ratio=0.1)
        assert [rate(0), rate(4), rate(9), rate(10)] == pytest.approx([0.1, 0.5, 1.0, 1.0])
        assert rate(100) == pytest.approx(1.0 if shape == "constant" else 0.1)
        assert rate(500) == rate(100), "after its end the cosine must not rise again"


def test_the_shapes_in_the_middle_are_as_on_the_blackboard():
    assert make_lr_schedule(100)(50) == pytest.approx(0.5)
    assert make_lr_schedule(100)(25) == pytest.approx(0.8535534)
    assert make_lr_schedule(100, shape="linear")(25) == pytest.approx(0.75)
    assert [make_lr_schedule(100, shape="wsd")(step) for step in (0, 79, 80, 90, 95)] == pytest.approx(
        [1, 1, 1, 0.5, 0.25]
    )


def test_the_decay_is_a_part_of_the_whole_run_warm_up_included():
    """1000 steps, the last fifth falls: from step 800, also after 400 steps of warm-up; never within the warm-up."""
    rate = make_lr_schedule(1000, warmup_steps=400, shape="wsd", decay_fraction=0.2)
    assert [rate(step) for step in (399, 799, 800, 900, 950)] == pytest.approx([1, 1, 1, 0.5, 0.25])
    late = make_lr_schedule(100, warmup_steps=90, shape="wsd", decay_fraction=0.2)
    assert [late(step) for step in (89, 90, 95)] == pytest.approx([1, 1, 0.5])


def test_a_slowed_rate_is_the_same_until_its_step_and_a_part_of_it_from_there_on():
    plain = make_lr_schedule(100, shape="wsd")
    rate = scale_schedule_after(plain, 40, 0.3)
    assert [rate(step) for step in (0, 39)] == [1, 1]
    assert [rate(step) for step in (40, 79, 90)] == pytest.approx([0.3, 0.3, 0.15])


def test_no_warm_up_starts_at_the_peak_and_all_warm_up_is_allowed():
    assert make_lr_schedule(10)(0) == 1
    assert make_lr_schedule(10, warmup_steps=10)(9) == 1


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"shape": "cosin"}, "known: cosine"),
        ({"warmup_steps": 11}, "0 to 10"),
        ({"min_lr_ratio": 2.0}, "min_lr_ratio"),
        ({"decay_fraction": 0.0}, "decay"),
    ],
)
def test_a_wrong_schedule_says_what_is_allowed(wrong, words):
    with pytest.raises(ValueError, match=words):
        make_lr_schedule(10, **wrong)
