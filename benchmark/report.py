"""Tables and figures of learning curves, made from the files that runs leave behind.

    python benchmark/report.py                        # benchmark/results/curves
    python benchmark/report.py runs/a runs/b --center mean --out-dir somewhere
    python benchmark/report.py runs --by n_step gamma   # a curve for each value of these flags

Reads eval.csv (or eval.csv.gz) and config.json of every run below RESULTS and writes report.md,
report.csv and figures/. Statistics come from rliable (Agarwal et al., "Deep Reinforcement Learning
at the Edge of the Statistical Precipice", arXiv:2108.13264v4): interquartile means over seeds with
95 % intervals from the stratified bootstrap. The same files give the same tables, byte for byte.
The wall time is in the TensorBoard files; what the tables need of it is kept in wall.csv.
"""

import dataclasses
import itertools
import json
import re
import struct
import sys
from functools import partial
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import tyro
from rliable import library as rly
from scipy import stats

ROOT = Path(__file__).resolve().parents[1]
COLUMNS = ["global_step", "seed", "episode", "return", "length"]  # of eval.csv
# Okabe and Ito's colours, which readers with any kind of colour vision tell apart.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
LINES = ("-", "--", "-.", ":")
# Flags that may differ between the seeds of one curve.
FREE = ("seed", "num_seeds", "total_timesteps", "run_dir", "resume", "evaluate", "track")
FREE += ("wandb_project_name", "wandb_entity", "capture_video")
FREE += ("checkpoint_frequency", "log_frequency")
EARLIER = "an earlier JAX implementation (2021)"


@dataclasses.dataclass(frozen=True)
class Args:
    """Makes the tables and figures of learning curves."""

    # Run directories, or folders of them; what is under set_aside/ does not count.
    results: Annotated[tuple[Path, ...], tyro.conf.Positional] = (
        ROOT / "benchmark" / "results" / "curves",
    )
    by: tuple[str, ...] = ()  # flags of the scripts, such as n_step, that tell variants apart
    out_dir: Path = ROOT / "benchmark" / "results"  # for report.md, report.csv and figures/
    steps: tuple[int, ...] = (100_000, 250_000, 500_000, 1_000_000)  # columns of the tables
    center: Literal["iqm", "mean"] = "iqm"  # interquartile mean or mean over seeds
    reps: int = 2_000  # bootstrap resamples
    bootstrap_seed: int = 0  # of the resamples
    published: Path = ROOT / "benchmark" / "published.csv"  # results of others
    figures: bool = True  # draw the figures too


class Curves(NamedTuple):
    """All seeds of one algorithm on one task."""

    returns: pd.DataFrame  # index: step, a column for each seed; nan after a run's last evaluation
    minutes: pd.DataFrame  # the same of the wall time; without columns where it is not known
    configs: list[dict]  # config.json of each run


def fail(message: str, code: int = 2):
    """Ends the program with a sentence on stderr; code 2 is bad usage."""
    print(message, file=sys.stderr)
    sys.exit(code)


# --- reading --------------------------------------------------------------------------------------


def find_runs(results: tuple[Path, ...]) -> list[Path]:
    """Directories with an eval.csv, in an order that does not depend on the file system."""
    found = set()
    for folder in results:
        if not folder.is_dir():
            fail(f"{folder} is not a directory.")
        files = (path for path in folder.rglob("eval.csv*") if path.suffix in (".csv", ".gz"))
        found |= {p.parent for p in files if "set_aside" not in p.relative_to(folder).parts}
    if not found:
        fail(f"There is no eval.csv below {', '.join(map(str, results))}.")
    return sorted(found, key=lambda path: (path.name, path))


def read_returns(run: Path, eval_episodes: int) -> pd.DataFrame:
    """Mean return of each evaluation whose episodes are all there, [step, seed]."""
    path = run / "eval.csv"
    path = path if path.exists() else run / "eval.csv.gz"
    try:
        table = pd.read_csv(path)
        if list(table.columns) != COLUMNS:
            fail(f"{path} does not have the columns {','.join(COLUMNS)}.")
        table = table.dropna().astype({"global_step": int, "seed": int, "return": float})
    except (ValueError, OSError) as error:
        fail(f"{path} cannot be read: {str(error).splitlines()[0]}")
    table = table.drop_duplicates(["global_step", "seed", "episode"], keep="last")
    groups = table.groupby(["global_step", "seed"])["return"]
    return groups.mean()[groups.size() == eval_episodes].unstack("seed")


