"""The recommendation in each direction, and that neither names nor order have a part in it."""

import dataclasses
import shutil
from pathlib import Path

import numpy as np
import pytest

from mlet_dist.errors import UserError
from mlet_dist.quality.paired_bootstrap import Difference
from mlet_dist.report.advice import advice
from mlet_dist.report.arm_details import Details, details_of
from mlet_dist.report.figures import figures_of
from mlet_dist.report.measured_arms import Measurement, difference_of_outputs, measure
from mlet_dist.report.measured_runs import MeasuredRun
from mlet_dist.report.recommendation import Recommendation, recommend
from mlet_dist.report.report_text import arms_table
from tests.report.arms_on_disk import MadeUpArms

SIZES = {"dcp": 1000, "int8": 300, "int4": 200}
MARGIN = 0.004


def decided(runs: list[MeasuredRun]) -> tuple[Measurement, Recommendation, str]:
    found = measure(runs)
    chosen = recommend(found, MARGIN)
    return found, chosen, "\n".join(advice(found, chosen, MARGIN))


def test_a_smaller_table_of_equal_quality_is_recommended(tmp_path: Path) -> None:
    made = MadeUpArms(tmp_path)
    runs = made.arm("single", "single", 0.1, SIZES) + made.arm("small", "mlet", 0.1, {"dcp": 250, "int4": 50})
    _, chosen, text = decided(runs)
    assert chosen.smallest is not None
    assert (chosen.smallest.arm, chosen.smallest.output, chosen.verdict) == ("small", "int4", "holds")
    assert chosen.times_smaller is not None
    assert chosen.times_smaller.value == 20
    assert chosen.times_smaller.low <= 20 <= chosen.times_smaller.high == 20
    assert text.startswith(
        "Serve small, int4: its tables take 50 B, 20.0 times less than 1 kB of the single layer in float32"
    )
    assert "by quantising the single layer alone, 5.0 (" in text
    assert "do not bother with MLET for its quality" in text
    assert "Chosen in this way on valid, they are 20.0 times smaller (small, int4), with " in text


def test_a_smaller_table_of_lower_quality_is_not_recommended(tmp_path: Path) -> None:
    made = MadeUpArms(tmp_path)
    runs = made.arm("single", "single", 0.1, {"dcp": 1000}) + made.arm("small", "mlet", 0.8, {"dcp": 250})
    _, chosen, text = decided(runs)
    assert chosen.smallest is None
    assert chosen.verdict is None
    assert chosen.times_smaller is not None
    assert chosen.times_smaller.value == 1
    assert text.startswith("Do not bother: no output that is smaller")
    assert "Chosen in this way" not in text
    _, _, text = decided(
        made.arm("single", "single", 0.1, {"dcp": 1000}) + made.arm("mlet", "mlet", 0.8, {"dcp": 1000})
    )
    assert text.startswith("Do not bother: no output that was measured is smaller than the float32 tables")


def test_the_single_layer_itself_may_be_all_that_it_takes(tmp_path: Path) -> None:
    made = MadeUpArms(tmp_path)
    runs = made.arm("single", "single", 0.1, SIZES) + made.arm("mlet", "mlet", 0.8, SIZES)
    _, chosen, text = decided(runs)
    assert chosen.smallest is not None
    assert (chosen.smallest.arm, chosen.smallest.output) == ("single", "int4")
    assert "It is the single layer itself, quantised: do not bother with other models for their size." in text


def test_of_outputs_of_one_size_the_reference_is_preferred_and_then_the_cheapest(tmp_path: Path) -> None:
    made = MadeUpArms(tmp_path)
    runs = made.arm("better", "mlet", 0.05, {"dcp": 1000, "int4": 200}, training_bytes=100)
    runs += made.arm("single", "single", 0.1, SIZES)
    assert decided(runs)[1].smallest.arm == "single"
    runs += made.arm("cheap", "mlet", 0.1, {"int4": 100, "dcp": 400}, training_bytes=10)
    runs += made.arm("dear", "mlet", 0.05, {"int4": 100, "dcp": 400}, training_bytes=11)
    assert decided(runs)[1].smallest.arm == "cheap"


def test_what_does_not_hold_on_the_test_split_is_said(tmp_path: Path) -> None:
    made = MadeUpArms(tmp_path)
    runs = made.arm("single", "single", 0.1, {"dcp": 1000})
    runs += made.arm("small", "mlet", {"valid": 0.1, "test": 1.0}, {"dcp": 250})
    _, chosen, text = decided(runs)
    assert chosen.verdict == "fails"
    assert "it is not within 0.004 there. Do not rely on it" in text


