"""Tables and figures of learning curves, made from the files that runs leave behind.

    python benchmark/report.py                        # benchmark/results/curves
    python benchmark/report.py runs/a runs/b --out-dir somewhere
    python benchmark/report.py runs --by n_step gamma   # a curve for each value of these flags
    python benchmark/report.py runs/a runs/b --table benchmark/results/studies/x.csv

Reads eval.csv and config.json of every run below RESULTS, the sweep's runs.csv and wall.csv beside
them, and tables that --table has written; writes report.md and figures/. Statistics are those of
rliable (Agarwal et al., arXiv:2108.13264v4). The same files give the same tables, byte for byte.
"""

import dataclasses
import itertools
import json
import re
import sys
from functools import partial
from pathlib import Path
from typing import Annotated

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import tyro
from scipy import stats

RESULTS = Path(__file__).resolve().parent / "results"
EPISODES = ["global_step", "seed", "episode", "return", "length"]  # columns of eval.csv
# Columns of --table: a line for each evaluation, with the mean return of its episodes.
TABLE = ["env_id", "algorithm", "seed", "global_step", "return", "minutes", "commit", "machine"]
# Flags that may differ between the seeds of one curve.
FREE = {"seed", "total_timesteps", "run_dir", "track", "capture_video", "checkpoint_frequency"}
FEW, DRAWS = 4, 2_000  # seeds from which on a bootstrap makes an interval, and its resamples
EARLIER = "an earlier JAX implementation (2021)"


@dataclasses.dataclass(frozen=True)
class Args:
    """Makes the tables and figures of learning curves."""

    # Run directories, folders of them, or tables.
    results: Annotated[tuple[Path, ...], tyro.conf.Positional] = (RESULTS / "curves",)
    by: tuple[str, ...] = ()  # flags of the scripts, such as n_step, that tell variants apart
    out_dir: Path = RESULTS  # for report.md and figures/
    table: Path | None = None  # write what was read as one table, and no report
    steps: tuple[int, ...] = (100_000, 250_000, 500_000, 1_000_000)  # columns of the tables
    published: Path = RESULTS.parent / "published.csv"  # results of others


# env_id -> algorithm -> returns: index step, a column for each seed; nan after its last evaluation.
Tasks = dict[str, dict[str, pd.DataFrame]]


def fail(message: str, code: int = 2):
    """Ends the program with a sentence on stderr; code 2 is bad usage."""
    print(message, file=sys.stderr)
    sys.exit(code)


# --- reading --------------------------------------------------------------------------------------


def find(results: tuple[Path, ...]) -> list[Path]:
    """Tables, and directories with an eval.csv, in an order of their own."""
    found = {file.parent for folder in results for file in folder.rglob("eval.csv")}
    found |= {path for path in results if path.is_file()}
    if not found:
        fail(f"There is no eval.csv below {', '.join(map(str, results))}.")
    return sorted(found, key=lambda path: (path.name, path))


def read_csv(path: Path, columns: list[str]) -> pd.DataFrame:
    """A file with these columns; lines that are not whole are left out."""
    try:
        table = pd.read_csv(path)
        if list(table.columns) != columns:
            fail(f"{path} does not have the columns {','.join(columns)}.")
        table = table.dropna(subset=["global_step", "seed", "return"])
        return table.astype({"global_step": int, "seed": int, "return": float})
    except (ValueError, OSError) as error:
        fail(f"{path} cannot be read: {str(error).splitlines()[0]}")


def read_run(run: Path, by: tuple[str, ...]) -> pd.DataFrame:
    """A line for each evaluation whose episodes are all there; columns of TABLE, and the flags."""
    try:
        config = json.loads((run / "config.json").read_text())
        flags, names = config["args"], name_of(config["args"], by)
    except (OSError, ValueError, KeyError) as error:
        fail(f"{run / 'config.json'} is not what is needed: {type(error).__name__} {error}")
    groups = read_csv(run / "eval.csv", EPISODES).groupby(["seed", "global_step"])["return"]
    table = groups.mean()[groups.size() == flags["eval_episodes"]].reset_index()

    def recorded(name: str) -> pd.DataFrame:
        path = run.parent / name
        lines = pd.read_csv(path) if path.exists() else pd.DataFrame({"run": []})
        return lines[lines["run"] == run.name]

    if len(wall := recorded("wall.csv")):  # seconds of each attempt, one after the other
        seconds = wall["seconds"].diff().where(lambda x: x >= 0, wall["seconds"]).cumsum()
        clock = dict(zip(wall["global_step"], seconds / 60))
        table["minutes"] = table["global_step"].map(clock)
    # The first scripts recorded their commit and device themselves, in config.json.
    attempts = recorded("runs.csv").to_dict("records") or [config, *config.get("resumed", ())]
    commits = {re.sub("^(.{10})[0-9a-f]*", r"\1", str(x.get("commit", "?"))) for x in attempts}
    machines = {x.get("device") or x.get("machine", "?") for x in attempts}
    table = table.assign(env_id=names[0], algorithm=names[1], flags=json.dumps(flags))
    table["commit"], table["machine"] = "; ".join(sorted(commits)), "; ".join(sorted(machines))
    return table.reindex(columns=[*TABLE, "flags"])