def read_events(path: Path) -> list[tuple[int, float, bool]]:
    """Step, time and whether it is an evaluation, of a TensorBoard file's start and numbers.

    A record is its length (8 bytes), a checksum (4), an Event and a checksum (4).
    """
    from tensorboardX.proto.event_pb2 import Event

    data, start, events = path.read_bytes(), 0, []
    while len(data) >= start + 12:
        (length,) = struct.unpack_from("<Q", data, start)
        if len(data) < start + length + 16:  # still being written
            break
        event = Event.FromString(data[start + 12 : start + 12 + length])
        start += length + 16
        evaluation = any(x.tag == "eval/episodic_return" for x in event.summary.value)
        events.append((event.step, event.wall_time, evaluation))
    return events


def read_minutes(run: Path) -> pd.Series:
    """Minutes of wall time at each evaluation, without pauses between a stop and a resumption."""
    path = run / "wall.csv"
    files = sorted(run.rglob("events.out.tfevents.*"), key=lambda x: (x.name, x))
    if files:
        clock, seconds = {}, {}  # step -> seconds; of evaluations only
        for file in (file for file in files if file.parent == files[0].parent):
            (_, start, _), *events = read_events(file) or [(0, 0.0, False)]
            before = max((v for s, v in clock.items() if events and s < events[0][0]), default=0)
            clock |= {step: before + time - start for step, time, _ in events}
            seconds |= {step: round(clock[step]) for step, _, evaluation in events if evaluation}
        table = pd.Series(seconds, dtype=int, name="seconds").rename_axis("global_step")
        table.sort_index().to_csv(path)  # small enough to be committed, unlike the events
    if not path.exists():
        return pd.Series(dtype=float)
    return pd.read_csv(path, index_col="global_step")["seconds"] / 60


def name_of(config: dict, by: tuple[str, ...]) -> tuple[str, str]:
    """Task and algorithm, with the values of the flags `by`, as the report calls them."""
    env_id = config["env_id"].removeprefix("dm_control/")
    if env_id != config["env_id"]:
        env_id = env_id.removesuffix("-v0")
    usual = re.fullmatch(r"([a-z0-9]+)_(dmc|gym)", config["exp_name"])
    if unknown := [flag for flag in by if flag not in config]:
        fail(f"--by {unknown[0]} is not in config.json; {config['exp_name']} has no such flag.")
    name = usual[1].upper() if usual else config["exp_name"]
    return env_id, ", ".join([name, *(f"{flag} {config[flag]}" for flag in by)])


def order(env_id: str, algorithm: str) -> tuple:
    """The suite before Gymnasium; SAC, TD3, MPO, then the rest."""
    first = ("SAC", "TD3", "MPO")
    place = first.index(algorithm) if algorithm in first else len(first)
    return "-v" in env_id, env_id, place, algorithm


def names_in(curves: dict) -> list[str]:
    """The algorithms of all tasks."""
    names = {name for algorithms in curves.values() for name in algorithms}
    return sorted(names, key=partial(order, ""))


def shared(curves: dict) -> dict[str, dict[str, Curves]]:
    """The tasks that all algorithms have."""
    names = set(names_in(curves))
    return {env_id: x for env_id, x in curves.items() if set(x) == names}


def read_runs(args: Args) -> dict[str, dict[str, Curves]]:
    """The curves by task and algorithm; each seed of both may be there once."""
    parts, seen = {}, {}
    for run in find_runs(args.results):
        try:
            config = json.loads((run / "config.json").read_text())
            name, episodes = name_of(config["args"], args.by), config["args"]["eval_episodes"]
        except (OSError, ValueError, KeyError) as error:
            fail(f"{run / 'config.json'} is needed beside eval.csv: {type(error).__name__} {error}")
        returns = read_returns(run, episodes)
        if returns.empty:
            print(f"{run} has no complete evaluation yet; left out.", file=sys.stderr)
            continue
        for seed in returns:
            if other := seen.get((*name, seed)):
                fail(
                    f"{other} and {run} are both seed {seed} of {name[1]} on {name[0]}; "
                    "tell variants apart with --by FLAG, or give them an --exp-name of their own."
                )
            seen[*name, seed] = run
        minutes = read_minutes(run).reindex(returns.index).dropna()
        minutes = pd.DataFrame({seed: minutes for seed in returns})
        parts.setdefault(name, []).append((returns, minutes, config))
    if not parts:
        fail("No run has a complete evaluation yet.")
    curves = {}
    for (env_id, algorithm), runs in sorted(parts.items(), key=lambda item: order(*item[0])):
        returns, minutes, configs = zip(*runs)
        # A seed that was evaluated more rarely keeps its return until its next evaluation.
        returns = pd.concat(returns, axis=1).sort_index().ffill(limit_area="inside")
        minutes = pd.concat(minutes, axis=1).sort_index().interpolate("index", limit_area="inside")
        curves.setdefault(env_id, {})[algorithm] = Curves(returns, minutes, list(configs))
    return curves