def test_a_better_arm_is_named_and_one_that_its_control_matches_is_not(tmp_path: Path) -> None:
    made = MadeUpArms(tmp_path)
    single = made.arm("single", "single", 0.8, {"dcp": 1000})
    better = made.arm("mlet", "mlet", 0.1, {"dcp": 1000})

    def control(noise: float, name: str = "control of mlet") -> list[MeasuredRun]:
        return made.arm(name, "control", noise, {"dcp": 1000}, control_of="mlet")

    _, chosen, text = decided(single + better + control(0.8))
    assert [each.arm for each in chosen.better] == ["mlet"]
    assert text.startswith("mlet is better than the single layer at no more served bytes: -0.")
    assert "No output that was measured is smaller than the float32 tables of the single layer (1 kB)." in text
    assert "Do not bother" not in text
    _, chosen, text = decided(single + better + control(0.1))
    assert [each.arm for each in chosen.of_controls] == ["mlet"]
    assert "mlet" not in [each.arm for each in chosen.better]
    assert "the gain may be due to the learning rate, and not to the factorisation" in text
    died = [dataclasses.replace(run, fault="dead") for run in control(0.8)]
    _, chosen, _ = decided(single + better + died)
    assert [each.arm for each in chosen.of_controls] == ["mlet"]
    # It is a control by what is recorded, whatever its name is; and another arm of that name is none.
    _, chosen, _ = decided(single + better + control(0.1, "control of mlet (tuesday)"))
    assert [each.arm for each in chosen.of_controls] == ["mlet"]
    _, chosen, _ = decided(single + better + made.arm("control of mlet", "mlet", 0.1, {"dcp": 1000}))
    assert "mlet" in [each.arm for each in chosen.better]
    own = made.arm("control of mlet", "mlet", 0.8, {"dcp": 1000})
    _, chosen, _ = decided(single + better + [dataclasses.replace(run, fault="dead") for run in own])
    assert [each.arm for each in chosen.better] == ["mlet"]
    larger = made.arm("mlet", "mlet", 0.1, {"dcp": 1001})
    assert recommend(measure(single + larger), MARGIN).better == []


def test_names_and_order_do_not_matter(tmp_path: Path) -> None:
    made = MadeUpArms(tmp_path)
    first, second = made.arm("a", "single", 0.1, SIZES), made.arm("b", "single", 0.12, SIZES)
    renamed = [dataclasses.replace(run, arm={"a": "b", "b": "a"}[run.arm]) for run in second + first]
    found, again = decided(first + second)[0], decided(renamed)[0]
    names = {"a": "b", "b": "a"}
    assert names[found.reference] == again.reference
    of_name = {(names[each.arm], each.output): each for each in again.outputs}
    for each in found.outputs:
        for split in ("valid", "test"):
            ours, theirs = each.loss(split), of_name[each.arm, each.output].loss(split)
            assert ours is not None
            assert theirs is not None
            assert ours.by_seed == theirs.by_seed
            assert ours.difference is not None
            assert theirs.difference is not None
            assert dataclasses.astuple(ours.difference) == pytest.approx(dataclasses.astuple(theirs.difference))
    assert recommend(found).times_smaller == recommend(again).times_smaller


def test_the_interval_of_two_equal_arms_covers_zero_as_often_as_it_says(tmp_path: Path) -> None:
    covered, trials = 0, 120
    values, half_widths = [], []
    for trial in range(trials):
        made = MadeUpArms(tmp_path / str(trial), seed=trial, rows=400)
        runs = made.arm("a", "single", 0.5, {"dcp": 2}, seeds=(0, 1, 2)) + made.arm("b", "mlet", 0.5, {"dcp": 1})
        quality = measure(runs, reference="a").float_output("b").loss("test")
        assert quality is not None
        assert quality.difference is not None
        covered += quality.difference.is_noise
        values.append(quality.difference.value)
        half_widths.append((quality.difference.high - quality.difference.low) / 2)
    # 95% of 120 are 114; rows and seeds share a part of the noise, so that intervals may be a little too wide.
    assert covered >= 114 - 3 * np.sqrt(trials * 0.05 * 0.95)
    # Nor may they be wide for nothing: 1.96 deviations of rows and 4.30 of seeds (two degrees of freedom) are together
    # at most 4.73 of the whole, and what both share counts at most twice.
    assert np.median(half_widths) < 4.73 * np.sqrt(2) * np.std(values)


