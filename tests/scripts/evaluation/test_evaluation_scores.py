"""The scores of an evaluation, on made-up embeddings, and the LoRAs that they recommend."""

import numpy as np
import pytest

from scripts.evaluation import scores


P, S, D = 4, 3, 8


def alike(axis, prompts=P, seeds=S):
    """Returns embeddings (prompts, seeds, D) that all point along one axis."""
    return np.broadcast_to(np.eye(D)[axis], (prompts, seeds, D))


def test_the_same_pictures():
    drawn = alike(0)
    np.testing.assert_allclose(scores.likeness(drawn, [drawn[0]] * P), 1)
    np.testing.assert_allclose(scores.drift(drawn, drawn), 0)
    np.testing.assert_allclose(scores.diversity(drawn), 0)
    found, which = scores.nearest(drawn, np.eye(D)[[3, 0, 5]])
    np.testing.assert_allclose(found, 1)
    assert (which == 1).all()


def test_pictures_with_nothing_in_common():
    drawn = np.stack([np.eye(D)[:S]] * P)
    np.testing.assert_allclose(scores.likeness(drawn, [np.eye(D)[5:7]] * P), 0)
    np.testing.assert_allclose(scores.drift(drawn, alike(7)), 1)
    np.testing.assert_allclose(scores.diversity(drawn), 1)
    np.testing.assert_allclose(scores.nearest(drawn, np.eye(D)[[6, 7]])[0], 0)


def test_each_prompt_has_references_of_its_own():
    drawn = np.stack([alike(0, 1)[0], alike(1, 1)[0]])
    references = [np.eye(D)[[0, 3]], np.eye(D)[[0]]]
    np.testing.assert_allclose(scores.likeness(drawn, references), [[0.5] * S, [0] * S])


def test_of_two_alike_and_one_other():
    drawn = np.eye(D)[[0, 0, 1]][None]
    np.testing.assert_allclose(scores.diversity(drawn), [[0.5, 0.5, 1]])


def test_the_distance_of_two_sets():
    """Sums over all pairs as in its paper; it is about 0 for similar sets, and large if all pictures have one pose."""
    rng = np.random.default_rng(0)

    def of_one_kind(*shape):
        return scores.normalised(np.eye(8)[0] + 0.3 * rng.standard_normal((*shape, 8)))

    drawn, held_out = of_one_kind(6, 3), of_one_kind(10)
    flat = drawn.reshape(-1, 8)

    def pairs(a, b):
        return [((1 + x @ y) / 2) ** 3 for i, x in enumerate(a) for j, y in enumerate(b) if a is not b or i != j]

    within, without, across = pairs(flat, flat), pairs(held_out, held_out), pairs(flat, held_out)
    assert (len(within), len(without), len(across)) == (18 * 17, 10 * 9, 180)
    found = scores.set_distance(drawn, held_out)
    assert found.shape == (6, 3)
    assert found.mean() == pytest.approx(np.mean(within) + np.mean(without) - 2 * np.mean(across))
    same = np.array([scores.set_distance(of_one_kind(6, 3), of_one_kind(10)).mean() for _ in range(200)])
    assert abs(same.mean()) < 3 * same.std() / 200**0.5  # negative as often as positive
    # Pictures in one pose that are as similar to each held-out picture: only the distance shows the difference.
    drawn, held_out = of_one_kind(30, 3), of_one_kind(40)
    copies = np.tile(scores.normalised(held_out.mean(axis=0)), (30, 3, 1))
    assert (copies @ held_out.mean(axis=0)).mean() > (drawn @ held_out.mean(axis=0)).mean()
    mean, error = scores.mean_and_error(scores.set_distance(drawn, held_out))
    assert scores.set_distance(copies, held_out).mean() > mean + 4 * error


def test_how_sure_the_distance_is():
    """The standard error over prompts equals the standard deviation of the distance over other draws of prompts."""
    rng = np.random.default_rng(1)
    held_out = scores.normalised(np.eye(8)[1] + 0.3 * rng.standard_normal((30, 8)))
    found = []
    for _ in range(200):
        prompts = np.eye(8)[0] + 0.5 * rng.standard_normal((12, 1, 8))
        found.append(
            scores.mean_and_error(
                scores.set_distance(scores.normalised(prompts + 0.1 * rng.standard_normal((12, 3, 8))), held_out)
            )
        )
    means, errors = np.array(found).T
    assert means.std() == pytest.approx(np.median(errors), rel=0.25)


def test_memorised_is_what_is_nearer_than_any_held_out_picture():
    np.testing.assert_array_equal(scores.memorised(np.array([[0.5, 0.81, 0.99]]), np.array([0.3, 0.8])), [[0, 1, 1]])


def test_lengths_do_not_count():
    np.testing.assert_allclose(scores.normalised([[3.0, 4.0], [0.0, 2.0]]), [[0.6, 0.8], [0, 1]])


