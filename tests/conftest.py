"""What all tests share: the scripts under test, small flags, and environments made for testing.

A test that asks for the fixture `script` runs once for every script in the folder `--agents`;
`@pytest.mark.algorithms("sac")` and `@pytest.mark.backends("dmc")` narrow that down.
"""

import os

# Before JAX and MuJoCo are imported. The networks are tiny: threads cost more than they give, and
# compiling takes longer than running, less of it at a lower level of optimisation.
os.environ.setdefault("MUJOCO_GL", "disable")
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault(
    "XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false --xla_backend_optimization_level=0"
)

import importlib.util
import itertools
import signal
import sys
import tempfile
from pathlib import Path

import gymnasium as gym
import jax
import numpy as np
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_debug_key_reuse", True)
# The callback of MPO's slsqp runs JAX, and would wait for the thread that waits for it.
jax.config.update("jax_cpu_enable_async_dispatch", False)

COMPILED = tempfile.TemporaryDirectory(prefix="jax-rl-tests-")  # shared by siblings and mutants
jax.config.update("jax_compilation_cache_dir", COMPILED.name)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)

REPOSITORY = Path(__file__).resolve().parents[1]

SMALL = dict(
    hidden_width=32, batch_size=7, buffer_size=2000, total_timesteps=100, learning_starts=20,
    log_frequency=10, eval_frequency=0, eval_episodes=2, action_samples=5, clipped_double_q=True,
    # Siblings have other defaults for these and the last; one lets them share compilations.
    n_step=1, layer_norm=True, normalize_obs=True, alpha=0.2, target_entropy_scale=0.5,
)  # fmt: skip


def pytest_addoption(parser):
    agents = REPOSITORY / "agents"
    parser.addoption("--agents", type=Path, default=agents, help="folder of the scripts to test")
    parser.addoption("--only", type=Path, help="file with lines FILE::TEST[SCRIPT] to run")


def pytest_configure(config):
    config.addinivalue_line("markers", "algorithms(*names): test only scripts of these algorithms")
    config.addinivalue_line("markers", "backends(*names): test only scripts on these backends")
    # Shells start background jobs with Ctrl-C ignored, which the runs under test would inherit.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_generate_tests(metafunc):
    if "script" not in metafunc.fixturenames:
        return
    paths = sorted(metafunc.config.getoption("--agents").glob("*_*.py"))
    for kind, index in (("algorithms", 0), ("backends", 1)):
        if marker := metafunc.definition.get_closest_marker(kind):
            paths = [path for path in paths if parts(path)[index] in marker.args]
    metafunc.parametrize("script", paths, ids=[path.stem for path in paths], indirect=True)


def pytest_collection_modifyitems(config, items):
    if only := config.getoption("--only"):
        wanted = set(only.read_text().splitlines())
        items[:] = [item for item in items if case(item) in wanted]


def case(item) -> str:
    """FILE::TEST[SCRIPT] of a collected test, whatever its other parameters are."""
    parameters = item.callspec.params if hasattr(item, "callspec") else {}
    script = getattr(parameters.get("script"), "stem", "")  # none of its algorithm may be there
    return f"{item.path.name}::{item.originalname}[{script}]"


def parts(path: Path) -> list[str]:
    """Algorithm and backend of a script; a mutant is called sac_dmc__name_of_the_mutant.py."""
    return path.stem.split("__")[0].split("_")


def load(path: Path):
    """The script at this path, imported once; tests know it by `algorithm` and `backend` too."""
    if path.stem not in sys.modules:
        spec = importlib.util.spec_from_file_location(path.stem, path)
        module = sys.modules[path.stem] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    module = sys.modules[path.stem]  # which play.py may have imported
    module.algorithm, module.backend = parts(path)
    return module


@pytest.fixture(scope="module")
def script(request):
    return load(request.param)


def small_args(script, **changes):
    """The script's flags, with networks and batches as small as a test needs."""
    known = SMALL.keys() & script.Args.model_fields.keys()
    return script.Args(**{name: SMALL[name] for name in known} | changes)


MAPS, FINISHED = Path("/proc/self/maps"), itertools.count(1)


@pytest.fixture(autouse=True)
def few_programs():
    """Programs take memory maps, of which a process has 65,530; at the limit XLA crashes."""
    yield
    if next(FINISHED) % 10 == 0 and MAPS.exists() and MAPS.read_bytes().count(b"\n") > 20_000:
        jax.clear_caches()


LOW, HIGH = np.array([-1.0, 0.0, -0.3]), np.array([1.0, 4.0, 0.1])  # as different as bounds can be
ENDINGS = ((5, "truncated"), (3, "terminated"), (4, "terminated, truncated"))


class Probe(gym.Env):
    """Remembers the actions sent; its observation is [episode, time, position of every action].

    An action moves the position by its place between the bounds, and the reward is the sum of
    positions. `endings` holds the length and the kind of the first episodes, then starts over.
    """

    action_space = gym.spaces.Box(LOW, HIGH, dtype=np.float64)
    observation_space = gym.spaces.Box(-np.inf, np.inf, (5,), np.float32)

    def __init__(self, endings=ENDINGS):
        self.endings, self.episode, self.actions = endings, -1, []
        self.info = {"mass": 1.0}  # the same dictionary at every step

    def reset(self, *, seed=None, options=None):
        self.episode, self.time, self.position = self.episode + 1, 0, np.zeros(3)
        return self.observation(), self.info

    def observation(self) -> np.ndarray:
        return np.array([self.episode, self.time, *self.position], np.float32)

    def step(self, action):
        self.actions.append(np.array(action))
        self.time += 1
        self.position += (action - LOW) / (HIGH - LOW) - 0.5
        length, kind = self.endings[self.episode % len(self.endings)]
        ended = [self.time == length and word in kind for word in ("terminated", "truncated")]
        return self.observation(), float(self.position.sum()), *ended, self.info


class Toy(gym.Env):
    """Remembers what it was given; `answer(toy, outcome)` may change what is returned."""

    def __init__(self, observations=None, actions=None, answer=None, length=None):
        self.observation_space = observations or gym.spaces.Box(-1, 1, (5,))
        self.action_space = actions or gym.spaces.Box(-1, 1, (3,))
        self.answer = answer or (lambda toy, outcome: outcome)
        self.length, self.time, self.steps = length, 0, 0
        self.seeds, self.actions = [], []

    def reset(self, *, seed=None, options=None):
        self.seeds.append(seed)
        self.observation_space.seed(seed)
        self.time = 0
        return self.answer(self, (self.observation_space.sample(), {}))

    def step(self, action):
        self.actions.append(np.array(action))
        self.time, self.steps = self.time + 1, self.steps + 1
        obs, reward = self.observation_space.sample(), float(np.sum(action))
        return self.answer(self, (obs, reward, False, self.time == self.length, {}))


def toys(kind=Toy, **kwargs) -> list:
    """Registers Toy-v0; returns those that are made from here on."""
    made = []

    def make(**options):
        made.append(kind(**kwargs | options))
        return made[-1]

    gym.registry["Toy-v0"] = gym.envs.registration.EnvSpec("Toy-v0", entry_point=make)
    return made
