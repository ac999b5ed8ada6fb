"""Series from CSV files: windows, the split in time, units, and wrong files."""

import itertools

import numpy as np
import pytest

from moex.config.base import ConfigError
from moex.data.batches import eval_batches, train_iterator
from moex.data.series import Series, prepare

NAMES = ("date", "heat", "wind")


def write_csv(path, steps=60, *, names=NAMES, start=0):
    """Step t has the numbers t and 100 - 2 t."""
    lines = [",".join(names)]
    for t in range(start, start + steps):
        row = {"date": f"2020-01-01 {t}", "heat": t, "wind": 100 - 2 * t}
        lines.append(",".join(str(row.get(name, 0)) for name in names))
    path.write_text("\n".join(lines) + "\n")
    return str(path)


@pytest.fixture
def file(tmp_path):
    return write_csv(tmp_path / "a.csv")


def read(*paths, seq_len=4, overlap=0, scoring=False, **fields):
    config = Series(paths=paths, **fields)
    quiet = {"log": lambda line: None, "scoring": scoring}
    return config, prepare(config, seq_len, overlap=overlap, **quiet)


def steps_of(values, scale):
    """Numbers as they are in the file."""
    mean, deviation = np.array(scale).T
    return values * deviation + mean


def test_windows_hold_the_tokens_and_the_one_after(file):
    config, data = read(file, patch=3, stride=2, holdout=0.25)
    example = data.train[0][5]
    assert example["values"].shape == example["targets"].shape == (4, 3, 2)
    heat = steps_of(example["values"], config.scale)[..., 0]
    np.testing.assert_allclose(heat.reshape(-1), np.arange(10, 22), atol=1e-4)
    after = steps_of(example["targets"], config.scale)[..., 0]
    np.testing.assert_allclose(after.reshape(-1), np.arange(13, 25), atol=1e-4)
    # 45 steps are trained on; a window takes 15 and begins every 2.
    assert len(data.train[0]) == 1 + (45 - 15) // 2


def test_the_end_of_a_series_is_held_out_and_each_target_scored_once(file):
    for overlap, seq_len in ((0, 4), (2, 4), (3, 4), (0, 40)):
        config, data = read(file, seq_len=4, overlap=overlap, holdout=0.5)
        if seq_len == 40:
            config, data = read(file, seq_len=28, holdout=0.5)
        scored = []
        for batch in eval_batches(data, batch_size=3):
            told = steps_of(batch["targets"], config.scale)[..., 0, 0]
            scored += list(told[batch["loss_mask"] > 0])
        np.testing.assert_allclose(sorted(scored), np.arange(31, 60), atol=1e-3)


def test_units_are_those_of_what_is_trained_on(file):
    config, data = read(file, holdout=0.5)
    heat = np.arange(30)
    expected = [(heat.mean(), heat.std()), (100 - 2 * heat.mean(), 2 * heat.std())]
    np.testing.assert_allclose(config.scale, expected)
    assert config.columns == ("heat", "wind")
    first = steps_of(data.train[0][0]["values"][0, 0], config.scale)
    np.testing.assert_allclose(first, [0, 100], atol=1e-4)


def test_a_column_that_does_not_change_has_deviation_1(tmp_path):
    file = write_csv(tmp_path / "a.csv", names=("date", "heat", "still"))
    config, _ = read(file)
    assert config.scale[1] == (0.0, 1.0)


def test_training_batches_are_a_function_of_one_index(file):
    _, data = read(file)
    first = list(itertools.islice(train_iterator(data, batch_size=4, seed=1), 5))
    later = next(train_iterator(data, batch_size=4, seed=1, start=12))
    for name, value in first[3].items():
        np.testing.assert_array_equal(later[name], value, err_msg=name)
    other = next(train_iterator(data, batch_size=4, seed=2))
    assert (other["example_id"] != first[0]["example_id"]).any()


def test_files_are_domains_in_proportion_to_their_windows(tmp_path):
    long = write_csv(tmp_path / "long.csv", 320)
    short = write_csv(tmp_path / "short.csv", 80, start=500)
    _, data = read(long, short, holdout=0.25)
    assert data.domains == ("long", "short")
    assert data.weights == (1.0, pytest.approx(56 / 236))
    batches = itertools.islice(train_iterator(data, batch_size=8, seed=0), 20)
    domains = np.concatenate([batch["domain"] for batch in batches])
    assert 0.1 < domains.mean() < 0.3


MISTAKES = {
    "a word": ("5,x,3", r"line 4, column 'heat' = 'x': must be a finite number"),
    "no number": ("5,,3", r"line 4, column 'heat' = '': must be a finite number"),
    "not finite": ("5,1,nan", r"line 4, column 'wind' = 'nan': must be a finite"),
    "grouped digits": ("5,1,1_0", r"line 4, column 'wind' = '1_0': must be a finite"),
    "a column less": ("5,1", r"line 4: has 2 columns, not the 3 of line 1"),
    "a column more": ("5,1,2,3", r"line 4: has 4 columns, not the 3 of line 1"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_wrong_line_is_told_with_file_line_and_column(tmp_path, name):
    line, said = MISTAKES[name]
    file = tmp_path / "bad.csv"
    file.write_text(f"date,heat,wind\n0,1,2\n1,2,3\n{line}\n5,6,7\n")
    with pytest.raises(ConfigError, match=rf"data\.paths: .*bad\.csv, {said}"):
        read(str(file))


def test_columns_that_are_not_there_are_told_with_those_that_are(file, tmp_path):
    said = r"time = 'dates': .*a\.csv has no such column\. Did you mean 'date'\?"
    with pytest.raises(ConfigError, match=said):
        read(file, time="dates")
    said = r"columns: .*has 0 columns 'heats'\. Did you mean 'heat'\? It has \('date',"
    with pytest.raises(ConfigError, match=said):
        read(file, columns=("heats",))
    twice = write_csv(tmp_path / "b.csv", names=("date", "heat", "heat"))
    with pytest.raises(ConfigError, match="has 2 columns 'heat'"):
        read(twice)
    other = write_csv(tmp_path / "c.csv", names=("date", "heat"))
    with pytest.raises(ConfigError, match=r"c\.csv has 0 columns 'wind'"):
        read(file, other)


def test_series_that_are_too_short_or_all_held_out_are_refused(file):
    with pytest.raises(ConfigError, match="48 steps to train on, and a window takes 5"):
        read(file, seq_len=50)
    with pytest.raises(ConfigError, match="scale = None: nothing is trained on"):
        read(file, holdout=1.0)
    with pytest.raises(ConfigError, match="paths"):
        read()
    scale = ((0.0, 1.0), (0.0, 1.0))
    _, data = read(file, holdout=1.0, scale=scale, scoring=True)
    assert data.holds_out and data.weights == (0.0,)
    with pytest.raises(ConfigError, match="one pair for each of the 2 columns"):
        read(file, scale=scale[:1])