def name_of(config: dict, by: tuple[str, ...]) -> tuple[str, str]:
    """Task and algorithm, with the values of the flags `by`, as the report calls them."""
    env_id = re.sub(r"^dm_control/(.*)-v0$", r"\1", config["env_id"])
    usual = re.fullmatch(r"([a-z0-9]+)_(dmc|gym)", config["exp_name"])
    name = usual[1].upper() if usual else config["exp_name"]
    return env_id, ", ".join([name, *(f"{flag} {config[flag]}" for flag in by)])


def order(env_id: str, algorithm: str) -> tuple:
    """The suite before Gymnasium; SAC, TD3, MPO, then the rest."""
    place = ("SAC", "TD3", "MPO", algorithm).index(algorithm)
    return "-v" in env_id, env_id, place, algorithm


def names_in(tasks: Tasks) -> list[str]:
    """The algorithms of all tasks."""
    return sorted({name for x in tasks.values() for name in x}, key=partial(order, ""))


def read(args: Args) -> pd.DataFrame:
    """What all runs and tables hold; each seed of an algorithm on a task may be there once."""
    parts, seen = [], {}
    for path in find(args.results):
        part = read_csv(path, TABLE) if path.is_file() else read_run(path, args.by)
        for key in part.groupby(TABLE[:3]).groups:
            if other := seen.get(key):
                fail(
                    f"{other} and {path} are both seed {key[2]} of {key[1]} on {key[0]}; "
                    "tell variants apart with --by FLAG, or give them an --exp-name of their own."
                )
            seen[key] = path
        parts += [part] if len(part) else []
    if not parts:
        fail("No run has a complete evaluation yet.")
    table = pd.concat(parts, ignore_index=True).sort_values(TABLE[:4])
    places = [order(*x) for x in zip(table["env_id"], table["algorithm"])]
    return table.iloc[sorted(range(len(table)), key=places.__getitem__)]


def curves_of(table: pd.DataFrame) -> Tasks:
    """The curves by task and algorithm."""
    tasks = {}
    for (env_id, name), part in table.groupby(TABLE[:2], sort=False):
        returns = part.pivot(index="global_step", columns="seed", values="return")
        # A seed that was evaluated more rarely keeps its return until its next evaluation.
        tasks.setdefault(env_id, {})[name] = returns.ffill(limit_area="inside")
    return tasks


# --- statistics -----------------------------------------------------------------------------------


mean = partial(np.mean, axis=-1)  # over seeds, as iqm


def iqm(scores: np.ndarray) -> np.ndarray:
    """The interquartile mean over seeds, [..., n] -> [...]."""
    return stats.trim_mean(scores, 0.25, axis=-1)


def profile(*scores: np.ndarray, thresholds: np.ndarray) -> np.ndarray:
    """Mean over tasks of the share of runs above each threshold, [..., thresholds]."""
    return np.mean([(x[..., None] > thresholds).mean(axis=-2) for x in scores], axis=0)


def estimate(scores: list[np.ndarray], statistic) -> np.ndarray:
    """Value, lower and upper end of the 95 % interval of a statistic of seeds [n], [3, ...].

    The stratified bootstrap draws the seeds of each task anew. Where one has fewer than FEW, the
    ends are the range of the seeds if there is no more than this task, else nan.
    """
    value = statistic(*scores)
    if min(map(len, scores)) >= FEW:
        rng = np.random.default_rng(0)
        drawn = (x[rng.integers(len(x), size=(DRAWS, len(x)))] for x in scores)
        return np.stack([value, *np.percentile(statistic(*drawn), [2.5, 97.5], axis=0)])
    if np.ndim(value) == 0 and len(scores[0]) > 1:
        return np.array([value, scores[0].min(), scores[0].max()])
    return np.stack([value, np.full_like(value, np.nan), np.full_like(value, np.nan)])