# --- statistics -----------------------------------------------------------------------------------


def center(scores: np.ndarray, args: Args) -> np.ndarray:
    """The interquartile mean, or the mean, over seeds: [n, ...] -> [...].

    `rliable.metrics.aggregate_iqm` of a single task, for all columns at a time.
    """
    return stats.trim_mean(scores, 0.25 if args.center == "iqm" else 0.0, axis=0)


def estimate(scores: list[np.ndarray], statistic, args: Args) -> np.ndarray:
    """Value, lower and upper end of the 95 % interval of a statistic, [3, ...].

    `scores` are [n, 1, ...], resampled by seed independently of each other. A single seed has no
    interval (nan).
    """
    value = np.atleast_1d(statistic(*scores))
    if min(map(len, scores)) < 2:
        return np.stack([value, np.full_like(value, np.nan), np.full_like(value, np.nan)])
    # rliable draws from NumPy's global generator; its `random_state` changes nothing.
    np.random.seed(args.bootstrap_seed)
    _, bounds = rly.get_interval_estimates({"": scores}, statistic, reps=args.reps)
    return np.concatenate([value[None], bounds[""].reshape(2, -1)])


def over_seeds(scores: np.ndarray, args: Args) -> np.ndarray:
    """`estimate` of the center of each column of [n, m] over the seeds that it has, [3, m]."""
    result, known = np.empty((3, scores.shape[1])), ~np.isnan(scores)
    for seeds in np.unique(known, axis=1).T:  # [n]
        columns = (known == seeds[:, None]).all(axis=0)
        part = scores[seeds][:, None, columns]
        result[:, columns] = estimate([part], lambda x: center(x[:, 0], args), args)
    return result


def at(table: pd.DataFrame, step: int) -> pd.Series:
    """Each seed's last value at or before the step, nan for seeds that have not come so far."""
    values = table.loc[:step].ffill().iloc[-1:] if len(table.loc[:step]) else table.iloc[:0]
    reached = table.apply(pd.Series.last_valid_index) >= step
    return values.squeeze(axis=0).where(reached) if len(values) else reached.astype(float) * np.nan


def budget(algorithms: dict[str, Curves], args: Args) -> int:
    """The step at which a task's algorithms are compared: the last that all of them reached."""
    common = min(int(curves.returns.index[-1]) for curves in algorithms.values())
    return max([step for step in args.steps if step <= common], default=common)


def area(returns: pd.Series) -> float:
    """Mean height of a curve, the area under it over its length in steps."""
    steps = returns.index.to_numpy(float)
    if len(steps) < 2:
        return float(returns.iloc[-1])
    return np.trapezoid(returns, steps) / (steps[-1] - steps[0])


def reaches(returns: pd.Series) -> int:
    """The first step with 90 % of the final return; of a negative one, ten ninths of it."""
    final = returns.iloc[-1]
    return int(returns.index[returns >= (0.9 * final if final > 0 else final / 0.9)][0])


def improvement(*scores: np.ndarray) -> float:
    """Mean over tasks of P(X > Y), ties half; scores are X and Y of each task in turn, [n, 1].

    `rliable.metrics.probability_of_improvement` for seeds that may differ in number between tasks.
    """
    signs = (np.sign(x - y.T) for x, y in zip(scores[::2], scores[1::2]))
    return np.mean([(1 + sign.mean()) / 2 for sign in signs])


def profile(*scores: np.ndarray, thresholds: np.ndarray) -> np.ndarray:
    """Mean over tasks of the share of runs above each threshold, [thresholds]."""
    return np.mean([(x > thresholds).mean(axis=0) for x in scores], axis=0)