def test_a_prompt_is_one_observation():
    """Several equal seeds of a prompt do not reduce the error."""
    of_prompts = np.arange(20.0)
    few, many = np.tile(of_prompts[:, None], (1, 3)), np.tile(of_prompts[:, None], (1, 30))
    wanted = of_prompts.mean(), of_prompts.std(ddof=1) / np.sqrt(20)
    np.testing.assert_allclose(scores.mean_and_error(few), wanted)
    np.testing.assert_allclose(scores.mean_and_error(many), wanted)


def test_of_one_prompt_each_seed_is_an_observation():
    mean, error = scores.mean_and_error([[1.0, 2.0, 3.0]])
    assert mean == 2
    assert error == pytest.approx(1.32 / np.sqrt(3))  # widened by Student's t for two degrees of freedom


def test_the_error_covers_the_truth_as_often_as_one_standard_error_of_many():
    """For four prompts, the true mean is within the error in two of three cases."""
    rng, within = np.random.default_rng(0), []
    for _ in range(4000):
        mean, error = scores.mean_and_error(rng.normal(size=(4, 1)) + 0.3 * rng.normal(size=(4, 3)))
        within.append(abs(mean) <= error)
    assert np.mean(within) == pytest.approx(0.683, abs=0.025)


def test_bleed_is_what_comes_above_the_base_by_what_was_asked_for():
    base = {"axe": np.zeros((3, S)), "fish": np.full((3, S), 0.5)}
    lora = {"axe": np.array([[0.0] * S, [0.0] * S, [1.0] * S]), "fish": np.full((3, S), 0.5)}
    matrix = scores.bleed(lora, base, ["axes", "axes", "others"])
    assert matrix["axes"] == {"axe": (0, 0), "fish": (0, 0)}
    assert matrix["others"] == {"axe": (1, 0), "fish": (0, 0)}


# The recommendation.

NOISE = np.linspace(-0.01, 0.01, 6)[:, None] + np.zeros(S)


def lora(likeness, drift=0.2, memorised=0.0, loss=0.7):
    shift = np.linspace(-0.02, 0.02, 6)[::-1, None] + np.zeros(S)
    return {
        "likeness": likeness + NOISE + 0.1 * shift,
        "drift": drift + NOISE,
        "memorised": (np.arange(6 * S) < memorised * 6 * S).astype(float).reshape(S, 6).T,
        "loss": scores.Estimate(loss, 0.05),
    }


BASE = 0.3 + NOISE


def test_the_most_like_is_taken():
    chosen, words = scores.recommend({"a": lora(0.4), "b": lora(0.6), "c": lora(0.5)}, BASE)
    assert chosen == "b"
    assert words.startswith("Use b: likeness to the held-out pictures 0.600")
    assert "a is less like the held-out pictures than b (by 0.200" in words
    assert words.count(".") == words.replace(". ", "").count(".")  # one sentence


def test_of_equals_the_one_that_drifts_least():
    tables = {"early": lora(0.5990, 0.1), "late": lora(0.5995, 0.4), "last": lora(0.5, 0.05)}
    tables["early"]["likeness"] = tables["late"]["likeness"] + 0.02 * np.tile([-1, 1, 0], (6, 1)) * NOISE / 0.01
    chosen, words = scores.recommend(tables, BASE)
    assert chosen == "early"
    assert "as good as late, with the least drift from the base model (0.100" in words


def test_what_memorised_comes_last():
    chosen, words = scores.recommend({"good": lora(0.5), "copy": lora(0.7, memorised=0.5)}, BASE)
    assert chosen == "good"
    assert "copy overfits: 50% of its pictures are nearer to a training picture than any held-out picture is" in words
    chosen, words = scores.recommend({"copy": lora(0.7, memorised=0.5)}, BASE)
    assert chosen == "copy"
    assert "all LoRAs overfit: train for fewer steps or on more pictures" in words


def test_what_loses_more_than_the_base_comes_last():
    chosen, words = scores.recommend(
        {"good": lora(0.5), "far": lora(0.7, loss=1.2), "near": lora(0.5, loss=1.04)}, BASE
    )
    assert chosen in ("good", "near")
    assert "far overfits: its held-out loss is 1.20 ± 0.05 times the base model's" in words
    assert "near overfits" not in words


def test_none_is_taken_where_none_is_better_than_the_base():
    chosen, words = scores.recommend({"a": lora(0.3), "b": lora(0.1)}, BASE)
    assert chosen is None
    assert words.startswith("Use none of them: a is no more like the held-out pictures than the base model is")
    assert "b is no more like" in words


def test_without_training_pictures_nothing_is_said_of_memory():
    tables = {"a": lora(0.5) | {"memorised": None}}
    assert scores.recommend(tables, BASE)[0] == "a"