def test_runs_that_say_nothing_have_no_part(tmp_path: Path) -> None:
    made = MadeUpArms(tmp_path)
    runs = made.arm("single", "single", 0.1, {"dcp": 10}) + made.arm("mlet", "mlet", 0.1, {"dcp": 5})
    runs[1] = dataclasses.replace(runs[1], fault="not finite at step 7", summary={}, outputs={}, scores=None)
    found, _, _ = decided(runs)
    assert [run.seed for run in found.runs["single"]] == [0, 2]
    assert found.faults == {"single": {1: "not finite at step 7"}}
    with pytest.raises(UserError, match="all runs failed: they diverged"):
        measure([dataclasses.replace(run, fault="dead") for run in runs])


def test_failed_runs_of_what_is_recommended_are_named(tmp_path: Path) -> None:
    made = MadeUpArms(tmp_path)
    runs = made.arm("single", "single", 0.1, {"dcp": 10}) + made.arm("mlet", "mlet", 0.1, {"dcp": 5})
    assert "runs of mlet failed" not in decided(runs)[2]
    runs[4] = dataclasses.replace(runs[4], fault="not finite at step 7", summary={}, outputs={}, scores=None)
    assert "1 of 3 runs of mlet failed, and its means leave them out" in decided(runs)[2]


def test_an_arm_and_its_control_are_compared_by_their_own_seeds(tmp_path: Path) -> None:
    made = MadeUpArms(tmp_path)
    runs = made.arm("single", "single", 0.8, {"dcp": 10}, seeds=(0, 1))
    runs += made.arm("mlet", "mlet", 0.1, {"dcp": 10}, seeds=(0, 1, 2, 3))
    runs += made.arm("control", "control", 0.3, {"dcp": 10}, seeds=(1, 2, 3), control_of="mlet")
    found = measure(runs)
    ours, theirs = found.float_output("mlet"), found.float_output("control")
    difference = difference_of_outputs(ours, theirs, "valid")
    assert difference is not None
    by_seed = [ours.loss("valid").by_seed[seed] - theirs.loss("valid").by_seed[seed] for seed in (1, 2, 3)]
    assert difference.value == pytest.approx(np.mean(by_seed), abs=1e-12)
    back = difference_of_outputs(theirs, ours, "valid")
    assert back is not None
    assert back.value == pytest.approx(-difference.value, abs=1e-12)
    own = ours.loss("valid").difference
    assert own is not None
    of_reference = difference_of_outputs(ours, found.reference_output, "valid")
    assert of_reference is not None
    assert dataclasses.astuple(of_reference) == pytest.approx(dataclasses.astuple(own), abs=1e-12)


def test_what_cannot_be_compared_is_refused(tmp_path: Path) -> None:
    made = MadeUpArms(tmp_path / "one")
    other = MadeUpArms(tmp_path / "two", seed=1).arm("other", "mlet", 0.1, {"dcp": 5})
    single = made.arm("single", "single", 0.1, {"dcp": 10})
    with pytest.raises(UserError, match=r"the arms have scores of different rows of valid: row \d+ has label"):
        measure(single + other)
    with pytest.raises(UserError, match="no arm is a single layer, with which others are compared; name one of"):
        measure(other)
    with pytest.raises(UserError, match="--reference nobody: no arm with good runs has this name; the arms are single"):
        measure(single, reference="nobody")
    with pytest.raises(UserError, match="--label click: the data set has one label alone"):
        measure(single, label="click")


def test_nothing_is_claimed_of_a_split_without_predictions(tmp_path: Path) -> None:
    made = MadeUpArms(tmp_path)
    runs = made.arm("single", "single", 0.8, SIZES) + made.arm("mlet", "mlet", 0.1, SIZES)
    for run in runs:  # as a comparison has them
        shutil.rmtree(run.run / "valid")
    found, chosen, text = decided(runs)
    assert chosen.smallest is None
    assert chosen.better == []
    assert "no predictions of single rows of valid by single in float32" in text
    assert "do not bother" not in text.lower()
    assert "that training measured" not in text  # those of test are from predictions
    difference = found.float_output("mlet").loss("test")
    assert difference is not None
    assert difference.difference is not None
    assert difference.difference.high < 0