def scale_of(env_id: str, algorithms: dict[str, Curves], published: pd.DataFrame) -> float:
    """The return that a performance profile counts as 1.

    1000 on the suite; elsewhere the best that was published, else the best that we saw.
    """
    if "-v" not in env_id:
        return 1000.0
    best = published[published.env_id == env_id.split("-v")[0]].value.max()
    return best if best > 0 else max(c.returns.to_numpy().max() for c in algorithms.values())


# --- tables ---------------------------------------------------------------------------------------


class Row(NamedTuple):
    """One number of report.csv."""

    env_id: str
    algorithm: str
    quantity: str
    step: int
    seeds: int
    value: float
    low: float
    high: float


def measure(curves: dict[str, dict[str, Curves]], args: Args) -> list[Row]:
    """Every number of the report that belongs to one algorithm on one task."""
    rows = []
    for env_id, algorithms in curves.items():
        end = budget(algorithms, args)
        for algorithm, (returns, minutes, _) in algorithms.items():
            columns = {("curve", step): returns.loc[step] for step in returns.index}
            columns |= {("return", step): at(returns, step) for step in {*args.steps, end}}
            columns |= per_seed(returns, minutes, end)
            rows += estimates(env_id, algorithm, columns, args)
            means = {("mean return", step): at(returns, step) for step in {*args.steps, end}}
            mean_args = dataclasses.replace(args, center="mean")
            rows += estimates(env_id, algorithm, means, mean_args)
    return rows


def per_seed(returns: pd.DataFrame, minutes: pd.DataFrame, end: int) -> dict:
    """(quantity, step) -> a number for each seed that has come to the step `end`."""
    until = {seed: returns[seed].loc[:end].dropna() for seed in at(returns, end).dropna().index}
    steps = {seed: reaches(curve) for seed, curve in until.items()}
    timed = {seed: minutes[seed].get(step, np.nan) for seed, step in steps.items()}
    return {
        ("area under the curve", end): pd.Series({seed: area(x) for seed, x in until.items()}),
        ("steps to 90 %", end): pd.Series(steps),
        ("minutes to 90 %", end): pd.Series(timed),
    }


def estimates(env_id: str, algorithm: str, columns: dict, args: Args) -> list[Row]:
    """A row for each quantity that some seed has."""
    scores = pd.DataFrame(columns, dtype=float).dropna(axis=1, how="all")  # [n, quantities]
    counts = scores.notna().sum()
    numbers = over_seeds(scores.to_numpy(), args).T
    rows = zip(scores.columns, counts, numbers)
    return [Row(env_id, algorithm, name, int(step), int(n), *x) for (name, step), n, x in rows]


def compare(curves: dict[str, dict[str, Curves]], args: Args) -> list[Row]:
    """Probability of improvement of each pair of algorithms, on the tasks that both have."""
    rows = []
    for x, y in itertools.combinations(names_in(curves), 2):
        scores, tasks = [], 0
        for algorithms in curves.values():
            if {x, y} <= set(algorithms):
                end = budget(algorithms, args)
                final = [at(algorithms[z].returns, end).dropna().to_numpy() for z in (x, y)]
                scores += [values[:, None] for values in final]
                tasks += 1
        if tasks:
            numbers = estimate(scores, improvement, args)[:, 0]
            seeds = min(map(len, scores))
            rows.append(Row(f"{tasks} tasks", f"{x} > {y}", "improvement", 0, seeds, *numbers))
    return rows


def text_of(x: float) -> str:
    """Whole numbers from 100 on, three digits below."""
    return "-" if np.isnan(x) else f"{x:.0f}" if abs(x) >= 99.95 else f"{x:.3g}"


def steps_text(step: float) -> str:
    """250000 -> 250k."""
    for size, unit in ((1e6, "M"), (1e3, "k")):
        if step >= size:
            return f"{step / size:.3g}{unit}"
    return f"{step:.3g}"


def cell(row: Row | None, seeds: int, text=text_of) -> str:
    """`861 [850, 870]`, with the number of seeds where not all of them are in."""
    if row is None:
        return "-"
    interval = "" if np.isnan(row.low) else f" [{text(row.low)}, {text(row.high)}]"
    return text(row.value) + interval + (f" ({row.seeds} of {seeds})" if row.seeds < seeds else "")