def at(returns: pd.DataFrame, step: int) -> pd.Series:
    """The last return at or before the step of each seed that has come so far."""
    reached = returns.columns[returns.apply(pd.Series.last_valid_index) >= step]
    before = returns.loc[:step, reached].ffill()
    return before.iloc[-1].dropna() if len(before) else pd.Series(dtype=float)


def budget(algorithms: dict[str, pd.DataFrame], args: Args) -> int:
    """The step at which a task's algorithms are compared: the last that all of them reached."""
    common = min(int(returns.index[-1]) for returns in algorithms.values())
    return max([step for step in args.steps if step <= common], default=common)


def reaches(returns: pd.Series) -> int:
    """The first step with 90 % of the final return; of a negative one, ten ninths of it."""
    final = returns.iloc[-1]
    return int(returns.index[returns >= (0.9 * final if final > 0 else final / 0.9)][0])


def scales(tasks: Tasks, published: pd.DataFrame) -> dict[str, float]:
    """The return that a performance profile counts as 1, of tasks that all algorithms have.

    1000 on the suite; elsewhere the best that was published, else the best that we saw. Where that
    is not positive the task has no scale (0): divided by it, the worse would look the better.
    """
    result, names = {}, set(names_in(tasks))
    for env_id, algorithms in tasks.items():
        if set(algorithms) == names:
            best = published[published.env_id == env_id.split("-v")[0]].value.max()
            seen = max(returns.to_numpy().max() for returns in algorithms.values())
            result[env_id] = 1000.0 if "-v" not in env_id else best if best > 0 else max(seen, 0.0)
    return result


# --- tables ---------------------------------------------------------------------------------------


def text_of(x: float) -> str:
    """Whole numbers from 100 on, three digits below."""
    return "-" if np.isnan(x) else f"{x:.0f}" if abs(x) >= 99.95 else f"{x:.3g}"


def steps_text(step: float) -> str:
    """250000 -> 250k."""
    size, unit = (1e6, "M") if step >= 1e6 else (1e3, "k") if step >= 1e3 else (1, "")
    return f"{step / size:.3g}{unit}"


def cell(values, seeds: int, text=text_of, statistic=iqm) -> str:
    """`861 [850, 870]`, with the number of seeds where not all of them are in."""
    if len(values) == 0:
        return "-"
    value, low, high = estimate([np.array(values, float)], statistic)
    interval = "" if np.isnan(low) else f" [{text(low)}, {text(high)}]"
    return text(value) + interval + (f" ({len(values)} of {seeds})" if len(values) < seeds else "")


def markdown(header: list[str], lines: list[list]) -> str:
    """A table in Markdown."""
    rows = [header, ["---"] * len(header), *lines]
    return "".join(f"| {' | '.join(map(str, row))} |\n" for row in rows)


def task_table(env_id: str, tasks: Tasks, minutes: pd.Series, args: Args) -> str:
    """Returns at fixed steps and of three evaluations; steps and minutes to 90 % of the last."""
    end, lines = budget(tasks[env_id], args), []
    last = max(returns.index[-1] for returns in tasks[env_id].values())
    steps = sorted({step for step in args.steps if step <= last} | {end})
    for name, returns in tasks[env_id].items():
        n, there = returns.shape[1], at(returns, end).index
        first = {seed: reaches(returns[seed].loc[:end].dropna()) for seed in there}
        times = [minutes.get((env_id, name, *item), np.nan) for item in first.items()]
        cells = [cell(at(returns, step), n) for step in steps]
        final = returns.loc[:end, there].apply(lambda seed: seed.dropna().tail(3).mean())
        cells += [cell(final, n, statistic=mean)]
        cells += [cell([*first.values()], n, steps_text), cell([x for x in times if x == x], n)]
        lines.append([name, n, *cells])
    header = ["", "seeds", *map(steps_text, steps), "last three", "steps to 90 %", "minutes"]
    return markdown(header, lines)