def test_a_reference_that_is_named_is_not_called_a_single_layer(tmp_path: Path) -> None:
    made = MadeUpArms(tmp_path)
    runs = made.arm("mine", "mlet", 0.1, SIZES) + made.arm("other", "mlet", 0.8, SIZES)
    found = measure(runs, reference="mine")
    text = "\n".join(advice(found, recommend(found, MARGIN), MARGIN))
    assert "of the reference in float32 (mine)." in text
    assert "It is the reference itself, quantised" in text
    assert "No arm is better than the reference by more than chance on valid" in text
    assert "single layer" not in text


def test_one_seed_in_common_is_said(tmp_path: Path) -> None:
    made = MadeUpArms(tmp_path)
    single = made.arm("single", "single", 0.1, SIZES, seeds=(0, 1))
    assert "another seed may change the recommendation" not in decided(single)[2]
    assert "another seed may change the recommendation" in decided(single[:1])[2]


@pytest.mark.parametrize("seeds", [(0,), (7,)])
def test_one_seed_of_a_better_arm_or_of_its_control_is_said(seeds: tuple[int, ...], tmp_path: Path) -> None:
    made = MadeUpArms(tmp_path)
    single, mlet = made.arm("single", "single", 0.8, {"dcp": 10}), made.arm("mlet", "mlet", 0.1, {"dcp": 10})
    control = made.arm("control", "control", 0.8, {"dcp": 10}, control_of="mlet")
    assert "another seed may change what is better" not in decided(single + mlet + control)[2]
    few = made.arm("mlet", "mlet", 0.1, {"dcp": 10}, seeds=seeds)
    assert "Intervals of mlet are for other rows alone, because they have no two seeds" in decided(single + few)[2]
    few = made.arm("control", "control", 0.8, {"dcp": 10}, seeds=seeds, control_of="mlet")
    _, chosen, text = decided(single + mlet + few)
    assert [each.arm for each in chosen.better] == ["mlet"]
    assert "Intervals of control are for other rows alone" in text
    smaller = made.arm("small", "mlet", 0.1, {"dcp": 5}, seeds=seeds)
    assert "another seed may change the recommendation" in decided(single + smaller)[2]


def test_few_rows_are_said(tmp_path: Path) -> None:
    """Of one row, the bootstrap gives intervals of no width."""
    for rows, said in ((1, "The split valid has 1 row alone. Intervals of so few"), (99, "valid has 99 rows alone")):
        made = MadeUpArms(tmp_path / str(rows), rows=rows)
        found, _, text = decided(made.arm("single", "single", 0.8, SIZES))
        assert found.rows == {"valid": rows, "test": rows}
        assert said in text
    assert (
        "rows alone. Intervals"
        not in decided(MadeUpArms(tmp_path / "more", rows=100).arm("a", "single", 0.8, SIZES))[2]
    )


def test_what_valid_chooses_by_its_means_is_shown_with_its_difference_on_test(tmp_path: Path) -> None:
    made = MadeUpArms(tmp_path)
    runs = made.arm("single", "single", 0.1, {"dcp": 1000, "int8": 300})
    runs += made.arm("lucky", "mlet", {"valid": 0.05, "test": 1.0}, {"dcp": 100})
    runs += made.arm("unlucky", "mlet", {"valid": 1.0, "test": 0.05}, {"dcp": 50})
    found, chosen, text = decided(runs)
    assert chosen.times_smaller is not None
    assert chosen.times_smaller.value == 20  # test chooses among what is shown on test
    assert chosen.by_mean is not None
    assert chosen.by_mean.arm == "lucky"
    quality = found.float_output("lucky").loss("test")
    assert quality is not None
    assert quality.difference is not None
    assert quality.difference.low > MARGIN
    assert f"they are 10.0 times smaller (lucky, fp32), with {quality.difference.value:+.4f} (" in text


def test_nothing_is_said_of_what_a_dead_control_would_show(tmp_path: Path) -> None:
    made = MadeUpArms(tmp_path)
    runs = made.arm("single", "single", 0.8, {"dcp": 10}) + made.arm("mlet", "mlet", 0.1, {"dcp": 10})
    control = made.arm("control", "control", 0.8, {"dcp": 10}, control_of="mlet")
    _, chosen, text = decided(runs + [dataclasses.replace(run, fault="dead") for run in control])
    assert [each.arm for each in chosen.of_controls] == ["mlet"]
    assert "it gains by the learning rate" not in text.replace("whether it gains by the learning rate", "")
    assert "all runs of its control, a single layer with MLET's effective learning rate, failed" in text