def table(header: list[str], lines: list[list]) -> str:
    """A table in Markdown."""
    rows = [header, ["---"] * len(header), *lines]
    return "".join(f"| {' | '.join(map(str, row))} |\n" for row in rows)


def task_table(env_id: str, algorithms: dict[str, Curves], rows: list[Row], args: Args) -> str:
    """Returns at fixed steps, area, and steps and minutes to 90 % of the final return."""
    found = {(r.algorithm, r.quantity, r.step): r for r in rows if r.env_id == env_id}
    end = budget(algorithms, args)
    columns = sorted({step for _, quantity, step in found if quantity == "return"})
    header = ["", "seeds", *map(steps_text, columns), f"area to {steps_text(end)}"]
    header += ["steps to 90 %", "minutes to 90 %"]
    lines = []
    for name, curves in algorithms.items():
        n = curves.returns.shape[1]
        line = [cell(found.get((name, "return", step)), n) for step in columns]
        line += [cell(found.get((name, "area under the curve", end)), n)]
        line += [cell(found.get((name, "steps to 90 %", end)), n, steps_text)]
        line += [cell(found.get((name, "minutes to 90 %", end)), n)]
        lines.append([name, n, *line])
    return table(header, lines)


def published_table(curves: dict, rows: list[Row], published: pd.DataFrame, args: Args) -> str:
    """Our results at fixed steps beside those of others, and where theirs come from."""
    found = {(r.env_id, r.algorithm, r.quantity, r.step): r for r in rows}
    notes = list(dict.fromkeys(zip(published.source, published.method)))

    def theirs(env_id: str, step: int, **which) -> str:
        of = published[published.env_id == env_id.split("-v")[0]]
        for column, value in which.items():
            of = of[of[column] == value]
        # A number that is a little later counts too, with its step: 300k is comparable to 250k.
        of = of[(of.step >= step) & (of.step <= 1.25 * step)]
        of = of[of.step == of.step.min()]
        texts = []
        for line in of.itertuples():
            extra = [f"at {steps_text(line.step)}"] if line.step != step else []
            extra += [f"{line.seeds:.0f} seed{'s'[: line.seeds > 1]}"] if line.seeds > 0 else []
            extra = f" ({', '.join(extra)})" if extra else ""
            note = notes.index((line.source, line.method)) + 1
            texts.append(f"{text_of(line.value)}{extra} [{note}]")
        return "; ".join(texts) or "-"

    lines = []
    for env_id, algorithms in curves.items():
        for name, (returns, *_) in algorithms.items():
            for step in args.steps:
                if not (ours := found.get((env_id, name, "return", step))):
                    continue
                mean, n = found[env_id, name, "mean return", step], returns.shape[1]
                best = theirs(env_id, step, algorithm=name, series="best")
                earlier = theirs(env_id, step, algorithm=name, series="earlier")
                any_ = theirs(env_id, step, series="any")
                if any(x != "-" for x in (best, earlier, any_)):
                    numbers = [cell(ours, n), cell(mean, n), best, earlier, any_]
                    lines.append([env_id, name, steps_text(step), *numbers])
    if not lines:
        return "Nothing was published for these tasks and steps.\n"
    header = ["task", "algorithm", "steps", f"ours, {args.center.upper()}", "ours, mean"]
    header += ["best published of the algorithm", EARLIER, "best published of any"]
    text = table(header, lines)
    used = [i for i in range(len(notes)) if f" [{i + 1}]" in text]
    return text + "\n" + "".join(f"- [{i + 1}] {': '.join(notes[i])}\n" for i in used)


def runs_table(curves: dict[str, dict[str, Curves]]) -> str:
    """Which runs the numbers come from, and flags that the seeds of a curve do not share."""
    lines, notes = [], ""
    for env_id, algorithms in curves.items():
        for name, (returns, _, configs) in algorithms.items():
            seeds = ", ".join(map(str, sorted(returns)))
            ends = sorted({int(returns[seed].last_valid_index()) for seed in returns})
            reached = " to ".join(map(steps_text, dict.fromkeys((ends[0], ends[-1]))))
            parts = [part for config in configs for part in (config, *config.get("resumed", ()))]
            commits = sorted({part.get("commit", "")[:10] or "?" for part in parts})
            devices = sorted({part.get("device", "?") for part in parts})
            line = [env_id, name, seeds, reached, ", ".join(commits), ", ".join(devices)]
            lines.append(line)
            for flag in configs[0]["args"].keys() - set(FREE):
                values = {json.dumps(config["args"].get(flag)) for config in configs}
                if len(values) > 1:
                    note = f"The seeds of {name} on {env_id} differ in {flag}: "
                    notes += f"- {note}{', '.join(sorted(values))}\n"
    print(notes, end="", file=sys.stderr)
    header = ["task", "algorithm", "seeds", "steps", "commit", "device"]
    return table(header, lines) + ("\n" + "".join(sorted(notes.splitlines(True))) if notes else "")