def published_table(tasks: Tasks, published: pd.DataFrame, args: Args) -> str:
    """Our results at fixed steps beside those of others, and where theirs come from."""
    notes = list(dict.fromkeys(zip(published.source, published.method)))

    def theirs(env_id: str, step: int, series: str, algorithm: str) -> str:
        same = [env_id.split("-v")[0], algorithm, series]
        of = published[(published[["env_id", "algorithm", "series"]] == same).all(axis=1)]
        # A number that is a little later counts too, with its step: 300k is comparable to 250k.
        of = of[(of.step >= step) & (of.step <= 1.25 * step)]
        texts = []
        for line in of[of.step == of.step.min()].itertuples():
            late = f" (at {steps_text(line.step)})" if line.step != step else ""
            seeds = f" ({line.seeds:.0f} seed{'s'[: line.seeds > 1]})" if line.seeds > 0 else ""
            note = notes.index((line.source, line.method)) + 1
            texts.append(f"{text_of(line.value)}{late}{seeds} [{note}]")
        return "; ".join(texts) or "-"

    lines = []
    for env_id, algorithms in tasks.items():
        for (name, returns), step in itertools.product(algorithms.items(), args.steps):
            series = {"best": name, "earlier": name, "any": "any"}
            others = [theirs(env_id, step, *item) for item in series.items()]
            if len(final := at(returns, step)) and set(others) != {"-"}:
                ours = [cell(final, returns.shape[1], statistic=x) for x in (iqm, mean)]
                lines.append([env_id, name, steps_text(step), *ours, *others])
    header = ["task", "algorithm", "steps", "ours, IQM", "ours, mean"]
    header += ["best published of the algorithm", EARLIER, "best published of any"]
    text = markdown(header, lines)
    used = [i for i in range(len(notes)) if f" [{i + 1}]" in text]
    return text + "\n" + "".join(f"- [{i + 1}] {': '.join(notes[i])}\n" for i in used)


def runs_table(table: pd.DataFrame) -> str:
    """Which runs the numbers come from, and flags that the seeds of a curve do not share."""
    lines, notes = [], set()
    for (env_id, name), part in table.groupby(TABLE[:2], sort=False):
        made = [sorted({y for x in part[column] for y in x.split("; ")}) for column in TABLE[-2:]]
        lines.append([env_id, name, *(", ".join(map(str, x)) for x in (part.seed.unique(), *made))])
        flags = [json.loads(x) for x in part.get("flags", pd.Series()).dropna().unique()]
        for flag in set.intersection(*map(set, flags)) - FREE if flags else ():
            if len(values := {json.dumps(x[flag]) for x in flags}) > 1:
                values = ", ".join(sorted(values))
                notes.add(f"- The seeds of {name} on {env_id} differ in {flag}: {values}\n")
    header = ["task", "algorithm", "seeds", "commit", "machine"]
    return markdown(header, lines) + "".join(["\n" * bool(notes), *sorted(notes)])


# --- figures --------------------------------------------------------------------------------------

STYLE = {"font.size": 9, "axes.titlesize": 10, "legend.frameon": False, "axes.grid": True}
STYLE |= {"grid.alpha": 0.25, "axes.spines.top": False, "axes.spines.right": False}
PNG = {"dpi": 200, "metadata": {"Software": None}}  # the same file each time
# Okabe and Ito's colours, which readers with any kind of colour vision tell apart.
LOOKS = "#0072B2 - #D55E00 -- #009E73 -. #CC79A7 : #E69F00 - #56B4E9 -- #000000 -.".split()
OTHERS = {  # series of published.csv -> label and marker
    "best": ("best published of the algorithm", {"marker": "D", "mfc": "none", "ms": 6}),
    "earlier": (EARLIER, {"marker": "X", "ms": 7}),
}


def look_of(tasks: Tasks) -> dict[str, dict]:
    """Colour and line of each algorithm, the same in all figures."""
    looks = itertools.cycle(zip(LOOKS[::2], LOOKS[1::2]))
    return {name: {"c": c, "ls": line} for name, (c, line) in zip(names_in(tasks), looks)}