def test_outputs_that_not_all_runs_of_an_arm_have_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = MadeUpArms(tmp_path).arm("single", "single", 0.1, SIZES)
    first = {name: each for name, each in runs[0].outputs.items() if name != "int4"}
    for some in ([dataclasses.replace(runs[0], outputs=first), *runs[1:]],
                 [*runs[1:], dataclasses.replace(runs[0], outputs=first)]):  # fmt: skip
        assert [each.output for each in measure(some).outputs] == ["dcp", "int8"]
        assert "the report is without int4 of single, which not all of its runs were" in capsys.readouterr().err
    mixed = {"dcp-mixed": runs[0].outputs["dcp"]}
    with pytest.raises(UserError, match=r"the runs of single were not measured in the same float32 output, of dcp-m"):
        measure([dataclasses.replace(runs[0], outputs=mixed), *runs[1:]])


def test_a_split_that_an_arm_lacks_is_not_left_out_without_a_word(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = MadeUpArms(tmp_path)
    runs = made.arm("single", "single", 0.1, SIZES)
    assert measure(runs).splits == ("valid", "test")
    assert capsys.readouterr().err == ""
    other = of_metrics(made.arm("other", "mlet", 0.1, SIZES)[0], auc=0.7, logloss=0.5)
    assert measure([*runs, other]).choice_split == "test"
    assert (
        "without the split valid, of which there are no metrics of other; test chooses what is recommended"
        in capsys.readouterr().err
    )


def test_a_single_layer_without_predictions_is_no_reference_beside_one_with_them(tmp_path: Path) -> None:
    made = MadeUpArms(tmp_path)
    tuned = made.arm("tuned", "single", 0.8, SIZES)
    alone = [dataclasses.replace(run, scores=None) for run in made.arm("alone", "single", 0.1, SIZES)]
    found, chosen, _ = decided(tuned + alone)
    assert found.reference == "tuned"
    assert chosen.smallest is not None
    assert decided(alone)[0].reference == "alone"


def of_metrics(run: MeasuredRun, **metrics: float | None) -> MeasuredRun:
    """Return a run of which only the metrics of the split test are known."""
    return dataclasses.replace(run, outputs={"dcp": {"served_bytes": 10, "test": metrics}}, scores=None)


def test_an_undefined_auc_is_called_so(tmp_path: Path) -> None:
    runs = [of_metrics(run, auc=None, logloss=0.5) for run in MadeUpArms(tmp_path).arm("a", "single", 0.1, SIZES)]
    found, _, text = decided(runs)
    assert found.splits == ("test",)
    assert "that training measured" in text
    quality = found.reference_output.quality["test"]
    assert quality["logloss"].mean == 0.5
    assert np.isnan(quality["auc"].mean)
    details = details_of(found)
    (row,) = arms_table(found, details)[1]
    assert row[3:7] == ["0.5000 ± 0.0000", "reference", "undefined", ""]


def test_the_first_label_is_that_of_the_data_set(tmp_path: Path) -> None:
    run = MadeUpArms(tmp_path).arm("a", "single", 0.1, SIZES)[0]
    run = of_metrics(run, view_auc=0.7, view_logloss=0.5, click_auc=0.8, click_logloss=0.2)
    assert measure([run]).label == "view"
    assert measure([run], label="click").reference_output.quality["test"]["logloss"].mean == 0.2


def test_arms_of_other_data_sets_are_warned_of(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = (of_metrics(run, auc=0.7, logloss=0.5) for run in
                     MadeUpArms(tmp_path).arm("a", "single", 0.1, SIZES)[:2])  # fmt: skip
    data = dataclasses.replace(second.config.data, path="another")
    measure([first, dataclasses.replace(second, arm="b", config=dataclasses.replace(second.config, data=data))])
    assert "the runs are of the data sets another, none, and without predictions" in capsys.readouterr().err


def test_arms_that_predict_the_same_are_drawn(tmp_path: Path) -> None:
    made = MadeUpArms(tmp_path)
    single = made.arm("single", "single", 0.1, {"dcp": 10})
    found = measure(single + [dataclasses.replace(run, arm="same") for run in single])
    details = details_of(found)
    by_class = {"rare": {"logloss": (0.5, Difference(0.0, 1e-17, 2e-17))}}
    arms = {arm: dataclasses.replace(each, by_class=by_class) for arm, each in details.arms.items()}
    drawn = list(figures_of(found, Details(arms, {"rare": 1.0}), MARGIN))
    assert "frequency" in [each.name for each in drawn]