# --- figures --------------------------------------------------------------------------------------

STYLE = {
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "lines.linewidth": 1.6,
    "legend.frameon": False,
    "svg.hashsalt": "jax-rl",  # else the SVG differs each time
}


def look_of(curves: dict) -> dict[str, dict]:
    """Colour and line of each algorithm, the same in all figures."""
    looks = zip(itertools.cycle(COLORS), itertools.cycle(LINES))
    return {name: {"c": c, "ls": line} for name, (c, line) in zip(names_in(curves), looks)}


def save(figure, path: Path):
    """Writes a figure as PNG and SVG, without a date."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path.with_suffix(".png"), dpi=200, metadata={"Software": None})
    figure.savefig(path.with_suffix(".svg"), metadata={"Date": None})
    plt.close(figure)


OTHERS = {  # series of published.csv -> label and marker
    "best": ("best published of the algorithm", {"marker": "D", "mfc": "none", "ms": 6}),
    "earlier": (EARLIER, {"marker": "X", "ms": 7}),
}


def draw_curves(curves: dict, rows: list[Row], published: pd.DataFrame, args: Args):
    """A panel for each task; others' results as markers, side by side about their step."""
    columns = min(3, len(curves))
    lines = -(-len(curves) // columns)
    size = (max(4.8, 3.0 * columns), 2.4 * lines + 0.6)
    figure, axes = plt.subplots(lines, columns, figsize=size, squeeze=False, layout="constrained")
    looks, shown = look_of(curves), set()
    for axis in axes.flat[len(curves) :]:
        axis.remove()
    for axis, (env_id, algorithms) in zip(axes.flat, curves.items()):
        end = max(curve.returns.index[-1] for curve in algorithms.values())
        others = published[(published.env_id == env_id.split("-v")[0]) & (published.step <= end)]
        for i, name in enumerate(algorithms):
            shift = 0.018 * end / 1e3 * (i - (len(algorithms) - 1) / 2)
            found = [row for row in rows if row[:3] == (env_id, name, "curve")]
            x, y, low, high = np.array([(r.step / 1e3, r.value, r.low, r.high) for r in found]).T
            axis.plot(x, y, **looks[name], zorder=3)
            axis.fill_between(x, low, high, color=looks[name]["c"], alpha=0.18, lw=0)
            for series, (_, marker) in OTHERS.items():
                of = others[(others.algorithm == name) & (others.series == series)]
                of = of.drop_duplicates("step")
                look = {"c": looks[name]["c"], "ls": "", "zorder": 4}
                axis.plot(of.step / 1e3 + shift, of.value, **look, **marker)
                shown |= {series} if len(of) else set()
        axis.set(title=env_id, xlim=(0, 1.05 * end / 1e3))
        if "-v" not in env_id:
            axis.set_ylim(0, 1000)
    figure.supxlabel("environment steps (thousands)", fontsize=9)
    figure.supylabel("return of the greedy policy", fontsize=9)
    handles = [plt.Line2D([], [], **look, label=name) for name, look in looks.items()]
    for series, (label, marker) in OTHERS.items():
        if series in shown:
            handles.append(plt.Line2D([], [], ls="", c="0.35", **marker, label=label))
    width = len(handles) if columns > 2 else 2
    figure.legend(handles=handles, loc="outside upper center", ncols=width)
    save(figure, args.out_dir / "figures" / "curves")


def draw_comparison(curves: dict, pairs: list[Row], published: pd.DataFrame, args: Args):
    """Performance profiles on the tasks that all algorithms have, and the pairs."""
    looks, common = look_of(curves), shared(curves)
    thresholds = np.linspace(0, 1, 101)
    panels = 2 if common else 1
    size = (3.3 * panels, 2.8)
    figure, axes = plt.subplots(1, panels, figsize=size, squeeze=False, layout="constrained")
    left, right = axes[0, 0], axes[0, -1]
    for name, look in looks.items() if common else ():
        scores = []
        for env_id, algorithms in common.items():
            final = at(algorithms[name].returns, budget(algorithms, args)).dropna().to_numpy()
            scores.append(final[:, None] / scale_of(env_id, algorithms, published))
        shares = partial(profile, thresholds=thresholds)
        value, low, high = estimate(scores, shares, args)
        left.plot(thresholds, value, **look, label=name)
        left.fill_between(thresholds, low, high, color=look["c"], alpha=0.18, lw=0)
        left.set(xlim=(0, 1), ylim=(0, 1.02), xlabel="normalised return")
        left.set_ylabel("share of runs above")
        left.legend(loc="lower left")
    for i, row in enumerate(reversed(pairs)):
        if not np.isnan(row.low):
            right.barh(i, row.high - row.low, left=row.low, height=0.5, color=COLORS[0], alpha=0.35)
        right.plot([row.value] * 2, [i - 0.25, i + 0.25], color="black")
    right.axvline(0.5, color="0.5", ls=":", lw=1)
    right.set_yticks(range(len(pairs)), [row.algorithm for row in reversed(pairs)])
    right.set(xlim=(0, 1), ylim=(-0.6, len(pairs) - 0.4), xlabel="probability of improvement")
    right.grid(axis="y", visible=False)
    save(figure, args.out_dir / "figures" / "comparison")


# --- report ---------------------------------------------------------------------------------------


def write(curves: dict, args: Args, published: pd.DataFrame) -> str:
    """Writes report.csv and the figures; returns the text of report.md."""
    rows, pairs = measure(curves, args), compare(curves, args)
    numbers = pd.DataFrame([*rows, *pairs])
    args.out_dir.mkdir(parents=True, exist_ok=True)
    numbers.to_csv(args.out_dir / "report.csv", index=False, float_format="%.6g")
    kind = {"iqm": "Interquartile mean", "mean": "Mean"}[args.center]
    text = "# Learning curves\n\nMade by `python benchmark/report.py`; do not edit.\n\n"
    text += f"{kind} over seeds of the mean return of the greedy policy in each evaluation, with "
    text += f"95 % intervals in brackets from the stratified bootstrap over seeds ({args.reps} "
    text += "resamples, rliable). One seed has no interval; the interval of two is their range; "
    text += "`(2 of 5)` is over the seeds that have come so far. The area under the curve is "
    text += "divided by its length in steps. 90 % is of a seed's own return at the step of the "
    text += "area column; minutes are wall time, training and evaluation, on the device below.\n\n"
    text += "![Learning curves](figures/curves.png)\n\n"
    for env_id, algorithms in curves.items():
        text += f"## {env_id}\n\n{task_table(env_id, algorithms, rows, args)}\n"
    text += f"## Beside published results\n\n{published_table(curves, rows, published, args)}\n"
    if pairs:
        text += "## Between the algorithms\n\nProbability that a run of the first has a higher "
        text += "return than a run of the second on the same task, at the step of the area column, "
        text += "averaged over tasks that both have.\n\n"
        lines = [[r.algorithm, r.env_id, cell(r, r.seeds, "{:.2f}".format)] for r in pairs]
        text += table(["", "on", "probability of improvement"], lines) + "\n"
        if common := shared(curves):
            text += f"The performance profile is over {', '.join(common)}; a return of 1000 counts "
            text += "as 1 on the suite, elsewhere the best that was published.\n\n"
        text += "![Performance profile and probability of improvement](figures/comparison.png)\n\n"
    if args.figures:
        draw_curves(curves, rows, published, args)
        if pairs:
            draw_comparison(curves, pairs, published, args)
    return text + f"## Runs\n\n{runs_table(curves)}"


def main(args: Args):
    """Reads the runs, writes report.md, report.csv and the figures."""
    try:
        published = pd.read_csv(args.published).rename(columns={"return": "value"})
    except (OSError, ValueError) as error:
        fail(f"--published {args.published} cannot be read: {error}")
    matplotlib.use("agg")
    with plt.rc_context(STYLE):
        text = write(read_runs(args), args, published)
    (args.out_dir / "report.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main(tyro.cli(Args))