def draw_curves(tasks: Tasks, published: pd.DataFrame, args: Args):
    """A panel for each task; others' results as markers, side by side about their step."""
    columns = min(3, len(tasks))
    lines = -(-len(tasks) // columns)
    size = (max(4.8, 3.0 * columns), 2.4 * lines + 0.6)
    figure, axes = plt.subplots(lines, columns, figsize=size, squeeze=False, layout="constrained")
    looks, shown = look_of(tasks), set()
    for axis in axes.flat[len(tasks) :]:
        axis.remove()
    for axis, (env_id, algorithms) in zip(axes.flat, tasks.items()):
        end = max(returns.index[-1] for returns in algorithms.values())
        others = published[(published.env_id == env_id.split("-v")[0]) & (published.step <= end)]
        for i, (name, returns) in enumerate(algorithms.items()):
            shift = 0.018 * end / 1e3 * (i - (len(algorithms) - 1) / 2)
            seeds = (row[~np.isnan(row)] for row in returns.to_numpy())
            value, low, high = np.array([estimate([x], iqm) for x in seeds]).T
            axis.plot(returns.index / 1e3, value, **looks[name], zorder=3)
            look = {"color": looks[name]["c"], "alpha": 0.18, "lw": 0}
            axis.fill_between(returns.index / 1e3, low, high, **look)
            for series, (_, marker) in OTHERS.items():
                of = others[(others.algorithm == name) & (others.series == series)]
                look = {"c": looks[name]["c"], "ls": "", "zorder": 4} | marker
                axis.plot(of.step / 1e3 + shift, of.value, **look)
                shown |= {series} if len(of) else set()
        axis.set(title=env_id, xlim=(0, 1.05 * end / 1e3))
        if "-v" not in env_id:
            axis.set_ylim(0, 1000)
    figure.supxlabel("environment steps (thousands)", fontsize=9)
    figure.supylabel("return of the greedy policy", fontsize=9)
    handles = [plt.Line2D([], [], **look, label=name) for name, look in looks.items()]
    for label, marker in (OTHERS[series] for series in OTHERS if series in shown):
        handles.append(plt.Line2D([], [], ls="", c="0.35", **marker, label=label))
    figure.legend(handles=handles, loc="outside upper center", ncols=[2, 5][columns > 2])
    figure.savefig(args.out_dir / "figures" / "curves.png", **PNG)


def draw_profile(tasks: Tasks, scale: dict[str, float], args: Args):
    """The share of runs whose final return is above a share of the scale, over tasks with one."""
    figure, axis = plt.subplots(figsize=(3.6, 2.8), layout="constrained")
    thresholds = np.linspace(0, 1, 101)
    for name, look in look_of(tasks).items() if scale else ():
        finals = [at(tasks[x][name], budget(tasks[x], args)) for x in scale]
        scores = [final.to_numpy() / one for final, one in zip(finals, scale.values())]
        value, low, high = estimate(scores, partial(profile, thresholds=thresholds))
        axis.plot(thresholds, value, **look, label=name)
        axis.fill_between(thresholds, low, high, color=look["c"], alpha=0.18, lw=0)
    axis.set(xlim=(0, 1), ylim=(0, 1.02), xlabel="normalised return")
    axis.set_ylabel("share of runs above")
    figure.legend(handles=axis.lines, loc="outside upper center", ncols=3)
    figure.savefig(args.out_dir / "figures" / "profile.png", **PNG)


# --- report ---------------------------------------------------------------------------------------

TEXT = """# Learning curves

Made by `python benchmark/report.py`; do not edit.

Interquartile mean over seeds of the mean return of the greedy policy in each evaluation. In
brackets: of two or three seeds their range, of more the 95 % interval from the stratified bootstrap
over seeds (2000 resamples). `(2 of 5)` is over the seeds that have come so far. "Last three" is the
mean over seeds and the three evaluations up to the last of these steps that all algorithms of the
task have reached, 90 % of a seed's own return there; minutes to that are wall time, training and
evaluation, on the machine below.

![Learning curves](figures/curves.png)

{tables}## Beside published results

{published}
## Over tasks

Tasks that all algorithms have, at the same steps as above: {used}. A return of 1000 counts as 1 on
the suite, elsewhere the best that was published. Left out, as their returns are negative:
{left_out}.

![Performance profile](figures/profile.png)

## Runs

{runs}"""


def main(args: Args):
    """Writes a table of what was read, or report.md and the figures."""
    results = read(args)
    if args.table:
        args.table.parent.mkdir(parents=True, exist_ok=True)
        return results[TABLE].to_csv(args.table, index=False, float_format="%.6g")
    published = pd.read_csv(args.published).rename(columns={"return": "value"})
    tasks, minutes = curves_of(results), results.set_index(TABLE[:4])["minutes"]
    scale = scales(tasks, published)
    tables = [f"## {x}\n\n{task_table(x, tasks, minutes, args)}\n" for x in tasks]
    text = TEXT.format(
        tables="".join(tables),
        published=published_table(tasks, published, args),
        used=", ".join(x for x in scale if scale[x] > 0) or "none",
        left_out=", ".join(x for x in scale if scale[x] <= 0) or "none",
        runs=runs_table(results),
    )
    (args.out_dir / "figures").mkdir(parents=True, exist_ok=True)
    (args.out_dir / "report.md").write_text(text)
    print(text)
    matplotlib.use("agg")
    with plt.rc_context(STYLE):
        draw_curves(tasks, published, args)
        draw_profile(tasks, {x: scale[x] for x in scale if scale[x] > 0}, args)


if __name__ == "__main__":
    main(tyro.cli(Args))
