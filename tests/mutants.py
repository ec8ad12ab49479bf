"""Defects that the tests must catch: each one a change of the text of a script.

The first seven are those of the project's predecessor. A text is replaced only where it stands
exactly once, so a mutant that no longer fits its script is an error and not a test that passes.
"""

from typing import NamedTuple


class Mutant(NamedTuple):
    """A change to a script, and the test that has to fail because of it."""

    name: str
    scripts: tuple[str, ...]
    original: str
    mutated: str
    why: str
    caught_by: str  # file::test

    def apply(self, text: str) -> str:
        """The text of the script with the defect in it."""
        if text.count(self.original) != 1:
            raise ValueError(f"{self.name}: its text stands {text.count(self.original)} times")
        return text.replace(self.original, self.mutated)


SAC, TD3 = ("sac_dmc", "sac_gym"), ("td3_dmc", "td3_gym")
DMC, GYM = ("sac_dmc", "td3_dmc"), ("sac_gym", "td3_gym")

SHARED, ENVIRONMENTS = "test_shared_maths.py::", "test_environments.py::"

MUTANTS = [
    Mutant(
        "polyak_swapped",
        SAC,
        "new_tensors=state.critic, old_tensors=state.target_critic",
        "new_tensors=state.target_critic, old_tensors=state.critic",
        "The target moves by 1 - tau, so there is no slow critic.",
        SHARED + "test_targets_follow_by_tau",
    ),
    Mutant(
        "polyak_swapped",
        TD3,
        """new_tensors=(actor, state.critic),
            old_tensors=(state.target_actor, state.target_critic),""",
        """old_tensors=(actor, state.critic),
            new_tensors=(state.target_actor, state.target_critic),""",
        "The targets move by 1 - tau, so there are no slow networks.",
        SHARED + "test_targets_follow_by_tau",
    ),
    Mutant(
        "greedy_training",
        SAC + TD3,
        "action, key = explore(state, obs, args)",
        "action, key = act(state, obs[:, None], args)[:, 0], state.key",
        "Training acts like evaluation, and never explores.",
        ENVIRONMENTS + "test_training_explores",
    ),
    Mutant(
        "explore_returns_the_mean",
        SAC,
        "return sample_action(state.actor, obs, action_key, args)[0], key",
        "return jnp.tanh(policy(state.actor, obs, args)[0]), key",
        "Exploring draws nothing.",
        SHARED + "test_exploring_draws_new_actions_in_the_box_and_new_keys",
    ),
    Mutant(
        "explore_returns_the_mean",
        TD3,
        "return jnp.clip(action + noise, -1, 1), key",
        "return jnp.clip(action, -1, 1), key",
        "Exploring adds nothing.",
        SHARED + "test_exploring_draws_new_actions_in_the_box_and_new_keys",
    ),
    Mutant(
        "time_limit_terminates",
        DMC,
        "terminated[i] = timestep.last() and timestep.discount == 0",
        "terminated[i] = timestep.last()",
        "The discount of the last step is ignored, so that time limits cut the bootstrap.",
        ENVIRONMENTS + "test_the_time_limit_of_the_suite_truncates",
    ),
    Mutant(
        "time_limit_stored_as_termination",
        SAC + TD3,
        "row = np.column_stack([obs, action, reward, ~terminated, ended, next_obs])",
        "row = np.column_stack([obs, action, reward, ~ended, ended, next_obs])",
        "Every end of an episode is stored as a termination.",
        ENVIRONMENTS + "test_the_stored_discount_is_0_at_terminations_only",
    ),
    Mutant(
        "last_allowed_step_never_terminates",
        GYM,
        "truncated &= ~terminated",
        "terminated &= ~truncated",
        "A termination in the last allowed step is taken for the time limit.",
        ENVIRONMENTS + "test_a_termination_in_the_last_allowed_step_terminates",
    ),
    Mutant(
        "log_prob_averaged",
        SAC,
        "return jnp.tanh(u), (log_normal - log_slope).sum(axis=-1)",
        "return jnp.tanh(u), (log_normal - log_slope).mean(axis=-1)",
        "The log-probability is that of an average action dimension.",
        "test_sac.py::test_the_log_probability_is_the_sum_over_action_dimensions",
    ),
    Mutant(
        "log_prob_not_summed",
        SAC,
        "return jnp.tanh(u), (log_normal - log_slope).sum(axis=-1)",
        "return jnp.tanh(u), log_normal.mean(axis=-1) - log_slope.sum(axis=-1)",
        "Only the correction is summed over action dimensions, as in the predecessor.",
        "test_sac.py::test_the_reported_entropy_is_summed_over_action_dimensions",
    ),
    Mutant(
        "critic_sees_another_action",
        SAC + TD3,
        "row = np.column_stack([obs, action, reward,",
        "row = np.column_stack([obs, np.tanh(action), reward,",
        "The critics learn about tanh(a) while the environment receives a.",
        ENVIRONMENTS + "test_the_stored_action_is_the_executed_one",
    ),
    Mutant(
        "one_bound_for_all_dimensions",
        SAC + TD3,
        "(self.high - self.low) / 2",
        "(self.high[0] - self.low[0]) / 2",
        "The scale of the first action dimension is used for all.",
        ENVIRONMENTS + "test_every_dimension_of_an_action_has_its_own_bounds",
    ),
    Mutant(
        "symmetric_bounds",
        SAC + TD3,
        "self.low + (action.astype(np.float64) + 1) * (self.high - self.low) / 2",
        "action.astype(np.float64) * self.high",
        "Bounds are taken to be symmetric.",
        ENVIRONMENTS + "test_every_dimension_of_an_action_has_its_own_bounds",
    ),
    Mutant(
        "flag_without_a_type",
        SAC + TD3,
        "gamma: float = 0.99",
        "gamma: str = 0.99",
        "A number given on the command line arrives as a string.",
        ENVIRONMENTS + "test_every_number_given_as_a_flag_arrives_as_a_number",
    ),
    Mutant(
        "larger_critic",
        SAC,
        "next_q = q_values(state.target_critic, batch.next_obs, next_action, args).min(axis=0)",
        "next_q = q_values(state.target_critic, batch.next_obs, next_action, args).max(axis=0)",
        "Targets take the larger critic, and overestimate.",
        SHARED + "test_the_target_takes_the_smaller_critic_whichever_it_is",
    ),
    Mutant(
        "larger_critic",
        TD3,
        "next_q = q_values(state.target_critic, batch.next_obs, next_action, args).min(axis=0)",
        "next_q = q_values(state.target_critic, batch.next_obs, next_action, args).max(axis=0)",
        "Targets take the larger critic, and overestimate.",
        SHARED + "test_the_target_takes_the_smaller_critic_whichever_it_is",
    ),
    Mutant(
        "termination_bootstraps",
        SAC + TD3,
        "batch.reward + args.gamma * batch.discount *",
        "batch.reward + args.gamma *",
        "The value after a termination counts.",
        SHARED + "test_the_target_at_a_termination_is_the_reward_exactly",
    ),
    Mutant(
        "target_not_stopped",
        SAC + TD3,
        "lambda p: critic_loss(p, batch, target, args)",
        # The key is cloned: using it twice would be caught as such, not as a gradient.
        "lambda p: critic_loss(p, batch, td_target(state._replace(target_critic=p), batch, "
        "jax.random.clone(target_key), args), args)",
        "The gradient flows through the target.",
        SHARED + "test_the_critics_descend_the_error_to_a_fixed_target",
    ),
    Mutant(
        "noise_not_clipped",
        TD3,
        "noise = jnp.clip(noise, -args.noise_clip, args.noise_clip)",
        "noise = noise * 1.0",
        "The noise on target actions has no bound.",
        "test_td3.py::test_smoothing_obeys_its_flags",
    ),
    Mutant(
        "one_noise_for_the_batch",
        TD3,
        "args.policy_noise * jax.random.normal(key, batch.action.shape)",
        "args.policy_noise * jax.random.normal(key, (1, batch.action.shape[1]))",
        "All samples share one draw of the noise.",
        "test_td3.py::test_smoothing_is_clipped_gaussian_noise_of_its_own_for_every_sample",
    ),
    Mutant(
        "target_from_the_fast_actor",
        TD3,
        "policy(state.target_actor, batch.next_obs, args)",
        "policy(state.actor, batch.next_obs, args)",
        "Targets use the actor that is being trained.",
        "test_td3.py::test_targets_come_from_the_slow_networks",
    ),
    Mutant(
        "no_delay",
        TD3,
        "every(args.policy_frequency, delayed, state)",
        "every(1, delayed, state)",
        "The actor and the targets move at every update.",
        "test_td3.py::test_the_actor_and_all_targets_move_at_every_second_update",
    ),
    Mutant(
        "actor_descends",
        TD3,
        "loss = -q_values(state.critic, batch.obs, action, args)[0].mean()",
        "loss = q_values(state.critic, batch.obs, action, args)[0].mean()",
        "The actor goes where values are low.",
        SHARED + "test_the_actor_ascends_the_critics_just_updated",
    ),
    Mutant(
        "entropy_punished",
        SAC,
        "next_v = next_q - jnp.exp(state.log_alpha) * log_prob",
        "next_v = next_q + jnp.exp(state.log_alpha) * log_prob",
        "Values fall with entropy.",
        "test_sac.py::test_a_soft_value_holds_alpha_times_the_entropy",
    ),
    Mutant(
        "log_alpha_for_alpha",
        SAC,
        "loss = (jnp.exp(state.log_alpha) * log_prob - q).mean()",
        "loss = (state.log_alpha * log_prob - q).mean()",
        "The logarithm of alpha weighs the entropy.",
        "test_sac.py::test_the_actor_descends_alpha_log_prob_minus_the_smaller_value",
    ),
    Mutant(
        "alpha_runs_away",
        SAC,
        "loss = log_alpha * (entropy - target_entropy)",
        "loss = log_alpha * (target_entropy - entropy)",
        "Alpha falls while entropy is short.",
        "test_sac.py::test_updates_raise_alpha_when_entropy_is_short_and_lower_it_else",
    ),
    Mutant(
        "std_for_log_std",
        SAC,
        "u = mean + jnp.exp(log_std) * noise",
        "u = mean + log_std * noise",
        "The logarithm of the deviation is used as the deviation.",
        "test_sac.py::test_exploring_samples_the_gaussian_of_the_actor",
    ),
    Mutant(
        "variance_for_deviation",
        SAC + TD3,
        "(moments.mean, jnp.sqrt(moments.var))",
        "(moments.mean, moments.var)",
        "Observations are divided by their variance.",
        SHARED + "test_normalised_observations_have_mean_0_and_variance_1_within_10",
    ),
    Mutant(
        "moments_keep_their_start",
        SAC + TD3,
        "moments.var + (jnp.square(delta) * (1 - 1 / count) - moments.var) / count",
        "moments.var + (jnp.square(delta) - moments.var) / (count + 1)",
        "The variance before the first observation counts as one.",
        SHARED + "test_running_moments_are_those_of_all_observations_inserted",
    ),
    Mutant(
        "samples_empty_rows",
        SAC + TD3,
        "0, jnp.minimum(count, capacity))",
        "0, capacity)",
        "Rows that were never inserted are sampled.",
        SHARED + "test_only_inserted_transitions_are_sampled_and_all_of_them",
    ),
    Mutant(
        "stores_the_reset_observation",
        SAC + TD3,
        "~terminated, ended, next_obs])",
        "~terminated, ended, obs])",
        "A transition does not hold what its step led to.",
        ENVIRONMENTS + "test_stored_transitions_lead_to_each_other_but_not_across_episodes",
    ),
    Mutant(
        "windows_cross_episodes",
        SAC + TD3,
        "1 - ended[:, :-1]",
        "1 - 0 * ended[:, :-1]",
        "Rewards of the next episode count towards the return of this one.",
        SHARED + "test_windows_of_n_steps_are_those_of_a_loop_over_episodes",
    ),
    Mutant(
        "windows_cross_the_ring",
        SAC + TD3,
        "(start - count) % capacity + offset < capacity",
        "start + offset < capacity + start",
        "Windows run on from the newest transition into the oldest.",
        SHARED + "test_windows_of_n_steps_are_those_of_a_loop_over_episodes",
    ),
]
